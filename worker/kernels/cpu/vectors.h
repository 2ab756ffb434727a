#pragma once

/* Vectors of 16 numbers, which GCC and Clang lower to what the processor has, and bfloat16. */

#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { LANES = 16 };

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define ALWAYS static inline __attribute__((always_inline, unused))

ALWAYS uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

ALWAYS float from_bfloat16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

ALWAYS Floats load16(const uint16_t *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    return (Floats)(__builtin_convertvector(halves, Bits) << 16);
}

ALWAYS void store16(uint16_t *to, Floats values) {
    const Bits bits = (Bits)values;
    const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits is_nan = (Bits)((bits & 0x7fffffffu) > 0x7f800000u);
    const Halves halves = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Halves);
    memcpy(to, &halves, sizeof halves);
}

ALWAYS float sum_lanes(Floats values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)values);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += values[i];
    return sum;
#endif
}

ALWAYS float largest_lane(Floats values) {
    float largest = values[0];
    for (int i = 1; i < LANES; i++)
        largest = values[i] > largest ? values[i] : largest;
    return largest;
}

/* Return 2^x for x up to 127, with an error of 2e-7 of it. What is below -126 becomes 2^-126. */
ALWAYS Floats power_of_2(Floats x) {
    const Ints is_small = x < -126.0f;
    x = (Floats)((~is_small & (Ints)x) | (is_small & (Ints)((Floats){0} - 126.0f)));
    const Floats moved = x + 12582912.0f; /* 1.5 * 2^23: the last bits of the sum are the nearest integer */
    const Floats f = x - (moved - 12582912.0f);
    Floats y = f * 1.5403530e-4f + 1.3333558e-3f;
    y = y * f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return (Floats)((Ints)y + (((Ints)moved - 0x4b400000) << 23));
}
