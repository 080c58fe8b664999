/*
 * Interval timers, POSIX timers of several clocks and notifications under their ids, and clocks that
 * never go back. What is left of a timer only falls: a timer set anew would show.
 */
#include <pthread.h>
#include <sys/time.h>

#include "target.h"

enum { MS = 1000000, PERIOD_MS = 20, OVERRUN_MS = 5, SAMPLES = 200 };
enum { TICK_SIGNAL = 40, THREAD_SIGNAL, FULL_SIGNAL, LATE_SIGNAL, NEW_SIGNAL };
/* CPU time is sampled in ticks of up to 10 ms; a freeze may count for one clock and not another. */
static const int64_t COARSE = 20 * MS, FREEZE = 1000 * (int64_t)MS;

struct armed {
	const char *name;
	clockid_t clock; /* what the time is measured with */
	int64_t interval, left, start, first;
	bool (*read)(struct armed *, struct itimerspec *);
	long id;
};

static atomic_bool ending;
static atomic_int worker_tid, thread_ticks;
static timer_t full, ticking, to_thread;

static int64_t to_ns(struct timespec t)
{
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static bool read_interval(struct armed *timer, struct itimerspec *now)
{
	struct itimerval value;

	MUST(getitimer((int)timer->id, &value));
	now->it_value = (struct timespec){value.it_value.tv_sec, value.it_value.tv_usec * 1000};
	now->it_interval = (struct timespec){value.it_interval.tv_sec, value.it_interval.tv_usec * 1000};
	return true;
}

static bool read_posix(struct armed *timer, struct itimerspec *now)
{
	MUST(timer_gettime((timer_t)timer->id, now));
	return true;
}

static struct armed timers[] = {
	{.name = "ITIMER_REAL", .clock = CLOCK_MONOTONIC, .read = read_interval, .id = ITIMER_REAL},
	{.name = "ITIMER_VIRTUAL", .clock = CLOCK_PROCESS_CPUTIME_ID, .read = read_interval, .id = ITIMER_VIRTUAL},
	{.name = "ITIMER_PROF", .clock = CLOCK_PROCESS_CPUTIME_ID, .read = read_interval, .id = ITIMER_PROF},
	{.name = "CLOCK_REALTIME timer", .clock = CLOCK_REALTIME, .read = read_posix},
	{.name = "CLOCK_MONOTONIC timer", .clock = CLOCK_MONOTONIC, .read = read_posix},
	{.name = "CLOCK_BOOTTIME timer", .clock = CLOCK_BOOTTIME, .read = read_posix},
	{.name = "process CPU timer", .clock = CLOCK_PROCESS_CPUTIME_ID, .read = read_posix},
};
enum { TIMERS = sizeof(timers) / sizeof(timers[0]) };

static void check_armed(struct armed *timer)
{
	bool of_cpu = timer->clock == CLOCK_PROCESS_CPUTIME_ID;
	struct itimerspec now;
	int64_t left, passed;

	timer->read(timer, &now);
	left = to_ns(now.it_value);
	passed = target_clock(timer->clock) - timer->start;
	SAME(timer->name, to_ns(now.it_interval), timer->interval);
	CHECK(left <= timer->left + (of_cpu ? COARSE : 0), "%s: %lld us left, %lld us before", timer->name,
	      (long long)left / 1000, (long long)timer->left / 1000);
	/* The CPU clock itself starts anew in a restored process: its timers are compared coarsely. */
	if (of_cpu)
		CHECK(left >= timer->first - 60000ll * MS, "%s: only %lld us left", timer->name, (long long)left / 1000);
	else
		CHECK(left >= timer->first - passed - MS && left <= timer->first - passed + FREEZE,
		      "%s: %lld us left of %lld, after %lld", timer->name, (long long)left / 1000,
		      (long long)timer->first / 1000, (long long)passed / 1000);
	timer->left = left;
}

static timer_t make_timer(clockid_t clock, int notify, int number, int value, pid_t thread)
{
	struct sigevent event = {.sigev_notify = notify, .sigev_signo = number};
	timer_t timer;

	event.sigev_value.sival_int = value;
	event._sigev_un._tid = thread;
	MUST(timer_create(clock, &event, &timer));
	return timer;
}

static void arm(timer_t timer, int64_t value, int64_t interval)
{
	struct itimerspec when = {{interval / 1000000000, interval % 1000000000},
				  {value / 1000000000, value % 1000000000}};

	MUST(timer_settime(timer, 0, &when, NULL));
}

/* Takes one signal of a timer if there is one; returns the expirations it stands for. */
static int take(int number, int value, timer_t timer, int wait_ms)
{
	struct timespec wait = {0, wait_ms * MS};
	siginfo_t info;
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, number);
	if (sigtimedwait(&set, &info, &wait) == -1)
		return 0;
	SAME("si_code of a timer", info.si_code, SI_TIMER);
	SAME("value of a timer", info.si_value.sival_int, value);
	SAME("id of a timer", info.si_timerid, (long)timer);
	CHECK(info.si_overrun >= 0, "overrun of timer %ld is %d", (long)timer, info.si_overrun);
	return 1 + info.si_overrun;
}

static void *worker(void *none)
{
	worker_tid = gettid();
	while (!ending)
		thread_ticks += take(THREAD_SIGNAL, 0x7531, to_thread, 10);
	return none;
}

