/*
 * Listening TCP sockets of both families with their options and backlogs, blocking and not. At the
 * end the program connects to itself through each and talks.
 */
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include "target.h"

enum { LISTENERS = 5, OPTIONS = 12, MESSAGE = 10000 };

static struct listener {
	const char *name;
	int family, backlog, flags;
	int fd, values[OPTIONS], v6_only;
	struct sockaddr_in6 address; /* room for both families */
} listeners[LISTENERS] = {
	{.name = "IPv4 loopback", .family = AF_INET, .backlog = 7},
	{.name = "IPv4 any, non-blocking", .family = AF_INET, .backlog = 100, .flags = SOCK_NONBLOCK | SOCK_CLOEXEC},
	{.name = "IPv6 loopback", .family = AF_INET6, .backlog = 3, .flags = SOCK_NONBLOCK},
	{.name = "IPv6 any, IPv6 only", .family = AF_INET6, .backlog = 20},
	{.name = "IPv6 any, IPv4 too", .family = AF_INET6, .backlog = 50},
};

static const struct option {
	const char *name;
	int level, number, set; /* set: given to the first two listeners; 0: only compared */
} options[OPTIONS] = {
	{"SO_REUSEADDR", SOL_SOCKET, SO_REUSEADDR, 1},
	{"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, 1},
	{"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, 50000},
	{"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, 70000},
	{"SO_PRIORITY", SOL_SOCKET, SO_PRIORITY, 3},
	{"SO_RCVLOWAT", SOL_SOCKET, SO_RCVLOWAT, 5},
	{"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, 1},
	{"SO_REUSEPORT", SOL_SOCKET, SO_REUSEPORT, 0},
	{"SO_ACCEPTCONN", SOL_SOCKET, SO_ACCEPTCONN, 0},
	{"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, 1},
	{"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, 321},
	{"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, 11},
};

static int get(int fd, int level, int number)
{
	socklen_t size = sizeof(int);
	int value;

	MUST(getsockopt(fd, level, number, &value, &size));
	return value;
}

/* A listening socket's limit of waiting connections stands in tcpi_sacked (tcp_get_info). */
static int backlog_of(int fd)
{
	struct tcp_info info;
	socklen_t size = sizeof(info);

	MUST(getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &size));
	SAME("state", info.tcpi_state, TCP_LISTEN);
	return (int)info.tcpi_sacked;
}

static void open_listener(int i)
{
	struct listener *one = &listeners[i];
	struct sockaddr_in *v4 = (struct sockaddr_in *)&one->address;
	socklen_t size = sizeof(one->address);
	int on = 1;

	one->fd = (int)MUST(socket(one->family, SOCK_STREAM | one->flags, 0));
	for (int n = 0; n < OPTIONS; n++)
		if (i < 2 && options[n].set)
			MUST(setsockopt(one->fd, options[n].level, options[n].number, &options[n].set, sizeof(int)));
	one->address.sin6_family = (sa_family_t)one->family;
	if (one->family == AF_INET)
		v4->sin_addr.s_addr = htonl(i == 0 ? INADDR_LOOPBACK : INADDR_ANY);
	else
		one->address.sin6_addr = i == 2 ? in6addr_loopback : in6addr_any;
	if (i == 3)
		MUST(setsockopt(one->fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)));
	MUST(bind(one->fd, (struct sockaddr *)&one->address, one->family == AF_INET ? sizeof(*v4) : size));
	MUST(listen(one->fd, one->backlog));
	MUST(getsockname(one->fd, (struct sockaddr *)&one->address, &size));
	for (int n = 0; n < OPTIONS; n++)
		one->values[n] = get(one->fd, options[n].level, options[n].number);
	if (one->family == AF_INET6)
		one->v6_only = get(one->fd, IPPROTO_IPV6, IPV6_V6ONLY);
	SAME("backlog", backlog_of(one->fd), one->backlog);
}

static void check(const struct listener *one)
{
	struct sockaddr_in6 address = {0};
	socklen_t size = sizeof(address);
	char what[64];

	for (int n = 0; n < OPTIONS; n++) {
		snprintf(what, sizeof(what), "%s of %s", options[n].name, one->name);
		SAME(what, get(one->fd, options[n].level, options[n].number), one->values[n]);
	}
	if (one->family == AF_INET6)
		SAME("IPV6_V6ONLY", get(one->fd, IPPROTO_IPV6, IPV6_V6ONLY), one->v6_only);
	snprintf(what, sizeof(what), "backlog of %s", one->name);
	SAME(what, backlog_of(one->fd), one->backlog);
	SAME("flags", fcntl(one->fd, F_GETFL), O_RDWR | (one->flags & SOCK_NONBLOCK ? O_NONBLOCK : 0));
	SAME("close-on-exec", fcntl(one->fd, F_GETFD), one->flags & SOCK_CLOEXEC ? FD_CLOEXEC : 0);
	MUST(getsockname(one->fd, (struct sockaddr *)&address, &size));
	same_bytes(one->name, &address, &one->address, sizeof(address));
	if (one->flags & SOCK_NONBLOCK)
		REFUSED(accept(one->fd, NULL, NULL), EAGAIN);
}

static void talk(int from, int to, uint64_t stream)
{
	static char sent[MESSAGE], got[MESSAGE];

	target_fill(sent, MESSAGE, stream);
	SAME("send", send(from, sent, MESSAGE, 0), MESSAGE);
	SAME("recv", recv(to, got, MESSAGE, MSG_WAITALL), MESSAGE);
	same_bytes("message", got, sent, MESSAGE);
}

static void connect_through(struct listener *one)
{
	struct pollfd incoming = {one->fd, POLLIN, 0};
	int near = (int)MUST(socket(one->family, SOCK_STREAM, 0)), far;

	MUST(connect(near, (struct sockaddr *)&one->address,
		     one->family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(one->address)));
	SAME("a connection comes", poll(&incoming, 1, 2000), 1);
	far = (int)MUST(accept(one->fd, NULL, NULL));
	for (int n = 0; n < OPTIONS; n++)
		if (options[n].number == SO_KEEPALIVE || options[n].number == TCP_NODELAY)
			SAME("option taken over by a connection", get(far, options[n].level, options[n].number),
			     one->values[n]);
	talk(near, far, 1);
	talk(far, near, 2);
	close(near);
	close(far);
}

int main(int argc, char **argv)
{
	target_start(argc, argv);
	for (int i = 0; i < LISTENERS; i++)
		open_listener(i);
	target_ready();
	while (!target_ending(5))
		for (int i = 0; i < LISTENERS; i++)
			check(&listeners[i]);
	for (int i = 0; i < LISTENERS; i++) {
		check(&listeners[i]);
		connect_through(&listeners[i]);
	}
	target_pass();
}
