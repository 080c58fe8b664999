/*
 * What a thread has registered with the kernel: its rseq area (kept up to date, and critical
 * sections aborted: two threads count on one CPU without atomics or locks), the address that is
 * cleared at its exit, its robust list.
 */
#include <linux/futex.h>
#include <linux/rseq.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/rseq.h>

#include "target.h"

enum { COUNTERS = 2, BURST = 20000 };

/* One entry of a robust list, as futex(2) users lay it out: the lock word follows the link. */
struct lock {
	struct robust_list link;
	uint32_t word;
};

static atomic_bool ending;
static atomic_int up;
static uint64_t count, done[COUNTERS];
static uint32_t cleared;
static struct lock held;
static struct robust_list_head robust;

static struct rseq *area(void)
{
	return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

/* Adds one in a restartable sequence; false if the kernel aborted it. */
static bool add_one(uint64_t *counter)
{
	__asm__ goto(
		".pushsection __rseq_cs, \"aw\"\n"
		".balign 32\n"
		"3:	.long 0, 0\n"
		"	.quad 1f, 2f - 1f, 4f\n"
		".popsection\n"
		"	lea 3b(%%rip), %%rax\n"
		"	mov %%rax, %c[rseq_cs](%[area])\n"
		"1:	mov (%[counter]), %%rax\n"
		"	pause\n" /* a longer window between the load and the store */
		"	inc %%rax\n"
		"	mov %%rax, (%[counter])\n"
		"2:	jmp %l[committed]\n"
		"	.byte 0x0f, 0xb9, 0x3d\n" /* ud1, so that the signature is no instruction */
		"	.long %c[signature]\n"
		"4:	jmp %l[aborted]\n"
		:
		: [area] "r"(area()), [counter] "r"(counter), [signature] "i"(RSEQ_SIG),
		  [rseq_cs] "i"(offsetof(struct rseq, rseq_cs))
		: "rax", "memory", "cc"
		: committed, aborted);
committed:
	return true;
aborted:
	return false;
}

/* The CPU in the area is the one that the kernel tells, if the thread did not change it meanwhile. */
static void check_area(void)
{
	volatile struct rseq *now = area();

	for (int i = 0; i < 1000; i++) {
		uint32_t before = now->cpu_id, start = now->cpu_id_start;
		unsigned cpu;

		MUST(syscall(SYS_getcpu, &cpu, NULL, NULL));
		if (before == now->cpu_id && start == now->cpu_id_start && before == cpu && start == cpu)
			return;
	}
	target_fail("rseq area says CPU %u, %u", now->cpu_id, now->cpu_id_start);
}

static void registered(void)
{
	REFUSED(syscall(SYS_rseq, area(), __rseq_size < 32 ? 32 : __rseq_size, 0, RSEQ_SIG), EBUSY);
	check_area();
}

static void *counter(void *argument)
{
	uint64_t *mine = argument;
	cpu_set_t cpus;

	up++;
	while (!ending) {
		MUST(sched_getaffinity(0, sizeof(cpus), &cpus));
		SAME("CPUs of a counting thread", CPU_COUNT(&cpus), 1);
		for (int i = 0; i < BURST; i++)
			*mine += add_one(&count);
		check_area();
		sched_yield();
	}
	registered();
	return NULL;
}

/* Ends with a lock held and an address to clear, neither of them glibc's. */
static void *mortal(void *none)
{
	struct robust_list_head *head;
	size_t size;
	int *address;

	robust.list.next = &held.link;
	robust.futex_offset = offsetof(struct lock, word);
	held.link.next = &robust.list;
	held.word = (uint32_t)gettid();
	MUST(syscall(SYS_set_robust_list, &robust, sizeof(robust)));
	cleared = (uint32_t)MUST(syscall(SYS_set_tid_address, &cleared));
	SAME("tid", cleared, gettid());
	up++;
	while (!ending)
		target_sleep(1);
	MUST(syscall(SYS_get_robust_list, 0, &head, &size));
	SAME("robust list", (long)head, (long)&robust);
	SAME("size of its head", size, sizeof(robust));
	MUST(prctl(PR_GET_TID_ADDRESS, &address));
	SAME("address to clear", (long)address, (long)&cleared);
	registered();
	return none;
}

int main(int argc, char **argv)
{
	pthread_t counters[COUNTERS], dying;
	struct robust_list_head *head, *head_now;
	int *address, *address_now;
	cpu_set_t all, one;
	size_t size;

	target_start(argc, argv);
	CHECK(__rseq_size, "glibc has registered no rseq area");
	MUST(sched_getaffinity(0, sizeof(all), &all));
	CPU_ZERO(&one);
	CPU_SET(sched_getcpu(), &one);
	MUST(sched_setaffinity(0, sizeof(one), &one)); /* the counting threads share this CPU */
	for (int i = 0; i < COUNTERS; i++)
		SAME("pthread_create", pthread_create(&counters[i], NULL, counter, &done[i]), 0);
	MUST(sched_setaffinity(0, sizeof(all), &all));
	SAME("pthread_create", pthread_create(&dying, NULL, mortal, NULL), 0);
	MUST(syscall(SYS_get_robust_list, 0, &head, &size));
	MUST(prctl(PR_GET_TID_ADDRESS, &address));
	while (up < COUNTERS + 1)
		target_sleep(1);
	registered();

	target_ready();
	while (!target_ending(1)) {
		/* From one CPU to the next and back: the kernel keeps the area up to date. */
		for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
			if (CPU_ISSET(cpu, &all)) {
				CPU_ZERO(&one);
				CPU_SET(cpu, &one);
				MUST(sched_setaffinity(0, sizeof(one), &one));
				SAME("CPU in the rseq area", ((volatile struct rseq *)area())->cpu_id, cpu);
			}
		MUST(sched_setaffinity(0, sizeof(all), &all));
		check_area();
	}

	registered();
	MUST(syscall(SYS_get_robust_list, 0, &head_now, &size));
	SAME("robust list", (long)head_now, (long)head);
	MUST(prctl(PR_GET_TID_ADDRESS, &address_now));
	SAME("address to clear", (long)address_now, (long)address);
	SAME("tid at that address", *address_now, gettid());
	ending = true;
	for (int i = 0; i < COUNTERS; i++)
		SAME("join", pthread_join(counters[i], NULL), 0);
	SAME("counts in restartable sequences", count, done[0] + done[1]);

	for (int i = 0; *(volatile uint32_t *)&cleared; i++) {
		CHECK(i < 5000, "tid of an ended thread was not cleared");
		target_sleep(1);
	}
	SAME("word of a lock whose owner ended", *(volatile uint32_t *)&held.word, FUTEX_OWNER_DIED);
	target_pass();
}
