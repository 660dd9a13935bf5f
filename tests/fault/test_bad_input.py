"""Bad input over HTTP: each kind gets its documented error, in the shape of its route, and nothing is lost by it."""
import json
import re
import socket

import pytest

from server import PATIENCE, serving

CHAT, COMPLETIONS, FEEDBACK = "/v1/chat/completions", "/v1/completions", "/v1/feedback"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        running.init("a/one")
        running.init("b/two")
        running.answer = running.chat("a/one")["id"]
        yield running


@pytest.fixture(autouse=True)
def lives(server):
    """After every test: healthy, chat works, and no job was made of something that was refused."""
    jobs = len(server.call("GET", "/v1/jobs")["jobs"])
    yield
    assert server.is_healthy()
    assert server.chat("a/one")["choices"]
    assert len(server.call("GET", "/v1/jobs")["jobs"]) == jobs


def check(answer, status, words=""):
    """One of the two shapes of errors, by the route; `words` is a pattern for the sentence."""
    assert answer.status == status, answer
    assert answer.headers["x-request-id"]
    body = answer.json
    if "error" in body:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        text = body["error"]["message"]
    elif isinstance(body["detail"], list):
        assert status == 422
        assert all({"loc", "msg", "type"} <= set(fault) for fault in body["detail"])
        text = json.dumps(body["detail"])
    else:
        text = body["detail"]
    assert re.search(words, text), f"{words!r} is not in {text!r}"


# --- JSON ---

BODIES = [
    (b"", "nothing"),
    (b'{"model":', "line 1, column"),
    (b"[]", "object"),
    (b'"text"', "object"),
    (b"{}{}", "line 1"),
    (b'{"messages": [}', "line 1, column"),
    (b'{\n"a": tru}', "line 2, column"),
    (b'{"a": 01}', "line 1, column"),
    (b'{"a": NaN}', "line 1, column"),
    (b'{"a": 1e999}', "out of range"),
    (b'{"a": "\\ud800"}', "line 1, column"),
    (b'{"a": "\\u0000"}', "u0000"),
    (b'{"a": "\x00"}', "line 1, column"),
    (b'{"a": "\xff\xfe"}', "UTF-8"),
    (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
    (b'{"a": "\xc0\xaf"}', "UTF-8"),
    (b"\xef\xbb\xbf{}", ""),
    (b'{"model": "base", "model": "base"}', "twice"),
    (b"[" * 200000, "deep"),
    (b'{"a":' * 5000 + b"1" + b"}" * 5000, "deep"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, FEEDBACK, "/v1/lora/init", "/v1/lora/rollback"])
def test_malformed_json(server, path):
    for body, words in BODIES:
        answer = server.request("POST", path, body)
        if body.startswith(b"\xef\xbb\xbf"):  # a byte order mark may be refused, or skipped to a missing field
            assert answer.status in (400, 422)
        else:
            check(answer, 400, words)


@pytest.mark.parametrize("path", [CHAT, FEEDBACK])
def test_huge_json(server, path):
    check(server.request("POST", path, b'{"model": "' + b"x" * 20_000_000 + b'"}'), 413, "too large")
    before = server.memory_mb()
    numbers = b"[" + b"1," * 4_000_000 + b"1]"  # 8 MB that a tree makes 64 times larger
    check(server.request("POST", path, b'{"messages": ' + numbers + b"}"), 400, "too many values")
    many = b"[" + b"1," * 500_000 + b"1]"
    assert server.request("POST", path, b'{"messages": ' + many + b', "requests": ' + many + b"}", timeout=10).status in (400, 422)
    keys = ",".join(f'"{i}": 1' for i in range(500_000)).encode()
    assert server.request("POST", path, b"{" + keys + b"}", timeout=10).status in (400, 422)
    # chunked: no length is known in advance
    chunks = (b" " * 65536 for _ in range(400))
    check(server.request("POST", path, chunks, {"Content-Type": "application/json"}), 413, "too large")
    assert PATIENCE > 1 or server.memory_mb() < before + 200  # sanitizers keep what is freed


def test_content_types_and_methods(server):
    check(server.request("POST", CHAT, b"{}", {"Content-Type": "text/plain"}), 415, "application/json")
    check(server.request("POST", FEEDBACK, b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}), 415)
    answer = server.request("GET", CHAT)
    check(answer, 405)
    assert "POST" in answer.headers["Allow"]
    check(server.request("PUT", FEEDBACK, b"{}"), 405)
    check(server.request("GET", "/nope"), 404)
    check(server.request("POST", "/v1/distill", b"{}"), 404)
    check(server.request("POST", "/v1/chat/nope", b"{}"), 404)
    assert "error" in server.request("POST", "/v1/chat/nope", b"{}").json


