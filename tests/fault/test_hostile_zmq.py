"""ZeroMQ peers that send garbage or claim to be somebody: errors where there is somebody to tell, and the server lives."""
import json
import os
import random
import socket
import struct

import pytest

zmq = pytest.importorskip("zmq")

import wire
from server import FAST, PATIENCE, Server, serving
from wire import CHAT, ERR, FEEDBACK, HEADER, HELLO, JOB_GET, PING, PONG, REP, REQ, STATUS, Client, header

ASK = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        running.init("a/one")
        running.answer = running.chat("a/one")["id"]
        running.foreign = 0  # requests of nodes: these count what they send themselves
        yield running


@pytest.fixture
def client(server):
    with Client(server.data) as one:
        yield one


@pytest.fixture(autouse=True)
def lives(server):
    yield
    assert server.is_healthy()
    with Client(server.data) as other:
        assert other.ask("sampler", CHAT, ASK).kind == REP


def metric(server, name):
    text = server.request("GET", "/metrics").body.decode()
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + " "))


# --- requests that are wrong ---

@pytest.mark.parametrize("fields, error", [
    (dict(version=2), "VERSION"),
    (dict(codec=7), "UNSUPPORTED"),
    (dict(budget_ms=0), "FORMAT"),
    (dict(correlation=0), "FORMAT"),
    (dict(type=0x7777), "UNSUPPORTED"),
    (dict(type=0), "UNSUPPORTED"),
    (dict(to="nobody"), "UNAVAILABLE"),
    (dict(to="bridge"), "UNSUPPORTED"),
    (dict(to="storage"), "UNSUPPORTED"),  # CHAT is not a message of storage's
    (dict(to=""), "UNAVAILABLE"),
    (dict(to="x" * 200), "FORMAT"),
    (dict(to=b"\xff\xfe"), "UNAVAILABLE"),
    (dict(body=b""), "INVALID"),
    (dict(body=b"{"), "FORMAT"),
    (dict(body=b"[]"), "INVALID"),
    (dict(body=b"\xff"), "FORMAT"),
    (dict(body=b"{}" * 2), "FORMAT"),
    (dict(body=b'{"messages": "x"}'), "INVALID"),
    (dict(body=b'{"messages": [{"role": "user"}]}'), "INVALID"),
    (dict(body=b'{"messages": [], "temperature": 9}'), "INVALID"),
    (dict(body=b'{"a":' * 100 + b"1" + b"}" * 100), "FORMAT"),
])
def test_wrong_requests(client, fields, error):
    more = {"to": "sampler", "type": CHAT, "body": ASK, **fields}
    number = client.send(more.pop("to"), more.pop("type"), more.pop("body"), **more)
    answer = client.receive()
    assert answer.kind == ERR and answer.error == error, answer
    assert answer.correlation in (number, 0)
    assert answer.body["text"] and answer.body["code"] < 0


def test_wrong_lengths(client):
    body = json.dumps(ASK).encode()
    for length in (0, len(body) - 1, len(body) + 1, 2**32 - 1):
        client.frames(b"sampler", header(REQ, CHAT, 1, body, body_len=length), body)
        assert client.receive().error == "FORMAT"
    client.send("sampler", CHAT, b" " * (17 << 20))
    assert client.receive().error == "TOO_LARGE"
    client.send("storage", JOB_GET, {"job_id": "x", "more": "y" * 5000})
    assert client.receive().error == "TOO_LARGE"


@pytest.mark.parametrize("kind", range(256))
def test_every_kind(client, kind):
    """As a client's message: answered, or ignored; what acts (HELLO, BYE) harms only the sender."""
    client.send("sampler", CHAT, ASK, kind=kind, correlation=77)
    client.send("", 0, b"", kind=PING, correlation=78, codec=0)
    for _ in range(4):
        answer = client.receive(10)
        if answer.kind == PONG:
            return
        assert answer.kind in (ERR, REP, wire.WELCOME)


