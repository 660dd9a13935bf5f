"""Writes protocol_vectors.json: the protocol's byte vectors, packed here with struct, independently of the C codec.

Run it only when the protocol changes on purpose: python3 tests/golden/make_protocol_vectors.py
"""
import json
import pathlib
import struct

LAYOUT = ">HBBHBBQII16s8sQHHI"  # 64 bytes, network order; docs/protocol.md section 3
KINDS = dict(HELLO=1, WELCOME=2, REQ=3, REP=4, ERR=5, EVT=6, CREDIT=7, PING=8, PONG=9, PROGRESS=10, CANCEL=11, BYE=12)
CHAT, FEEDBACK = 0x0101, 0x0201


def header(kind, type=0, codec=2, flags=0, correlation=0, budget_ms=0, link_seq=0, trace_id="00" * 16, span_id="00" * 8,
           epoch=0, attempt=0, credit=0, body_len=0):
    fields = dict(version=1, kind=KINDS[kind], type=type, codec=codec, flags=flags, correlation=str(correlation),
                  budget_ms=budget_ms, link_seq=link_seq, trace_id=trace_id, span_id=span_id, epoch=str(epoch),
                  attempt=attempt, credit=credit, body_len=body_len)
    packed = struct.pack(LAYOUT, 0xC1A5, 1, KINDS[kind], type, codec, flags, correlation, budget_ms, link_seq,
                         bytes.fromhex(trace_id), bytes.fromhex(span_id), epoch, attempt, credit, body_len)
    assert len(packed) == 64
    return dict(fields=fields, hex=packed.hex())


def message(name, address, body, attachments=(), **fields):
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    head = header(body_len=len(text), **fields)
    frames = [b"\0".join(part.encode() for part in address).hex(), head["hex"], text.hex()]
    return dict(name=name, address=list(address), header=head["fields"], body=text.decode(),
                attachments=[a.hex() for a in attachments], frames=frames + [a.hex() for a in attachments])


TRACE, SPAN = "000102030405060708090a0b0c0d0e0f", "f0f1f2f3f4f5f6f7"
headers = [
    header("PING", codec=0),
    header("REQ", type=CHAT, correlation=1, budget_ms=600000, epoch=7, attempt=1),
    header("REP", type=0xFFFF, codec=255, flags=255, correlation=2**64 - 1, budget_ms=2**32 - 1, link_seq=2**32 - 1,
           trace_id="ff" * 16, span_id="ff" * 8, epoch=2**64 - 1, attempt=0xFFFF, credit=0xFFFF, body_len=2**32 - 1),
    header("CREDIT", codec=0, link_seq=0x01020304, credit=0x0506, epoch=0x1112131415161718),
    header("PROGRESS", type=FEEDBACK, correlation=0x2122232425262728, trace_id=TRACE, span_id=SPAN, body_len=0x31323334),
]
request = dict(type=CHAT, correlation=1, budget_ms=600000, link_seq=1, trace_id=TRACE, span_id=SPAN, attempt=1)
answer = dict(type=CHAT, correlation=1, trace_id=TRACE)
messages = [
    message("CHAT request of a client", ["sampler"],
            {"messages": [{"role": "user", "content": "What is your name? – Ä 日本"}], "max_tokens": 16, "stream": True},
            kind="REQ", **request),
    message("CHAT progress to a client", ["sampler", "local"], {"id": "r-1", "choice": 0, "text": "My name"},
            kind="PROGRESS", link_seq=1, **answer),
    message("CHAT reply to a client", ["sampler", "local"],
            {"id": "r-1", "model": "base", "choices": [{"index": 0, "text": "My name is Kuro.", "finish_reason": "stop", "tokens": 6}],
             "prompt_tokens": 31, "completion_tokens": 6}, kind="REP", link_seq=2, **answer),
    message("CHAT error to a client", ["switch", "local"],
            {"error": "OVERLOADED", "code": -10, "text": "sampler has 1024 messages waiting", "retry_after_ms": 1000},
            kind="ERR", link_seq=2, **answer),
    message("FEEDBACK request of a client", ["scheduler"],
            {"requests": [{"lora_id": "me/kuro", "feedback": "Your name is Kuro.", "response_id": "r-1"}], "wait": True,
             "idempotency_key": "k1"}, kind="REQ", type=FEEDBACK, correlation=2, budget_ms=600000, link_seq=2, attempt=1),
    message("FEEDBACK progress to a client", ["scheduler", "local"],
            {"event": {"seq": 1, "time": 1790000000000, "kind": "state", "state": "queued"}},
            kind="PROGRESS", type=FEEDBACK, correlation=2, link_seq=3),
    message("FEEDBACK reply to a client", ["scheduler", "local"], {"job_id": "j-1", "job": {"state": "done", "version": 1}},
            kind="REP", type=FEEDBACK, correlation=2, link_seq=4),
    message("ROLLOUT_PUT request of an actor, with token ids and log-probs", ["storage", "local"],
            {"id": "r-1", "sampling": {}, "choices": [{"index": 0}]},
            [struct.pack("<3i", 1, 2, 49151), struct.pack("<2f", -0.5, -2.25)],
            kind="REQ", type=0x0401, correlation=3, budget_ms=30000, link_seq=9, epoch=0x6700000000000001, attempt=1, credit=2),
]
path = pathlib.Path(__file__).with_name("protocol_vectors.json")
path.write_text(json.dumps(dict(headers=headers, messages=messages), indent=1, ensure_ascii=False) + "\n")
