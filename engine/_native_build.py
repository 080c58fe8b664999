"""Builds `phaul.engine._native`. The C lies in engine/native; this file only declares it to cffi."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

NATIVE = Path("engine/native")
SOURCES = ["injected.c", "memory.c", "skeleton.c", "trace.c"]

# System calls that batches or we ourselves make. Numbers come from the kernel's headers.
SYSCALLS = """
accept4 arch_prctl bind brk capset chdir chroot clock_gettime clone3 close close_range connect dup dup2
dup3 epoll_create1 epoll_ctl epoll_wait eventfd2 execveat exit exit_group fchdir fchmod fcntl flock fork
fstat ftruncate futex get_robust_list getcpu getegid geteuid getgid getgroups getitimer getpgid getpid
getppid getpriority getresgid getresuid getsid getsockopt gettid getuid inotify_add_watch inotify_init1
inotify_rm_watch io_destroy io_getevents io_setup ioctl ioprio_get ioprio_set kcmp kill linkat listen
lseek madvise membarrier memfd_create mincore mlock mlock2 mlockall mmap mount move_mount mprotect
mremap munlock munmap nanosleep open open_by_handle_at openat openat2 personality pidfd_getfd pidfd_open
pidfd_send_signal pipe2 poll ppoll prctl pread64 prlimit64 process_vm_readv
process_vm_writev ptrace pwrite64 read recvmsg rseq rt_sigaction rt_sigpending rt_sigprocmask
rt_sigqueueinfo rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_setaffinity
sched_setattr sched_yield seccomp sendmsg set_robust_list set_tid_address setfsgid setfsuid setgid
setgroups setitimer setns setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid
setsockopt setuid shmat shmdt shutdown sigaltstack signalfd4 socket socketpair splice tee tgkill
timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_settime
umask umount2 unshare userfaultfd vmsplice wait4 waitid write writev
""".split()

ffi = FFI()
ffi.cdef(
    "\n".join(f"#define SYS_{name} ..." for name in SYSCALLS)
    + """
#define PH_GPR_SIZE ...
#define PH_XSTATE_MAX ...
#define PH_STOP_ON_ERROR ...
#define PH_RESULT_IN_RBX ...
#define PH_PARENT_INIT ...
#define PH_PARENT_CALLER ...
#define PH_PARENT_CALLERS_PARENT ...

struct ph_regs { uint8_t gpr[...]; uint64_t sigmask; uint64_t xstate_len; uint8_t xstate[...]; };
struct ph_run {
    int32_t tid; int32_t stop_signal; uint64_t marker; int32_t n_new; int32_t n_held;
    int32_t new_tids[...]; int32_t held[...];
};
struct ph_region { uint64_t start, end, categories; };
struct ph_spawn {
    int32_t pid; int32_t stub_fd; int32_t comm_fd; int32_t parent; int32_t set_clocks;
    int64_t monotonic[2]; int64_t boottime[2];
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
int ph_rseq_config(int32_t tid, uint64_t *ret);
int ph_run(struct ph_run *run, const uint8_t *gpr);
int ph_leave(int32_t tid, const uint8_t *gpr);
int64_t ph_vm_read(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, uint8_t *buf);
int64_t ph_vm_write(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, const uint8_t *buf);
int64_t ph_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t flags, const uint64_t *masks,
                        struct ph_region *ret, uint64_t max, uint64_t *walk_end);
int64_t ph_pagemap_read(int fd, uint64_t start, uint64_t end, const uint64_t *masks,
                        struct ph_region *ret, uint64_t max, uint64_t *walk_end);
int ph_spawn_skeleton(const struct ph_spawn *args, int32_t *step);
int64_t ph_build_stub(uint64_t base, uint64_t data_size, uint8_t *ret, size_t max);
int64_t ph_injected(const uint8_t **code, uint32_t *saved, uint32_t *marker, uint32_t *stub);
int ph_xsave_component(int number, uint32_t *offset, uint32_t *size);
uint64_t ph_xsave_supported(void);
"""
)
ffi.set_source(
    "phaul.engine._native",
    "#include <sys/syscall.h>\n#include <linux/unistd.h>\n" + '#include "phaul_native.h"\n',
    sources=[str(NATIVE / name) for name in SOURCES],
    depends=[str(NATIVE / "phaul_native.h")],
    include_dirs=[str(NATIVE)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror"],
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
