#pragma once

/* Products of a few rows with weights of 4 or 8 bits, on activations that are rounded to 8 bits.

   A weight [N, K] is cut into tiles of 16 outputs, and a tile into groups of inputs that share a scale. Tiles follow one
   another, groups within a tile too: so a thread reads memory from front to back. A group of E inputs is

     codes    8 bits: E / 4 vectors of 64 bytes. Byte 4 * n + i of vector v is the code of output n, input 4 * v + i.
              4 bits: E / 8 vectors. The low halves of vector v are the codes of vector 2 * v above, the high ones those
              of vector 2 * v + 1. They may be places in a table of 16 bytes, which are then what is multiplied.
     numbers  16 scales in float16, then 16 offsets, if the weight has any.

   A weight is (code - zero) * scale + offset. An input is q * step: q has 8 bits, and RUN inputs share a step. So

     sum over a run of weight * input = step * scale * (sum of code * q - zero * sum of q) + step * offset * sum of q

   and only the first sum runs over weights. One instruction (vpdpbusd) adds four products to each of 16 outputs. */

#include "vectors.h"

enum { OUTPUTS = LANES, RUN = 32, TILE_ROWS = 8 };

typedef struct {
    const uint8_t *bytes;
    int64_t outputs, inputs, group;
    int32_t bits, zero, has_offsets;
    const uint8_t *table; /* of 16 codes; NULL: codes are as they are */
} Weight;

typedef struct {
    const int8_t *q;    /* [rows, inputs] */
    const float *steps; /* [rows, inputs / RUN] */
    const int32_t *sums;
    int64_t rows, inputs;
} Rounded;

ALWAYS Bits load_bits(const void *from) {
    Bits x;
    memcpy(&x, from, sizeof x);
    return x;
}

/* Add to each output the products of its four codes with four inputs. */
ALWAYS Ints add_products(Ints sums, Bits codes, const int8_t *inputs) {
    int32_t four;
    memcpy(&four, inputs, sizeof four);
#if defined(__AVX512VNNI__)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#else
    for (int i = 0; i < 4; i++)
        sums += (Ints)((codes >> (8 * i)) & 255u) * (int32_t)inputs[i];
    return sums;
#endif
}

/* Return the bytes of a table, which is there four times, at the places that the bytes of `nibbles` say. */
ALWAYS Bits look_up(Bits table, Bits nibbles) {
#if defined(__AVX512BW__)
    return (Bits)_mm512_shuffle_epi8((__m512i)table, (__m512i)nibbles);
#else
    uint8_t from[64], at[64];
    memcpy(from, &table, sizeof from);
    memcpy(at, &nibbles, sizeof at);
    for (int i = 0; i < 64; i++)
        at[i] = from[at[i]];
    return load_bits(at);
#endif
}

ALWAYS Floats from_half(const uint8_t *from) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#else
    /* The bits of a float16, put in the place of a float32's, are the value times 2^-112. */
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    Bits wide = __builtin_convertvector(halves, Bits);
    Floats size = (Floats)((wide & 0x7fffu) << 13) * 0x1p112f;
    return (Floats)((Bits)size | ((wide & 0x8000u) << 16));
#endif
}

