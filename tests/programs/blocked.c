/*
 * One thread in each call that waits. None may return early or with EINTR: calls with a short
 * timeout are repeated and timed, the others are woken at the end, each in its own way.
 *
 * With the argument `stopped` the two calls that Linux itself interrupts on SIGSTOP and SIGCONT
 * (epoll_wait and sigtimedwait, signal(7)) may see EINTR.
 */
#include <linux/futex.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/socket.h>

#include "target.h"

enum { SHORT_MS = 150, LONG_S = 600 };

static const struct timespec shortly = {0, SHORT_MS * 1000000}, long_after = {LONG_S, 0};
static atomic_bool ending;
static atomic_int entered, handled;
static bool stopped;

/* What one waiter has: the ends that it reads (0) and that the main thread writes (1), a word. */
struct waiter {
	const char *name;
	void (*wait)(struct waiter *);
	void (*wake)(struct waiter *); /* NULL: the call has a short timeout, and is repeated */
	int fd[2];
	uint32_t word;
	pthread_t thread;
};

/* ---- calls that end by their own timeout ---- */

static void short_nanosleep(struct waiter *me)
{
	SAME(me->name, nanosleep(&shortly, NULL), 0);
}

static void short_clock_nanosleep(struct waiter *me)
{
	SAME(me->name, clock_nanosleep(CLOCK_BOOTTIME, 0, &shortly, NULL), 0);
}

static void sleep_until(struct waiter *me, clockid_t clock)
{
	int64_t until = target_clock(clock) + SHORT_MS * 1000000;
	struct timespec when = {until / 1000000000, until % 1000000000};

	SAME(me->name, clock_nanosleep(clock, TIMER_ABSTIME, &when, NULL), 0);
	CHECK(target_clock(clock) >= until, "%s: returned too early", me->name);
}

static void until_monotonic(struct waiter *me)
{
	sleep_until(me, CLOCK_MONOTONIC);
}

static void until_realtime(struct waiter *me)
{
	sleep_until(me, CLOCK_REALTIME);
}

static void short_poll(struct waiter *me)
{
	struct pollfd set = {me->fd[0], POLLIN, 0};

	SAME(me->name, MUST(poll(&set, 1, SHORT_MS)), 0);
}

static void short_select(struct waiter *me)
{
	struct timeval left = {0, SHORT_MS * 1000};
	fd_set set;

	FD_ZERO(&set);
	FD_SET(me->fd[0], &set);
	SAME(me->name, MUST(select(me->fd[0] + 1, &set, NULL, NULL, &left)), 0);
	SAME("time left by select", left.tv_sec * 1000000 + left.tv_usec, 0);
}

static void short_futex(struct waiter *me)
{
	REFUSED(syscall(SYS_futex, &me->word, FUTEX_WAIT_PRIVATE, 0, &shortly), ETIMEDOUT);
}

static void futex_until(struct waiter *me)
{
	int64_t until = target_clock(CLOCK_MONOTONIC) + SHORT_MS * 1000000;
	struct timespec when = {until / 1000000000, until % 1000000000};

	REFUSED(syscall(SYS_futex, &me->word, FUTEX_WAIT_BITSET_PRIVATE, 0, &when, NULL, ~0u), ETIMEDOUT);
	CHECK(target_clock(CLOCK_MONOTONIC) >= until, "%s: returned too early", me->name);
}

static void short_epoll(struct waiter *me)
{
	int epoll = (int)MUST(epoll_create1(0)), got;
	struct epoll_event event = {.events = EPOLLIN};

	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, me->fd[0], &event));
	do
		got = epoll_wait(epoll, &event, 1, SHORT_MS);
	while (stopped && got == -1 && errno == EINTR);
	SAME(me->name, MUST(got), 0);
	close(epoll);
}

/* ---- calls that wait to be woken ---- */

static void write_byte(struct waiter *me)
{
	SAME(me->name, write(me->fd[1], "x", 1), 1);
}

static void nanosleep_long(struct waiter *me)
{
	nanosleep(&long_after, NULL);
	target_fail("%s: returned", me->name);
}

static void poll_long(struct waiter *me)
{
	struct pollfd set = {me->fd[0], POLLIN, 0};

	SAME(me->name, MUST(poll(&set, 1, LONG_S * 1000)), 1);
	SAME(me->name, set.revents, POLLIN);
}

