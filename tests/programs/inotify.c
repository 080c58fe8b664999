/*
 * inotify: watches under their numbers, with gaps, on directories and files, also on one that was
 * deleted while it was open; events of what happens afterwards, and nothing else.
 */
#include <poll.h>
#include <sys/inotify.h>

#include "target.h"

enum { QUEUE = 20, OPEN, OTHER };
enum { DIRECTORY = 5, PLAIN = 6, GONE = 9, EMPTY = 1 };

static void make(const char *name)
{
	close((int)MUST(open(name, O_CREAT | O_EXCL | O_RDWR, 0600)));
}

/* Adds watches and removes them again until the number is reached. */
static void add(const char *name, uint32_t mask, int number)
{
	for (;;) {
		int got = (int)MUST(inotify_add_watch(QUEUE, name, mask));

		if (got == number)
			return;
		CHECK(got < number, "%s: watch %d, not %d", name, got, number);
		MUST(inotify_rm_watch(QUEUE, got));
	}
}

static void next(const char *what, int watch, uint32_t mask, const char *name)
{
	static char events[4096];
	static ssize_t used, length;
	struct inotify_event *event;

	if (used == length) {
		used = 0;
		length = read(QUEUE, events, sizeof(events));
		CHECK(length > 0, "%s: no event (%s)", what, strerror(errno));
	}
	event = (struct inotify_event *)(events + used);
	used += (ssize_t)(sizeof(*event) + event->len);
	SAME(what, event->wd, watch);
	SAME(what, event->mask, mask);
	same_text(what, event->len ? event->name : "", name);
}

static void quiet(int fd)
{
	struct pollfd waiting = {.fd = fd, .events = POLLIN};

	SAME("events that nobody has made", poll(&waiting, 1, 0), 0);
}

int main(int argc, char **argv)
{
	char byte;

	target_start(argc, argv);
	MUST(mkdir("watched", 0700));
	make("plain");
	make("gone");
	MUST(dup2((int)MUST(inotify_init1(IN_NONBLOCK)), QUEUE));
	MUST(dup2((int)MUST(inotify_init1(IN_CLOEXEC)), OTHER));
	MUST(dup2((int)MUST(open("gone", O_RDWR)), OPEN));
	for (int fd = target_output + 1; fd < QUEUE; fd++)
		close(fd);
	SAME("other instance", inotify_add_watch(OTHER, "/etc", IN_DELETE), EMPTY);
	add("watched", IN_CREATE | IN_DELETE | IN_ONLYDIR, DIRECTORY);
	add("plain", IN_MODIFY | IN_CLOSE | IN_OPEN, PLAIN);
	add("gone", IN_MODIFY, GONE);
	MUST(unlink("gone"));
	while (read(QUEUE, (char[4096]){0}, 4096) > 0)
		;
	target_ready();

	while (!target_ending(20))
		quiet(QUEUE);
	quiet(QUEUE);
	quiet(OTHER);
	make("watched/file");
	next("create", DIRECTORY, IN_CREATE, "file");
	MUST(unlink("watched/file"));
	next("delete", DIRECTORY, IN_DELETE, "file");
	SAME("write", write(OPEN, "x", 1), 1);
	next("deleted file", GONE, IN_MODIFY, "");
	SAME("read", pread(OPEN, &byte, 1, 0), 1);
	close((int)MUST(open("plain", O_RDONLY)));
	next("open", PLAIN, IN_OPEN, "");
	next("close", PLAIN, IN_CLOSE_NOWRITE, "");
	SAME("next number", inotify_add_watch(QUEUE, "/", IN_DELETE), GONE + 1);
	MUST(inotify_rm_watch(QUEUE, DIRECTORY));
	next("end of a watch", DIRECTORY, IN_IGNORED, "");
	quiet(QUEUE);
	target_pass();
}
