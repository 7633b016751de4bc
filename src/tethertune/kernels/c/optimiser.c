/* The step of Adam, AdamW and SGD and the projection in one pass: a stretch of weights is updated, and measured while it
 * is in the cache. The arithmetic of an update is that of PyTorch's own fused kernels; how a row is settled is row.inc,
 * how a layer is settled project.c. Weights and the optimiser's state are float32, gapless, in one order of elements.
 */
#include <stdlib.h>

#include "ball.h"
#include "parallel.h"

enum { ADAM, ADAMW, SGD }; /* kernels/one_pass.py has the same structs */
enum { STRETCH = 2048 };   /* elements that are updated before they are measured; FLUSH, so that sums are the same */

/* The options of a parameter group. */
struct rule {
    double lr, beta1, beta2, eps, decay, momentum, dampening;
    int32_t kind, amsgrad, nesterov, maximize;
};

/* What belongs to the weights of a block. Adam: averages of gradients and of squares, the largest of these (AMSGrad) and
 * the number of steps, counted here. SGD: momentum in `first`. A block without a radius is updated only. */
struct state {
    float *first, *second, *largest, *steps;
    int64_t fresh; /* SGD: the momentum holds nothing yet */
};

/* A rule at one step, in the precision of the weights. */
struct pace {
    float sign, decay, keep, blend, beta2, rest2, scale2, eps, rate, momentum, share;
};

struct work {
    const struct rule *rule;
    struct block *blocks;
    const struct state *states;
    const float *const *grads;
    const struct pace *paces;
    double **sums; /* of the pieces of each layer with a Frobenius ball; NULL: balls of rows, or none */
};

static struct pace pace_of(const struct rule *rule, double steps) {
    double first = 1 - pow(rule->beta1, steps), second = 1 - pow(rule->beta2, steps);
    int adam = rule->kind != SGD;
    return (struct pace){
        .sign = rule->maximize ? -1 : 1,
        .decay = rule->decay,
        .keep = rule->kind == ADAMW ? 1 - rule->lr * rule->decay : 1,
        .blend = 1 - rule->beta1,
        .beta2 = rule->beta2,
        .rest2 = 1 - rule->beta2,
        .scale2 = 1 / sqrt(second),
        .eps = rule->eps,
        .rate = adam ? -rule->lr / first : -rule->lr,
        .momentum = rule->momentum,
        .share = 1 - rule->dampening,
    };
}

/* -------------------------------------------------------------------------------------------------------- updates */

#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

/* `coupled`: weight decay is a part of the gradient. Constant like `amsgrad` wherever it is passed. */
INLINE void adam_loop(
    struct pace at, float *restrict w, const float *restrict grad, float *restrict first, float *restrict second,
    float *restrict largest, int64_t n, const int coupled, const int amsgrad
) {
    int near = at.blend < 0.5f; /* which end an average is taken from, so that beta1 = 0 gives the gradient itself */
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * at.sign;
        if (coupled) g += w[i] * at.decay;
        float mean = near ? first[i] + at.blend * (g - first[i]) : g + (at.blend - 1) * (g - first[i]);
        float square = second[i] * at.beta2 + at.rest2 * g * g;
        first[i] = mean;
        second[i] = square;
        if (amsgrad) {
            square = largest[i] > square || largest[i] != largest[i] ? largest[i] : square;
            largest[i] = square;
        }
        w[i] = w[i] * at.keep + at.rate * mean / (sqrtf(square) * at.scale2 + at.eps);
    }
}

enum { NONE, FIRST, LATER }; /* momentum: not used, at its first step, from then on */

INLINE void sgd_loop(
    struct pace at, float *restrict w, const float *restrict grad, float *restrict first, int64_t n, const int coupled,
    const int momentum, const int nesterov
) {
    INDEPENDENT
    for (int64_t i = 0; i < n; i++) {
        float g = grad[i] * at.sign;
        if (coupled) g += w[i] * at.decay;
        if (momentum) {
            float mean = momentum == FIRST ? g : first[i] * at.momentum + at.share * g;
            first[i] = mean;
            g = nesterov ? g + at.momentum * mean : mean;
        }
        w[i] += g * at.rate;
    }
}

static void adam(
    const struct rule *rule, struct pace at, float *w, const float *g, float *m, float *v, float *top, int64_t n
) {
    int coupled = rule->kind == ADAM && rule->decay != 0;
    if (rule->amsgrad) {
        coupled ? adam_loop(at, w, g, m, v, top, n, 1, 1) : adam_loop(at, w, g, m, v, top, n, 0, 1);
    } else {
        coupled ? adam_loop(at, w, g, m, v, NULL, n, 1, 0) : adam_loop(at, w, g, m, v, NULL, n, 0, 0);
    }
}

INLINE void sgd_momentum(
    struct pace at, float *w, const float *g, float *m, int64_t n, const int coupled, int fresh, int nesterov
) {
    if (fresh) {
        nesterov ? sgd_loop(at, w, g, m, n, coupled, FIRST, 1) : sgd_loop(at, w, g, m, n, coupled, FIRST, 0);
    } else {
        nesterov ? sgd_loop(at, w, g, m, n, coupled, LATER, 1) : sgd_loop(at, w, g, m, n, coupled, LATER, 0);
    }
}

