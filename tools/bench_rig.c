/* The ground of the benchmarks: a device on a model, its sizes, random tokens, and one way to print
 * a result. */
#include "bench.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "load_progress.h"

char *bench_model_path(const char *model)
{
    if (strncmp(model, "random:", 7) != 0 && access(model, F_OK) != 0 && strchr(model, '/') == NULL)
        return claas_format("random:%s", model);
    return claas_strdup(model);
}

int bench_fail_model(int rc, const char *model)
{
    if (rc != CLAAS_ERR_NOT_FOUND || access(model, F_OK) == 0 || strchr(model, ':') != NULL ||
        strchr(model, '/') != NULL)
        return rc;
    return claas_fail(rc, "--model: there is no file or directory %s here, and %s",
                      claas_quote(model).text, claas_error_text());
}

static int open_model(const char *model, claas_model_t **ret)
{
    CLAAS_AUTO_FREE char *path = bench_model_path(model);
    /* Random tokens are rendered by nothing: a model without a template will do. */
    struct claas_model_options options = {.path = path, .chat_template = "chatml"};

    if (path == NULL)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return bench_fail_model(claas_model_open(&options, ret), model);
}

/* Random models have no file: their weights count as bfloat16. */
static double tensor_bytes(const struct claas_tensor *tensor)
{
    return tensor->random_std > 0 ? 2.0 * tensor->rows * tensor->columns : (double)tensor->bytes;
}

void bench_measure_model(struct bench_rig *rig)
{
    const struct claas_model_config *c = rig->config;
    const struct claas_tensor *head = claas_model_tensor(rig->model, "lm_head.weight");

    if (c->tied || head == NULL)
        head = claas_model_tensor(rig->model, "model.embed_tokens.weight");
    rig->head = (double)c->vocab * c->hidden;
    rig->head_bytes = head != NULL ? tensor_bytes(head) : 2 * rig->head;
    for (int module = 0; module < CLAAS_MODULE_COUNT; module++) {
        double rows = claas_module_rows(c, (enum claas_module)module);
        double columns = claas_module_columns(c, (enum claas_module)module);

        rig->body += c->layers * rows * columns;
        rig->lora_per_rank += c->layers * (rows + columns);
        for (int layer = 0; layer < c->layers; layer++) {
            const struct claas_tensor *tensor;
            char name[128];

            snprintf(name, sizeof(name), "model.layers.%d.%s.%s.weight", layer,
                     module <= CLAAS_MODULE_O ? "self_attn" : "mlp",
                     claas_module_name((enum claas_module)module));
            tensor = claas_model_tensor(rig->model, name);
            rig->body_bytes += tensor != NULL ? tensor_bytes(tensor) : 2 * rows * columns;
        }
    }
}

static struct claas_device_options options_of(const struct bench_args *args)
{
    return (struct claas_device_options){
        .device = args->device != NULL ? args->device : "auto",
        .precision = args->precision != NULL ? args->precision : "bf16",
        .threads = args->threads,
    };
}

int bench_floor(const struct bench_args *args, struct claas_device_floor *ret)
{
    struct claas_device_options options = options_of(args);

    return claas_device_floor(&options, ret);
}

int bench_open(struct bench_rig *rig, const struct bench_args *args, size_t kv_tokens)
{
    struct claas_device_options options = options_of(args);
    int rc;

    options.kv_tokens = kv_tokens;
    options.prefill_chunk = args->chunk;
    memset(rig, 0, sizeof(*rig));
    for (int i = 0; i < args->batch_count; i++)
        if (args->batch[i] > options.max_batch)
            options.max_batch = args->batch[i];
    rc = open_model(args->model, &rig->model);
    if (rc < 0)
        return rc;
    rig->config = claas_model_config(rig->model);
    claas_copy_text(rig->name, sizeof(rig->name), claas_model_name(rig->model));
    bench_measure_model(rig);
    rc = load_progress_open(&options, rig->model, &rig->device);
    if (rc == 0)
        rc = claas_device_client_new(rig->device, &rig->client);
    if (rc < 0)
        return rc;
    claas_model_release_weights(rig->model);
    return 0;
}

void bench_close(struct bench_rig *rig)
{
    claas_device_client_free(&rig->client);
    claas_device_free(&rig->device);
    claas_model_free(&rig->model);
}

int bench_wait(struct bench_rig *rig, struct claas_device_event *ret)
{
    int rc = claas_device_client_wait(rig->client, -1, ret);

    if (rc < 0)
        return rc;
    if (ret->kind == CLAAS_EVENT_FAILED)
        return claas_fail(ret->error, "%s", ret->text);
    return 0;
}

int32_t *bench_tokens(const struct bench_rig *rig, uint64_t stream, size_t count)
{
    int32_t *tokens = CLAAS_NEW_ARRAY(int32_t, count + 1);

    for (size_t i = 0; tokens != NULL && i < count; i++) {
        uint32_t words[4];

        claas_philox(1, stream, i, words);
        tokens[i] = (int32_t)(words[0] % (uint32_t)rig->config->vocab);
    }
    if (tokens == NULL)
        claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    return tokens;
}

