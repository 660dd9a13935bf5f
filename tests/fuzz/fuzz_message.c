/* libFuzzer entry for messages: the bytes are cut into frames (each preceded by its length, two
 * bytes), sent through a socket, received, and opened as an actor would. Whatever they are: an
 * error, or a message whose body keeps the catalogue. clang -fsanitize=fuzzer,address,undefined
 * with this file and the base and runtime libraries' sources. */
#include <stddef.h>
#include <stdint.h>

#include "frames.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static zmsg_t *cut(const uint8_t *data, size_t size)
{
    zmsg_t *message = zmsg_new();

    while (size >= 2 && zmsg_size(message) < 16) {
        size_t length = (size_t)data[0] << 8 | data[1];

        data += 2;
        size -= 2;
        if (length > size)
            length = size;
        zmsg_addmem(message, data, length);
        data += length;
        size -= length;
    }
    return message;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static zsock_t *out, *in;
    struct parcel parcel;
    struct envelope envelope;

    if (!in) {
        in = zsock_new(ZMQ_PAIR);
        out = zsock_new(ZMQ_PAIR);
        zsock_set_rcvtimeo(in, 0);
        if (zsock_bind(in, "inproc://fuzz") < 0 || zsock_connect(out, "inproc://fuzz") < 0)
            __builtin_trap();
    }
    zmsg_t *message = cut(data, size);
    if (zmsg_size(message) > 0 && zmsg_send(&message, out) < 0)
        __builtin_trap();
    zmsg_destroy(&message);
    if (parcel_receive(in, false, &parcel) > 0) {
        int rc = envelope_open(&envelope, &parcel, 65536);

        if (rc == 0 && envelope.message.kind == CLAAS_KIND_REQ &&
            claas_message_check(envelope.message.type, CLAAS_PART_REQUEST, envelope.message.body))
            __builtin_trap();
        envelope_close(&envelope);
    }
    parcel_done(&parcel);
    return 0;
}
