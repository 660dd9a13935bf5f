/* Adapters being made and imported, and steps of cycles: the trainer on a tiny model beside the
 * real storage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "storage.h"
#include "trainer.h"

#define WAIT_MS 30000
#define IMPORTS 4 /* at once: imports.c */

struct rig {
    char dir[64];
    claas_config_t *config;
    claas_model_t *model;
    claas_device_t *device;
    claas_runtime_t *runtime;
    struct probe *probe;
    struct claas_storage_args storage;
    struct claas_trainer_args trainer;
};

static void start_trainer(struct rig *rig)
{
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_trainer_class, "trainer.0", &rig->trainer), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &driver_class, "driver", rig->probe), 0);
}

static int set_up_storage(void **state)
{
    struct rig *rig = CLAAS_NEW(struct rig);
    struct claas_model_options model = {.path = "random:tiny-llama"};
    struct claas_device_options device = {.threads = 1, .host_cache = 64 << 20};
    char data[96];
    const char *overrides[] = {data, "log.level=error"};

    claas_copy_text(rig->dir, sizeof(rig->dir), "/tmp/claas-test-XXXXXX");
    assert_non_null(mkdtemp(rig->dir));
    snprintf(data, sizeof(data), "data=%s", rig->dir);
    assert_int_equal(claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &rig->config), 0);
    assert_int_equal(claas_model_open(&model, &rig->model), 0);
    assert_int_equal(claas_device_open(&device, rig->model, &rig->device), 0);
    rig->probe = probe_new();
    rig->storage = (struct claas_storage_args){rig->config};
    rig->trainer = (struct claas_trainer_args){rig->config, rig->device};
    assert_int_equal(claas_runtime_new(rig->config, &rig->runtime), 0);
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_storage_class, "storage", &rig->storage), 0);
    *state = rig;
    return 0;
}

static int set_up(void **state)
{
    (void)set_up_storage(state);
    start_trainer(*state);
    return 0;
}

/* The first training step loses the device. */
static int set_up_lost(void **state)
{
    assert_int_equal(setenv("CLAAS_DEVICE_FAULT", "DEVICE_LOST:1", 1), 0);
    (void)set_up(state);
    assert_int_equal(unsetenv("CLAAS_DEVICE_FAULT"), 0);
    return 0;
}

static int tear_down(void **state)
{
    struct rig *rig = *state;

    claas_runtime_free(&rig->runtime);
    claas_device_free(&rig->device);
    claas_model_free(&rig->model);
    claas_config_free(&rig->config);
    probe_free(&rig->probe);
    claas_remove_all(rig->dir);
    free(rig);
    return 0;
}

static struct question ask_about(const char *to, int type, const char *lora_id)
{
    cJSON *body = cJSON_CreateObject();

    if (lora_id)
        claas_json_set_string(body, "lora_id", lora_id);
    return (struct question){.to = to, .type = type, .body = body, .timeout_ms = WAIT_MS};
}

static struct question ask_import(const char *lora_id, const char *path)
{
    struct question question = ask_about("trainer", CLAAS_MSG_ADAPTER_IMPORT, lora_id);

    claas_json_set_string(question.body, "path", path);
    return question;
}

static void init(struct rig *rig, const char *lora_id)
{
    struct question question = ask_about("trainer", CLAAS_MSG_ADAPTER_INIT, lora_id);

    assert_int_equal(probe_call(rig->probe, &question), 0);
}

static struct timespec changed(const char *path)
{
    struct stat info;

    assert_int_equal(stat(path, &info), 0);
    return info.st_mtim;
}

/* Nothing is made for a name that is none. */
static void test_names_come_first(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_about("trainer", CLAAS_MSG_ADAPTER_INIT, "me/a\n\x1b[2J");
    CLAAS_AUTO_FREE char *staging = claas_format("%s/staging", rig->dir);
    struct timespec before = changed(staging), after;

    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_INVALID);
    assert_non_null(strstr(question.text, "'me/a\\x0A\\x1B[2J'"));
    after = changed(staging);
    assert_true(before.tv_sec == after.tv_sec && before.tv_nsec == after.tv_nsec);
    init(rig, "me/a");
    after = changed(staging);
    assert_false(before.tv_sec == after.tv_sec && before.tv_nsec == after.tv_nsec);
}

