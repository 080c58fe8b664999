/*
 * The vDSO: found once through auxv, called through the kept pointer in a tight loop, and the clocks
 * it reads agree with the system call's.
 */
#include <elf.h>
#include <sys/auxv.h>

#include "target.h"

enum { CALLS = 20000 };

typedef int clock_function(clockid_t, struct timespec *);

static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_REALTIME, CLOCK_BOOTTIME};
enum { CLOCKS = sizeof(clocks) / sizeof(clocks[0]) };

/* The dynamic symbol of that name; its hash table tells how many there are. */
static void *find(const char *base, const char *name)
{
	const Elf64_Ehdr *head = (const Elf64_Ehdr *)base;
	const Elf64_Phdr *part = (const Elf64_Phdr *)(base + head->e_phoff);
	const Elf64_Sym *symbols = NULL;
	const uint32_t *hash = NULL;
	const char *names = NULL;

	same_bytes("vDSO", base, ELFMAG, SELFMAG);
	for (int i = 0; i < head->e_phnum; i++)
		if (part[i].p_type == PT_DYNAMIC)
			for (const Elf64_Dyn *d = (const Elf64_Dyn *)(base + part[i].p_offset); d->d_tag; d++) {
				const void *at = base + d->d_un.d_ptr;

				if (d->d_tag == DT_SYMTAB)
					symbols = at;
				else if (d->d_tag == DT_STRTAB)
					names = at;
				else if (d->d_tag == DT_HASH)
					hash = at;
			}
	CHECK(symbols && names && hash, "the vDSO has no dynamic symbols");
	for (uint32_t i = 0; i < hash[1]; i++)
		if (!strcmp(names + symbols[i].st_name, name))
			return (void *)(base + symbols[i].st_value);
	target_fail("%s is not in the vDSO", name);
}

static uint64_t sum_of(const char *base)
{
	const uint64_t *word = (const uint64_t *)base;
	uint64_t sum = 0;

	for (size_t i = 0; i < 2 * PAGE / 8; i++)
		sum = (sum ^ word[i]) * 0x100000001b3u;
	return sum;
}

static int64_t read_vdso(clock_function *call, clockid_t clock)
{
	struct timespec now;

	SAME("clock_gettime of the vDSO", call(clock, &now), 0);
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static int64_t read_kernel(clockid_t clock)
{
	struct timespec now;

	MUST(syscall(SYS_clock_gettime, clock, &now));
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

int main(int argc, char **argv)
{
	int64_t last[CLOCKS] = {0};
	char text[PATH_MAX];

	target_start(argc, argv);
	const char *base = (const char *)getauxval(AT_SYSINFO_EHDR);
	CHECK(base, "no vDSO");
	clock_function *call = (clock_function *)find(base, "__vdso_clock_gettime");
	uint64_t sum = sum_of(base);
	target_ready();
	while (!target_ending(0)) {
		for (int i = 0; i < CALLS; i++) {
			int64_t now = read_vdso(call, CLOCK_MONOTONIC);

			CHECK(now >= last[0], "CLOCK_MONOTONIC went back by %lld ns", (long long)(last[0] - now));
			last[0] = now;
		}
		for (int i = 0; i < CLOCKS; i++) {
			int64_t before = read_vdso(call, clocks[i]), kernel = read_kernel(clocks[i]);
			int64_t after = read_vdso(call, clocks[i]);

			/* CLOCK_REALTIME may be set: it is only compared with itself. */
			CHECK(before <= kernel && kernel <= after, "clock %d: vDSO %lld, kernel %lld, vDSO %lld",
			      clocks[i], (long long)before, (long long)kernel, (long long)after);
			CHECK(i == 1 || before >= last[i], "clock %d went back", clocks[i]);
			last[i] = after;
		}
	}

	SAME("address of the vDSO", getauxval(AT_SYSINFO_EHDR), (unsigned long)base);
	target_mapping(base, text, sizeof(text));
	same_text("mapping at that address", text, "r-xp [vdso]");
	SAME("sum of the vDSO", sum_of(base), sum);
	target_pass();
}
