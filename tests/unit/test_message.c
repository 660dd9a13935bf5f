/* The wire format against committed byte vectors (tests/golden/protocol_vectors.json, packed by
 * Python), every truncation of a header, limits of frames, and the field checks of the catalogue.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "frames.h"

#include "claas/err.h"
#include "claas/file.h"
#include "claas/mem.h"

#include <sodium.h>
#include <stdlib.h>
#include <string.h>

static cJSON *vectors;

/* --- vectors -----------------------------------------------------------------------------------
 */

static uint64_t number(const cJSON *object, const char *key)
{
    const cJSON *item = claas_json_get(object, key);

    assert_non_null(item);
    return cJSON_IsString(item) ? strtoull(item->valuestring, NULL, 10)
                                : (uint64_t)item->valuedouble;
}

static size_t unhex(const char *hex, uint8_t *bytes, size_t size)
{
    size_t length = 0;

    assert_int_equal(sodium_hex2bin(bytes, size, hex, strlen(hex), NULL, &length, NULL), 0);
    return length;
}

static void read_fields(const cJSON *fields, struct claas_header *header)
{
    memset(header, 0, sizeof(*header));
    header->version = (uint8_t)number(fields, "version");
    header->kind = (uint8_t)number(fields, "kind");
    header->type = (uint16_t)number(fields, "type");
    header->codec = (uint8_t)number(fields, "codec");
    header->flags = (uint8_t)number(fields, "flags");
    header->correlation = number(fields, "correlation");
    header->budget_ms = (uint32_t)number(fields, "budget_ms");
    header->link_seq = (uint32_t)number(fields, "link_seq");
    header->epoch = number(fields, "epoch");
    header->attempt = (uint16_t)number(fields, "attempt");
    header->credit = (uint16_t)number(fields, "credit");
    header->body_len = (uint32_t)number(fields, "body_len");
    unhex(claas_json_get(fields, "trace_id")->valuestring, header->trace_id, 16);
    unhex(claas_json_get(fields, "span_id")->valuestring, header->span_id, 8);
}

static void headers_match_vectors(void **state)
{
    const cJSON *vector;
    int count = 0;

    cJSON_ArrayForEach(vector, claas_json_get(vectors, "headers"))
    {
        uint8_t expected[CLAAS_HEADER_BYTES], bytes[CLAAS_HEADER_BYTES];
        struct claas_header header, decoded;

        memset(&decoded, 0, sizeof(decoded));
        read_fields(claas_json_get(vector, "fields"), &header);
        assert_int_equal(unhex(claas_json_get(vector, "hex")->valuestring, expected, 64), 64);
        claas_header_encode(&header, bytes);
        assert_memory_equal(bytes, expected, 64);
        assert_int_equal(claas_header_decode(expected, 64, &decoded), 0);
        claas_header_encode(&decoded, bytes);
        assert_memory_equal(bytes, expected, 64);
        assert_true(decoded.epoch == header.epoch && decoded.correlation == header.correlation);
        count++;
    }
    assert_int_equal(count, 5);
}

struct pair {
    zsock_t *out, *in;
};

static struct pair new_pair(void)
{
    static int count; /* a name is free again only when the reaper has seen to the old one */
    struct pair pair = {zsock_new(ZMQ_PAIR), zsock_new(ZMQ_PAIR)};

    assert_int_equal(zsock_bind(pair.in, "inproc://test-message-%d", ++count), 0);
    assert_int_equal(zsock_connect(pair.out, "inproc://test-message-%d", count), 0);
    zsock_set_rcvtimeo(pair.in, 0);
    return pair;
}

static void free_pair(struct pair *pair)
{
    zsock_destroy(&pair->out);
    zsock_destroy(&pair->in);
}

static void send_vector(const struct pair *pair, const cJSON *vector)
{
    const cJSON *frame, *frames = claas_json_get(vector, "frames");
    zmsg_t *message = zmsg_new();

    cJSON_ArrayForEach(frame, frames)
    {
        uint8_t bytes[1024];

        zmsg_addmem(message, bytes, unhex(frame->valuestring, bytes, sizeof(bytes)));
    }
    assert_int_equal(zmsg_send(&message, pair->out), 0);
}

