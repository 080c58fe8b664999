/*
 * Registers, bit by bit: all 16 general ones, the flags, x87, mxcsr, xmm, ymm, zmm, opmasks, fs and
 * gs bases, and the red zone. `hold` loads random values, spins without touching memory or flags,
 * and stores what it finds; nearly all of the time passes in its spin.
 */
#include <asm/prctl.h>
#include <cpuid.h>

#include "target.h"

enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, GPRS = 16, RED_ZONE = 16, SPINS = 4000000 };
enum { CF = 1, PF = 4, AF = 0x10, ZF = 0x40, SF = 0x80, IF = 0x200, OF = 0x800 };
enum { XSTATE = 0xe7 /* x87, SSE, AVX, opmask, both halves of AVX-512 */, XSAVE_SIZE = 4096 };
enum { FCW = 0, FSW = 2, FTW = 4, MXCSR = 24, ST = 32, XMM = 160, LEGACY_END = 416, HEADER = 512 };

/* The order is known to the assembly below. */
struct machine {
	uint64_t gpr[GPRS], flags, gs, red_zone[RED_ZONE];
};

struct machine wanted, seen;
_Alignas(64) unsigned char wanted_x[XSAVE_SIZE], seen_x[XSAVE_SIZE], own_x[XSAVE_SIZE];
uint64_t own_rsp;
uint32_t xmask;

void hold(void);

__asm__(".text\n"
	".macro each_gpr use\n"
	"	\\use %rax, 0\n	\\use %rbx, 1\n	\\use %rcx, 2\n	\\use %rdx, 3\n"
	"	\\use %rsi, 4\n	\\use %rdi, 5\n	\\use %rbp, 6\n	\\use %rsp, 7\n"
	"	\\use %r8, 8\n	\\use %r9, 9\n	\\use %r10, 10\n	\\use %r11, 11\n"
	"	\\use %r12, 12\n	\\use %r13, 13\n	\\use %r14, 14\n	\\use %r15, 15\n"
	".endm\n"
	".macro take reg, number\n	mov wanted+8*\\number(%rip), \\reg\n.endm\n"
	".macro give reg, number\n	mov \\reg, seen+8*\\number(%rip)\n.endm\n"
	"hold:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"	mov %rsp, own_rsp(%rip)\n"
	"	mov xmask(%rip), %eax\n"
	"	xor %edx, %edx\n"
	"	xsave64 own_x(%rip)\n"
	"	xrstor64 wanted_x(%rip)\n"
	"	pushq wanted+8*16(%rip)\n"
	"	popfq\n"
	/* From here to pushfq nothing changes a flag or writes to the stack. */
	"	mov wanted+8*7(%rip), %rsp\n"
	".set i, 0\n"
	".rept 16\n"
	"	mov wanted+8*18+8*i(%rip), %rax\n"
	"	mov %rax, 8*i-128(%rsp)\n"
	"	.set i, i+1\n"
	".endr\n"
	"	each_gpr take\n"
	"1:	lea -1(%rcx), %rcx\n"
	"	lea 1(%rdx), %rdx\n"
	"	jrcxz 2f\n"
	"	jmp 1b\n"
	"2:	each_gpr give\n"
	"	mov %gs:0, %rax\n"
	"	mov %rax, seen+8*17(%rip)\n"
	".set i, 0\n"
	".rept 16\n"
	"	mov 8*i-128(%rsp), %rax\n"
	"	mov %rax, seen+8*18+8*i(%rip)\n"
	"	.set i, i+1\n"
	".endr\n"
	"	mov own_rsp(%rip), %rsp\n"
	"	pushfq\n"
	"	popq seen+8*16(%rip)\n"
	"	mov xmask(%rip), %eax\n"
	"	xor %edx, %edx\n"
	"	xsave64 seen_x(%rip)\n"
	"	xrstor64 own_x(%rip)\n"
	"	pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	ret\n");

