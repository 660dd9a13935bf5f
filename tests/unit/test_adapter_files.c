/* Adapter files: safetensors good and bad, the layout of an adapter's image, PEFT directories
 * written, read back, damaged and refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "claas/adapter.h"
#include "claas/buf.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "claas/safetensors.h"

static const struct claas_model_config shape = {
    .family = CLAAS_FAMILY_QWEN3,
    .hidden = 8,
    .intermediate = 12,
    .layers = 2,
    .heads = 2,
    .kv_heads = 1,
    .head_dim = 6, /* q is 12 wide: not the hidden size */
    .vocab = 32,
};

/* Holds the tests' directories; removed by group_teardown. In memory where possible: some hundred
 * fsyncs to a busy disk take a minute. */
static char root[64];
static int next_directory;

static char *new_path(void)
{
    return claas_format("%s/%d", root, next_directory++);
}

static int group_setup(void **state)
{
    (void)state;
    snprintf(root, sizeof(root), "%s/claas-adapter-XXXXXX",
             access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp");
    return mkdtemp(root) ? 0 : -1;
}

static int group_teardown(void **state)
{
    (void)state;
    return claas_remove_all(root);
}

/* ---- safetensors ---- */

/* Length prefix, header, `bytes` of data. */
static void make_file(struct claas_buf *out, const char *header, size_t bytes)
{
    uint64_t length = strlen(header);

    claas_buf_init(out, 1 << 20);
    claas_buf_add(out, &length, sizeof(length));
    claas_buf_add_text(out, header);
    for (size_t i = 0; i < bytes; i++)
        claas_buf_add(out, "\1", 1);
}

/* Parses a copy that ends where its heap block ends, and reads every byte of every tensor. */
static int parse_copy(const void *bytes, size_t length)
{
    CLAAS_AUTO(claas_safetensors_free) claas_safetensors_t *file = NULL;
    CLAAS_AUTO_FREE uint8_t *copy = malloc(length ? length : 1);
    unsigned sum = 0;

    assert_non_null(copy);
    if (length > 0)
        memcpy(copy, bytes, length);
    int rc = claas_safetensors_parse(copy, length, &file);
    for (size_t i = 0; rc >= 0 && i < claas_safetensors_count(file); i++) {
        const struct claas_safetensor *tensor = claas_safetensors_at(file, i);

        assert_ptr_equal(claas_safetensors_find(file, tensor->name), tensor);
        for (size_t k = 0; k < tensor->bytes; k++)
            sum += tensor->data[k];
    }
    return sum == UINT32_MAX ? -1 : rc;
}

#define ONE "{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}"

struct bad_file {
    const char *header;
    size_t bytes;
    int code;
    const char *text;
};

static const struct bad_file file_cases[] = {
    {ONE, 16, 0, ""},
    {ONE "   ", 16, 0, ""},
    {"{}", 0, 0, ""},
    {"{\"__metadata__\":{\"format\":\"pt\"}}", 0, 0, ""},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 0, ""},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0, 0, ""},
    {"{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]},\"a\":{\"dtype\":\"F16\","
     "\"shape\":[1],\"data_offsets\":[0,2]}}",
     3, 0, ""},
    {"{\"a\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[0,1]}}", 1, 0, ""},
    {"", 0, CLAAS_ERR_FORMAT, "begin with"},
    {" {}", 0, CLAAS_ERR_FORMAT, "begin with"},
    {"[]", 0, CLAAS_ERR_FORMAT, "begin with"},
    {"{", 0, CLAAS_ERR_FORMAT, "header"},
    {"{} x", 0, CLAAS_ERR_FORMAT, "header"},
    {ONE, 15, CLAAS_ERR_FORMAT, "outside"},
    {ONE, 17, CLAAS_ERR_FORMAT, "after the last"},
    {"{\"a\":3}", 0, CLAAS_ERR_FORMAT, "no dtype"},
    {"{\"a\":{}}", 0, CLAAS_ERR_FORMAT, "no dtype"},
    {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "unknown dtype"},
    {"{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT, "shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,-2],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "bad shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2,2.5],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "bad shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[\"4\"],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "bad shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,16]}}", 16,
     CLAAS_ERR_FORMAT, "bad shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1e300],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "bad shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2305843009213693952],\"data_offsets\":[0,16]}}", 16,
     CLAAS_ERR_FORMAT, ""},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1],\"data_offsets\":[0,4]}}", 4,
     CLAAS_ERR_UNSUPPORTED, "dimensions"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,16]}}", 16, CLAAS_ERR_FORMAT,
     "do not fit"},
    {"{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1, CLAAS_ERR_FORMAT,
     "do not fit"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4]}}", 16, CLAAS_ERR_FORMAT, "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16]}}", 16, CLAAS_ERR_FORMAT,
     "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16,32]}}", 16, CLAAS_ERR_FORMAT,
     "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}", 16, CLAAS_ERR_FORMAT,
     "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}", 16, CLAAS_ERR_FORMAT,
     "data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[4,20]}}", 20, CLAAS_ERR_FORMAT,
     "hole"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\","
     "\"shape\":[4],\"data_offsets\":[3,7]}}",
     7, CLAAS_ERR_FORMAT, "overlap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]},\"b\":{\"dtype\":\"U8\","
     "\"shape\":[4],\"data_offsets\":[0,4]}}",
     4, CLAAS_ERR_FORMAT, "overlap"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\","
     "\"shape\":[1],\"data_offsets\":[1,2]}}",
     2, CLAAS_ERR_FORMAT, "twice"},
    {"{\"__metadata__\":{\"a\":1}}", 0, CLAAS_ERR_FORMAT, "__metadata__"},
    {"{\"__metadata__\":[]}", 0, CLAAS_ERR_FORMAT, "__metadata__"},
};

