/* The tokenizer against Hugging Face's `tokenizers` (tests/golden/tokenizer_cases.json), hostile
 * files, odd input and threads. The comparison on megabytes is tests/e2e/tokenizer_parity.py. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "claas/buf.h"
#include "claas/err.h"
#include "claas/file.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "claas/random.h"
#include "claas/tokenizer.h"

#define CASES_MAX ((size_t)64 << 20)

static const char *golden_directory;
static cJSON *golden;

static int load_golden(void **state)
{
    CLAAS_AUTO_FREE char *path = claas_format("%s/tokenizer_cases.json", golden_directory);
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length;

    (void)state;
    if (claas_file_read(path, CASES_MAX, &text, &length) < 0 ||
        claas_json_parse(text, length, CASES_MAX, &golden) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        return -1;
    }
    return 0;
}

static int drop_golden(void **state)
{
    (void)state;
    claas_json_free(&golden);
    return 0;
}

static claas_tokenizer_t *open_json(const cJSON *json)
{
    CLAAS_AUTO_FREE char *text = claas_json_print(json);
    claas_tokenizer_t *tokenizer = NULL;

    if (claas_tokenizer_from_json(text, strlen(text), &tokenizer) < 0)
        fail_msg("%s", claas_error_text());
    return tokenizer;
}

/* The tokenizer of the golden group whose name starts so. */
static const cJSON *find_group(const char *name)
{
    const cJSON *group, *found = NULL;
    const char *text = "";

    cJSON_ArrayForEach(group, claas_json_get(golden, "groups"))
    {
        claas_json_get_string(group, "name", &text);
        if (!found && strncmp(text, name, strlen(name)) == 0)
            found = group;
    }
    assert_non_null(found);
    return found;
}

static claas_tokenizer_t *open_group(const char *name)
{
    return open_json(claas_json_get(find_group(name), "tokenizer"));
}

/* The cases' text; U+241A stands for NUL, which our JSON refuses. */
static char *text_of_case(const char *shown, size_t *ret_length)
{
    struct claas_buf buf;

    claas_buf_init(&buf, CASES_MAX);
    while (*shown) {
        bool nul = strncmp(shown, "\xe2\x90\x9a", 3) == 0;

        claas_buf_add(&buf, nul ? "" : shown, 1);
        shown += nul ? 3 : 1;
    }
    claas_buf_add(&buf, "", 1);
    *ret_length = buf.length - 1;
    size_t length;
    return claas_buf_take(&buf, &length);
}

/* --- golden cases --- */

static void check_ids(const claas_tokenizer_t *tokenizer, const char *text, size_t length,
                      bool parse_special, const cJSON *expected)
{
    CLAAS_AUTO_FREE int32_t *ids = NULL;
    size_t count, i = 0;
    const cJSON *item;

    assert_int_equal(claas_tokenizer_encode(tokenizer, text, length, parse_special, &ids, &count),
                     0);
    cJSON_ArrayForEach(item, expected)
    {
        if (i >= count || ids[i] != item->valueint)
            fail_msg("'%s' (special %d): token %zu is %d, not %d", text, parse_special, i,
                     i < count ? ids[i] : -1, item->valueint);
        i++;
    }
    assert_int_equal(i, count);
}

static void check_group(const cJSON *group)
{
    CLAAS_AUTO(claas_tokenizer_free)
    claas_tokenizer_t *tokenizer = open_json(claas_json_get(group, "tokenizer"));
    const cJSON *item;
    int cases = 0;

    cJSON_ArrayForEach(item, claas_json_get(group, "cases"))
    {
        const cJSON *special = item->child->next, *plain = special->next ? special->next : special;
        size_t length;
        CLAAS_AUTO_FREE char *text = text_of_case(item->child->valuestring, &length);

        check_ids(tokenizer, text, length, true, special);
        check_ids(tokenizer, text, length, false, plain);
        cases++;
    }
    assert_true(cases > 100);
}

static void test_golden(void **state)
{
    const cJSON *group;
    int groups = 0;

    (void)state;
    cJSON_ArrayForEach(group, claas_json_get(golden, "groups"))
    {
        check_group(group);
        groups++;
    }
    assert_int_equal(groups, 7);
}

