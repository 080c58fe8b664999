/* SPDX-License-Identifier: GPL-2.0-or-later */
/* A new process under a wanted PID, bare but for the injected code and its scratch memory. */
#define _GNU_SOURCE
#include "phaul_native.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

#define PAGE 4096u

/*
 * An ELF program of two segments: one page of code at `base`, `data_size` bytes of zeros behind it. Linked to
 * where the source's layouts have a gap, so that nothing has to be moved later.
 */
int64_t ph_build_stub(uint64_t base, uint64_t data_size, uint8_t *ret, size_t max)
{
	const uint8_t *code;
	uint32_t saved, marker, stub;
	int64_t code_size = ph_injected(&code, &saved, &marker, &stub);
	Elf64_Ehdr header = {
		.e_ident = {ELFMAG0, ELFMAG1, ELFMAG2, ELFMAG3, ELFCLASS64, ELFDATA2LSB, EV_CURRENT},
		.e_type = ET_EXEC,
		.e_machine = EM_X86_64,
		.e_version = EV_CURRENT,
		.e_entry = base + stub,
		.e_phoff = sizeof(Elf64_Ehdr),
		.e_ehsize = sizeof(Elf64_Ehdr),
		.e_phentsize = sizeof(Elf64_Phdr),
		.e_phnum = 3,
	};
	Elf64_Phdr segments[3] = {
		{.p_type = PT_LOAD, .p_flags = PF_R | PF_X, .p_offset = PAGE, .p_vaddr = base,
		 .p_filesz = (uint64_t)code_size, .p_memsz = (uint64_t)code_size, .p_align = PAGE},
		{.p_type = PT_LOAD, .p_flags = PF_R | PF_W, .p_offset = 0, .p_vaddr = base + PAGE,
		 .p_filesz = 0, .p_memsz = data_size, .p_align = PAGE},
		{.p_type = PT_GNU_STACK, .p_flags = PF_R | PF_W},
	};

	if (max < 2 * PAGE || code_size > (int64_t)PAGE)
		return -ENOSPC;
	memset(ret, 0, 2 * PAGE);
	memcpy(ret, &header, sizeof(header));
	memcpy(ret + sizeof(header), segments, sizeof(segments));
	memcpy(ret + PAGE, code, (size_t)code_size);
	return 2 * PAGE;
}

enum step { STEP_FORK = 1, STEP_TIMENS, STEP_CLONE, STEP_EXEC };

static void fail(int fd, int step)
{
	int32_t report[2] = {step, errno};

	if (write(fd, report, sizeof(report)) < 0) {
		/* Nobody listens: the caller is gone, and so shall we be. */
	}
	_exit(1);
}

static void become_stub(const struct ph_spawn *args, int errors)
{
	static char *const argv[] = {"phaul-skeleton", NULL};
	static char *const envp[] = {NULL};
	int stub, report;
	sigset_t none;

	/* Three descriptors in a known order, whatever their numbers were. */
	stub = fcntl(args->stub_fd, F_DUPFD_CLOEXEC, 1000);
	report = fcntl(errors, F_DUPFD_CLOEXEC, 1000);
	if (stub < 0 || report < 0 || dup2(args->comm_fd, 0) < 0)
		fail(errors, STEP_EXEC);
	syscall(SYS_close_range, 1, 999, 0);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	syscall(SYS_execveat, stub, "", argv, envp, AT_EMPTY_PATH);
	fail(report, STEP_EXEC);
}

/* Make the new process, a child of the calling thread's process or of its parent. 0, or -errno and the step. */
static int start(const struct ph_spawn *args, int errors, int32_t *step)
{
	pid_t wanted = args->pid;
	struct clone_args how = {
		.flags = args->parent == PH_PARENT_INIT ? 0 : CLONE_PARENT,
		.exit_signal = args->parent == PH_PARENT_INIT ? SIGCHLD : 0,
		.set_tid = (uint64_t)(uintptr_t)&wanted,
		.set_tid_size = 1,
	};
	long pid;

	if (args->set_clocks) {
		char path[32], text[160];
		int length = snprintf(text, sizeof(text), "monotonic %lld %lld\nboottime %lld %lld\n",
				      (long long)args->monotonic[0], (long long)args->monotonic[1],
				      (long long)args->boottime[0], (long long)args->boottime[1]);
		int fd;

		*step = STEP_TIMENS;
		if (unshare(CLONE_NEWTIME) < 0)
			return -errno;
		/* "self" would be the first thread's, which has another namespace for its children. */
		snprintf(path, sizeof(path), "/proc/%ld/timens_offsets", syscall(SYS_gettid));
		fd = open(path, O_WRONLY | O_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (write(fd, text, (size_t)length) != length) {
			int error = errno;

			close(fd);
			return -error;
		}
		close(fd);
	}
	*step = STEP_CLONE;
	pid = syscall(SYS_clone3, &how, sizeof(how));
	if (pid == 0)
		become_stub(args, errors);
	return pid < 0 ? -errno : 0;
}

static void helper(const struct ph_spawn *args, int errors, pid_t parent)
{
	int32_t step;
	int result;

	/* Nothing may be started any more when our maker has been killed. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != parent)
		_exit(0);
	result = start(args, errors, &step);
	if (result < 0) {
		errno = -result;
		fail(errors, step);
	}
	_exit(0);
}

/* A child of ours, whose end makes the new process an orphan, or which gives it to us. 0 or -errno. */
static int start_in_helper(const struct ph_spawn *args, int errors)
{
	pid_t parent = getpid();
	/* Raw: the child must not run pthread_atfork handlers of a threaded Python. */
	long pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);

	if (pid < 0)
		return -errno;
	if (pid == 0)
		helper(args, errors, parent);
	while (waitpid((pid_t)pid, NULL, 0) < 0 && errno == EINTR)
		;
	return 0;
}

/*
 * Start the stub as process args->pid. Waits until it has been executed. The new process ends by itself when the
 * other end of comm_fd closes.
 */
int ph_spawn_skeleton(const struct ph_spawn *args, int32_t *step)
{
	int errors[2];
	int32_t report[2];
	ssize_t got;
	int result;

	*step = STEP_FORK;
	if (pipe2(errors, O_CLOEXEC) < 0)
		return -errno;
	/* Only from a process of the caller's own can a child go to the caller's parent (CLONE_PARENT). */
	result = args->parent == PH_PARENT_CALLERS_PARENT ? start(args, errors[1], step)
							  : start_in_helper(args, errors[1]);
	close(errors[1]);
	if (result < 0) {
		close(errors[0]);
		return result;
	}
	do {
		got = read(errors[0], report, sizeof(report));
	} while (got < 0 && errno == EINTR);
	close(errors[0]);
	if (got == sizeof(report)) {
		*step = report[0];
		return -report[1];
	}
	return 0;
}
