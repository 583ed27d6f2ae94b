/* Lets a program see an older x86-64 CPU than it runs on, at full speed: CPUID faults and is answered without VNNI.

   cc -shared -fPIC -O1 -o older_cpu.so older_cpu.c
   OLDER_CPU=avx2 LD_PRELOAD=./older_cpu.so program      (or avx512: AVX-512 without VNNI)

   Needs Linux 4.12 or newer and a CPU with CPUID faulting ("cpuid_fault" in /proc/cpuinfo). */
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
static int hide_avx512;

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    unsigned a, b, c, d, leaf = (unsigned)r[REG_RAX], sub = (unsigned)r[REG_RCX];
    if (at[0] != 0x0F || at[1] != 0xA2) { /* a fault of another kind: once more, without a handler */
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
    __cpuid_count(leaf, sub, a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
    if (leaf == 7 && sub == 0) {
        c &= ~(1u << 11);                                            /* AVX512_VNNI */
        d &= ~(1u << 22 | 1u << 23 | 1u << 24 | 1u << 25);           /* AMX_BF16, AVX512_FP16, AMX_TILE, AMX_INT8 */
        if (hide_avx512) {
            b &= ~(1u << 16 | 1u << 17 | 1u << 21 | 1u << 28 | 1u << 30 | 1u << 31); /* F, DQ, IFMA, CD, BW, VL */
            c &= ~(1u << 1 | 1u << 6 | 1u << 12 | 1u << 14);         /* VBMI, VBMI2, BITALG, VPOPCNTDQ */
        }
    }
    if (leaf == 7 && sub == 1) {
        a &= ~(1u << 4 | 1u << 5);                                   /* AVX_VNNI, AVX512_BF16 */
        d &= ~(1u << 4 | 1u << 5 | 1u << 10);                        /* AVX_VNNI_INT8, NE_CONVERT, VNNI_INT16 */
    }
    r[REG_RAX] = a, r[REG_RBX] = b, r[REG_RCX] = c, r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
    const char *kind = getenv("OLDER_CPU");
    struct sigaction action;
    if (kind == NULL) return;
    hide_avx512 = strcmp(kind, "avx512") != 0;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = answer;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
        fputs("older_cpu: this CPU or kernel can't let CPUID fault\n", stderr);
        _exit(3);
    }
}
