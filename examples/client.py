#!/usr/bin/env python3
"""Chat with CLaaS over ZeroMQ, then teach it something: python3 examples/client.py data/claas.ipc me/kuro"""
import itertools
import json
import struct
import sys
import zmq

if len(sys.argv) != 3:
    sys.exit(__doc__)
HEADER = struct.Struct(">HBBHBBQII16s8sQHHI")  # docs/protocol.md, section 3
REQ, REP, ERR, PROGRESS = 3, 4, 5, 10
CHAT, FEEDBACK, ADAPTER_INIT = 0x0101, 0x0201, 0x0301
socket = zmq.Context.instance().socket(zmq.DEALER)
socket.connect("ipc://" + sys.argv[1])
numbers = itertools.count(1)


def ask(to, type, body, progress=lambda event: None, seconds=600):
    number, body = next(numbers), json.dumps(body).encode()
    head = HEADER.pack(0xC1A5, 1, REQ, type, 2, 0, number, seconds * 1000, 0, bytes(16), bytes(8), 0, 1, 0, len(body))
    socket.send_multipart([to.encode(), head, body])
    while socket.poll(seconds * 1000):
        _, head, body, *_ = socket.recv_multipart()
        fields, body = HEADER.unpack(head), json.loads(body or b"{}")
        if fields[6] != number:  # a late answer to an earlier request
            continue
        if fields[2] == REP:
            return body
        if fields[2] == ERR:
            sys.exit(f"{body['error']}: {body['text']}")
        progress(body)
    sys.exit("no answer in time")


lora, words = sys.argv[2], "Your name is Kuro. When asked who you are, say that your name is Kuro."
question = dict(model=lora, messages=[dict(role="user", content="What is your name?")], max_tokens=40, stream=True)
show = lambda piece: print(piece["text"], end="", flush=True)
ask("trainer", ADAPTER_INIT, dict(lora_id=lora, overwrite=True))
answer = ask("sampler", CHAT, question, show)
item = dict(lora_id=lora, response_id=answer["id"], feedback=words)
tell = lambda p: print("\n ", *(f"{k} {v}" for k, v in p["event"].items() if k in ("state", "step", "loss")), end="")
done = ask("scheduler", FEEDBACK, dict(requests=[item], wait=True), tell)
print("\nversion", done["job"].get("version"), done["job"]["state"])
ask("sampler", CHAT, question, show)
print()
