/* Which family a model's chat template belongs to.
 *
 * The original texts are recognised by the SHA-256 of their white-space-normalised form: then the
 * renderer in C is known to give the same characters. Any other text is taken by the markers of a
 * family, with the system text that it puts in read out of it, and with a warning, since the rest
 * of it may differ. */
#include <stdlib.h>
#include <string.h>

#include "chat_template_internal.h"
#include "claas/err.h"
#include "claas/mem.h"

#define NAMES         "chatml, smollm2, qwen2.5, qwen3, llama3, llama3.1, llama3.2"

#define SMOLLM_SYSTEM "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
#define QWEN_SYSTEM   "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
#define HELPFUL       "You are a helpful assistant."
/* What Llama 3.1 and 3.3 always show, and 3.2 where the renderer has no clock. */
#define LLAMA_DATE "26 Jul 2024"

struct family {
    const char *name;
    enum claas_chat_style style;
    const char *system;
    const char *date;
    bool date_today;
};

static const struct family families[] = {
    {"chatml", CLAAS_CHAT_CHATML, NULL, "", false},
    {"smollm2", CLAAS_CHAT_CHATML, SMOLLM_SYSTEM, "", false},
    {"qwen2.5", CLAAS_CHAT_QWEN25, QWEN_SYSTEM, "", false},
    {"qwen3", CLAAS_CHAT_QWEN3, NULL, "", false},
    {"llama3", CLAAS_CHAT_LLAMA3, NULL, "", false},
    {"llama3.1", CLAAS_CHAT_LLAMA3, NULL, LLAMA_DATE, false},
    {"llama3.2", CLAAS_CHAT_LLAMA3, NULL, LLAMA_DATE, true},
};

/* Made by tests/golden/make_chat_cases.py from the texts of the models named. `system` NULL: the
 * family's own. */
struct known_text {
    const char *hash;
    const char *family;
    const char *system;
};

static const struct known_text known_texts[] = {
    /* The form that most ChatML models carry. */
    {"fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e", "chatml", NULL},
    /* Qwen2-*-Instruct */
    {"f0206845c9ebc3abb4735d44f286eb81ce99238ad2accc710c6fc60e6cb8ccc8", "chatml", HELPFUL},
    /* SmolLM2-*-Instruct */
    {"6e76f0d0a1bfb2ef34f110bc376575127fca30189268db50eb63b9b7c352ac45", "smollm2", NULL},
    /* Qwen2.5-*-Instruct */
    {"705d5782da398f5ce4bb10e19b2358aba0bd78710233d5f1811d7068cba1b58a", "qwen2.5", NULL},
    /* Qwen3-*, first and second text */
    {"ccd61ecea6aa8406e336da83f2f71e500777096cdb0391303614e7331e6087b0", "qwen3", NULL},
    {"5922e70169a13b0ee856ed984180068cf3b8369fee76cce63c8ca2d37007f0b4", "qwen3", NULL},
    /* Qwen3-*-Thinking-2507 */
    {"240f81df50a712a8cf059ff79ab620967e0aa21e861e8ae799afa63a9b2ee62f", "qwen3", NULL},
    /* Meta-Llama-3-*-Instruct */
    {"4f46ecd43418f216df8c26936c60e5d04bcc81db47db5d86fbe889f64212dd4c", "llama3", NULL},
    /* Llama-3.1-*-Instruct and Llama-3.3-70B-Instruct */
    {"ea1f9d8a898a0ce5c37d64d87ec10cfde63b10355b6c315d60fbd1c7068d429d", "llama3.1", NULL},
    /* Llama-3.2-*-Instruct */
    {"6a181be8efdd87eac842323932a095e853dd3fa234718ebb0371cd4f05be1c01", "llama3.2", NULL},
};

static const struct family *find_family(const char *name)
{
    for (size_t i = 0; i < CLAAS_COUNT(families); i++)
        if (strcmp(families[i].name, name) == 0)
            return &families[i];
    return NULL;
}

static const struct known_text *find_known(const char *hash)
{
    for (size_t i = 0; i < CLAAS_COUNT(known_texts); i++)
        if (strcmp(known_texts[i].hash, hash) == 0)
            return &known_texts[i];
    return NULL;
}

const char *claas_chat_template_known(const char *hash)
{
    const struct known_text *known = find_known(hash);

    return known ? known->family : NULL;
}