/* A state that xrstor takes: every exception masked, no reserved bit. */
static void random_xstate(uint64_t round)
{
	uint64_t dice = target_random(round * 64 + 40);
	uint16_t fcw = 0x037f ^ (dice & 0x1f00), fsw = (dice >> 16) & 0x7f7f;
	uint32_t mxcsr = 0x1f80 | ((dice >> 32) & 0xe07f);
	uint64_t mask = xmask;

	target_fill(wanted_x + 576, XSAVE_SIZE - 576, round * 2 + 1000);
	target_fill(wanted_x, HEADER, round * 2 + 1001);
	memset(wanted_x + HEADER, 0, 64);
	memset(wanted_x, 0, MXCSR);
	memcpy(wanted_x + FCW, &fcw, sizeof(fcw));
	memcpy(wanted_x + FSW, &fsw, sizeof(fsw));
	wanted_x[FTW] = (unsigned char)(dice >> 48);
	memcpy(wanted_x + MXCSR, &mxcsr, sizeof(mxcsr));
	memcpy(wanted_x + HEADER, &mask, sizeof(mask));
}

/* Instruction and data pointers of the x87 are no state that every CPU keeps: bytes 6 to 23. */
static void same_xstate(void)
{
	static const char *const names[] = {"x87", "sse", "ymm", "", "", "opmask", "zmm0-15", "zmm16-31"};
	unsigned size, offset, flags, none; /* of CPUID leaf 0xd */

	same_bytes("x87 control, status, tags", seen_x, wanted_x, FTW + 1);
	same_bytes("mxcsr", seen_x + MXCSR, wanted_x + MXCSR, 4);
	for (int i = 0; i < 8; i++)
		same_bytes("st", seen_x + ST + 16 * i, wanted_x + ST + 16 * i, 10);
	same_bytes("xmm", seen_x + XMM, wanted_x + XMM, LEGACY_END - XMM);
	same_bytes("components in use", seen_x + HEADER, wanted_x + HEADER, 8);
	for (unsigned part = 2; part < 8; part++)
		if (xmask >> part & 1) {
			__cpuid_count(0xd, part, size, offset, flags, none);
			same_bytes(names[part], seen_x + offset, wanted_x + offset, size);
		}
}

int main(int argc, char **argv)
{
	static _Alignas(16) unsigned char stack[1 << 16];
	static uint64_t through_gs[512];
	uint64_t fs, base;
	char what[16];

	target_start(argc, argv);
	__asm__("xgetbv" : "=a"(xmask) : "c"(0) : "edx");
	xmask &= XSTATE;
	MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &fs));
	target_ready();
	for (uint64_t round = 0; !target_ending(0); round++) {
		for (uint64_t i = 0; i < sizeof(wanted) / 8; i++)
			((uint64_t *)&wanted)[i] = target_random(round * 64 + i);
		wanted.flags = 2 | IF | (wanted.flags & (CF | PF | AF | ZF | SF | OF));
		wanted.gpr[RCX] = SPINS;
		wanted.gpr[RSP] = (uint64_t)stack + 4096 + wanted.gpr[RSP] % (sizeof(stack) - 8192) / 8 * 8;
		random_xstate(round);
		uint64_t *gs = &through_gs[wanted.gs % 512];
		*gs = wanted.gs;
		MUST(syscall(SYS_arch_prctl, ARCH_SET_GS, gs));

		hold();

		wanted.gpr[RCX] = 0;
		wanted.gpr[RDX] += SPINS;
		for (int i = 0; i < GPRS; i++) {
			snprintf(what, sizeof(what), "gpr %d", i);
			SAME(what, seen.gpr[i], wanted.gpr[i]);
		}
		SAME("flags", seen.flags, wanted.flags);
		SAME("word at gs:0", seen.gs, wanted.gs);
		same_bytes("red zone", seen.red_zone, wanted.red_zone, sizeof(seen.red_zone));
		same_xstate();
		MUST(syscall(SYS_arch_prctl, ARCH_GET_GS, &base));
		SAME("gs base", base, (uint64_t)gs);
		MUST(syscall(SYS_arch_prctl, ARCH_GET_FS, &base));
		SAME("fs base", base, fs);
	}
	target_pass();
}
