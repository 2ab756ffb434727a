/* The experts of a layer for some tokens: down(act(gate(x)) * up(x)) of each chosen expert, weighted and added up.

   A pair is a token and one of its experts. Pairs are put in the order of experts, so that an expert's weights are read
   once for all of its tokens. Each phase is a loop over tasks of OUTPUTS outputs of one expert, shared by all threads:
   one call computes a layer, and may be made by a thread of CUDA's driver. Sums are in float32 and rounded once. */

#include <math.h>

#include "tiles.h"

enum { SILU, GELU, CLAMPED };

typedef struct {
    const uint8_t *const *matrices; /* of each expert: tiles, or [outputs, inputs] in bfloat16 */
    const uint16_t *biases;         /* [experts, outputs]; NULL: none */
    const uint8_t *table;
    int64_t outputs, inputs, group;
    int32_t bits, zero, has_offsets; /* 16 bits: bfloat16 */
} Stack;

typedef struct {
    Stack gate_up, down;
    const uint16_t *x;    /* [tokens, inputs] */
    const int32_t *ids;   /* [tokens, active]; experts of other ranks are left out */
    const float *weights; /* [tokens, active] */
    uint16_t *out;        /* [tokens, inputs] */
    uint8_t *room;        /* mgpu_experts_room bytes */
    int64_t tokens, active, first_expert, experts;
    float alpha, limit;
    int32_t activation, threads;
} Job;

/* Where the parts of a job's room are. */
typedef struct {
    int32_t *pairs, *starts; /* pairs in the order of experts; the first pair of each expert */
    int32_t *used;           /* experts that have any */
    float *y, *steps;
    int32_t *sums;
    uint16_t *gathered, *gate_up, *hidden;
    int8_t *q;
} Room;

ALWAYS int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t lay_out(const Job *job, Room *room, uint8_t *from) {
    const int64_t pairs = job->tokens * job->active, width = job->down.inputs, size = job->gate_up.inputs;
    const int64_t widest = size > width ? size : width;
    int64_t at = 0;
#define PART(field, bytes)                      \
    do {                                        \
        if (room)                               \
            room->field = (void *)(from + at);  \
        at += aligned(bytes);                   \
    } while (0)
    PART(pairs, 4 * pairs);
    PART(starts, 4 * (job->experts + 2));
    PART(used, 4 * job->experts);
    PART(y, 4 * pairs * size);
    PART(steps, 4 * pairs * (widest / RUN + 1));
    PART(sums, 4 * pairs * (widest / RUN + 1));
    PART(gathered, 2 * pairs * size);
    PART(gate_up, 2 * pairs * 2 * width);
    PART(hidden, 2 * pairs * width);
    PART(q, pairs * widest);
#undef PART
    return at;
}

int64_t mgpu_experts_room(const Job *job) { return lay_out(job, NULL, NULL); }

/* Sort the pairs of this rank by expert; return their number. */
static int64_t sort_pairs(const Job *job, const Room *room) {
    const int64_t all = job->tokens * job->active;
    int32_t *starts = room->starts;
    memset(starts, 0, 4 * (job->experts + 2));
    for (int64_t pair = 0; pair < all; pair++) {
        const int64_t expert = job->ids[pair] - job->first_expert;
        if (expert >= 0 && expert < job->experts)
            starts[expert + 2]++;
    }
    for (int64_t expert = 0; expert < job->experts; expert++)
        starts[expert + 2] += starts[expert + 1];
    for (int64_t pair = 0; pair < all; pair++) {
        const int64_t expert = job->ids[pair] - job->first_expert;
        if (expert >= 0 && expert < job->experts)
            room->pairs[starts[expert + 1]++] = (int32_t)pair;
    }
    return starts[job->experts];
}

/* Multiply `count` rows by `outputs` rows of a matrix in bfloat16. Inlined for each pair of counts: so many sums are in
   registers, and enough of them that no addition waits for the one before. */
ALWAYS void multiply_block(const uint16_t *matrix, int64_t inputs, const uint16_t *x, int count, int outputs,
                           int64_t at, Floats *out) {
    Floats sums[4][TILE_ROWS];
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < count; r++)
            sums[o][r] = (Floats){0};
    int64_t i = 0;
