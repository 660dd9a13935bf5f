"""The frames of docs/protocol.md by hand: a small ZeroMQ client for tests and benchmarks, good and bad."""
import itertools
import json
import struct

import zmq

HEADER = struct.Struct(">HBBHBBQII16s8sQHHI")
HELLO, WELCOME, REQ, REP, ERR, EVT, CREDIT, PING, PONG, PROGRESS, CANCEL, BYE = range(1, 13)
STATUS, CHAT, MODEL_INFO, FEEDBACK, JOB_WATCH, JOB_CANCEL, ADAPTER_INIT = 0x0001, 0x0101, 0x0102, 0x0201, 0x0202, 0x0203, 0x0301
JOB_EVENT, JOB_GET, ADAPTER_VERSIONS = 0x0205, 0x0407, 0x0412


def header(kind, type=0, correlation=0, body=b"", **fields):
    values = dict(signature=0xC1A5, version=1, codec=2, flags=0, budget_ms=60000, link_seq=0, trace=bytes(16), span=bytes(8),
                  epoch=0, attempt=1, credit=0, body_len=len(body))
    values.update(fields)
    return HEADER.pack(values["signature"], values["version"], kind, type, values["codec"], values["flags"], correlation, values["budget_ms"],
                       values["link_seq"], values["trace"], values["span"], values["epoch"], values["attempt"], values["credit"], values["body_len"])


class Answer:
    def __init__(self, frames):
        self.address = frames[0]
        fields = HEADER.unpack(frames[1])
        self.kind, self.type, self.correlation, self.epoch = fields[2], fields[3], fields[6], fields[11]
        self.body = json.loads(frames[2]) if len(frames) > 2 and frames[2] else {}

    @property
    def error(self):
        return self.body.get("error") if self.kind == ERR else None

    def __repr__(self):
        return f"<kind {self.kind} of {self.correlation} from {self.address!r}: {self.body}>"


class Client:
    """One DEALER. `ask` waits for the last answer; `send` and `receive` are for everything else."""

    def __init__(self, data, context=None, receive_hwm=100000):
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 100000)
        self.socket.setsockopt(zmq.RCVHWM, receive_hwm)
        self.socket.connect(f"ipc://{data}/claas.ipc")
        self.numbers = itertools.count(1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def frames(self, *frames):
        self.socket.send_multipart(list(frames))

    def send(self, to, type, body=None, kind=REQ, correlation=None, attachments=(), **fields):
        """Sends a request and returns its number."""
        number = next(self.numbers) if correlation is None else correlation
        text = json.dumps(body if body is not None else {}).encode() if not isinstance(body, bytes) else body
        self.frames(to if isinstance(to, bytes) else to.encode(), header(kind, type, number, text, **fields), text, *attachments)
        return number

    def receive(self, seconds=30):
        """The next answer, None if there is none in time."""
        return Answer(self.socket.recv_multipart()) if self.socket.poll(seconds * 1000) else None

    def answer_to(self, number, seconds=30, progress=None):
        """The last answer to a request; others are dropped."""
        while True:
            answer = self.receive(seconds)
            if answer is None or answer.correlation != number:
                if answer is None:
                    raise AssertionError(f"no answer to {number}")
                continue
            if answer.kind != PROGRESS:
                return answer
            if progress is not None:
                progress.append(answer.body)

    def ask(self, to, type, body=None, seconds=30, progress=None, **more):
        return self.answer_to(self.send(to, type, body, **more), seconds, progress)
