/*
 * eventfds (counters, semaphores) and epolls: level, edge and one-shot watches with their 64-bit
 * data on eventfds, pipes and sockets, one epoll inside another; what is ready is so at once.
 */
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "target.h"

enum { COUNTER = 4242, SEMAPHORE = 3, MAX = 16 };
enum { LEVEL, EDGE, ONE_SHOT, PIPE, SOCKET, INNER, BUSY, WATCHES };

static int epoll, inner;

static uint64_t data_of(int watch)
{
	return target_random((uint64_t)watch + 100);
}

static void watch(int set, int fd, int number, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.u64 = data_of(number)};

	MUST(epoll_ctl(set, EPOLL_CTL_ADD, fd, &event));
}

/* Exactly these watches report, with these events, now. 0: it does not. */
static void must_report(const char *when, int set, const uint32_t events[WATCHES])
{
	struct epoll_event ready[MAX];
	uint32_t seen[WATCHES] = {0};
	int count = (int)MUST(epoll_wait(set, ready, MAX, 0));

	for (int i = 0; i < count; i++) {
		int number = 0;

		while (number < WATCHES && data_of(number) != ready[i].data.u64)
			number++;
		CHECK(number < WATCHES, "%s: data %#llx", when, (unsigned long long)ready[i].data.u64);
		seen[number] = ready[i].events;
	}
	for (int i = 0; i < WATCHES; i++)
		CHECK(seen[i] == events[i], "%s: watch %d reports %#x, not %#x", when, i, seen[i], events[i]);
}

static void add(int fd, uint64_t value)
{
	SAME("write to an eventfd", write(fd, &value, sizeof(value)), sizeof(value));
}

static uint64_t take(int fd)
{
	uint64_t value;

	SAME("read of an eventfd", MUST(read(fd, &value, sizeof(value))), sizeof(value));
	return value;
}

int main(int argc, char **argv)
{
	int pipe_ends[2], pair[2];
	struct epoll_event event;
	uint64_t value, work = 0;

	target_start(argc, argv);
	int counter = (int)MUST(eventfd(COUNTER, 0));
	int semaphore = (int)MUST(eventfd(SEMAPHORE, EFD_SEMAPHORE | EFD_NONBLOCK | EFD_CLOEXEC));
	int edge = (int)MUST(eventfd(0, EFD_NONBLOCK)), one_shot = (int)MUST(eventfd(0, EFD_NONBLOCK));
	int busy = (int)MUST(eventfd(0, EFD_NONBLOCK)), same = dup(busy);
	MUST(pipe(pipe_ends));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
	epoll = (int)MUST(epoll_create1(EPOLL_CLOEXEC));
	inner = (int)MUST(epoll_create1(0));
	watch(epoll, counter, LEVEL, EPOLLIN);
	watch(epoll, edge, EDGE, EPOLLIN | EPOLLET);
	watch(epoll, one_shot, ONE_SHOT, EPOLLIN | EPOLLONESHOT);
	watch(epoll, inner, INNER, EPOLLIN);
	watch(epoll, busy, BUSY, EPOLLIN);
	watch(inner, pipe_ends[0], PIPE, EPOLLIN | EPOLLRDHUP);
	watch(inner, pair[1], SOCKET, EPOLLOUT | EPOLLIN);
	/* The one-shot watch has fired: it is silent though its eventfd stays readable. */
	add(one_shot, 1);
	must_report("before", epoll,
		    (uint32_t[WATCHES]){[LEVEL] = EPOLLIN, [ONE_SHOT] = EPOLLIN, [INNER] = EPOLLIN});
	const uint32_t usual[WATCHES] = {[LEVEL] = EPOLLIN, [INNER] = EPOLLIN};

	target_ready();
	while (!target_ending(1)) {
		must_report("at work", epoll, usual);
		add(busy, ++work);
		must_report("work came", epoll,
			    (uint32_t[WATCHES]){[LEVEL] = EPOLLIN, [INNER] = EPOLLIN, [BUSY] = EPOLLIN});
		SAME("work", take(same), work);
	}

	must_report("after", epoll, usual);
	must_report("inner", inner, (uint32_t[WATCHES]){[SOCKET] = EPOLLOUT});
	SAME("counter", take(counter), COUNTER);
	for (int i = 0; i < SEMAPHORE; i++)
		SAME("semaphore", take(semaphore), 1);
	REFUSED(read(semaphore, &value, sizeof(value)), EAGAIN);
	SAME("flags of an eventfd", fcntl(semaphore, F_GETFL), O_RDWR | O_NONBLOCK);
	SAME("flags of an epoll", fcntl(epoll, F_GETFD), FD_CLOEXEC);

	add(edge, 5);
	must_report("an edge", epoll, (uint32_t[WATCHES]){[EDGE] = EPOLLIN, [INNER] = EPOLLIN});
	must_report("no edge", epoll, (uint32_t[WATCHES]){[INNER] = EPOLLIN});
	SAME("write", write(pipe_ends[1], "x", 1), 1);
	SAME("write", write(pair[0], "x", 1), 1);
	close(pipe_ends[1]);
	must_report("inner, with input", inner,
		    (uint32_t[WATCHES]){[PIPE] = EPOLLIN | EPOLLHUP, [SOCKET] = EPOLLIN | EPOLLOUT});
	event = (struct epoll_event){.events = EPOLLIN | EPOLLONESHOT, .data.u64 = data_of(ONE_SHOT)};
	MUST(epoll_ctl(epoll, EPOLL_CTL_MOD, one_shot, &event));
	must_report("one-shot, armed again", epoll,
		    (uint32_t[WATCHES]){[ONE_SHOT] = EPOLLIN, [INNER] = EPOLLIN});
	REFUSED(epoll_ctl(epoll, EPOLL_CTL_ADD, one_shot, &event), EEXIST);
	MUST(epoll_ctl(epoll, EPOLL_CTL_DEL, inner, NULL));
	must_report("the end", epoll, (uint32_t[WATCHES]){0});
	target_pass();
}
