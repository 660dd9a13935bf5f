/* The configuration: every type, precedence, messages with line, column and caret, and hostile
 * files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "claas/config.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char dir[] = "/tmp/claas-config-XXXXXX";
static char file_path[64];
static int memory_fd;

static void write_file(const char *text, size_t length)
{
    assert_int_equal(claas_file_write(file_path, text, length), 0);
}

/* Loads a file of this text. */
static int load(const char *text, claas_config_t **ret)
{
    write_file(text, strlen(text));
    return claas_config_load(file_path, NULL, 0, ret);
}

static void loads(const char *text)
{
    claas_config_t *config = NULL;

    if (load(text, &config) < 0)
        fail_msg("%s", claas_error_text());
    claas_config_free(&config);
}

/* The whole sentence, after the file's name. */
static void refuses(const char *text, const char *sentence)
{
    claas_config_t *config = NULL;
    int rc = load(text, &config);

    claas_config_free(&config);
    assert_true(rc == CLAAS_ERR_INVALID || rc == CLAAS_ERR_FORMAT);
    const char *got = claas_error_text();
    if (strncmp(got, file_path, strlen(file_path)) != 0)
        fail_msg("no file name in: %s", got);
    if (strcmp(got + strlen(file_path), sentence) != 0)
        fail_msg("got:\n%s\nexpected:\n%s", got + strlen(file_path), sentence);
}

static int override(const char *text, claas_config_t **ret)
{
    return claas_config_load(NULL, &text, 1, ret);
}

/* --- values ------------------------------------------------------------------------------------
 */

static void defaults(void **state)
{
    claas_config_t *config = NULL;
    const struct claas_setting *setting;

    assert_int_equal(claas_config_load(NULL, NULL, 0, &config), 0);
    assert_string_equal(claas_config_string(config, "listen"), "127.0.0.1:8080");
    assert_int_equal(claas_config_int(config, "http.max_body"), 16 << 20);
    assert_int_equal(claas_config_int(config, "runtime.drain"), 25000);
    assert_int_equal(claas_config_int(config, "storage.keep_rollouts_for"), 30LL * 86400000);
    assert_true(claas_config_number(config, "cycle.eps") == 1e-8);
    assert_true(claas_config_list_has(config, "roles", "sampler"));
    assert_false(claas_config_list_has(config, "roles", "samp"));
    assert_string_equal(claas_config_list_at(config, "roles", 1), "storage");
    assert_null(claas_config_list_at(config, "roles", 5));
    assert_null(claas_config_list_at(config, "cycle.forms", 0));
    assert_string_equal(claas_config_origin(config, "listen"), "default");
    for (size_t i = 0; (setting = claas_config_setting_at(i)) != NULL; i++)
        assert_string_equal(claas_config_text(config, setting->key), setting->default_text);
    claas_config_free(&config);
    claas_config_free(&config);
}

struct value_case {
    const char *override;
    int rc;
    double value;
};

