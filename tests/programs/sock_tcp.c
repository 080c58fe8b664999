/*
 * TCP connections between two processes, over IPv4, IPv6 and both: some that are talked over all the
 * time, one with more than a megabyte queued each way, one that the child has shut for writing.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include "target.h"

enum { V4, V6, MAPPED, TALKING, FULL = TALKING, HALF, CONNECTIONS };
enum { BUFFER = 2 << 20, QUEUED = 1000, ANSWER = 500, CODE = 9 };
enum { TO_CHILD = 1, FROM_CHILD, HALF_THERE, HALF_BACK };

static struct connection {
	int child, parent; /* descriptors */
	struct sockaddr_in6 name, peer; /* of the parent's end; room for both families */
} connections[CONNECTIONS];
static size_t to_child, from_child;
static char block[8 * BUFFER];

static void open_connection(struct connection *one, int near, int far)
{
	struct sockaddr_in6 address = {.sin6_family = (sa_family_t)far};
	struct sockaddr_in *v4 = (struct sockaddr_in *)&address;
	socklen_t size = sizeof(address);
	int listener = (int)MUST(socket(far, SOCK_STREAM, 0));

	if (far == AF_INET)
		v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else if (near == AF_INET6)
		address.sin6_addr = in6addr_loopback;
	MUST(bind(listener, (struct sockaddr *)&address, far == AF_INET ? sizeof(*v4) : size));
	MUST(listen(listener, 1));
	MUST(getsockname(listener, (struct sockaddr *)&address, &size));
	if (near == AF_INET && far == AF_INET6) {
		in_port_t port = address.sin6_port;
		*v4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = port, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	}
	one->child = (int)MUST(socket(near, SOCK_STREAM, 0));
	MUST(connect(one->child, (struct sockaddr *)&address, near == AF_INET ? sizeof(*v4) : sizeof(address)));
	one->parent = (int)MUST(accept(listener, NULL, NULL));
	close(listener);
}

static void names(int fd, struct sockaddr_in6 *name, struct sockaddr_in6 *peer)
{
	socklen_t size = sizeof(*name), peer_size = sizeof(*peer);

	MUST(getsockname(fd, (struct sockaddr *)name, &size));
	MUST(getpeername(fd, (struct sockaddr *)peer, &peer_size));
}

static int state_of(int fd)
{
	struct tcp_info info;
	socklen_t size = sizeof(info);

	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size));
	return info.tcpi_state;
}

/* Send until nothing goes any more, for a while. */
static size_t fill(int fd, uint64_t stream)
{
	int size = BUFFER;
	size_t sent = 0;

	MUST(setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)));
	target_fill(block, sizeof(block), stream);
	for (int idle = 0; idle < 20;) {
		ssize_t step = send(fd, block + sent, sizeof(block) - sent, MSG_DONTWAIT);
		if (step > 0) {
			sent += (size_t)step;
			idle = 0;
		} else {
			target_sleep(5);
			idle++;
		}
	}
	CHECK(sent > BUFFER / 2 && sent < sizeof(block), "queued %zu bytes", sent);
	return sent;
}

static void must_get(const char *what, int fd, size_t size, uint64_t stream)
{
	SAME(what, MUST(recv(fd, block, size, MSG_WAITALL)), size);
	same_fill(what, block, size, stream);
}

static void put(int fd, size_t size, uint64_t stream)
{
	target_fill(block, size, stream);
	SAME("send", MUST(send(fd, block, size, 0)), size);
}

__attribute__((noreturn)) static void child(void)
{
	struct pollfd questions[TALKING];
	uint64_t number;

	for (int i = 0; i < CONNECTIONS; i++)
		close(connections[i].parent);
	for (int i = 0; i < TALKING; i++)
		questions[i] = (struct pollfd){connections[i].child, POLLIN, 0};
	while (!target_ending(0)) {
		MUST(poll(questions, TALKING, 20));
		for (int i = 0; i < TALKING; i++) {
			if (!questions[i].revents)
				continue;
			SAME("child: question", recv(questions[i].fd, &number, sizeof(number), MSG_WAITALL), sizeof(number));
			number = target_random(number);
			SAME("child: answer", send(questions[i].fd, &number, sizeof(number), 0), sizeof(number));
		}
	}
	must_get("child: queue", connections[FULL].child, to_child, TO_CHILD);
	SAME("child: state of what is shut", state_of(connections[HALF].child), TCP_FIN_WAIT2);
	REFUSED(send(connections[HALF].child, "x", 1, MSG_NOSIGNAL), EPIPE);
	must_get("child: answer to what is shut", connections[HALF].child, ANSWER, HALF_BACK);
	_exit(CODE);
}

static void check(uint64_t number)
{
	struct sockaddr_in6 name, peer;
	uint64_t answer;

	for (int i = 0; i < CONNECTIONS; i++) {
		memset(&name, 0, sizeof(name));
		memset(&peer, 0, sizeof(peer));
		names(connections[i].parent, &name, &peer);
		same_bytes("name", &name, &connections[i].name, sizeof(name));
		same_bytes("peer", &peer, &connections[i].peer, sizeof(peer));
		SAME("state", state_of(connections[i].parent), i == HALF ? TCP_CLOSE_WAIT : TCP_ESTABLISHED);
	}
	for (int i = 0; i < TALKING; i++)
		SAME("question", send(connections[i].parent, &number, sizeof(number), 0), sizeof(number));
	for (int i = 0; i < TALKING; i++) {
		SAME("answer", recv(connections[i].parent, &answer, sizeof(answer), MSG_WAITALL), sizeof(answer));
		SAME("answer", answer, target_random(number));
	}
}

int main(int argc, char **argv)
{
	static const int families[CONNECTIONS][2] = {
		[V4] = {AF_INET, AF_INET},   [V6] = {AF_INET6, AF_INET6},   [MAPPED] = {AF_INET, AF_INET6},
		[FULL] = {AF_INET, AF_INET}, [HALF] = {AF_INET6, AF_INET6},
	};
	int on = 1;

	target_start(argc, argv);
	for (int i = 0; i < CONNECTIONS; i++) {
		open_connection(&connections[i], families[i][0], families[i][1]);
		names(connections[i].parent, &connections[i].name, &connections[i].peer);
	}
	MUST(setsockopt(connections[V6].parent, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)));
	to_child = fill(connections[FULL].parent, TO_CHILD);
	from_child = fill(connections[FULL].child, FROM_CHILD);
	put(connections[HALF].child, QUEUED, HALF_THERE);
	MUST(shutdown(connections[HALF].child, SHUT_WR));
	pid_t pid = (pid_t)MUST(fork());
	if (!pid)
		child();
	for (int i = 0; i < CONNECTIONS; i++)
		close(connections[i].child);
	check(0);
	target_ready();
	for (uint64_t number = 1; !target_ending(3); number++)
		check(number);
	check(1);
	must_get("queue", connections[FULL].parent, from_child, FROM_CHILD);
	must_get("before the end", connections[HALF].parent, QUEUED, HALF_THERE);
	SAME("the end", recv(connections[HALF].parent, block, 1, 0), 0);
	put(connections[HALF].parent, ANSWER, HALF_BACK);
	target_end_child("child", pid, CODE);
	target_pass();
}
