/* Private memory: sparse, read-only, PROT_NONE, heap, stack, a huge reservation, live churn. */
#include "target.h"

enum { SPARSE = 4096, LIVE = 512, HEAP = 1 << 20, RESERVED_GIB = 64 };
enum { IN_SPARSE, IN_HEAP, IN_STACK, IN_SEALED, IN_HIDDEN, HOLES, STEPS, IN_LIVE = 1 << 16 };

static uint32_t version[LIVE]; /* what page of the live region holds; 0: dropped */

static void *map(size_t pages, int protection, int flags)
{
	return (void *)MUST(mmap(NULL, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0));
}

static bool is_hole(size_t page)
{
	return target_random(((uint64_t)HOLES << 27) + page) % 4 == 0;
}

static void check_live(const char *live, size_t page)
{
	if (version[page])
		same_fill("live page", live + page * PAGE, PAGE, IN_LIVE + version[page]);
	else
		same_zero("dropped page", live + page * PAGE, PAGE);
}

/* Rewrites or drops one page, and looks at another. */
static void churn(char *live, uint32_t step)
{
	uint64_t dice = target_random(((uint64_t)STEPS << 27) + step);
	size_t page = dice % LIVE;

	check_live(live, (dice >> 16) % LIVE);
	if ((dice >> 32) % 8 == 0) {
		MUST(madvise(live + page * PAGE, PAGE, MADV_DONTNEED));
		version[page] = 0;
	} else {
		target_fill(live + page * PAGE, PAGE, IN_LIVE + step);
		version[page] = step;
	}
}

__attribute__((noinline)) static int deeper(int frames)
{
	volatile char frame[1 << 16];

	for (size_t i = 0; i < sizeof(frame); i += PAGE)
		frame[i] = (char)frames;
	return frames ? deeper(frames - 1) + frame[PAGE] : 0;
}

static void same_mapping(const char *what, const void *address, const char *permissions)
{
	char text[PATH_MAX];

	target_mapping(address, text, sizeof(text));
	CHECK(!strncmp(text, permissions, 4), "%s: %s, not %s", what, text, permissions);
}

int main(int argc, char **argv)
{
	char on_stack[1 << 16];
	uint32_t step = 0;

	target_start(argc, argv);
	char *sparse = map(SPARSE, PROT_READ | PROT_WRITE, 0);
	char *live = map(LIVE, PROT_READ | PROT_WRITE, 0);
	char *sealed = map(8, PROT_READ | PROT_WRITE, 0);
	char *hidden = map(8, PROT_READ | PROT_WRITE, 0);
	char *unused = map(8, PROT_NONE, 0);
	char *reserved = map((RESERVED_GIB << 18ul), PROT_NONE, MAP_NORESERVE);
	char *heap = (char *)MUST(sbrk(HEAP + 123));

	for (size_t page = 0; page < SPARSE; page++)
		if (!is_hole(page))
			target_fill(sparse + page * PAGE, PAGE, IN_SPARSE + 16 + page);
	target_fill(heap, HEAP, IN_HEAP);
	target_fill(on_stack, sizeof(on_stack), IN_STACK);
	target_fill(sealed, 8 * PAGE, IN_SEALED);
	target_fill(hidden, 8 * PAGE, IN_HIDDEN);
	MUST(mprotect(sealed, 8 * PAGE, PROT_READ));
	MUST(mprotect(hidden, 8 * PAGE, PROT_NONE));
	char *end = (char *)MUST(sbrk(0));

	target_ready();
	while (!target_ending(1))
		for (int i = 0; i < 20; i++)
			churn(live, ++step);

	SAME("end of the heap", MUST(sbrk(0)), (long)end);
	for (size_t page = 0; page < SPARSE; page++)
		if (is_hole(page))
			same_zero("hole", sparse + page * PAGE, PAGE);
		else
			same_fill("sparse", sparse + page * PAGE, PAGE, IN_SPARSE + 16 + page);
	for (size_t page = 0; page < LIVE; page++)
		check_live(live, page);
	same_fill("heap", heap, HEAP, IN_HEAP);
	same_fill("stack", on_stack, sizeof(on_stack), IN_STACK);
	same_fill("read-only", sealed, 8 * PAGE, IN_SEALED);

	char *grown = (char *)MUST(sbrk(2 * HEAP));
	SAME("heap grows at its end", (long)grown, (long)end);
	same_zero("new heap", grown, 2 * HEAP);
	target_fill(grown, 2 * HEAP, IN_HEAP);
	SAME("deeper stack", deeper(63) != 0, true);

	same_mapping("read-only", sealed, "r--p");
	same_mapping("hidden", hidden, "---p");
	same_mapping("PROT_NONE", unused, "---p");
	same_mapping("reservation", reserved, "---p");
	same_mapping("end of the reservation", reserved + ((size_t)RESERVED_GIB << 30) - 1, "---p");
	MUST(mprotect(hidden, 8 * PAGE, PROT_READ));
	same_fill("hidden", hidden, 8 * PAGE, IN_HIDDEN);
	MUST(mprotect(reserved + (40ul << 30), PAGE, PROT_READ | PROT_WRITE));
	same_zero("reserved page", reserved + (40ul << 30), PAGE);
	target_fill(reserved + (40ul << 30), PAGE, IN_STACK);
	target_pass();
}