/* Zips that hold up who reads them (a pipe without a writer) hold up nobody else. */
static void test_imports_run_beside_the_loop(void **state)
{
    struct rig *rig = *state;
    struct question imports[IMPORTS + 1];
    struct question status = ask_about("trainer.0", CLAAS_MSG_STATUS, NULL);
    CLAAS_AUTO_FREE char *late = claas_format("%s/staging/upload-late.zip", rig->dir);
    char paths[IMPORTS][128];

    for (int i = 0; i < IMPORTS; i++) {
        snprintf(paths[i], sizeof(paths[i]), "%s/staging/upload-%d.zip", rig->dir, i);
        assert_int_equal(mkfifo(paths[i], 0600), 0);
        imports[i] = ask_import("me/a", paths[i]);
        probe_ask(rig->probe, &imports[i]);
    }
    assert_int_equal(claas_file_write(late, "no zip", 6), 0);
    imports[IMPORTS] = ask_import("me/a", late);
    assert_int_equal(probe_call(rig->probe, &imports[IMPORTS]), CLAAS_ERR_OVERLOADED);
    assert_int_equal(access(late, F_OK), -1); /* consumed, refused as it was */
    assert_int_equal(probe_call(rig->probe, &status), 0);
    init(rig, "me/b");
    for (int i = 0; i < IMPORTS; i++) {
        int fd = open(paths[i], O_WRONLY); /* waits for the reader */

        assert_int_equal(imports[i].ends, 0);
        assert_true(fd >= 0);
        close(fd);
        probe_await(rig->probe, &imports[i]);
        assert_int_equal(imports[i].code, CLAAS_ERR_FORMAT);
        assert_null(strstr(imports[i].text, rig->dir));
        assert_int_equal(access(paths[i], F_OK), -1);
    }
}

static void test_a_large_upload_is_not_read(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO_FREE char *path = claas_format("%s/staging/upload-x.zip", rig->dir);
    struct question question = ask_import("me/a", path);
    int fd = open(path, O_WRONLY | O_CREAT, 0600);

    assert_int_equal(ftruncate(fd, (off_t)1 << 40), 0); /* reading it would take hours */
    close(fd);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_TOO_LARGE);
    assert_non_null(strstr(question.text, "1099511627776 bytes"));
    assert_null(strstr(question.text, rig->dir));
    assert_int_equal(access(path, F_OK), -1);
}

/* A zip for an import: what the export of an adapter is. */
static char *export_zip(struct rig *rig, const char *lora_id)
{
    struct question question = ask_about("storage", CLAAS_MSG_ADAPTER_EXPORT, lora_id);
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    const char *path = NULL;

    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_int_equal(claas_json_parse(question.reply, strlen(question.reply), 4096, &reply), 0);
    assert_int_equal(claas_json_get_string(reply, "path", &path), 1);
    return claas_strdup(path);
}

static void test_import(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO_FREE char *path = NULL;
    struct question question;

    init(rig, "me/a");
    path = export_zip(rig, "me/a");
    question = ask_import("me/b", path);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_string_equal(question.reply, "{\"lora_id\":\"me/b\",\"version\":0}");
    assert_int_equal(access(path, F_OK), -1);
    free(CLAAS_TAKE(path));
    path = export_zip(rig, "me/b");
    question = ask_import("me/b-latest", path);
    assert_int_equal(probe_call(rig->probe, &question), 0);
    assert_non_null(strstr(question.reply, "\"version\":1"));
}

/* Nothing outside the staging folder is touched; its own path may look odd. */
static void test_places_of_imports(void **state)
{
    static const char *const names[] = {"", ".", "..", "../lock", "deep/x.zip", "../staging/x"};
    struct rig *rig = *state;

    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        CLAAS_AUTO_FREE char *path = claas_format("%s/staging/%s", rig->dir, names[i]);
        struct question question = ask_import("me/a", path);

        assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_DENIED);
    }
}

