#include "core/cpu.h"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const char *const isa_names[B2_ISA_COUNT] = {"generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16"};

const char *b2_isa_name(b2_isa isa)
{
    return isa_names[isa];
}

#if defined(__x86_64__)
static void read_brand(char brand[64])
{
    unsigned int words[12];
    unsigned int top = __get_cpuid_max(0x80000000u, 0);
    if (top < 0x80000004u)
        return;
    for (unsigned int i = 0; i < 3; i++)
        __cpuid(0x80000002u + i, words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    memcpy(brand, words, sizeof words);
    brand[sizeof words] = 0;
    for (size_t n = strlen(brand); n > 0 && brand[n - 1] == ' '; n--)
        brand[n - 1] = 0;
}

void b2_cpu_detect(b2_cpu *cpu)
{
    *cpu = (b2_cpu){0};
    /* __builtin_cpu_supports also checks that the operating system saves the wide registers (XGETBV). */
    __builtin_cpu_init();
    cpu->avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    cpu->avx512 = cpu->avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    cpu->avx512_vnni = cpu->avx512 && __builtin_cpu_supports("avx512vnni");
    cpu->avx512_bf16 = cpu->avx512_vnni && __builtin_cpu_supports("avx512bf16");
    read_brand(cpu->brand);
}
#else
void b2_cpu_detect(b2_cpu *cpu)
{
    *cpu = (b2_cpu){0};
}
#endif

static int has(const b2_cpu *cpu, b2_isa isa)
{
    const int found[B2_ISA_COUNT] = {1, cpu->avx2, cpu->avx512, cpu->avx512_vnni, cpu->avx512_bf16};
    return found[isa];
}

int b2_isa_choose(b2_isa *isa, const b2_cpu *cpu, const char *forced, b2_err *err)
{
    if (!forced || !*forced) {
        *isa = B2_ISA_COUNT - 1;
        while (!has(cpu, *isa))
            *isa = (b2_isa)(*isa - 1);
        return 0;
    }
    for (int i = 0; i < B2_ISA_COUNT; i++) {
        if (strcmp(forced, isa_names[i]) != 0)
            continue;
        if (!has(cpu, (b2_isa)i))
            return b2_fail(err, B2_E_UNSUPPORTED, "BLIP2C_ISA=%s: this processor%s%s has no such instructions", forced,
                           cpu->brand[0] ? " " : "", cpu->brand);
        *isa = (b2_isa)i;
        return 0;
    }
    return b2_fail(err, B2_E_VALUE, "BLIP2C_ISA=%.32s: expected generic, avx2, avx512, avx512_vnni or avx512_bf16",
                   forced);
}