# --- chat ---

CHAT_FAULTS = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages.0"),
    ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": 3, "content": "x"}]}, "messages.0.role"),
    ({"messages": HELLO * 4097}, "messages"),
    ({"model": 7}, "model"),
    ({"model": []}, "model"),
    ({"model": "x" * 257}, "model"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "8"}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_p": -1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"seed": 2**60}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"stop": 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": 1, "stream": True}, "stream_options"),
]


def test_wrong_chats(server):
    for fault, words in CHAT_FAULTS:
        check(server.request("POST", CHAT, {"model": "base", "messages": HELLO, "max_tokens": 2, **fault}), 400, "^" + re.escape(words))
    for prompt in (None, 5, [], ["a", "b"], {}):
        check(server.request("POST", COMPLETIONS, {"model": "base", "prompt": prompt, "max_tokens": 2}), 400, "prompt")


@pytest.mark.parametrize("name, status", [
    ("no/such", 404), ("no-such", 404), ("a/one@99", 404), ("a/one@x", 400), ("a/one@-1", 400), ("a/one@1@2", 400), ("../../etc", 400),
    ("a/../b", 400), ("..", 400), ("a/one/../../x", 400), ("a b", 400), ("a/one\n", 400), ("a\\b", 400), ("%2e%2e", 400), ("ü/é", 400),
])
def test_names_of_models(server, name, status):
    for stream in (False, True):
        check(server.request("POST", CHAT, {"model": name, "messages": HELLO, "max_tokens": 2, "stream": stream}), status)
    assert server.request("GET", "/v1/models/" + name.replace("%", "%25").replace(" ", "%20").replace("\n", "%0A").replace("ü", "%C3%BC")
                          .replace("é", "%C3%A9")).status in (400, 404)


def test_prompt_longer_than_the_context(server):
    context = server.health()["model"]["context"]
    long = [{"role": "user", "content": "word " * context}]
    for stream in (False, True):
        answer = server.request("POST", CHAT, {"model": "base", "messages": long, "max_tokens": 2, "stream": stream})
        check(answer, 400, rf"prompt has \d+ tokens.*{context}")
        assert answer.json["error"]["code"] == "context_length_exceeded"
    check(server.request("POST", COMPLETIONS, {"model": "base", "prompt": "x" * 5_000_000}), 400, rf"prompt has \d+ tokens.*{context}")


# --- feedback ---

def test_wrong_feedback(server):
    good = {"lora_id": "a/one", "feedback": "x", "response_id": server.answer}

    def sent(**more):
        return server.request("POST", FEEDBACK, {**good, **more})

    for fault in ({"lora_id": 5}, {"lora_id": ""}, {"lora_id": "x" * 257}, {"feedback": ""}, {"feedback": []}, {"response_id": 7}, {"response_id": "x" * 65},
                  {"choice": -1}, {"choice": 16}, {"choice": "0"}, {"wait": "no"}, {"training": 5}, {"training": {"alpha": "x"}}, {"training": {"steps": 1.5}},
                  {"orchestration": {"sleep_level": 3}}):
        check(sent(**fault), 422, next(iter(fault)))
    for missing in ("lora_id", "feedback", "response_id"):
        check(server.request("POST", FEEDBACK, {k: v for k, v in good.items() if k != missing}), 422, "required")
    check(sent(feedback=" \n\u3000"), 400, "say something")
    bounds = {"learning_rate": 0, "alpha": 1.1, "is_clip": 21, "max_grad_norm": -1, "kl_reg_weight": 2, "teacher_top_k": 9, "steps": 0}
    for name, value in bounds.items():
        check(sent(training={name: value}), 422, f"^invalid training config: {name} must be")
    answer = sent(training=bounds)
    check(answer, 422, "^invalid training config: ")
    assert answer.detail.count(";") == len(bounds) - 1


