/*
 * A workload with a pulse: `beat OUTPUT MIB RATE THREADS`. So many threads write RATE pages a second
 * in all, at random places of MIB MiB. Each page is random all over and carries the number of its
 * last write, in eight words that depend on it; what the number must be is kept apart. At the end
 * every page is checked, byte by byte.
 *
 *     PASS max_gap_ms=G gap_at=T writes=W pages=P
 *
 * G: the largest time between two ticks (every 0.2 ms) on CLOCK_REALTIME, in ms; T: when it ended,
 * in seconds of that clock.
 */
#include <pthread.h>

#include "target.h"

enum { WORDS = PAGE / 8, STAMPS = 8, STAMP_EVERY = WORDS / STAMPS, MAX_THREADS = 64 };
static const int64_t TICK = 200000, ROUND = 1000000, LATE = 100 * 1000000;

/* Each writer has every THREADS-th page: no locks. */
struct writer {
	pthread_t thread;
	uint64_t number, writes;
};

static struct writer writers[MAX_THREADS];
static uint64_t (*memory)[WORDS];
static uint32_t *version;
static uint64_t pages, rate, threads;
static atomic_bool ending;
static atomic_uint up;
static int64_t max_gap, gap_at;

static uint64_t content(uint64_t page, uint64_t word, uint32_t of_version)
{
	uint64_t number = page * WORDS + word;

	return word % STAMP_EVERY ? target_random(number) : target_random(number ^ (uint64_t)of_version << 40);
}

static void sleep_until(int64_t when)
{
	struct timespec time = {when / 1000000000, when % 1000000000};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR)
		;
}

static void write_page(uint64_t page)
{
	version[page]++;
	for (uint64_t word = 0; word < WORDS; word += STAMP_EVERY)
		memory[page][word] = content(page, word, version[page]);
}

/* In rounds of 1 ms; after a long stop it does not make up for what it missed. */
static void *write_pages(void *argument)
{
	struct writer *me = argument;
	uint64_t own = (pages - me->number + threads - 1) / threads, due = 0, base = 0;
	int64_t start = target_clock(CLOCK_MONOTONIC), next = start;

	up++;
	while (!ending) {
		int64_t now = target_clock(CLOCK_MONOTONIC);

		if (now - next > LATE) {
			start = next = now;
			base = me->writes;
		}
		due = base + (uint64_t)(now - start) * rate / threads / 1000000000;
		for (; me->writes < due; me->writes++)
			write_page(me->number + threads * (target_random(me->writes ^ me->number << 48) % own));
		next += ROUND;
		sleep_until(next);
	}
	return NULL;
}

static void *tick(void *none)
{
	int64_t last = target_clock(CLOCK_REALTIME);

	up++;
	while (!ending) {
		sleep_until(target_clock(CLOCK_MONOTONIC) + TICK);
		int64_t now = target_clock(CLOCK_REALTIME);
		if (now - last > max_gap) {
			max_gap = now - last;
			gap_at = now;
		}
		last = now;
	}
	return none;
}

static void check_pages(void)
{
	uint64_t total = 0, written = 0;

	for (uint64_t page = 0; page < pages; page++) {
		for (uint64_t word = 0; word < WORDS; word++)
			CHECK(memory[page][word] == content(page, word, version[page]),
			      "page %llu of %llu, word %llu: not as written (version %u)", (unsigned long long)page,
			      (unsigned long long)pages, (unsigned long long)word, version[page]);
		total += version[page];
	}
	for (uint64_t i = 0; i < threads; i++)
		written += writers[i].writes;
	SAME("page writes", total, written);
}

int main(int argc, char **argv)
{
	uint64_t writes = 0;
	pthread_t ticker;

	target_start(argc, argv);
	CHECK(argc == 5, "usage: beat OUTPUT MIB RATE THREADS");
	pages = strtoull(argv[2], NULL, 10) * 256;
	rate = strtoull(argv[3], NULL, 10);
	threads = strtoull(argv[4], NULL, 10);
	CHECK(threads && threads <= MAX_THREADS && pages >= threads, "usage: beat OUTPUT MIB RATE THREADS");
	memory = (void *)MUST(mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	version = (void *)MUST(mmap(NULL, pages * sizeof(*version), PROT_READ | PROT_WRITE,
				    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	for (uint64_t page = 0; page < pages; page++)
		for (uint64_t word = 0; word < WORDS; word++)
			memory[page][word] = content(page, word, 0);
	for (uint64_t i = 0; i < threads; i++) {
		writers[i].number = i;
		SAME("pthread_create", pthread_create(&writers[i].thread, NULL, write_pages, &writers[i]), 0);
	}
	SAME("pthread_create", pthread_create(&ticker, NULL, tick, NULL), 0);
	while (up < threads + 1)
		target_sleep(1);
	target_ready();
	while (!target_ending(5))
		;
	ending = true;
	SAME("join", pthread_join(ticker, NULL), 0);
	for (uint64_t i = 0; i < threads; i++) {
		SAME("join", pthread_join(writers[i].thread, NULL), 0);
		writes += writers[i].writes;
	}
	check_pages();
	target_pass_with("max_gap_ms=%.3f gap_at=%.6f writes=%llu pages=%llu", (double)max_gap / 1e6,
			 (double)gap_at / 1e9, (unsigned long long)writes, (unsigned long long)pages);
}
