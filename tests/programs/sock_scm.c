/*
 * Descriptors in flight (SCM_RIGHTS) in unix sockets of the three kinds: a file and a pipe that are
 * open nowhere else, a file that is, a socket with descriptors in its own queue, a socket in the
 * queue of its peer, and an epoll that watches the socket it is queued for. Of a stream they come
 * with the first byte that they were sent with.
 */
#include <sys/epoll.h>
#include <sys/socket.h>

#include "target.h"

enum { KINDS = 3, MOST = 4, PLAIN = 3000, MARKED = 5000, TAIL = 40, POSITION = 1234, SIZE = 100000 };

static const int kinds[KINDS] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET};
static char block[SIZE];

/* A message of `size` bytes with `count` descriptors, which are closed here. */
static void put(int to, size_t size, uint64_t stream, const int *fds, int count)
{
	union {
		char bytes[CMSG_SPACE(MOST * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec data = {block, size};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};

	if (count) {
		message.msg_control = &control;
		message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
		struct cmsghdr *head = CMSG_FIRSTHDR(&message);
		*head = (struct cmsghdr){CMSG_LEN((size_t)count * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
		memcpy(CMSG_DATA(head), fds, (size_t)count * sizeof(int));
	}
	target_fill(block, size, stream);
	SAME("sendmsg", MUST(sendmsg(to, &message, 0)), size);
	for (int i = 0; i < count; i++)
		close(fds[i]);
}

/* The other side of `put`. */
static void must_get(const char *what, int from, size_t size, uint64_t stream, int *fds, int count)
{
	union {
		char bytes[CMSG_SPACE(2 * MOST * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec data = {block, size};
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

	SAME(what, MUST(recvmsg(from, &message, MSG_DONTWAIT)), size);
	same_fill(what, block, size, stream);
	SAME(what, message.msg_flags & (MSG_TRUNC | MSG_CTRUNC), 0);
	struct cmsghdr *head = CMSG_FIRSTHDR(&message);
	SAME(what, head ? head->cmsg_len : 0, count ? CMSG_LEN((size_t)count * sizeof(int)) : 0);
	if (head)
		memcpy(fds, CMSG_DATA(head), (size_t)count * sizeof(int));
}

static int new_file(int kind)
{
	char name[16];

	snprintf(name, sizeof(name), "file-%d", kind);
	int fd = (int)MUST(open(name, O_RDWR | O_CREAT | O_APPEND, 0600));
	target_fill(block, SIZE, (uint64_t)kind);
	SAME("write", MUST(write(fd, block, SIZE)), SIZE);
	MUST(lseek(fd, POSITION, SEEK_SET));
	return fd;
}

static void check_file(int fd, int kind, int flags)
{
	char all[SIZE];

	SAME("position", MUST(lseek(fd, 0, SEEK_CUR)), POSITION);
	SAME("flags", MUST(fcntl(fd, F_GETFL)) & (O_ACCMODE | O_APPEND), flags);
	SAME("read", MUST(pread(fd, all, SIZE, 0)), SIZE);
	same_fill("file", all, SIZE, (uint64_t)kind);
}

static void check_pipe(int reader, int writer, size_t size, uint64_t stream)
{
	SAME("pipe", MUST(read(reader, block, SIZE)), size);
	same_fill("pipe", block, size, stream);
	SAME("write into the pipe", MUST(write(writer, "x", 1)), 1);
	MUST(close(writer));
	SAME("read from the pipe", MUST(read(reader, block, SIZE)), 1);
	SAME("end of the pipe", MUST(read(reader, block, SIZE)), 0);
	MUST(close(reader));
}

static int pipe_with(size_t size, uint64_t stream, int *writer)
{
	int ends[2];

	MUST(pipe(ends));
	target_fill(block, size, stream);
	SAME("write into the pipe", MUST(write(ends[1], block, size)), size);
	*writer = ends[1];
	return ends[0];
}

int main(int argc, char **argv)
{
	int pairs[KINDS][2], inner[KINDS], kept[KINDS], fds[MOST], more[MOST];

	target_start(argc, argv);
	for (int i = 0; i < KINDS; i++) {
		uint64_t stream = (uint64_t)(100 * (i + 1));
		int nested[2];

		MUST(socketpair(AF_UNIX, kinds[i], 0, pairs[i]));
		MUST(socketpair(AF_UNIX, kinds[i], 0, nested));
		inner[i] = nested[0];
		kept[i] = (int)MUST(open("/dev/zero", O_RDONLY));
		put(pairs[i][0], PLAIN, stream, NULL, 0);
		fds[0] = new_file(i);
		fds[1] = (int)MUST(dup(kept[i]));
		fds[2] = pipe_with(TAIL, stream + 1, &more[0]);
		put(pairs[i][0], MARKED, stream + 2, fds, 3);
		put(nested[0], PLAIN, stream + 3, more, 1);
		fds[0] = nested[1];
		put(pairs[i][0], 1, stream + 4, fds, 1);
		put(pairs[i][0], TAIL, stream + 5, NULL, 0);
		fds[0] = (int)MUST(dup(pairs[i][0]));
		fds[1] = (int)MUST(epoll_create1(0));
		struct epoll_event event = {EPOLLIN, {.u64 = stream}};
		MUST(epoll_ctl(fds[1], EPOLL_CTL_ADD, pairs[i][0], &event));
		put(pairs[i][1], TAIL, stream + 6, fds, 2);
	}

	target_ready();
	while (!target_ending(10))
		;

	for (int i = 0; i < KINDS; i++) {
		uint64_t stream = (uint64_t)(100 * (i + 1));
		int from = pairs[i][1], end;

		must_get("plain message", from, PLAIN, stream, NULL, 0);
		must_get("message with descriptors", from, MARKED, stream + 2, fds, 3);
		must_get("message with a socket", from, 1, stream + 4, more, 1);
		must_get("last message", from, TAIL, stream + 5, NULL, 0);
		check_file(fds[0], i, O_RDWR | O_APPEND);
		SAME("the file that is open too",
		     MUST(syscall(SYS_kcmp, getpid(), getpid(), 0 /* KCMP_FILE */, fds[1], kept[i])), 0);
		must_get("message inside", more[0], PLAIN, stream + 3, &end, 1);
		check_pipe(fds[2], end, TAIL, stream + 1);
		put(inner[i], TAIL, stream, NULL, 0);
		must_get("new message inside", more[0], TAIL, stream, NULL, 0);
		must_get("message with its own receiver", pairs[i][0], TAIL, stream + 6, fds, 2);
		SAME("its own receiver",
		     MUST(syscall(SYS_kcmp, getpid(), getpid(), 0 /* KCMP_FILE */, fds[0], pairs[i][0])), 0);
		struct epoll_event event;
		SAME("events of an empty socket", MUST(epoll_wait(fds[1], &event, 1, 0)), 0);
		put(from, 1, 0, NULL, 0);
		SAME("events", MUST(epoll_wait(fds[1], &event, 1, 0)), 1);
		SAME("event", event.data.u64, stream);
		MUST(epoll_ctl(fds[1], EPOLL_CTL_DEL, pairs[i][0], NULL));
	}
	target_pass();
}