static void test_round_trip(void **state)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group("gpt2, merges");
    const cJSON *item;

    (void)state;
    cJSON_ArrayForEach(item, claas_json_get(find_group("gpt2, merges"), "cases"))
    {
        size_t length, count, back_length;
        CLAAS_AUTO_FREE char *text = text_of_case(item->child->valuestring, &length);
        CLAAS_AUTO_FREE int32_t *ids = NULL;
        CLAAS_AUTO_FREE char *back = NULL;

        assert_int_equal(claas_tokenizer_encode(tokenizer, text, length, true, &ids, &count), 0);
        assert_int_equal(claas_tokenizer_decode(tokenizer, ids, count, false, &back, &back_length),
                         0);
        assert_int_equal(back_length, length);
        assert_memory_equal(back, text, length);
        assert_int_equal(back[length], 0);
    }
}

static void test_pieces(void **state)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group("qwen2");
    int32_t end = claas_tokenizer_special(tokenizer, "<|im_end|>");
    int32_t think = claas_tokenizer_special(tokenizer, "<think>");
    int32_t composed = claas_tokenizer_special(tokenizer, "[\xc3\x89]");
    int32_t outside = (int32_t)claas_tokenizer_vocab_count(tokenizer);
    int32_t ids[] = {end, think, outside, -1, composed};
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length;

    (void)state;
    assert_true(end >= 0 && think >= 0 && composed >= 0);
    assert_int_equal(claas_tokenizer_special(tokenizer, "<|im_end|"), -1);
    assert_int_equal(claas_tokenizer_special(tokenizer, ""), -1);
    assert_true(claas_tokenizer_is_control(tokenizer, end));
    assert_false(claas_tokenizer_is_control(tokenizer, think));
    assert_false(claas_tokenizer_is_control(tokenizer, outside));
    assert_false(claas_tokenizer_is_control(tokenizer, -1));
    assert_memory_equal(claas_tokenizer_piece(tokenizer, end, &length), "<|im_end|>", 10);
    assert_int_equal(length, 10);
    claas_tokenizer_piece(tokenizer, outside, &length);
    assert_int_equal(length, 0);
    claas_tokenizer_piece(tokenizer, INT32_MIN, &length);
    assert_int_equal(length, 0);
    assert_int_equal(claas_tokenizer_decode(tokenizer, ids, 5, true, &text, &length), 0);
    assert_string_equal(text, "<think>[\xc3\x89]");
    assert_int_equal(claas_tokenizer_bos(tokenizer), -1);
}

static void test_bos(void **state)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group("llama3");

    (void)state;
    assert_true(claas_tokenizer_bos(tokenizer) >= 0);
    assert_int_equal(claas_tokenizer_bos(tokenizer),
                     claas_tokenizer_special(tokenizer, "<|begin_of_text|>"));
}

/* --- input --- */

static void test_broken_utf8(void **state)
{
    static const char *const texts[] = {
        "\x80", "a\xc3", "\xc0\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "abc\xff", "\xe4\xbd"};
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group("qwen2");
    int32_t *ids = NULL;
    size_t count;

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(texts); i++) {
        assert_int_equal(
            claas_tokenizer_encode(tokenizer, texts[i], strlen(texts[i]), true, &ids, &count),
            CLAAS_ERR_FORMAT);
        assert_null(ids);
    }
}

/* Runs of one kind must not cost the square of their length: the suite's time limit is the check.
 */
static void test_long_runs(void **state)
{
    static const char *const units[] = {
        "a",          " ", "\n",    "ab",  "\xcc\x81", "\xe5\xad\x97",
        "<|im_end|>", "<", "<|im_", " \n", "\xc2\xa0", "'"};
    static const char *const names[] = {"smollm", "qwen2", "llama3"};

    (void)state;
    for (size_t n = 0; n < CLAAS_COUNT(names); n++) {
        CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group(names[n]);

        for (size_t u = 0; u < CLAAS_COUNT(units); u++) {
            size_t unit = strlen(units[u]), length = 200000 / unit * unit, count, back_length;
            CLAAS_AUTO_FREE char *text = claas_alloc(length + 1, 1);
            CLAAS_AUTO_FREE int32_t *ids = NULL;
            CLAAS_AUTO_FREE char *back = NULL;

            for (size_t i = 0; i < length; i += unit)
                memcpy(text + i, units[u], unit);
            assert_int_equal(claas_tokenizer_encode(tokenizer, text, length, true, &ids, &count),
                             0);
            assert_int_equal(
                claas_tokenizer_decode(tokenizer, ids, count, false, &back, &back_length), 0);
            /* The trained alphabet of the first lacks bytes, which vanish. */
            assert_true(back_length == length || n == 0);
        }
    }
}