/* Neither what is wrong with the upload nor what is wrong with this disk says where it lies. */
static void test_errors_name_no_paths_of_the_server(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO_FREE char *adapters = claas_format("%s/adapters", rig->dir);
    CLAAS_AUTO_FREE char *aside = claas_format("%s/aside", rig->dir);
    CLAAS_AUTO_FREE char *garbage = claas_format("%s/staging/upload-1.zip", rig->dir);
    CLAAS_AUTO_FREE char *path = NULL;
    struct question question;

    assert_int_equal(claas_file_write(garbage, "PK\3\4 garbage", 12), 0);
    question = ask_import("me/b", garbage);
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_FORMAT);
    assert_null(strstr(question.text, rig->dir));
    init(rig, "me/a");
    path = export_zip(rig, "me/a");
    assert_int_equal(rename(adapters, aside), 0);
    assert_int_equal(claas_file_write(adapters, "", 0), 0); /* where a folder has to be */
    question = ask_import("me/b", path);
    assert_true(probe_call(rig->probe, &question) < 0);
    assert_non_null(strstr(question.text, "adapters"));
    assert_null(strstr(question.text, rig->dir));
    assert_int_equal(unlink(adapters), 0);
    assert_int_equal(rename(aside, adapters), 0);
    init(rig, "me/b");
}

/* --- cycles --- */

static cJSON *parse(const char *text)
{
    cJSON *json = NULL;

    assert_int_equal(claas_json_parse(text, strlen(text), 1 << 16, &json), 0);
    return json;
}

static cJSON *call(struct rig *rig, int type, cJSON *body, const struct claas_attachment *parts,
                   size_t count)
{
    struct question question = {.to = "trainer",
                                .type = type,
                                .body = body,
                                .attachments = parts,
                                .attachment_count = count,
                                .timeout_ms = WAIT_MS};

    if (probe_call(rig->probe, &question) != 0)
        fail_msg("%s", question.text);
    return parse(question.reply[0] ? question.reply : "{}");
}

static cJSON *about_cycle(const char *id)
{
    cJSON *body = cJSON_CreateObject();

    claas_json_set_string(body, "cycle_id", id);
    return body;
}

/* With what the sampler of that model said. */
static struct question ask_begin(struct rig *rig, const char *id, int max_tokens,
                                 const char *fingerprint)
{
    static const int32_t prompt[] = {5, 6, 7, 8}, response[] = {9, 10};
    static const float logprobs[] = {-1, -2};
    static const struct claas_attachment parts[] = {
        {.data = prompt, .length = sizeof(prompt)},
        {.data = response, .length = sizeof(response)},
        {.data = logprobs, .length = sizeof(logprobs)},
    };
    CLAAS_AUTO_FREE char *directory = claas_format("%s/adapters/me/a/v000000", rig->dir);
    cJSON *body = about_cycle(id);

    claas_json_set_string(body, "lora_id", "me/a");
    claas_json_set_string(body, "model", "sampled");
    claas_json_set_string(body, "fingerprint", fingerprint);
    claas_json_set_int(body, "version", 0);
    claas_json_set_string(body, "directory", directory);
    claas_json_set_int(body, "seed", 3);
    claas_json_set_int(body, "max_tokens", max_tokens);
    claas_json_set(body, "items",
                   parse("[{\"feedback\":\"Shorter.\",\"attachments\":0,"
                         "\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}]"));
    claas_json_set(body, "replay", cJSON_CreateArray());
    claas_json_set(body, "standing", cJSON_CreateArray());
    claas_json_set(body, "recent", cJSON_CreateArray());
    return (struct question){.to = "trainer",
                             .type = CLAAS_MSG_CYCLE_BEGIN,
                             .body = body,
                             .attachments = parts,
                             .attachment_count = CLAAS_COUNT(parts),
                             .timeout_ms = WAIT_MS};
}

static void begin(struct rig *rig, const char *id, int max_tokens)
{
    struct question question = ask_begin(rig, id, max_tokens, claas_model_fingerprint(rig->model));

    if (probe_call(rig->probe, &question) != 0)
        fail_msg("%s", question.text);
}