static void test_safetensors_cases(void **state)
{
    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(file_cases); i++) {
        CLAAS_AUTO(claas_buf_done) struct claas_buf image;

        make_file(&image, file_cases[i].header, file_cases[i].bytes);
        int rc = parse_copy(image.data, image.length);
        if (rc != file_cases[i].code || (rc < 0 && !strstr(claas_error_text(), file_cases[i].text)))
            fail_msg("case %zu (%s): %d \"%s\", expected %d", i, file_cases[i].header, rc,
                     rc < 0 ? claas_error_text() : "", file_cases[i].code);
    }
}

static void test_safetensors_length(void **state)
{
    const uint64_t lengths[] = {3, UINT64_MAX, UINT64_MAX - 7, UINT64_C(1) << 63, 100000001};

    (void)state;
    for (size_t i = 0; i < 8; i++)
        assert_int_equal(parse_copy("\2\0\0\0\0\0\0\0{}", i), CLAAS_ERR_FORMAT);
    for (size_t i = 0; i < CLAAS_COUNT(lengths); i++) {
        char bytes[10] = {0};

        memcpy(bytes, &lengths[i], 8);
        memcpy(bytes + 8, "{}", 2);
        assert_int_equal(parse_copy(bytes, sizeof(bytes)), CLAAS_ERR_FORMAT);
    }
    assert_int_equal(parse_copy("\2\0\0\0\0\0\0\0{}", 10), 0);
}

static void test_safetensors_write(void **state)
{
    CLAAS_AUTO(claas_safetensors_free) claas_safetensors_t *file = NULL;
    CLAAS_AUTO_FREE char *path = new_path();
    const float a[6] = {1, -2, 3, 0.5f, 1e-40f, -0.0f}, b[1] = {7};
    const char *const metadata[] = {"format", "pt", "step", "12 \"quoted\"", NULL};
    const struct claas_safetensor_out out[] = {
        {"z", 2, {2, 3}, a}, {"a", 1, {1}, b}, {"empty", 2, {0, 4}, NULL}, {"scalar", 0, {0}, b}};
    struct stat info;

    (void)state;
    assert_int_equal(claas_safetensors_write(path, out, 4, metadata), 0);
    assert_int_equal(claas_safetensors_open(path, &file), 0);
    assert_int_equal(claas_safetensors_count(file), 4);
    const struct claas_safetensor *z = claas_safetensors_find(file, "z");
    assert_non_null(z);
    assert_int_equal(z->dims, 2);
    assert_int_equal(z->shape[1], 3);
    assert_memory_equal(z->data, a, sizeof(a));
    assert_int_equal((uintptr_t)z->data % 8, 0);
    assert_string_equal(claas_safetensors_metadata(file, "step"), "12 \"quoted\"");
    assert_null(claas_safetensors_metadata(file, "none"));
    assert_null(claas_safetensors_find(file, "y"));
    assert_null(claas_safetensors_at(file, 4));
    assert_int_equal(claas_safetensors_find(file, "scalar")->bytes, 4);
    /* Over an existing file, without metadata, and into a directory that is not there. */
    assert_int_equal(claas_safetensors_write(path, out, 1, NULL), 0);
    assert_int_equal(claas_safetensors_write("/nonexistent/x", out, 1, NULL), CLAAS_ERR_NOT_FOUND);
    const struct claas_safetensor_out bad = {"bad", 1, {-1}, a};
    assert_int_equal(claas_safetensors_write(path, &bad, 1, NULL), CLAAS_ERR_INVALID);
    assert_int_equal(stat(path, &info), 0);
    assert_int_equal(info.st_size % 8, 0);
}

