/* Model files: block decoders against ggml's values, Hugging Face directories good and bad, random
 * models. Argument: the folder of golden files. With CLAAS_TEST_MODEL=FILE.gguf the embedded model
 * is read too. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "../../kernels/model/model_internal.h"
#include "touch_model.h"

static const char *golden;

/* ---- decoders ---- */

static void test_dequantize(void **state)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/dequant.bin", golden);
    CLAAS_AUTO_FREE char *data = NULL;
    size_t length = 0;
    struct claas_reader reader;
    int types = 0;

    (void)state;
    assert_int_equal(claas_file_read(path, 1 << 24, &data, &length), 0);
    claas_reader_init(&reader, data, length);
    while (claas_reader_left(&reader) > 0) {
        enum claas_tensor_type type = (enum claas_tensor_type)claas_reader_u32(&reader);
        size_t count = claas_reader_u32(&reader), bytes = claas_reader_u32(&reader);
        const uint8_t *blocks = claas_reader_bytes(&reader, bytes);
        const uint8_t *wanted = claas_reader_bytes(&reader, count * sizeof(float));
        float *out = claas_alloc(count, sizeof(float));

        assert_non_null(wanted);
        assert_int_equal(count / (size_t)claas_type_block_elements(type) *
                             (size_t)claas_type_block_bytes(type),
                         bytes);
        claas_dequantize(type, blocks, count, out);
        for (size_t i = 0; i < count; i++) {
            float expected;

            memcpy(&expected, wanted + i * sizeof(float), sizeof(expected));
            /* Bit for bit; -0 against 0 is the one freedom. */
            if (!(out[i] == expected))
                fail_msg("%s element %zu: %a, expected %a", claas_type_name(type), i,
                         (double)out[i], (double)expected);
        }
        free(out);
        types++;
    }
    assert_int_equal(types, 13);
}

static void test_half(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        int exponent = (int)(h >> 10 & 31), mantissa = (int)(h & 1023);
        double sign = h & 0x8000 ? -1.0 : 1.0;
        float got = claas_half_to_float((uint16_t)h);

        if (exponent == 31) {
            assert_true(mantissa ? isnan(got) : isinf(got));
            continue;
        }
        double wanted = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
        assert_true((double)got == sign * wanted && !signbit(got) == !(h & 0x8000));
    }
}

static void test_type_table(void **state)
{
    (void)state;
    assert_int_equal(claas_type_block_elements((enum claas_tensor_type)9), 0);
    assert_int_equal(claas_type_block_bytes((enum claas_tensor_type)99), 0);
    assert_int_equal(claas_type_block_elements((enum claas_tensor_type) - 1), 0);
    assert_string_equal(claas_type_name((enum claas_tensor_type)4), "unknown");
    assert_string_equal(claas_type_name(CLAAS_TYPE_Q6_K), "Q6_K");
    claas_dequantize((enum claas_tensor_type)99, NULL, 0, NULL);
}

/* ---- config.json ---- */

#define CONFIG(type, rest)                                                                         \
    "{\"model_type\":\"" type "\",\"hidden_size\":64,\"intermediate_size\":128,"                   \
    "\"num_hidden_layers\":2,\"num_attention_heads\":4,\"vocab_size\":512,"                        \
    "\"max_position_embeddings\":2048" rest "}"

struct config_case {
    const char *json;
    int code;
    const char *text;
};

