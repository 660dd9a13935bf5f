/* Hugging Face's tokenizer.json to a tokenizer. What the file asks for is either done exactly or
 * refused with UNSUPPORTED and the field's name: a tokenizer that is nearly right trains on the
 * wrong text.
 *
 * Read: model (BPE), added_tokens, normalizer (none or NFC), pre_tokenizer (the four known ones),
 * post_processor (only for the token it puts in front). `truncation` and `padding` concern batches
 * and are not ours. */
#include <stdlib.h>
#include <string.h>

#include "claas/err.h"
#include "claas/json.h"
#include "claas/mem.h"
#include "tokenizer_internal.h"

#define FILE_MAX ((size_t)256 << 20) /* the largest known are 35 MB */
#define ID_MAX   (1 << 24)

/* Everything borrowed from the JSON tree while the tokenizer is built. */
struct reading {
    const cJSON *model;
    struct claas_tokenizer_source source;
    struct claas_tokenizer_extra extra;
    struct claas_vocab_entry *vocab;
    struct claas_added_token *added;
    const char **left, **right;
    char *merge_texts; /* halves of merges that are one string in the file */
};

static void reading_done(struct reading *reading)
{
    free(reading->vocab);
    free(reading->added);
    free((void *)reading->left);
    free((void *)reading->right);
    free(reading->merge_texts);
}

static const char *text_of(const cJSON *object, const char *key)
{
    const cJSON *item = claas_json_get(object, key);

    return cJSON_IsString(item) ? item->valuestring : "";
}

static bool is_true(const cJSON *object, const char *key, bool absent)
{
    const cJSON *item = claas_json_get(object, key);

    return item ? cJSON_IsTrue(item) : absent;
}

static bool is_type(const cJSON *object, const char *type)
{
    return strcmp(text_of(object, "type"), type) == 0;
}

static int refuse(const char *what, const char *detail)
{
    return claas_fail(CLAAS_ERR_UNSUPPORTED, "tokenizer.json: %s '%.100s' is not supported", what,
                      detail);
}

/* --- vocabulary --- */

static bool get_id(const cJSON *item, int64_t *ret)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble < ID_MAX) ||
        item->valuedouble != (double)(int64_t)item->valuedouble)
        return false;
    *ret = (int64_t)item->valuedouble;
    return true;
}

/* The size that covers every id. Ids may have holes, but not so many that a small file asks for a
 * large table. */
static int count_ids(const cJSON *vocab, const cJSON *added, size_t *ret)
{
    const cJSON *item;
    int64_t id, most = -1;
    size_t entries = 0;

    cJSON_ArrayForEach(item, vocab)
    {
        if (!get_id(item, &id))
            return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: the id of '%.64s' is not possible",
                              item->string);
        most = id > most ? id : most;
        entries++;
    }
    cJSON_ArrayForEach(item, added)
    {
        if (!get_id(claas_json_get(item, "id"), &id) ||
            !cJSON_IsString(claas_json_get(item, "content")))
            return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: an added token without a possible"
                                                " id and content");
        most = id > most ? id : most;
        entries++;
    }
    if (most < 0)
        return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: the vocabulary is empty");
    if ((uint64_t)most >= 4 * (uint64_t)entries + 65536)
        return claas_fail(CLAAS_ERR_LIMIT, "tokenizer.json: id %lld among %zu tokens",
                          (long long)most, entries);
    *ret = (size_t)most + 1;
    return 0;
}

static int read_vocab(struct reading *reading, const cJSON *vocab)
{
    const cJSON *item;

    cJSON_ArrayForEach(item, vocab)
    {
        struct claas_vocab_entry *entry = &reading->vocab[(size_t)item->valuedouble];

        if (entry->text)
            return claas_fail(CLAAS_ERR_FORMAT,
                              "tokenizer.json: '%.64s' and '%.64s' have the same"
                              " id",
                              entry->text, item->string);
        entry->text = item->string;
        entry->length = strlen(item->string);
    }
    return 0;
}

static int read_added(struct reading *reading, const cJSON *added)
{
    size_t count = (size_t)cJSON_GetArraySize(added);
    const cJSON *item;

    reading->added = CLAAS_NEW_ARRAY(struct claas_added_token, count + 1);
    if (!reading->added)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    cJSON_ArrayForEach(item, added)
    {
        int32_t id = (int32_t)claas_json_get(item, "id")->valuedouble;
        const char *content = text_of(item, "content");
        struct claas_vocab_entry *entry = &reading->vocab[id];
        bool special = is_true(item, "special", false);

        if (entry->special || (entry->text && strcmp(entry->text, content) != 0))
            return claas_fail(CLAAS_ERR_FORMAT,
                              "tokenizer.json: '%.64s' and '%.64s' have the same"
                              " id",
                              entry->text, content);
        *entry = (struct claas_vocab_entry){content, strlen(content), true, special};
        reading->added[reading->extra.added_count++] = (struct claas_added_token){
            .id = id,
            .normalized = is_true(item, "normalized", !special),
            .single_word = is_true(item, "single_word", false),
            .strip_left = is_true(item, "lstrip", false),
            .strip_right = is_true(item, "rstrip", false),
        };
    }
    reading->extra.added = reading->added;
    return 0;
}