static void test_safetensors_hostile(void **state)
{
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"x.weight\":{\"dtype\":\"F32\",\"shape\":[2,3],"
        "\"data_offsets\":[0,24]},\"y\":{\"dtype\":\"BF16\",\"shape\":[5],\"data_offsets\":[24,34]}"
        ","
        "\"z\":{\"dtype\":\"F16\",\"shape\":[],\"data_offsets\":[34,36]}}  ";
    CLAAS_AUTO(claas_buf_done) struct claas_buf image;

    (void)state;
    make_file(&image, header, 36);
    assert_int_equal(parse_copy(image.data, image.length), 0);
    for (size_t length = 0; length < image.length; length++)
        assert_true(parse_copy(image.data, length) < 0);
    for (uint64_t i = 0; i < 10000; i++) {
        uint32_t words[4];

        claas_philox(5, 0, i, words);
        size_t at = words[0] % image.length;
        char before = image.data[at];
        image.data[at] = (char)(before ^ (1 + words[1] % 255));
        int rc = parse_copy(image.data, image.length);
        assert_true(rc != CLAAS_ERR_NO_MEMORY && rc != CLAAS_ERR_INTERNAL);
        image.data[at] = before;
    }
}

/* ---- layout ---- */

/* Every element of the image belongs to exactly one matrix. */
static void test_layout(void **state)
{
    (void)state;
    for (unsigned modules = 1; modules <= CLAAS_MODULE_ALL; modules++) {
        const struct claas_lora_config lora = {.rank = 3, .alpha = 6, .modules = modules};
        size_t count = claas_lora_parameter_count(&shape, &lora), expected = 0;

        for (int layer = 0; layer < shape.layers; layer++)
            for (int m = 0; m < CLAAS_MODULE_COUNT; m++) {
                enum claas_module module = (enum claas_module)m;
                size_t a = claas_lora_offset(&shape, &lora, layer, module, 0);
                size_t b = claas_lora_offset(&shape, &lora, layer, module, 1);

                if (!(modules >> m & 1)) {
                    assert_true(a == SIZE_MAX && b == SIZE_MAX);
                    continue;
                }
                assert_int_equal(a, expected);
                expected += 3 * (size_t)claas_module_columns(&shape, module);
                assert_int_equal(b, expected);
                expected += 3 * (size_t)claas_module_rows(&shape, module);
            }
        assert_int_equal(count, expected);
        assert_true(claas_lora_offset(&shape, &lora, shape.layers, CLAAS_MODULE_Q, 0) == SIZE_MAX);
        assert_true(claas_lora_offset(&shape, &lora, -1, CLAAS_MODULE_Q, 0) == SIZE_MAX);
    }
}

static void test_modules(void **state)
{
    (void)state;
    for (int m = 0; m < CLAAS_MODULE_COUNT; m++)
        assert_int_equal(claas_module_from_name(claas_module_name((enum claas_module)m)), m);
    assert_int_equal(claas_module_from_name("lm_head"), -1);
    assert_null(claas_module_name((enum claas_module)7));
    assert_int_equal(claas_module_rows(&shape, CLAAS_MODULE_Q), 12);
    assert_int_equal(claas_module_rows(&shape, CLAAS_MODULE_V), 6);
    assert_int_equal(claas_module_columns(&shape, CLAAS_MODULE_O), 12);
    assert_int_equal(claas_module_columns(&shape, CLAAS_MODULE_DOWN), 12);
}

