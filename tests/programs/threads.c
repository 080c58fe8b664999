/*
 * Twelve threads, each with its own name, thread-local data, signal mask, alternate stack and robust
 * list; working, or waiting on a futex, condition, mutex, semaphore. A robust mutex loses its owner
 * and new threads are made only at the end.
 */
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/prctl.h>

#include "target.h"

enum { THREADS = 12, STACK = 32 << 10 };

static __thread struct {
	uint64_t noise[64];
	int number;
} local;

static atomic_bool ending;
static atomic_int up, on_alternate;
static uint32_t word;
static uint64_t rounds, counted[THREADS], counter, broadcasts;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER, held = PTHREAD_MUTEX_INITIALIZER, robust;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn = PTHREAD_COND_INITIALIZER;
static sem_t semaphore;

/* What a thread has of its own, as the kernel tells it. */
struct own {
	pid_t tid;
	pthread_t self;
	stack_t alternate;
	uint64_t mask;
	char name[16];
	void *robust_list;
};

static void look(struct own *own)
{
	size_t size;

	memset(own, 0, sizeof(*own));
	own->tid = gettid();
	own->self = pthread_self();
	MUST(sigaltstack(NULL, &own->alternate));
	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &own->mask, sizeof(own->mask)));
	MUST(prctl(PR_GET_NAME, own->name));
	MUST(syscall(SYS_get_robust_list, 0, &own->robust_list, &size));
}

static void check(const struct own *before)
{
	struct own now;
	char what[32];

	look(&now);
	SAME("tid", now.tid, before->tid);
	same_text("name", now.name, before->name);
	SAME("signal mask", now.mask, before->mask);
	SAME("robust list", (long)now.robust_list, (long)before->robust_list);
	snprintf(what, sizeof(what), "altstack of thread %d", local.number);
	same_bytes(what, &now.alternate, &before->alternate, sizeof(now.alternate));
	CHECK(pthread_equal(now.self, before->self), "pthread_self of thread %d", local.number);
	same_fill("thread-local data", local.noise, sizeof(local.noise), (uint64_t)local.number);
}

static void on_signal(int number)
{
	stack_t now;

	(void)number;
	MUST(sigaltstack(NULL, &now));
	SAME("handler on the alternate stack", now.ss_flags, SS_ONSTACK);
	on_alternate++;
}

static void set_up(int number)
{
	stack_t alternate = {.ss_size = STACK + (size_t)number * PAGE};
	char name[16];
	sigset_t set;

	local.number = number;
	target_fill(local.noise, sizeof(local.noise), (uint64_t)number);
	alternate.ss_sp = malloc(alternate.ss_size);
	MUST(sigaltstack(&alternate, NULL));
	snprintf(name, sizeof(name), "phaul worker %d", number);
	MUST(prctl(PR_SET_NAME, name));
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGRTMIN + number);
	sigaddset(&set, SIGRTMAX - 2 * number);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
}

/* Each way to spend the time until the end; several threads take the first. */
static void work(const struct own *own)
{
	while (!ending) {
		pthread_mutex_lock(&lock);
		counter++;
		pthread_mutex_unlock(&lock);
		counted[local.number]++;
		check(own);
		target_sleep(1);
	}
}

static void wait_for_turns(void)
{
	pthread_mutex_lock(&gate);
	for (uint64_t seen = rounds; !ending; seen = rounds) {
		while (rounds == seen && !ending)
			pthread_cond_wait(&turn, &gate);
		broadcasts += rounds != seen;
	}
	pthread_mutex_unlock(&gate);
}

static void *run(void *argument)
{
	int number = (int)(long)argument;
	struct own own;

	set_up(number);
	look(&own);
	if (number == 8)
		pthread_mutex_lock(&robust);
	up++;
	switch (number) {
	case 4:
	case 5:
		wait_for_turns();
		break;
	case 6:
	case 7:
		SAME("futex wait", syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, NULL), 0);
		break;
	case 8: /* ends as the owner of the robust mutex */
	case 9:
		SAME("lock", pthread_mutex_lock(&held), 0);
		pthread_mutex_unlock(&held);
		break;
	case 10:
		SAME("sem_wait", sem_wait(&semaphore), 0);
		break;
	default:
		work(&own);
	}
	check(&own);
	pthread_kill(pthread_self(), SIGUSR2);
	check(&own);
	return (void *)(long)(number * 1000 + own.tid % 1000);
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
	pthread_mutexattr_t kind;
	pthread_t thread[THREADS + 1];
	pid_t pid = getpid();
	uint64_t sum = 0;
	void *result;

	target_start(argc, argv);
	MUST(sigaction(SIGUSR2, &action, NULL));
	pthread_mutexattr_init(&kind);
	pthread_mutexattr_setrobust(&kind, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(&robust, &kind);
	sem_init(&semaphore, 0, 0);
	pthread_mutex_lock(&held);
	for (long i = 0; i < THREADS; i++)
		SAME("pthread_create", pthread_create(&thread[i], NULL, run, (void *)i), 0);
	while (up < THREADS)
		target_sleep(1);
	target_sleep(20); /* the last ones reach their waits */

	target_ready();
	while (!target_ending(1)) {
		pthread_mutex_lock(&gate);
		rounds++;
		pthread_cond_broadcast(&turn);
		pthread_mutex_unlock(&gate);
		SAME("robust mutex is held", pthread_mutex_trylock(&robust), EBUSY);
	}

	SAME("getpid", getpid(), pid);
	pthread_mutex_lock(&gate);
	ending = true;
	pthread_cond_broadcast(&turn);
	pthread_mutex_unlock(&gate);
	SAME("waiters on the futex", MUST(syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL)), 2);
	pthread_mutex_unlock(&held);
	sem_post(&semaphore);
	SAME("pthread_create after the move",
	     pthread_create(&thread[THREADS], NULL, run, (void *)(long)THREADS), 0);
	for (int i = 0; i <= THREADS; i++) {
		SAME("join", pthread_join(thread[i], &result), 0);
		SAME("result of a thread", (long)result / 1000, i);
		sum += i < THREADS ? counted[i] : 0;
	}
	SAME("robust mutex without owner", pthread_mutex_lock(&robust), EOWNERDEAD);
	SAME("counts under the mutex", counter, sum);
	CHECK(broadcasts > 0 && broadcasts <= 2 * rounds, "%llu wake-ups in %llu rounds",
	      (unsigned long long)broadcasts, (unsigned long long)rounds);
	SAME("handlers on alternate stacks", on_alternate, THREADS + 1);
	target_pass();
}
