/*
 * Pseudo terminals: a session with a controlling terminal and a foreground job that is not the leader, its
 * /dev/tty, settings of all kinds, a master that is locked, one in packet mode, a slave that was hung up, and what
 * was typed and printed but not read.
 */
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/types.h>
#include <stddef.h>
#include <termios.h>

#include "target.h"

struct pty {
	int master, slave, index;
};

static struct pty make(int flags)
{
	struct pty pty = {.slave = -1};
	int unlock = 0;

	pty.master = (int)MUST(open("/dev/ptmx", O_RDWR | O_NOCTTY | flags));
	MUST(ioctl(pty.master, TIOCGPTN, &pty.index));
	MUST(ioctl(pty.master, TIOCSPTLCK, &unlock));
	return pty;
}

static int open_slave(struct pty pty, int flags)
{
	return (int)MUST(ioctl(pty.master, TIOCGPTPEER, flags | O_NOCTTY));
}

/* A line goes in at the master and comes out at the slave. */
static void must_pass(const char *what, int master, int slave)
{
	char seen[8] = "";

	SAME(what, MUST(write(master, "hello\n", 6)), 6);
	SAME(what, MUST(read(slave, seen, sizeof(seen) - 1)), 6);
	same_text(what, seen, "hello\n");
}

/* What comes, in as many pieces as it likes: a worker of the kernel carries it from one end to the other. */
static void must_read(const char *what, int fd, const char *expected)
{
	char seen[64] = "";
	size_t used = 0;
	struct pollfd more = {fd, POLLIN, 0};

	while (used < strlen(expected) && MUST(poll(&more, 1, 5000)))
		used += (size_t)MUST(read(fd, seen + used, sizeof(seen) - 1 - used));
	same_text(what, seen, expected);
}

static volatile sig_atomic_t interrupts;

static void interrupted(int number)
{
	(void)number;
	interrupts++;
}

/* Of the foreground group: ^C is for it, and it may read. Ends with the count of its interrupts. */
static void job(void)
{
	signal(SIGINT, interrupted);
	signal(SIGHUP, SIG_IGN);
	MUST(setpgid(0, 0));
	while (!target_ending(1))
		;
	int tty = (int)MUST(open("/dev/tty", O_RDWR));
	SAME("foreground as its member sees it", MUST(tcgetpgrp(tty)), getpid());
	_exit(interrupts);
}

/* Leads a session on the terminal; ends with what its job ended with. */
static void session(struct pty pty, int ready)
{
	int status, slave, tty;
	pid_t child;

	MUST(setsid());
	signal(SIGTTOU, SIG_IGN);
	signal(SIGHUP, SIG_IGN);
	slave = open_slave(pty, O_RDWR);
	MUST(ioctl(slave, TIOCSCTTY, 0));
	tty = (int)MUST(open("/dev/tty", O_RDWR));
	child = (pid_t)MUST(fork());
	if (!child)
		job();
	while (tcsetpgrp(slave, child))
		target_sleep(1);
	MUST(write(ready, "", 1));
	close(ready);
	while (!target_ending(1))
		;
	SAME("session", MUST(tcgetsid(slave)), getpid());
	SAME("session of /dev/tty", MUST(tcgetsid(tty)), getpid());
	SAME("foreground group", MUST(tcgetpgrp(tty)), child);
	MUST(kill(child, SIGTERM));
	SAME("job", MUST(waitpid(child, &status, 0)), child);
	_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 99);
}