static void sgd(
    const struct rule *rule, struct pace at, float *w, const float *g, float *m, int64_t n, int fresh
) {
    if (rule->momentum == 0) {
        rule->decay ? sgd_loop(at, w, g, NULL, n, 1, NONE, 0) : sgd_loop(at, w, g, NULL, n, 0, NONE, 0);
    } else if (rule->decay) {
        sgd_momentum(at, w, g, m, n, 1, fresh, rule->nesterov);
    } else {
        sgd_momentum(at, w, g, m, n, 0, fresh, rule->nesterov);
    }
}

/* Elements [start, start + n) of a block. */
static void update(const struct work *work, int64_t i, int64_t start, int64_t n) {
    const struct state *state = work->states + i;
    const float *grad = work->grads[i] + start;
    float *w = (float *)work->blocks[i].w + start, *first = state->first ? state->first + start : NULL;
    if (work->rule->kind == SGD) {
        sgd(work->rule, work->paces[i], w, grad, first, n, state->fresh != 0);
    } else {
        float *largest = state->largest ? state->largest + start : NULL;
        adam(work->rule, work->paces[i], w, grad, first, state->second + start, largest, n);
    }
}

/* ---------------------------------------------------------------------------------- rows and layers, by type of centre */

#define PAIR_BODY "stretch.inc"
#define W f32
#include "centres.inc"
#undef W
#undef PAIR_BODY

typedef void update_range(const struct work *work, int64_t i, int64_t first, int64_t last);
static update_range *const ROWS[] = {update_rows_f32_f32, update_rows_f32_bf16, update_rows_f32_f16, update_rows_f32_zero};
static update_range *const PIECES[] = {
    update_pieces_f32_f32, update_pieces_f32_bf16, update_pieces_f32_f16, update_pieces_f32_zero,
};

static int by_row(const struct work *work, int64_t i) { return work->blocks[i].radius && !work->sums; }

static void update_some(void *context, int64_t i, int64_t first, int64_t last) {
    const struct work *work = context;
    const struct block *block = work->blocks + i;
    if (by_row(work, i)) {
        ROWS[block->c_type](work, i, first, last);
    } else if (work->sums) {
        PIECES[block->c_type](work, i, first, last);
    } else {
        int64_t end = last * PIECE < block->columns ? last * PIECE : block->columns;
        update(work, i, first * PIECE, end - first * PIECE);
    }
}

static void units_of_block(void *context, int64_t i, int64_t *units, int64_t *bytes) {
    const struct work *work = context;
    const struct block *block = work->blocks + i;
    int64_t length = block->columns < PIECE || by_row(work, i) ? block->columns : PIECE;
    *units = by_row(work, i) ? block->rows : pieces_of(block);
    *bytes = length * 32 + 16;
}

static void run(struct work *work, int64_t start, int64_t count, int threads) {
    struct work part = {work->rule, work->blocks + start, work->states + start, work->grads + start,
                        work->paces + start, work->sums};
    if (work->sums) part.sums += start;
    run_parallel(&part, update_some, units_of_block, count, threads);
}

enum { GROUP = 2 << 20 }; /* elements of layers that are updated before they are settled */

/* Layers with a Frobenius ball, some at a time, so that what has to be scaled may still be in the cache. */
static int64_t run_layers(struct work *work, int64_t count, int threads) {
    int64_t pieces = 0, broken = 0;
    for (int64_t i = 0; i < count; i++) pieces += pieces_of(work->blocks + i);
    double *sums = malloc((size_t)(pieces + 1) * sizeof *sums);
    work->sums = malloc((size_t)(count + 1) * sizeof *work->sums);
    if (!sums || !work->sums) broken = -1;
    for (int64_t start = 0, end; broken >= 0 && start < count; start = end) {
        int64_t size = 0;
        double *next = sums;
        for (end = start; end < count && size < GROUP; end++) {
            work->sums[end] = next;
            next += pieces_of(work->blocks + end);
            size += work->blocks[end].rows * work->blocks[end].columns;
        }
        run(work, start, end - start, threads);
        int64_t found = settle_frobenius(work->blocks + start, end - start, sums, threads);
        broken = found < 0 ? found : broken + found;
    }
    free(work->sums);
    free(sums);
    return broken;
}

/* One step of a parameter group: `layers` blocks with a Frobenius ball, then all others. Returns how many rows and layers
 * are not finite and were left where the optimiser put them; -1 without memory. */
int64_t tethertune_step(
    const struct rule *rule, struct block *blocks, const struct state *states, const float *const *grads, int64_t layers,
    int64_t count, int threads
) {
    struct pace *paces = malloc((size_t)(count + 1) * sizeof *paces);
    if (!paces) return -1;
    double last = -1;
    for (int64_t i = 0; i < count; i++) {
        double steps = rule->kind == SGD ? 0 : (*states[i].steps += 1);
        paces[i] = i && steps == last ? paces[i - 1] : pace_of(rule, steps);
        last = steps;
        blocks[i].outside = blocks[i].broken = 0;
    }
    struct work work = {rule, blocks, states, grads, paces, NULL};
    int64_t broken = run_layers(&work, layers, threads);
    work.sums = NULL;
    if (broken >= 0) {
        run(&work, layers, count - layers, threads);
        for (int64_t i = layers; i < count; i++) broken += blocks[i].broken;
    }
    free(paces);
    return broken;
}