static void received_equals(const struct pair *pair, const cJSON *vector)
{
    const cJSON *frame, *frames = claas_json_get(vector, "frames");
    zmsg_t *message = zmsg_recv(pair->in);

    assert_non_null(message);
    assert_int_equal(zmsg_size(message), cJSON_GetArraySize(frames));
    cJSON_ArrayForEach(frame, frames)
    {
        uint8_t bytes[1024];
        size_t length = unhex(frame->valuestring, bytes, sizeof(bytes));
        zframe_t *got = zmsg_pop(message);

        assert_int_equal(zframe_size(got), length);
        assert_memory_equal(zframe_data(got), bytes, length);
        zframe_destroy(&got);
    }
    zmsg_destroy(&message);
}

/* Packs what the vector describes. */
static void pack_vector(const cJSON *vector, struct parcel *parcel)
{
    struct claas_attachment attachments[8];
    uint8_t data[8][64];
    size_t count = 0;
    const cJSON *item;
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;
    const char *text = claas_json_get(vector, "body")->valuestring;

    memset(parcel, 0, sizeof(*parcel));
    cJSON_ArrayForEach(item, claas_json_get(vector, "attachments"))
    {
        attachments[count].data = data[count];
        attachments[count].length = unhex(item->valuestring, data[count], sizeof(data[0]));
        count++;
    }
    assert_int_equal(claas_json_parse(text, strlen(text), 65536, &body), 0);
    read_fields(claas_json_get(vector, "header"), &parcel->header);
    count = (size_t)cJSON_GetArraySize(claas_json_get(vector, "attachments"));
    assert_int_equal(parcel_pack(parcel, body, attachments, count), 0);
    const cJSON *address = claas_json_get(vector, "address");
    const cJSON *second = cJSON_GetArrayItem(address, 1);
    parcel_address(parcel, cJSON_GetArrayItem(address, 0)->valuestring,
                   second ? second->valuestring : NULL, NULL);
}

static void messages_match_vectors(void **state)
{
    struct pair pair = new_pair();
    const cJSON *vector;
    int count = 0;

    cJSON_ArrayForEach(vector, claas_json_get(vectors, "messages"))
    {
        struct parcel parcel;
        struct envelope envelope;

        pack_vector(vector, &parcel);
        assert_int_equal(parcel_send(pair.out, NULL, &parcel), 0);
        received_equals(&pair, vector);

        send_vector(&pair, vector);
        assert_int_equal(parcel_receive(pair.in, false, &parcel), 1);
        assert_string_equal(parcel.address[0],
                            cJSON_GetArrayItem(claas_json_get(vector, "address"), 0)->valuestring);
        assert_int_equal(envelope_open(&envelope, &parcel, 65536), 0);
        CLAAS_AUTO_FREE char *body = claas_json_print(envelope.message.body);
        assert_string_equal(body, claas_json_get(vector, "body")->valuestring);
        assert_int_equal(envelope.message.attachment_count,
                         cJSON_GetArraySize(claas_json_get(vector, "attachments")));
        envelope_close(&envelope);
        parcel_done(&parcel);
        count++;
    }
    assert_int_equal(count, 8);
    free_pair(&pair);
}

/* --- hostile frames ----------------------------------------------------------------------------
 */

static void headers_refuse(void **state)
{
    struct claas_header header = {.version = 1, .kind = CLAAS_KIND_REQ}, decoded;
    uint8_t bytes[CLAAS_HEADER_BYTES + 1] = {0};

    claas_header_encode(&header, bytes);
    for (size_t length = 0; length <= sizeof(bytes); length++) {
        uint8_t *exact =
            length ? claas_alloc(1, length) : NULL; /* so that a sanitizer sees an overrun */

        if (exact)
            memcpy(exact, bytes, length);
        assert_int_equal(claas_header_decode(exact, length, &decoded),
                         length == CLAAS_HEADER_BYTES ? 0 : CLAAS_ERR_FORMAT);
        free(exact);
    }
    bytes[2] = 2;
    assert_int_equal(claas_header_decode(bytes, 64, &decoded), CLAAS_ERR_VERSION);
    bytes[2] = 1;
    bytes[0] ^= 1;
    assert_int_equal(claas_header_decode(bytes, 64, &decoded), CLAAS_ERR_FORMAT);
}

/* Every prefix of every vector's frames, the last one cut at every byte: an answer, never a crash.
 * Frames cut behind the body still make a message (its attachments are shorter). */
