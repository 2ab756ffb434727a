/* What a layer does between its products, in bfloat16 with sums in float32. Sizes are multiples of 16. */

#include "vectors.h"

#include <math.h>

enum { QUERIES = 4, KEYS = 64, LARGEST_HEAD = 512, SERIAL_ROWS = 16 };

/* Add delta, unless it is null, to the residual rows, and write their norm: x / sqrt(mean of squares + eps) * weight. */
void mgpu_add_norm(uint16_t *out, uint16_t *residual, const uint16_t *delta, const uint16_t *weight, int64_t rows,
                   int64_t size, float eps) {
#pragma omp parallel for schedule(static) if (rows > SERIAL_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        uint16_t *x = residual + row * size, *y = out + row * size;
        Floats squares = {0};
        for (int64_t i = 0; i < size; i += LANES) {
            if (delta)
                store16(x + i, load16(x + i) + load16(delta + row * size + i));
            const Floats values = load16(x + i);
            squares += values * values;
        }
        const float scale = 1.0f / sqrtf(sum_lanes(squares) / (float)size + eps);
        for (int64_t i = 0; i < size; i += LANES)
            store16(y + i, load16(x + i) * scale * load16(weight + i));
    }
}

/* Write gate * sigmoid(gate) * up of rows [gate, up]. `is_gelu`: GELU by its tanh, which is a sigmoid of another sum. */
void mgpu_gate(uint16_t *out, const uint16_t *gate_up, int64_t rows, int64_t size, int32_t is_gelu) {
#pragma omp parallel for schedule(static) if (rows > SERIAL_ROWS)
    for (int64_t row = 0; row < rows; row++) {
        const uint16_t *gate = gate_up + row * 2 * size;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats x = load16(gate + i);
            Floats power = x * -1.44269504f;
            if (is_gelu)
                power *= 1.59576912f * (1.0f + 0.044715f * x * x);
            /* Up to 2^126, so that 1 + 2^power is finite; x times the sigmoid is 0 in bfloat16 long before. */
            const Ints is_large = power > 126.0f;
            power = (Floats)((~is_large & (Ints)power) | (is_large & (Ints)((Floats){0} + 126.0f)));
            store16(out + row * size + i, x / (1.0f + power_of_2(power)) * load16(gate + size + i));
        }
    }
}

/* Rotate the heads [rows, heads, size] of rows that are `stride` apart: x * cos + (x, its halves exchanged) * sin. */
void mgpu_rotate(uint16_t *out, const uint16_t *x, int64_t stride, const uint16_t *cosines, const uint16_t *sines,
                 int64_t rows, int64_t heads, int64_t size) {
#pragma omp parallel for schedule(static) if (rows > SERIAL_ROWS)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t head = 0; head < heads; head++) {
            const uint16_t *from = x + row * stride + head * size;
            uint16_t *to = out + (row * heads + head) * size;
            for (int64_t i = 0; i < size; i += LANES) {
                const int64_t other = i < size / 2 ? i + size / 2 : i - size / 2;
                store16(to + i, load16(from + i) * load16(cosines + row * size + i) +
                                    load16(from + other) * load16(sines + row * size + i));
            }
        }
}

/* Attend with `count` query heads, at most QUERIES, of one row and one KV head, KEYS keys at a time: sums so far are
   multiplied anew when a larger score comes. Inlined for each count. */