static int read_tokens(struct reading *reading, const cJSON *root)
{
    const cJSON *vocab = NULL, *added = NULL;
    int rc = claas_json_get_object(reading->model, "vocab", &vocab);

    if (rc >= 0)
        rc = claas_json_get_array(root, "added_tokens", &added);
    if (rc >= 0 && !vocab)
        rc = claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: model.vocab is missing");
    if (rc >= 0)
        rc = count_ids(vocab, added, &reading->source.vocab_count);
    if (rc < 0)
        return rc;
    reading->vocab = CLAAS_NEW_ARRAY(struct claas_vocab_entry, reading->source.vocab_count);
    if (!reading->vocab)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    reading->source.vocab = reading->vocab;
    rc = read_vocab(reading, vocab);
    return rc < 0 ? rc : read_added(reading, added);
}

/* --- merges --- */

/* "a b", or ["a", "b"] in newer files. */
static int read_merge(const cJSON *item, char **arena, const char **left, const char **right)
{
    const cJSON *first = cJSON_IsArray(item) ? item->child : NULL;
    const cJSON *second = first ? first->next : NULL;
    const char *space;

    if (cJSON_IsString(first) && cJSON_IsString(second) && !second->next) {
        *left = first->valuestring;
        *right = second->valuestring;
    } else if (cJSON_IsString(item) && (space = strchr(item->valuestring, ' ')) &&
               !strchr(space + 1, ' ')) {
        size_t size = strlen(item->valuestring) + 1;

        *left = memcpy(*arena, item->valuestring, size);
        (*arena)[space - item->valuestring] = '\0';
        *right = *arena + (space - item->valuestring) + 1;
        *arena += size;
    } else {
        return CLAAS_ERR_FORMAT;
    }
    return **left && **right ? 0 : CLAAS_ERR_FORMAT;
}

static int read_merges(struct reading *reading)
{
    const cJSON *merges = NULL, *item;
    size_t bytes = 0, count = 0;
    char *arena;
    int rc = claas_json_get_array(reading->model, "merges", &merges);

    if (rc < 0)
        return rc;
    cJSON_ArrayForEach(item, merges)
    {
        bytes += cJSON_IsString(item) ? strlen(item->valuestring) + 1 : 0;
        count++;
    }
    reading->left = CLAAS_NEW_ARRAY(const char *, count + 1);
    reading->right = CLAAS_NEW_ARRAY(const char *, count + 1);
    reading->merge_texts = arena = CLAAS_NEW_ARRAY(char, bytes + 1);
    if (!reading->left || !reading->right || !arena)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    count = 0;
    cJSON_ArrayForEach(item, merges)
    {
        if (read_merge(item, &arena, &reading->left[count], &reading->right[count]) < 0)
            return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: merge %zu is not two texts",
                              count);
        count++;
    }
    reading->source.merge_left = reading->left;
    reading->source.merge_right = reading->right;
    reading->source.merge_count = count;
    return 0;
}

/* --- model --- */