static void truncated_messages(void **state)
{
    struct pair pair = new_pair();
    const cJSON *vector;

    cJSON_ArrayForEach(vector, claas_json_get(vectors, "messages"))
    {
        const cJSON *frames = claas_json_get(vector, "frames");

        for (int count = 1; count <= cJSON_GetArraySize(frames); count++) {
            uint8_t bytes[1024];
            size_t whole = unhex(cJSON_GetArrayItem(frames, count - 1)->valuestring, bytes, 1024);

            for (size_t cut = 0; cut < whole; cut++) {
                zmsg_t *message = zmsg_new();
                struct parcel parcel;

                for (int i = 0; i < count - 1; i++) {
                    uint8_t other[1024];

                    zmsg_addmem(message, other,
                                unhex(cJSON_GetArrayItem(frames, i)->valuestring, other, 1024));
                }
                zmsg_addmem(message, bytes, cut);
                assert_int_equal(zmsg_send(&message, pair.out), 0);
                int rc = parcel_receive(pair.in, false, &parcel);
                assert_int_equal(rc, count <= 3 ? CLAAS_ERR_FORMAT : 1);
                parcel_done(&parcel);
            }
        }
    }
    assert_null(zmsg_recv(pair.in));
    free_pair(&pair);
}

static void addresses(void **state)
{
    static const struct {
        const char *bytes;
        size_t length;
        int rc;
    } cases[] = {
        {"", 0, 1},
        {"a\0b\0c", 5, 1},
        {"a\0b\0c\0", 6, CLAAS_ERR_FORMAT},
        {"a\0b\0c\0d", 7, CLAAS_ERR_FORMAT},
        {"0123456789012345678901234567890123456789012345678901234567890123", 64, CLAAS_ERR_FORMAT},
        {"012345678901234567890123456789012345678901234567890123456789012", 63, 1}};
    struct pair pair = new_pair();
    struct claas_header header = {.version = 1, .kind = CLAAS_KIND_PING};
    uint8_t bytes[CLAAS_HEADER_BYTES];

    claas_header_encode(&header, bytes);
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        zmsg_t *message = zmsg_new();
        struct parcel parcel;

        zmsg_addmem(message, cases[i].bytes, cases[i].length);
        zmsg_addmem(message, bytes, sizeof(bytes));
        zmsg_addmem(message, "", 0);
        zmsg_send(&message, pair.out);
        assert_int_equal(parcel_receive(pair.in, false, &parcel), cases[i].rc);
        parcel_done(&parcel);
    }
    free_pair(&pair);
}

static void bodies(void **state)
{
    static const struct {
        int codec;
        const char *body;
        int rc;
    } cases[] = {{CLAAS_CODEC_NONE, "", 0},
                 {CLAAS_CODEC_JSON, "", 0},
                 {CLAAS_CODEC_NONE, "{}", CLAAS_ERR_UNSUPPORTED},
                 {1, "", CLAAS_ERR_UNSUPPORTED},
                 {CLAAS_CODEC_JSON, "{\"prefix\":\"x\",\"unknown\":1}", 0},
                 {CLAAS_CODEC_JSON, "{\"prefix\":null}", 0},
                 {CLAAS_CODEC_JSON, "{\"prefix\":1}", CLAAS_ERR_INVALID},
                 {CLAAS_CODEC_JSON, "[]", CLAAS_ERR_INVALID},
                 {CLAAS_CODEC_JSON, "null", CLAAS_ERR_INVALID},
                 {CLAAS_CODEC_JSON, "{\"prefix\":\"\xff\"}", CLAAS_ERR_FORMAT},
                 {CLAAS_CODEC_JSON, "{} {}", CLAAS_ERR_FORMAT}};

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        struct parcel parcel;
        struct envelope envelope;

        parcel_init(&parcel, CLAAS_KIND_REQ, CLAAS_MSG_ADAPTER_LIST, 1);
        parcel.header.codec = (uint8_t)cases[i].codec;
        parcel.load = zmsg_new();
        zmsg_addmem(parcel.load, cases[i].body, strlen(cases[i].body));
        assert_int_equal(envelope_open(&envelope, &parcel, 4096), cases[i].rc);
        assert_non_null(envelope.message.body);
        envelope_close(&envelope);
    }
}