def test_feedback_on_what_is_not_there(server):
    def sent(**body):
        return server.request("POST", FEEDBACK, {"lora_id": "a/one", "feedback": "x", **body})

    check(sent(response_id="chatcmpl-never"), 404, "chatcmpl-never")
    check(sent(response_id=server.answer, lora_id="b/two"), 404, "b/two")  # another adapter's answer
    check(sent(response_id=server.answer, lora_id="no/such"), 404, "^LoRA not found: no/such$")
    check(sent(response_id=server.answer, choice=3), 404, "choice 3")
    check(sent(response="never said"), 404, "^No cached completion for content_hash=[0-9a-f]{16}")
    answers = (server.chat("b/two", "only here", seed=seed) for seed in range(20))  # a random model's may be empty
    texts = (answer["choices"][0]["message"]["content"] for answer in answers)
    check(sent(response=next(filter(None, texts))), 404, "content_hash")
    check(sent(response_id=server.answer, lora_id="../a/one"), 400, "path traversal")


def test_batches(server):
    item = {"lora_id": "a/one", "feedback": "x", "response_id": server.answer}

    def sent(*items):
        return server.request("POST", FEEDBACK, {"requests": list(items)})

    check(sent(), 422, "at least 1")
    check(sent(*[item] * 17), 422, "at most 16")
    check(sent(5), 422)
    check(sent(item, {**item, "feedback": 5}), 422, "1, .feedback")
    check(sent(item, {**item, "lora_id": "b/two"}), 400, "^all requests must use the same lora_id$")
    check(sent(item, {**item, "training": {"alpha": 0.25}}), 400, "^all requests must use the same training config$")
    check(sent(item, {**item, "response_id": "chatcmpl-never"}), 404)  # and nothing of the first one
    check(server.request("POST", FEEDBACK, {"requests": "x"}), 422)


def test_idempotency_keys(server):
    body = {"lora_id": "a/one", "feedback": "x", "response_id": "chatcmpl-never"}
    check(server.request("POST", FEEDBACK, body, {"Idempotency-Key": ""}), 400, "Idempotency-Key")
    check(server.request("POST", FEEDBACK, body, {"Idempotency-Key": "k" * 257}), 400, "Idempotency-Key")


# --- adapters ---

def test_wrong_adapters(server):
    def init(**body):
        return server.request("POST", "/v1/lora/init", body)

    for name in ("../x", "a/../b", "..", "a/..", "a/b/../../.."):
        check(init(lora_id=name), 400, "path traversal")
    for name in ("a/b/c", "a b", "a//b", "./a", "a/.", "a\\b", "a\u00e9", "a@3", "base", "x" * 200, "-init"):
        answer = init(lora_id=name)
        assert answer.status == 400 or name == "-init", answer
    assert init(lora_id="x\0y").status == 400
    for name in ("a\nb", "a\x1b[2Jb", "a\x7fb", "\u202ea/b", "\u0085", "a\tb\r\n" * 40, "\u00e9" * 128, "\U0001f600/x", "a/" + "\\" * 250):
        for answer in (init(lora_id=name), init(lora_id="n/new", base_model=name), init(lora_id="n/new", target_modules=[name * 50])):
            assert answer.status in (400, 403), answer
            assert answer.detail.replace("\u2026", "").isascii() and answer.detail.isprintable(), answer  # escaped
            assert len(answer.detail) < 300, answer  # and cut
    for fault in ({"lora_r": 3}, {"lora_r": 129}, {"lora_r": "8"}, {"lora_alpha": 7}, {"lora_alpha": 257}, {"target_modules": []}, {"target_modules": "q_proj"},
                  {"overwrite": 1}, {"lora_id": 5}, {"lora_id": ""}, {"lora_id": "x" * 257}):
        check(init(**{"lora_id": "n/new", **fault}), 422, next(iter(fault)))
    check(init(lora_id="n/new", target_modules=["lm_head"]), 400, "Unsupported target_modules: lm_head")
    check(init(lora_id="n/new", target_modules=[1]), 400, "Unsupported target_modules")
    check(init(lora_id="n/new", base_model="gpt-4"), 403, "^base_model 'gpt-4' is not allowed for initialization. Allowed models: ")
    check(init(lora_id="a/one"), 409, "already exists")
    assert not any(name.startswith("n/") for name in server.call("GET", "/v1/lora")["loras"])


