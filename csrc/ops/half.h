/* float16 and bfloat16 as bits, in plain C. Round to nearest even; NaN stays NaN; subnormals are kept. */
#ifndef B2_OPS_HALF_H
#define B2_OPS_HALF_H

#include <stdint.h>
#include <string.h>

static inline float b2_bits_to_f32(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t b2_f32_to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float b2_bf16_to_f32(uint16_t half)
{
    return b2_bits_to_f32((uint32_t)half << 16);
}

static inline uint16_t b2_f32_to_bf16(float value)
{
    uint32_t bits = b2_f32_to_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40); /* quiet: the payload's upper bits alone could be zero, which is Inf */
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Without branches, so that loops over it become vectors. */
static inline float b2_f16_to_f32(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000) << 16;
    uint32_t magnitude = half & 0x7fff;
    uint32_t bits = (magnitude + (112u << 10)) << 13;
    bits += magnitude >= 0x7c00 ? 112u << 23 : 0;   /* Inf, NaN */
    bits |= magnitude > 0x7c00 ? 0x400000u : 0;     /* NaN is made quiet, as the processor does */
    /* Subnormal: magnitude * 2^-24, exact in fp32. */
    uint32_t small = b2_f32_to_bits((float)(int32_t)magnitude * 5.9604644775390625e-08f);
    return b2_bits_to_f32(sign | (magnitude < 0x400 ? small : bits));
}

static inline uint16_t b2_f32_to_f16(float value)
{
    uint32_t bits = b2_f32_to_bits(value);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x3ff));
    if (magnitude >= 0x477ff000u) /* 65520 and above round to Inf */
        return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000u) {
        /* Below 2^-14: adding 0.5 puts the float16 subnormal's last bit at the float's last bit and rounds there. */
        float shifted = b2_bits_to_f32(magnitude) + 0.5f;
        return (uint16_t)(sign | (b2_f32_to_bits(shifted) - 0x3f000000u));
    }
    uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return (uint16_t)(sign | ((rounded >> 13) - (112u << 10)));
}

#endif