/* Multiply `count` rows, at most TILE_ROWS, by a tile. Inlined for each count: sums are then in registers. */
ALWAYS void multiply_tile(const uint8_t *tile, const Weight *w, const Rounded *x, int64_t first, int count, int bits,
                          int has_offsets, int has_table, Floats *out) {
    const int64_t runs = w->inputs / RUN;
    uint8_t four_tables[64] = {0};
    for (int i = 0; has_table && i < 64; i++)
        four_tables[i] = w->table[i & 15];
    const Bits table = load_bits(four_tables);
    Floats totals[TILE_ROWS];
    for (int r = 0; r < count; r++)
        totals[r] = (Floats){0};
    const int64_t code_bytes = w->group * OUTPUTS * bits / 8;
    for (int64_t input = 0; input < w->inputs; input += w->group) {
        const uint8_t *codes = tile;
        const Floats scale = from_half(tile + code_bytes);
        const Floats offset = has_offsets ? from_half(tile + code_bytes + 2 * OUTPUTS) : (Floats){0};
        tile += code_bytes + 2 * OUTPUTS * (1 + has_offsets);
        for (int64_t from = input; from < input + w->group; from += RUN) {
            const int64_t run = from / RUN;
            Ints sums[TILE_ROWS];
            for (int r = 0; r < count; r++)
                sums[r] = (Ints){0} - w->zero * x->sums[(first + r) * runs + run];
            for (int four = 0; four < RUN; four += 64 / (2 * bits)) {
                const Bits pair = load_bits(codes);
                codes += sizeof pair;
                Bits low = pair & 0x0f0f0f0fu, high = (pair >> 4) & 0x0f0f0f0fu;
                if (has_table) {
                    low = look_up(table, low);
                    high = look_up(table, high);
                }
                for (int r = 0; r < count; r++) {
                    const int8_t *inputs = x->q + (first + r) * x->inputs + from + four;
                    if (bits == 8) {
                        sums[r] = add_products(sums[r], pair, inputs);
                    } else {
                        sums[r] = add_products(sums[r], low, inputs);
                        sums[r] = add_products(sums[r], high, inputs + 4);
                    }
                }
            }
            for (int r = 0; r < count; r++) {
                const float step = x->steps[(first + r) * runs + run];
                totals[r] += __builtin_convertvector(sums[r], Floats) * (scale * step);
                if (has_offsets)
                    totals[r] += offset * (step * (float)x->sums[(first + r) * runs + run]);
            }
        }
    }
    for (int r = 0; r < count; r++)
        out[r] = totals[r];
}

ALWAYS void multiply_counted(const uint8_t *tile, const Weight *w, const Rounded *x, int64_t first, int count,
                             Floats *out) {
    if (w->bits == 8 && w->has_offsets)
        multiply_tile(tile, w, x, first, count, 8, 1, 0, out);
    else if (w->bits == 8)
        multiply_tile(tile, w, x, first, count, 8, 0, 0, out);
    else if (w->table)
        multiply_tile(tile, w, x, first, count, 4, 0, 1, out);
    else if (w->has_offsets)
        multiply_tile(tile, w, x, first, count, 4, 1, 0, out);
    else
        multiply_tile(tile, w, x, first, count, 4, 0, 0, out);
}

static void multiply_rows(const uint8_t *tile, const Weight *w, const Rounded *x, int64_t first, int64_t count,
                          Floats *out) {
    if (count == 8)
        multiply_counted(tile, w, x, first, 8, out);
    else if (count >= 4) {
        multiply_counted(tile, w, x, first, 4, out);
        multiply_rows(tile, w, x, first + 4, count - 4, out + 4);
    } else if (count >= 2) {
        multiply_counted(tile, w, x, first, 2, out);
        multiply_rows(tile, w, x, first + 2, count - 2, out + 2);
    } else if (count == 1)
        multiply_counted(tile, w, x, first, 1, out);
}

/* Round a row to 8 bits, RUN inputs at a time. A run that is not finite gets a step of NaN, and so do its products. */
static void round_row(const uint16_t *x, int64_t inputs, int8_t *q, float *steps, int32_t *sums) {
    for (int64_t run = 0; run < inputs / RUN; run++, x += RUN, q += RUN) {
        uint16_t largest = 0;
        for (int i = 0; i < RUN; i++) {
            const uint16_t size = x[i] & 0x7fff;
            largest = size > largest ? size : largest;
        }
        const float most = from_bfloat16(largest);
        const float per_step = most >= 0x1p-120f ? 127.0f / most : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < RUN; i++) {
            /* Added to 1.5 * 2^23, a number is rounded to an integer, which its last bits then are. */
            const float moved = from_bfloat16(x[i]) * per_step + 12582912.0f;
            int32_t bits;
            memcpy(&bits, &moved, sizeof bits);
            const int32_t rounded = bits - 0x4b400000;
            q[i] = (int8_t)rounded;
            sum += rounded;
        }
        steps[run] = largest < 0x7f80 ? most / 127.0f : __builtin_nanf("");
        sums[run] = largest < 0x7f80 ? sum : 0;
    }
}