static const struct config_case config_cases[] = {
    {CONFIG("llama", ""), 0, ""},
    {CONFIG("llama", ",\"hidden_act\":\"silu\",\"pretraining_tp\":1,\"mlp_bias\":false"), 0, ""},
    {"[]", CLAAS_ERR_FORMAT, "not an object"},
    {"{}", CLAAS_ERR_UNSUPPORTED, "model_type ''"},
    {CONFIG("mistral", ""), CLAAS_ERR_UNSUPPORTED, "model_type 'mistral'"},
    {"{\"model_type\":3}", CLAAS_ERR_FORMAT, "model_type"},
    {"{\"model_type\":\"llama\"}", CLAAS_ERR_FORMAT, "'hidden_size' is missing"},
    {"{\"model_type\":\"llama\",\"hidden_size\":\"64\"}", CLAAS_ERR_FORMAT, "hidden_size"},
    {"{\"model_type\":\"llama\",\"hidden_size\":0}", CLAAS_ERR_FORMAT, "hidden_size"},
    {"{\"model_type\":\"llama\",\"hidden_size\":64.5}", CLAAS_ERR_FORMAT, "hidden_size"},
    {"{\"model_type\":\"llama\",\"hidden_size\":1e15}", CLAAS_ERR_FORMAT, "hidden_size"},
    {"{\"model_type\":\"llama\",\"hidden_size\":-5}", CLAAS_ERR_FORMAT, "hidden_size"},
    {CONFIG("llama", ",\"num_key_value_heads\":3"), CLAAS_ERR_FORMAT, "multiple"},
    {CONFIG("llama", ",\"num_key_value_heads\":8"), CLAAS_ERR_FORMAT, "multiple"},
    {CONFIG("llama", ",\"head_dim\":15"), CLAAS_ERR_FORMAT, "head size"},
    {CONFIG("llama", ",\"head_dim\":null"), 0, ""},
    {CONFIG("llama", ",\"rms_norm_eps\":0"), CLAAS_ERR_FORMAT, "rms_norm_eps"},
    {CONFIG("llama", ",\"hidden_act\":\"gelu\""), CLAAS_ERR_UNSUPPORTED, "activation"},
    {CONFIG("llama", ",\"attention_bias\":true"), CLAAS_ERR_UNSUPPORTED, "attention_bias"},
    {CONFIG("llama", ",\"mlp_bias\":true"), CLAAS_ERR_UNSUPPORTED, "mlp_bias"},
    {CONFIG("qwen2", ",\"use_sliding_window\":true"), CLAAS_ERR_UNSUPPORTED, "sliding"},
    {CONFIG("qwen2", ",\"use_sliding_window\":false,\"sliding_window\":4096"), 0, ""},
    {CONFIG("qwen3", ",\"layer_types\":[\"full_attention\",\"sliding_attention\"]"),
     CLAAS_ERR_UNSUPPORTED, "sliding"},
    {CONFIG("qwen3", ",\"layer_types\":[\"full_attention\",\"full_attention\"]"), 0, ""},
    {CONFIG("llama", ",\"quantization_config\":{\"bits\":4}"), CLAAS_ERR_UNSUPPORTED,
     "quantization_config"},
    {CONFIG("llama", ",\"partial_rotary_factor\":0.5"), CLAAS_ERR_UNSUPPORTED, "part of the head"},
    {CONFIG("llama", ",\"rope_theta\":\"big\""), CLAAS_ERR_FORMAT, "rope_theta"},
    {CONFIG("llama", ",\"rope_scaling\":\"yarn\""), CLAAS_ERR_FORMAT, "RoPE"},
    {CONFIG("llama", ",\"rope_scaling\":{\"type\":\"dynamic\",\"factor\":2}"),
     CLAAS_ERR_UNSUPPORTED, "'dynamic'"},
    {CONFIG("llama", ",\"rope_scaling\":{\"type\":\"linear\"}"), CLAAS_ERR_FORMAT, "factor"},
    {CONFIG("llama", ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8}"), CLAAS_ERR_FORMAT,
     "low_freq_factor"},
    {CONFIG("llama", ",\"tie_word_embeddings\":\"yes\""), CLAAS_ERR_FORMAT, "tie_word"},
    {CONFIG("llama", ",\"vocab_size\":1"), CLAAS_ERR_FORMAT, "twice"},
};

static int parse_config(const char *text, size_t length, struct claas_model_config *config,
                        int *tied)
{
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    int rc = claas_json_parse(text, length, 1 << 20, &json);

    return rc < 0 ? rc : claas_hf_config_parse(json, config, tied);
}

static void test_config_cases(void **state)
{
    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(config_cases); i++) {
        const struct config_case *c = &config_cases[i];
        struct claas_model_config config;
        int tied, rc = parse_config(c->json, strlen(c->json), &config, &tied);

        if (rc != c->code || (rc < 0 && !strstr(claas_error_text(), c->text)))
            fail_msg("case %zu: %d \"%s\", expected %d \"%s\"", i, rc, claas_error_text(), c->code,
                     c->text);
    }
}

