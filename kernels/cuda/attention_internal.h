/* What the files of attention share: where a key lies, which kernels can take a call, and the entry
 * points behind cuda_attention() and cuda_attention_bwd(). Included by CUDA files only. */
#ifndef CLAAS_CUDA_ATTENTION_INTERNAL_H
#define CLAAS_CUDA_ATTENTION_INTERNAL_H

#include "cuda/attention.h"

/* Where the keys and values of one sequence and one kv head lie, in elements from `k` and `v`. */
template <typename T> struct attn_keys {
    const T *k, *v;
    const int32_t *table; /* block numbers, or NULL: rows of the pack */
    size_t stride;        /* of a row, or of a block */
    int head_dim, pos, own, parent;
};

template <typename T>
static __device__ __forceinline__ attn_keys<T> attn_keys_of(const struct cuda_attention &a,
                                                            const struct cuda_attn_run &run, int g)
{
    const size_t d = (size_t)a.head_dim;
    struct attn_keys<T> keys;

    keys.head_dim = a.head_dim;
    keys.pos = run.pos;
    keys.own = run.first;
    keys.parent = run.parent_first;
    if (a.kv) {
        keys.table = a.tables + run.table;
        keys.stride = 2 * (size_t)a.kv_heads * CUDA_KV_BLOCK * d;
        keys.k = (const T *)a.kv + (size_t)g * CUDA_KV_BLOCK * d;
        keys.v = keys.k + keys.stride / 2;
    } else {
        keys.table = NULL;
        keys.stride = (size_t)a.ldqkv;
        keys.k = (const T *)a.qkv + ((size_t)a.heads + (size_t)g) * d;
        keys.v = keys.k + (size_t)a.kv_heads * d;
    }
    return keys;
}

/* Where the key at position p begins, in elements from keys.k. */
template <typename T>
static __device__ __forceinline__ size_t attn_key_at(const struct attn_keys<T> &keys, int p)
{
    if (keys.table)
        return (size_t)keys.table[p / CUDA_KV_BLOCK] * keys.stride +
               (size_t)(p % CUDA_KV_BLOCK) * (size_t)keys.head_dim;
    return (size_t)(p < keys.pos ? keys.parent + p : keys.own + p - keys.pos) * keys.stride;
}

/* The heads of a group lie side by side in a tile's rows: the largest group that a tile takes. */
#define ATTN_GROUP_MAX 64

/* Whether tensor cores can do it: bfloat16, heads of 64 or 128, whole pieces of 16 bytes. */
static inline bool attn_tiled(const struct cuda_context *context, const struct cuda_attention *a)
{
    const uintptr_t places = (uintptr_t)a->qkv | (uintptr_t)a->out | (uintptr_t)a->kv;

    return context->act == CUDA_TYPE_BF16 && (a->head_dim == 64 || a->head_dim == 128) &&
           a->heads / a->kv_heads <= ATTN_GROUP_MAX && a->ldqkv % 8 == 0 && places % 16 == 0;
}

/* Serving: a run of no more rows (queries times heads of a group) is done in parts of its keys. */
#define ATTN_PART_ROWS 16
static __host__ __device__ __forceinline__ bool
attn_in_parts(const struct cuda_attention &a, int group, const struct cuda_attn_run &run)
{
    return a.kv && run.count * group <= ATTN_PART_ROWS;
}

/* Does the runs that attn_in_parts names, of serving's calls that attn_tiled accepts; the others'
 * rows are left as they are. */
int cuda_attention_parts(struct cuda_context *context, const struct cuda_attention *args);
/* Whether it can finish the call's rows. */
bool attn_can_finish(const struct cuda_context *context, const struct cuda_attention *a);

/* By products of warpgroups instead of mma.sync: for what attn_tiled accepts, where
 * context->warpgroups, except for the parts of decoding. */
int cuda_attention_sm90(struct cuda_context *context, const struct cuda_attention *args);

/* Refuses what neither path can do: UNSUPPORTED. */
int attn_check(const struct cuda_attention *a);

int cuda_attention_plain(struct cuda_context *context, const struct cuda_attention *args);
int cuda_attention_bwd_plain(struct cuda_context *context, const struct cuda_attention_bwd *args);

#endif