static void test_init(void **state)
{
    const struct claas_lora_config lora = {.rank = 4, .alpha = 8, .modules = CLAAS_MODULE_ALL};
    size_t count = claas_lora_parameter_count(&shape, &lora);
    CLAAS_AUTO_FREE float *a = claas_alloc(count, sizeof(float));
    CLAAS_AUTO_FREE float *b = claas_alloc(count, sizeof(float));

    (void)state;
    claas_lora_init(&shape, &lora, 9, a);
    claas_lora_init(&shape, &lora, 9, b);
    assert_memory_equal(a, b, count * sizeof(float));
    claas_lora_init(&shape, &lora, 10, b);
    assert_memory_not_equal(a, b, count * sizeof(float));
    for (int layer = 0; layer < shape.layers; layer++)
        for (int m = 0; m < CLAAS_MODULE_COUNT; m++) {
            enum claas_module module = (enum claas_module)m;
            size_t at = claas_lora_offset(&shape, &lora, layer, module, 0);
            int columns = claas_module_columns(&shape, module);
            float bound = 1.0f / sqrtf((float)columns), largest = 0.0f;

            for (int i = 0; i < 4 * columns; i++) {
                assert_true(fabsf(a[at + i]) <= bound);
                largest = fmaxf(largest, fabsf(a[at + i]));
            }
            assert_true(largest > 0.7f * bound);
            at = claas_lora_offset(&shape, &lora, layer, module, 1);
            for (int i = 0; i < 4 * claas_module_rows(&shape, module); i++)
                assert_true(a[at + i] == 0.0f);
        }
}

/* ---- directories ---- */

static void make_image(struct claas_adapter_image *image, int rank, unsigned modules, bool moments)
{
    memset(image, 0, sizeof(*image));
    image->lora = (struct claas_lora_config){rank, 2.0f * (float)rank, modules};
    size_t count = claas_lora_parameter_count(&shape, &image->lora);
    image->parameters = claas_alloc(count, sizeof(float));
    assert_non_null(image->parameters);
    for (size_t i = 0; i < count; i++)
        image->parameters[i] = claas_random_normal(1, 2, i);
    if (!moments)
        return;
    image->exp_avg = claas_alloc(count, sizeof(float));
    image->exp_avg_sq = claas_alloc(count, sizeof(float));
    for (size_t i = 0; i < count; i++) {
        image->exp_avg[i] = claas_random_normal(1, 3, i);
        image->exp_avg_sq[i] = claas_random_uniform(1, 4, i);
    }
    image->step = 123456789012;
}

static void test_round_trip(void **state)
{
    const unsigned sets[] = {CLAAS_MODULE_ALL, 1u << CLAAS_MODULE_Q | 1u << CLAAS_MODULE_V,
                             1u << CLAAS_MODULE_DOWN};

    (void)state;
    for (size_t i = 0; i < 2 * CLAAS_COUNT(sets); i++) {
        CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image out, in = {.step = 0};
        CLAAS_AUTO_FREE char *path = new_path();
        bool moments = i & 1;

        make_image(&out, 3, sets[i / 2], moments);
        assert_int_equal(claas_adapter_write(path, &shape, "org/base", &out), 0);
        assert_int_equal(claas_adapter_write(path, &shape, "org/base", &out), CLAAS_ERR_EXISTS);
        assert_int_equal(claas_adapter_read(path, &shape, true, &in), 0);
        size_t bytes = claas_lora_parameter_count(&shape, &out.lora) * sizeof(float);
        assert_int_equal(in.lora.rank, 3);
        assert_int_equal(in.lora.modules, sets[i / 2]);
        assert_true(in.lora.alpha == 6.0f);
        assert_memory_equal(in.parameters, out.parameters, bytes);
        assert_true(!in.exp_avg == !moments && in.step == out.step);
        if (moments) {
            assert_memory_equal(in.exp_avg, out.exp_avg, bytes);
            assert_memory_equal(in.exp_avg_sq, out.exp_avg_sq, bytes);
            claas_adapter_image_done(&in);
            assert_int_equal(claas_adapter_read(path, &shape, false, &in), 0);
            assert_true(!in.exp_avg && in.step == 0);
        }
    }
}