/* Before anything is loaded, and in words that say which is which. */
static void test_another_model(void **state)
{
    struct rig *rig = *state;
    struct question question = ask_begin(rig, "c", 1, "0123456789abcdef");

    init(rig, "me/a");
    assert_int_equal(probe_call(rig->probe, &question), CLAAS_ERR_UNAVAILABLE);
    assert_non_null(
        strstr(question.text, "the trainer has the model random-tiny-llama (fingerprint "));
    assert_non_null(strstr(question.text, "the sampler sampled (fingerprint 0123456789abcdef)"));
    begin(rig, "c", 1);
}

#define ROWS                                                                                       \
    "[{\"source\":\"feedback\",\"index\":0,\"form\":\"hindsight\",\"from_teacher\":false},"        \
    "{\"source\":\"other\",\"index\":2,\"form\":\"hindsight\",\"from_teacher\":false}]"
#define OTHER_ROWS                                                                                 \
    "[{\"source\":\"feedback\",\"index\":0,\"form\":\"hindsight\",\"from_teacher\":true}]"

static cJSON *about_step(const char *id, int number)
{
    cJSON *body = about_cycle(id);

    claas_json_set_int(body, "step", number);
    claas_json_set(body, "rows", parse(ROWS));
    claas_json_set(body, "training", parse("{\"rate\":0.001}"));
    claas_json_set_bool(body, "gate", true);
    return body;
}

/* What a step did: loss, gradient and the gate's figures, printed. */
static char *step(struct rig *rig, const char *id, int number, const char *next)
{
    cJSON *body = about_step(id, number);
    CLAAS_AUTO(claas_json_free) cJSON *reply = NULL;
    CLAAS_AUTO_FREE char *gate = NULL;
    const cJSON *metadata;
    double loss = 0, norm = 0;
    int64_t tokens = 0;

    if (next)
        claas_json_set(body, "next", parse(next));
    reply = call(rig, CLAAS_MSG_CYCLE_STEP, body, NULL, 0);
    metadata = claas_json_get(reply, "metadata");
    assert_int_equal(claas_json_get_number(metadata, "total_loss", -1e9, 1e9, &loss), 1);
    assert_int_equal(claas_json_get_number(metadata, "grad_norm", -1e9, 1e9, &norm), 1);
    assert_int_equal(claas_json_get_int(metadata, "tokens_processed", 1, 1000, &tokens), 1);
    assert_non_null(gate = claas_json_print(claas_json_get(reply, "gate")));
    return claas_format("%.9g %.9g %d %s", loss, norm, (int)tokens, gate);
}

static uint64_t decoded(const struct rig *rig)
{
    struct claas_device_stats stats;

    claas_device_stats(rig->device, &stats);
    return stats.tokens_decoded;
}

/* The second gate of a cycle asked the teacher what the first one had asked. */
static void expect_teacher_kept(const struct rig *rig)
{
    struct claas_device_stats stats;

    claas_device_stats(rig->device, &stats);
    assert_int_equal(stats.teacher_missed, 1);
    assert_int_equal(stats.teacher_found, 1);
}

static void end(struct rig *rig, const char *id)
{
    cJSON_Delete(call(rig, CLAAS_MSG_CYCLE_END, about_cycle(id), NULL, 0));
}

/* Rollouts that are sampled while the gate is measured are those that the step would have sampled:
 * nothing is sampled twice, and the steps are the same. If the rows become others, so do they. */
static void test_steps_begun_ahead(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO_FREE char *first = NULL, *second = NULL;
    uint64_t before, of_first, of_both;

    init(rig, "me/a");
    begin(rig, "plain", 12);
    before = decoded(rig);
    first = step(rig, "plain", 1, NULL);
    of_first = decoded(rig) - before;
    second = step(rig, "plain", 2, NULL);
    of_both = decoded(rig) - before;
    expect_teacher_kept(rig);
    end(rig, "plain");
    for (int i = 0; i < 2; i++) {
        CLAAS_AUTO_FREE char *again = NULL, *ahead = NULL;

        begin(rig, "ahead", 12);
        before = decoded(rig);
        again = step(rig, "ahead", 1, i == 0 ? ROWS : OTHER_ROWS);
        assert_string_equal(again, first);
        while (decoded(rig) - before < of_first + 1) /* else the test's time is up */
            (void)poll(NULL, 0, 1);
        ahead = step(rig, "ahead", 2, NULL);
        assert_string_equal(ahead, second);
        if (i == 0)
            assert_int_equal(decoded(rig) - before, of_both);
        end(rig, "ahead");
    }
}

