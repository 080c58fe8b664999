/*
 * Unix sockets: pairs of the three kinds with data queued both ways and message boundaries, one
 * side shut down, one end in a child that answers all the time, listeners by path and by name.
 */
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "target.h"

enum { STREAM, DGRAM, SEQPACKET, HALF, PAIRS, QUEUED = 5, BACKLOG = 9, NUMBERS = 64 };

static const int kinds[PAIRS] = {SOCK_STREAM, SOCK_DGRAM | SOCK_NONBLOCK, SOCK_SEQPACKET | SOCK_CLOEXEC, SOCK_STREAM};
static const size_t sizes[QUEUED] = {1, 3000, 17, 4096, 250};
static int pairs[PAIRS][2];
static char block[1 << 16];

static void put(int fd, size_t size, uint64_t stream)
{
	target_fill(block, size, stream);
	SAME("send", MUST(send(fd, block, size, MSG_NOSIGNAL)), size);
}

/* One message, or for streams that many bytes. */
static void must_get(const char *what, int fd, size_t size, uint64_t stream, int flags)
{
	SAME(what, MUST(recv(fd, block, flags & MSG_WAITALL ? size : sizeof(block), flags)), size);
	same_fill(what, block, size, stream);
}

static void must_be_empty(const char *what, int fd)
{
	CHECK(recv(fd, block, 1, MSG_DONTWAIT) == -1 && errno == EAGAIN, "%s: more data", what);
}

static void child(int fd)
{
	uint64_t number;
	ssize_t got;

	while ((got = MUST(recv(fd, &number, sizeof(number), 0))) > 0) {
		SAME("child: bytes of a question", got, sizeof(number));
		number = target_random(number);
		SAME("child: answer", send(fd, &number, sizeof(number), 0), sizeof(number));
	}
	_exit(6);
}

static void ask(int fd, uint64_t number)
{
	uint64_t answer;

	SAME("question", send(fd, &number, sizeof(number), 0), sizeof(number));
	SAME("answer", MUST(recv(fd, &answer, sizeof(answer), 0)), sizeof(answer));
	SAME("answer", answer, target_random(number));
}

static socklen_t name_of(struct sockaddr_un *address, const char *name, bool abstract)
{
	memset(address, 0, sizeof(*address));
	address->sun_family = AF_UNIX;
	strcpy(address->sun_path + abstract, name);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(name) + 1);
}

static int listener(const char *name, bool abstract, int flags)
{
	struct sockaddr_un address;
	socklen_t size = name_of(&address, name, abstract);
	int fd = (int)MUST(socket(AF_UNIX, SOCK_STREAM | flags, 0));

	MUST(bind(fd, (struct sockaddr *)&address, size));
	MUST(listen(fd, BACKLOG));
	return fd;
}

/* As many connections as the backlog allows can wait (one more than the number, unix(7)). */
static void check_listener(int listening, const char *name, bool abstract)
{
	int clients[BACKLOG + 1], fd;
	struct sockaddr_un address, seen;
	socklen_t size = name_of(&address, name, abstract), seen_size = sizeof(seen);

	MUST(getsockname(listening, (struct sockaddr *)&seen, &seen_size));
	SAME("length of the address", seen_size, size);
	same_bytes("address", &seen, &address, size);
	for (int i = 0; i <= BACKLOG; i++) {
		clients[i] = (int)MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
		MUST(connect(clients[i], (struct sockaddr *)&address, size));
	}
	fd = (int)MUST(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0));
	REFUSED(connect(fd, (struct sockaddr *)&address, size), EAGAIN);
	close(fd);
	for (int i = 0; i <= BACKLOG; i++) {
		fd = (int)MUST(accept(listening, NULL, NULL));
		put(fd, 100, (uint64_t)i);
		must_get("message of an accepted connection", clients[i], 100, (uint64_t)i, MSG_WAITALL);
		close(fd);
		close(clients[i]);
	}
}

static int option(int fd, int number)
{
	socklen_t size = sizeof(int);
	int value;

	MUST(getsockopt(fd, SOL_SOCKET, number, &value, &size));
	return value;
}