static void test_write_fails(void **state)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image image;
    struct stat info;

    (void)state;
    make_image(&image, 2, CLAAS_MODULE_ALL, false);
    assert_int_equal(claas_adapter_write("/nonexistent/dir/x", &shape, NULL, &image),
                     CLAAS_ERR_NOT_FOUND);
    image.lora.modules = 0;
    assert_int_equal(claas_adapter_write("/tmp/claas-never", &shape, NULL, &image),
                     CLAAS_ERR_INVALID);
    assert_int_equal(stat("/tmp/claas-never", &info), -1);
}

/* Writes a directory, replaces a part of its config, reads it. */
static int read_with_config(const char *from, const char *to)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image out, in = {.step = 0};
    CLAAS_AUTO_FREE char *directory = new_path();
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_config.json", directory);
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO_FREE char *changed = NULL;
    size_t length = 0;

    make_image(&out, 4, CLAAS_MODULE_ALL, false);
    assert_int_equal(claas_adapter_write(directory, &shape, NULL, &out), 0);
    assert_int_equal(claas_file_read(path, 1 << 20, &text, &length), 0);
    assert_non_null(text);
    char *place = strstr(text, from);
    if (!place)
        return claas_fail(CLAAS_ERR_INTERNAL, "no %s in the config", from);
    changed = claas_format("%.*s%s%s", (int)(place - text), text, to, place + strlen(from));
    assert_int_equal(claas_file_write(path, changed, strlen(changed)), 0);
    int rc = claas_adapter_read(directory, &shape, true, &in);
    if (rc >= 0 && strstr(to, "rslora\":true"))
        assert_true(in.lora.alpha == 16.0f); /* 8 * sqrt(4) */
    return rc;
}

static void test_config_cases(void **state)
{
    static const struct {
        const char *from, *to;
        int code;
        const char *text;
    } cases[] = {
        {"\"bias\":\"none\"", "\"bias\":\"all\"", CLAAS_ERR_UNSUPPORTED, "bias 'all'"},
        {"\"use_dora\":false", "\"use_dora\":true", CLAAS_ERR_UNSUPPORTED, "use_dora"},
        {"\"use_rslora\":false", "\"use_rslora\":true", 0, ""},
        {"\"use_rslora\":false", "\"use_rslora\":1", CLAAS_ERR_FORMAT, "use_rslora"},
        {"\"rank_pattern\":{}", "\"rank_pattern\":{\"q_proj\":2}", CLAAS_ERR_UNSUPPORTED,
         "rank_pattern"},
        {"\"alpha_pattern\":{}", "\"alpha_pattern\":{\"q_proj\":2}", CLAAS_ERR_UNSUPPORTED,
         "alpha_pattern"},
        {"\"modules_to_save\":null", "\"modules_to_save\":[\"lm_head\"]", CLAAS_ERR_UNSUPPORTED,
         "modules_to_save"},
        {"\"modules_to_save\":null", "\"modules_to_save\":[]", 0, ""},
        {"\"layers_to_transform\":null", "\"layers_to_transform\":[0]", CLAAS_ERR_UNSUPPORTED,
         "layers_to_transform"},
        {"\"fan_in_fan_out\":false", "\"fan_in_fan_out\":true", CLAAS_ERR_UNSUPPORTED,
         "fan_in_fan_out"},
        {"\"init_lora_weights\":true", "\"init_lora_weights\":\"pissa_niter_4\"",
         CLAAS_ERR_UNSUPPORTED, "pissa"},
        {"\"init_lora_weights\":true", "\"init_lora_weights\":\"gaussian\"", 0, ""},
        {"\"peft_type\":\"LORA\"", "\"peft_type\":\"IA3\"", CLAAS_ERR_UNSUPPORTED, "IA3"},
        {"\"r\":4", "\"r\":0", CLAAS_ERR_FORMAT, "'r'"},
        {"\"r\":4", "\"r\":2.5", CLAAS_ERR_FORMAT, "'r'"},
        {"\"r\":4", "\"r\":\"4\"", CLAAS_ERR_FORMAT, "'r'"},
        {"\"r\":4", "\"q\":4", CLAAS_ERR_FORMAT, "'r' is missing"},
        {"\"r\":4", "\"r\":1000", CLAAS_ERR_UNSUPPORTED, "rank 1000"},
        {"\"r\":4", "\"r\":8", CLAAS_ERR_FORMAT, "is not [8, 8]"},
        {"\"lora_alpha\":8", "\"lora_alpha\":-8", CLAAS_ERR_FORMAT, "lora_alpha"},
        {"\"lora_alpha\":8", "\"lora_alpha\":12.5", 0, ""},
        {"\"lora_alpha\":8", "\"lora_alpho\":8", CLAAS_ERR_FORMAT, "'lora_alpha' is missing"},
        {"\"q_proj\",", "\"lm_head\",", CLAAS_ERR_UNSUPPORTED, "'lm_head'"},
        {"\"q_proj\",", "\"model.layers.0.self_attn.q_proj\",", 0, ""},
        {"\"q_proj\",", "7,", CLAAS_ERR_FORMAT, "target_modules"},
        {"\"q_proj\",", "", CLAAS_ERR_UNSUPPORTED, "has no place"},
        {"\"target_modules\":[", "\"target_modules\":\".*_proj\",\"x\":[", 0, ""},
        {"\"target_modules\":[", "\"target_modules\":\"all-linear\",\"x\":[", 0, ""},
        {"\"target_modules\":[", "\"target_modules\":[],\"x\":[", CLAAS_ERR_FORMAT,
         "target_modules"},
        {"\"target_modules\":[", "\"x\":[", CLAAS_ERR_FORMAT, "target_modules"},
        {"{", "", CLAAS_ERR_FORMAT, "adapter_config.json"},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        int rc = read_with_config(cases[i].from, cases[i].to);

        if (rc != cases[i].code || (rc < 0 && !strstr(claas_error_text(), cases[i].text)))
            fail_msg("case %zu (%s): %d \"%s\", expected %d", i, cases[i].to, rc,
                     rc < 0 ? claas_error_text() : "", cases[i].code);
    }
}

