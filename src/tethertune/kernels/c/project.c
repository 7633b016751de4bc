/* The projection of all blocks of a constraint in one call: rows onto l1 balls, layers onto Frobenius balls. */
#include <stdlib.h>

#include "ball.h"
#include "parallel.h"

struct operations {
    void (*rows)(struct block *block, int64_t first, int64_t last, int projection);
    double (*squares)(const void *w, const void *c, int64_t n);
    double (*exact_squares)(const void *w, const void *c, int64_t n);
    double (*floor_of)(const void *c, int64_t n);
    void (*scale)(void *w, const void *c, int64_t n, double s);
    void (*fit)(void *w, const void *c, int64_t n, double s, double budget);
};

#define PAIR_BODY "layer.inc"
#include "pairs.inc"
#undef PAIR_BODY

#define ROW(W) {&operations_##W##_f32, &operations_##W##_bf16, &operations_##W##_f16, &operations_##W##_zero}
static const struct operations *const OPERATIONS[3][4] = {ROW(f32), ROW(bf16), ROW(f16)};
#undef ROW

static const int64_t BYTES[] = {[F32] = 4, [BF16] = 2, [F16] = 2, [ZERO] = 0};

static const struct operations *operations_of(const struct block *block) {
    return OPERATIONS[block->w_type][block->c_type];
}

static int64_t bytes_of(const struct block *block) { return BYTES[block->w_type] + BYTES[block->c_type]; }

/* ---------------------------------------------------------------------------------------------------------- rows */

struct rows_loop {
    struct block *blocks;
    int projection;
};

static void rows_of_block(void *context, int64_t i, int64_t *rows, int64_t *bytes) {
    const struct block *block = ((struct rows_loop *)context)->blocks + i;
    *rows = block->rows;
    *bytes = block->columns * bytes_of(block) + 16;
}

static void project_rows(void *context, int64_t i, int64_t first, int64_t last) {
    struct rows_loop *loop = context;
    operations_of(loop->blocks + i)->rows(loop->blocks + i, first, last, loop->projection);
}

/* Project every row of every block; returns how many are not finite and were left as they are. */
int64_t tethertune_rows(struct block *blocks, int64_t count, int projection, int threads) {
    for (int64_t i = 0; i < count; i++) blocks[i].outside = blocks[i].broken = 0;
    run_parallel(&(struct rows_loop){blocks, projection}, project_rows, rows_of_block, count, threads);
    int64_t broken = 0;
    for (int64_t i = 0; i < count; i++) broken += blocks[i].broken;
    return broken;
}

/* ----------------------------------------------------------------------------------------------------- Frobenius */

/* What is to be done with a layer, in this order. */
enum stage { MEASURE, MEASURE_EXACTLY, SCALE, FIT, DONE };

struct layer {
    struct block *block;
    enum stage stage;
    double factor;         /* SCALE, FIT: of the displacement */
    double *sums, *floors; /* of each piece */
};

static void piece(const struct block *block, int64_t number, char **w, const char **c, int64_t *n) {
    int64_t in_row = (block->columns + PIECE - 1) / PIECE;
    int64_t row = number / in_row, start = number % in_row * PIECE;
    *w = (char *)block->w + (row * block->w_step + start) * BYTES[block->w_type];
    *c = (const char *)block->c + (row * block->c_step + start) * BYTES[block->c_type];
    *n = block->columns - start < PIECE ? block->columns - start : PIECE;
}

/* Backwards, because the last pieces are the ones that a measure before has left in the cache. */
static void work_on_pieces(void *context, int64_t i, int64_t first, int64_t last) {
    struct layer *layer = (struct layer *)context + i;
    const struct operations *of = operations_of(layer->block);
    for (int64_t k = last - 1; k >= first; k--) {
        char *w;
        const char *c;
        int64_t n;
        piece(layer->block, k, &w, &c, &n);
        switch (layer->stage) {
            case MEASURE: layer->sums[k] = of->squares(w, c, n); break;
            case MEASURE_EXACTLY:
                layer->sums[k] = of->exact_squares(w, c, n);
                layer->floors[k] = of->floor_of(c, n);
                break;
            case SCALE: of->scale(w, c, n, layer->factor); break;
            case FIT:
                of->fit(w, c, n, layer->factor * (1 - MARGIN), layer->factor * layer->factor * layer->sums[k] + layer->floors[k]);
                break;
            case DONE: break;
        }
    }
}

static void pieces_of_layer(void *context, int64_t i, int64_t *pieces, int64_t *bytes) {
    const struct layer *layer = (struct layer *)context + i;
    int64_t length = layer->block->columns < PIECE ? layer->block->columns : PIECE;
    *pieces = layer->stage == DONE ? 0 : pieces_of(layer->block);
    *bytes = length * bytes_of(layer->block) + 16;
}

