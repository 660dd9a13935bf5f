"""The server as its users see it: one process, started on a free port, spoken to over HTTP, ended by its pid.

Shared by the tests of tests/e2e and tests/fault and by the long runs (learning.py, kill9.py). Only Python's own library.
"""
import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = os.environ.get("CLAAS_BIN", str(ROOT / "build" / "tools" / "claas"))
TINY = "random:tiny-llama"
# A cycle of a few milliseconds: enough for everything but learning.
FAST = ("cycle.steps=2", "cycle.rows=4", "cycle.max_tokens=8", "log.level=warning", "log.format=text")
ENDED = ("done", "rejected", "failed", "cancelled")
# Sanitizer builds are several times slower; every limit on time is multiplied by this.
PATIENCE = float(os.environ.get("CLAAS_TEST_PATIENCE", "1"))


class Answer:
    """An HTTP answer, whatever its status."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def detail(self):
        """The sentence of an error in either of the two shapes."""
        body = self.json
        return body["error"]["message"] if "error" in body else body["detail"]

    def __repr__(self):
        return f"<{self.status} {self.body[:500]!r}>"


class Failed(AssertionError):
    """An answer with an error status where the caller wanted a good one."""

    def __init__(self, what, answer):
        super().__init__(f"{what}: {answer}")
        self.answer = answer


class Server:
    def __init__(self, data, model=TINY, settings=FAST, arguments=(), binary=None, log=None, environment=None):
        self.data, self.model, self.settings, self.arguments = str(data), model, list(settings), list(arguments)
        self.binary, self.environment = binary or BINARY, environment or {}
        self.log_path = str(log) if log else self.data.rstrip("/") + ".log"
        self.process, self.url = None, None

    # --- the process ---

    def command(self):
        command = [self.binary, "serve", "--listen", "127.0.0.1:0", "--data", self.data]
        if self.model:
            command += ["--model", self.model]
        command += self.arguments
        for setting in self.settings:
            command += ["--set", setting]
        return command

    def launch(self):
        """Starts the process and returns its first line; "" if it ended without one."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=subprocess.PIPE, stderr=log, text=True,
                                            env={**os.environ, **self.environment})
        return self.process.stdout.readline()

    def start(self):
        line = self.launch()
        if not line.startswith(("listening on ", "ready")):
            code = self.process.wait()
            self.process.stdout.close()
            self.process = None
            raise RuntimeError(f"the server did not start (exit {code}):\n{self.log()[-3000:]}")
        self.url = line.split()[-1] if line.startswith("listening on ") else None
        return self

    def fail_to_start(self, timeout=20):
        """For a start that must fail: the exit status and what was said."""
        before = len(self.log())
        line = self.launch()
        try:
            code = self.process.wait(timeout * PATIENCE)
        finally:
            self.kill()
        return code, line + self.log()[before:]

    def log(self):
        try:
            with open(self.log_path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout=40):
        code = self.process.wait(timeout * PATIENCE)
        self.process.stdout.close()
        self.process = None
        return code

    def stop(self, timeout=40):
        """SIGTERM; the exit status. Killed if it does not end."""
        if not self.process:
            return None
        self.terminate()
        try:
            return self.wait(timeout)
        finally:
            self.kill()

    def kill(self):
        if not self.process:
            return
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process = None

    @contextlib.contextmanager
    def stopped(self):
        """Meanwhile the process does nothing, so what is sent is there at once when it goes on."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def is_running(self):
        return self.process is not None and self.process.poll() is None

    def memory_mb(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024

    # --- HTTP ---

    def connection(self, timeout=60):
        address = urllib.parse.urlsplit(self.url)
        return http.client.HTTPConnection(address.hostname, address.port, timeout=timeout * PATIENCE)

    def request(self, method, path, body=None, headers=None, timeout=60):
        """Any request, any answer. `body` is sent as it is if it is bytes or an iterable of them, else as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes) and (isinstance(body, (dict, list, str)) or not hasattr(body, "__iter__")):
            body = json.dumps(body).encode()
        if isinstance(body, bytes) and "Content-Type" not in headers:
            headers["Content-Type"] = "application/json"
        connection = self.connection(timeout)
        try:
            connection.connect()
            # An answer may come before a large body was taken, as curl and httpx know too.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, path, body=body, headers=headers)
            reply = connection.getresponse()
            return Answer(reply.status, reply.headers, reply.read())
        finally:
            connection.close()

    def call(self, method, path, body=None, timeout=60, headers=None):
        """The JSON of a good answer."""
        answer = self.request(method, path, body, headers, timeout)
        if answer.status >= 300:
            raise Failed(f"{method} {path}", answer)
        return answer.json

    def events(self, path, body=None, headers=None, timeout=60):
        """A stream of server-sent events: yields (event, id, data as text) while they come."""
        connection = self.connection(timeout)
        try:
            data = json.dumps(body).encode() if body is not None else None
            connection.request("POST" if data else "GET", path, body=data,
                               headers={"Content-Type": "application/json", **(headers or {})})
            reply = connection.getresponse()
            if reply.status != 200:
                raise Failed(path, Answer(reply.status, reply.headers, reply.read()))
            event, number, lines = None, None, []
            for raw in reply:
                line = raw.decode().rstrip("\n").rstrip("\r")
                if line.startswith("data:"):
                    lines.append(line[5:].lstrip(" "))
                elif line.startswith("event:"):
                    event = line[6:].strip()
                elif line.startswith("id:"):
                    number = line[3:].strip()
                elif not line and lines:
                    yield event, number, "\n".join(lines)
                    event, lines = None, []
        finally:
            connection.close()

    # --- what tests do all the time ---

    def chat(self, model, question="hello", timeout=60, **more):
        body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": question}], **more}
        return self.call("POST", "/v1/chat/completions", body, timeout)

    def text(self, model, question="hello", **more):
        """A greedy answer's text."""
        return self.chat(model, question, temperature=0, **more)["choices"][0]["message"]["content"]

    def init(self, name, **more):
        return self.call("POST", "/v1/lora/init", {"lora_id": name, "lora_r": 4, "lora_alpha": 8, **more})

    def feedback(self, name, text="Say it better.", response_id=None, timeout=120, **more):
        if response_id is None and "response" not in more:
            response_id = self.chat(name)["id"]
        body = {"lora_id": name, "feedback": text, **more}
        if response_id:
            body["response_id"] = response_id
        return self.call("POST", "/v1/feedback", body, timeout)

    def job(self, job_id):
        return self.call("GET", "/v1/jobs/" + job_id)

    def versions(self, name):
        return self.call("GET", "/v1/lora/versions?lora_id=" + urllib.parse.quote(name))

    def health(self):
        return self.call("GET", "/health")

    def is_healthy(self):
        return self.is_running() and self.health()["status"] == "healthy"

    def wait_until(self, condition, seconds=30, what="it"):
        """Polls in short steps; the condition's first true value."""
        deadline = time.monotonic() + seconds * PATIENCE
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen within {seconds} s\n{self.log()[-2000:]}")
            time.sleep(0.02)

    def wait_state(self, job_id, states=ENDED, seconds=60):
        states = (states,) if isinstance(states, str) else states
        return self.wait_until(lambda: (lambda job: job if job["state"] in states else None)(self.job(job_id)),
                               seconds, f"{job_id} in {'/'.join(states)}")

    def wait_jobs(self, job_ids, seconds=600):
        """Waits for all of them; the jobs."""
        deadline = time.monotonic() + seconds * PATIENCE
        left, jobs = set(job_ids), {}
        while left:
            for job_id in sorted(left):
                job = self.job(job_id)
                if job["state"] in ENDED:
                    jobs[job_id] = job
            left -= jobs.keys()
            if left and time.monotonic() > deadline:
                raise AssertionError(f"{len(left)} jobs have not ended, {min(left)} among them")
            if left:
                time.sleep(0.05)
        return jobs


def ends_of(job):
    """The final states in a job's history: exactly one if all is well."""
    return [t["state"] for t in job["transitions"] if t["state"] in ENDED]


@contextlib.contextmanager
def serving(data=None, **options):
    """A running server; its log is shown if the test fails. The directory goes away if it was made here."""
    with contextlib.ExitStack() as stack:
        if data is None:
            data = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "data")
        server = Server(data, **options)
        try:
            yield server.start()
        finally:
            code = server.stop()
        assert code in (0, None), f"exit {code}\n{server.log()[-4000:]}"


def in_parallel(functions):
    """Runs them at once; their results in order, the first failure raised."""
    results, failures = [None] * len(functions), []

    def run(index, function):
        try:
            results[index] = function()
        except BaseException as error:  # pylint: disable=broad-except
            failures.append(error)

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