/* A rank-1 adapter on q_proj of a one-layer model, its tensors under the control of a test. */
static const struct claas_model_config small = {.hidden = 2,
                                                .intermediate = 2,
                                                .layers = 1,
                                                .heads = 1,
                                                .kv_heads = 1,
                                                .head_dim = 2,
                                                .vocab = 4};
#define SMALL_CONFIG "{\"r\":1,\"lora_alpha\":2,\"target_modules\":[\"q_proj\"]}"
#define Q_A          "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
#define Q_B          "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

static char *small_directory(const char *config)
{
    char *directory = new_path();
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_config.json", directory);

    assert_int_equal(mkdir(directory, 0700), 0);
    assert_int_equal(claas_file_write(path, config, strlen(config)), 0);
    return directory;
}

static int read_small(const char *directory, const char *file,
                      const struct claas_safetensor_out *tensors, size_t count,
                      const char *const *metadata)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image in = {.step = 0};
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, file);

    assert_int_equal(claas_safetensors_write(path, tensors, count, metadata), 0);
    return claas_adapter_read(directory, &small, true, &in);
}

static void test_tensor_cases(void **state)
{
    static const float good[] = {1, 2, 3}, nan_[] = {1, NAN}, inf[] = {-INFINITY, 1};
    static const struct {
        struct claas_safetensor_out tensors[3];
        size_t count;
        int code;
        const char *text;
    } cases[] = {
        {{{Q_A, 2, {1, 2}, good}, {Q_B, 2, {2, 1}, good}}, 2, 0, ""},
        {{{Q_A + 17, 2, {1, 2}, good}, {Q_B + 17, 2, {2, 1}, good}}, 2, 0, ""},
        {{{Q_A, 2, {1, 2}, good}}, 1, CLAAS_ERR_FORMAT, "lora_B.weight' is missing"},
        {{{Q_B, 2, {2, 1}, good}}, 1, CLAAS_ERR_FORMAT, "lora_A.weight' is missing"},
        {{{Q_A, 2, {1, 3}, good}, {Q_B, 2, {2, 1}, good}}, 2, CLAAS_ERR_FORMAT, "not [1, 2]"},
        {{{Q_A, 2, {2, 1}, good}, {Q_B, 2, {2, 1}, good}}, 2, CLAAS_ERR_FORMAT, "not [1, 2]"},
        {{{Q_A, 1, {2}, good}, {Q_B, 2, {2, 1}, good}}, 2, CLAAS_ERR_FORMAT, "not [1, 2]"},
        {{{Q_A, 2, {1, 2}, nan_}, {Q_B, 2, {2, 1}, good}}, 2, CLAAS_ERR_FORMAT, "element 1"},
        {{{Q_A, 2, {1, 2}, good}, {Q_B, 2, {2, 1}, inf}}, 2, CLAAS_ERR_FORMAT, "element 0"},
        {{{Q_A, 2, {1, 2}, good}, {Q_B, 2, {2, 1}, good}, {"lm_head.lora_A.weight", 1, {1}, good}},
         3,
         CLAAS_ERR_UNSUPPORTED,
         "'lm_head.lora_A.weight' has no place"},
        {{{Q_A, 2, {1, 2}, good}, {Q_B, 2, {2, 1}, good}, {Q_A + 17, 2, {1, 2}, good}},
         3,
         CLAAS_ERR_UNSUPPORTED,
         "has no place"},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        CLAAS_AUTO_FREE char *directory = small_directory(SMALL_CONFIG);
        int rc = read_small(directory, "adapter_model.safetensors", cases[i].tensors,
                            cases[i].count, NULL);

        if (rc != cases[i].code || (rc < 0 && !strstr(claas_error_text(), cases[i].text)))
            fail_msg("case %zu: %d \"%s\", expected %d", i, rc, rc < 0 ? claas_error_text() : "",
                     cases[i].code);
    }
}