#if defined(__AVX512BF16__)
    for (; i + 2 * LANES <= inputs; i += 2 * LANES)
        for (int o = 0; o < outputs; o++) {
            const __m512bh w = (__m512bh)_mm512_loadu_si512(matrix + (at + o) * inputs + i);
            for (int r = 0; r < count; r++)
                sums[o][r] = (Floats)_mm512_dpbf16_ps((__m512)sums[o][r], w,
                                                      (__m512bh)_mm512_loadu_si512(x + r * inputs + i));
        }
#endif
    for (; i + LANES <= inputs; i += LANES)
        for (int o = 0; o < outputs; o++) {
            const Floats w = load16(matrix + (at + o) * inputs + i);
            for (int r = 0; r < count; r++)
                sums[o][r] += w * load16(x + r * inputs + i);
        }
    for (int o = 0; o < outputs; o++)
        for (int r = 0; r < count; r++) {
            float sum = sum_lanes(sums[o][r]);
            for (int64_t left = i; left < inputs; left++)
                sum += from_bfloat16(matrix[(at + o) * inputs + left]) * from_bfloat16(x[r * inputs + left]);
            out[r][at + o] = sum;
        }
}

ALWAYS void multiply_dense(const uint16_t *matrix, int64_t inputs, const uint16_t *x, int count, int64_t valid,
                           Floats *out) {
    int64_t at = 0;
    for (; at + 4 <= valid; at += 4)
        if (count < 8) {
            multiply_block(matrix, inputs, x, count, 4, at, out);
        } else {
            multiply_block(matrix, inputs, x, count, 2, at, out);
            multiply_block(matrix, inputs, x, count, 2, at + 2, out);
        }
    for (; at < valid; at++)
        multiply_block(matrix, inputs, x, count, 1, at, out);
}

static void multiply_dense_rows(const uint16_t *matrix, int64_t inputs, const uint16_t *x, int64_t count, int64_t valid,
                                Floats *out) {
    if (count == 8)
        multiply_dense(matrix, inputs, x, 8, valid, out);
    else if (count >= 4) {
        multiply_dense(matrix, inputs, x, 4, valid, out);
        multiply_dense_rows(matrix, inputs, x + 4 * inputs, count - 4, valid, out + 4);
    } else if (count >= 2) {
        multiply_dense(matrix, inputs, x, 2, valid, out);
        multiply_dense_rows(matrix, inputs, x + 2 * inputs, count - 2, valid, out + 2);
    } else if (count == 1)
        multiply_dense(matrix, inputs, x, 1, valid, out);
}

/* Multiply all rows of an expert by OUTPUTS outputs of its matrix. The result goes to `wide` or to `narrow`. */
static void multiply_task(const Stack *stack, const Room *room, const uint16_t *x, int64_t expert, int64_t tile,
                          int64_t pairs, float *wide, uint16_t *narrow) {
    const int64_t first_output = tile * OUTPUTS, left = stack->outputs - first_output;
    const int64_t valid = left < OUTPUTS ? left : OUTPUTS;
    const int64_t begin = room->starts[expert], end = room->starts[expert + 1];
    const uint8_t *matrix = stack->matrices[expert];
    const Weight w = {matrix,      stack->outputs,     stack->inputs, stack->group, stack->bits,
                      stack->zero, stack->has_offsets, stack->table};
    const Rounded rounded = {room->q, room->steps, room->sums, pairs, stack->inputs};
    const int64_t group_bytes = stack->group * OUTPUTS * stack->bits / 8 + 2 * OUTPUTS * (1 + stack->has_offsets);
    const int64_t tile_bytes = stack->bits == 16 ? 0 : stack->inputs / stack->group * group_bytes;
    float biases[OUTPUTS] = {0};
    for (int64_t i = 0; stack->biases && i < valid; i++)
        biases[i] = from_bfloat16(stack->biases[expert * stack->outputs + first_output + i]);
    for (int64_t first = begin; first < end; first += TILE_ROWS) {
        const int64_t count = end - first < TILE_ROWS ? end - first : TILE_ROWS;
        Floats out[TILE_ROWS];
        if (stack->bits == 16)
            multiply_dense_rows((const uint16_t *)matrix + first_output * stack->inputs, stack->inputs,
                                x + first * stack->inputs, count, valid, out);
        else
            multiply_rows(matrix + tile * tile_bytes, &w, &rounded, first, count, out);
        for (int64_t r = 0; r < count; r++)
            for (int64_t i = 0; i < valid; i++) {
                const int64_t at = (first + r) * stack->outputs + first_output + i;
                if (wide)
                    wide[at] = out[r][i] + biases[i];
                else
                    narrow[at] = to_bfloat16(out[r][i] + biases[i]);
            }
    }
}