struct job {
    const claas_tokenizer_t *tokenizer;
    const char *text;
    size_t length;
    int32_t *ids;
    size_t count;
    int rc;
};

static void *encode_many(void *argument)
{
    struct job *job = argument;

    for (int i = 0; i < 5 && job->rc >= 0; i++) {
        free(CLAAS_TAKE(job->ids));
        job->rc = claas_tokenizer_encode(job->tokenizer, job->text, job->length, true, &job->ids,
                                         &job->count);
    }
    return NULL;
}

static void test_threads(void **state)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = open_group("qwen2");
    CLAAS_AUTO_FREE char *text = claas_json_print(claas_json_get(find_group("qwen2"), "cases"));
    struct job jobs[4];
    pthread_t threads[4];

    (void)state;
    for (int i = 0; i < 4; i++) {
        jobs[i] = (struct job){tokenizer, text, strlen(text), NULL, 0, 0};
        assert_int_equal(pthread_create(&threads[i], NULL, encode_many, &jobs[i]), 0);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(jobs[i].rc, 0);
        assert_int_equal(jobs[i].count, jobs[0].count);
        assert_memory_equal(jobs[i].ids, jobs[0].ids, jobs[0].count * sizeof(int32_t));
    }
    for (int i = 0; i < 4; i++)
        free(jobs[i].ids);
}

/* --- sources that are wrong --- */

static int build(const char *const *texts, size_t count, const char *left, const char *right)
{
    struct claas_vocab_entry vocab[8] = {{NULL}};
    struct claas_tokenizer_source source = {.vocab = vocab,
                                            .vocab_count = count,
                                            .merge_left = &left,
                                            .merge_right = &right,
                                            .merge_count = left ? 1 : 0,
                                            .bos = -1};
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = NULL;

    for (size_t i = 0; i < count; i++)
        if (texts[i])
            vocab[i] = (struct claas_vocab_entry){texts[i], strlen(texts[i]), texts[i][0] == '<',
                                                  texts[i][0] == '<'};
    return claas_tokenizer_new(&source, &tokenizer);
}

static void test_sources(void **state)
{
    static const char *const good[] = {"a", "b", "ab", NULL, "<s>", ""};
    static const char *const twice[] = {"a", "b", "a"};
    static const char *const special_twice[] = {"a", "<s>", "<s>"};

    (void)state;
    assert_int_equal(build(good, 6, "a", "b"), 0);
    assert_int_equal(build(good, 6, NULL, NULL), 0);
    assert_int_equal(build(good, 0, NULL, NULL), CLAAS_ERR_LIMIT);
    assert_int_equal(build(good, 2, "a", "b"), CLAAS_ERR_FORMAT);
    assert_non_null(strstr(claas_error_text(), "what they make"));
    assert_int_equal(build(good, 6, "x", "b"), CLAAS_ERR_FORMAT);
    assert_non_null(strstr(claas_error_text(), "the left half"));
    assert_int_equal(build(good, 6, "a", ""), CLAAS_ERR_FORMAT);
    assert_int_equal(build(twice, 3, NULL, NULL), CLAAS_ERR_FORMAT);
    assert_int_equal(build(special_twice, 3, NULL, NULL), CLAAS_ERR_FORMAT);
}

/* --- tokenizer.json that is wrong --- */

struct hostile {
    const char *model, *rest; /* the fields of "model", and those beside it */
    int rc;
    const char *word; /* in the sentence */
};

#define BYTE_LEVEL "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}"