static void test_config_fields(void **state)
{
    static const char v4[] = CONFIG(
        "llama", ",\"rope_theta\":500000.0,\"tie_word_embeddings\":true,\"rms_norm_eps\":1e-05,"
                 "\"rope_scaling\":{\"factor\":32.0,\"high_freq_factor\":4.0,"
                 "\"low_freq_factor\":1.0,\"original_max_position_embeddings\":8192,"
                 "\"rope_type\":\"llama3\"}");
    static const char v5[] = CONFIG("qwen3", ",\"rope_parameters\":{\"rope_theta\":1000000,"
                                             "\"rope_type\":\"yarn\",\"factor\":4.0,"
                                             "\"original_max_position_embeddings\":512}");
    static const char nested[] =
        CONFIG("qwen2", ",\"rope_parameters\":{\"full_attention\":{\"rope_theta\":77.0,"
                        "\"rope_type\":\"default\"}},\"tie_word_embeddings\":false");
    struct claas_model_config c;
    int tied;

    (void)state;
    assert_int_equal(parse_config(v4, strlen(v4), &c, &tied), 0);
    assert_int_equal(c.rope_kind, CLAAS_ROPE_LLAMA3);
    assert_true(c.rope_theta == 500000.0f && c.rope_factor == 32.0f);
    assert_true(c.norm_eps == 1e-5f && c.rope_attention_factor == 1.0f);
    assert_int_equal(tied, 1);
    assert_int_equal(c.head_dim, 16);
    assert_int_equal(parse_config(v5, strlen(v5), &c, &tied), 0);
    assert_int_equal(c.rope_kind, CLAAS_ROPE_YARN);
    assert_true(c.rope_theta == 1e6f && c.rope_beta_fast == 32.0f && c.rope_beta_slow == 1.0f);
    assert_true(fabsf(c.rope_attention_factor - 1.1386294f) < 1e-6f);
    assert_int_equal(c.rope_original_context, 512);
    assert_int_equal(c.head_dim, 128); /* Qwen3's default, not hidden / heads */
    assert_int_equal(tied, -1);
    assert_true(c.qk_norm && !c.qkv_bias);
    assert_int_equal(parse_config(nested, strlen(nested), &c, &tied), 0);
    assert_true(c.rope_theta == 77.0f && c.rope_kind == CLAAS_ROPE_PLAIN && c.qkv_bias);
    assert_int_equal(tied, 0);
}

/* Every truncation and 10,000 flips of a config: an error or a config within its ranges. */
static void test_config_hostile(void **state)
{
    static const char good[] =
        CONFIG("qwen3", ",\"rope_parameters\":{\"rope_theta\":1000000,\"rope_type\":\"yarn\","
                        "\"factor\":4.0,\"original_max_position_embeddings\":512},"
                        "\"layer_types\":[\"full_attention\"],\"head_dim\":32");
    size_t length = strlen(good);
    struct claas_model_config config;
    int tied;

    (void)state;
    for (size_t i = 0; i < length; i++) {
        char *copy = malloc(i ? i : 1);

        assert_non_null(copy);
        memcpy(copy, good, i);
        assert_true(parse_config(copy, i, &config, &tied) < 0);
        free(copy);
    }
    for (uint64_t i = 0; i < 10000; i++) {
        uint32_t words[4];
        char *copy = claas_strndup(good, length);

        claas_philox(3, 0, i, words);
        copy[words[0] % length] = (char)(copy[words[0] % length] ^ (1 + words[1] % 255));
        if (parse_config(copy, length, &config, &tied) >= 0)
            assert_int_equal(claas_model_config_check(&config), 0);
        free(copy);
    }
}

/* ---- Hugging Face directories written by transformers ---- */

/* Sum over a tensor's elements in row-major order of value * (1 + index % 7), which sees every
 * permutation. */
static double checksum(const struct claas_tensor *tensor)
{
    float *row = claas_alloc((size_t)tensor->columns, sizeof(float));
    double sum = 0.0;
    size_t index = 0;

    assert_non_null(row);
    for (int r = 0; r < tensor->rows; r++) {
        claas_tensor_row(tensor, r, row);
        for (int c = 0; c < tensor->columns; c++)
            sum += (double)row[c] * (double)(1 + index++ % 7);
    }
    free(row);
    return sum;
}