static int read_model(struct reading *reading, const cJSON *root)
{
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const cJSON *model = NULL, *dropout, *unknown;
    int rc = claas_json_get_object(root, "model", &model);

    if (rc < 0)
        return rc;
    if (!model)
        return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: model is missing");
    if (claas_json_get(model, "type") && !is_type(model, "BPE"))
        return refuse("model.type", text_of(model, "type"));
    for (size_t i = 0; i < CLAAS_COUNT(affixes); i++)
        if (text_of(model, affixes[i])[0])
            return refuse(affixes[i], text_of(model, affixes[i]));
    dropout = claas_json_get(model, "dropout");
    if (dropout && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        return refuse("model.dropout", "not 0");
    if (is_true(model, "byte_fallback", false))
        return refuse("model.byte_fallback", "true");
    unknown = claas_json_get(model, "unk_token");
    if (unknown && !cJSON_IsString(unknown))
        return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: model.unk_token is not a text");
    reading->model = model;
    reading->extra.fuse_unknown = is_true(model, "fuse_unk", false);
    reading->source.ignore_merges = is_true(model, "ignore_merges", false);
    return 0;
}

/* An unknown token that the vocabulary lacks is no error: bytes that would need it vanish. */
static void find_unknown(struct reading *reading)
{
    const char *unknown = text_of(reading->model, "unk_token");

    reading->extra.unknown = -1;
    for (size_t i = 0; unknown[0] && i < reading->source.vocab_count; i++)
        if (reading->vocab[i].text && strcmp(reading->vocab[i].text, unknown) == 0)
            reading->extra.unknown = (int32_t)i;
}

/* --- normalizer and pre-tokenizer --- */

static int read_normalizer(struct reading *reading, const cJSON *normalizer)
{
    const cJSON *parts, *item;

    if (!normalizer)
        return 0;
    if (is_type(normalizer, "NFC")) {
        reading->source.normalize_nfc = true;
        return 0;
    }
    parts = claas_json_get(normalizer, "normalizers");
    if (!is_type(normalizer, "Sequence") || !cJSON_IsArray(parts))
        return refuse("normalizer", text_of(normalizer, "type"));
    cJSON_ArrayForEach(item, parts)
    {
        if (!is_type(item, "NFC"))
            return refuse("normalizer", text_of(item, "type"));
        reading->source.normalize_nfc = true;
    }
    return 0;
}

/* The steps of a pre-tokenizer: one, or a sequence of at most two. */
static size_t list_steps(const cJSON *pre_tokenizer, const cJSON *steps[3])
{
    const cJSON *parts = claas_json_get(pre_tokenizer, "pretokenizers"), *item;
    size_t count = 0;

    steps[0] = pre_tokenizer;
    if (!is_type(pre_tokenizer, "Sequence"))
        return 1;
    cJSON_ArrayForEach(item, parts)
    {
        if (count < 3)
            steps[count++] = item;
    }
    return count;
}

static bool is_byte_level(const cJSON *step, bool with_regex)
{
    return is_type(step, "ByteLevel") && !is_true(step, "add_prefix_space", true) &&
           is_true(step, "use_regex", true) == with_regex;
}

static int read_pre_tokenizer(struct reading *reading, const cJSON *pre_tokenizer)
{
    const cJSON *steps[3] = {NULL, NULL, NULL};
    size_t count = list_steps(pre_tokenizer, steps);
    int kind = -1;

    if (count == 1 && is_byte_level(steps[0], true))
        kind = CLAAS_PRETOKENIZER_GPT2;
    if (count == 2 && is_type(steps[0], "Digits") &&
        is_true(steps[0], "individual_digits", false) && is_byte_level(steps[1], true))
        kind = CLAAS_PRETOKENIZER_SMOLLM;
    if (count == 2 && is_type(steps[0], "Split") && is_byte_level(steps[1], false) &&
        strcmp(text_of(steps[0], "behavior"), "Isolated") == 0 &&
        !is_true(steps[0], "invert", false)) {
        const char *regex = text_of(claas_json_get(steps[0], "pattern"), "Regex");

        kind = claas_pretokenizer_from_regex(regex);
        if (kind < 0)
            return refuse("pre_tokenizer with the pattern", regex);
    }
    if (kind < 0)
        return refuse("pre_tokenizer", text_of(pre_tokenizer, "type"));
    reading->source.pretokenizer = (enum claas_pretokenizer)kind;
    return 0;
}

/* --- post-processor --- */

/* {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|begin_of_text|>"}}, …]} */
static void read_bos(struct reading *reading, const cJSON *processor)
{
    const cJSON *parts = claas_json_get(processor, "processors"), *item;
    const cJSON *single = claas_json_get(processor, "single");

    reading->source.bos = -1;
    cJSON_ArrayForEach(item, parts)
    {
        if (is_type(item, "TemplateProcessing"))
            single = claas_json_get(item, "single");
    }
    if (!cJSON_IsArray(single))
        return;
    const char *text = text_of(claas_json_get(single->child, "SpecialToken"), "id");
    for (size_t i = 0; text[0] && i < reading->extra.added_count; i++)
        if (strcmp(reading->vocab[reading->added[i].id].text, text) == 0)
            reading->source.bos = reading->added[i].id;
    reading->source.add_bos = reading->source.bos >= 0;
}

int claas_tokenizer_from_json(const char *json, size_t length, claas_tokenizer_t **ret)
{
    CLAAS_AUTO(claas_json_free) cJSON *root = NULL;
    CLAAS_AUTO(reading_done) struct reading reading = {NULL};
    int rc = claas_json_parse(json, length, FILE_MAX, &root);

    if (rc < 0)
        return claas_fail_context(rc, "tokenizer.json: ");
    if (!cJSON_IsObject(root))
        return claas_fail(CLAAS_ERR_FORMAT, "tokenizer.json: not an object");
    rc = read_model(&reading, root);
    if (rc >= 0)
        rc = read_normalizer(&reading, claas_json_get(root, "normalizer"));
    if (rc >= 0)
        rc = read_pre_tokenizer(&reading, claas_json_get(root, "pre_tokenizer"));
    if (rc >= 0)
        rc = read_tokens(&reading, root);
    if (rc >= 0)
        rc = read_merges(&reading);
    if (rc < 0)
        return rc;
    find_unknown(&reading);
    read_bos(&reading, claas_json_get(root, "post_processor"));
    return claas_tokenizer_build(&reading.source, &reading.extra, ret);
}