static const struct hostile hostiles[] = {
    {"\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]", BYTE_LEVEL, 0, NULL},
    {"\"vocab\":{\"a\":0,\"b\":9,\"ab\":7},\"merges\":[[\"a\",\"b\"]]", BYTE_LEVEL, 0, NULL},
    {"\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "the same id"},
    {"\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "twice"},
    {"\"vocab\":{\"a\":-1}", BYTE_LEVEL, CLAAS_ERR_FORMAT, "not possible"},
    {"\"vocab\":{\"a\":1.5}", BYTE_LEVEL, CLAAS_ERR_FORMAT, "not possible"},
    {"\"vocab\":{\"a\":\"0\"}", BYTE_LEVEL, CLAAS_ERR_FORMAT, "not possible"},
    {"\"vocab\":{\"a\":1e300}", BYTE_LEVEL, CLAAS_ERR_FORMAT, "not possible"},
    {"\"vocab\":{\"a\":9999999}", BYTE_LEVEL, CLAAS_ERR_LIMIT, "9999999"},
    {"\"vocab\":{}", BYTE_LEVEL, CLAAS_ERR_FORMAT, "empty"},
    {"\"vocab\":[]", BYTE_LEVEL, CLAAS_ERR_INVALID, "vocab"},
    {"\"type\":\"BPE\"", BYTE_LEVEL, CLAAS_ERR_FORMAT, "model.vocab"},
    {"\"vocab\":{\"a\":0},\"merges\":{}", BYTE_LEVEL, CLAAS_ERR_INVALID, "merges"},
    {"\"vocab\":{\"a\":0},\"merges\":[\"a\"]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[\"a a a\"]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[[\"a\"]]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[[\"a\",\"b\",\"c\"]]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two"},
    {"\"vocab\":{\"a\":0},\"merges\":[[\"a\",\"\"]]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[[\"\",\"a\"]]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[7]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "two texts"},
    {"\"vocab\":{\"a\":0},\"merges\":[\"a b\"]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "right half"},
    {"\"vocab\":{\"a\":0,\"b\":1},\"merges\":[\"a b\"]", BYTE_LEVEL, CLAAS_ERR_FORMAT, "make"},
    {"\"type\":\"WordPiece\",\"vocab\":{\"a\":0}", BYTE_LEVEL, CLAAS_ERR_UNSUPPORTED, "WordPiece"},
    {"\"vocab\":{\"a\":0},\"dropout\":0.1", BYTE_LEVEL, CLAAS_ERR_UNSUPPORTED, "dropout"},
    {"\"vocab\":{\"a\":0},\"byte_fallback\":true", BYTE_LEVEL, CLAAS_ERR_UNSUPPORTED, "fallback"},
    {"\"vocab\":{\"a\":0},\"end_of_word_suffix\":\"</w>\"", BYTE_LEVEL, CLAAS_ERR_UNSUPPORTED,
     "</w>"},
    {"\"vocab\":{\"a\":0},\"unk_token\":7", BYTE_LEVEL, CLAAS_ERR_FORMAT, "unk_token"},
    {"\"vocab\":{\"a\":0}", "\"pre_tokenizer\":null", CLAAS_ERR_UNSUPPORTED, "pre_tokenizer"},
    {"\"vocab\":{\"a\":0}", "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":true}",
     CLAAS_ERR_UNSUPPORTED, "ByteLevel"},
    {"\"vocab\":{\"a\":0}", "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[]}",
     CLAAS_ERR_UNSUPPORTED, "Sequence"},
    {"\"vocab\":{\"a\":0}",
     "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
     "{\"Regex\":\"(a+)+b\"},\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\","
     "\"add_prefix_space\":false,\"use_regex\":false}]}",
     CLAAS_ERR_UNSUPPORTED, "(a+)+b"},
    {"\"vocab\":{\"a\":0}", "\"normalizer\":{\"type\":\"Lowercase\"}," BYTE_LEVEL,
     CLAAS_ERR_UNSUPPORTED, "Lowercase"},
    {"\"vocab\":{\"a\":0}",
     "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFD\"}]}," BYTE_LEVEL,
     CLAAS_ERR_UNSUPPORTED, "NFD"},
    {"\"vocab\":{\"a\":0}", "\"added_tokens\":[{\"id\":0,\"content\":\"b\"}]," BYTE_LEVEL,
     CLAAS_ERR_FORMAT, "the same id"},
    {"\"vocab\":{\"a\":0}",
     "\"added_tokens\":[{\"id\":1,\"content\":\"b\"},{\"id\":1,\"content\":\"b\"}]," BYTE_LEVEL,
     CLAAS_ERR_FORMAT, "the same id"},
    {"\"vocab\":{\"a\":0}",
     "\"added_tokens\":[{\"id\":1,\"content\":\"b\"},{\"id\":2,\"content\":\"b\"}]," BYTE_LEVEL,
     CLAAS_ERR_FORMAT, "the same text"},
    {"\"vocab\":{\"a\":0}", "\"added_tokens\":[{\"content\":\"b\"}]," BYTE_LEVEL, CLAAS_ERR_FORMAT,
     "added token"},
    {"\"vocab\":{\"a\":0}", "\"added_tokens\":[3,null,[]]," BYTE_LEVEL, CLAAS_ERR_FORMAT,
     "added token"},
    {"\"vocab\":{\"a\":0}", "\"added_tokens\":[{\"id\":1,\"content\":\"\"}]," BYTE_LEVEL, 0, NULL},
};

static void test_hostile_json(void **state)
{
    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(hostiles); i++) {
        const struct hostile *h = &hostiles[i];
        CLAAS_AUTO_FREE char *json = claas_format("{%s,\"model\":{%s}}", h->rest, h->model);
        CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = NULL;
        int rc = claas_tokenizer_from_json(json, strlen(json), &tokenizer);

        if (rc != h->rc || (h->word && !strstr(claas_error_text(), h->word)))
            fail_msg("%s: %d (%s), not %d with '%s'", json, rc, claas_error_text(), h->rc,
                     h->word ? h->word : "");
        assert_int_equal(tokenizer != NULL, rc == 0);
    }
}

static void try_json(const char *json, size_t length)
{
    CLAAS_AUTO(claas_tokenizer_free) claas_tokenizer_t *tokenizer = NULL;
    CLAAS_AUTO_FREE char *copy = claas_alloc(length + 1, 1);
    CLAAS_AUTO_FREE int32_t *ids = NULL;
    size_t count;

    /* A block of the exact size, so that a sanitizer sees the first byte too many. */
    memcpy(copy, json, length);
    if (claas_tokenizer_from_json(copy, length, &tokenizer) == 0)
        assert_int_equal(claas_tokenizer_encode(tokenizer, "the <s> abab", 12, true, &ids, &count),
                         0);
}

/* Every truncation and some thousand changed bytes of a small valid file: an error or a tokenizer,
 * never a crash. */
static void test_damaged_json(void **state)
{
    static const char valid[] =
        "{\"added_tokens\":[{\"id\":5,\"content\":\"<s>\",\"special\":true,\"normalized\":true,"
        "\"lstrip\":true,\"rstrip\":true,\"single_word\":true}],\"normalizer\":{\"type\":\"NFC\"},"
        "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\","
        "\"individual_digits\":true},{\"type\":\"ByteLevel\",\"add_prefix_space\":false}]},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":"
        "{\"id\":\"<s>\"}}]},\"model\":{\"type\":\"BPE\",\"unk_token\":\"a\",\"fuse_unk\":true,"
        "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"abab\":3,\"\xc4\xa0\":4},"
        "\"merges\":[\"a b\",[\"ab\",\"ab\"]]}}";
    CLAAS_AUTO_FREE char *copy = claas_strdup(valid);
    size_t length = strlen(valid);

    (void)state;
    for (size_t i = 0; i < length; i++)
        try_json(valid, i);
    for (uint64_t i = 0; i < 4000; i++) {
        uint32_t words[4];

        claas_philox(1, 2, i, words);
        memcpy(copy, valid, length);
        for (int change = 0; change < 1 + (int)(words[3] & 1); change++)
            copy[words[change] % length] = (char)(words[2] >> 8 * change);
        try_json(copy, length);
    }
    try_json(valid, length);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),       cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_pieces),       cmocka_unit_test(test_bos),
        cmocka_unit_test(test_broken_utf8),  cmocka_unit_test(test_long_runs),
        cmocka_unit_test(test_threads),      cmocka_unit_test(test_sources),
        cmocka_unit_test(test_hostile_json), cmocka_unit_test(test_damaged_json),
    };

    golden_directory = argc > 1 ? argv[1] : "tests/golden";
    return cmocka_run_group_tests(tests, load_golden, drop_golden);
}