static void check_directory(const cJSON *wanted)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    CLAAS_AUTO_FREE char *path = claas_format("%s/tiny_models/%s", golden, wanted->string);
    const struct claas_model_options options = {.path = path};
    const cJSON *sums = claas_json_get(wanted, "sums"), *item;
    int64_t value;

    if (claas_model_open(&options, &model) < 0)
        fail_msg("%s: %s", path, claas_error_text());
    const struct claas_model_config *c = claas_model_config(model);
    assert_int_equal(claas_json_get_int(wanted, "hidden", 0, 1 << 20, &value), 1);
    assert_int_equal(c->hidden, value);
    assert_int_equal(claas_json_get_int(wanted, "head_dim", 0, 1 << 20, &value), 1);
    assert_int_equal(c->head_dim, value);
    assert_int_equal(claas_json_get_int(wanted, "tied", 0, 1, &value), 1);
    assert_int_equal(c->tied, value);
    assert_int_equal(claas_json_get_int(wanted, "rope_theta", 0, 1 << 30, &value), 1);
    assert_true(c->rope_theta == (float)value);
    assert_int_equal(claas_json_get_int(wanted, "stops", 0, 16, &value), 1);
    int32_t stops[CLAAS_STOP_MAX];
    assert_int_equal(claas_model_stop_tokens(model, stops, CLAAS_STOP_MAX), value);
    assert_int_equal(model->tensor_count, cJSON_GetArraySize(sums));
    cJSON_ArrayForEach(item, sums)
    {
        const struct claas_tensor *tensor = claas_model_tensor(model, item->string);

        if (!tensor)
            fail_msg("%s: no tensor %s", path, item->string);
        double got = checksum(tensor);
        if (!(fabs(got - item->valuedouble) <= 1e-9 * (1.0 + fabs(item->valuedouble))))
            fail_msg("%s: %s sums to %.17g, expected %.17g", path, item->string, got,
                     item->valuedouble);
    }
    assert_string_equal(claas_model_name(model), wanted->string);
}

static void test_hf_directories(void **state)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/tiny_models/expected.json", golden);
    CLAAS_AUTO_FREE char *text = NULL;
    CLAAS_AUTO(claas_json_free) cJSON *json = NULL;
    size_t length = 0;
    const cJSON *item;

    (void)state;
    assert_int_equal(claas_file_read(path, 1 << 20, &text, &length), 0);
    assert_int_equal(claas_json_parse(text, length, 1 << 20, &json), 0);
    assert_true(cJSON_GetArraySize(json) >= 3);
    cJSON_ArrayForEach(item, json)
    {
        check_directory(item);
    }
}

/* A copy of a golden directory with one file replaced (NULL text: removed). */
static int open_changed(const char *directory, const char *file, const char *text)
{
    static const char *const names[] = {"config.json",
                                        "tokenizer.json",
                                        "tokenizer_config.json",
                                        "generation_config.json",
                                        "chat_template.jinja",
                                        "model.safetensors",
                                        "model.safetensors.index.json"};
    char target[] = "/tmp/claas-test-XXXXXX";
    claas_model_t *model = NULL;
    struct claas_model_options options = {.path = target};

    assert_non_null(mkdtemp(target));
    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        char *from = claas_format("%s/tiny_models/%s/%s", golden, directory, names[i]);
        char *to = claas_format("%s/%s", target, names[i]);
        char *data = NULL;
        size_t length = 0;

        if (strcmp(names[i], file) == 0) {
            if (text)
                assert_int_equal(claas_file_write(to, text, strlen(text)), 0);
        } else if (claas_file_read(from, 1 << 24, &data, &length) >= 0) {
            assert_int_equal(claas_file_write(to, data, length), 0);
        }
        free(from);
        free(to);
        free(data);
    }
    int rc = claas_model_open(&options, &model);
    claas_model_free(&model);
    (void)claas_remove_all(target);
    return rc;
}

