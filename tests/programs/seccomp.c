/*
 * Seccomp: the main thread with two filters, another thread with a third one on top, and a child in strict mode that
 * answers over pipes.
 */
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <sys/prctl.h>

#include "target.h"

static atomic_bool stop;

/* From now on this system call of this thread fails with an errno of its own. */
static void forbid(int number, int error, unsigned flags)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)number, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (unsigned)error),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};

	MUST(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program));
}

static void fails(const char *what, int number, int error)
{
	errno = 0;
	SAME(what, syscall(number, 0, 0, 0), -1);
	SAME(what, errno, error);
}

static void *third(void *ready)
{
	forbid(SYS_getsid, 103, 0);
	atomic_store((atomic_bool *)ready, true);
	while (!atomic_load(&stop)) {
		fails("getppid of the thread", SYS_getppid, 101);
		fails("getpgid of the thread", SYS_getpgid, 102);
		fails("getsid of the thread", SYS_getsid, 103);
		target_sleep(1);
	}
	return NULL;
}

static void answer(int from, int to)
{
	char byte;

	MUST(prctl(PR_SET_PDEATHSIG, SIGKILL));
	MUST(prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT));
	while (read(from, &byte, 1) == 1) {
		byte++;
		if (write(to, &byte, 1) != 1)
			syscall(SYS_exit, 1);
	}
	syscall(SYS_exit, 0);
}

int main(int argc, char **argv)
{
	int ask[2], told[2];
	atomic_bool ready = false;
	pthread_t thread;

	target_start(argc, argv);
	MUST(pipe(ask));
	MUST(pipe(told));
	if (!MUST(fork())) {
		close(ask[1]);
		answer(ask[0], told[1]);
	}
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	forbid(SYS_getppid, 101, SECCOMP_FILTER_FLAG_LOG);
	forbid(SYS_getpgid, 102, 0);
	SAME("pthread_create", pthread_create(&thread, NULL, third, &ready), 0);
	while (!atomic_load(&ready))
		target_sleep(1);
	target_ready();
	for (char byte = 0; !target_ending(1); byte++) {
		char back;

		fails("getppid", SYS_getppid, 101);
		fails("getpgid", SYS_getpgid, 102);
		CHECK(getsid(0) == getpid(), "the thread's filter came to the main thread");
		SAME("question", write(ask[1], &byte, 1), 1);
		SAME("answer", read(told[0], &back, 1), 1);
		SAME("answer", back, (char)(byte + 1));
	}
	atomic_store(&stop, true);
	SAME("pthread_join", pthread_join(thread, NULL), 0);
	target_pass();
}
