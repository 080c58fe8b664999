/*
 * Locks on files: flock (of one descriptor and of one shared with a child), POSIX locks of two
 * processes, open file description locks, and a child that waits for a lock.
 */
#include <sys/file.h>

#include "target.h"

enum { WHOLE = 20, SHARED, POSIX, OFD, WAIT };
enum { RELEASED = 9 };

static pid_t holder, waiter;

static int other(const char *name, int flags)
{
	return (int)MUST(open(name, flags | O_CLOEXEC));
}

/* What a stranger finds in the way of a write lock from `start` on. */
static void expect(const char *name, short type, off_t start, off_t length, pid_t pid)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = start, .l_len = 1};
	int fd = other(name, O_RDWR);

	MUST(fcntl(fd, F_OFD_GETLK, &lock));
	SAME("lock: type", lock.l_type, type);
	if (type != F_UNLCK) {
		SAME("lock: start", lock.l_start, start);
		SAME("lock: length", lock.l_len, length);
		SAME("lock: owner", lock.l_pid, pid);
	}
	close(fd);
}

/* By a child: who closes a file loses its POSIX locks on it. */
static void expect_ranges(void)
{
	pid_t owner = getpid(), stranger = (pid_t)MUST(fork());
	int status;

	if (!stranger) {
		expect("posix", F_RDLCK, 100, 20, owner);
		expect("posix", F_WRLCK, 200, 200, owner);
		expect("posix", F_UNLCK, 400, 0, 0);
		expect("posix", F_WRLCK, 500, 10, holder);
		expect("posix", F_WRLCK, 600, 0, owner);
		expect("ofd", F_RDLCK, 0, 7, -1);
		expect("ofd", F_WRLCK, 50, 1, -1);
		_exit(0);
	}
	SAME("stranger", waitpid(stranger, &status, 0), stranger);
	SAME("stranger", status, 0);
}

static void set(int fd, int command, short type, off_t start, off_t length)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = start, .l_len = length};

	MUST(fcntl(fd, command, &lock));
}

static void expect_flock(const char *name, int allowed, int refused)
{
	int fd = other(name, O_RDWR);

	if (refused)
		REFUSED(flock(fd, refused | LOCK_NB), EWOULDBLOCK);
	if (allowed)
		MUST(flock(fd, allowed | LOCK_NB));
	close(fd);
}

static void make(const char *name, int fd, int flags)
{
	close((int)MUST(open(name, O_CREAT | O_EXCL | O_RDWR, 0600)));
	MUST(dup2((int)MUST(open(name, flags)), fd));
}

static void hold(void)
{
	set(POSIX, F_SETLK, F_WRLCK, 500, 10);
	MUST(kill(getppid(), SIGUSR1));
	while (!target_ending(5))
		;
	expect_flock("shared", 0, LOCK_SH);
	MUST(flock(SHARED, LOCK_UN));
	_exit(3);
}

static void wait_for_lock(void)
{
	MUST(kill(getppid(), SIGUSR1));
	set(WAIT, F_SETLKW, F_WRLCK, 0, 0);
	_exit(RELEASED);
}

static pid_t child(void (*run)(void))
{
	sigset_t set;
	int number;
	pid_t pid = (pid_t)MUST(fork());

	if (!pid)
		run();
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigwait(&set, &number);
	return pid;
}

int main(int argc, char **argv)
{
	sigset_t blocked;
	int status;

	target_start(argc, argv);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &blocked, NULL));
	make("whole", WHOLE, O_RDONLY);
	make("shared", SHARED, O_RDWR);
	make("posix", POSIX, O_RDWR);
	make("ofd", OFD, O_RDWR);
	make("wait", WAIT, O_RDWR);
	for (int fd = target_output + 1; fd < WHOLE; fd++)
		close(fd);
	MUST(flock(WHOLE, LOCK_SH));
	MUST(flock(SHARED, LOCK_EX));
	set(POSIX, F_SETLK, F_RDLCK, 100, 20);
	set(POSIX, F_SETLK, F_WRLCK, 200, 0);
	set(POSIX, F_SETLK, F_UNLCK, 400, 200);
	set(OFD, F_OFD_SETLK, F_RDLCK, 0, 7);
	set(OFD, F_OFD_SETLK, F_WRLCK, 50, 1);
	set(WAIT, F_SETLK, F_WRLCK, 0, 0);
	holder = child(hold);
	waiter = child(wait_for_lock);
	target_ready();

	while (!target_ending(20))
		;
	expect_flock("whole", LOCK_SH, LOCK_EX);
	expect_flock("shared", 0, LOCK_SH);
	expect_ranges();
	target_end_child("holder", holder, 3);
	expect_flock("shared", LOCK_EX, 0);
	SAME("waiter", waitpid(waiter, &status, WNOHANG), 0);
	set(WAIT, F_SETLK, F_UNLCK, 0, 0);
	SAME("waiter", waitpid(waiter, &status, 0), waiter);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == RELEASED, "waiter: status %#x", (unsigned)status);
	target_pass();
}
