/*
 * pidfds of the program itself and of a child, blocking and not; they signal, poll and wait afterwards.
 */
#include <poll.h>
#include <sys/syscall.h>

#include "target.h"

int main(int argc, char **argv)
{
	target_start(argc, argv);
	pid_t pid = (pid_t)MUST(fork());
	if (!pid) {
		while (!target_ending(2))
			;
		_exit(55);
	}
	int self = (int)MUST(syscall(SYS_pidfd_open, getpid(), 0));
	int child = (int)MUST(syscall(SYS_pidfd_open, pid, O_NONBLOCK));
	struct pollfd poll_child = {child, POLLIN, 0};
	siginfo_t info;

	target_ready();
	while (!target_ending(2)) {
		SAME("signal 0 to itself", syscall(SYS_pidfd_send_signal, self, 0, NULL, 0), 0);
		SAME("signal 0 to the child", syscall(SYS_pidfd_send_signal, child, 0, NULL, 0), 0);
		SAME("poll", poll(&poll_child, 1, 0), 0);
	}
	CHECK(waitid(P_PIDFD, (id_t)child, &info, WEXITED) < 0 && errno == EAGAIN, "waitid does not see O_NONBLOCK");
	MUST(syscall(SYS_pidfd_send_signal, child, SIGTERM, NULL, 0));
	SAME("poll of the ended child", poll(&poll_child, 1, 10000), 1);
	MUST(waitid(P_PIDFD, (id_t)child, &info, WEXITED));
	SAME("the child", info.si_pid, pid);
	SAME("its exit code", info.si_status, 55);
	target_pass();
}