static void ppoll_forever(struct waiter *me)
{
	struct pollfd set = {me->fd[0], POLLIN, 0};
	sigset_t mask;

	sigfillset(&mask);
	SAME(me->name, MUST(ppoll(&set, 1, NULL, &mask)), 1);
}

static void select_long(struct waiter *me)
{
	struct timeval left = {LONG_S, 0};
	fd_set set;

	FD_ZERO(&set);
	FD_SET(me->fd[0], &set);
	SAME(me->name, MUST(select(me->fd[0] + 1, &set, NULL, NULL, &left)), 1);
	CHECK(left.tv_sec > LONG_S - 60, "%s: %ld s left", me->name, left.tv_sec);
}

static void epoll_forever(struct waiter *me)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = target_random(7)};
	int epoll = (int)MUST(epoll_create1(0)), got;

	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, me->fd[0], &event));
	do
		got = epoll_wait(epoll, &event, 1, -1);
	while (stopped && got == -1 && errno == EINTR);
	SAME(me->name, MUST(got), 1);
	SAME(me->name, event.data.u64, target_random(7));
}

static void futex_forever(struct waiter *me)
{
	SAME(me->name, MUST(syscall(SYS_futex, &me->word, FUTEX_WAIT_PRIVATE, 0, NULL)), 0);
}

static void futex_long(struct waiter *me)
{
	SAME(me->name, MUST(syscall(SYS_futex, &me->word, FUTEX_WAIT_PRIVATE, 0, &long_after)), 0);
}

static void futex_wake(struct waiter *me)
{
	SAME(me->name, MUST(syscall(SYS_futex, &me->word, FUTEX_WAKE_PRIVATE, 1)), 1);
}

static void sigtimedwait_long(struct waiter *me)
{
	sigset_t set;
	int got;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	do
		got = sigtimedwait(&set, NULL, &long_after);
	while (stopped && got == -1 && errno == EINTR);
	SAME(me->name, MUST(got), SIGUSR1);
}

static void send_usr1(struct waiter *me)
{
	SAME(me->name, pthread_kill(me->thread, SIGUSR1), 0);
}

static void count_signal(int number)
{
	(void)number;
	handled++;
}

static void sigsuspend_forever(struct waiter *me)
{
	uint64_t before, after;
	sigset_t set;

	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &before, sizeof(before)));
	sigfillset(&set);
	sigdelset(&set, SIGUSR2);
	REFUSED(sigsuspend(&set), EINTR);
	SAME("signals seen by sigsuspend", handled, 1);
	MUST(syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &after, sizeof(after)));
	SAME(me->name, after, before);
}

static void send_usr2(struct waiter *me)
{
	SAME("signals before the end", handled, 0);
	SAME(me->name, pthread_kill(me->thread, SIGUSR2), 0);
}

static void read_forever(struct waiter *me)
{
	char byte;

	SAME(me->name, MUST(read(me->fd[0], &byte, 1)), 1);
	SAME(me->name, byte, 'x');
}

static void write_forever(struct waiter *me)
{
	static char block[PAGE];

	MUST(fcntl(me->fd[1], F_SETPIPE_SZ, PAGE));
	SAME(me->name, MUST(write(me->fd[1], block, PAGE)), PAGE);
	SAME(me->name, MUST(write(me->fd[1], block, PAGE)), PAGE);
}

static void read_page(struct waiter *me)
{
	char block[PAGE];

	SAME(me->name, MUST(read(me->fd[0], block, PAGE)), PAGE);
}

static void recv_forever(struct waiter *me)
{
	int pair[2];
	char byte;

	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair));
	me->fd[1] = pair[1];
	SAME(me->name, MUST(recv(pair[0], &byte, 1, 0)), 1);
}

static void accept_forever(struct waiter *me)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};

	me->fd[0] = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(bind(me->fd[0], (struct sockaddr *)&address, sizeof(address)));
	MUST(listen(me->fd[0], 5));
	MUST(accept(me->fd[0], NULL, NULL));
}

static void connect_to(struct waiter *me)
{
	struct sockaddr_in address;
	socklen_t size = sizeof(address);
	int fd = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));

	MUST(getsockname(me->fd[0], (struct sockaddr *)&address, &size));
	MUST(connect(fd, (struct sockaddr *)&address, size));
}

