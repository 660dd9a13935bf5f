"""A server without a free descriptor: it says so as its own trouble, what it acknowledged waits, and all works again."""
import contextlib
import json
import os
import resource

from server import ends_of, serving


@contextlib.contextmanager
def no_descriptors(server):
    """A connection while the server can open nothing: the limit is the first free number. What has one keeps it."""
    with contextlib.closing(server.connection()) as connection:
        connection.request("GET", "/health")
        connection.getresponse().read()
        used = {int(name) for name in os.listdir(f"/proc/{server.process.pid}/fd")}
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        first = next(number for number in range(len(used) + 1) if number not in used)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (first, limits[1]))
        try:
            yield connection
        finally:
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)


def ask(connection, method, path, body=None, content_type="application/json"):
    connection.request(method, path, body, {"Content-Type": content_type})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_no_free_descriptors(tmp_path):
    with serving(tmp_path / "db") as server:
        for name in ("a/one", "b/two"):
            server.init(name)
        answer = server.chat("a/one")["id"]
        version = server.feedback("a/one", response_id=answer)["version"]
        server.call("POST", "/v1/lora/rollback", {"lora_id": "a/one", "version": 0})
        server.feedback("b/two")  # no chat has its weights yet
        zipped = server.request("GET", "/v1/lora/export?lora_id=a/one").body
        with no_descriptors(server) as connection:
            status, text = ask(connection, "POST", "/v1/feedback", json.dumps({
                "lora_id": "a/one", "response_id": answer, "feedback": "Better.", "wait": False}))
            assert status == 202, text
            job = json.loads(text)["job_id"]
            for method, path, body in (
                    ("POST", "/v1/chat/completions", {"model": "b/two", "messages": [{"role": "user", "content": "hello"}]}),
                    ("POST", "/v1/lora/init", {"lora_id": "c/three"}),
                    ("POST", "/v1/lora/rollback", {"lora_id": "a/one", "version": version}),
                    ("GET", "/v1/lora/export?lora_id=a/one", None)):
                status, text = ask(connection, method, path, json.dumps(body) if body else None)
                assert status == 503 and "Too many open files" in text and str(tmp_path) not in text, (path, status, text)
            status, text = ask(connection, "POST", "/v1/lora/import?lora_id=c/three", zipped, "application/zip")
            assert status == 503, text
            server.wait_until(lambda: "Too many open files" in ask(connection, "GET", "/v1/jobs/" + job)[1], what="a reason to wait")
        ended = server.wait_state(job)
        assert ends_of(ended) == ["done"] and ended["strikes"] == 0, ended
        assert server.chat("b/two")["choices"] and server.init("c/three")
        assert server.is_healthy()
