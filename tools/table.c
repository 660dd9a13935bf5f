/* Tables: see table.h. */
#include "table.h"

#include <libsmartcols.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "claas/err.h"
#include "claas/mem.h"

void table_time(int64_t unix_ms, char *text, size_t size)
{
    time_t seconds = (time_t)(unix_ms / 1000);
    struct tm parts;

    text[0] = '\0';
    if (unix_ms > 0 && localtime_r(&seconds, &parts))
        strftime(text, size, "%F %T", &parts);
}

/* Text of a cell; control characters of foreign text must not reach a terminal, and libsmartcols
 * escapes them. */
static char *cell_text(const cJSON *value, enum table_kind kind, bool json)
{
    char time_text[32];

    if (!value || cJSON_IsNull(value))
        return claas_strdup("");
    if (kind == TABLE_TIME && !json && cJSON_IsNumber(value)) {
        table_time((int64_t)value->valuedouble, time_text, sizeof(time_text));
        return claas_strdup(time_text);
    }
    if (cJSON_IsString(value))
        return claas_strdup(value->valuestring);
    if (!json && cJSON_IsNumber(value) && value->valuedouble != (double)(int64_t)value->valuedouble)
        return claas_format("%.4g", value->valuedouble);
    return claas_json_print(value);
}

static int add_columns(struct libscols_table *table, const struct table_column *columns,
                       size_t count, bool json)
{
    for (size_t i = 0; i < count; i++) {
        int flags = columns[i].kind == TABLE_NUMBER ? SCOLS_FL_RIGHT
                    : columns[i].kind == TABLE_FREE ? SCOLS_FL_TRUNC
                                                    : 0;
        struct libscols_column *column =
            scols_table_new_column(table, json ? columns[i].key : columns[i].title, 0, flags);

        if (!column)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
        if (columns[i].kind == TABLE_NUMBER || columns[i].kind == TABLE_TIME)
            scols_column_set_json_type(column, SCOLS_JSON_NUMBER);
    }
    return 0;
}

static int add_row(struct libscols_table *table, const struct table_column *columns, size_t count,
                   const cJSON *row, bool json)
{
    struct libscols_line *line = scols_table_new_line(table, NULL);

    for (size_t i = 0; line && i < count; i++) {
        char *text = cell_text(claas_json_get(row, columns[i].key), columns[i].kind, json);

        if (!text || scols_line_refer_data(line, i, text) != 0)
            return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    }
    return line ? 0 : claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
}

int table_print(const char *name, const struct table_column *columns, size_t count,
                const cJSON *rows, bool json)
{
    struct libscols_table *table = scols_new_table();
    const cJSON *row;
    int rc;

    if (!table)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    scols_table_enable_json(table, json);
    scols_table_set_name(table, name);
    rc = add_columns(table, columns, count, json);
    cJSON_ArrayForEach(row, rows)
    {
        if (rc == 0)
            rc = add_row(table, columns, count, row, json);
    }
    if (rc == 0 && cJSON_GetArraySize(rows) > 0)
        scols_print_table(table);
    else if (rc == 0 && json) /* the library prints nothing for no rows */
        printf("{\"%s\": []}\n", name);
    else if (rc == 0)
        printf("no %s\n", name);
    scols_unref_table(table);
    return rc;
}