static double total_of(const struct layer *layer, const double *values) {
    double total = 0;
    for (int64_t k = 0; k < pieces_of(layer->block); k++) total += values[k];
    return total;
}

static void after_measure(struct layer *layer) {
    double distance = sqrt(total_of(layer, layer->sums)), radius = layer->block->radius[0];
    int surely = distance > fmax(radius * (1 + ERROR), SMALLEST) && distance < FAR * radius && isfinite(distance);
    layer->stage = MEASURE_EXACTLY;
    if (distance > SMALLEST && distance <= radius * (1 - ERROR)) {
        layer->stage = DONE;
    } else if (surely && layer->block->w_type == F32 && radius >= least_radius(layer->block->size)) {
        layer->stage = SCALE;
        layer->factor = radius * (1 - AIM) / distance;
    }
}

static void after_exact_measure(struct layer *layer) {
    double total = total_of(layer, layer->sums), radius = layer->block->radius[0];
    layer->stage = DONE;
    if (!isfinite(total)) {
        layer->block->broken = 1;
    } else if (sqrt(total) > radius) {
        layer->stage = FIT;
        layer->factor = sqrt(fmax(radius * radius * (1 - MARGIN) - total_of(layer, layer->floors), 0) / total);
    }
}

/* Layers that have been measured. */
static void settle_layers(struct layer *layers, int64_t count, int threads) {
    for (int64_t i = 0; i < count; i++) after_measure(layers + i);
    /* What is surely outside is scaled now, while it is in the cache; the rest is measured again. */
    run_parallel(layers, work_on_pieces, pieces_of_layer, count, threads);
    for (int64_t i = 0; i < count; i++) {
        layers[i].block->outside = layers[i].stage == SCALE;
        if (layers[i].stage == SCALE) layers[i].stage = DONE;
        if (layers[i].stage != MEASURE_EXACTLY) continue;
        after_exact_measure(layers + i);
        layers[i].block->outside = layers[i].stage == FIT;
    }
    run_parallel(layers, work_on_pieces, pieces_of_layer, count, threads);
}

enum { GROUP = 8 << 20 }; /* bytes that stay in the cache from one loop over them to the next */

static struct layer *make_layers(struct block *blocks, int64_t count, double *sums, double *floors) {
    struct layer *layers = malloc((size_t)(count + 1) * sizeof *layers);
    for (int64_t i = 0; layers && i < count; i++) {
        layers[i] = (struct layer){blocks + i, MEASURE, 0, sums, floors};
        sums += pieces_of(blocks + i);
        floors += pieces_of(blocks + i);
        blocks[i].outside = blocks[i].broken = 0;
    }
    return layers;
}

static int64_t all_pieces(const struct block *blocks, int64_t count) {
    int64_t pieces = 0;
    for (int64_t i = 0; i < count; i++) pieces += pieces_of(blocks + i);
    return pieces;
}

static int64_t all_broken(const struct block *blocks, int64_t count) {
    int64_t broken = 0;
    for (int64_t i = 0; i < count; i++) broken += blocks[i].broken;
    return broken;
}

int64_t settle_frobenius(struct block *blocks, int64_t count, double *sums, int threads) {
    double *floors = malloc((size_t)(all_pieces(blocks, count) + 1) * sizeof *floors);
    struct layer *layers = floors ? make_layers(blocks, count, sums, floors) : NULL;
    if (layers) settle_layers(layers, count, threads);
    int64_t broken = layers ? all_broken(blocks, count) : -1;
    free(layers);
    free(floors);
    return broken;
}

/* Project every layer, one block each; returns how many are not finite and were left as they are; -1 without memory.
 * Sums of pieces are added up in order, so that the result does not depend on the number of threads. */
int64_t tethertune_frobenius(struct block *blocks, int64_t count, int threads) {
    int64_t pieces = all_pieces(blocks, count);
    double *sums = malloc((size_t)(2 * pieces + 1) * sizeof *sums);
    struct layer *layers = sums ? make_layers(blocks, count, sums, sums + pieces) : NULL;
    for (int64_t start = 0, end; layers && start < count; start = end) {
        int64_t bytes = 0;
        for (end = start; end < count && bytes < GROUP; end++) {
            bytes += blocks[end].rows * blocks[end].columns * bytes_of(blocks + end);
        }
        run_parallel(layers + start, work_on_pieces, pieces_of_layer, end - start, threads);
        settle_layers(layers + start, end - start, threads);
    }
    int64_t broken = layers ? all_broken(blocks, count) : -1;
    free(layers);
    free(sums);
    return broken;
}