def test_same_correlation_twice(client):
    long = {**ASK, "max_tokens": 1500}
    client.send("sampler", CHAT, long, correlation=5)
    client.send("sampler", CHAT, long, correlation=5)
    assert client.receive().error == "CONFLICT"
    client.send("", 0, kind=wire.CANCEL, correlation=5)


def test_truncated_frames(client, server):
    """Every prefix of a good message, frame by frame and byte by byte."""
    body = json.dumps(ASK).encode()
    frames = [b"sampler", header(REQ, CHAT, 9, body), body]
    for count in range(3):
        client.frames(*frames[:count], b"") if count else client.frames(b"")
    for length in range(64):
        client.frames(frames[0], frames[1][:length], frames[2])
    for length in range(len(body)):
        client.frames(frames[0], frames[1], frames[2][:length])
    refused = 0
    client.send("", 0, b"", kind=PING, correlation=1234, codec=0)
    while (answer := client.receive(10)).kind != PONG:
        assert answer.error == "FORMAT", answer
        refused += 1
    assert refused >= len(body)


def test_random_frames(server):
    chance = random.Random(1)
    before = metric(server, "claas_messages_refused_total")
    for _ in range(20):
        with Client(server.data) as one:
            for _ in range(100):
                count = chance.randrange(1, 7)
                frames = [chance.randbytes(chance.choice((0, 1, 8, 63, 64, 65, 300))) for _ in range(count)]
                if chance.random() < 0.5 and count > 1:
                    frames[1] = header(chance.randrange(16), chance.choice((STATUS, CHAT, FEEDBACK, 0x0402, 0x0406, 0x9999)), chance.randrange(4),
                                       frames[2] if count > 2 else b"")
                if chance.random() < 0.5:
                    frames[0] = chance.choice((b"sampler", b"storage", b"scheduler", b"switch", b"trainer.0", b"*", b"storage\0storage\0local"))
                one.frames(*frames)
            one.send("", 0, b"", kind=PING, correlation=1, codec=0)
            one.socket.poll(10000)
    assert metric(server, "claas_messages_refused_total") > before


def test_flipped_headers(client):
    """Every bit of a good header, one at a time."""
    body = json.dumps({}).encode()
    good = header(REQ, STATUS, 3, body)
    for bit in range(512):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        client.frames(b"sampler", bytes(flipped), body)
    client.send("", 0, b"", kind=PING, correlation=99, codec=0)
    while client.receive(10).kind != PONG:
        pass


def test_many_and_large_frames(server):
    body = json.dumps(ASK).encode()
    for frames in ([b""] * 5000, [b"x" * (70 << 20)]):
        with Client(server.data) as one:
            one.frames(b"sampler", header(REQ, CHAT, 3, body), body, *frames)
            if one.socket.poll(2000):  # beyond the largest frame the transport itself may hang up
                assert one.receive().error in ("LIMIT", "TOO_LARGE", "FORMAT")


# --- peers that are not who they say ---

def test_claimed_names(client, server):
    before = metric(server, "claas_peers_refused_total")
    body = json.dumps({"requests": [{"lora_id": "a/one", "feedback": "x", "response_id": server.answer}]}).encode()
    for address in (b"storage\0scheduler", b"storage\0scheduler\0local", b"storage\0client.1\0local", b"storage\0scheduler\0other", b"a\0b\0c\0d"):
        client.frames(address, header(REQ, 0x0402, 1, body), body)
        assert client.receive().error in ("DENIED", "FORMAT")
    assert metric(server, "claas_peers_refused_total") >= before + 4
    assert not server.call("GET", "/v1/jobs?lora_id=a/one")["jobs"]


