/* Mappings with something behind them: files private and shared, memory shared with a child, memfd. */
#include "target.h"

enum { PAGES = 32, SIZE = PAGES * PAGE, TAIL = 1000, SEALS = F_SEAL_SHRINK };
enum { IN_FILE, IN_PRIVATE, IN_SHARED, IN_MEMFD, IN_MEMFD_PRIVATE, IN_ANONYMOUS };

/* Parent and child count in it and see each other count. */
struct meeting {
	_Atomic uint64_t parent, child, question, answer;
	char content[SIZE];
};

static void *map(size_t size, int flags, int fd, off_t offset)
{
	return (void *)MUST(mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, offset));
}

static int make_file(const char *name, uint64_t stream)
{
	static char content[SIZE];
	int fd = (int)MUST(open(name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));

	target_fill(content, SIZE, stream);
	SAME(name, write(fd, content, SIZE - TAIL), SIZE - TAIL);
	return fd;
}

static void child(struct meeting *meeting)
{
	uint64_t seen = 0;

	while (!target_ending(1)) {
		CHECK(meeting->parent >= seen, "child: the parent's count fell");
		seen = meeting->parent;
		meeting->child++;
		meeting->answer = target_random(meeting->question);
	}
	same_fill("child: shared memory", meeting->content, SIZE, IN_ANONYMOUS);
	_exit(17);
}

int main(int argc, char **argv)
{
	static char content[SIZE];

	target_start(argc, argv);
	/* The mapping starts at the file's second page; of its pages every third is written. */
	int file = make_file("private", IN_FILE);
	char *own = map(SIZE - PAGE, MAP_PRIVATE, file, PAGE);
	for (int page = 0; page < PAGES - 1; page += 3)
		target_fill(own + page * PAGE, PAGE, IN_PRIVATE + 100 + (uint64_t)page);
	close(file);

	file = make_file("shared", IN_FILE);
	char *shared = map(SIZE, MAP_SHARED, file, 0);
	target_fill(shared, PAGE, IN_SHARED);

	int memfd = (int)MUST(memfd_create("phaul memfd", MFD_ALLOW_SEALING));
	MUST(ftruncate(memfd, SIZE));
	char *in_memfd = map(SIZE, MAP_SHARED, memfd, 0);
	target_fill(in_memfd, SIZE, IN_MEMFD);
	char *on_memfd = map(SIZE, MAP_PRIVATE, memfd, 0);
	target_fill(on_memfd + 2 * PAGE, PAGE, IN_MEMFD_PRIVATE);
	MUST(fcntl(memfd, F_ADD_SEALS, SEALS));
	MUST(lseek(memfd, 4321, SEEK_SET));

	struct meeting *meeting = map(sizeof(*meeting), MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	target_fill(meeting->content, SIZE, IN_ANONYMOUS);
	pid_t pid = (pid_t)MUST(fork());
	if (!pid)
		child(meeting);

	uint64_t count = 0, seen = 0;
	target_ready();
	while (!target_ending(1)) {
		meeting->parent = ++count;
		CHECK(meeting->child >= seen, "parent: the child's count fell");
		seen = meeting->child;
		memcpy(shared + 5 * PAGE, &count, sizeof(count));
		memcpy(in_memfd + 5 * PAGE, &count, sizeof(count));
	}

	target_fill(content, SIZE, IN_FILE);
	memset(content + SIZE - TAIL, 0, TAIL);
	for (int page = 0; page < PAGES - 1; page++)
		if (page % 3)
			same_bytes("page of a private file map", own + page * PAGE,
				   content + (page + 1) * PAGE, PAGE);
		else
			same_fill("changed page of a private file map", own + page * PAGE, PAGE,
				  IN_PRIVATE + 100 + (uint64_t)page);

	target_fill(content, PAGE, IN_SHARED);
	memcpy(content + 5 * PAGE, &count, sizeof(count));
	same_bytes("shared file map", shared, content, SIZE);
	shared[6 * PAGE] ^= 1;
	content[6 * PAGE] ^= 1;
	static char again[SIZE];
	SAME("file", pread(file, again, SIZE, 0), SIZE - TAIL);
	same_bytes("file below the map", again, content, SIZE - TAIL);

	target_fill(content, SIZE, IN_MEMFD);
	memcpy(content + 5 * PAGE, &count, sizeof(count));
	same_bytes("memfd map", in_memfd, content, SIZE);
	SAME("position of the memfd", lseek(memfd, 0, SEEK_CUR), 4321);
	SAME("seals of the memfd", fcntl(memfd, F_GET_SEALS), SEALS);
	in_memfd[7 * PAGE] ^= 1;
	content[7 * PAGE] ^= 1;
	SAME("memfd", pread(memfd, again, SIZE, 0), SIZE);
	same_bytes("memfd below the map", again, content, SIZE);
	target_fill(content + 2 * PAGE, PAGE, IN_MEMFD_PRIVATE);
	same_bytes("private map of the memfd", on_memfd, content, SIZE);

	/* Still one memory: the child answers what is asked only now. */
	meeting->question = target_seed;
	for (int i = 0; meeting->answer != target_random(target_seed); i++) {
		CHECK(i < 5000, "the child does not see what the parent writes");
		target_sleep(1);
	}
	same_fill("shared memory", meeting->content, SIZE, IN_ANONYMOUS);
	target_end_child("child", pid, 17);
	target_pass();
}
