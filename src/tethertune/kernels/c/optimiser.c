/* The step of Adam, AdamW and SGD and the projection in one pass: while memory delivers the tensors of the optimiser, a row
 * is moved, measured and, if it is outside, scaled. The arithmetic of an update is that of PyTorch's own fused kernels; how
 * a row is settled is row.inc, how a layer project.c. Weights and the optimiser's state are float32, without gaps, in one
 * order of elements.
 */
#include <stdlib.h>

#include "ball.h"
#include "parallel.h"

int64_t tethertune_frobenius(struct block *blocks, int64_t count, int threads); /* project.c */

enum { ADAM, ADAMW, SGD }; /* kernels/one_pass.py has the same structs, optim.py the same numbers */

/* The options of a parameter group. */
struct rule {
    double lr, beta1, beta2, eps, decay, momentum, dampening;
    int32_t kind, nesterov, maximize;
};

/* What is known of a row since it was measured. By the triangle inequality it is within `reach` of its centre, which grows
 * by what the row moves; as long as that is less than the radius, the centre need not be read. It holds for the very weights
 * that the last step left, which `print` tells from others. INFINITY: nothing is known. */
struct guard {
    double reach;
    uint64_t print;
};

/* What belongs to the weights of a block. Adam: averages of gradients and of squares, the largest of these (AMSGrad) and
 * the number of steps, counted here. SGD: momentum in `first`. A block without a radius is only updated. */
struct state {
    struct guard *guards; /* of each row, or of each piece of a Frobenius ball; at first all INFINITY */
    float *first, *second, *largest, *steps;
    int64_t fresh; /* SGD: the momentum holds nothing yet */
};

/* A rule at one step, in the precision of the weights. */
struct pace {
    float sign, decay, keep, blend, beta2, rest2, scale2, eps, rate, momentum, share;
    int32_t coupled; /* weight decay is a part of the gradient */
    int32_t nesterov, fresh;
};

/* Where a row, or a part of one, lies; NULL for what a rule does not have. */
struct place {
    float *w;
    const float *grad;
    float *first, *second, *largest;
};

struct work {
    const struct rule *rule;
    struct block *blocks;
    const struct state *states;
    const float *const *grads;
    const struct pace *paces;
    double **sums;        /* of the pieces of each layer with a Frobenius ball; NULL: balls of rows, or none */
    const char *guarded; /* which of these layers are known in all their pieces */
};

/* -------------------------------------------------------------------------------------------------------- updates */

static struct pace pace_of(const struct rule *rule, double steps) {
    double first = 1 - pow(rule->beta1, steps), second = 1 - pow(rule->beta2, steps);
    return (struct pace){
        .sign = rule->maximize ? -1 : 1,
        .decay = rule->decay,
        .keep = rule->kind == ADAMW ? 1 - rule->lr * rule->decay : 1,
        .blend = 1 - rule->beta1,
        .beta2 = rule->beta2,
        .rest2 = 1 - rule->beta2,
        .scale2 = 1 / sqrt(second),
        .eps = rule->eps,
        .rate = rule->kind == SGD ? -rule->lr : -rule->lr / first,
        .momentum = rule->momentum,
        .share = 1 - rule->dampening,
        .coupled = rule->kind != ADAMW && rule->decay != 0,
        .nesterov = rule->nesterov,
    };
}

INLINE floats root(floats x) {
    for (int lane = 0; lane < LANES; lane++) x[lane] = sqrtf(x[lane]);
    return x;
}

/* The weights x at k after the step; n of the 16 are there. */
INLINE floats adam(struct pace at, struct place p, int64_t k, int64_t n, floats x) {
    floats g = load_f32(p.grad + k, n) * at.sign;
    floats mean = load_f32(p.first + k, n), square = load_f32(p.second + k, n);
    if (at.coupled) g += x * at.decay;
    /* Taken from the nearer end, so that beta1 = 0 gives the gradient itself. */
    mean = at.blend < 0.5f ? mean + at.blend * (g - mean) : g + (at.blend - 1) * (g - mean);
    square = square * at.beta2 + at.rest2 * g * g;
    store_f32(p.first + k, n, mean);
    store_f32(p.second + k, n, square);
    if (p.largest) {
        floats largest = load_f32(p.largest + k, n);
        square = choose((largest > square) | (largest != largest), largest, square);
        store_f32(p.largest + k, n, square);
    }
    return x * at.keep + at.rate * mean / (root(square) * at.scale2 + at.eps);
}

INLINE floats sgd(struct pace at, struct place p, int64_t k, int64_t n, floats x) {
    floats g = load_f32(p.grad + k, n) * at.sign;
    if (at.coupled) g += x * at.decay;
    if (p.first) {
        floats mean = at.fresh ? g : load_f32(p.first + k, n) * at.momentum + at.share * g;
        store_f32(p.first + k, n, mean);
        g = at.nesterov ? g + at.momentum * mean : mean;
    }
    return x + g * at.rate;
}

