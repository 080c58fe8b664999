/*
 * Pipes: with content, full, of another size, packets, non-blocking, with one side closed, and a
 * conversation between parent and child that never pauses.
 */
#include <sys/ioctl.h>

#include "target.h"

enum { SMALL = 5000, RESIZED = 1 << 18, IN_PLAIN = 1, IN_FULL, IN_BIG, IN_LEFT, PACKETS = 5, NUMBERS = 64 };

static const int packet[PACKETS] = {1, 4096, 17, 100, 2048};
static char block[1 << 20];

struct ends {
	int out, in; /* as pipe(2) gives them: read, write */
};

static struct ends make(int flags)
{
	int fd[2];

	MUST(pipe2(fd, flags));
	return (struct ends){fd[0], fd[1]};
}

static void put(int fd, size_t size, uint64_t stream)
{
	target_fill(block, size, stream);
	SAME("write", MUST(write(fd, block, size)), size);
}

static void must_hold(const char *what, int fd, size_t size, uint64_t stream)
{
	int queued;

	MUST(ioctl(fd, FIONREAD, &queued));
	SAME(what, queued, size);
	for (size_t done = 0; done < size;)
		done += (size_t)MUST(read(fd, block + done, size - done));
	same_fill(what, block, size, stream);
}

static size_t fill_up(int fd, uint64_t stream)
{
	size_t size = 0;
	ssize_t wrote;

	target_fill(block, sizeof(block), stream);
	while ((wrote = write(fd, block + size, PAGE)) > 0)
		size += (size_t)wrote;
	SAME("full", errno, EAGAIN);
	return size;
}

/* Answers each number with the next of the random sequence. */
static void child(struct ends questions, struct ends answers)
{
	uint64_t number;
	ssize_t got;

	close(questions.in);
	close(answers.out);
	while ((got = MUST(read(questions.out, &number, sizeof(number)))) > 0) {
		SAME("child: bytes of a question", got, sizeof(number));
		number = target_random(number);
		SAME("child: answer", write(answers.in, &number, sizeof(number)), sizeof(number));
	}
	_exit(5);
}

int main(int argc, char **argv)
{
	int flags[NUMBERS], now, status;
	uint64_t number = 1, answer;

	target_start(argc, argv);
	signal(SIGPIPE, SIG_IGN);
	struct ends questions = make(0), answers = make(O_CLOEXEC);
	pid_t pid = (pid_t)MUST(fork());
	if (!pid)
		child(questions, answers);
	close(questions.out);
	close(answers.in);

	struct ends plain = make(0), full = make(O_NONBLOCK), big = make(0), packets = make(O_DIRECT);
	struct ends deaf = make(O_CLOEXEC), left = make(0), empty = make(O_NONBLOCK);
	put(plain.in, SMALL, IN_PLAIN);
	size_t in_full = fill_up(full.in, IN_FULL);
	SAME("size", MUST(fcntl(big.in, F_SETPIPE_SZ, RESIZED)), RESIZED);
	put(big.in, RESIZED - 10000, IN_BIG);
	for (int i = 0; i < PACKETS; i++)
		put(packets.in, (size_t)packet[i], 100 + (uint64_t)i);
	close(deaf.out);
	put(left.in, SMALL, IN_LEFT);
	close(left.in);
	/* The start of a page was read already. */
	SAME("read", MUST(read(plain.out, block, 1000)), 1000);
	put(plain.in, 1, IN_PLAIN);
	for (int fd = 0; fd < NUMBERS; fd++)
		flags[fd] = fcntl(fd, F_GETFL) * 2 + fcntl(fd, F_GETFD);

	target_ready();
	for (; !target_ending(1); number++) {
		SAME("question", write(questions.in, &number, sizeof(number)), sizeof(number));
		SAME("answer", MUST(read(answers.out, &answer, sizeof(answer))), sizeof(answer));
		SAME("answer", answer, target_random(number));
	}

	for (int fd = 0; fd < NUMBERS; fd++) {
		now = fcntl(fd, F_GETFL) * 2 + fcntl(fd, F_GETFD);
		CHECK(now == flags[fd], "flags of fd %d: %#x, not %#x", fd, now, flags[fd]);
	}
	SAME("size of a plain pipe", fcntl(plain.out, F_GETPIPE_SZ), 1 << 16);
	SAME("size of a changed pipe", fcntl(big.out, F_GETPIPE_SZ), RESIZED);
	REFUSED(read(empty.out, block, 1), EAGAIN);
	REFUSED(write(full.in, block, 1), EAGAIN);
	REFUSED(write(deaf.in, block, 1), EPIPE);

	MUST(ioctl(plain.in, FIONREAD, &now));
	SAME("content of a plain pipe", now, SMALL - 1000 + 1);
	SAME("read", MUST(read(plain.out, block + 1000, sizeof(block) - 1000)), SMALL - 1000 + 1);
	char again[SMALL + 1];
	target_fill(again, SMALL, IN_PLAIN);
	target_fill(again + SMALL, 1, IN_PLAIN);
	same_bytes("content of a plain pipe", block + 1000, again + 1000, SMALL - 1000 + 1);
	must_hold("content of a full pipe", full.out, in_full, IN_FULL);
	SAME("room in an emptied pipe", fill_up(full.in, IN_FULL), in_full);
	must_hold("content of a big pipe", big.out, RESIZED - 10000, IN_BIG);
	for (int i = 0; i < PACKETS; i++) {
		SAME("packet", MUST(read(packets.out, block, sizeof(block))), packet[i]);
		same_fill("packet", block, (size_t)packet[i], 100 + (uint64_t)i);
	}
	put(packets.in, 3, 1);
	put(packets.in, 4, 1);
	SAME("new packet", MUST(read(packets.out, block, sizeof(block))), 3);
	must_hold("content left by a closed end", left.out, SMALL, IN_LEFT);
	SAME("end of file", read(left.out, block, 1), 0);

	close(questions.in);
	SAME("child", MUST(waitpid(pid, &status, 0)), pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 5, "child: status %#x", (unsigned)status);
	SAME("end of the answers", read(answers.out, &answer, 1), 0);
	target_pass();
}
