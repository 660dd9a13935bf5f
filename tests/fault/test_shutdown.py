"""SIGTERM in the middle of things, restarts, two servers on one directory, leftovers of a killed one."""
import os
import signal
import socket
import threading
import time

import pytest

from server import FAST, Server, ends_of, in_parallel

# A cycle that a test can interrupt for sure; the next start makes it short.
LONG = FAST + ("cycle.steps=1000", "cycle.rows=16", "cycle.max_tokens=64")


@pytest.fixture
def data(tmp_path):
    return tmp_path / "db"


@pytest.fixture
def make(data):
    made = []

    def start(settings=FAST, **more):
        made.append(Server(data, settings=settings, **more).start())
        return made[-1]

    yield start
    for server in made:
        server.kill()


def test_sigterm_during_a_cycle(make):
    server = make(LONG)
    server.init("a/one")
    answer = server.chat("a/one")["id"]
    results = []

    def wait():
        results.append(server.request("POST", "/v1/feedback", {"lora_id": "a/one", "response_id": answer, "feedback": "x"}))

    waiting = threading.Thread(target=wait)
    waiting.start()
    job_id = server.wait_until(lambda: next((j["job_id"] for j in server.call("GET", "/v1/jobs")["jobs"] if j["state"] == "training"), None))
    queued = server.feedback("a/one", response_id=answer, wait=False)["job_id"]
    began = time.monotonic()
    server.terminate()
    waiting.join(30)
    assert server.wait(30) == 0
    assert time.monotonic() - began < 30
    # The waiting client was told where to look.
    assert results[0].status == 202 and results[0].json == {"job_id": job_id}
    assert results[0].headers["Location"] == "/v1/jobs/" + job_id
    server = make()
    jobs = server.wait_jobs([job_id, queued], 60)
    assert all(ends_of(job) == ["done"] for job in jobs.values())
    assert server.versions("a/one")["current"] == max(job["version"] for job in jobs.values())
    assert server.stop() == 0


def test_sigterm_with_streams(make):
    """Chats and job streams under way get an end, not a cut, and the exit is clean."""
    server = make(LONG)
    server.init("a/one")
    job = server.feedback("a/one", wait=False)["job_id"]
    chats, streams = [], []

    def chat():
        body = {"model": "base", "max_tokens": 400, "stream": True, "messages": [{"role": "user", "content": "go on"}]}
        for _, _, text in server.events("/v1/chat/completions", body):
            chats.append(text)

    def watch():
        for event, _, text in server.events(f"/v1/jobs/{job}/events"):
            streams.append((event, text))

    threads = [threading.Thread(target=run) for run in (chat, watch)]
    for thread in threads:
        thread.start()
    server.wait_until(lambda: len(chats) > 3 and len(streams) > 1)
    server.terminate()
    for thread in threads:
        thread.join(30)
    assert server.wait(30) == 0
    assert chats[-1] == "[DONE]" or "error" in chats[-1]


def test_new_requests_while_draining(make):
    """Refused with 503 and Connection: close, or not accepted at all; never half-done."""
    server = make(LONG)
    server.init("a/one")
    answer = server.chat("a/one")["id"]
    accepted, stop = [], threading.Event()

    def send():
        while not stop.is_set():
            try:
                reply = server.request("POST", "/v1/feedback", {"lora_id": "a/one", "response_id": answer, "feedback": "x", "wait": False})
            except OSError:
                return
            except Exception:  # pylint: disable=broad-except
                continue  # cut in the middle: not acknowledged
            if reply.status == 202:
                accepted.append(reply.json["job_id"])
            else:
                assert reply.status == 503, reply

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    server.wait_until(lambda: len(accepted) > 20)
    server.terminate()
    assert server.wait(30) == 0
    stop.set()
    for thread in threads:
        thread.join()
    server = make()
    assert all(ends_of(job) == ["done"] for job in server.wait_jobs(accepted, 120).values())


def test_second_signal_ends_at_once(make):
    server = make()
    host, port = server.url.split("//")[1].split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/feedback HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        server.wait_until(lambda: server.health()["http"]["connections"] >= 2)
        server.terminate()
        time.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0


def test_second_server(make, data, tmp_path):
    first = make()
    code, said = Server(data, "no-such-model", log=tmp_path / "second").fail_to_start()  # said before a model is looked for
    assert code == 1
    assert "another server runs on " + str(data) in said, said
    assert first.is_healthy()
    first.init("a/one")
    assert first.feedback("a/one")["status"] == "ok"


def test_two_at_once(data, tmp_path):
    """Started in the same instant: exactly one serves."""
    servers = [Server(data, log=tmp_path / str(i)) for i in range(4)]
    try:
        lines = in_parallel([server.launch for server in servers])
        assert sum(line.startswith("listening") for line in lines) == 1, lines
    finally:
        for server in servers:
            server.kill()


def test_leftovers_of_a_killed_server(make, data):
    server = make()
    server.init("a/one")
    server.kill()
    assert (data / "claas.ipc").exists() and (data / "lock").exists()
    (data / "staging" / "cycle-left").mkdir(parents=True, exist_ok=True)
    (data / "staging" / "cycle-left" / "adapter_model.safetensors").write_bytes(b"half")
    (data / "staging" / "upload-left.zip").write_bytes(b"half")
    server = make()
    assert server.feedback("a/one")["status"] == "ok"
    server.wait_until(lambda: not list((data / "staging").iterdir()), what="a swept staging folder")
    assert server.stop() == 0


@pytest.mark.parametrize("kind", ["file", "directory", "other socket"])
def test_something_else_where_the_socket_goes(data, make, kind):
    data.mkdir()
    path = data / "claas.ipc"
    if kind == "file":
        path.write_text("x")
    elif kind == "directory":
        path.mkdir()
        (path / "x").write_text("x")
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.close()
    server = Server(data)
    try:
        server.start()
    except RuntimeError as error:
        assert kind == "directory" and "claas.ipc" in str(error), error
        return
    try:
        assert server.is_healthy()
    finally:
        server.stop()


def test_long_path_of_the_data(tmp_path):
    """A Unix socket's path has 107 bytes at most: said at the start, with the limit."""
    data = tmp_path / ("d" * 100) / "db"
    server = Server(data, log=tmp_path / "log")
    code, said = server.fail_to_start()
    assert code == 1 and "107" in said and str(data) in said, said


def test_kill_during_export_and_import(make, data):
    server = make()
    server.init("a/one")
    server.feedback("a/one")
    exported = server.request("GET", "/v1/lora/export?lora_id=a/one").body
    for _ in range(3):
        threads = [threading.Thread(target=lambda: quietly(lambda: server.request(
            "POST", "/v1/lora/import?lora_id=a/copy", exported, {"Content-Type": "application/zip"}))) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        server.kill()
        for thread in threads:
            thread.join()
        server = make()
        assert server.is_healthy()
        names = server.call("GET", "/v1/lora")["loras"]
        if "a/copy" in names:
            assert server.text("a/copy") == server.text("a/one")
    assert not os.listdir(data / "staging")


def quietly(function):
    try:
        function()
    except Exception:  # pylint: disable=broad-except
        pass