/* ------------------------------------------------------------------------------------------------- passes over a row */

typedef uint64_t hashes __attribute__((vector_size(64)));

/* Any change of one number changes the result; of several, all but for a chance of 2^-64. */
INLINE hashes mix(hashes hash, floats x) {
    hashes bits;
    memcpy(&bits, &x, sizeof bits);
    return (hash << 9 | hash >> 55) + bits;
}

static uint64_t print_of(hashes hash) {
    hash *= (hashes){0x9e3779b97f4a7c15u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u, 0x27d4eb2f165667c5u,
                     0xff51afd7ed558ccdu, 0xc4ceb9fe1a85ec53u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu};
    return ((hash[0] + hash[4]) + (hash[2] + hash[6])) + ((hash[1] + hash[5]) + (hash[3] + hash[7]));
}

/* Update n elements. With TRACK for the type of the centre, which is not read then: returns the sum of |change|^power, and
 * the prints of what was there and what is; else the sum of |w - c|^power, as `measure` does. */
enum { TRACK = ZERO + 1 };

struct prints {
    uint64_t before, after;
};

INLINE floats load_centre(const void *c, int64_t k, int64_t n, const int type) {
    switch (type) {
        case F32: return load_f32((const f32 *)c + k, n);
        case BF16: return load_bf16((const bf16 *)c + k, n);
        case F16: return load_f16((const f16 *)c + k, n);
        default: return (floats){0};
    }
}

INLINE double update(
    struct pace at, struct place p, const void *c, int64_t n, int power, struct prints *prints, const int kind, const int type
) {
    double sum = 0;
    hashes before = {0}, after = {0};
    for (int64_t start = 0; start < n; start += FLUSH) {
        int64_t end = n - start > FLUSH ? start + FLUSH : n;
        floats lanes = {0};
        for (int64_t k = start; k < end; k += LANES) {
            floats was = load_f32(p.w + k, end - k);
            floats is = kind == SGD ? sgd(at, p, k, end - k, was) : adam(at, p, k, end - k, was);
            floats t = is - (type == TRACK ? was : load_centre(c, k, end - k, type));
            store_f32(p.w + k, end - k, is);
            lanes += power == 1 ? absolute(t) : t * t;
            if (type == TRACK) before = mix(before, was), after = mix(after, is);
        }
        sum += add_up(lanes);
    }
    if (type == TRACK) *prints = (struct prints){print_of(before), print_of(after)};
    return sum;
}

typedef double update_of(struct pace at, struct place p, const void *c, int64_t n, int power, struct prints *prints);

#define UPDATE(name, kind, type)                                                                                       \
    static double name(struct pace at, struct place p, const void *c, int64_t n, int power, struct prints *prints) {   \
        return update(at, p, c, n, power, prints, kind, type);                                                         \
    }