static void test_moment_cases(void **state)
{
    static const float good[] = {1, 2}, negative[] = {1, -2};
    const struct claas_safetensor_out weights[] = {{Q_A, 2, {1, 2}, good}, {Q_B, 2, {2, 1}, good}};
    struct claas_safetensor_out moments[] = {{"exp_avg." Q_A, 2, {1, 2}, negative},
                                             {"exp_avg." Q_B, 2, {2, 1}, good},
                                             {"exp_avg_sq." Q_A, 2, {1, 2}, good},
                                             {"exp_avg_sq." Q_B, 2, {2, 1}, good},
                                             {"more", 1, {1}, good}};
    static const char *const step[] = {"step", "7", NULL};
    static const char *const bad_steps[][3] = {
        {"step", "", NULL},
        {"step", "-1", NULL},
        {"step", "1.5", NULL},
        {"other", "1", NULL},
        {"step", "99999999999999999999", NULL},
    };
    CLAAS_AUTO_FREE char *directory = small_directory(SMALL_CONFIG);

    (void)state;
    assert_int_equal(read_small(directory, "adapter_model.safetensors", weights, 2, NULL), 0);
    assert_int_equal(read_small(directory, "optimizer.safetensors", moments, 4, step), 0);
    assert_int_equal(read_small(directory, "optimizer.safetensors", moments, 5, step),
                     CLAAS_ERR_FORMAT);
    assert_int_equal(read_small(directory, "optimizer.safetensors", moments, 3, step),
                     CLAAS_ERR_FORMAT);
    for (size_t i = 0; i < CLAAS_COUNT(bad_steps); i++)
        assert_int_equal(read_small(directory, "optimizer.safetensors", moments, 4, bad_steps[i]),
                         CLAAS_ERR_FORMAT);
    moments[2].data = negative;
    assert_int_equal(read_small(directory, "optimizer.safetensors", moments, 4, step),
                     CLAAS_ERR_FORMAT);
    assert_non_null(strstr(claas_error_text(), "exp_avg_sq."));
}

/* bfloat16 and float16 weights, as PEFT saves them from a model in such a type. */
static void test_small_types(void **state)
{
    static const char header[] =
        "{\"" Q_A "\":{\"dtype\":\"BF16\",\"shape\":[1,2],\"data_offsets\":[0,4]},\"" Q_B
        "\":{\"dtype\":\"F16\",\"shape\":[2,1],\"data_offsets\":[4,8]}}";
    const uint16_t data[4] = {0x3fc0, 0xc000, 0x3e00, 0x0001}; /* 1.5 -2 | 1.5 2^-24 */
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image in = {.step = 0};
    CLAAS_AUTO_FREE char *directory = small_directory(SMALL_CONFIG);
    CLAAS_AUTO_FREE char *path = claas_format("%s/adapter_model.safetensors", directory);
    CLAAS_AUTO(claas_buf_done) struct claas_buf image;

    (void)state;
    make_file(&image, header, 0);
    claas_buf_add(&image, data, sizeof(data));
    assert_int_equal(claas_file_write(path, image.data, image.length), 0);
    assert_int_equal(claas_adapter_read(directory, &small, true, &in), 0);
    assert_true(in.parameters[0] == 1.5f && in.parameters[1] == -2.0f);
    assert_true(in.parameters[2] == 1.5f && in.parameters[3] == ldexpf(1.0f, -24));
}

