/*
 * Signal actions, masks, an alternate stack in use (the work is done inside a handler), pending
 * signals of the process and of each thread with their values and order, SA_RESTART.
 */
#include <pthread.h>

#include "target.h"

enum { SIGNALS = 64, QUEUED = 3, RESTARTS, INTERRUPTS };
enum { FLAGS = SA_RESTART | SA_NODEFER | SA_ONSTACK | SA_RESETHAND | SA_SIGINFO | SA_NOCLDSTOP };

/* As the kernel takes it. */
struct kernel_action {
	void *handler;
	uint64_t flags;
	void *restorer;
	uint64_t mask;
};

static struct kernel_action before[SIGNALS + 1];
static char alternate[1 << 16];
static atomic_bool ending;
static atomic_int up, caught, in_read;
static int worker_pipe[2];

static void on_restart(int number)
{
	(void)number;
	caught++;
}

static void never(int number)
{
	target_fail("signal %d was delivered", number);
}

static uint64_t mask_now(void)
{
	uint64_t mask;

	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof(mask)));
	return mask;
}

static bool skipped(int number)
{
	return number == SIGKILL || number == SIGSTOP || number == SIGUSR1;
}

static void read_actions(struct kernel_action *actions)
{
	for (int number = 1; number <= SIGNALS; number++)
		MUST(syscall(SYS_rt_sigaction, number, NULL, &actions[number], 8));
}

/* Random flags and masks. SIGWINCH, SIGCHLD, SIGCONT and some others keep the default action. */
static void set_actions(void)
{
	for (int number = 1; number <= SIGNALS; number++) {
		uint64_t dice = target_random((uint64_t)number);
		struct sigaction action = {.sa_handler = never, .sa_flags = (int)(dice & FLAGS)};

		if (skipped(number) || number == 32 || number == 33 || number == SIGTERM ||
		    number == SIGWINCH || number == SIGCHLD || number == SIGCONT)
			continue;
		if (number == SIGPIPE || number == SIGTTOU || number == SIGRTMIN + 9)
			action.sa_handler = SIG_IGN;
		for (int other = 1; other <= SIGNALS; other++)
			if (other != 32 && other != 33 && dice >> (other - 1) & 1)
				sigaddset(&action.sa_mask, other);
		MUST(sigaction(number, &action, NULL));
	}
	MUST(sigaction(SIGRTMIN + RESTARTS,
		       &(struct sigaction){.sa_handler = on_restart, .sa_flags = SA_RESTART}, NULL));
	MUST(sigaction(SIGRTMIN + INTERRUPTS, &(struct sigaction){.sa_handler = on_restart}, NULL));
}

static void queue(pid_t thread, int number, int value)
{
	siginfo_t info = {.si_signo = number, .si_code = SI_QUEUE};

	info.si_pid = getpid();
	info.si_uid = getuid();
	info.si_value.sival_int = value;
	if (thread)
		MUST(syscall(SYS_rt_tgsigqueueinfo, getpid(), thread, number, &info));
	else
		MUST(syscall(SYS_rt_sigqueueinfo, getpid(), number, &info));
}

/* The next pending signal of that number must be this one. */
static void take(int number, int code, int value)
{
	struct timespec none = {0, 0};
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, number);
	/* Not sigtimedwait: glibc turns SI_TKILL into SI_USER. */
	SAME("pending signal", MUST(syscall(SYS_rt_sigtimedwait, &set, &info, &none, 8)), number);
	SAME("si_code", info.si_code, code);
	SAME("si_pid", info.si_pid, getpid());
	SAME("si_uid", info.si_uid, getuid());
	if (code == SI_QUEUE)
		SAME("si_value", info.si_value.sival_int, value);
}

static void nothing_pending(const char *key)
{
	char text[32];

	target_status(key, text, sizeof(text));
	same_text(key, text, "0000000000000000");
}

static void *worker(void *none)
{
	uint64_t mask;
	sigset_t set;
	char byte;

	sigemptyset(&set);
	for (int number = 1; number <= SIGNALS; number++)
		if (number != SIGRTMIN + RESTARTS && number != SIGRTMIN + INTERRUPTS)
			sigaddset(&set, number);
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	mask = mask_now();
	queue(gettid(), SIGRTMIN + QUEUED, 4000);
	queue(gettid(), SIGRTMIN + QUEUED, 4001);
	MUST(syscall(SYS_tgkill, getpid(), gettid(), SIGHUP));
	up++;
	while (!ending)
		target_sleep(1);
	SAME("mask of the worker", mask_now(), mask);
	take(SIGHUP, SI_TKILL, 0);
	take(SIGRTMIN + QUEUED, SI_QUEUE, 4000);
	take(SIGRTMIN + QUEUED, SI_QUEUE, 4001);
	nothing_pending("SigPnd");
	in_read = 1;
	SAME("read across SA_RESTART", MUST(read(worker_pipe[0], &byte, 1)), 1);
	in_read = 2;
	REFUSED(read(worker_pipe[0], &byte, 1), EINTR);
	return none;
}