static void waitpid_forever(struct waiter *me)
{
	int status;
	pid_t child = (pid_t)MUST(fork());

	if (!child) {
		while (!target_ending(20))
			;
		_exit(9);
	}
	me->fd[0] = child;
	SAME(me->name, MUST(waitpid(child, &status, 0)), child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 9, "%s: status %#x", me->name, (unsigned)status);
}

static void end_child(struct waiter *me)
{
	MUST(kill(me->fd[0], SIGTERM));
}

static void nothing(struct waiter *me)
{
	(void)me;
}

static struct waiter waiters[] = {
	{.name = "nanosleep", .wait = short_nanosleep},
	{.name = "clock_nanosleep", .wait = short_clock_nanosleep},
	{.name = "clock_nanosleep until (monotonic)", .wait = until_monotonic},
	{.name = "clock_nanosleep until (realtime)", .wait = until_realtime},
	{.name = "poll with timeout", .wait = short_poll},
	{.name = "select with timeout", .wait = short_select},
	{.name = "futex with timeout", .wait = short_futex},
	{.name = "futex until", .wait = futex_until},
	{.name = "epoll_wait with timeout", .wait = short_epoll},
	{.name = "long nanosleep", .wait = nanosleep_long, .wake = nothing},
	{.name = "long poll", .wait = poll_long, .wake = write_byte},
	{.name = "ppoll", .wait = ppoll_forever, .wake = write_byte},
	{.name = "long select", .wait = select_long, .wake = write_byte},
	{.name = "epoll_wait", .wait = epoll_forever, .wake = write_byte},
	{.name = "futex", .wait = futex_forever, .wake = futex_wake},
	{.name = "futex with a long timeout", .wait = futex_long, .wake = futex_wake},
	{.name = "sigtimedwait", .wait = sigtimedwait_long, .wake = send_usr1},
	{.name = "sigsuspend", .wait = sigsuspend_forever, .wake = send_usr2},
	{.name = "read", .wait = read_forever, .wake = write_byte},
	{.name = "write", .wait = write_forever, .wake = read_page},
	{.name = "recv", .wait = recv_forever, .wake = write_byte},
	{.name = "accept", .wait = accept_forever, .wake = connect_to},
	{.name = "waitpid", .wait = waitpid_forever, .wake = end_child},
};
enum { WAITERS = sizeof(waiters) / sizeof(waiters[0]) };

static void *run(void *argument)
{
	struct waiter *me = argument;

	entered++;
	if (me->wake) {
		me->wait(me);
		CHECK(ending, "%s: returned early", me->name);
		return NULL;
	}
	/* While the program is away, CLOCK_REALTIME runs on. */
	clockid_t clock = me->wait == until_realtime ? CLOCK_REALTIME : CLOCK_MONOTONIC;
	while (!ending) {
		int64_t start = target_clock(clock), took;

		me->wait(me);
		took = target_clock(clock) - start;
		CHECK(took >= SHORT_MS * 1000000, "%s: returned after %lld us", me->name, (long long)took / 1000);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_handler = count_signal};
	sigset_t set;

	target_start(argc, argv);
	stopped = argc > 2 && !strcmp(argv[2], "stopped");
	MUST(sigaction(SIGUSR2, &action, NULL));
	sigemptyset(&set);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGUSR1);
	sigaddset(&set, SIGUSR2);
	MUST(sigprocmask(SIG_SETMASK, &set, NULL));
	for (int i = 0; i < WAITERS; i++) {
		MUST(pipe(waiters[i].fd));
		SAME("pthread_create", pthread_create(&waiters[i].thread, NULL, run, &waiters[i]), 0);
	}
	while (entered < WAITERS)
		target_sleep(1);
	target_sleep(50); /* each of them is in its call by now */

	target_ready();
	while (!target_ending(10))
		;
	ending = true;
	for (int i = 0; i < WAITERS; i++)
		if (waiters[i].wake)
			waiters[i].wake(&waiters[i]);
	for (int i = 0; i < WAITERS; i++)
		if (waiters[i].wake != nothing)
			SAME("join", pthread_join(waiters[i].thread, NULL), 0);
	target_pass();
}
