/*
 * A child that shares the descriptor table and the working directory with its parent (CLONE_FILES, CLONE_FS), and a
 * grandchild that shares only the first with the child. What one changes, the others see.
 */
#include <sys/prctl.h>

#include "target.h"

enum { PROBE = 50, LEVELS = 2 };

struct meeting {
	atomic_int asked;    /* a descriptor that somebody should close */
	atomic_int closed[LEVELS];
};

static pid_t clone_child(int flags)
{
	return (pid_t)MUST(syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0));
}

/* Closes what it is asked to, in the table that all share, and sets a umask that the root sees only from level 0. */
static void serve(struct meeting *meeting, int level)
{
	MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
	for (;;) {
		int fd = atomic_load(&meeting->asked);

		if (fd % LEVELS == level && atomic_load(&meeting->closed[level]) != fd) {
			MUST(close(fd));
			umask(level ? 0077 : 0022);
			atomic_store(&meeting->closed[level], fd);
		}
		usleep(200);
	}
}

int main(int argc, char **argv)
{
	target_start(argc, argv);
	struct meeting *meeting = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK(meeting != MAP_FAILED, "mmap: %m");
	MUST(dup2(target_output, PROBE - 1));
	umask(0);

	pid_t child = clone_child(CLONE_FILES | CLONE_FS);
	if (!child) {
		if (!clone_child(CLONE_FILES))
			serve(meeting, 1);
		serve(meeting, 0);
	}
	bool ending = false;

	target_ready();
	for (int turn = 0; !ending || turn < LEVELS; turn++) {
		int fd = PROBE + turn % 8, level = fd % LEVELS;

		MUST(dup2(target_output, fd));
		umask(0);
		atomic_store(&meeting->asked, fd);
		while (atomic_load(&meeting->closed[level]) != fd)
			ending |= target_ending(1);
		CHECK(fcntl(fd, F_GETFD) < 0 && errno == EBADF, "fd %d is not closed by level %d", fd, level);
		SAME("umask", umask(0), level ? 0 : 0022);
	}
	CHECK(fcntl(PROBE - 1, F_GETFD) >= 0, "the kept descriptor has gone");
	target_pass();
}
