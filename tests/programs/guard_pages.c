/*
 * Guard pages (MADV_GUARD_INSTALL, Linux 6.13) among written ones: writing to them gives EFAULT, and the pages around
 * them keep their content.
 */
#include "target.h"

enum { PAGES = 64, INSTALL = 102, REMOVE = 103 };

static bool is_guard(int page)
{
	return page % 7 == 3 || (page >= 40 && page < 48);
}

/* Whether the kernel can write to a page for us: read(2) does not kill who asks. */
static bool can_be_written(char *page)
{
	int zero = (int)MUST(open("/dev/zero", O_RDONLY));
	bool can = read(zero, page, 1) == 1;

	CHECK(can || errno == EFAULT, "read: %m");
	MUST(close(zero));
	return can;
}

int main(int argc, char **argv)
{
	bool guards = true;

	target_start(argc, argv);
	char *area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(area != MAP_FAILED, "mmap: %m");
	for (int i = 0; i < PAGES; i++)
		area[i * PAGE] = (char)(i + 1);
	for (int i = 0; i < PAGES && guards; i++)
		if (is_guard(i))
			guards = !madvise(area + i * PAGE, PAGE, INSTALL);
	target_ready();
	while (!target_ending(5))
		;
	for (int i = 0; i < PAGES; i++) {
		if (guards && is_guard(i)) {
			CHECK(!can_be_written(area + i * PAGE), "page %d is no guard any more", i);
			MUST(madvise(area + i * PAGE, PAGE, REMOVE));
			SAME("content of a former guard", area[i * PAGE], 0);
		} else {
			SAME("content", area[i * PAGE], (char)(i + 1));
		}
	}
	target_pass();
}