/* How many directories of cycles lie in staging/ that have a config, which comes last. */
static int count_staged(const struct rig *rig)
{
    CLAAS_AUTO_FREE char *staging = claas_format("%s/staging", rig->dir);
    DIR *dir = opendir(staging);
    const struct dirent *entry;
    int count = 0;

    assert_non_null(dir);
    while ((entry = readdir(dir)) != NULL) {
        CLAAS_AUTO_FREE char *path =
            claas_format("%s/%s/adapter_config.json", staging, entry->d_name);

        count += strncmp(entry->d_name, "cycle-", 6) == 0 && access(path, F_OK) == 0;
    }
    closedir(dir);
    return count;
}

static void await_staged(const struct rig *rig, int count)
{
    for (int i = 0; i < WAIT_MS && count_staged(rig) != count; i++)
        (void)poll(NULL, 0, 1);
    assert_int_equal(count_staged(rig), count);
}

static void keep(struct rig *rig, const char *id, int number)
{
    cJSON *body = about_cycle(id);

    claas_json_set_int(body, "step", number);
    cJSON_Delete(call(rig, CLAAS_MSG_CYCLE_KEEP, body, NULL, 0));
}

/* A kept candidate is written before anybody asks; a better one takes its place; what was staged
 * and not published goes with its cycle. */
static void test_staging_begins_early(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO(claas_json_free) cJSON *staged = NULL;
    CLAAS_AUTO_FREE char *config = NULL;
    const char *directory = "";
    int64_t number = 0;

    init(rig, "me/a");
    begin(rig, "one", 12);
    for (int i = 1; i <= 2; i++) {
        free(step(rig, "one", i, NULL));
        keep(rig, "one", i);
        await_staged(rig, 1);
    }
    staged = call(rig, CLAAS_MSG_CYCLE_STAGE, about_cycle("one"), NULL, 0);
    claas_json_get_string(staged, "directory", &directory);
    claas_json_get_int(staged, "step", 0, 100, &number);
    assert_int_equal(number, 2);
    config = claas_format("%s/adapter_config.json", directory);
    assert_int_equal(access(config, F_OK), 0);
    assert_int_equal(count_staged(rig), 1);
    end(rig, "one");
    assert_int_equal(count_staged(rig), 0);
    begin(rig, "two", 12); /* asked for at once: the one that is being written */
    free(step(rig, "two", 1, NULL));
    keep(rig, "two", 1);
    cJSON_Delete(call(rig, CLAAS_MSG_CYCLE_STAGE, about_cycle("two"), NULL, 0));
    assert_int_equal(count_staged(rig), 1);
    keep(rig, "two", 1); /* ended while it is written */
    end(rig, "two");
    await_staged(rig, 0);
}

/* Storage in another process began anew and emptied the folder: what is in memory is written once
 * more. */
static void test_a_staged_directory_that_is_gone(void **state)
{
    struct rig *rig = *state;
    CLAAS_AUTO_FREE char *staging = claas_format("%s/staging", rig->dir);

    init(rig, "me/a");
    begin(rig, "one", 12);
    free(step(rig, "one", 1, NULL));
    keep(rig, "one", 1);
    for (int i = 0; i < 2; i++) {
        cJSON_Delete(call(rig, CLAAS_MSG_CYCLE_STAGE, about_cycle("one"), NULL, 0));
        assert_int_equal(count_staged(rig), 1);
        if (i == 1)
            break;
        assert_int_equal(claas_remove_all(staging), 0);
        assert_int_equal(claas_mkdir_all(staging), 0);
    }
    end(rig, "one");
    assert_int_equal(count_staged(rig), 0);
}

static void make_staged(const struct rig *rig, char *path, size_t size, long pid)
{
    snprintf(path, size, "%s/staging/cycle-%ld-0123456789abcdef", rig->dir, pid);
    assert_int_equal(claas_mkdir_all(path), 0);
}

