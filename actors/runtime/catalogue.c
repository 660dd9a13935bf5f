/* The catalogue as tables, made from messages.def by including it twice: once for the field lists
 * (one array per message), once for the index by type.
 *
 * A body is checked against the fields of its part: required ones must be there, known ones must
 * have their type and range. Unknown fields pass, so that a newer peer can add some. */
#include "claas/err.h"
#include "claas/mem.h"
#include "claas/message.h"

#include <string.h>

#define CLAAS_MESSAGE(name, id, receiver, role, max_body, doc)                                     \
    static const struct claas_field fields_##name[] = {
#define CLAAS_FIELD(part, name, type, need, min, max, doc)                                         \
    {CLAAS_PART_##part, #name, CLAAS_FIELD_##type, need, min, max, doc},
#define CLAAS_END                                                                                  \
    {                                                                                              \
        0                                                                                          \
    }                                                                                              \
    }                                                                                              \
    ;
#include "claas/messages.def"
#undef CLAAS_MESSAGE
#undef CLAAS_FIELD
#undef CLAAS_END

static const struct claas_message_info catalogue[] = {
#define CLAAS_MESSAGE(name, id, receiver, role, max_body, doc)                                     \
    {id, #name, receiver, CLAAS_ROLE_##role, max_body, doc, fields_##name},
#define CLAAS_FIELD(part, name, type, need, min, max, doc)
#define CLAAS_END
#include "claas/messages.def"
#undef CLAAS_MESSAGE
#undef CLAAS_FIELD
#undef CLAAS_END
};

const struct claas_message_info *claas_message_info(int type)
{
    for (size_t i = 0; i < CLAAS_COUNT(catalogue); i++)
        if (catalogue[i].type == type)
            return &catalogue[i];
    return NULL;
}

const struct claas_message_info *claas_message_info_at(size_t index)
{
    return index < CLAAS_COUNT(catalogue) ? &catalogue[index] : NULL;
}

static int check_string(const struct claas_field *field, const cJSON *body)
{
    const char *text = NULL;
    int rc = claas_json_get_string(body, field->name, &text);

    if (rc <= 0)
        return rc;
    if ((double)strlen(text) < field->min || (double)strlen(text) > field->max)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' has %zu bytes, allowed are %.0f to %.0f",
                          field->name, strlen(text), field->min, field->max);
    return 1;
}

static int check_array(const struct claas_field *field, const cJSON *body)
{
    const cJSON *array = NULL;
    int rc = claas_json_get_array(body, field->name, &array);

    if (rc <= 0)
        return rc;
    int count = cJSON_GetArraySize(array);
    if (count < field->min || count > field->max)
        return claas_fail(CLAAS_ERR_INVALID, "'%s' has %d elements, allowed are %.0f to %.0f",
                          field->name, count, field->min, field->max);
    return 1;
}

/* 1 present and right, 0 absent, < 0 wrong. */
static int check_field(const struct claas_field *field, const cJSON *body)
{
    int64_t integer;
    double number;
    bool truth;
    const cJSON *child = NULL;

    switch (field->type) {
    case CLAAS_FIELD_STRING:
        return check_string(field, body);
    case CLAAS_FIELD_INT:
        return claas_json_get_int(body, field->name, (int64_t)field->min, (int64_t)field->max,
                                  &integer);
    case CLAAS_FIELD_NUMBER:
        return claas_json_get_number(body, field->name, field->min, field->max, &number);
    case CLAAS_FIELD_BOOL:
        return claas_json_get_bool(body, field->name, &truth);
    case CLAAS_FIELD_ARRAY:
        return check_array(field, body);
    case CLAAS_FIELD_OBJECT:
        return claas_json_get_object(body, field->name, &child);
    case CLAAS_FIELD_ANY:
    case CLAAS_FIELD_NONE:
        break;
    }
    return claas_json_get(body, field->name) ? 1 : 0;
}

int claas_message_check(int type, enum claas_field_part part, const cJSON *body)
{
    const struct claas_message_info *info = claas_message_info(type);

    if (!info)
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "unknown message type 0x%04X", (unsigned)type);
    if (!cJSON_IsObject(body))
        return claas_fail(CLAAS_ERR_INVALID, "the body of %s must be a JSON object", info->name);
    for (const struct claas_field *field = info->fields; field->type != CLAAS_FIELD_NONE; field++) {
        if (field->part != part)
            continue;
        int rc = check_field(field, body);
        if (rc < 0)
            return rc;
        if (rc == 0 && field->required)
            return claas_fail(CLAAS_ERR_INVALID, "'%s' is missing", field->name);
    }
    return 0;
}
