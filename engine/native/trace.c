/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Stopping tasks, their registers, and running a batch of system calls in them. */
#define _GNU_SOURCE
#include "phaul_native.h"

#include <cpuid.h>
#include <elf.h>
#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(struct user_regs_struct) == PH_GPR_SIZE, "NT_PRSTATUS");
_Static_assert(sizeof(struct ph_record) == 64, "injected.c steps by 64");

#define EVENT_STOP_CODE 128 /* PTRACE_EVENT_STOP */
#define SYSCALL_STOP (SIGTRAP | 0x80)

static int checked(long result)
{
	return result < 0 ? -errno : (int)result;
}

long ph_syscall(long nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	long result = syscall(nr, a, b, c, d, e, f);

	return result < 0 ? -errno : result;
}

int ph_ptrace(int request, int32_t tid, uint64_t addr, uint64_t data)
{
	return checked(ptrace(request, tid, (void *)(uintptr_t)addr, (void *)(uintptr_t)data));
}

/* Wait for the next report of a tracee. -ETIMEDOUT leaves it to a later call. timeout_ms < 0: for ever. */
int ph_wait(int32_t tid, int timeout_ms, int32_t *status)
{
	struct timespec nap = {0, 100000};
	int64_t left = (int64_t)timeout_ms * 10;

	for (;;) {
		pid_t got = waitpid(tid, status, __WALL | (timeout_ms < 0 ? 0 : WNOHANG));

		if (got == tid)
			return 0;
		if (got < 0 && errno != EINTR)
			return -errno;
		if (got == 0) {
			if (left-- <= 0)
				return -ETIMEDOUT;
			nanosleep(&nap, NULL);
		}
	}
}

static bool is_event_stop(int status)
{
	return WIFSTOPPED(status) && status >> 16 == EVENT_STOP_CODE;
}

/* Until the task is in a PTRACE_EVENT_STOP. Signals met on the way are delivered as if we were not there. */
static int wait_event_stop(int32_t tid, int32_t *status)
{
	for (;;) {
		int ret = ph_wait(tid, -1, status);
		int sig;

		if (ret < 0)
			return ret;
		if (!WIFSTOPPED(*status))
			return -ESRCH;
		if (is_event_stop(*status))
			return 0;
		sig = *status >> 16 || WSTOPSIG(*status) == SYSCALL_STOP ? 0 : WSTOPSIG(*status);
		ret = ph_ptrace(PTRACE_CONT, tid, 0, (uint64_t)sig);
		if (ret < 0)
			return ret;
	}
}

/*
 * Seize and stop all tasks: first all interrupts, then all waits. statuses[i] becomes the wait status or -errno; tasks
 * that could not be stopped are not left seized. Returns the number stopped.
 */
int ph_stop(const int32_t *tids, size_t n, uint64_t options, int32_t *statuses)
{
	int stopped = 0;

	for (size_t i = 0; i < n; i++) {
		statuses[i] = ph_ptrace(PTRACE_SEIZE, tids[i], 0, options);
		if (statuses[i] == 0)
			statuses[i] = ph_ptrace(PTRACE_INTERRUPT, tids[i], 0, 0);
	}
	for (size_t i = 0; i < n; i++) {
		int32_t status;
		int ret;

		if (statuses[i] < 0)
			continue;
		ret = wait_event_stop(tids[i], &status);
		statuses[i] = ret < 0 ? ret : status;
		stopped += ret == 0;
	}
	return stopped;
}

/* From a stop of any kind to a PTRACE_EVENT_STOP, without running one instruction of the task. */
static int interrupt_again(int32_t tid)
{
	int32_t status;
	int ret = ph_ptrace(PTRACE_INTERRUPT, tid, 0, 0);

	if (ret == 0)
		ret = ph_ptrace(PTRACE_CONT, tid, 0, 0);
	return ret < 0 ? ret : wait_event_stop(tid, &status);
}

static int regset(int request, int32_t tid, int type, void *data, size_t *length)
{
	struct iovec iov = {data, *length};
	int ret = checked(ptrace(request, tid, (void *)(uintptr_t)type, &iov));

	*length = iov.iov_len;
	return ret;
}

int ph_get_gpr(int32_t tid, uint8_t *ret)
{
	size_t length = PH_GPR_SIZE;

	return regset(PTRACE_GETREGSET, tid, NT_PRSTATUS, ret, &length);
}

int ph_set_gpr(int32_t tid, const uint8_t *gpr)
{
	size_t length = PH_GPR_SIZE;

	return regset(PTRACE_SETREGSET, tid, NT_PRSTATUS, (void *)gpr, &length);
}

int ph_set_sigmask(int32_t tid, uint64_t mask)
{
	return checked(ptrace(PTRACE_SETSIGMASK, tid, (void *)8, &mask));
}

int ph_get_regs(int32_t tid, struct ph_regs *ret)
{
	size_t length = PH_XSTATE_MAX;
	int error = ph_get_gpr(tid, ret->gpr);

	if (error < 0)
		return error;
	error = regset(PTRACE_GETREGSET, tid, NT_X86_XSTATE, ret->xstate, &length);
	if (error < 0)
		return error;
	ret->xstate_len = length;
	return checked(ptrace(PTRACE_GETSIGMASK, tid, (void *)8, &ret->sigmask));
}

