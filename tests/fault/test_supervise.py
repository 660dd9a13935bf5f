"""`claas serve --supervise`: what is lost starts again, what ends for a reason ends; and servers whose device is lost or full."""
import http.client
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from server import BINARY, FAST, PATIENCE, ROOT, Server, ends_of

LONG = FAST + ("cycle.steps=400", "cycle.rows=16", "cycle.max_tokens=64")


def child_of(pid):
    """The one child of a process."""
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                return int(entry.name)
    return None


def steps_of(job):
    return sum(event["kind"] == "step" for event in job["events"])


def is_gone(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Supervised(Server):
    """A server under its parent: the process is the parent, the address that of the last child."""

    def __init__(self, data, **more):
        super().__init__(data, arguments=["--supervise"], **more)

    def read_address(self, seconds=40):
        """The next life's; fails when no line comes. The reader left behind then ends with the process."""
        lines = []
        reader = threading.Thread(target=lambda: lines.append(self.process.stdout.readline()), daemon=True)
        reader.start()
        reader.join(seconds * PATIENCE)
        assert lines, f"no address within {seconds} s\n{self.log()[-3000:]}"
        assert lines[0].startswith("listening on "), lines[0] + self.log()
        self.url = lines[0].split()[-1]


@pytest.fixture
def make(tmp_path):
    made = []

    def start(kind=Supervised, **more):
        made.append(kind(tmp_path / "db", **more))
        return made[-1].start()

    yield start
    for server in made:
        server.kill()


def test_kill_the_child_under_load(make):
    server = make(settings=LONG)
    server.init("a/one")
    job_id = server.feedback("a/one", wait=False)["job_id"]
    steps = 0
    for _ in range(2):
        server.wait_until(lambda seen=steps: steps_of(server.job(job_id)) > seen, what="a step of this life")
        child = child_of(server.process.pid)
        os.kill(child, signal.SIGKILL)
        server.read_address()
        assert child_of(server.process.pid) != child
        steps = steps_of(server.job(job_id))
        assert server.job(job_id)["state"] in ("queued", "batched", "training")
        assert server.chat("a/one")["choices"]
    assert server.log().count("it starts again in") == 2
    assert server.stop() == 0
    after = make(kind=Server, settings=FAST)
    job = after.wait_state(job_id)
    assert ends_of(job) == ["done"] and after.versions("a/one")["current"] == 1
    assert after.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_go_on(make, number):
    server = make()
    child = child_of(server.process.pid)
    server.process.send_signal(number)
    assert server.wait() == 0
    assert is_gone(child)


def test_signal_between_two_lives(make):
    server = make()
    os.kill(child_of(server.process.pid), signal.SIGKILL)
    server.wait_until(lambda: "it starts again" in server.log(), what="the line that says so")
    server.terminate()
    assert server.wait() == 0


def test_child_ends_with_its_parent(make):
    server = make()
    child = child_of(server.process.pid)
    server.kill()
    end = time.monotonic() + 10 * PATIENCE
    while not is_gone(child):
        assert time.monotonic() < end, "the child goes on"
        time.sleep(0.02)
    assert make(kind=Server).stop() == 0


def test_ends_for_a_reason(make, tmp_path):
    """No restart mends a wrong setting, or a directory that another server has."""
    code, said = Supervised(tmp_path / "other", settings=["cycle.steps=nonsense"]).fail_to_start()
    assert code == 2 and "it starts again" not in said, said
    first = make(kind=Server)
    second = Supervised(tmp_path / "db", log=tmp_path / "second.log")
    code, said = second.fail_to_start()
    assert code == 1 and "another server runs on" in said and "it starts again" not in said, said
    assert first.stop() == 0


def test_lost_device(make):
    """Exit code 75, and no job has ended; with --supervise they all do, though each life has two steps only."""
    server = make(kind=Server)
    names = ["a/one", "b/two", "c/three"]
    for name in names:
        server.init(name)
    answers = [server.chat(name)["id"] for name in names]
    assert server.stop() == 0
    untrained = ["--roles", "bridge,storage,scheduler,sampler"]  # jobs wait: nothing is lost before the last is posted
    server = make(kind=Server, arguments=untrained)
    jobs = [server.feedback(name, response_id=answer, wait=False)["job_id"] for name, answer in zip(names, answers)]
    assert server.stop() == 0
    server = make(kind=Server, environment={"CLAAS_DEVICE_FAULT": "DEVICE_LOST:1"})
    assert server.wait(20) == 75
    assert "by order of CLAAS_DEVICE_FAULT" in server.log() and "ending with 75" in server.log(), server.log()
    server = make(kind=Server, arguments=untrained)
    assert [ends_of(server.job(job)) for job in jobs] == [[], [], []]
    assert server.stop() == 0
    server = make(environment={"CLAAS_DEVICE_FAULT": "DEVICE_LOST:3"})
    ended, lives = {}, 0
    while not ended and lives < 4:
        try:
            ended = server.wait_jobs(jobs, 30)
        except (OSError, http.client.HTTPException):
            server.read_address()
            lives += 1
    assert sorted(ended) == sorted(jobs) and all(ends_of(job) == ["done"] for job in ended.values()), ended
    assert [server.versions(name)["current"] for name in names] == [1, 1, 1]
    assert lives >= 1 and server.log().count("ended with 75") == lives
    assert server.stop() == 0


def test_out_of_memory():
    """The script that the real card is tested with, with failures to order in place of a limit."""
    ran = subprocess.run([sys.executable, ROOT / "tests" / "fault" / "out_of_memory.py", "--claas", BINARY], capture_output=True, text=True,
                         timeout=120 * PATIENCE, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "keys and values" in ran.stdout, ran.stdout


def test_out_of_memory_to_the_end(make):
    """When it does not get better the job fails, and says what held the memory."""
    server = make(kind=Server, settings=[*FAST, "cycle.retries=1"], environment={"CLAAS_DEVICE_FAULT": "NO_MEMORY:1"})
    server.init("a/one")
    answer = server.request("POST", "/v1/feedback", {"lora_id": "a/one", "response_id": server.chat("a/one")["id"], "feedback": "Shorter."})
    assert answer.status == 500 and "MB: weights" in answer.detail, answer
    assert server.chat("a/one")["choices"]
    assert server.versions("a/one")["current"] == 0
    assert server.stop() == 0


def test_unit(tmp_path):
    """examples/claas.service: what it names is there, and a card that is lost is started for again."""
    text = (ROOT / "examples" / "claas.service").read_text(encoding="utf-8")
    lines = [line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#")]
    unit = dict(lines)
    assert len(unit) == len(lines), "a key twice"
    header = (ROOT / "include" / "claas" / "device.h").read_text(encoding="utf-8")
    lost = re.search(r'define CLAAS_DEVICE_LOST_VARIABLE "(\w+)"', header)[1]
    assert unit["Environment"].split() == [lost + "=1", "XDG_CACHE_HOME=/var/cache"] and unit["CacheDirectory"] == "claas"
    codes = (ROOT / "tools" / "verbs.h").read_text(encoding="utf-8")
    assert unit["RestartForceExitStatus"] == re.search(r"EXIT_CODE_AGAIN\s*=\s*(\d+)", codes)[1]
    assert unit["Restart"] == "on-abnormal"  # no other code than that
    _, verb, *arguments = unit["ExecStart"].split()
    known = subprocess.run([BINARY, verb, "--help"], capture_output=True, text=True, check=True).stdout
    assert verb == "serve" and {a for a in arguments if a.startswith("-")} <= set(re.findall(r"--[a-z-]+", known))
    if shutil.which("systemd-analyze"):
        copy = tmp_path / "claas.service"
        copy.write_text(text.replace("/usr/local/bin/claas", str(pathlib.Path(BINARY).resolve())), encoding="utf-8")
        checked = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
        assert "claas.service" not in checked.stderr, checked.stderr


def test_fault_must_be_understood(tmp_path):
    for wrong in ("NO_MEMORY", "NO_MEMORY:0", "NOTHING:1", "NO_MEMORY:1x"):
        code, said = Server(tmp_path / "db", environment={"CLAAS_DEVICE_FAULT": wrong}).fail_to_start()
        assert code == 1 and "is not CODE:N" in said, (wrong, code, said)
