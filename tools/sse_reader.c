/* Server-sent events: see sse_reader.h. */
#include "sse_reader.h"

#include <string.h>

#include "claas/mem.h"

#define LINE_MAX_BYTES (16 << 20)

void sse_reader_init(struct sse_reader *reader, sse_event_fn *event, void *arg)
{
    *reader = (struct sse_reader){.event = event, .arg = arg};
    claas_buf_init(&reader->line, LINE_MAX_BYTES);
    claas_buf_init(&reader->data, LINE_MAX_BYTES);
}

void sse_reader_done(struct sse_reader *reader)
{
    claas_buf_done(&reader->line);
    claas_buf_done(&reader->data);
}

/* An empty line ends an event; one without data is none. */
static int dispatch(struct sse_reader *reader)
{
    int rc = 0;

    if (reader->has_data)
        rc = reader->event(reader->arg, reader->name[0] ? reader->name : "message",
                           reader->id[0] ? reader->id : NULL,
                           reader->data.data ? reader->data.data : "");
    claas_buf_consume(&reader->data, reader->data.length);
    reader->has_data = false;
    reader->name[0] = '\0';
    return rc;
}

static int take_line(struct sse_reader *reader, char *line)
{
    char *value = strchr(line, ':');
    int rc = 0;

    if (line[0] == '\0')
        return dispatch(reader);
    if (value == line) /* a comment */
        return 0;
    if (value) {
        *value++ = '\0';
        value += *value == ' ';
    }
    if (strcmp(line, "data") == 0) {
        if (reader->has_data)
            rc = claas_buf_add_text(&reader->data, "\n");
        if (rc == 0)
            rc = claas_buf_add_text(&reader->data, value ? value : "");
        reader->has_data = true;
    } else if (strcmp(line, "event") == 0) {
        rc = claas_copy_text(reader->name, sizeof(reader->name), value ? value : "");
    } else if (strcmp(line, "id") == 0) {
        rc = claas_copy_text(reader->id, sizeof(reader->id), value ? value : "");
    }
    return rc < 0 ? rc : 0;
}

int sse_reader_feed(struct sse_reader *reader, const char *bytes, size_t length)
{
    static char empty[1];
    int rc = 0;

    for (size_t i = 0; rc == 0 && i < length; i++) {
        char c = bytes[i];
        bool second = c == '\n' && reader->after_cr; /* of CR LF */

        reader->after_cr = c == '\r';
        if (second)
            continue;
        if (c != '\n' && c != '\r') {
            rc = claas_buf_add(&reader->line, &c, 1);
            continue;
        }
        rc = take_line(reader, reader->line.data ? reader->line.data : empty);
        claas_buf_consume(&reader->line, reader->line.length);
    }
    return rc < 0 ? rc : 0;
}
