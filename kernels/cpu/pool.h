/* A fixed team of threads for one operation at a time. The caller is member 0; the others spin for
 * a while and then sleep. Work is split by index, so which thread did what never changes a result.
 */
#ifndef CLAAS_CPU_POOL_H
#define CLAAS_CPU_POOL_H

#ifdef __cplusplus
extern "C" {
#endif

typedef struct claas_pool claas_pool_t;

/* `threads` members in all (1 = no extra threads; 0 = one per CPU this process may use). */
int claas_pool_new(int threads, claas_pool_t **ret);
void claas_pool_free(claas_pool_t **pool);
int claas_pool_threads(const claas_pool_t *pool);

/* Calls work(arg, index) for every index in [0, count), each exactly once, on the team; returns
 * when all are done. Indices are handed out dynamically, in increasing order. Not reentrant. */
typedef void claas_pool_fn(void *arg, int index);
void claas_pool_run(claas_pool_t *pool, int count, claas_pool_fn *work, void *arg);
/* Index of the calling member in [0, threads), for scratch memory. */
int claas_pool_member(const claas_pool_t *pool);

/* Memory of the calling member, CLAAS_POOL_SCRATCH bytes, 64-byte aligned, not cleared: a kernel's
 * packed tiles. It belongs to the operation that runs; nothing in it survives claas_pool_run. */
#define CLAAS_POOL_SCRATCH (1 << 20)
void *claas_pool_scratch(const claas_pool_t *pool);

#ifdef __cplusplus
}
#endif
#endif