/* Clocks go forward, also from one call to the next. */
static void sample_clocks(void)
{
	static const clockid_t clocks[] = {CLOCK_MONOTONIC, CLOCK_BOOTTIME, CLOCK_MONOTONIC_RAW};
	static int64_t last[3];

	for (int i = 0; i < SAMPLES; i++)
		for (int c = 0; c < 3; c++) {
			int64_t now = target_clock(clocks[c]);

			CHECK(now >= last[c], "clock %d went back by %lld ns", clocks[c], (long long)(last[c] - now));
			last[c] = now;
		}
}

static void set_up(void)
{
	for (int i = 0; i < 3; i++) {
		struct itimerval value = {{50 + i, 123457}, {1000 + 100 * i, 654321}};
		MUST(setitimer((int)timers[i].id, &value, NULL));
	}
	for (int i = 3; i < TIMERS; i++) {
		timer_delete(make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0)); /* the ids have gaps */
		timer_t timer = make_timer(timers[i].clock, SIGEV_SIGNAL, LATE_SIGNAL, 100 + i, 0);
		arm(timer, (2000 + 100 * i) * 1000ll * MS + 777, (77 + i) * 1000ll * MS + 333);
		timers[i].id = (long)timer;
	}
	/* Every timer has run for a while, so that what is left differs from what was set. */
	for (int64_t end = target_clock(CLOCK_PROCESS_CPUTIME_ID) + 150 * MS;
	     target_clock(CLOCK_PROCESS_CPUTIME_ID) < end;)
		sample_clocks();
	for (int i = 0; i < TIMERS; i++) {
		struct itimerspec now;

		timers[i].start = target_clock(timers[i].clock);
		timers[i].read(&timers[i], &now);
		timers[i].first = timers[i].left = to_ns(now.it_value);
		timers[i].interval = to_ns(now.it_interval);
	}
}

int main(int argc, char **argv)
{
	struct itimerspec now;
	pthread_t thread;
	sigset_t set;
	int ticks = 0;

	target_start(argc, argv);
	sigfillset(&set);
	sigdelset(&set, SIGCONT);
	MUST(sigprocmask(SIG_SETMASK, &set, NULL));
	set_up();
	SAME("pthread_create", pthread_create(&thread, NULL, worker, NULL), 0);
	while (!worker_tid)
		target_sleep(1);
	timer_t idle = make_timer(CLOCK_REALTIME, SIGEV_NONE, 0, 0, 0);
	timer_t silent = make_timer(CLOCK_MONOTONIC, SIGEV_NONE, 0, 0, 0);
	ticking = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, TICK_SIGNAL, 0x1357, 0);
	to_thread = make_timer(CLOCK_BOOTTIME, SIGEV_THREAD_ID, THREAD_SIGNAL, 0x7531, worker_tid);
	full = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, FULL_SIGNAL, 0x2468, 0);
	int64_t start = target_clock(CLOCK_MONOTONIC);
	arm(silent, 3000ll * 1000 * MS, 0);
	arm(ticking, PERIOD_MS * MS, PERIOD_MS * MS);
	arm(to_thread, PERIOD_MS * MS, PERIOD_MS * MS);
	arm(full, OVERRUN_MS * MS, OVERRUN_MS * MS); /* its signal stays pending to the end */

	target_ready();
	while (!target_ending(1)) {
		sample_clocks();
		for (int i = 0; i < TIMERS; i++)
			check_armed(&timers[i]);
		ticks += take(TICK_SIGNAL, 0x1357, ticking, 0);
	}

	int at_end = ticks, at_end_of_thread = thread_ticks;
	for (int i = 0; i < 3; i++) {
		int got = take(TICK_SIGNAL, 0x1357, ticking, 500);
		CHECK(got > 0, "the periodic timer is silent");
		ticks += got;
	}
	target_sleep(3 * PERIOD_MS);
	CHECK(thread_ticks > at_end_of_thread, "the timer of a thread is silent");
	int64_t passed = (target_clock(CLOCK_MONOTONIC) - start) / MS;
	CHECK(at_end > 0 && ticks <= passed / PERIOD_MS + 1, "%d ticks in %lld ms", ticks, (long long)passed);
	CHECK(thread_ticks <= passed / PERIOD_MS + 1, "%d ticks of a thread in %lld ms", thread_ticks, (long long)passed);
	int expired = take(FULL_SIGNAL, 0x2468, full, 500);
	CHECK(expired > 0 && expired <= passed / OVERRUN_MS + 1, "%d expirations in %lld ms", expired, (long long)passed);
	MUST(timer_gettime(idle, &now));
	SAME("disarmed timer", to_ns(now.it_value) + to_ns(now.it_interval), 0);
	MUST(timer_gettime(silent, &now));
	CHECK(to_ns(now.it_value) < 3000ll * 1000 * MS && to_ns(now.it_value) > 2900ll * 1000 * MS,
	      "timer without signal: %lld ns left", (long long)to_ns(now.it_value));
	timer_t fresh = make_timer(CLOCK_MONOTONIC, SIGEV_SIGNAL, NEW_SIGNAL, 0x99, 0);
	arm(fresh, 5 * MS, 0);
	SAME("new timer", take(NEW_SIGNAL, 0x99, fresh, 500), 1);
	ending = true;
	SAME("join", pthread_join(thread, NULL), 0);
	target_pass();
}
