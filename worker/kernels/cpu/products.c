/* Products of a few rows with weights of 4 or 8 bits; `tiles.h` says how these lie. */

#include "tiles.h"

/* Write y [rows, outputs] = x [rows, inputs] times the weight's transpose, both bfloat16. `room` is for x, rounded:
   rows * (inputs + 8 * inputs / RUN) bytes. */
void mgpu_multiply(uint16_t *y, const uint16_t *x, int64_t rows, const uint8_t *bytes, int64_t outputs, int64_t inputs,
                   int64_t group, int32_t bits, int32_t zero, int32_t has_offsets, const uint8_t *table,
                   uint8_t *room) {
    const int64_t runs = inputs / RUN, tiles = (outputs + OUTPUTS - 1) / OUTPUTS;
    float *steps = (float *)room;
    int32_t *sums = (int32_t *)(steps + rows * runs);
    int8_t *q = (int8_t *)(sums + rows * runs);
    const Weight w = {bytes, outputs, inputs, group, bits, zero, has_offsets, table};
    const Rounded rounded = {q, steps, sums, rows, inputs};
    const int64_t group_bytes = group * OUTPUTS * bits / 8 + 2 * OUTPUTS * (1 + has_offsets);
    const int64_t tile_bytes = inputs / group * group_bytes;
#pragma omp parallel for schedule(static) if (rows > 16)
    for (int64_t row = 0; row < rows; row++)
        round_row(x + row * inputs, inputs, q + row * inputs, steps + row * runs, sums + row * runs);
#pragma omp parallel for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first_output = tile * OUTPUTS;
        const int64_t left = outputs - first_output, valid = left < OUTPUTS ? left : OUTPUTS;
        for (int64_t first = 0; first < rows; first += TILE_ROWS) {
            const int64_t count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
            Floats out[TILE_ROWS];
            multiply_rows(bytes + tile * tile_bytes, &w, &rounded, first, count, out);
            for (int64_t r = 0; r < count; r++) {
                uint16_t halves[OUTPUTS];
                store16(halves, out[r]);
                memcpy(y + (first + r) * outputs + first_output, halves, valid * sizeof *y);
            }
        }
    }
}