#define UPDATES(name, kind)                                                                     \
    UPDATE(name##_f32, kind, F32) UPDATE(name##_bf16, kind, BF16) UPDATE(name##_f16, kind, F16) \
    UPDATE(name##_zero, kind, ZERO) UPDATE(name##_track, kind, TRACK)                           \
    static update_of *const name##_updates[] = {name##_f32, name##_bf16, name##_f16, name##_zero, name##_track};
UPDATES(adam, ADAM)
UPDATES(sgd, SGD)
#undef UPDATES
#undef UPDATE

/* Elements [start, start + n) of block i. */
static double update_part(
    const struct work *work, int64_t i, int64_t start, const void *c, int64_t n, int type, int power, struct prints *prints
) {
    const struct state *state = work->states + i;
    update_of *const *updates = work->rule->kind == SGD ? sgd_updates : adam_updates;
    struct place place = {
        (float *)work->blocks[i].w + start,
        work->grads[i] + start,
        state->first ? state->first + start : NULL,
        state->second ? state->second + start : NULL,
        state->largest ? state->largest + start : NULL,
    };
    return updates[type](work->paces[i], place, c, n, power, prints);
}

/* ------------------------------------------------------------------------------------------------- rows and pieces */

typedef int settle_row(void *w, const void *c, int64_t n, double radius, double least, double distance);
typedef double measure_row(const void *w, const void *c, int64_t n);

#define PAIR_BODY "settled.inc"
#define W f32
#include "centres.inc"
#undef W
#undef PAIR_BODY

static settle_row *const SETTLE[] = {settled_f32_f32, settled_f32_bf16, settled_f32_f16, settled_f32_zero};
static measure_row *const MEASURE[] = {measured_f32_f32, measured_f32_bf16, measured_f32_f16, measured_f32_zero};
static const int64_t BYTES[] = {[F32] = 4, [BF16] = 2, [F16] = 2, [ZERO] = 0};

static const void *centre_at(const struct block *block, int64_t row, int64_t start) {
    return (const char *)block->c + (row * block->c_step + start) * BYTES[block->c_type];
}

static uint64_t print_of_row(const float *w, int64_t n) {
    hashes hash = {0};
    for (int64_t k = 0; k < n; k += LANES) hash = mix(hash, load_f32(w + k, n - k));
    return print_of(hash);
}

#define LOOSE 0.95      /* share of the radius up to which a row is guarded */
enum { GUARDED = 48 };  /* columns from which a row is worth it */

static int update_row(const struct work *work, int64_t i, int64_t row, double least) {
    const struct block *block = work->blocks + i;
    struct guard *guard = work->states[i].guards + row;
    int64_t n = block->columns;
    float *w = (float *)block->w + row * n;
    const void *c = centre_at(block, row, 0);
    double radius = block->radius[row], distance;
    int guarded = guard->reach < INFINITY;
    if (guarded) {
        struct prints prints;
        double reach = guard->reach + update_part(work, i, row * n, NULL, n, TRACK, 1, &prints) * (1 + 2 * ERROR);
        int known = prints.before == guard->print && reach <= radius * (1 - ERROR);
        *guard = (struct guard){reach, prints.after};
        if (known) return INSIDE;
        distance = MEASURE[block->c_type](w, c, n);
    } else {
        distance = update_part(work, i, row * n, c, n, block->c_type, 1, NULL);
    }
    int found = SETTLE[block->c_type](w, c, n, radius, least, distance);
    int loose = found == INSIDE && distance <= LOOSE * radius && radius > SMALLEST;
    guard->reach = loose ? distance * (1 + 2 * ERROR) : INFINITY;
    if (!guarded && guard->reach < INFINITY) guard->print = print_of_row(w, n);
    return found;
}

/* Rows that do not fill vectors are updated some at a time. */
static void update_short_rows(const struct work *work, int64_t i, int64_t first, int64_t last, int64_t found[3]) {
    const struct block *block = work->blocks + i;
    double least = least_radius(block->size);
    int64_t n = block->columns, together = 512 / n;
    for (int64_t start = first, end; start < last; start = end) {
        end = start + together < last ? start + together : last;
        update_part(work, i, start * n, NULL, (end - start) * n, ZERO, 1, NULL);
        for (int64_t row = start; row < end; row++) {
            float *w = (float *)block->w + row * n;
            const void *c = centre_at(block, row, 0);
            double distance = MEASURE[block->c_type](w, c, n);
            found[SETTLE[block->c_type](w, c, n, block->radius[row], least, distance)]++;
        }
    }
}

static void update_rows(const struct work *work, int64_t i, int64_t first, int64_t last) {
    struct block *block = work->blocks + i;
    double least = least_radius(block->size);
    int64_t found[3] = {0};
    if (block->columns < GUARDED) update_short_rows(work, i, first, last, found), first = last;
    for (int64_t row = first; row < last; row++) found[update_row(work, i, row, least)]++;
    __atomic_fetch_add(&block->outside, found[CHANGED], __ATOMIC_RELAXED);
    __atomic_fetch_add(&block->broken, found[BROKEN], __ATOMIC_RELAXED);
}

/* The first element of piece k of a block, its length and its centre. */
static int64_t piece(const struct block *block, int64_t k, int64_t *n, const void **c) {
    int64_t in_row = (block->columns + PIECE - 1) / PIECE, row = k / in_row, start = k % in_row * PIECE;
    *n = block->columns - start < PIECE ? block->columns - start : PIECE;
    *c = centre_at(block, row, start);
    return row * block->columns + start;
}

/* Whether all of a layer with a Frobenius ball is known. */
static int is_guarded(const struct state *state) { return state->guards && state->guards->reach < INFINITY; }

/* Update a piece of such a layer; the square of how far it can be from its centre then. Squares below the smallest
 * float32 are lost, at most n 2^-124 of them. */
static double guarded_square(const struct work *work, int64_t i, int64_t start, int64_t n, int64_t k) {
    struct guard *guard = work->states[i].guards + k;
    struct prints prints;
    double moved = sqrt(update_part(work, i, start, NULL, n, TRACK, 2, &prints)) * (1 + ERROR) + sqrt(n) * 0x1p-62;
    if (prints.before == guard->print) {
        guard->reach += moved;
    } else {
        guard->reach = INFINITY; /* what others have written has to be measured, once all pieces are updated */
    }
    guard->print = prints.after;
    return guard->reach * guard->reach;
}

/* Pieces of a Frobenius ball, or of no ball. */
static void update_pieces(const struct work *work, int64_t i, int64_t first, int64_t last) {
    const struct block *block = work->blocks + i;
    int guarded = work->guarded && work->guarded[i];
    for (int64_t k = first; k < last; k++) {
        int64_t n;
        const void *c;
        int64_t start = piece(block, k, &n, &c);
        double sum = guarded ? guarded_square(work, i, start, n, k)
                             : update_part(work, i, start, c, n, block->c_type, 2, NULL);
        if (work->sums) work->sums[i][k] = sum;
    }
}

/* What is known of a layer that has been updated and measured. */
static void guard_layer(const struct block *block, struct guard *guards, const double *sums, double distance) {
    int loose = !block->outside && !block->broken && distance <= LOOSE * block->radius[0] && block->radius[0] > SMALLEST;
    for (int64_t k = 0; k < pieces_of(block); k++) {
        int64_t n;
        const void *c;
        int64_t start = piece(block, k, &n, &c);
        guards[k].reach = loose ? sqrt(sums[k]) * (1 + ERROR) + sqrt(n) * 0x1p-62 : INFINITY;
        if (loose) guards[k].print = print_of_row((const float *)block->w + start, n);
    }
}

/* Bring an updated layer inside; returns 1 if it is not finite, -1 without memory. */
static int64_t settle_layer(const struct work *work, int64_t i, int threads) {
    struct block *block = work->blocks + i;
    struct guard *guards = work->states[i].guards;
    double total = 0;
    for (int64_t k = 0; k < pieces_of(block); k++) total += work->sums[i][k];
    double distance = sqrt(total);
    if (!work->guarded[i]) {
        int64_t broken = settle_frobenius(block, 1, work->sums[i], threads);
        guard_layer(block, guards, work->sums[i], distance);
        return broken;
    }
    if (distance <= block->radius[0] * (1 - ERROR)) return 0;
    guards->reach = INFINITY;
    return tethertune_frobenius(block, 1, threads);
}

/* ------------------------------------------------------------------------------------------------------ all blocks */

static int by_row(const struct work *work, int64_t i) { return work->blocks[i].radius && !work->sums; }

static void update_some(void *context, int64_t i, int64_t first, int64_t last) {
    (by_row(context, i) ? update_rows : update_pieces)(context, i, first, last);
}

static void units_of_block(void *context, int64_t i, int64_t *units, int64_t *bytes) {
    const struct work *work = context;
    const struct block *block = work->blocks + i;
    int whole = by_row(work, i);
    *units = whole ? block->rows : pieces_of(block);
    *bytes = (whole || block->columns < PIECE ? block->columns : PIECE) * 32 + 16;
}

static void run(const struct work *work, int64_t start, int64_t count, int threads) {
    struct work part = *work;
    part.blocks += start, part.states += start, part.grads += start, part.paces += start;
    if (work->sums) part.sums += start, part.guarded += start;
    run_parallel(&part, update_some, units_of_block, count, threads);
}

enum { GROUP = 1 << 18 }; /* elements a thread updates before it settles them */

/* Layers with a Frobenius ball, some at a time, so that what has to be scaled may still be in the cache. */
static int64_t run_layers(struct work *work, int64_t count, int threads) {
    int64_t pieces = 0, broken = 0;
    for (int64_t i = 0; i < count; i++) pieces += pieces_of(work->blocks + i);
    double *sums = malloc((size_t)(pieces + 1) * sizeof *sums);
    char *guarded = malloc((size_t)(count + 1));
    work->sums = malloc((size_t)(count + 1) * sizeof *work->sums);
    work->guarded = guarded;
    if (!sums || !work->sums || !guarded) broken = -1;
    for (int64_t start = 0, end; broken >= 0 && start < count; start = end) {
        int64_t size = 0;
        double *next = sums;
        for (end = start; end < count && size < (int64_t)GROUP * threads; end++) {
            work->sums[end] = next;
            guarded[end] = is_guarded(work->states + end);
            next += pieces_of(work->blocks + end);
            size += work->blocks[end].rows * work->blocks[end].columns;
        }
        run(work, start, end - start, threads);
        for (int64_t i = start; broken >= 0 && i < end; i++) {
            int64_t found = settle_layer(work, i, threads);
            broken = found < 0 ? found : broken + found;
        }
    }
    free(guarded);
    free(work->sums);
    free(sums);
    work->sums = NULL, work->guarded = NULL;
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
        paces[i].fresh = states[i].fresh != 0;
        last = steps;
        blocks[i].outside = blocks[i].broken = 0;
    }
    struct work work = {rule, blocks, states, grads, paces, NULL, NULL};
    int64_t broken = run_layers(&work, layers, threads);
    if (broken >= 0) {
        run(&work, layers, count - layers, threads);
        for (int64_t i = layers; i < count; i++) broken += blocks[i].broken;
    }
    free(paces);
    return broken;
}
