/* Checks of JSON bodies: see schema.h. */
#include "schema.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "claas/err.h"

static void add_place(cJSON *location, const struct schema_place *place)
{
    if (!place)
        return;
    add_place(location, place->outer);
    cJSON_AddItemToArray(location, place->name ? cJSON_CreateString(place->name)
                                               : cJSON_CreateNumber(place->index));
}

void schema_fault(cJSON *faults, const struct schema_place *place, const char *type,
                  const char *format, ...)
{
    cJSON *fault = cJSON_CreateObject();
    cJSON *location = cJSON_CreateArray();
    char text[256];
    va_list values;

    va_start(values, format);
    vsnprintf(text, sizeof(text), format, values);
    va_end(values);
    add_place(location, place);
    claas_json_set(fault, "loc", location);
    claas_json_set_string(fault, "msg", text);
    claas_json_set_string(fault, "type", type);
    cJSON_AddItemToArray(faults, fault);
}

static size_t characters(const char *text)
{
    size_t count = 0;

    for (; *text; text++)
        count += ((unsigned char)*text & 0xC0) != 0x80;
    return count;
}

static bool bounded(const struct schema_field *field)
{
    return field->min != 0 || field->max != 0;
}

static void check_number(cJSON *faults, const struct schema_place *place,
                         const struct schema_field *field, const cJSON *object, const cJSON *value)
{
    double number = cJSON_IsNumber(value) ? value->valuedouble : NAN;
    int64_t whole;

    if (field->type == SCHEMA_INT) {
        if (claas_json_get_int(object, field->name, INT64_MIN, INT64_MAX, &whole) != 1) {
            schema_fault(faults, place, "int_type", "Input should be a valid integer");
            return;
        }
        number = (double)whole;
    } else if (!isfinite(number)) {
        schema_fault(faults, place, "float_type", "Input should be a valid number");
        return;
    }
    if (!bounded(field))
        return;
    if (!(number >= field->min))
        schema_fault(faults, place, "greater_than_equal",
                     "Input should be greater than or equal to %s", claas_number(field->min).text);
    else if (!(number <= field->max))
        schema_fault(faults, place, "less_than_equal", "Input should be less than or equal to %s",
                     claas_number(field->max).text);
}

static void check_string(cJSON *faults, const struct schema_place *place,
                         const struct schema_field *field, const cJSON *value)
{
    size_t count;

    if (!cJSON_IsString(value)) {
        schema_fault(faults, place, "string_type", "Input should be a valid string");
        return;
    }
    count = characters(value->valuestring);
    if (bounded(field) && (double)count < field->min)
        schema_fault(faults, place, "string_too_short",
                     "String should have at least %.16g character%s", field->min,
                     field->min == 1 ? "" : "s");
    else if (bounded(field) && (double)count > field->max)
        schema_fault(faults, place, "string_too_long",
                     "String should have at most %.16g characters", field->max);
}

static void check_array(cJSON *faults, const struct schema_place *place,
                        const struct schema_field *field, const cJSON *value)
{
    int count;

    if (!cJSON_IsArray(value)) {
        schema_fault(faults, place, "list_type", "Input should be a valid list");
        return;
    }
    count = cJSON_GetArraySize(value);
    if (bounded(field) && count < field->min)
        schema_fault(faults, place, "too_short",
                     "List should have at least %.16g item%s after validation, not %d", field->min,
                     field->min == 1 ? "" : "s", count);
    else if (bounded(field) && count > field->max)
        schema_fault(faults, place, "too_long",
                     "List should have at most %.16g items after validation, not %d", field->max,
                     count);
}

static void check_value(cJSON *faults, const struct schema_place *place,
                        const struct schema_field *field, const cJSON *object, const cJSON *value)
{
    switch (field->type) {
    case SCHEMA_ANY:
        break;
    case SCHEMA_STRING:
        check_string(faults, place, field, value);
        break;
    case SCHEMA_INT:
    case SCHEMA_NUMBER:
        check_number(faults, place, field, object, value);
        break;
    case SCHEMA_BOOL:
        if (!cJSON_IsBool(value))
            schema_fault(faults, place, "bool_type", "Input should be a valid boolean");
        break;
    case SCHEMA_ARRAY:
        check_array(faults, place, field, value);
        break;
    case SCHEMA_OBJECT:
        if (!cJSON_IsObject(value))
            schema_fault(faults, place, "dict_type", "Input should be a valid dictionary");
        break;
    }
}

void schema_check(cJSON *faults, const struct schema_place *place, const cJSON *object,
                  const struct schema_field *fields, size_t count)
{
    if (!cJSON_IsObject(object)) {
        schema_fault(faults, place, "dict_type", "Input should be a valid dictionary");
        return;
    }
    for (size_t i = 0; i < count; i++) {
        const cJSON *value = claas_json_get(object, fields[i].name);
        struct schema_place inner = {place, fields[i].name, 0};

        if (value)
            check_value(faults, &inner, &fields[i], object, value);
        else if (fields[i].required)
            schema_fault(faults, &inner, "missing", "Field required");
    }
}