/* Of more values than a client may send: what is for actors only holds as many as its length. */
static void requests_of_many_values(void **state)
{
    static const struct {
        int type, rc;
        const char *head, *tail;
    } cases[] = {
        {CLAAS_MSG_ADAPTER_LIST, CLAAS_ERR_FORMAT, "{\"x\":[0", "]}"},
        {CLAAS_MSG_CYCLE_INPUT, 0, "{\"lora_id\":\"a\",\"job_ids\":[\"j\"],\"x\":[0", "]}"},
    };

    (void)state;
    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        size_t head = strlen(cases[i].head), length = head + 2 * (size_t)CLAAS_JSON_VALUES_MAX;
        CLAAS_AUTO_FREE char *text = claas_alloc(length + 3, 1);
        struct parcel parcel;
        struct envelope envelope;

        assert_non_null(text);
        memcpy(text, cases[i].head, head);
        for (size_t at = head; at < length; at += 2)
            memcpy(text + at, ",0", 2);
        strcpy(text + length, cases[i].tail);
        parcel_init(&parcel, CLAAS_KIND_REQ, cases[i].type, 1);
        parcel.header.codec = CLAAS_CODEC_JSON;
        parcel.load = zmsg_new();
        zmsg_addmem(parcel.load, text, length + 2);
        assert_int_equal(envelope_open(&envelope, &parcel, CLAAS_MESSAGE_BYTES), cases[i].rc);
        envelope_close(&envelope);
    }
}

static void errors(void **state)
{
    static const struct {
        const char *body;
        int code;
        const char *text;
    } cases[] = {{"{\"code\":-4,\"text\":\"no\"}", CLAAS_ERR_NOT_FOUND, "no"},
                 {"{}", CLAAS_ERR_INTERNAL, "internal error"},
                 {"{\"code\":5,\"text\":7}", CLAAS_ERR_INTERNAL, "internal error"},
                 {"nonsense", CLAAS_ERR_INTERNAL, "internal error"}};

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        struct parcel parcel;
        struct envelope envelope;

        parcel_init(&parcel, CLAAS_KIND_ERR, CLAAS_MSG_CHAT, 1);
        parcel.header.codec = CLAAS_CODEC_JSON;
        parcel.load = zmsg_new();
        zmsg_addmem(parcel.load, cases[i].body, strlen(cases[i].body));
        envelope_open(&envelope, &parcel, 4096);
        assert_int_equal(envelope.message.error, cases[i].code);
        assert_string_equal(envelope.message.error_text, cases[i].text);
        envelope_close(&envelope);
    }
}

static void alignment(void **state)
{
    struct pair pair = new_pair();
    struct claas_header header = {
        .version = 1, .kind = CLAAS_KIND_REP, .type = CLAAS_MSG_CYCLE_KEEP};
    uint8_t bytes[CLAAS_HEADER_BYTES];

    claas_header_encode(&header, bytes);
    for (size_t size = 0; size < 200; size += 7) {
        zmsg_t *message = zmsg_new();
        struct parcel parcel;
        struct envelope envelope;
        char data[200];

        memset(data, 'x', sizeof(data));
        zmsg_addmem(message, "storage", 7);
        zmsg_addmem(message, bytes, sizeof(bytes));
        zmsg_addmem(message, "", 0);
        zmsg_addmem(message, data, size);
        zmsg_addmem(message, data, size);
        zmsg_send(&message, pair.out);
        assert_int_equal(parcel_receive(pair.in, false, &parcel), 1);
        assert_int_equal(envelope_open(&envelope, &parcel, 4096), 0);
        assert_int_equal(envelope.message.attachment_count, 2);
        for (int i = 0; i < 2; i++) {
            assert_int_equal((uintptr_t)envelope.message.attachments[i].data % 8, 0);
            assert_int_equal(envelope.message.attachments[i].length, size);
            assert_memory_equal(envelope.message.attachments[i].data, data, size);
        }
        envelope_close(&envelope);
        parcel_done(&parcel);
    }
    free_pair(&pair);
}

/* --- the catalogue -----------------------------------------------------------------------------
 */

