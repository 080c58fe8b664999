/*
 * Files that were deleted while they were open or mapped: contents, holes, one inode behind several
 * descriptors, a working directory and a named pipe without names, names that are taken again.
 */
#include "target.h"

enum { SIZE = 100000, MAPPED = 4 * PAGE, END = 300 * PAGE, GROWN = 10 };
enum { FIRST = 20, SECOND, AGAIN, TAKEN, NEWER, SPARSE, READ_ONLY, FIFO, DIRECTORY, INSIDE };

static char seen[SIZE];
static char *shared, *private;

static int make(const char *name, int fd, int flags, size_t size, uint64_t stream)
{
	static char data[SIZE];

	MUST(dup2((int)MUST(open(name, flags | O_CREAT | O_EXCL, 0640)), fd));
	target_fill(data, size, stream);
	SAME(name, pwrite(fd, data, size, 0), size);
	return fd;
}

static void same_inode(const char *what, int a, int b, nlink_t links)
{
	struct stat one, two;

	MUST(fstat(a, &one));
	MUST(fstat(b, &two));
	SAME(what, one.st_ino, two.st_ino);
	SAME(what, one.st_nlink, links);
}

static void check_content(const char *what, int fd, size_t size, uint64_t stream)
{
	SAME(what, pread(fd, seen, SIZE, 0), size);
	same_fill(what, seen, size, stream);
}

static void check_sparse(void)
{
	struct stat status;

	MUST(fstat(SPARSE, &status));
	SAME("sparse: size", status.st_size, END);
	CHECK(status.st_blocks * 512 <= 8 * PAGE, "sparse: %lld blocks", (long long)status.st_blocks);
	SAME("sparse: start", pread(SPARSE, seen, PAGE, 0), PAGE);
	same_zero("sparse: start", seen, PAGE);
	SAME("sparse: data", pread(SPARSE, seen, PAGE, 100 * PAGE), PAGE);
	same_fill("sparse: data", seen, PAGE, 4);
}

static void check_metadata(void)
{
	struct stat status;

	MUST(fstat(FIRST, &status));
	SAME("mode", status.st_mode, S_IFREG | 0604);
	SAME("owner", status.st_uid, 12);
	SAME("group", status.st_gid, 34);
	SAME("mtime", status.st_mtim.tv_sec, 1000000000);
}

static void check_directory(void)
{
	char text[PATH_MAX];
	struct stat here, opened;

	CHECK(!getcwd(text, sizeof(text)) && errno == ENOENT, "working directory: %s", text);
	MUST(stat(".", &here));
	MUST(fstat(DIRECTORY, &opened));
	SAME("working directory", here.st_ino, opened.st_ino);
	REFUSED(open("new", O_CREAT | O_RDWR, 0600), ENOENT);
}

int main(int argc, char **argv)
{
	struct timespec times[2] = {{1000000001, 0}, {1000000000, 0}};

	target_start(argc, argv);
	make("twice", FIRST, O_RDWR, SIZE, 1);
	MUST(dup2((int)MUST(open("twice", O_RDONLY)), SECOND));
	MUST(dup2(FIRST, AGAIN));
	MUST(unlink("twice"));
	MUST(lseek(SECOND, 5, SEEK_SET));
	MUST(fchown(FIRST, 12, 34));
	MUST(fchmod(FIRST, 0604));
	MUST(futimens(FIRST, times));

	make("taken", TAKEN, O_RDWR, SIZE, 2);
	MUST(unlink("taken"));
	make("taken", NEWER, O_RDWR, GROWN, 3);

	MUST(dup2((int)MUST(open("sparse", O_RDWR | O_CREAT | O_EXCL, 0600)), SPARSE));
	target_fill(seen, PAGE, 4);
	SAME("sparse", pwrite(SPARSE, seen, PAGE, 100 * PAGE), PAGE);
	MUST(ftruncate(SPARSE, END));
	MUST(unlink("sparse"));

	make("mapped", READ_ONLY, O_RDWR, MAPPED, 5);
	shared = (char *)MUST(mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_SHARED, READ_ONLY, 0));
	private = (char *)MUST(mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE, READ_ONLY, 0));
	MUST(dup2((int)MUST(open("mapped", O_RDONLY)), READ_ONLY));
	MUST(unlink("mapped"));
	target_fill(shared + PAGE, PAGE, 6);
	target_fill(private + 2 * PAGE, PAGE, 7);

	MUST(mkfifo("fifo", 0600));
	MUST(dup2((int)MUST(open("fifo", O_RDWR)), FIFO));
	MUST(unlink("fifo"));
	SAME("fifo", write(FIFO, "content", 7), 7);

	int top = (int)MUST(open(".", O_PATH | O_DIRECTORY));
	MUST(mkdir("above", 0700));
	MUST(mkdir("above/below", 0711));
	make("above/below/inside", INSIDE, O_RDWR, GROWN, 8);
	MUST(dup2((int)MUST(open("above/below", O_RDONLY | O_DIRECTORY)), DIRECTORY));
	MUST(chdir("above/below"));
	MUST(unlink("inside"));
	MUST(rmdir("../below"));
	MUST(unlinkat(top, "above", AT_REMOVEDIR));
	close_range(INSIDE + 1, ~0u, 0);
	for (int fd = target_output + 1; fd < FIRST; fd++)
		close(fd);
	target_ready();

	while (!target_ending(20))
		;
	check_metadata();
	same_inode("twice", FIRST, SECOND, 0);
	check_content("twice", FIRST, SIZE, 1);
	SAME("twice: position", lseek(SECOND, 0, SEEK_CUR), 5);
	SAME("twice: grow", pwrite(FIRST, "more", 4, SIZE - 4), 4);
	SAME("twice: other descriptor", pread(SECOND, seen, 4, SIZE - 4), 4);
	same_bytes("twice: other descriptor", seen, "more", 4);
	MUST(lseek(FIRST, 77, SEEK_SET));
	SAME("twice: shared position", lseek(AGAIN, 0, SEEK_CUR), 77);
	check_content("taken", TAKEN, SIZE, 2);
	check_content("newer", NEWER, GROWN, 3);
	same_inode("newer", NEWER, NEWER, 1);
	check_sparse();
	same_fill("private", private, PAGE, 5);
	same_fill("private: written", private + 2 * PAGE, PAGE, 7);
	target_fill(shared + 3 * PAGE, PAGE, 9);
	SAME("mapped: read", pread(READ_ONLY, seen, MAPPED, 0), MAPPED);
	same_bytes("mapped: one inode", seen, shared, MAPPED);
	same_fill("mapped: written before", seen + PAGE, PAGE, 6);
	same_fill("mapped: written after", seen + 3 * PAGE, PAGE, 9);
	SAME("fifo", read(FIFO, seen, SIZE), 7);
	same_bytes("fifo", seen, "content", 7);
	check_directory();
	check_content("inside", INSIDE, GROWN, 8);
	same_inode("inside", INSIDE, INSIDE, 0);
	target_pass();
}
