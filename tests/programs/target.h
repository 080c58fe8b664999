/*
 * What every target program shares.
 *
 * A target is started as `program OUTPUT [ARGS]`, OUTPUT being an absolute path. It goes to
 * OUTPUT's directory, keeps no descriptor but 0-2 (/dev/null) and OUTPUT (append), sets up the
 * state that its file is about, appends the line `ready` and works. On SIGTERM it looks at
 * everything it had, appends `PASS` or `FAIL: what differed`, and exits 0 or 1. A failure that
 * shows earlier is told at once.
 */
#ifndef TARGET_H
#define TARGET_H

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096 };

static int target_output;
static uint64_t target_seed;

/* One line in one write: lines of threads and children never mix. */
static inline void target_line(const char *head, const char *format, va_list args)
{
	char line[1024];
	size_t room = sizeof(line) - 1, used = (size_t)snprintf(line, room, "%s", head);
	int more = vsnprintf(line + used, room - used, format, args);

	used += (size_t)more < room - used ? (size_t)more : room - used - 1;
	line[used++] = '\n';
	if (write(target_output, line, used) != (ssize_t)used)
		_exit(2);
}

__attribute__((format(printf, 1, 2), noreturn))
static inline void target_fail(const char *format, ...)
{
	static atomic_flag told = ATOMIC_FLAG_INIT;
	va_list args;

	if (!atomic_flag_test_and_set(&told)) {
		va_start(args, format);
		target_line("FAIL: ", format, args);
		va_end(args);
	}
	_exit(1);
}

/* The end of a target that also has something to report. */
__attribute__((format(printf, 1, 2), noreturn))
static inline void target_pass_with(const char *format, ...)
{
	va_list args;

	va_start(args, format);
	target_line("PASS ", format, args);
	va_end(args);
	_exit(0);
}

__attribute__((noreturn)) static inline void target_pass(void)
{
	_exit(write(target_output, "PASS\n", 5) == 5 ? 0 : 2);
}

#define CHECK(condition, ...)                                                                     \
	do {                                                                                      \
		if (!(condition))                                                                 \
			target_fail(__VA_ARGS__);                                                 \
	} while (0)

