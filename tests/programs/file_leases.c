/*
 * Leases on files: for reading and for writing, and one that is being given up; the signal comes
 * when somebody else opens the file, and not before.
 */
#include "target.h"

enum { READ_LEASE = 20, WRITE_LEASE, BREAKING };

static void make(const char *name, int fd, int flags, int lease)
{
	close((int)MUST(open(name, O_CREAT | O_EXCL | O_RDWR, 0600)));
	MUST(dup2((int)MUST(open(name, flags)), fd));
	for (int other = target_output + 1; other < READ_LEASE; other++)
		close(other);
	MUST(fcntl(fd, F_SETSIG, SIGUSR1));
	MUST(fcntl(fd, F_SETLEASE, lease));
}

static bool signalled(void)
{
	struct timespec none = {0, 0};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	return sigtimedwait(&set, NULL, &none) == SIGUSR1;
}

int main(int argc, char **argv)
{
	sigset_t blocked;

	target_start(argc, argv);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &blocked, NULL));
	make("read", READ_LEASE, O_RDONLY, F_RDLCK);
	make("write", WRITE_LEASE, O_RDWR, F_WRLCK);
	make("breaking", BREAKING, O_RDWR, F_WRLCK);
	REFUSED(open("breaking", O_RDONLY | O_NONBLOCK), EWOULDBLOCK);
	CHECK(signalled(), "no signal");
	target_ready();

	while (!target_ending(20))
		;
	CHECK(!signalled(), "a lease was broken");
	SAME("read lease", fcntl(READ_LEASE, F_GETLEASE), F_RDLCK);
	SAME("write lease", fcntl(WRITE_LEASE, F_GETLEASE), F_WRLCK);
	SAME("breaking lease", fcntl(BREAKING, F_GETLEASE), F_RDLCK);
	REFUSED(open("breaking", O_RDONLY | O_NONBLOCK), EWOULDBLOCK);
	MUST(fcntl(BREAKING, F_SETLEASE, F_UNLCK));
	REFUSED(open("write", O_RDONLY | O_NONBLOCK), EWOULDBLOCK);
	CHECK(signalled(), "write lease: no signal");
	REFUSED(open("read", O_WRONLY | O_NONBLOCK), EWOULDBLOCK);
	CHECK(signalled(), "read lease: no signal");
	target_pass();
}