static void test_hf_bad(void **state)
{
    static const struct {
        const char *file, *text;
        int code;
        const char *message;
    } cases[] = {
        {"none", NULL, 0, ""},
        {"config.json", NULL, CLAAS_ERR_NOT_FOUND, "no config.json"},
        {"config.json", "{", CLAAS_ERR_FORMAT, "config.json"},
        {"config.json", CONFIG("llama", ""), CLAAS_ERR_FORMAT, "the config asks for"},
        {"model.safetensors", NULL, CLAAS_ERR_NOT_FOUND, "model.safetensors"},
        {"model.safetensors", "", CLAAS_ERR_FORMAT, "model.safetensors"},
        {"model.safetensors", "nonsense nonsense", CLAAS_ERR_FORMAT, "model.safetensors"},
        {"tokenizer.json", NULL, CLAAS_ERR_NOT_FOUND, "tokenizer.json"},
        {"tokenizer.json", "{}", CLAAS_ERR_FORMAT, "tokenizer.json"},
        {"tokenizer_config.json", "[", CLAAS_ERR_FORMAT, "tokenizer_config.json"},
        {"tokenizer_config.json", NULL, 0, ""},
        {"generation_config.json", "{\"eos_token_id\":", CLAAS_ERR_FORMAT, "generation_config"},
        {"generation_config.json", "{\"eos_token_id\":[1e300,-1,null,\"x\"]}", 0, ""},
        {"chat_template.jinja", "{{ x }}", CLAAS_ERR_UNSUPPORTED, ""},
        {"model.safetensors.index.json", "{}", CLAAS_ERR_FORMAT, "weight_map"},
        {"model.safetensors.index.json", "{\"weight_map\":{}}", CLAAS_ERR_FORMAT, "0 shards"},
        {"model.safetensors.index.json", "{\"weight_map\":{\"a\":\"../x\"}}", CLAAS_ERR_FORMAT,
         "not a file's name"},
        {"model.safetensors.index.json", "{\"weight_map\":{\"a\":3}}", CLAAS_ERR_FORMAT,
         "not a file's name"},
        {"model.safetensors.index.json", "{\"weight_map\":{\"a\":\"model.safetensors\"}}",
         CLAAS_ERR_FORMAT, "is missing"},
        {"model.safetensors.index.json", "{\"weight_map\":{\"a\":\"gone.safetensors\"}}",
         CLAAS_ERR_NOT_FOUND, "gone.safetensors"},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        int rc = open_changed("tiny-llama", cases[i].file, cases[i].text);

        if (rc != cases[i].code || (rc < 0 && !strstr(claas_error_text(), cases[i].message)))
            fail_msg("case %zu (%s): %d \"%s\", expected %d", i, cases[i].file, rc,
                     claas_error_text(), cases[i].code);
    }
}

/* ---- random models, names ---- */

static void test_random(void **state)
{
    static const char *const names[] = {"tiny-llama", "tiny-llama-untied",
                                        "tiny-qwen2", "tiny-qwen2-untied",
                                        "tiny-qwen3", "tiny-qwen3-untied"};

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(names); i++) {
        CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
        CLAAS_AUTO_FREE char *path = claas_format("random:%s:%zu", names[i], i);
        const struct claas_model_options options = {.path = path};
        const char text[] = "Hello there, na\xc3\xafve \xf0\x9f\x98\x80 w\xc3\xb6rld\n";
        int32_t *ids = NULL;
        size_t count = 0, length = 0;
        char *back = NULL;

        assert_int_equal(claas_model_open(&options, &model), 0);
        const struct claas_model_config *c = claas_model_config(model);
        assert_true(c->tied == !strstr(names[i], "untied"));
        assert_true(!!claas_model_tensor(model, "lm_head.weight") == !c->tied);
        assert_true(!!claas_model_tensor(model, "model.layers.1.self_attn.q_proj.bias") ==
                    (c->family == CLAAS_FAMILY_QWEN2));
        assert_true(!!claas_model_tensor(model, "model.layers.1.self_attn.q_norm.weight") ==
                    (c->family == CLAAS_FAMILY_QWEN3));
        touch_model(model);
        assert_int_equal(claas_tokenizer_encode(claas_model_tokenizer(model), text, strlen(text),
                                                false, &ids, &count),
                         0);
        assert_true(count < strlen(text)); /* some pairs merged */
        assert_int_equal(
            claas_tokenizer_decode(claas_model_tokenizer(model), ids, count, true, &back, &length),
            0);
        assert_int_equal(length, strlen(text));
        assert_memory_equal(back, text, length);
        free(ids);
        free(back);
        const struct claas_chat_message message = {"user", "hi <|im_end|>"};
        assert_int_equal(claas_chat_template_encode(claas_model_chat_template(model),
                                                    claas_model_tokenizer(model), &message, 1, true,
                                                    &ids, &count),
                         0);
        assert_int_equal(ids[0],
                         claas_tokenizer_special(claas_model_tokenizer(model), "<|im_start|>"));
        free(ids);
        int32_t stops[4];
        assert_int_equal(claas_model_stop_tokens(model, stops, 4), 2);
        assert_int_equal(stops[0], 258);
    }
}