static void handler_expected(pthread_t thread, int stage, int number)
{
	while (in_read < stage)
		target_sleep(1);
	target_sleep(20); /* it is inside read by then */
	SAME("pthread_kill", pthread_kill(thread, number), 0);
	while (caught < stage)
		target_sleep(1);
}

/* The work: on the alternate stack, with the handler's mask. */
static void on_usr1(int number)
{
	uint64_t mask = mask_now();
	stack_t now;

	(void)number;
	target_ready();
	while (!target_ending(1)) {
		SAME("mask in the handler", mask_now(), mask);
		MUST(sigaltstack(NULL, &now));
		SAME("alternate stack in use", now.ss_flags, SS_ONSTACK);
	}
	SAME("alternate stack", (long)now.ss_sp, (long)alternate);
	SAME("size of the alternate stack", now.ss_size, sizeof(alternate));
	up++;
}

int main(int argc, char **argv)
{
	struct kernel_action after[SIGNALS + 1];
	struct sigaction in_handler = {.sa_handler = on_usr1, .sa_flags = SA_ONSTACK};
	stack_t stack = {.ss_sp = alternate, .ss_size = sizeof(alternate)};
	pthread_t thread;
	uint64_t mask;
	sigset_t set;

	target_start(argc, argv);
	sigfillset(&set);
	sigdelset(&set, SIGUSR1);
	sigdelset(&set, SIGSEGV);
	sigdelset(&set, SIGCONT);
	sigdelset(&set, SIGRTMIN + 11);
	MUST(sigprocmask(SIG_SETMASK, &set, NULL));
	set_actions();
	sigaddset(&in_handler.sa_mask, SIGRTMIN + 11);
	MUST(sigaction(SIGUSR1, &in_handler, NULL));
	MUST(sigaltstack(&stack, NULL));
	MUST(pipe(worker_pipe));
	SAME("pthread_create", pthread_create(&thread, NULL, worker, NULL), 0);
	while (!up)
		target_sleep(1);

	MUST(kill(getpid(), SIGUSR2));
	for (int i = 0; i < 3; i++)
		queue(0, SIGRTMIN + QUEUED, 1000 + 11 * i);
	queue(gettid(), SIGRTMIN + QUEUED, 2000);
	queue(gettid(), SIGINT, 3000);
	read_actions(before);
	mask = mask_now();

	MUST(raise(SIGUSR1));

	SAME("handler returned", up, 2);
	SAME("mask after the handler", mask_now(), mask);
	MUST(sigaltstack(NULL, &stack));
	SAME("alternate stack left", stack.ss_flags, 0);
	read_actions(after);
	for (int number = 1; number <= SIGNALS; number++) {
		char what[32];

		snprintf(what, sizeof(what), "action of signal %d", number);
		same_bytes(what, &after[number], &before[number], sizeof(after[number]));
	}
	take(SIGINT, SI_QUEUE, 3000);
	take(SIGRTMIN + QUEUED, SI_QUEUE, 2000); /* a thread's own come before the process's */
	take(SIGUSR2, SI_USER, 0);
	for (int i = 0; i < 3; i++)
		take(SIGRTMIN + QUEUED, SI_QUEUE, 1000 + 11 * i);
	nothing_pending("SigPnd");
	nothing_pending("ShdPnd");
	MUST(kill(getpid(), SIGRTMIN + 9)); /* ignored, but blocked: it stays, and is dropped on unblocking */
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 9);
	MUST(sigprocmask(SIG_UNBLOCK, &set, NULL));
	nothing_pending("ShdPnd");

	ending = true;
	handler_expected(thread, 1, SIGRTMIN + RESTARTS);
	SAME("write", write(worker_pipe[1], "x", 1), 1);
	handler_expected(thread, 2, SIGRTMIN + INTERRUPTS);
	SAME("join", pthread_join(thread, NULL), 0);
	target_pass();
}
