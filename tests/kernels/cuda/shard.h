/* Processes that share a test program's cases: for programs in C and in CUDA C++. */
#ifndef CLAAS_TESTS_CUDA_SHARD_H
#define CLAAS_TESTS_CUDA_SHARD_H

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* CLAAS_TEST_SHARD=i/n: n processes share a program's cases, and this one has the i-th, from 0 on,
 * of each n that ask here. */
static inline bool check_elsewhere(void)
{
    static int shard, shards, asked;
    const char *text = getenv("CLAAS_TEST_SHARD");

    if (!text)
        return false;
    if (shards == 0 &&
        (sscanf(text, "%d/%d", &shard, &shards) != 2 || shard < 0 || shard >= shards)) {
        printf("CLAAS_TEST_SHARD=%s: not i/n with i < n\n", text);
        exit(1);
    }
    return asked++ % shards != shard;
}

#endif
