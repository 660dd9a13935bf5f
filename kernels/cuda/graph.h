/* Work that is launched again and again, as CUDA graphs: one launch by the host instead of several
 * hundred, and no gap of a microsecond or two between kernels.
 *
 * What a piece of work launches must follow from its key alone: the same kernels over the same
 * addresses, with the same arguments. What changes from one run to the next lies in the device's
 * memory, in buffers that never move. A key's first run is made without a graph (so that everything
 * that is measured, loaded or allocated at first use is there afterwards), the second is captured,
 * and from then on the graph is launched. All three give the same bits.
 *
 * Used by the computing thread only, on the context's stream. */
#ifndef CLAAS_CUDA_GRAPH_H
#define CLAAS_CUDA_GRAPH_H

#include "cuda/context.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A graph of a pass over 36 layers takes a megabyte or so of the device. */
#define CUDA_GRAPHS_MAX 96

struct cuda_graph_key {
    int rows, furthest;
    bool adapters; /* some row has one */
};
struct cuda_graph {
    struct cuda_graph_key key;
    uint64_t used; /* the time of its last use, 0: a free slot */
    bool seen;     /* ran once */
    bool refused;  /* could not be captured */
    cudaGraphExec_t exec;
};
struct cuda_graphs {
    struct cuda_graph slots[CUDA_GRAPHS_MAX];
    uint64_t clock;
    bool off, told;
    uint64_t captures, replays; /* what happened so far: for tests */
};

/* CLAAS_CUDA_GRAPHS=0 turns them off: everything is launched kernel by kernel. */
void cuda_graphs_open(struct cuda_graphs *graphs);
/* The device must have finished them. */
void cuda_graphs_done(struct cuda_graphs *graphs);

/* Launches kernels on the stream; 0 or a negative code. It must not wait for the device. */
typedef int cuda_graph_work_fn(void *arg);
/* Runs the work that belongs to the key. The least recently used graph makes room for a new one,
 * and must not be under way any more: the caller must have waited for the stream since it was
 * launched. */
int cuda_graphs_run(struct cuda_context *context, struct cuda_graphs *graphs,
                    const struct cuda_graph_key *key, cuda_graph_work_fn *work, void *arg);

#ifdef __cplusplus
}
#endif
#endif