int main(int argc, char **argv)
{
	int talk[2], status, flags[NUMBERS], send_size = 40000, receive_size = 60000, on = 1;
	uint64_t number = 1;
	char abstract[64];

	target_start(argc, argv);
	snprintf(abstract, sizeof(abstract), "phaul-target-%d-%llx", getpid(), (unsigned long long)target_seed);
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, talk));
	pid_t pid = (pid_t)MUST(fork());
	if (!pid) {
		close(talk[0]);
		child(talk[1]);
	}
	close(talk[1]);
	for (int i = 0; i < PAIRS; i++) {
		MUST(socketpair(AF_UNIX, kinds[i], 0, pairs[i]));
		for (int side = 0; side < 2; side++)
			for (int n = 0; n < QUEUED; n++)
				put(pairs[i][side], sizes[n], (uint64_t)(100 * i + 10 * side + n));
	}
	MUST(shutdown(pairs[HALF][0], SHUT_WR));
	MUST(setsockopt(pairs[STREAM][0], SOL_SOCKET, SO_SNDBUF, &send_size, sizeof(int)));
	MUST(setsockopt(pairs[STREAM][1], SOL_SOCKET, SO_RCVBUF, &receive_size, sizeof(int)));
	MUST(setsockopt(pairs[DGRAM][0], SOL_SOCKET, SO_PASSCRED, &on, sizeof(int)));
	int by_path = listener("listener.sock", false, SOCK_NONBLOCK);
	int by_name = listener(abstract, true, SOCK_CLOEXEC);
	for (int fd = 0; fd < NUMBERS; fd++)
		flags[fd] = fcntl(fd, F_GETFL) * 2 + fcntl(fd, F_GETFD);

	ask(talk[0], 0); /* the child is there, and has closed its copy of our end */
	target_ready();
	while (!target_ending(1))
		ask(talk[0], number++);

	for (int fd = 0; fd < NUMBERS; fd++) {
		int now = fcntl(fd, F_GETFL) * 2 + fcntl(fd, F_GETFD);
		CHECK(now == flags[fd], "flags of fd %d: %#x, not %#x", fd, now, flags[fd]);
	}
	SAME("SO_SNDBUF", option(pairs[STREAM][0], SO_SNDBUF), 2 * send_size);
	SAME("SO_RCVBUF", option(pairs[STREAM][1], SO_RCVBUF), 2 * receive_size);
	SAME("SO_PASSCRED", option(pairs[DGRAM][0], SO_PASSCRED), 1);
	for (int i = 0; i < PAIRS; i++)
		for (int side = 0; side < 2; side++) {
			int stream = (kinds[i] & 15) == SOCK_STREAM, from = pairs[i][!side];

			SAME("kind of a socket", option(from, SO_TYPE), kinds[i] & 15);
			for (int n = 0; n < QUEUED; n++)
				must_get("queued message", from, sizes[n], (uint64_t)(100 * i + 10 * side + n),
					 stream ? MSG_WAITALL : 0);
			if (i != HALF || side)
				must_be_empty("pair", from);
		}
	SAME("end of a half that was shut", recv(pairs[HALF][1], block, 1, 0), 0);
	REFUSED(send(pairs[HALF][0], block, 1, MSG_NOSIGNAL), EPIPE);
	for (int i = 0; i < PAIRS; i++) {
		put(pairs[i][1], 333, 7);
		must_get("new message", pairs[i][0], 333, 7, 0);
	}
	close(pairs[SEQPACKET][1]);
	SAME("end of a closed pair", recv(pairs[SEQPACKET][0], block, 1, 0), 0);
	SAME("SO_ACCEPTCONN", option(by_path, SO_ACCEPTCONN), 1);
	REFUSED(accept(by_path, NULL, NULL), EAGAIN);
	check_listener(by_path, "listener.sock", false);
	check_listener(by_name, abstract, true);

	close(talk[0]);
	SAME("child", MUST(waitpid(pid, &status, 0)), pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 6, "child: status %#x", (unsigned)status);
	target_pass();
}
