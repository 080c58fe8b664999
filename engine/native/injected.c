/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The code that runs inside other tasks. Position independent, no stack, no SSE.
 *
 * ph_loop runs records from high addresses to low ones:
 *
 *   r12  the next record             r13  where to stop (one record below the last)
 *   rbx  scratch mapping to remove, or 0 or -errno    r15  its length
 *   ebp  the signal that ends the list
 *   rsp  the task's own, below its red zone: a signal handler could run at any time
 *
 * At the end of the list it sends itself a signal that is ignored by default: a traced task
 * stops there and the tracer looks at the results; without a tracer nothing happens. Then the code goes
 * on by itself to what undoes everything: it unmaps the scratch, stops once more, and restores flags,
 * mask and registers from the words at ph_saved. So a tracer may die at any moment.
 */
#include "phaul_native.h"

__asm__(
	".pushsection .rodata\n"
	".balign 16\n"
	".globl ph_code_begin, ph_code_saved, ph_code_marker, ph_code_stub, ph_code_end\n"
	".hidden ph_code_begin, ph_code_saved, ph_code_marker, ph_code_stub, ph_code_end\n"
	"ph_code_begin:\n"
	"1:	cmp %r13, %r12\n"
	"	je 8f\n"
	"	mov 4(%r12), %ecx\n"
	"	mov 8(%r12), %rdi\n"
	"	mov 16(%r12), %rsi\n"
	"	mov 24(%r12), %rdx\n"
	"	mov 32(%r12), %r10\n"
	"	mov 40(%r12), %r8\n"
	"	mov 48(%r12), %r9\n"
	"	test $0x3f, %cl\n"
	"	jz 7f\n"
	"	test $1, %cl\n"
	"	jz 2f\n"
	"	mov (%rdi), %rdi\n"
	"2:	test $2, %cl\n"
	"	jz 3f\n"
	"	mov (%rsi), %rsi\n"
	"3:	test $4, %cl\n"
	"	jz 4f\n"
	"	mov (%rdx), %rdx\n"
	"4:	test $8, %cl\n"
	"	jz 5f\n"
	"	mov (%r10), %r10\n"
	"5:	test $16, %cl\n"
	"	jz 6f\n"
	"	mov (%r8), %r8\n"
	"6:	test $32, %cl\n"
	"	jz 7f\n"
	"	mov (%r9), %r9\n"
	"7:	mov (%r12), %eax\n"
	"	syscall\n"
	"	mov 4(%r12), %ecx\n"
	"	test $0x80, %cl\n"
	"	jnz 2f\n"
	"	mov %rax, 56(%r12)\n"
	"	jmp 3f\n"
	"2:	mov %rax, %rbx\n"
	"3:	sub $64, %r12\n"
	"	test $0x40, %cl\n"
	"	jz 1b\n"
	"	cmp $-4095, %rax\n"
	"	jb 1b\n"
	"8:	mov $39, %eax\n"               /* getpid: in the task's own pid namespace */
	"	syscall\n"
	"	mov %eax, %edi\n"
	"	mov $186, %eax\n"              /* gettid */
	"	syscall\n"
	"	mov %eax, %esi\n"
	"	mov %ebp, %edx\n"
	"	mov $234, %eax\n"              /* tgkill */
	"	syscall\n"
	"ph_code_marker:\n"
	"	test %rbx, %rbx\n"
	"	jle 9f\n"
	"	mov %rbx, %rdi\n"
	"	mov %r15, %rsi\n"
	"	mov $11, %eax\n"               /* munmap */
	"	syscall\n"
	"	xor %ebx, %ebx\n"
	"	jmp 8b\n"
	"9:	lea ph_code_saved(%rip), %rsp\n"
	"	popfq\n"
	"	mov ph_code_saved+8(%rip), %rsp\n"
	"	mov $2, %edi\n"                /* SIG_SETMASK */
	"	lea ph_code_saved+16(%rip), %rsi\n"
	"	mov $0, %edx\n"
	"	mov $8, %r10d\n"
	"	mov $14, %eax\n"               /* rt_sigprocmask; from here only mov: flags stay */
	"	syscall\n"
	"	mov ph_code_saved+24(%rip), %rax\n"
	"	mov ph_code_saved+32(%rip), %rbx\n"
	"	mov ph_code_saved+40(%rip), %rcx\n"
	"	mov ph_code_saved+48(%rip), %rdx\n"
	"	mov ph_code_saved+56(%rip), %rsi\n"
	"	mov ph_code_saved+64(%rip), %rdi\n"
	"	mov ph_code_saved+72(%rip), %rbp\n"
	"	mov ph_code_saved+80(%rip), %r8\n"
	"	mov ph_code_saved+88(%rip), %r9\n"
	"	mov ph_code_saved+96(%rip), %r10\n"
	"	mov ph_code_saved+104(%rip), %r11\n"
	"	mov ph_code_saved+112(%rip), %r12\n"
	"	mov ph_code_saved+120(%rip), %r13\n"
	"	mov ph_code_saved+128(%rip), %r14\n"
	"	mov ph_code_saved+136(%rip), %r15\n"
	"	jmp *ph_code_saved+144(%rip)\n"
	".balign 8\n"
	"ph_code_saved:\n"
	"	.fill 19, 8, 0\n"
	/*
	 * The program of an empty skeleton: waits until its maker seizes it, and ends when the maker
	 * has gone (end of file on fd 0).
	 */
	"ph_code_stub:\n"
	"1:	xor %edi, %edi\n"
	"	lea -128(%rsp), %rsi\n"
	"	mov $1, %edx\n"
	"	xor %eax, %eax\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jnz 1b\n"
	"	xor %edi, %edi\n"
	"	mov $231, %eax\n"              /* exit_group */
	"	syscall\n"
	"ph_code_end:\n"
	".popsection\n");

extern const uint8_t ph_code_begin[], ph_code_saved[], ph_code_marker[], ph_code_stub[], ph_code_end[];

int64_t ph_injected(const uint8_t **code, uint32_t *saved, uint32_t *marker, uint32_t *stub)
{
	*code = ph_code_begin;
	*saved = (uint32_t)(ph_code_saved - ph_code_begin);
	*marker = (uint32_t)(ph_code_marker - ph_code_begin);
	*stub = (uint32_t)(ph_code_stub - ph_code_begin);
	return ph_code_end - ph_code_begin;
}
