/* The (sub)gradients of penalties, added to the stored gradients of all layers in one call.
 *
 * Gradients have the types of their weights and lie in memory as these do. A factor is all that multiplies a layer's
 * displacement (l2-SP) or its signs (MARS-SP).
 */
#include <stdlib.h>

#include "ball.h"
#include "parallel.h"

struct pulls {
    double (*distance_of_row)(const struct block *block, int64_t row, int exactly);
    void (*add_sign)(const struct block *block, void *gradient, int64_t row, float factor);
    void (*add_displacement)(const struct block *block, void *gradient, int64_t first, int64_t last, float factor);
};

#define PAIR_BODY "pull.inc"
#include "pairs.inc"
#undef PAIR_BODY

#define ROW(W) {&pulls_##W##_f32, &pulls_##W##_bf16, &pulls_##W##_f16, &pulls_##W##_zero}
static const struct pulls *const PULLS[3][4] = {ROW(f32), ROW(bf16), ROW(f16)};
#undef ROW

static const struct pulls *pulls_of(const struct block *block) { return PULLS[block->w_type][block->c_type]; }

struct layers {
    const struct block *blocks;
    void *const *gradients;
    const double *factors;
    double **distances; /* of the rows of each layer */
};

/* --------------------------------------------------------------------------------------------------------- l2-SP */

static void pieces_of_block(void *context, int64_t i, int64_t *pieces, int64_t *bytes) {
    const struct block *block = ((struct layers *)context)->blocks + i;
    *pieces = pieces_of(block);
    *bytes = 16 * (block->columns < PIECE ? block->columns : PIECE);
}

static void add_to_pieces(void *context, int64_t i, int64_t first, int64_t last) {
    const struct layers *layers = context;
    const struct block *block = layers->blocks + i;
    int64_t end = last * PIECE < block->columns ? last * PIECE : block->columns;
    pulls_of(block)->add_displacement(block, layers->gradients[i], first * PIECE, end, (float)layers->factors[i]);
}

/* Add factor * (W - c) to the gradient of every layer, each a block of one row. Returns 0. */
int tethertune_pull_squares(
    const struct block *blocks, void *const *gradients, const double *factors, int64_t count, int threads
) {
    struct layers layers = {blocks, gradients, factors, NULL};
    run_parallel(&layers, add_to_pieces, pieces_of_block, count, threads);
    return 0;
}

/* ------------------------------------------------------------------------------------------------------- MARS-SP */

static void rows_of_block(void *context, int64_t i, int64_t *rows, int64_t *bytes) {
    const struct block *block = ((struct layers *)context)->blocks + i;
    *rows = block->rows;
    *bytes = 8 * block->columns + 16;
}

static void measure_rows(void *context, int64_t i, int64_t first, int64_t last) {
    const struct layers *layers = context;
    const struct block *block = layers->blocks + i;
    for (int64_t row = first; row < last; row++) {
        layers->distances[i][row] = pulls_of(block)->distance_of_row(block, row, 0);
    }
}

/* The first of the largest rows; those that float32 cannot tell apart are measured in double. */
static int64_t largest_row(const struct block *block, const double *distances) {
    int64_t largest = 0, near = 0;
    for (int64_t row = 1; row < block->rows && !isnan(distances[largest]); row++) {
        if (!(distances[row] <= distances[largest])) largest = row;
    }
    double from = distances[largest] * (1 - 4 * ERROR);
    for (int64_t row = 0; row < block->rows; row++) near += distances[row] >= from;
    double most = -1;
    for (int64_t row = 0; near > 1 && row < block->rows; row++) {
        if (distances[row] < from) continue;
        double exact = pulls_of(block)->distance_of_row(block, row, 1);
        if (exact > most) most = exact, largest = row;
    }
    return largest;
}

/* Add factor * sign(t) to the gradient of every layer, one block each, in its largest row. Returns 0, or -1 without
 * memory. */
int tethertune_pull_rows(
    const struct block *blocks, void *const *gradients, const double *factors, int64_t count, int threads
) {
    int64_t rows = 0;
    for (int64_t i = 0; i < count; i++) rows += blocks[i].rows;
    double **distances = malloc((size_t)(count + 1) * sizeof *distances);
    double *all = malloc((size_t)(rows + 1) * sizeof *all);
    if (distances && all) {
        double *next = all;
        for (int64_t i = 0; i < count; i++) {
            distances[i] = next;
            next += blocks[i].rows;
        }
        struct layers layers = {blocks, gradients, factors, distances};
        run_parallel(&layers, measure_rows, rows_of_block, count, threads);
        for (int64_t i = 0; i < count; i++) {
            int64_t row = largest_row(blocks + i, distances[i]);
            pulls_of(blocks + i)->add_sign(blocks + i, gradients[i], row, (float)factors[i]);
        }
    }
    int failed = distances && all ? 0 : -1;
    free(distances);
    free(all);
    return failed;
}