ALWAYS void attend_heads(uint16_t *out, const uint16_t *queries, const uint16_t *k, const uint16_t *v,
                         const int64_t *slots, int64_t num_slots, int64_t slot_size, int64_t size, float scale,
                         int count) {
    Floats totals[QUERIES][LARGEST_HEAD / LANES], wide[QUERIES][LARGEST_HEAD / LANES];
    float largest[QUERIES], sums[QUERIES];
    const int64_t parts = size / LANES;
    for (int g = 0; g < count; g++) {
        largest[g] = -INFINITY;
        sums[g] = 0;
        for (int64_t part = 0; part < parts; part++) {
            totals[g][part] = (Floats){0};
            wide[g][part] = load16(queries + g * size + part * LANES) * (scale * 1.44269504f);
        }
    }
    for (int64_t first = 0; first < num_slots; first += KEYS) {
        const int64_t keys = num_slots - first < KEYS ? num_slots - first : KEYS;
        float scores[QUERIES][KEYS] __attribute__((aligned(64)));
        for (int64_t s = 0; s < keys; s++) {
            const uint16_t *key = k + slots[first + s] * slot_size;
            Floats products[QUERIES];
            for (int g = 0; g < count; g++)
                products[g] = (Floats){0};
            for (int64_t part = 0; part < parts; part++) {
                const Floats values = load16(key + part * LANES);
                for (int g = 0; g < count; g++)
                    products[g] += values * wide[g][part];
            }
            for (int g = 0; g < count; g++)
                scores[g][s] = sum_lanes(products[g]);
        }
        for (int g = 0; g < count; g++) {
            for (int64_t s = keys; s < KEYS; s++)
                scores[g][s] = -INFINITY;
            Floats highest = (Floats){0} - INFINITY;
            for (int s = 0; s < KEYS; s += LANES) {
                const Floats these = *(const Floats *)(scores[g] + s);
                const Ints is_higher = these > highest;
                highest = (Floats)((is_higher & (Ints)these) | (~is_higher & (Ints)highest));
            }
            const float before = largest[g], found = largest_lane(highest);
            largest[g] = found > before ? found : before;
            const float kept = power_of_2((Floats){0} + (before - largest[g]))[0];
            Floats sum = {0};
            for (int s = 0; s < KEYS; s += LANES) {
                Floats *these = (Floats *)(scores[g] + s);
                const Ints is_past = *these == -INFINITY;
                *these = (Floats)(~is_past & (Ints)power_of_2(*these - largest[g]));
                sum += *these;
            }
            sums[g] = sums[g] * kept + sum_lanes(sum);
            for (int64_t part = 0; part < parts; part++)
                totals[g][part] *= kept;
        }
        for (int64_t part = 0; part < parts; part++) {
            Floats total[QUERIES];
            for (int g = 0; g < count; g++)
                total[g] = totals[g][part];
            for (int64_t s = 0; s < keys; s++) {
                const Floats values = load16(v + slots[first + s] * slot_size + part * LANES);
                for (int g = 0; g < count; g++)
                    total[g] += values * scores[g][s];
            }
            for (int g = 0; g < count; g++)
                totals[g][part] = total[g];
        }
    }
    for (int g = 0; g < count; g++)
        for (int64_t part = 0; part < parts; part++)
            store16(out + g * size + part * LANES, totals[g][part] / sums[g]);
}

/* Write the attention of queries [rows, kv_heads * group, size], rows `stride` apart, to the slots that each row sees:
   the first counts[row] of slots [rows, most]. Slot n of the cache has kv_heads keys, or values, of `size`. */
void mgpu_attend(uint16_t *out, const uint16_t *queries, int64_t stride, const uint16_t *k, const uint16_t *v,
                 const int64_t *slots, const int64_t *counts, int64_t rows, int64_t most, int64_t kv_heads,
                 int64_t group, int64_t size, float scale) {
#pragma omp parallel for collapse(2) schedule(dynamic) if (rows * kv_heads * most > 256)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
            for (int64_t first = 0; first < group; first += QUERIES) {
                const int64_t head = kv_head * group + first, left = group - first;
                uint16_t *to = out + (row * kv_heads * group + head) * size;
                const uint16_t *from = queries + row * stride + head * size;
                const uint16_t *keys = k + kv_head * size, *values = v + kv_head * size;
                const int64_t *seen = slots + row * most;
#define ATTEND(count) attend_heads(to, from, keys, values, seen, counts[row], kv_heads * size, size, scale, count)
                if (left >= 4)
                    ATTEND(4);
                else if (left == 3)
                    ATTEND(3);
                else if (left == 2)
                    ATTEND(2);
                else
                    ATTEND(1);
            }
}