int ph_set_regs(int32_t tid, const struct ph_regs *regs)
{
	size_t length = regs->xstate_len;
	int error = regset(PTRACE_SETREGSET, tid, NT_X86_XSTATE, (void *)regs->xstate, &length);

	if (error == 0)
		error = ph_set_sigmask(tid, regs->sigmask);
	return error < 0 ? error : ph_set_gpr(tid, regs->gpr);
}

/* Pending signals as the kernel queues them: max * 128 bytes of siginfo_t. Returns how many. */
int ph_peek_siginfo(int32_t tid, int shared, uint64_t offset, int max, uint8_t *ret)
{
	struct __ptrace_peeksiginfo_args args = {
		.off = offset,
		.flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0,
		.nr = max,
	};

	return checked(ptrace(PTRACE_PEEKSIGINFO, tid, &args, ret));
}

/* Address, size and signature of the registered rseq area; address 0 when there is none. */
int ph_rseq_config(int32_t tid, uint64_t ret[3])
{
	struct {
		uint64_t pointer;
		uint32_t size, signature, flags, pad;
	} config;
	int error = checked(ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, sizeof(config), &config));

	if (error < 0)
		return error;
	ret[0] = config.pointer;
	ret[1] = config.size;
	ret[2] = config.signature;
	return 0;
}

static int at_marker(int32_t tid, uint64_t marker)
{
	struct user_regs_struct regs;
	int ret = ph_get_gpr(tid, (uint8_t *)&regs);

	/* The entry stop of the same call still shows -ENOSYS. */
	return ret < 0 ? ret : regs.rip == marker && (long)regs.rax != -ENOSYS;
}

/*
 * Let a stopped task run injected code until the signal (or, with stop_signal 0, the syscall-exit) that ends its list.
 * gpr: registers to start with, or NULL to go on from where it is. New tasks are noted, other signals held.
 */
int ph_run(struct ph_run *run, const uint8_t *gpr)
{
	int request = run->stop_signal ? PTRACE_CONT : PTRACE_SYSCALL;
	int ret;

	if (gpr) {
		ret = ph_set_gpr(run->tid, gpr);
		/* Only now: a death of ours in between leaves nothing blocked for good, the code restores the mask. */
		if (ret == 0)
			ret = ph_set_sigmask(run->tid, ~(run->stop_signal ? 1ull << (run->stop_signal - 1) : 0));
		if (ret < 0)
			return ret;
	}
	for (;;) {
		int32_t status;
		int event, sig;

		ret = ph_ptrace(request, run->tid, 0, 0);
		if (ret == 0)
			ret = ph_wait(run->tid, -1, &status);
		if (ret < 0)
			return ret;
		if (!WIFSTOPPED(status))
			return -ESRCH;
		event = status >> 16;
		sig = WSTOPSIG(status);
		if (event == PTRACE_EVENT_CLONE || event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK) {
			unsigned long tid;

			ret = checked(ptrace(PTRACE_GETEVENTMSG, run->tid, NULL, &tid));
			if (ret < 0)
				return ret;
			if (run->n_new == PH_LIST_MAX)
				return -E2BIG;
			run->new_tids[run->n_new++] = (int32_t)tid;
		} else if (!event && sig == SYSCALL_STOP) {
			ret = at_marker(run->tid, run->marker);
			if (ret < 0)
				return ret;
			if (ret)
				return interrupt_again(run->tid);
		} else if (!event && sig == run->stop_signal && at_marker(run->tid, run->marker) == 1) {
			return 0;
		} else if (!event && run->n_held < PH_LIST_MAX) {
			run->held[run->n_held++] = sig;
		}
	}
}

/*
 * The last step out of the scratch memory: gpr holds a system call (munmap of the scratch) with rip at a `syscall`
 * instruction outside of it. Ends at a signal-type stop, where the kernel restarts calls by itself. Not by
 * PTRACE_SINGLESTEP: its forced SIGTRAP can reset the task's own SIGTRAP action. Returns what the call returned.
 */
int ph_leave(int32_t tid, const uint8_t *gpr)
{
	struct user_regs_struct regs;
	int32_t status;
	int ret = ph_set_gpr(tid, gpr);

	for (int stop = 0; ret == 0 && stop < 2;) {
		ret = ph_ptrace(PTRACE_SYSCALL, tid, 0, 0);
		if (ret == 0)
			ret = ph_wait(tid, -1, &status);
		if (ret == 0 && !WIFSTOPPED(status))
			ret = -ESRCH;
		if (ret == 0 && status >> 16 == 0 && WSTOPSIG(status) == SYSCALL_STOP)
			stop++;
	}
	if (ret == 0)
		ret = ph_get_gpr(tid, (uint8_t *)&regs);
	if (ret == 0)
		ret = interrupt_again(tid);
	return ret < 0 ? ret : (int)regs.rax;
}

/* CPUID leaf 0xD: where an extended state component lies in the (standard format) XSAVE area. */
int ph_xsave_component(int number, uint32_t *offset, uint32_t *size)
{
	uint32_t flags, reserved;

	if (!__get_cpuid_count(0xd, (unsigned)number, size, offset, &flags, &reserved))
		return -ENOSYS;
	return 0;
}

/* Which components the kernel has switched on (XCR0); 0 without XSAVE. */
uint64_t ph_xsave_supported(void)
{
	uint32_t a, b, c, d;

	if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE))
		return 0;
	__asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
	return (uint64_t)d << 32 | a;
}
