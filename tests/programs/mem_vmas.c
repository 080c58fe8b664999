/* 5,000 mappings: neighbours differ in protection, each has its own content. */
#include "target.h"

enum { VMAS = 5000 };

static const int protections[] = {PROT_READ | PROT_WRITE, PROT_READ, PROT_NONE, PROT_READ | PROT_EXEC};
static const char *const texts[] = {"rw-p", "r--p", "---p", "r-xp"};

/* Each page's permissions, from one reading of maps, and that each is a mapping of its own. */
static void check_maps(const char *base)
{
	FILE *maps = fopen("/proc/self/maps", "re");
	unsigned long start, end;
	char line[PATH_MAX + 128], permissions[5];
	size_t page = 0;

	CHECK(maps, "maps: %s", strerror(errno));
	while (fgets(line, sizeof(line), maps)) {
		SAME("fields of maps", sscanf(line, "%lx-%lx %4s", &start, &end, permissions), 3);
		if (start < (unsigned long)base || start >= (unsigned long)base + (unsigned long)VMAS * PAGE)
			continue;
		SAME("start of a mapping", start, (unsigned long)base + page * PAGE);
		CHECK(end == start + PAGE, "mapping %zu of %d is %lu bytes", page, VMAS, end - start);
		same_text("permissions", permissions, texts[page % 4]);
		page++;
	}
	SAME("mappings", page, VMAS);
	fclose(maps);
}

int main(int argc, char **argv)
{
	target_start(argc, argv);
	/* Guard pages on both sides, so that neither end merges with a neighbour. */
	char *around = (char *)MUST(mmap(NULL, (VMAS + 2) * (size_t)PAGE, PROT_WRITE,
					 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
	char *base = around + PAGE;

	for (uint64_t page = 0; page < VMAS; page++) {
		target_fill(base + page * PAGE, PAGE, page);
		MUST(mprotect(base + page * PAGE, PAGE, protections[page % 4]));
	}
	check_maps(base);
	target_ready();

	uint64_t step = 0;
	while (!target_ending(1)) {
		uint64_t page = step++ % (VMAS / 4) * 4;
		same_fill("page at work", base + page * PAGE, PAGE, page);
		target_fill(base + page * PAGE, PAGE, page);
	}

	check_maps(base);
	for (uint64_t page = 0; page < VMAS; page++) {
		if (page % 4 == 2)
			MUST(mprotect(base + page * PAGE, PAGE, PROT_READ));
		same_fill("page", base + page * PAGE, PAGE, page);
	}
	target_pass();
}
