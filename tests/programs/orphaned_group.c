/*
 * Two children in a process group whose leader has ended and was waited for.
 */
#include "target.h"

enum { MEMBERS = 2 };

static pid_t member(pid_t group)
{
	pid_t pid = (pid_t)MUST(fork());

	if (!pid) {
		if (group)
			MUST(setpgid(0, group));
		else
			MUST(setpgid(0, 0));
		while (!target_ending(2))
			if (group)
				SAME("group of a member", getpgrp(), group);
		_exit(group ? 33 : 34);
	}
	while (getpgid(pid) != (group ? group : pid))
		target_sleep(1);
	return pid;
}

int main(int argc, char **argv)
{
	pid_t members[MEMBERS], leader;

	target_start(argc, argv);
	leader = member(0);
	for (int i = 0; i < MEMBERS; i++)
		members[i] = member(leader);
	target_end_child("leader", leader, 34);
	target_ready();
	while (!target_ending(2))
		for (int i = 0; i < MEMBERS; i++)
			SAME("group of a child", getpgid(members[i]), leader);
	SAME("signals to the group", kill(-leader, 0), 0);
	for (int i = 0; i < MEMBERS; i++)
		target_end_child("member", members[i], 33);
	CHECK(kill(-leader, 0) < 0 && errno == ESRCH, "the group outlives its members");
	target_pass();
}
