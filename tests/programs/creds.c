/*
 * Credentials: real, effective, saved and fs ids, groups, the five capability sets, securebits,
 * no_new_privs, umask and dumpable. A second thread has capabilities of its own. Needs root.
 */
#include <linux/capability.h>
#include <linux/securebits.h>
#include <grp.h>
#include <pthread.h>
#include <sys/fsuid.h>
#include <sys/prctl.h>

#include "target.h"

enum { RUID = 1001, EUID, SUID, FSUID, RGID = 2001, EGID, SGID, FSGID };
enum { BITS = SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED };

static const gid_t groups[] = {4, 20, 12345, 70000};
static const char *const keys[] = {"Uid", "Gid", "Groups", "Umask", "CapInh", "CapPrm", "CapEff",
				   "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp"};
enum { KEYS = sizeof(keys) / sizeof(keys[0]), VALUE = 128 };

static atomic_bool ending;
static atomic_int up;

static uint64_t bit(int capability)
{
	return 1ull << capability;
}

/* Not by libcap: a raw call changes the calling thread only. */
static long set_capabilities(uint64_t effective, uint64_t permitted, uint64_t inheritable)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];

	for (int half = 0; half < 2; half++)
		data[half] = (struct __user_cap_data_struct){(uint32_t)(effective >> 32 * half),
							     (uint32_t)(permitted >> 32 * half),
							     (uint32_t)(inheritable >> 32 * half)};
	return syscall(SYS_capset, &head, data);
}

static void look(char values[KEYS][VALUE])
{
	for (int i = 0; i < KEYS; i++)
		target_status(keys[i], values[i], VALUE);
}

static void check(char before[KEYS][VALUE])
{
	static _Thread_local char now[KEYS][VALUE];

	look(now);
	for (int i = 0; i < KEYS; i++)
		same_text(keys[i], now[i], before[i]);
	SAME("securebits", MUST(prctl(PR_GET_SECUREBITS)), BITS);
	SAME("no_new_privs", prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0), 1);
}

static void *worker(void *none)
{
	char before[KEYS][VALUE];

	MUST(set_capabilities(0, bit(CAP_CHOWN) | bit(CAP_KILL), 0));
	look(before);
	up = 1;
	while (!ending) {
		check(before);
		target_sleep(5);
	}
	check(before);
	MUST(set_capabilities(bit(CAP_CHOWN), bit(CAP_CHOWN), 0));
	REFUSED(set_capabilities(0, bit(CAP_KILL), 0), EPERM);
	return none;
}

int main(int argc, char **argv)
{
	uint64_t permitted = bit(CAP_CHOWN) | bit(CAP_NET_BIND_SERVICE) | bit(CAP_KILL) | bit(CAP_NET_RAW);
	uint64_t inheritable = bit(CAP_NET_RAW) | bit(CAP_KILL);
	uid_t ids[3], fsuid, fsgid;
	char before[KEYS][VALUE];
	pthread_t thread;

	target_start(argc, argv);
	umask(0137);
	MUST(setgroups(sizeof(groups) / sizeof(groups[0]), groups));
	MUST(prctl(PR_CAPBSET_DROP, CAP_SYS_MODULE));
	MUST(prctl(PR_CAPBSET_DROP, CAP_SYSLOG));
	MUST(prctl(PR_SET_SECUREBITS, SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP));
	MUST(setresgid(RGID, EGID, SGID));
	setfsgid(FSGID);
	MUST(setresuid(RUID, EUID, SUID));
	setfsuid(FSUID);
	MUST(set_capabilities(permitted | bit(CAP_SETPCAP), permitted | bit(CAP_SETPCAP), inheritable));
	MUST(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_NET_RAW, 0, 0));
	MUST(prctl(PR_SET_SECUREBITS, BITS));
	MUST(set_capabilities(bit(CAP_NET_RAW) | bit(CAP_CHOWN), permitted, inheritable));
	MUST(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));
	SAME("pthread_create", pthread_create(&thread, NULL, worker, NULL), 0);
	while (!up)
		target_sleep(1);
	int dumpable = (int)MUST(prctl(PR_GET_DUMPABLE));
	look(before);

	target_ready();
	while (!target_ending(5))
		check(before);

	check(before);
	SAME("dumpable", prctl(PR_GET_DUMPABLE), dumpable);
	MUST(getresuid(&ids[0], &ids[1], &ids[2]));
	CHECK(ids[0] == RUID && ids[1] == EUID && ids[2] == SUID, "uids %u %u %u", ids[0], ids[1], ids[2]);
	fsuid = (uid_t)setfsuid((uid_t)-1);
	fsgid = (uid_t)setfsgid((gid_t)-1);
	SAME("fsuid", fsuid, FSUID);
	SAME("fsgid", fsgid, FSGID);

	/* And they act so: a capability that is only permitted can be raised, a lost one cannot. */
	MUST(set_capabilities(bit(CAP_KILL), permitted, inheritable));
	REFUSED(set_capabilities(0, bit(CAP_SYS_ADMIN), 0), EPERM);
	REFUSED(setresuid(0, 0, 0), EPERM);
	ending = true;
	SAME("join", pthread_join(thread, NULL), 0);
	SAME("umask", umask(0), 0137);
	MUST(setresuid((uid_t)-1, SUID, (uid_t)-1));
	target_pass();
}