int main(int argc, char **argv)
{
	struct winsize size = {31, 77, 5, 6}, size_now;
	struct termios set, now, locked = {.c_lflag = ECHO}, locked_now;
	struct stat status;
	int on = 1, value, started[2];
	char name[64], seen[8];

	target_start(argc, argv);
	struct pty plain = make(0), controlling = make(O_CLOEXEC), shut = make(O_NONBLOCK), packets = make(0);
	struct pty gone = make(0), typed = make(0);

	plain.slave = open_slave(plain, O_RDWR);
	int reader = open_slave(plain, O_RDONLY | O_NONBLOCK);
	int closing = open_slave(plain, O_RDWR | O_CLOEXEC), staying = open_slave(plain, O_RDWR | O_CLOEXEC);
	MUST(fcntl(staying, F_SETFD, 0));
	MUST(tcgetattr(plain.slave, &set));
	set.c_lflag &= ~(tcflag_t)ECHO;
	set.c_cc[VINTR] = 7;
	set.c_cflag |= CLOCAL;
	MUST(tcsetattr(plain.slave, TCSANOW, &set));
	MUST(ioctl(plain.slave, TIOCSLCKTRMIOS, &locked));
	MUST(ioctl(plain.slave, TIOCSWINSZ, &size));
	MUST(ioctl(plain.slave, TIOCEXCL));
	MUST(fchown(plain.slave, 4321, 1234));
	MUST(fchmod(plain.slave, 0604));
	MUST(ioctl(shut.master, TIOCSPTLCK, &on));
	packets.slave = open_slave(packets, O_RDWR);
	MUST(ioctl(packets.master, TIOCPKT, &on));
	gone.slave = open_slave(gone, O_RDWR);
	close(gone.master);

	typed.slave = open_slave(typed, O_RDWR);
	SAME("typed", MUST(write(typed.master, "one\ntwo\nthr", 11)), 11);
	do
		MUST(ioctl(typed.master, TIOCINQ, &value));
	while (value < 13);
	SAME("printed", MUST(write(typed.slave, "four\n", 5)), 5);

	MUST(pipe(started));
	pid_t leader = (pid_t)MUST(fork());
	if (!leader)
		session(controlling, started[1]);
	SAME("session started", MUST(read(started[0], seen, 1)), 1);
	close(started[0]);
	close(started[1]);

	target_ready();
	for (bool ending = false; !ending; ending = target_ending(1))
		must_pass("conversation", plain.master, plain.slave);

	must_pass("second description", plain.master, reader);
	REFUSED(read(reader, seen, 1), EAGAIN);
	REFUSED(write(reader, seen, 1), EBADF);
	SAME("close-on-exec", fcntl(closing, F_GETFD), FD_CLOEXEC);
	SAME("close-on-exec that is not", fcntl(staying, F_GETFD), 0);
	MUST(tcgetattr(plain.slave, &now));
	same_bytes("termios", &now, &set, offsetof(struct termios, c_cc) + sizeof(set.c_cc));
	MUST(ioctl(plain.slave, TIOCGLCKTRMIOS, &locked_now));
	SAME("locked termios", locked_now.c_lflag, ECHO);
	MUST(ioctl(plain.master, TIOCGWINSZ, &size_now));
	same_bytes("size", &size_now, &size, sizeof(size));
	MUST(ioctl(plain.slave, TIOCGEXCL, &value));
	SAME("exclusive", value, 1);
	MUST(ioctl(plain.master, TIOCGPTN, &value));
	SAME("number", value, plain.index);
	MUST(fstat(plain.slave, &status));
	SAME("owner", status.st_uid, 4321);
	SAME("group", status.st_gid, 1234);
	SAME("mode", status.st_mode & 07777, 0604);
	MUST(ttyname_r(plain.slave, name, sizeof(name)));
	snprintf(seen, sizeof(seen), "%d", plain.index);
	same_text("name", strrchr(name, '/') + 1, seen);
	REFUSED(tcgetsid(plain.slave), ENOTTY);

	MUST(ioctl(shut.master, TIOCGPTLCK, &value));
	SAME("locked", value, 1);
	SAME("flags", fcntl(shut.master, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
	MUST(write(packets.slave, "x", 1));
	SAME("packet", MUST(read(packets.master, seen, sizeof(seen))), 2);
	same_bytes("packet", seen, "\0x", 2);
	SAME("hung up", read(gone.slave, seen, 1), 0);
	REFUSED(write(gone.slave, seen, 1), EIO);

	SAME("more typed", MUST(write(typed.master, "ee\n", 3)), 3);
	must_read("first line", typed.slave, "one\n");
	must_read("second line", typed.slave, "two\n");
	must_read("third line", typed.slave, "three\n");
	must_read("echo and print", typed.master, "one\r\ntwo\r\nthrfour\r\nee\r\n");

	SAME("^C", MUST(write(controlling.master, "\3", 1)), 1);
	target_sleep(50);
	target_end_child("interrupts of the job", leader, 1);
	target_pass();
}