@pytest.mark.parametrize("hello", [
    {"node": "evil", "actors": [{"name": "storage", "incarnation": "1", "ready": True}]},
    {"node": "evil", "token": "", "actors": []},
    {"node": "evil", "token": "0" * 64, "actors": [{"name": "scheduler", "incarnation": "1", "ready": True}]},
    {"node": "evil", "token": 5, "actors": []},
    {"token": None, "actors": [{}]},
    {"actors": "x"},
])
def test_hello_without_the_token(client, hello):
    client.send("", 0, hello, kind=HELLO, correlation=1, epoch=7)
    answer = client.receive()
    assert answer.error == "DENIED", answer
    assert client.ask("scheduler", STATUS).kind == REP  # a client all the same


def test_hello_with_the_token(server):
    """Whoever may read the key may join, but may not take a name that is taken, nor one of the switch's."""
    with open(os.path.join(server.data, "keys", "node.token"), encoding="ascii") as file:
        token = file.read().strip()
    assert os.stat(file.name).st_mode & 0o777 == 0o600
    for name in ("storage", "sampler.0", "switch", "client.1", "", "a b", "x" * 64, "../x"):
        with Client(server.data) as one:
            one.send("", 0, {"node": "evil", "token": token, "actors": [{"name": name, "incarnation": "1", "ready": True}]}, kind=HELLO,
                     correlation=1, epoch=7)
            assert one.receive().error in ("EXISTS", "INVALID"), name
    with Client(server.data) as one:
        one.send("", 0, {"node": "odd", "token": token, "actors": [{"name": "odd.0", "incarnation": "1", "ready": True}]}, kind=HELLO, correlation=1,
                 epoch=7)
        assert one.receive().kind == wire.WELCOME
        # speaks for an actor that is not its own
        body = b"{}"
        one.frames(b"storage\0scheduler\0local", header(REQ, STATUS, 1, body), body)
        while (answer := one.receive()).kind != ERR:
            pass
        assert answer.error == "DENIED"
        server.foreign += 1


def test_actors_messages_are_not_for_clients(client, server):
    for type, to in ((0x0302, "trainer"), (0x0310, "trainer"), (0x0311, "trainer"), (0x0312, "trainer"), (0x0313, "trainer"), (0x0314, "trainer"),
                     (0x0401, "storage"), (0x0402, "storage"), (0x0403, "storage"), (0x0404, "storage"), (0x0405, "storage"), (0x0406, "storage"),
                     (0x0415, "storage")):
        answer = client.ask(to, type, {"lora_id": "a/one", "job_ids": [], "event": {}, "cycle_id": "x"})
        assert answer.error == "DENIED", answer


def test_answers_that_nobody_asked_for(client, server):
    """A reply to another's question, by a guessed number, reaches nobody."""
    with Client(server.data) as asker:
        number = asker.send("sampler", CHAT, {**ASK, "max_tokens": 300})
        for to in ("client.1", "client.2", "client.3", "bridge", "sampler.0", "scheduler"):
            for guess in range(1, 40):
                client.send(to, CHAT, {"id": "forged", "model": "x", "choices": [], "prompt_tokens": 0, "completion_tokens": 0}, kind=REP,
                            correlation=guess)
        assert asker.answer_to(number).body["id"] != "forged"
    assert client.receive(0.2) is None


def test_events_of_a_client(client, server):
    with zmq.Context.instance().socket(zmq.SUB) as sub:
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        sub.connect(f"ipc://{server.data}/events.ipc")
        sub.poll(100)
        client.send("*", FEEDBACK, {"requests": [{}]}, kind=wire.EVT)
        assert not sub.poll(200) or b"forged" not in b"".join(sub.recv_multipart())


# --- peers that flood or vanish ---

