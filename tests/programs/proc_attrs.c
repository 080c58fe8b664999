/*
 * Attributes of a process: working directory, umask, names, command line in its own (changed)
 * argument area, auxv, addresses of the mm, limits, nice, policy, CPU affinity, oom score, parent
 * death signal, subreaper.
 */
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include "target.h"

enum { NICE = 7, OOM = 321, ROOM = 1 << 16 };

static const char *const files[] = {"/proc/self/cmdline", "/proc/self/environ", "/proc/self/auxv",
				    "/proc/self/comm", "/proc/self/limits", "/proc/self/oom_score_adj"};
enum { FILES = sizeof(files) / sizeof(files[0]) };

/* Fields of /proc/PID/stat that do not change by running (proc_pid_stat(5), counted from 1). */
static const int fields[] = {1, 5, 6, 18, 19, 20, 26, 27, 28, 38, 41, 45, 46, 47, 48, 49, 50, 51};
enum { FIELDS = sizeof(fields) / sizeof(fields[0]) };

struct attributes {
	char text[FILES][ROOM], exe[PATH_MAX], cwd[PATH_MAX], root[PATH_MAX];
	size_t size[FILES];
	unsigned long long stat[64];
	struct rlimit limit[RLIM_NLIMITS];
	cpu_set_t cpus;
	long brk;
	int death_signal, subreaper;
};

static struct attributes before, after;

static void read_link(const char *path, char *text)
{
	text[MUST(readlink(path, text, PATH_MAX - 1))] = 0;
}

static void look(struct attributes *all)
{
	char stat[2048], *field;

	for (int i = 0; i < FILES; i++)
		all->size[i] = target_slurp(files[i], all->text[i], ROOM);
	read_link("/proc/self/exe", all->exe);
	read_link("/proc/self/cwd", all->cwd);
	read_link("/proc/self/root", all->root);
	target_slurp("/proc/self/stat", stat, sizeof(stat));
	field = strrchr(stat, ')');
	for (int i = 3; i < 53 && (field = strchr(field, ' ')); i++)
		all->stat[i] = strtoull(++field, NULL, 10);
	all->stat[1] = strtoull(stat, NULL, 10);
	for (int i = 0; i < RLIM_NLIMITS; i++)
		MUST(getrlimit(i, &all->limit[i]));
	MUST(sched_getaffinity(0, sizeof(all->cpus), &all->cpus));
	all->brk = MUST(sbrk(0));
	MUST(prctl(PR_GET_PDEATHSIG, &all->death_signal));
	MUST(prctl(PR_GET_CHILD_SUBREAPER, &all->subreaper));
}

static void compare(void)
{
	char what[32];

	for (int i = 0; i < FILES; i++) {
		SAME(files[i], after.size[i], before.size[i]);
		same_bytes(files[i], after.text[i], before.text[i], before.size[i]);
	}
	same_text("exe", after.exe, before.exe);
	same_text("cwd", after.cwd, before.cwd);
	same_text("root", after.root, before.root);
	for (int i = 0; i < FIELDS; i++) {
		snprintf(what, sizeof(what), "field %d of stat", fields[i]);
		SAME(what, after.stat[fields[i]], before.stat[fields[i]]);
	}
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		snprintf(what, sizeof(what), "limit %d", i);
		SAME(what, after.limit[i].rlim_cur, before.limit[i].rlim_cur);
		SAME(what, after.limit[i].rlim_max, before.limit[i].rlim_max);
	}
	CHECK(CPU_EQUAL(&after.cpus, &before.cpus), "CPU affinity: %d CPUs, not %d", CPU_COUNT(&after.cpus),
	      CPU_COUNT(&before.cpus));
	SAME("brk", after.brk, before.brk);
	SAME("parent death signal", after.death_signal, before.death_signal);
	SAME("child subreaper", after.subreaper, before.subreaper);
}

/* Every limit gets a number of its own, soft and hard, wherever it may be lowered. */
static void lower_limits(void)
{
	for (int i = 0; i < RLIM_NLIMITS; i++) {
		struct rlimit limit;
		rlim_t scale = i == RLIMIT_AS || i == RLIMIT_DATA ? 1ull << 40 :
			       i == RLIMIT_NOFILE || i == RLIMIT_NPROC ? 1000 : 1 << 22;

		MUST(getrlimit(i, &limit));
		if (limit.rlim_max > scale + 200 + (rlim_t)i)
			limit.rlim_max = scale + 200 + (rlim_t)i;
		if (limit.rlim_cur > scale + (rlim_t)i)
			limit.rlim_cur = scale + (rlim_t)i;
		MUST(setrlimit(i, &limit));
	}
}

int main(int argc, char **argv)
{
	struct sched_param none = {0};
	sigset_t set;
	cpu_set_t cpus, one;

	target_start(argc, argv);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	MUST(prctl(PR_SET_PDEATHSIG, SIGUSR1));
	MUST(prctl(PR_SET_CHILD_SUBREAPER, 1));
	MUST(mkdir("a directory", 0700));
	MUST(chdir("a directory"));
	umask(0156);
	MUST(prctl(PR_SET_NAME, "(phaul) )name"));
	lower_limits();
	MUST(setpriority(PRIO_PROCESS, 0, NICE));
	MUST(sched_setscheduler(0, SCHED_BATCH, &none));
	MUST(sched_getaffinity(0, sizeof(cpus), &cpus));
	CPU_ZERO(&one);
	for (int cpu = 0; !CPU_COUNT(&one); cpu++)
		if (CPU_ISSET(cpu, &cpus))
			CPU_SET(cpu, &one);
	MUST(sched_setaffinity(0, sizeof(one), &one));
	int score = (int)MUST(open("/proc/self/oom_score_adj", O_WRONLY));
	SAME("oom_score_adj", dprintf(score, "%d", OOM), 3);
	close(score);
	snprintf(argv[0], strlen(argv[0]) + 1, "phaul: renamed");
	char *environment = getenv("PATH");
	if (environment)
		environment[0] ^= 1;
	free(malloc(1 << 16)); /* the buffers of stdio are part of the heap from here on */
	look(&before);

	target_ready();
	while (!target_ending(2)) {
		look(&after);
		compare();
	}

	look(&after);
	compare();
	SAME("umask", umask(0), 0156);
	SAME("nice", getpriority(PRIO_PROCESS, 0), NICE);
	SAME("policy", MUST(sched_getscheduler(0)), SCHED_BATCH);
	SAME("AT_PAGESZ", getauxval(AT_PAGESZ), PAGE);
	same_text("AT_EXECFN", (const char *)getauxval(AT_EXECFN), before.exe);
	MUST(chdir(".."));
	MUST(rmdir("a directory"));
	target_pass();
}
