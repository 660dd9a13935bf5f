/* Messages: the frames of docs/protocol.md, their catalogue, and the codec.
 *
 * On a link between an actor (or client) and a switch a message is
 *     [address][header 64 B][body][attachment]…
 * `address` is text: to the switch the receiver's name; from it the sender's name, NUL, the
 * principal. The header, in network order:
 *     u16 signature | u8 version | u8 kind | u16 type | u8 codec | u8 flags | u64 correlation
 *     u32 budget_ms | u32 link_seq | 16 B trace id | 8 B span id | u64 epoch
 *     u16 attempt | u16 credit | u32 body_len */
#ifndef CLAAS_MESSAGE_H
#define CLAAS_MESSAGE_H

#include "claas/json.h"

#include <stdio.h>

#define CLAAS_HEADER_BYTES     64
#define CLAAS_SIGNATURE        0xC1A5u
#define CLAAS_PROTOCOL_VERSION 1
#define CLAAS_NAME_MAX         64
#define CLAAS_ATTACHMENT_MAX   4096       /* attachments of one message */
#define CLAAS_MESSAGE_BYTES    (64 << 20) /* all frames of one message */

enum claas_message_kind {
    CLAAS_KIND_HELLO = 1, /* docs/protocol.md, section 5, says what each is for */
    CLAAS_KIND_WELCOME,
    CLAAS_KIND_REQ,
    CLAAS_KIND_REP,
    CLAAS_KIND_ERR,
    CLAAS_KIND_EVT,
    CLAAS_KIND_CREDIT,
    CLAAS_KIND_PING,
    CLAAS_KIND_PONG,
    CLAAS_KIND_PROGRESS,
    CLAAS_KIND_CANCEL,
    CLAAS_KIND_BYE,
};

enum claas_codec { CLAAS_CODEC_NONE = 0, CLAAS_CODEC_JSON = 2 };

struct claas_header {
    uint8_t version, kind, codec, flags;
    uint16_t type, attempt, credit;
    uint32_t budget_ms; /* remaining time, not wall clock; 0 is illegal on REQ */
    uint32_t link_seq, body_len;
    uint64_t correlation, epoch;
    uint8_t trace_id[16], span_id[8];
};
void claas_header_encode(const struct claas_header *header, uint8_t bytes[CLAAS_HEADER_BYTES]);
/* FORMAT for a wrong signature or length, VERSION for an unknown version. */
int claas_header_decode(const uint8_t *bytes, size_t length, struct claas_header *ret);

/* Raw little-endian data beside the body, which says what type and shape it has. */
struct claas_attachment {
    const void *data; /* received ones are 8-byte aligned */
    size_t length;
};

/* Where an answer goes: a value, copied freely. */
struct claas_reply_to {
    char to[CLAAS_NAME_MAX];
    char principal[CLAAS_NAME_MAX];
    uint64_t correlation;
    uint64_t epoch; /* the asker's incarnation */
    uint16_t type;
    int64_t deadline_ms; /* claas_clock_ms() */
    uint8_t trace_id[16];
};

typedef struct claas_message {
    enum claas_message_kind kind;
    int type; /* enum claas_message_type */
    struct claas_header header;
    char from[CLAAS_NAME_MAX];
    char principal[CLAAS_NAME_MAX];
    struct claas_reply_to reply_to;
    cJSON *body; /* checked against the catalogue; never NULL, freed with the message */
    const struct claas_attachment *attachments;
    size_t attachment_count;
    int error;              /* ERR: the code; else 0 */
    const char *error_text; /* ERR: the sentence */
} claas_message_t;

/* --- the catalogue (messages.def) ------------------------------------------------------------- */
enum claas_message_type {
    CLAAS_MSG_NONE = 0,
#define CLAAS_MESSAGE(name, id, receiver, role, max_body, doc) CLAAS_MSG_##name = id,
#define CLAAS_FIELD(part, name, type, need, min, max, doc)
#define CLAAS_END
#include "claas/messages.def"
#undef CLAAS_MESSAGE
#undef CLAAS_FIELD
#undef CLAAS_END
};

enum claas_role { CLAAS_ROLE_CLIENT, CLAAS_ROLE_ACTOR }; /* smallest role allowed to send it */
enum claas_field_part { CLAAS_PART_REQUEST, CLAAS_PART_PROGRESS, CLAAS_PART_REPLY };
enum claas_field_type {
    CLAAS_FIELD_NONE,
    CLAAS_FIELD_STRING, /* min/max: bytes */
    CLAAS_FIELD_INT,
    CLAAS_FIELD_NUMBER,
    CLAAS_FIELD_BOOL,
    CLAAS_FIELD_ARRAY, /* min/max: elements */
    CLAAS_FIELD_OBJECT,
    CLAAS_FIELD_ANY,
};

struct claas_field {
    enum claas_field_part part;
    const char *name;
    enum claas_field_type type;
    bool required;
    double min, max;
    const char *doc;
};
struct claas_message_info {
    int type;
    const char *name, *receiver; /* "storage", …; "*" for any */
    enum claas_role role;
    size_t max_body;
    const char *doc;
    const struct claas_field *fields; /* ends with type NONE */
};
/* NULL for an unknown type. */
const struct claas_message_info *claas_message_info(int type);
/* Iterates the catalogue; NULL past the end. */
const struct claas_message_info *claas_message_info_at(size_t index);
/* Checks one part of a body: every required field there, types and ranges right. Unknown fields are
 * allowed. */
int claas_message_check(int type, enum claas_field_part part, const cJSON *body);
/* The catalogue as the generated section of docs/protocol.md. */
void claas_catalogue_print_markdown(FILE *file);

#endif