/* A call that cannot fail here; its value. */
#define MUST(call)                                                                                \
	({                                                                                        \
		long value_ = (long)(call);                                                       \
		if (value_ == -1)                                                                 \
			target_fail("%s: %s", #call, strerror(errno));                            \
		value_;                                                                           \
	})

#define SAME(what, seen, expected)                                                                \
	do {                                                                                      \
		long long seen_ = (long long)(seen), expected_ = (long long)(expected);           \
		if (seen_ != expected_)                                                           \
			target_fail("%s: %lld (%#llx), not %lld (%#llx)", what, seen_, seen_,     \
				    expected_, expected_);                                        \
	} while (0)

/* A call that must fail, and how. */
#define REFUSED(call, error)                                                                      \
	do {                                                                                      \
		long value_ = (long)(call);                                                       \
		if (value_ != -1 || errno != (error))                                             \
			target_fail("%s: %ld (%s), not %s", #call, value_,                        \
				    value_ == -1 ? strerror(errno) : "no error", #error);         \
	} while (0)

static inline void same_bytes(const char *what, const void *seen, const void *expected, size_t size)
{
	const unsigned char *a = seen, *b = expected;

	for (size_t i = 0; i < size; i++)
		CHECK(a[i] == b[i], "%s: byte %zu of %zu is %02x, not %02x", what, i, size, a[i], b[i]);
}

static inline void same_text(const char *what, const char *seen, const char *expected)
{
	CHECK(!strcmp(seen, expected), "%s: \"%s\", not \"%s\"", what, seen, expected);
}

/* Word `index` of this run's random sequence (splitmix64): nothing has to be remembered. */
static inline uint64_t target_random(uint64_t index)
{
	uint64_t z = target_seed + (index + 1) * 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

/* Random content number `stream`; streams of up to 1 GiB do not overlap. */
static inline void target_fill(void *memory, size_t size, uint64_t stream)
{
	for (size_t done = 0; done < size; done += 8) {
		uint64_t word = target_random((stream << 27) + done / 8);

		memcpy((char *)memory + done, &word, size - done < 8 ? size - done : 8);
	}
}

static inline void same_fill(const char *what, const void *memory, size_t size, uint64_t stream)
{
	for (size_t done = 0; done < size; done += 8) {
		uint64_t word = target_random((stream << 27) + done / 8);
		size_t step = size - done < 8 ? size - done : 8;

		CHECK(!memcmp((const char *)memory + done, &word, step),
		      "%s: content differs at byte %zu of %zu", what, done, size);
	}
}

static inline void same_zero(const char *what, const void *memory, size_t size)
{
	for (size_t i = 0; i < size; i++)
		CHECK(!((const char *)memory)[i], "%s: byte %zu of %zu is not zero", what, i, size);
}

/* Contents of a small /proc file, NUL-terminated; returns its length. */
static inline size_t target_slurp(const char *path, char *text, size_t room)
{
	int fd = (int)MUST(open(path, O_RDONLY | O_CLOEXEC));
	size_t used = 0;
	ssize_t got;

	while ((got = MUST(read(fd, text + used, room - 1 - used))) > 0)
		used += (size_t)got;
	CHECK(used < room - 1, "%s is longer than %zu bytes", path, room - 2);
	close(fd);
	text[used] = 0;
	return used;
}

/* Line `key` of /proc/thread-self/status, without the key. */
static inline void target_status(const char *key, char *value, size_t room)
{
	char text[8192], *line, *rest;

	target_slurp("/proc/thread-self/status", text, sizeof(text));
	for (line = strtok_r(text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest))
		if (!strncmp(line, key, strlen(key)) && line[strlen(key)] == ':') {
			snprintf(value, room, "%s", line + strlen(key) + 2);
			return;
		}
	target_fail("no %s in status", key);
}

/* Permissions and path of the mapping that holds address, as "rw-p /path". */
static inline void target_mapping(const void *address, char *text, size_t room)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long start, end;
	char line[PATH_MAX + 128], permissions[5], path[PATH_MAX];

	CHECK(maps, "maps: %s", strerror(errno));
	snprintf(text, room, "not mapped");
	while (fgets(line, sizeof(line), maps)) {
		path[0] = 0;
		CHECK(sscanf(line, "%lx-%lx %4s %*s %*s %*s %4095[^\n]", &start, &end, permissions, path) >= 3,
		      "maps: %s", line);
		if ((unsigned long)address >= start && (unsigned long)address < end)
			snprintf(text, room, "%s %s", permissions, path);
	}
	fclose(maps);
}

static inline int64_t target_clock(clockid_t clock)
{
	struct timespec now;

	MUST(clock_gettime(clock, &now));
	return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Sleeps that long, whatever interrupts. */
static inline void target_sleep(unsigned milliseconds)
{
	int64_t until = target_clock(CLOCK_MONOTONIC) + milliseconds * 1000000ll;
	struct timespec when = {until / 1000000000, until % 1000000000};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &when, NULL) == EINTR)
		;
}

/*
 * Has SIGTERM come? Looks once, after the given time. The signal is never waited for: a thread
 * inside sigtimedwait shows another mask in /proc than the one it has.
 */
static inline bool target_ending(unsigned milliseconds)
{
	struct timespec none = {0, 0};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	if (milliseconds)
		target_sleep(milliseconds);
	return sigtimedwait(&set, NULL, &none) == SIGTERM;
}

/* SIGTERM to a child, and the exit code that must come back. */
static inline void target_end_child(const char *what, pid_t child, int code)
{
	int status;

	MUST(kill(child, SIGTERM));
	SAME(what, MUST(waitpid(child, &status, 0)), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == code, "%s: status %#x, not exit code %d", what,
	      (unsigned)status, code);
}

static inline void target_start(int argc, char **argv)
{
	char directory[PATH_MAX];
	sigset_t set;
	int null;

	if (argc < 2 || argv[1][0] != '/') {
		dprintf(2, "usage: %s /OUTPUT [ARGS]\n", argv[0]);
		_exit(2);
	}
	close_range(3, ~0u, 0);
	null = open("/dev/null", O_RDWR);
	for (int fd = 0; fd < 3; fd++)
		dup2(null, fd);
	close(null);
	target_output = open(argv[1], O_WRONLY | O_APPEND | O_CREAT, 0644);
	if (target_output != 3)
		_exit(2);
	snprintf(directory, sizeof(directory), "%s", argv[1]);
	*strrchr(directory, '/') = 0;
	MUST(chdir(directory[0] ? directory : "/"));
	if (getsid(0) != getpid())
		MUST(setsid());
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	MUST(sigprocmask(SIG_SETMASK, &set, NULL));
	SAME("getrandom", getrandom(&target_seed, sizeof(target_seed), 0), sizeof(target_seed));
}

static inline void target_ready(void)
{
	SAME("ready", write(target_output, "ready\n", 6), 6);
}

#endif