static void numbers_and_units(void **state)
{
    static const struct value_case cases[] = {
        {"device.threads=4", 0, 4},
        {"device.threads=+4", 0, 4},
        {"device.threads=-1", CLAAS_ERR_INVALID, 0},
        {"device.threads=1025", CLAAS_ERR_INVALID, 0},
        {"device.threads=4.0", CLAAS_ERR_INVALID, 0},
        {"device.threads=0x4", CLAAS_ERR_INVALID, 0},
        {"device.threads=", CLAAS_ERR_INVALID, 0},
        {"device.threads= 4", CLAAS_ERR_INVALID, 0},
        {"device.threads=99999999999999999999", CLAAS_ERR_INVALID, 0},
        {"cycle.seed=9007199254740991", 0, 9007199254740991.0},
        {"chat.temperature=0.7", 0, 0.7},
        {"chat.temperature=1e-3", 0, 0.001},
        {"chat.temperature=nan", CLAAS_ERR_INVALID, 0},
        {"chat.temperature=inf", CLAAS_ERR_INVALID, 0},
        {"chat.temperature=-0.1", CLAAS_ERR_INVALID, 0},
        {"chat.temperature=0.7x", CLAAS_ERR_INVALID, 0},
        {"http.max_body=2048", 0, 2048},
        {"http.max_body=2KiB", 0, 2048},
        {"http.max_body=2 KiB", 0, 2048},
        {"http.max_body=2kB", 0, 2000},
        {"http.max_body=1.5MiB", 0, 1572864},
        {"http.max_body=1GiB", 0, 1073741824},
        {"http.max_body=2GiB", CLAAS_ERR_INVALID, 0},
        {"http.max_body=5XiB", CLAAS_ERR_INVALID, 0},
        {"http.max_body=MiB", CLAAS_ERR_INVALID, 0},
        {"runtime.drain=1500ms", 0, 1500},
        {"runtime.drain=1.5s", 0, 1500},
        {"runtime.drain=2m", 0, 120000},
        {"runtime.drain=1h", 0, 3600000},
        {"runtime.drain=2h", CLAAS_ERR_INVALID, 0},
        {"runtime.drain=30", CLAAS_ERR_INVALID, 0},
        {"feedback.wait=0", 0, 0},
        {"storage.keep_rollouts_for=7d", 0, 7.0 * 86400000},
    };

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        claas_config_t *config = NULL;
        char key[64];
        int rc = override(cases[i].override, &config);

        if (rc != cases[i].rc)
            fail_msg("%s: %d (%s)", cases[i].override, rc, claas_error_text());
        snprintf(key, sizeof(key), "%.*s", (int)strcspn(cases[i].override, "="), cases[i].override);
        if (rc == 0)
            assert_true(claas_config_number(config, key) == cases[i].value);
        claas_config_free(&config);
    }
}

static void lists_and_texts(void **state)
{
    claas_config_t *config = NULL;

    assert_int_equal(override("roles= trainer , sampler", &config), 0);
    assert_string_equal(claas_config_list_at(config, "roles", 0), "trainer");
    assert_string_equal(claas_config_list_at(config, "roles", 1), "sampler");
    assert_null(claas_config_list_at(config, "roles", 2));
    claas_config_free(&config);
    assert_int_equal(override("roles=", &config), 0);
    assert_null(claas_config_list_at(config, "roles", 0));
    claas_config_free(&config);
    assert_int_equal(override("roles=a,,b", &config), CLAAS_ERR_INVALID);
    assert_int_equal(override("model=/a=b", &config), 0);
    assert_string_equal(claas_config_string(config, "model"), "/a=b");
    claas_config_free(&config);
    assert_int_equal(override("model=\xff", &config), CLAAS_ERR_INVALID);
}

