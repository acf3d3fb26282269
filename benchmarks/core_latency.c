/* How soon one core sees what another wrote: two pinned threads pass a flag to and fro. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <time.h>

struct game {
    int cpu;
    long rounds;
    int failed;
};

static _Alignas(128) atomic_int flag;

static int pin(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof set, &set);
}

static void *answer(void *argument) {
    struct game *game = argument;
    game->failed = pin(game->cpu);
    for (long i = 0; i < game->rounds; i++) {
        while (atomic_load_explicit(&flag, memory_order_acquire) != 1) {
        }
        atomic_store_explicit(&flag, 0, memory_order_release);
    }
    return 0;
}

static void *ask(void *argument) {
    struct game *game = argument;
    game->failed = pin(game->cpu);
    for (long i = 0; i < game->rounds; i++) {
        atomic_store_explicit(&flag, 1, memory_order_release);
        while (atomic_load_explicit(&flag, memory_order_acquire) != 0) {
        }
    }
    return 0;
}

/* Nanoseconds of one round trip between two CPUs; negative where there are no two threads. */
double round_trip(int one, int other, long rounds) {
    struct timespec begin, end;
    struct game sides[2] = {{one, rounds, 0}, {other, rounds, 0}};
    pthread_t asking, answering;
    atomic_store(&flag, 0);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    if (pthread_create(&answering, 0, answer, &sides[1])) return -1;
    if (pthread_create(&asking, 0, ask, &sides[0])) return -1;
    pthread_join(asking, 0);
    pthread_join(answering, 0);
    clock_gettime(CLOCK_MONOTONIC, &end);
    if (sides[0].failed || sides[1].failed) return -1;
    return ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / rounds;
}
