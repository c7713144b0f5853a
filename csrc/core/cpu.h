/* What this processor can do, and which instruction set the kernels use. */
#ifndef B2_CORE_CPU_H
#define B2_CORE_CPU_H

#include "core/error.h"

/* Each holds all that stand before it. */
typedef enum b2_isa {
    B2_ISA_GENERIC = 0,
    B2_ISA_AVX2,
    B2_ISA_AVX512,
    B2_ISA_AVX512_VNNI, /* dot products of four int8 */
    B2_ISA_AVX512_BF16, /* dot products of two bfloat16 */
    B2_ISA_COUNT
} b2_isa;

typedef struct b2_cpu {
    int avx2;        /* AVX2 + FMA + F16C, and the system saves ymm state */
    int avx512;      /* F + BW + DQ + VL, and the system saves zmm state */
    int avx512_vnni; /* and avx512 */
    int avx512_bf16; /* and avx512_vnni: no processor has one without the other */
    char brand[64];  /* "AMD EPYC 9R14", or "" where the processor does not say */
} b2_cpu;

/* Before a function: compiled for wider registers too, the widest that the processor has is taken when the library is loaded.
 * For plain loops outside of the kernels; the results are the same, as nothing is fused or reordered. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define B2_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define B2_CLONES
#endif

void b2_cpu_detect(b2_cpu *cpu);

const char *b2_isa_name(b2_isa isa);

/* The best instruction set that was compiled in and that the CPU has, or the one that `forced` names
 * ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"; NULL or "" for none). B2_E_VALUE for an unknown name, B2_E_UNSUPPORTED if missing. */
int b2_isa_choose(b2_isa *isa, const b2_cpu *cpu, const char *forced, b2_err *err);

#endif
