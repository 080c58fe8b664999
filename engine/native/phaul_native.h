/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The kernel calls that Python cannot make, or not fast enough. No policy here.
 *
 * Every function returns a value >= 0, or -errno.
 */
#ifndef PHAUL_NATIVE_H
#define PHAUL_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PH_GPR_SIZE 216       /* NT_PRSTATUS: struct user_regs_struct, 27 u64 */
#define PH_XSTATE_MAX 16384   /* NT_X86_XSTATE: 11 KiB with AMX tiles */
#define PH_LIST_MAX 1024

/* What a stopped task's CPU and signal mask hold. */
struct ph_regs {
	uint8_t gpr[PH_GPR_SIZE];
	uint64_t sigmask;
	uint64_t xstate_len;
	uint8_t xstate[PH_XSTATE_MAX];
};

/* One system call of a batch; see injected.c for who reads what. */
struct ph_record {
	uint32_t nr;
	uint32_t flags;
	uint64_t args[6];
	int64_t result;
};

/* Bits 0..5 of ph_record.flags: this argument is the address of the value. */
#define PH_STOP_ON_ERROR 0x40
#define PH_RESULT_IN_RBX 0x80

/* How a list of records is run; filled in by ph_run. */
struct ph_run {
	int32_t tid;
	int32_t stop_signal;  /* 0: find the end by PTRACE_SYSCALL stops */
	uint64_t marker;      /* address behind the injected tgkill */
	int32_t n_new;        /* tasks that the list created (traced, not yet waited for) */
	int32_t n_held;       /* signals that came in between and were held back */
	int32_t new_tids[PH_LIST_MAX];
	int32_t held[PH_LIST_MAX];
};

struct ph_region {
	uint64_t start, end, categories;
};

/* Whose child a new process becomes: our init's (or subreaper's), ours, our parent's. */
enum { PH_PARENT_INIT, PH_PARENT_CALLER, PH_PARENT_CALLERS_PARENT };

struct ph_spawn {
	int32_t pid;            /* wanted, in our pid namespace */
	int32_t stub_fd;        /* executable, read-only */
	int32_t comm_fd;        /* becomes fd 0 of the skeleton */
	int32_t parent;         /* PH_PARENT_* */
	int32_t set_clocks;     /* new time namespace with the offsets below */
	int64_t monotonic[2];   /* seconds, nanoseconds */
	int64_t boottime[2];
};

long ph_syscall(long nr, uint64_t a, uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f);

int ph_stop(const int32_t *tids, size_t n, uint64_t options, int32_t *statuses);
int ph_wait(int32_t tid, int timeout_ms, int32_t *status);
int ph_ptrace(int request, int32_t tid, uint64_t addr, uint64_t data);
int ph_get_regs(int32_t tid, struct ph_regs *ret);
int ph_set_regs(int32_t tid, const struct ph_regs *regs);
int ph_set_gpr(int32_t tid, const uint8_t *gpr);
int ph_get_gpr(int32_t tid, uint8_t *ret);
int ph_set_sigmask(int32_t tid, uint64_t mask);
int ph_peek_siginfo(int32_t tid, int shared, uint64_t offset, int max, uint8_t *ret);
int ph_rseq_config(int32_t tid, uint64_t ret[3]);
int ph_run(struct ph_run *run, const uint8_t *gpr);
int ph_leave(int32_t tid, const uint8_t *gpr);

int64_t ph_vm_read(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, uint8_t *buf);
int64_t ph_vm_write(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, const uint8_t *buf);

int64_t ph_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t flags, const uint64_t masks[4],
			struct ph_region *ret, uint64_t max, uint64_t *walk_end);
int64_t ph_pagemap_read(int fd, uint64_t start, uint64_t end, const uint64_t masks[4],
			struct ph_region *ret, uint64_t max, uint64_t *walk_end);

int ph_spawn_skeleton(const struct ph_spawn *args, int32_t *step);
int64_t ph_build_stub(uint64_t base, uint64_t data_size, uint8_t *ret, size_t max);
int64_t ph_injected(const uint8_t **code, uint32_t *saved, uint32_t *marker, uint32_t *stub);

int ph_xsave_component(int number, uint32_t *offset, uint32_t *size);
uint64_t ph_xsave_supported(void);

#endif
