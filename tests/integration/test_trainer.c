/* Adapters being made and imported: the trainer on a tiny model beside the real storage. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "runtime_fixture.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

static int set_up(void **state)
{
    struct rig *rig = CLAAS_NEW(struct rig);
    struct claas_model_options model = {.path = "random:tiny-llama"};
    char data[96];
    const char *overrides[] = {data, "log.level=error"};

    claas_copy_text(rig->dir, sizeof(rig->dir), "/tmp/claas-test-XXXXXX");
    assert_non_null(mkdtemp(rig->dir));
    snprintf(data, sizeof(data), "data=%s", rig->dir);
    assert_int_equal(claas_config_load(NULL, overrides, CLAAS_COUNT(overrides), &rig->config), 0);
    assert_int_equal(claas_model_open(&model, &rig->model), 0);
    assert_int_equal(
        claas_device_open(&(struct claas_device_options){.threads = 1}, rig->model, &rig->device),
        0);
    rig->probe = probe_new();
    rig->storage = (struct claas_storage_args){rig->config};
    rig->trainer = (struct claas_trainer_args){rig->config, rig->device};
    assert_int_equal(claas_runtime_new(rig->config, &rig->runtime), 0);
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_storage_class, "storage", &rig->storage), 0);
    assert_int_equal(
        claas_runtime_start(rig->runtime, &claas_trainer_class, "trainer.0", &rig->trainer), 0);
    assert_int_equal(claas_runtime_start(rig->runtime, &driver_class, "driver", rig->probe), 0);
    *state = rig;
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

#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(test_names_come_first),
        TEST(test_imports_run_beside_the_loop),
        TEST(test_a_large_upload_is_not_read),
        TEST(test_import),
        TEST(test_errors_name_no_paths_of_the_server),
    };

    return cmocka_run_group_tests(tests, NULL, NULL);
}