/* From an independent program (Python): weights must not change with the machine or the code, dumps
 * of other programs depend on them. */
static void test_random_pinned(void **state)
{
    static const float embedding[] = {-0x1.4cp-8f, -0x1.7ep-5f, -0x1.9ep-3f, 0x1.f2p-6f};
    static const float q[] = {0x1.b2p-4f, -0x1.88p-3f};
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    const struct claas_model_options options = {.path = "random:tiny-llama:3"};
    float row[64];

    (void)state;
    assert_int_equal(claas_model_open(&options, &model), 0);
    claas_tensor_row(claas_model_tensor(model, "model.embed_tokens.weight"), 5, row);
    assert_memory_equal(row, embedding, sizeof(embedding));
    claas_tensor_row(claas_model_tensor(model, "model.layers.0.self_attn.q_proj.weight"), 63, row);
    assert_memory_equal(row + 62, q, sizeof(q));
    claas_tensor_row(claas_model_tensor(model, "model.norm.weight"), 0, row);
    assert_true(row[0] == 1.0f && row[63] == 1.0f);
}

static void test_random_values(void **state)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *a = NULL;
    CLAAS_AUTO(claas_model_free) claas_model_t *b = NULL;
    struct claas_model_options options = {.path = "random:tiny-llama"};
    double sum = 0.0, square = 0.0;
    float row[64], other[64];

    (void)state;
    assert_int_equal(claas_model_open(&options, &a), 0);
    options.path = "random:tiny-llama:1";
    assert_int_equal(claas_model_open(&options, &b), 0);
    assert_string_not_equal(claas_model_fingerprint(a), claas_model_fingerprint(b));
    const struct claas_tensor *x = claas_model_tensor(a, "model.embed_tokens.weight");
    const struct claas_tensor *y = claas_model_tensor(b, "model.embed_tokens.weight");
    for (int r = 0; r < 512; r++) {
        claas_tensor_row(x, r, row);
        claas_tensor_row(y, r, other);
        assert_memory_not_equal(row, other, sizeof(row));
        for (int i = 0; i < 64; i++) {
            sum += (double)row[i];
            square += (double)row[i] * (double)row[i];
        }
    }
    /* 32768 values of deviation 1/8: the mean is within 4 * (1/8) / sqrt(32768). */
    assert_true(fabs(sum / 32768) < 0.003);
    assert_true(fabs(sqrt(square / 32768) - 0.125) < 0.002);
}

static void test_random_bad(void **state)
{
    static const struct {
        const char *path;
        int code;
    } cases[] = {
        {"random:", CLAAS_ERR_NOT_FOUND},
        {"random:nothing", CLAAS_ERR_NOT_FOUND},
        {"random:tiny-llama:", CLAAS_ERR_INVALID},
        {"random:tiny-llama:-1", CLAAS_ERR_INVALID},
        {"random:tiny-llama:1x", CLAAS_ERR_INVALID},
        {"random:tiny-llama:99999999999999999999", CLAAS_ERR_INVALID},
        {"/nonexistent/model.gguf", CLAAS_ERR_NOT_FOUND},
        {"/dev/null", CLAAS_ERR_UNSUPPORTED},
        {"", CLAAS_ERR_INVALID},
    };
    claas_model_t *model = NULL;

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        const struct claas_model_options options = {.path = cases[i].path};

        assert_int_equal(claas_model_open(&options, &model), cases[i].code);
        assert_null(model);
        if (strncmp(cases[i].path, "random:", 7) == 0 && cases[i].code == CLAAS_ERR_NOT_FOUND)
            assert_non_null(strstr(claas_error_text(), "small-qwen3, smollm2-135m"));
    }
}