static void catalogue_is_sound(void **state)
{
    const struct claas_message_info *info, *other;

    for (size_t i = 0; (info = claas_message_info_at(i)) != NULL; i++) {
        assert_ptr_equal(claas_message_info(info->type), info);
        assert_in_range(info->type, 1, 0xFFFF);
        assert_true(info->max_body > 0 && info->max_body <= CLAAS_MESSAGE_BYTES);
        for (size_t j = 0; j < i; j++) {
            other = claas_message_info_at(j);
            assert_int_not_equal(other->type, info->type);
            assert_string_not_equal(other->name, info->name);
        }
        for (const struct claas_field *field = info->fields; field->type != CLAAS_FIELD_NONE;
             field++)
            assert_true(field->min <= field->max);
    }
    assert_null(claas_message_info(0));
    assert_null(claas_message_info(0x7777));
}

static int check(int type, enum claas_field_part part, const char *text)
{
    CLAAS_AUTO(claas_json_free) cJSON *body = NULL;

    assert_int_equal(claas_json_parse(text, strlen(text), 1 << 20, &body), 0);
    return claas_message_check(type, part, body);
}

static void fields_are_checked(void **state)
{
    static const struct {
        int type;
        enum claas_field_part part;
        const char *body, *error; /* NULL = right */
    } cases[] = {
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{}", NULL},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"max_tokens\":1}", NULL},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"max_tokens\":1.5}",
         "'max_tokens' must be an integer"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"max_tokens\":0}",
         "'max_tokens' is 0, it must be from 1 to 1000000"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"temperature\":2.5}",
         "'temperature' is 2.5, it must be from 0 to 2"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"temperature\":\"1\"}",
         "'temperature' must be a number"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"messages\":[]}",
         "'messages' has 0 elements, allowed are 1 to 4096"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"messages\":{}}", "'messages' must be an array"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"stream\":1}", "'stream' must be true or false"},
        {CLAAS_MSG_CHAT, CLAAS_PART_REQUEST, "{\"stream\":null}", NULL},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_REQUEST, "{}", "'requests' is missing"},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_REQUEST, "{\"requests\":[1],\"training\":[]}",
         "'training' must be an object"},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_REQUEST, "{\"requests\":[1],\"idempotency_key\":\"\"}",
         "'idempotency_key' has 0 bytes, allowed are 1 to 256"},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_REPLY, "{\"job_id\":\"j\"}", NULL},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_REPLY, "{\"requests\":[1]}", "'job_id' is missing"},
        {CLAAS_MSG_FEEDBACK, CLAAS_PART_PROGRESS, "{\"event\":{}}", NULL},
        {CLAAS_MSG_CYCLE_KEEP, CLAAS_PART_REPLY, "{}", NULL},
        {0x7777, CLAAS_PART_REQUEST, "{}", "unknown message type 0x7777"},
    };

    for (size_t i = 0; i < CLAAS_COUNT(cases); i++) {
        int rc = check(cases[i].type, cases[i].part, cases[i].body);

        if (!cases[i].error)
            assert_int_equal(rc, 0);
        else if (rc == 0 || strcmp(claas_error_text(), cases[i].error) != 0)
            fail_msg("%s: %s", cases[i].body, rc == 0 ? "passed" : claas_error_text());
    }
}

static void names(void **state)
{
    assert_true(name_valid("trainer.0"));
    assert_true(name_valid("A_b-9"));
    assert_false(name_valid(""));
    assert_false(name_valid("a b"));
    assert_false(name_valid("a/b"));
    assert_false(name_valid("\xc3\xa4"));
    assert_false(name_valid("0123456789012345678901234567890123456789012345678901234567890123"));
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(headers_match_vectors),
        cmocka_unit_test(messages_match_vectors),
        cmocka_unit_test(headers_refuse),
        cmocka_unit_test(truncated_messages),
        cmocka_unit_test(addresses),
        cmocka_unit_test(bodies),
        cmocka_unit_test(requests_of_many_values),
        cmocka_unit_test(errors),
        cmocka_unit_test(alignment),
        cmocka_unit_test(catalogue_is_sound),
        cmocka_unit_test(fields_are_checked),
        cmocka_unit_test(names),
    };
    CLAAS_AUTO_FREE char *path =
        claas_format("%s/protocol_vectors.json", argc > 1 ? argv[1] : "tests/golden");
    CLAAS_AUTO_FREE char *text = NULL;
    size_t length = 0;

    if (claas_file_read(path, 1 << 20, &text, &length) < 0 ||
        claas_json_parse(text, length, 1 << 20, &vectors) < 0) {
        fprintf(stderr, "%s\n", claas_error_text());
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    claas_json_free(&vectors);
    return failed;
}