static void test_missing_files(void **state)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image in = {.step = 0};
    CLAAS_AUTO_FREE char *directory = small_directory(SMALL_CONFIG);

    (void)state;
    assert_int_equal(claas_adapter_read("/nonexistent", &small, true, &in), CLAAS_ERR_NOT_FOUND);
    assert_int_equal(claas_adapter_read(directory, &small, true, &in), CLAAS_ERR_NOT_FOUND);
    assert_non_null(strstr(claas_error_text(), "adapter_model.safetensors"));
    assert_null(in.parameters);
}

/* One file of a good directory, every truncation and `flips` random bytes: an error, or an image
 * that passed the checks; afterwards the file is whole again. */
static void damage_file(const char *directory, const char *name, int flips)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/%s", directory, name);
    CLAAS_AUTO_FREE char *data = NULL;
    size_t length = 0;

    assert_int_equal(claas_file_read(path, 1 << 20, &data, &length), 0);
    for (int64_t i = -(int64_t)length; i < flips; i++) {
        struct claas_adapter_image in = {.step = 0};
        uint32_t words[4];
        FILE *file = fopen(path, "wb");

        claas_philox(6, length, (uint64_t)i, words);
        size_t at = words[0] % length;
        char before = data[at];
        if (i >= 0)
            data[at] = (char)(before ^ (1 + words[1] % 255));
        assert_non_null(file);
        fwrite(data, 1, i < 0 ? (size_t)(-i - 1) : length, file);
        fclose(file);
        data[at] = before;
        int rc = claas_adapter_read(directory, &small, true, &in);
        assert_true(rc != CLAAS_ERR_NO_MEMORY && rc != CLAAS_ERR_INTERNAL);
        assert_true(i >= 0 || rc < 0);
        if (rc >= 0) {
            size_t count = claas_lora_parameter_count(&small, &in.lora);
            for (size_t k = 0; k < count; k++)
                assert_true(isfinite(in.parameters[k]));
        } else {
            assert_null(in.parameters);
        }
        claas_adapter_image_done(&in);
    }
    assert_int_equal(claas_file_write(path, data, length), 0);
}

static void test_damaged(void **state)
{
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image out = {.step = 5};
    CLAAS_AUTO_FREE char *directory = new_path();

    (void)state;
    out.lora = (struct claas_lora_config){1, 2, 1u << CLAAS_MODULE_Q};
    out.parameters = claas_alloc(4, sizeof(float));
    out.exp_avg = claas_alloc(4, sizeof(float));
    out.exp_avg_sq = claas_alloc(4, sizeof(float));
    assert_int_equal(claas_adapter_write(directory, &small, "base", &out), 0);
    damage_file(directory, "adapter_config.json", 4000);
    damage_file(directory, "adapter_model.safetensors", 3000);
    damage_file(directory, "optimizer.safetensors", 3000);
    CLAAS_AUTO(claas_adapter_image_done) struct claas_adapter_image in = {.step = 0};
    assert_int_equal(claas_adapter_read(directory, &small, true, &in), 0);
    assert_int_equal(in.step, 5);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_safetensors_cases),
        cmocka_unit_test(test_safetensors_length),
        cmocka_unit_test(test_safetensors_write),
        cmocka_unit_test(test_safetensors_hostile),
        cmocka_unit_test(test_layout),
        cmocka_unit_test(test_modules),
        cmocka_unit_test(test_init),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_write_fails),
        cmocka_unit_test(test_config_cases),
        cmocka_unit_test(test_tensor_cases),
        cmocka_unit_test(test_moment_cases),
        cmocka_unit_test(test_small_types),
        cmocka_unit_test(test_missing_files),
        cmocka_unit_test(test_damaged),
    };

    return cmocka_run_group_tests_name("adapter_files", tests, group_setup, group_teardown);
}