static void test_names(void **state)
{
    static const struct {
        const char *path, *hint, *name;
    } cases[] = {
        {"/m/SmolLM2-135M-Instruct.Q4_1.gguf", "Smollm2 135M", "SmolLM2-135M-Instruct"},
        {"Qwen3-0.6B-Q8_0.gguf", NULL, "Qwen3-0.6B"},
        {"qwen2.5-0.5b-instruct-q4_k_m.gguf", NULL, "qwen2.5-0.5b-instruct"},
        {"Llama-3.2-1B.gguf", NULL, "Llama-3.2-1B"},
        {"x-f16.GGUF", NULL, "x"},
        {"model.gguf", "Org/My Model (v2)", "My-Model-v2"},
        {"ggml-model-Q4_0.gguf", "Hi", "Hi"},
        {"/m/Qwen2.5-0.5B-Instruct/", "other", "Qwen2.5-0.5B-Instruct"},
        {"/c/models--HuggingFaceTB--SmolLM2-135M/snapshots/"
         "0123456789abcdef0123456789abcdef01234567",
         NULL, "SmolLM2-135M"},
        {".", NULL, "model"},
        {"n\xc3\xa9 w.gguf", NULL, "n-w"},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
        struct claas_model_options options = {.path = "random:tiny-llama"};

        assert_int_equal(claas_model_open(&options, &model), 0);
        free(model->path);
        free(model->name);
        model->path = claas_strdup(cases[i].path);
        assert_int_equal(claas_model_identify(model, cases[i].hint), 0);
        assert_string_equal(claas_model_name(model), cases[i].name);
    }
}

static void test_embedded_model(void **state)
{
    CLAAS_AUTO(claas_model_free) claas_model_t *model = NULL;
    const struct claas_model_options options = {.path = getenv("CLAAS_TEST_MODEL")};

    (void)state;
    if (!options.path)
        skip();
    assert_int_equal(claas_model_open(&options, &model), 0);
    const struct claas_model_config *c = claas_model_config(model);
    assert_int_equal(c->hidden, 576);
    assert_int_equal(c->layers, 30);
    assert_int_equal(c->vocab, 49152);
    assert_true(c->tied && c->rope_theta == 100000.0f && c->norm_eps == 1e-5f);
    assert_string_equal(claas_model_name(model), "SmolLM2-135M-Instruct");
    assert_string_equal(claas_model_fingerprint(model), "44b2c23320c1b483");
    int32_t stops[4];
    assert_int_equal(claas_model_stop_tokens(model, stops, 4), 2);
    assert_int_equal(stops[0], 2);
    assert_int_equal(stops[1], 0);
    /* Against the gguf package's decoding and transformers' un-permutation. */
    static const struct {
        const char *name;
        double sum;
    } sums[] = {
        {"model.layers.3.self_attn.q_proj.weight", -119.26529693603516},
        {"model.layers.29.self_attn.k_proj.weight", 175.08992767333984},
        {"model.layers.29.mlp.down_proj.weight", 746.7797698974609},
    };
    for (size_t i = 0; i < CLAAS_COUNT(sums); i++) {
        double got = checksum(claas_model_tensor(model, sums[i].name));
        if (!(fabs(got - sums[i].sum) <= 1e-9 * (1.0 + fabs(sums[i].sum))))
            fail_msg("%s sums to %.17g, expected %.17g", sums[i].name, got, sums[i].sum);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dequantize),     cmocka_unit_test(test_half),
        cmocka_unit_test(test_type_table),     cmocka_unit_test(test_config_cases),
        cmocka_unit_test(test_config_fields),  cmocka_unit_test(test_config_hostile),
        cmocka_unit_test(test_hf_directories), cmocka_unit_test(test_hf_bad),
        cmocka_unit_test(test_random),         cmocka_unit_test(test_random_pinned),
        cmocka_unit_test(test_random_values),  cmocka_unit_test(test_random_bad),
        cmocka_unit_test(test_names),          cmocka_unit_test(test_embedded_model),
    };

    golden = argc > 1 ? argv[1] : "tests/golden";
    return cmocka_run_group_tests_name("model_files", tests, NULL, NULL);
}
