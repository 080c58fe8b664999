/*
 * Open files: positions, flags, append, descriptors that share a description (dup, child), devices,
 * a directory, O_PATH, high numbers; and no descriptor more or less than before.
 */
#include <dirent.h>

#include "target.h"

enum { SIZE = 1 << 16, IN_DATA = 1, HIGH = 900, CHILD_READS = 7 };
enum { SHARED = 20, SHARED_DUP, APART, APPEND, NUL, ZERO, URANDOM, WORK, DIRECTORY = 30, BY_PATH, SYNCED };

/* What is open at which number; -1: no position is compared. */
static const struct opened {
	int fd, flags, cloexec;
	const char *path;
	off_t position;
} table[] = {
	{SHARED, O_RDWR, 0, "data", 1000},
	{APART, O_RDONLY, FD_CLOEXEC, "data", 2222},
	{APPEND, O_WRONLY | O_APPEND | O_CREAT, 0, "log", -1},
	{NUL, O_RDWR, 0, "/dev/null", -1},
	{ZERO, O_RDONLY, FD_CLOEXEC, "/dev/zero", -1},
	{URANDOM, O_RDONLY | O_NONBLOCK, 0, "/dev/urandom", -1},
	{WORK, O_RDWR | O_CREAT | O_NONBLOCK, 0, "work", -1},
	{DIRECTORY, O_RDONLY | O_DIRECTORY, 0, ".", -1},
	{BY_PATH, O_PATH, FD_CLOEXEC, "data", -1},
	{SYNCED, O_WRONLY | O_SYNC | O_NOATIME, 0, "data", SIZE + 5000},
	{HIGH, O_RDONLY, FD_CLOEXEC, "data", 77},
};
enum { OPENED = sizeof(table) / sizeof(table[0]) };

static int flags[HIGH + 1], descriptor_flags[HIGH + 1];
static char data[SIZE];

/* All flags of all numbers, -1 where nothing is open. */
static void look(int *status, int *descriptor)
{
	for (int fd = 0; fd <= HIGH; fd++) {
		status[fd] = fcntl(fd, F_GETFL);
		descriptor[fd] = fcntl(fd, F_GETFD);
	}
}

static void open_all(void)
{
	for (int i = 0; i < OPENED; i++) {
		int fd = (int)MUST(open(table[i].path, table[i].flags, 0600));

		MUST(dup3(fd, table[i].fd, table[i].cloexec ? O_CLOEXEC : 0));
		close(fd);
		if (table[i].position >= 0)
			MUST(lseek(table[i].fd, table[i].position, SEEK_SET));
	}
	MUST(dup2(SHARED, SHARED_DUP));
}

/* The child has the same descriptions: what it moves, moves for the parent. */
static void child(void)
{
	char bytes[CHILD_READS];

	while (!target_ending(5))
		;
	SAME("child: read", read(SHARED, bytes, CHILD_READS), CHILD_READS);
	same_bytes("child: data", bytes, data + 1000, CHILD_READS);
	SAME("child: append", write(APPEND, "child\n", 6), 6);
	_exit(3);
}

static void check_devices(void)
{
	unsigned char bytes[64];
	int sum = 0;

	SAME("/dev/null", write(NUL, bytes, 64), 64);
	SAME("/dev/null", read(NUL, bytes, 64), 0);
	SAME("/dev/urandom", read(URANDOM, bytes, 64), 64);
	for (int i = 0; i < 64; i++)
		sum |= bytes[i];
	CHECK(sum, "/dev/urandom gives zeros");
	SAME("/dev/zero", read(ZERO, bytes, 64), 64);
	same_zero("/dev/zero", bytes, 64);
}

