/* Threads of torch's own OpenMP, which wait awake between two operations and would be in the way of others; where that
 * is another library than GCC's, threads are started for each call. */

#include <pthread.h>
#include <sched.h>
#include <stddef.h>

#include "threads.h"
#include "vectors.h"

#define WORTH_A_THREAD (1 << 18)

void meet(team *all) {
    if (all->size == 1) return;
    int round = atomic_load_explicit(&all->round, memory_order_acquire);
    if (atomic_fetch_add(&all->arrived, 1) + 1 == all->size) {
        atomic_store(&all->arrived, 0);
        atomic_store_explicit(&all->round, round + 1, memory_order_release);
        return;
    }
    for (int turns = 0; atomic_load_explicit(&all->round, memory_order_acquire) == round; turns++)
        if (turns > 4096) sched_yield();
}

/* GCC's OpenMP, of which torch has loaded a copy that a compiler knows nothing of. */
static void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
static int (*number_of_this)(void), (*number_of_all)(void);

void spectralnorm_use_threads_of(void *parallel_region, void *thread_number, void *num_threads) {
    parallel = (void (*)(void (*)(void *), void *, unsigned, unsigned))parallel_region;
    number_of_this = (int (*)(void))thread_number;
    number_of_all = (int (*)(void))num_threads;
}

typedef struct {
    job work;
    void *arguments;
    team *all;
    atomic_int is_open, next_number;
} task;

static void work_in_region(void *of) {
    task *this = of;
    atomic_store(&this->all->size, number_of_all()); /* the same from each of them */
    this->work(this->arguments, this->all, number_of_this());
}

static void *work_in_thread(void *of) {
    task *this = of;
    int number = atomic_fetch_add(&this->next_number, 1);
    while (!atomic_load(&this->is_open)) sched_yield();
    this->work(this->arguments, this->all, number);
    return NULL;
}

void together(job work, void *arguments, int64_t entries, int threads) {
    int wanted = (int)least(least(threads, MOST_THREADS), entries / WORTH_A_THREAD);
    team all = {.size = 1};
    task this = {.work = work, .arguments = arguments, .all = &all, .next_number = 1};
    pthread_t started[MOST_THREADS];
    int others = 0;
    if (wanted > 1 && parallel) {
        parallel(work_in_region, &this, (unsigned)wanted, 0);
        return;
    }
    while (1 + others < wanted && !pthread_create(&started[others], NULL, work_in_thread, &this)) others++;
    atomic_store(&all.size, 1 + others);
    atomic_store(&this.is_open, 1);
    work(arguments, &all, 0);
    for (int number = 0; number < others; number++) pthread_join(started[number], NULL);
}

void share(int64_t count, int64_t unit, const team *all, int number, int64_t *begin, int64_t *end) {
    int64_t units = (count + unit - 1) / unit;
    *begin = least(units * number / all->size * unit, count);
    *end = least(units * (number + 1) / all->size * unit, count);
}