void bench_adapters_free(claas_adapter_t ***adapters, int count)
{
    for (int i = 0; *adapters != NULL && i < count; i++)
        claas_adapter_unref(&(*adapters)[i]);
    free(*adapters);
    *adapters = NULL;
}

static int make_adapter(struct bench_rig *rig, int rank, uint64_t seed, enum claas_adapter_use use,
                        claas_adapter_t **ret)
{
    struct claas_lora_config lora = {
        .rank = rank, .alpha = 2.0f * (float)rank, .modules = CLAAS_MODULE_ALL};
    struct claas_device_event event;
    uint64_t id;
    int rc = claas_device_adapter_init(rig->client, &lora, seed, use, &id);

    if (rc == 0)
        rc = bench_wait(rig, &event);
    if (rc == 0)
        *ret = event.adapter;
    return rc;
}

int bench_adapters(struct bench_rig *rig, int count, int rank, enum claas_adapter_use use,
                   claas_adapter_t ***ret)
{
    claas_adapter_t **adapters = CLAAS_NEW_ARRAY(claas_adapter_t *, (size_t)count + 1);
    int rc = adapters != NULL ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    for (int i = 0; rc == 0 && i < count; i++)
        rc = make_adapter(rig, rank, (uint64_t)i + 1, use, &adapters[i]);
    if (rc < 0)
        bench_adapters_free(&adapters, count);
    *ret = adapters;
    return rc;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

double bench_median(double *values, int count)
{
    qsort(values, (size_t)count, sizeof(*values), compare);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

void bench_add_memory(cJSON *line, struct bench_rig *rig)
{
    cJSON *memory = cJSON_CreateObject();
    struct claas_device_stats stats;

    claas_device_stats(rig->device, &stats);
    claas_json_set_int(line, "peak_bytes", (int64_t)stats.bytes_peak);
    claas_json_set_int(line, "weights_bytes", (int64_t)stats.bytes_weights);
    claas_json_set_int(line, "kv_bytes", (int64_t)stats.bytes_kv);
    claas_json_set_int(line, "adapters_bytes", (int64_t)stats.bytes_adapters);
    claas_json_set_int(line, "workspace_bytes", (int64_t)stats.bytes_workspace);
    for (int i = 0; i < stats.use_count; i++)
        claas_json_set_int(memory, stats.uses[i].what, (int64_t)stats.uses[i].bytes);
    claas_json_set(line, "memory", memory);
}

double bench_attention_flop(const struct claas_model_config *config, double tokens)
{
    return 4.0 * config->layers * config->heads * config->head_dim * tokens * (tokens + 1) / 2;
}

void bench_add_rates(cJSON *line, const struct bench_work *work,
                     const struct claas_device_floor *floor)
{
    double flop_s = work->flop / work->ms * 1e3, bytes_s = work->bytes / work->ms * 1e3;

    claas_json_set_number(line, "gflop_s", flop_s * 1e-9);
    claas_json_set_number(line, "gemm_peak_gflop_s", floor->gemm_flop_s * 1e-9);
    claas_json_set_number(line, "share_of_peak", flop_s / floor->gemm_flop_s);
    claas_json_set_number(line, "read_gb_s", bytes_s * 1e-9);
    claas_json_set_number(line, "memory_gb_s", floor->memory_bytes_s * 1e-9);
    claas_json_set_number(line, "share_of_bandwidth", bytes_s / floor->memory_bytes_s);
}

/* --- printing --------------------------------------------------------------------------------- */

cJSON *bench_line(struct bench_rig *rig, const char *what)
{
    struct claas_device_stats stats;
    cJSON *line = cJSON_CreateObject();

    claas_device_stats(rig->device, &stats);
    claas_json_set_string(line, "bench", what);
    claas_json_set_string(line, "model", rig->name);
    claas_json_set_string(line, "device", stats.name);
    return line;
}

/* All but the memory map, whose names would be wide columns. */
static void print_row(const cJSON *line, bool heads)
{
    for (const cJSON *item = line->child; item != NULL; item = item->next) {
        int width = (int)strlen(item->string);
        char text[80];

        if (cJSON_IsObject(item))
            continue;
        if (cJSON_IsString(item)) {
            snprintf(text, sizeof(text), "%s", item->valuestring);
            width = strlen(text) > (size_t)width ? (int)strlen(text) : width;
        } else if (item->valuedouble == floor(item->valuedouble)) {
            snprintf(text, sizeof(text), "%.0f", item->valuedouble);
            width = width < 10 ? 10 : width;
        } else {
            snprintf(text, sizeof(text), "%.4g", item->valuedouble);
            width = width < 8 ? 8 : width;
        }
        printf("%s%*s", item != line->child ? "  " : "", cJSON_IsString(item) ? -width : width,
               heads ? item->string : text);
    }
    puts("");
}

int bench_print(const struct bench_args *args, cJSON *line)
{
    static bool printed;
    int rc = 0;

    if (args->json) {
        CLAAS_AUTO_FREE char *text = claas_json_print(line);

        if (text == NULL)
            rc = claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        else
            puts(text);
    } else if (line != NULL) {
        if (!printed)
            print_row(line, true);
        printed = true;
        print_row(line, false);
    }
    fflush(stdout);
    cJSON_Delete(line);
    return rc;
}
