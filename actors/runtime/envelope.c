/* From frames to a claas_message: the body parsed within its limit and checked against the
 * catalogue, the attachments listed.
 *
 * Attachments are arrays of int32 or float32 that handlers read in place. libzmq's zero-copy
 * receive may hand out any address, so the few that are not 8-byte aligned are copied. */
#include "frames.h"

#include "claas/clock.h"
#include "claas/err.h"
#include "claas/mem.h"

#include <string.h>

static int list_attachments(struct envelope *envelope)
{
    size_t count = envelope->load ? zmsg_size(envelope->load) : 0;
    size_t copied = 0;

    if (count < 2)
        return 0;
    envelope->attachments = CLAAS_NEW_ARRAY(struct claas_attachment, count - 1);
    envelope->copies = CLAAS_NEW_ARRAY(void *, count);
    if (!envelope->attachments || !envelope->copies)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
    zmsg_first(envelope->load);
    for (size_t i = 0; i < count - 1; i++) {
        zframe_t *frame = zmsg_next(envelope->load);
        void *data = zframe_data(frame);

        if ((uintptr_t)data % 8 != 0) {
            void *copy = claas_alloc(1, zframe_size(frame) + 1);

            if (!copy)
                return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);
            memcpy(copy, data, zframe_size(frame));
            envelope->copies[copied++] = copy;
            data = copy;
        }
        envelope->attachments[i] = (struct claas_attachment){data, zframe_size(frame)};
    }
    envelope->message.attachments = envelope->attachments;
    envelope->message.attachment_count = count - 1;
    return 0;
}

/* Whether one of our actors wrote the body, which may then have millions of values (the log-probs
 * of a long answer, a cycle's input): answers come from the actor that was asked, and the switch
 * lets no client send a message of role ACTOR. */
static bool is_own(const struct claas_header *header)
{
    const struct claas_message_info *info = claas_message_info(header->type);

    if (header->kind == CLAAS_KIND_REQ || header->kind == CLAAS_KIND_EVT)
        return info && info->role == CLAAS_ROLE_ACTOR;
    return header->kind == CLAAS_KIND_REP || header->kind == CLAAS_KIND_PROGRESS;
}

static int parse_body(struct envelope *envelope, size_t limit)
{
    zframe_t *frame = envelope->load ? zmsg_first(envelope->load) : NULL;
    size_t length = frame ? zframe_size(frame) : 0;
    uint8_t codec = envelope->message.header.codec;
    cJSON *body = NULL;

    if (codec != CLAAS_CODEC_JSON && (codec != CLAAS_CODEC_NONE || length > 0))
        return claas_fail(CLAAS_ERR_UNSUPPORTED, "codec %u of a body of %zu bytes", codec, length);
    if (length == 0)
        return 0; /* the empty object that is there already */
    int rc = (is_own(&envelope->message.header) ? claas_json_parse_own : claas_json_parse)(
        (const char *)zframe_data(frame), length, limit, &body);
    if (rc < 0)
        return rc;
    claas_json_free(&envelope->message.body);
    envelope->message.body = body;
    return 0;
}

static int check_body(claas_message_t *message)
{
    switch (message->kind) {
    case CLAAS_KIND_REQ:
    case CLAAS_KIND_EVT:
        return claas_message_check(message->type, CLAAS_PART_REQUEST, message->body);
    case CLAAS_KIND_PROGRESS:
        return claas_message_check(message->type, CLAAS_PART_PROGRESS, message->body);
    case CLAAS_KIND_REP:
        return claas_message_check(message->type, CLAAS_PART_REPLY, message->body);
    default:
        return 0;
    }
}

/* An ERR's code and sentence come from its body; a peer that sends none still means an error. */
static void read_error(claas_message_t *message)
{
    int64_t code = CLAAS_ERR_INTERNAL;

    message->error_text = NULL;
    if (claas_json_get_int(message->body, "code", -10000, -1, &code) < 0)
        code = CLAAS_ERR_INTERNAL;
    message->error = (int)code;
    claas_json_get_string(message->body, "text", &message->error_text);
    if (!message->error_text)
        message->error_text = claas_err_text(message->error);
}

static void fill_reply_to(claas_message_t *message, int64_t arrival_ms)
{
    struct claas_reply_to *to = &message->reply_to;

    claas_copy_text(to->to, sizeof(to->to), message->from);
    claas_copy_text(to->principal, sizeof(to->principal), message->principal);
    to->correlation = message->header.correlation;
    to->epoch = message->header.epoch;
    to->type = message->header.type;
    to->deadline_ms = arrival_ms + message->header.budget_ms;
    memcpy(to->trace_id, message->header.trace_id, sizeof(to->trace_id));
}

int envelope_open(struct envelope *envelope, struct parcel *parcel, size_t limit)
{
    claas_message_t *message = &envelope->message;
    const char *arrival = parcel->address[2];

    memset(envelope, 0, sizeof(*envelope));
    message->kind = parcel->header.kind;
    message->type = parcel->header.type;
    message->header = parcel->header;
    claas_copy_text(message->from, sizeof(message->from), parcel->address[0]);
    claas_copy_text(message->principal, sizeof(message->principal), parcel->address[1]);
    fill_reply_to(message, arrival[0] ? strtoll(arrival, NULL, 10) : claas_clock_ms());
    envelope->load = CLAAS_TAKE(parcel->load);
    message->body = cJSON_CreateObject();
    if (!message->body)
        return claas_fail(CLAAS_ERR_NO_MEMORY, NULL);

    int rc = parse_body(envelope, limit);
    if (rc == 0)
        rc = check_body(message);
    if (rc == 0)
        rc = list_attachments(envelope);
    if (message->kind == CLAAS_KIND_ERR)
        read_error(message);
    return rc;
}

void envelope_error(struct envelope *envelope, int type, uint64_t correlation, const char *from,
                    int code, const char *text)
{
    claas_message_t *message = &envelope->message;

    memset(envelope, 0, sizeof(*envelope));
    message->kind = CLAAS_KIND_ERR;
    message->type = type;
    message->header.version = CLAAS_PROTOCOL_VERSION;
    message->header.kind = CLAAS_KIND_ERR;
    message->header.type = (uint16_t)type;
    message->header.correlation = correlation;
    claas_copy_text(message->from, sizeof(message->from), from);
    claas_copy_text(message->principal, sizeof(message->principal), "local");
    message->body = cJSON_CreateObject();
    claas_json_set_string(message->body, "error", claas_err_name(code));
    claas_json_set_int(message->body, "code", code);
    claas_json_set_string(message->body, "text", text);
    message->error = code;
    message->error_text = NULL;
    claas_json_get_string(message->body, "text", &message->error_text);
    if (!message->error_text)
        message->error_text = claas_err_text(code);
}

void envelope_close(struct envelope *envelope)
{
    for (size_t i = 0; envelope->copies && envelope->copies[i]; i++)
        free(envelope->copies[i]);
    free(envelope->copies);
    free(envelope->attachments);
    claas_json_free(&envelope->message.body);
    zmsg_destroy(&envelope->load);
    memset(envelope, 0, sizeof(*envelope));
}
