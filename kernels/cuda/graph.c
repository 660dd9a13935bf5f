/* Capturing, keeping and launching graphs (graph.h). Only calls of the capturing thread are checked
 * (mode thread-local), because the I/O threads allocate memory and copy adapters meanwhile. */
#include "cuda/graph.h"

#include "claas/log.h"

void cuda_graphs_open(struct cuda_graphs *graphs)
{
    *graphs = (struct cuda_graphs){.off = cuda_is_off("CLAAS_CUDA_GRAPHS")};
}

static void drop(struct cuda_graph *graph)
{
    if (graph->exec)
        (void)cudaGraphExecDestroy(graph->exec);
    (void)cudaGetLastError();
    *graph = (struct cuda_graph){0};
}

void cuda_graphs_done(struct cuda_graphs *graphs)
{
    for (int i = 0; i < CUDA_GRAPHS_MAX; i++)
        drop(&graphs->slots[i]);
}

static bool is_key(const struct cuda_graph_key *a, const struct cuda_graph_key *b)
{
    return a->rows == b->rows && a->furthest == b->furthest && a->adapters == b->adapters;
}

/* The key's slot; if there is none, that of the least recently used graph, emptied. */
static struct cuda_graph *find_slot(struct cuda_graphs *graphs, const struct cuda_graph_key *key)
{
    struct cuda_graph *oldest = &graphs->slots[0];

    for (int i = 0; i < CUDA_GRAPHS_MAX; i++) {
        struct cuda_graph *graph = &graphs->slots[i];

        if (graph->used > 0 && is_key(&graph->key, key))
            return graph;
        if (graph->used < oldest->used)
            oldest = graph;
    }
    drop(oldest);
    oldest->key = *key;
    return oldest;
}

/* Records what the work launches. The stream leaves the capture whatever happens. */
static int record(struct cuda_context *context, cuda_graph_work_fn *work, void *arg,
                  cudaGraph_t *ret)
{
    int code = cuda_check(context,
                          cudaStreamBeginCapture(context->stream, cudaStreamCaptureModeThreadLocal),
                          "beginning a graph");
    cudaError_t ended;

    if (code < 0)
        return code;
    code = work(arg);
    ended = cudaStreamEndCapture(context->stream, ret);
    if (code >= 0)
        return cuda_check(context, ended, "recording a graph");
    (void)cudaGetLastError();
    return code;
}

static int capture(struct cuda_context *context, struct cuda_graph *graph, cuda_graph_work_fn *work,
                   void *arg)
{
    cudaGraph_t recorded = NULL;
    int code;

    cuda_capture_lock(context);
    code = record(context, work, arg, &recorded);
    cuda_capture_unlock(context);
    if (code >= 0)
        code = cuda_check(context, cudaGraphInstantiate(&graph->exec, recorded, 0),
                          "instantiating a graph");
    if (code < 0)
        graph->exec = NULL;
    if (recorded)
        (void)cudaGraphDestroy(recorded);
    return code;
}

/* Nothing of a failed capture has run: the work is done without a graph, now and from now on. */
static int go_on_without(struct cuda_context *context, struct cuda_graphs *graphs,
                         struct cuda_graph *graph, cuda_graph_work_fn *work, void *arg)
{
    graph->refused = true;
    if (!graphs->told)
        claas_warning("%d rows are computed without a CUDA graph: %s", graph->key.rows,
                      claas_error_text());
    graphs->told = true;
    (void)cudaGetLastError();
    return work(arg);
}

int cuda_graphs_run(struct cuda_context *context, struct cuda_graphs *graphs,
                    const struct cuda_graph_key *key, cuda_graph_work_fn *work, void *arg)
{
    struct cuda_graph *graph;
    int code;

    if (graphs->off)
        return work(arg);
    graph = find_slot(graphs, key);
    graph->used = ++graphs->clock;
    if (!graph->seen || graph->refused) {
        code = work(arg);
        graph->seen = code >= 0;
        return code;
    }
    if (!graph->exec) {
        if (capture(context, graph, work, arg) < 0)
            return go_on_without(context, graphs, graph, work, arg);
        graphs->captures++;
    } else {
        graphs->replays++;
    }
    return cuda_check(context, cudaGraphLaunch(graph->exec, context->stream), "launching a graph");
}
