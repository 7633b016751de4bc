/* A loop over the rows (or pieces) of many blocks, split among threads by the bytes that each has to read.
 *
 * Threads are started for each loop, which costs some 20 microseconds a thread, so a small loop runs on fewer.
 */
#ifndef TETHERTUNE_PARALLEL_H
#define TETHERTUNE_PARALLEL_H

#include <pthread.h>
#include <stdint.h>

enum { MOST_THREADS = 256, BYTES_A_THREAD = 1 << 20 };

/* Units [first, last) of a block; called with ranges of any length, on any thread. */
typedef void work_on(void *context, int64_t block, int64_t first, int64_t last);
/* How many units a block has, and the bytes of each. */
typedef void units_of(void *context, int64_t block, int64_t *units, int64_t *bytes);

struct loop {
    void *context;
    work_on *work;
    units_of *units;
    int64_t count;
    int64_t low, high; /* the bytes of this thread */
};

static inline int64_t units_before(int64_t bytes, int64_t each, int64_t units) {
    if (bytes <= 0) return 0;
    int64_t before = (bytes + each - 1) / each;
    return before < units ? before : units;
}

static inline void *run_part(void *given) {
    struct loop *part = given;
    int64_t start = 0;
    for (int64_t i = 0; i < part->count && start < part->high; i++) {
        int64_t units, each;
        part->units(part->context, i, &units, &each);
        int64_t first = units_before(part->low - start, each, units);
        int64_t last = units_before(part->high - start, each, units);
        if (first < last) part->work(part->context, i, first, last);
        start += units * each;
    }
    return NULL;
}

static inline void run_parallel(void *context, work_on *work, units_of *units, int64_t count, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; i++) {
        int64_t here, each;
        units(context, i, &here, &each);
        total += here * each;
    }
    int64_t useful = total / BYTES_A_THREAD;
    int64_t parts = threads < useful ? threads : useful;
    parts = parts < 1 ? 1 : parts > MOST_THREADS ? MOST_THREADS : parts;
    struct loop part[MOST_THREADS];
    pthread_t thread[MOST_THREADS];
    int started[MOST_THREADS] = {0};
    for (int64_t p = parts - 1; p >= 0; p--) {
        part[p] = (struct loop){context, work, units, count, total / parts * p, p + 1 < parts ? total / parts * (p + 1) : total};
        started[p] = p > 0 && pthread_create(&thread[p], NULL, run_part, &part[p]) == 0;
        if (!started[p]) run_part(&part[p]);
    }
    for (int64_t p = 1; p < parts; p++) {
        if (started[p]) pthread_join(thread[p], NULL);
    }
}

#endif