/* The log holds every line once, and the child's at the end. */
static void check_log(unsigned lines)
{
	FILE *log = fopen("log", "re");
	unsigned number;
	char line[64];

	CHECK(log, "log: %s", strerror(errno));
	for (unsigned i = 0; i < lines; i++)
		CHECK(fgets(line, sizeof(line), log) && sscanf(line, "line %u", &number) == 1 && number == i,
		      "line %u of the log is %s", i, line);
	CHECK(fgets(line, sizeof(line), log), "the log ends after %u lines", lines);
	same_text("last line of the log", line, "child\n");
	CHECK(!fgets(line, sizeof(line), log), "the log goes on: %s", line);
	fclose(log);
}

int main(int argc, char **argv)
{
	static int flags_now[HIGH + 1], descriptor_flags_now[HIGH + 1];
	char bytes[64], entries[128];
	unsigned lines = 0;
	struct stat of_path, of_data;

	target_start(argc, argv);
	target_fill(data, SIZE, IN_DATA);
	int fd = (int)MUST(open("data", O_WRONLY | O_CREAT | O_EXCL, 0600));
	SAME("write", write(fd, data, SIZE), SIZE);
	close(fd);
	open_all();
	MUST(syscall(SYS_getdents64, DIRECTORY, entries, 64)); /* some entries: the position is inside */
	off_t inside = MUST(lseek(DIRECTORY, 0, SEEK_CUR));
	pid_t pid = (pid_t)MUST(fork());
	if (!pid)
		child();
	look(flags, descriptor_flags);

	target_ready();
	for (; !target_ending(2); lines++) {
		uint64_t word = target_random(lines);
		int length = snprintf(bytes, sizeof(bytes), "line %u\n", lines);

		SAME("append", write(APPEND, bytes, (size_t)length), length);
		SAME("write", write(WORK, &word, sizeof(word)), sizeof(word));
	}

	look(flags_now, descriptor_flags_now);
	for (fd = 0; fd <= HIGH; fd++) {
		char what[32];

		snprintf(what, sizeof(what), "flags of fd %d", fd);
		SAME(what, flags_now[fd], flags[fd]);
		SAME(what, descriptor_flags_now[fd], descriptor_flags[fd]);
	}
	for (int i = 0; i < OPENED; i++)
		if (table[i].position >= 0)
			SAME("position", lseek(table[i].fd, 0, SEEK_CUR), table[i].position);
	SAME("position in the directory", lseek(DIRECTORY, 0, SEEK_CUR), inside);
	SAME("position of the file at work", lseek(WORK, 0, SEEK_CUR), lines * 8);
	for (unsigned i = 0; i < lines; i++) {
		uint64_t word = target_random(i), found;

		SAME("pread", pread(WORK, &found, 8, i * 8), 8);
		SAME("file at work", found, word);
	}

	target_end_child("child", pid, 3);
	check_log(lines);
	SAME("position after the child's read", lseek(SHARED, 0, SEEK_CUR), 1000 + CHILD_READS);
	MUST(lseek(SHARED_DUP, 64, SEEK_CUR));
	SAME("position shared with a dup", read(SHARED, bytes, 64), 64);
	same_bytes("data", bytes, data + 1000 + CHILD_READS + 64, 64);
	SAME("position of another description", read(APART, bytes, 64), 64);
	same_bytes("data", bytes, data + 2222, 64);
	REFUSED(write(APART, bytes, 1), EBADF);
	REFUSED(read(BY_PATH, bytes, 1), EBADF);
	REFUSED(read(SYNCED, bytes, 1), EBADF);
	SAME("high fd", read(HIGH, bytes, 64), 64);
	same_bytes("data", bytes, data + 77, 64);
	SAME("write beyond the end", write(SYNCED, "end", 3), 3);
	MUST(fstatat(BY_PATH, "", &of_path, AT_EMPTY_PATH));
	MUST(fstatat(DIRECTORY, "data", &of_data, 0));
	SAME("file below O_PATH", of_path.st_ino, of_data.st_ino);
	SAME("size of the file", of_data.st_size, SIZE + 5003);
	check_devices();
	target_pass();
}