/* What trainers left that died while storage lived on goes at the next one's start; what another
 * one that lives has staged stays. */
static void test_what_dead_trainers_left(void **state)
{
    struct rig *rig = *state;
    char dead[128], own[128], other[128];
    pid_t child = fork();

    if (child == 0)
        _exit(0);
    assert_true(child > 0);
    assert_int_equal(waitpid(child, NULL, 0), child);
    make_staged(rig, dead, sizeof(dead), child);
    make_staged(rig, own, sizeof(own), getpid());
    make_staged(rig, other, sizeof(other), getppid());
    start_trainer(rig);
    assert_int_equal(access(dead, F_OK), -1);
    assert_int_equal(access(own, F_OK), -1);
    assert_int_equal(access(other, F_OK), 0);
}

/* The compute thread has done what it was left before: it answers a question after it. */
static void settle(struct rig *rig)
{
    static const int32_t prompt[] = {5, 6};
    struct claas_generate_request request = {
        .prompt = prompt, .prompt_count = 2, .max_tokens = 1, .top_p = 1};
    CLAAS_AUTO(claas_device_client_free) claas_device_client_t *client = NULL;
    struct claas_device_event event;
    enum claas_device_event_kind kind = CLAAS_EVENT_TOKEN;
    uint64_t id;

    for (int i = 0; i < WAIT_MS && claas_device_adapters(rig->device, NULL, 0) > 0; i++)
        (void)poll(NULL, 0, 1);
    assert_int_equal(claas_device_client_new(rig->device, &client), 0);
    assert_int_equal(claas_device_generate(client, &request, &id), 0);
    while (kind == CLAAS_EVENT_TOKEN) {
        assert_int_equal(claas_device_client_wait(client, WAIT_MS, &event), 1);
        kind = event.kind;
        claas_device_event_done(&event);
    }
    assert_int_equal(kind, CLAAS_EVENT_FINISHED);
}

/* Of adapters in the host's memory, when none is on the device any more. */
static uint64_t images(struct rig *rig)
{
    struct claas_device_stats stats;

    settle(rig);
    claas_device_stats(rig->device, &stats);
    return stats.host_cache_images;
}

/* No image is kept of an adapter that storage refuses: its files are removed. */
static void test_what_is_refused_is_forgotten(void **state)
{
    struct rig *rig = *state;
    struct question again = ask_about("trainer", CLAAS_MSG_ADAPTER_INIT, "me/a");
    uint64_t before;

    init(rig, "me/a");
    before = images(rig);
    assert_true(before > 0);
    assert_int_equal(probe_call(rig->probe, &again), CLAAS_ERR_EXISTS);
    assert_int_equal(images(rig), before);
}

/* One's training loses the device while the other still samples: it may be the other's kernels, so
 * both are told why. */
static void test_a_lost_device(void **state)
{
    struct rig *rig = *state;
    struct question questions[2];

    init(rig, "me/a");
    begin(rig, "short", 1);
    begin(rig, "long", 200);
    for (int i = 1; i >= 0; i--) {
        questions[i] = ask_about("trainer", CLAAS_MSG_CYCLE_STEP, NULL);
        cJSON_Delete(questions[i].body);
        questions[i].body = about_step(i == 0 ? "short" : "long", 1);
        probe_ask(rig->probe, &questions[i]);
    }
    for (int i = 0; i < 2; i++) {
        probe_await(rig->probe, &questions[i]);
        assert_int_equal(questions[i].code, CLAAS_ERR_DEVICE_LOST);
    }
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_names_come_first),
        TEST(test_imports_run_beside_the_loop),
        TEST(test_a_large_upload_is_not_read),
        TEST(test_import),
        TEST(test_places_of_imports),
        TEST(test_errors_name_no_paths_of_the_server),
        TEST(test_another_model),
        TEST(test_steps_begun_ahead),
        TEST(test_staging_begins_early),
        TEST(test_a_staged_directory_that_is_gone),
        TEST(test_what_is_refused_is_forgotten),
        cmocka_unit_test_setup_teardown(test_what_dead_trainers_left, set_up_storage, tear_down),
        cmocka_unit_test_setup_teardown(test_a_lost_device, set_up_lost, tear_down),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