static void wrong_overrides(void **state)
{
    claas_config_t *config = NULL;

    assert_int_equal(override("listen", &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "'listen' is not of the form key=value");
    assert_int_equal(override("lisen=x", &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "unknown setting 'lisen', did you mean 'listen'?");
    assert_int_equal(override("drain=1s", &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(),
                        "unknown setting 'drain', did you mean 'runtime.drain'?");
    assert_int_equal(override("completely.other=x", &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "unknown setting 'completely.other'");
    assert_int_equal(override("device.threads=many", &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "device.threads=many: 'many' is not an integer");
}

/* A word that nobody knows is the configuration's fault, and the sentence says which there are. */
static void wrong_words(void **state)
{
    static const char *const cases[][2] = {
        {"log.level=loud", "debug, info, warning, error"},
        {"log.level=", "debug, info, warning, error"},
        {"log.format=xml", "auto, text, json"},
        {"log.format=auto, text", "auto, text, json"},
        {"device.name=nope", "auto, cpu, cuda"},
        {"device.precision=f64", "bf16, f32"},
        {"device.precision=bf", "bf16, f32"},
        {"cycle.show_standing=nope", "auto, new, all"},
        {"cycle.forms=brief,nope", "hindsight, brief, system, list, userlist, turns"},
        {"chat_template=nope", "chatml, smollm2, qwen2.5, qwen3, llama3, llama3.1, llama3.2"},
    };
    claas_config_t *config = NULL;

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        assert_int_equal(override(cases[i][0], &config), CLAAS_ERR_INVALID);
        const char *got = strstr(claas_error_text(), " is none of ");
        if (!got || strcmp(got + strlen(" is none of "), cases[i][1]) != 0)
            fail_msg("%s: %s", cases[i][0], claas_error_text());
    }
    assert_int_equal(override("chat_template=", &config), 0);
    claas_config_free(&config);
    assert_int_equal(override("chat_template=llama3.2", &config), 0);
    assert_string_equal(claas_config_string(config, "chat_template"), "llama3.2");
    claas_config_free(&config);
}

static void bounds_are_exact(void **state)
{
    claas_config_t *config = NULL;

    assert_int_equal(override("cycle.seed=-1", &config), CLAAS_ERR_INVALID);
    assert_non_null(strstr(claas_error_text(), "out of range: 0 to 9007199254740991"));
}

static void precedence(void **state)
{
    const char *overrides[] = {"device.max_batch=4", "device.max_batch=5"};
    claas_config_t *config = NULL;
    const char *text = "device:\n  threads: 1\n  max_batch: 1\n  adapters: 1\n";

    write_file(text, strlen(text));
    setenv("CLAAS_DEVICE_MAX_BATCH", "3", 1);
    setenv("CLAAS_DEVICE_ADAPTERS", "2", 1);
    assert_int_equal(claas_config_load(file_path, overrides, 2, &config), 0);
    assert_int_equal(claas_config_int(config, "device.threads"), 1);
    assert_string_equal(claas_config_origin(config, "device.threads"), "file");
    assert_int_equal(claas_config_int(config, "device.adapters"), 2);
    assert_string_equal(claas_config_origin(config, "device.adapters"), "environment");
    assert_int_equal(claas_config_int(config, "device.max_batch"), 5);
    assert_string_equal(claas_config_origin(config, "device.max_batch"), "command line");
    assert_string_equal(claas_config_origin(config, "device.slice"), "default");
    claas_config_free(&config);
    setenv("CLAAS_DEVICE_ADAPTERS", "none", 1);
    assert_int_equal(claas_config_load(NULL, NULL, 0, &config), CLAAS_ERR_INVALID);
    assert_string_equal(claas_error_text(), "CLAAS_DEVICE_ADAPTERS=none: 'none' is not an integer");
    unsetenv("CLAAS_DEVICE_MAX_BATCH");
    unsetenv("CLAAS_DEVICE_ADAPTERS");
}

/* --- files -------------------------------------------------------------------------------------
 */

static void good_files(void **state)
{
    claas_config_t *config = NULL;

    loads("");
    loads("# nothing\n");
    loads("---\n...\n");
    loads("---\nlisten: 127.0.0.1:1\n...\n# the end\n");
    loads("http:\n");
    loads("http: {}\n");
    assert_int_equal(load("listen: 0.0.0.0:80 # a comment\nroles: [trainer, sampler]\n"
                          "log:\n  level: \"debug\"\nhttp.max_body: 1MiB\n"
                          "cycle:\n  forms:\n    - brief\n    - list\n",
                          &config),
                     0);
    assert_string_equal(claas_config_string(config, "listen"), "0.0.0.0:80");
    assert_string_equal(claas_config_string(config, "log.level"), "debug");
    assert_int_equal(claas_config_int(config, "http.max_body"), 1 << 20);
    assert_string_equal(claas_config_list_at(config, "roles", 1), "sampler");
    assert_string_equal(claas_config_list_at(config, "cycle.forms", 1), "list");
    claas_config_free(&config);
    assert_int_equal(load("cycle:\n  forms: brief,list\nmodel:\n", &config), 0);
    assert_string_equal(claas_config_list_at(config, "cycle.forms", 1), "list");
    assert_string_equal(claas_config_string(config, "model"), "");
    claas_config_free(&config);
}

static void bad_files(void **state)
{
    refuses("listn: x\n", ":1:1: error: unknown setting 'listn', did you mean 'listen'?\n"
                          "listn: x\n^~~~~");
    refuses("http:\n  max_boddy: 1\n",
            ":2:3: error: unknown setting 'http.max_boddy', did you mean 'http.max_body'?\n"
            "  max_boddy: 1\n  ^~~~~~~~~");
    refuses("http:\n  max_body: huge\n", ":2:13: error: 'huge' is not a size (like 64MiB)\n"
                                         "  max_body: huge\n            ^~~~");
    refuses("log:\n  format: xml\n", ":2:11: error: 'xml' is none of auto, text, json\n"
                                     "  format: xml\n          ^~~");
    refuses("cycle:\n  forms: [brief, nope]\n",
            ":2:10: error: 'nope' is none of hindsight, brief, system, list, userlist, turns\n"
            "  forms: [brief, nope]\n         ^~~~~~~~~~~~~");
    refuses("runtime: {drain: 30}\n", ":1:18: error: '30' needs a unit: ms, s, m, h or d\n"
                                      "runtime: {drain: 30}\n                 ^~");
    refuses("http.max_body: 1MiB\nhttp:\n  max_body: 1MiB\n",
            ":3:3: error: this setting is there twice\n  max_body: 1MiB\n  ^~~~~~~~");
    refuses("http: 5\n", ":1:7: error: this is a section: its settings go below it, indented\n"
                         "http: 5\n      ^");
    refuses("listen: [a, b]\n", ":1:9: error: a single value is expected\n"
                                "listen: [a, b]\n        ^~~~~~");
    refuses("- a\n- b\n",
            ":1:1: error: the file must be a mapping of settings (key: value)\n- a\n^~~\n- b\n~~~");
    refuses("listen: 127.0.0.1:1\n---\nlog:\n  level: debug\n",
            ":3:1: error: a second document: all settings are in one\nlog:\n^~~");
    refuses("{}\n---\n- a\n", ":3:1: error: a second document: all settings are in one\n- a\n^~~");
    refuses("listen: &a x\nmodel: *a\n",
            ":2:9: error: aliases are not supported\nmodel: *a\n        ^");
}

/* libfyaml's own words, so only their place is checked. */
static void broken_yaml(void **state)
{
    static const char *const texts[] = {"listen: [a\n",
                                        "listen: \"a\n",
                                        "listen: a\n\tmodel: b\n",
                                        "listen: a\nlisten: b\n",
                                        "a: b: c\n",
                                        "{",
                                        "\"",
                                        "@x: 1\n",
                                        "listen: 127.0.0.1:1\n---\n",
                                        "listen: 127.0.0.1:1\n---\n@x: 1\n"};

    for (size_t i = 0; i < CLAAS_COUNT(texts); i++) {
        claas_config_t *config = NULL;

        assert_true(load(texts[i], &config) < 0);
        const char *got = claas_error_text();
        if (strncmp(got, file_path, strlen(file_path)) != 0 || !strstr(got, "error: "))
            fail_msg("%s -> %s", texts[i], got);
    }
}

static void unreadable(void **state)
{
    claas_config_t *config = NULL;
    char *large = claas_alloc(1, (1 << 20) + 2);

    assert_int_equal(claas_config_load("/nowhere/claas.yaml", NULL, 0, &config),
                     CLAAS_ERR_NOT_FOUND);
    memset(large, '#', (1 << 20) + 1);
    write_file(large, (1 << 20) + 1);
    assert_true(claas_config_load(file_path, NULL, 0, &config) < 0);
    free(large);
    write_file("listen: \"a\0b\"\n", 14);
    assert_true(claas_config_load(file_path, NULL, 0, &config) < 0);
    write_file("listen: \xff\n", 10);
    assert_int_equal(claas_config_load(file_path, NULL, 0, &config), CLAAS_ERR_FORMAT);
    assert_null(config);
}

static char *sample(size_t *ret_length)
{
    char *text = NULL;
    FILE *file = open_memstream(&text, ret_length);

    claas_config_print_sample(file);
    fclose(file);
    return text;
}

/* The sample is the defaults, and stays so through the parser. */
static void sample_is_defaults(void **state)
{
    size_t length;
    CLAAS_AUTO_FREE char *text = sample(&length);
    claas_config_t *config = NULL;
    const struct claas_setting *setting;

    if (load(text, &config) < 0)
        fail_msg("%s", claas_error_text());
    for (size_t i = 0; (setting = claas_config_setting_at(i)) != NULL; i++) {
        assert_string_equal(claas_config_text(config, setting->key), setting->default_text);
        assert_string_equal(claas_config_origin(config, setting->key), "file");
    }
    claas_config_free(&config);
}

/* From a file in memory: this runs ten thousand times. */
static void try(const char *text, size_t length)
{
    claas_config_t *config = NULL;
    char path[64];

    assert_int_equal(ftruncate(memory_fd, 0), 0);
    assert_int_equal(pwrite(memory_fd, text, length, 0), (ssize_t)length);
    snprintf(path, sizeof(path), "/proc/self/fd/%d", memory_fd);
    claas_config_load(path, NULL, 0, &config);
    claas_config_free(&config);
}

static const char seed_text[] = "listen: 127.0.0.1:0\nroles: [bridge, 'storage', \"sampler\"]\n"
                                "log: {level: info, format: auto}\nhttp:\n  max_body: 16MiB\n"
                                "  idle_timeout: 120s # idle\ncycle:\n  forms:\n  - brief\n"
                                "  rate: 7e-4\nmodel: |\n  a\n  b\n";

static void every_truncation(void **state)
{
    size_t length;
    CLAAS_AUTO_FREE char *text = sample(&length);

    for (size_t cut = 0; cut < sizeof(seed_text); cut++)
        try(seed_text, cut);
    for (size_t cut = 0; cut < length; cut += 7)
        try(text, cut);
}

static void byte_flips(void **state)
{
    char text[sizeof(seed_text)];

    for (uint64_t i = 0; i < 10000; i++) {
        uint32_t random[4];

        claas_philox(1, 2, i, random);
        memcpy(text, seed_text, sizeof(text));
        text[random[0] % (sizeof(text) - 1)] = (char)random[1];
        if (random[2] % 2)
            text[random[2] / 2 % (sizeof(text) - 1)] ^= (char)(1 << random[3] % 8);
        try(text, sizeof(text) - 1);
    }
}

static int set_up(void **state)
{
    assert_non_null(mkdtemp(dir));
    memory_fd = memfd_create("config", MFD_CLOEXEC);
    assert_true(memory_fd >= 0);
    snprintf(file_path, sizeof(file_path), "%s/c.yaml", dir);
    return 0;
}

static int tear_down(void **state)
{
    close(memory_fd);
    return claas_remove_all(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(defaults),         cmocka_unit_test(numbers_and_units),
        cmocka_unit_test(lists_and_texts),  cmocka_unit_test(wrong_overrides),
        cmocka_unit_test(wrong_words),      cmocka_unit_test(bounds_are_exact),
        cmocka_unit_test(precedence),       cmocka_unit_test(good_files),
        cmocka_unit_test(bad_files),        cmocka_unit_test(broken_yaml),
        cmocka_unit_test(unreadable),       cmocka_unit_test(sample_is_defaults),
        cmocka_unit_test(every_truncation), cmocka_unit_test(byte_flips),
    };

    return cmocka_run_group_tests(tests, set_up, tear_down);
}