def test_flood(server):
    """More than the mailboxes take, as many at a time as a client may leave unread (4,096): every request is answered, some
    with OVERLOADED."""
    burst, count = 4000, 20000
    with Client(server.data) as one:
        errors = {}
        for _ in range(count // burst):
            for _ in range(burst):
                one.send("storage", JOB_GET, {"job_id": "job-none"})
            for _ in range(burst):
                answer = one.receive(30)
                assert answer is not None, errors
                errors[answer.error] = errors.get(answer.error, 0) + 1
        assert sum(errors.values()) == count and set(errors) <= {"NOT_FOUND", "OVERLOADED"}, errors
        assert errors["NOT_FOUND"] > 0


def flood(server, job):
    """What a client gets that asks for large answers, over and over, before it reads any."""
    before = server.memory_mb()
    with server.stopped():  # so the first are under way together, and those after them are refused
        one = Client(server.data, receive_hwm=1)
        numbers = [one.send("storage", JOB_GET, {"job_id": job}) for _ in range(20)]
    with one, Client(server.data) as other:
        for _ in range(10):
            numbers += [one.send("storage", JOB_GET, {"job_id": job}) for _ in range(20)]
            assert other.ask("storage", JOB_GET, {"job_id": job}).kind == REP  # behind the others in the mailbox
            one.send("", 0, b"", kind=wire.BYE, correlation=0, codec=0)
        assert PATIENCE > 1 or server.memory_mb() < before + 400
        answers = []
        while answer := one.receive(2):
            answers.append(answer)
        kinds = [answer.kind for answer in answers]
        assert kinds.count(REP) >= 5 and len({answer.correlation for answer in answers}) == len(answers) <= len(numbers)
        assert one.ask("storage", JOB_GET, {"job_id": job}).kind == REP
    return {answer.error for answer in answers}


def test_client_that_does_not_read(server):
    """Large answers: what is unread is bounded in bytes, the rest is refused or said to be lost, and reading sets it right.
    BYE does not begin the count anew."""
    job = server.feedback("a/one", "x" * 6_000_000, server.answer, wait=False)["job_id"]
    server.wait_state(job)
    errors = flood(server, job)
    for _ in range(9):  # lost is what was asked for and then too much: on a busy machine all may be answered before more is asked for
        if "LIMIT" in errors:
            break
        errors |= flood(server, job)
    assert errors == {None, "LIMIT", "OVERLOADED"}


def test_clients_that_vanish(server):
    before = server.health()["model"]["device"]["running"]
    for _ in range(30):
        with Client(server.data) as one:
            one.send("sampler", CHAT, {**ASK, "max_tokens": 1900, "stream": True})
            one.receive(10)
    server.wait_until(lambda: server.health()["model"]["device"]["running"] <= before, what="the end of chats that nobody waits for")


def test_same_routing_id_twice(server):
    context = zmq.Context.instance()
    sockets = []
    for _ in range(2):
        one = context.socket(zmq.DEALER)
        one.setsockopt(zmq.LINGER, 0)
        one.setsockopt(zmq.IDENTITY, b"storage")
        one.connect(f"ipc://{server.data}/claas.ipc")
        sockets.append(one)
    body = b"{}"
    for one in sockets:
        one.send_multipart([b"sampler", header(REQ, STATUS, 1, body), body])
    assert sum(bool(one.poll(1000)) for one in sockets) >= 1
    for one in sockets:
        one.close()


def test_not_zeromq_at_all(server):
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b"\xff" + bytes(8) + b"\x7f\x03" + bytes(53), b"", os.urandom(5000)):
        with socket.socket(socket.AF_UNIX) as one:
            one.connect(os.path.join(server.data, "claas.ipc"))
            try:
                one.sendall(data)
            except OSError:
                pass


def test_counters_add_up(server):
    """sent = handled + refused + expired + lost, when nothing is under way."""
    names = ("sent", "handled", "refused", "expired", "lost")

    def balanced():
        text = server.request("GET", "/metrics").body.decode()
        values = {name: next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"claas_messages_{name}_total ")) for name in names}
        return values if values["sent"] + server.foreign == sum(values[name] for name in names[1:]) else None

    server.wait_until(balanced, 10, "the balance of messages")