static int take_family(claas_chat_template_t *chat_template, const struct family *family,
                       const char *system)
{
    chat_template->name = family->name;
    chat_template->style = family->style;
    chat_template->date_today = family->date_today;
    claas_copy_text(chat_template->date, sizeof(chat_template->date), family->date);
    if (!system)
        return 0;
    chat_template->default_system = claas_strdup(system);
    return chat_template->default_system ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

/* --- by markers --- */

static bool has(const char *source, const char *part)
{
    return strstr(source, part) != NULL;
}

static const char *family_by_markers(const char *source)
{
    if (has(source, "<|start_header_id|>") && has(source, "<|eot_id|>")) {
        if (!has(source, "Today Date"))
            return "llama3";
        return has(source, "strftime_now") ? "llama3.2" : "llama3.1";
    }
    if (!has(source, "<|im_start|>") || !has(source, "<|im_end|>"))
        return NULL;
    if (has(source, "</think>"))
        return "qwen3";
    return has(source, "<tool_response>") ? "qwen2.5" : "chatml";
}

/* Templates of models that always think end the prompt with an open <think>. */
static bool opens_thinking(const char *source)
{
    return has(source, "<|im_start|>assistant\\n<think>\\n'") ||
           has(source, "<|im_start|>assistant\\n<think>\\n\"");
}

static int warn(claas_chat_template_t *chat_template, const char *hash)
{
    const char *system = chat_template->default_system;

    chat_template->warning =
        claas_format("the model's chat template (SHA-256 %.12s…) is none of the known ones; its "
                     "markers are those of"
                     " '%s', which is used with %s%.60s%s as its system text; --chat-template "
                     "overrides it (" NAMES ")",
                     hash, chat_template->name, system ? "'" : "nothing", system ? system : "",
                     system ? (strlen(system) > 60 ? "…'" : "'") : "");
    return chat_template->warning ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

static int guess(claas_chat_template_t *chat_template, const char *source, const char *hash)
{
    const char *name = family_by_markers(source);
    int rc;

    if (!name)
        return claas_fail(CLAAS_ERR_UNSUPPORTED,
                          "the model's chat template fits no known family; choose one with"
                          " --chat-template: " NAMES);
    rc = take_family(chat_template, find_family(name), NULL);
    if (rc < 0)
        return rc;
    if (chat_template->style != CLAAS_CHAT_LLAMA3)
        rc = claas_chat_template_read_system(source, &chat_template->default_system);
    else if (strcmp(name, "llama3.1") == 0)
        claas_chat_template_read_date(source, chat_template->date);
    chat_template->opens_thinking = opens_thinking(source);
    return rc < 0 ? rc : warn(chat_template, hash);
}

/* --- the whole --- */

static int choose(claas_chat_template_t *chat_template, const char *source, const char *override)
{
    const struct family *family;
    const struct known_text *known;
    char hash[65];

    if (override) {
        family = find_family(override);
        if (!family)
            return claas_fail(CLAAS_ERR_UNSUPPORTED,
                              "no chat template is called '%.40s'; there are " NAMES, override);
        return take_family(chat_template, family, family->system);
    }
    if (!source)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "the model has no chat template; choose one with"
                                                 " --chat-template: " NAMES);
    claas_chat_template_hash(source, hash);
    known = find_known(hash);
    if (!known)
        return guess(chat_template, source, hash);
    family = find_family(known->family);
    chat_template->opens_thinking = opens_thinking(source);
    return take_family(chat_template, family, known->system ? known->system : family->system);
}

int claas_chat_template_new(const char *source, const char *override, claas_chat_template_t **ret)
{
    CLAAS_AUTO(claas_chat_template_free)
    claas_chat_template_t *chat_template = CLAAS_NEW(claas_chat_template_t);
    int rc;

    if (!chat_template)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    rc = choose(chat_template, source, override);
    if (rc < 0)
        return rc;
    *ret = CLAAS_TAKE(chat_template);
    return 0;
}

void claas_chat_template_free(claas_chat_template_t **chat_template)
{
    if (*chat_template) {
        free((*chat_template)->default_system);
        free((*chat_template)->warning);
        free(*chat_template);
    }
    *chat_template = NULL;
}

const char *claas_chat_template_name(const claas_chat_template_t *chat_template)
{
    return chat_template->name;
}

const char *claas_chat_template_warning(const claas_chat_template_t *chat_template)
{
    return chat_template->warning;
}

const char *claas_chat_template_default_system(const claas_chat_template_t *chat_template)
{
    return chat_template->default_system;
}
