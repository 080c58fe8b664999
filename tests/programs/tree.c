/*
 * A tree: children and grandchildren, process groups, a second session, exit codes that arrive.
 *
 *     root (session and group leader)
 *     +-- 0  same group            +-- 3, 4
 *     +-- 1  leads a group         +-- 5 (of that group)
 *     +-- 2  leads a session       +-- 6 (leads a group there)
 *
 * With the argument `zombie` the root also has a child that has ended already, with code 44.
 */
#include "target.h"

enum { NODES = 7, CODE = 20, ZOMBIE_CODE = 44 };
enum { NONE, GROUP, SESSION };

static const struct node {
	int parent, leads;
} nodes[NODES] = {{-1, NONE}, {-1, GROUP}, {-1, SESSION}, {0, NONE}, {0, NONE}, {1, NONE}, {2, GROUP}};

/* How a process stands among the others. */
struct place {
	pid_t pid, parent, group, session;
};

static struct place look(void)
{
	return (struct place){getpid(), getppid(), getpgid(0), getsid(0)};
}

static void check(int node, const struct place *before)
{
	struct place now = look();
	char what[32];

	snprintf(what, sizeof(what), "place of node %d", node);
	same_bytes(what, &now, before, sizeof(now));
}

static void wait_usr1(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	while (sigwaitinfo(&set, NULL) != SIGUSR1)
		;
}

static void run(int node);

/* Forks every child of a node; each says with SIGUSR1 that its own tree stands. */
static void grow(int node, pid_t children[NODES])
{
	for (int child = 0; child < NODES; child++) {
		children[child] = 0;
		if (nodes[child].parent != node)
			continue;
		children[child] = (pid_t)MUST(fork());
		if (!children[child])
			run(child);
		wait_usr1();
	}
}

/* A living child is waited for by nobody's mistake: WNOHANG says 0; at the end its own code comes. */
static void check_children(const pid_t children[NODES])
{
	for (int child = 0; child < NODES; child++)
		if (children[child]) {
			SAME("waitpid of a living child", MUST(waitpid(children[child], NULL, WNOHANG)), 0);
			SAME("group of a child", MUST(getpgid(children[child])),
			     nodes[child].leads ? children[child] : getpgid(0));
			SAME("session of a child", MUST(getsid(children[child])),
			     nodes[child].leads == SESSION ? children[child] : getsid(0));
		}
}

static void end_children(const pid_t children[NODES])
{
	char what[32];

	for (int child = NODES - 1; child >= 0; child--)
		if (children[child]) {
			snprintf(what, sizeof(what), "node %d", child);
			target_end_child(what, children[child], CODE + child);
		}
	REFUSED(waitpid(-1, NULL, WNOHANG), ECHILD);
}

static void run(int node)
{
	pid_t children[NODES];
	struct place place;

	if (nodes[node].leads == GROUP)
		MUST(setpgid(0, 0));
	if (nodes[node].leads == SESSION)
		MUST(setsid());
	grow(node, children);
	place = look();
	SAME("leads", place.pid == place.group, nodes[node].leads != NONE);
	MUST(kill(getppid(), SIGUSR1));
	while (!target_ending(3)) {
		check(node, &place);
		check_children(children);
	}
	check(node, &place);
	end_children(children);
	_exit(CODE + node);
}

int main(int argc, char **argv)
{
	pid_t children[NODES], zombie = 0;
	siginfo_t info = {0};
	struct place place;
	sigset_t set;

	target_start(argc, argv);
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	MUST(sigprocmask(SIG_BLOCK, &set, NULL));
	grow(-1, children);
	if (argc > 2 && !strcmp(argv[2], "zombie")) {
		zombie = (pid_t)MUST(fork());
		if (!zombie)
			_exit(ZOMBIE_CODE);
		MUST(waitid(P_PID, (id_t)zombie, &info, WEXITED | WNOWAIT));
	}
	place = look();
	/* The parent of the root may change: the tree is moved, whoever started it is not. */

	target_ready();
	while (!target_ending(3)) {
		place.parent = getppid();
		check(-1, &place);
		check_children(children);
	}

	place.parent = getppid();
	check(-1, &place);
	if (zombie) {
		memset(&info, 0, sizeof(info));
		MUST(waitid(P_PID, (id_t)zombie, &info, WEXITED));
		SAME("zombie", info.si_pid, zombie);
		SAME("cause of the zombie's death", info.si_code, CLD_EXITED);
		SAME("code of the zombie", info.si_status, ZOMBIE_CODE);
	}
	end_children(children);
	pid_t fresh = (pid_t)MUST(fork());
	if (!fresh)
		run(6); /* a node without children that leads a group */
	wait_usr1();
	target_end_child("new child", fresh, CODE + 6);
	target_pass();
}