@pytest.mark.parametrize("path", ["/v1/lora/versions", "/v1/lora/export", "/v1/lora/feedback"])
def test_queries(server, path):
    check(server.request("GET", path), 422, "required")
    check(server.request("GET", path + "?lora_id="), 422)
    check(server.request("GET", path + "?lora_id=" + "x" * 257), 422)
    check(server.request("GET", path + "?lora_id=no/such"), 404, "^LoRA not found: no/such$")
    for name in ("..", "../../etc/passwd", "%2e%2e%2fx", "a%2F..%2F..%2Fx"):
        check(server.request("GET", f"{path}?lora_id={name}"), 400, "path traversal")
    check(server.request("GET", path + "?lora_id=%ff%fe"), 400, "UTF-8")
    check(server.request("GET", path + "?lora_id=a%00b"), 400)


def test_rollback_delete_jobs(server):
    def rollback(**body):
        return server.request("POST", "/v1/lora/rollback", body)

    check(rollback(lora_id="a/one"), 422, "version")
    check(rollback(version=0), 422, "lora_id")
    for version in (-1, "0", 1.5, None, 1e12):
        check(rollback(lora_id="a/one", version=version), 422, "version")
    check(rollback(lora_id="a/one", version=7), 404, "no version 7")
    check(rollback(lora_id="no/such", version=0), 404)
    assert server.call("DELETE", "/v1/lora?lora_id=no/such") == {"deleted": False}
    check(server.request("DELETE", "/v1/lora?lora_id=.."), 400)
    check(server.request("DELETE", "/v1/lora/feedback?lora_id=a/one&id=fb-never"), 404)
    for method, path in (("GET", "/v1/jobs/never"), ("GET", "/v1/jobs/never/events"), ("DELETE", "/v1/jobs/never"), ("GET", "/v1/jobs/" + "x" * 200),
                         ("GET", "/v1/jobs/..%2f..")):
        check(server.request(method, path), 404)
    for query in ("limit=x", "limit=0", "limit=1001", "state=odd"):
        check(server.request("GET", "/v1/jobs?" + query), 422)


# --- the wire ---

def raw(server, data, timeout=15):
    """What comes back for raw bytes, until the server closes or is silent."""
    host, port = server.url.split("//")[1].split(":")
    with socket.create_connection((host, int(port)), timeout=timeout) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR) if data.endswith(b"half") else None
        answer = b""
        try:
            while True:
                part = connection.recv(65536)
                if not part:
                    break
                answer += part
                if b"\r\n\r\n" in answer and b"Connection: close" not in answer:
                    break
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


@pytest.mark.parametrize("request_bytes", [
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}x",
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: xchunked\r\n\r\n{}",
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length : 2\r\n\r\n{}",
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{}",
    b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    b"GET " + b"/x" * 40000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: " + b"y" * 100000 + b"\r\n\r\n",
])
def test_odd_requests_are_refused(server, request_bytes):
    answer = raw(server, request_bytes)
    assert answer == b"" or re.match(rb"HTTP/1\.[01] (4\d\d|50[15]) ", answer), answer[:200]


def test_slow_and_half_closed_clients(server):
    host, port = server.url.split("//")[1].split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        for i, client in enumerate(clients):
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Len" if i % 2 else
                           b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            if i % 4 == 0:
                client.shutdown(socket.SHUT_WR)
        assert server.is_healthy()
        assert server.chat("a/one")["choices"]
    finally:
        for client in clients:
            client.close()


def test_clients_that_leave_in_the_middle(server):
    host, port = server.url.split("//")[1].split(":")
    body = json.dumps({"model": "a/one", "messages": HELLO, "max_tokens": 2000, "stream": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head + body)
            client.recv(100)
    server.wait_until(lambda: server.health()["model"]["device"]["running"] == 0, what="the end of the abandoned chats")
    server.wait_until(lambda: server.health()["http"]["inflight"] == 0, what="the end of the abandoned requests")