ALWAYS float gated(const Job *job, float gate, float up) {
    if (job->activation == CLAMPED) {
        gate = gate > job->limit ? job->limit : gate;
        up = up > job->limit ? job->limit : up < -job->limit ? -job->limit : up;
        return (up + 1) * gate / (1 + expf(-gate * job->alpha));
    }
    if (job->activation == GELU)
        return 0.5f * gate * (1 + tanhf(0.7978845608f * (gate + 0.044715f * gate * gate * gate))) * up;
    return gate / (1 + expf(-gate)) * up;
}

void mgpu_experts(const Job *job) {
    Room parts;
    lay_out(job, &parts, job->room);
    const Room *room = &parts;
    const int64_t pairs = sort_pairs(job, room), size = job->gate_up.inputs, width = job->down.inputs;
    const int64_t wide_tiles = (2 * width + OUTPUTS - 1) / OUTPUTS, tiles = (size + OUTPUTS - 1) / OUTPUTS;
    const int64_t all = job->tokens * job->active;
    int64_t used = 0;
    for (int64_t expert = 0; expert < job->experts; expert++)
        if (room->starts[expert + 1] > room->starts[expert])
            room->used[used++] = (int32_t)expert;
    const int64_t runs = size / RUN, hidden_runs = width / RUN;
    /* The place of each pair among those in order, for the sums: what `pairs` says, the other way round. */
    int32_t *places = (int32_t *)room->gate_up;
#pragma omp parallel num_threads(job->threads)
    {
#pragma omp for schedule(static)
        for (int64_t at = 0; at < pairs; at++) {
            const uint16_t *row = job->x + room->pairs[at] / job->active * size;
            if (job->gate_up.bits == 16)
                memcpy(room->gathered + at * size, row, 2 * size);
            else
                round_row(row, size, room->q + at * size, room->steps + at * runs, room->sums + at * runs);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < used * wide_tiles; task++)
            multiply_task(&job->gate_up, room, room->gathered, room->used[task / wide_tiles], task % wide_tiles, pairs,
                          NULL, room->gate_up);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < pairs; at++) {
            const uint16_t *gate = room->gate_up + at * 2 * width, *up = gate + width;
            uint16_t *to = room->hidden + at * width;
            for (int64_t i = 0; i < width; i++)
                to[i] = to_bfloat16(gated(job, from_bfloat16(gate[i]), from_bfloat16(up[i])));
            if (job->down.bits != 16)
                round_row(to, width, room->q + at * width, room->steps + at * hidden_runs,
                          room->sums + at * hidden_runs);
        }
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < used * tiles; task++)
            multiply_task(&job->down, room, room->hidden, room->used[task / tiles], task % tiles, pairs, room->y, NULL);
#pragma omp single
        {
            for (int64_t pair = 0; pair < all; pair++)
                places[pair] = -1;
            for (int64_t at = 0; at < pairs; at++)
                places[room->pairs[at]] = (int32_t)at;
        }
#pragma omp for schedule(static)
        for (int64_t token = 0; token < job->tokens; token++) {
            uint16_t *to = job->out + token * size;
            for (int64_t i = 0; i < size; i++) {
                float sum = 0;
                for (int64_t a = 0; a < job->active; a++) {
                    const int32_t at = places[token * job->active + a];
                    if (at >= 0)
                        sum += job->weights[token * job->active + a] * room->y[at * size + i];
                }
                to[i] = to_bfloat16(sum);
            }
        }
    }
}
