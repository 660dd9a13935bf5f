"""The server as a process: its lines, signals, locks, restarts, and what it says about wrong settings."""
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest

from server import BINARY, PATIENCE, TINY


def test_health_and_metrics(server):
    for path in ("/health", "/v1/health"):
        health = server.call("GET", path)
        assert health["status"] == "healthy" and health["worker"] == {"status": "healthy", "error": None}
        assert {"storage", "scheduler", "trainer", "sampler"} <= set(health["actors"])
    server.chat("base", "Hello")
    metrics = server.request("GET", "/metrics")
    assert metrics.status == 200 and b"claas_chat_requests_total" in metrics.body
    if shutil.which("promtool"):
        check = subprocess.run(["promtool", "check", "metrics"], input=metrics.body, capture_output=True, check=False)
        assert check.returncode == 0, check.stdout + check.stderr


def test_starts_and_stops(make_server):
    server = make_server()
    started = time.monotonic()
    server.start()
    assert time.monotonic() - started < 10 * PATIENCE
    assert server.stop() == 0
    server.start()
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0


def test_says_what_it_read(make_server, tmp_path):
    """A line in the log for the weights of a file, none for those of a random model; and no bar where there is no terminal."""
    server = make_server().start()
    assert server.stop() == 0
    assert "weights:" not in server.log()
    model = pathlib.Path(__file__).resolve().parents[1] / "golden/step/quantised.gguf"
    server = make_server(tmp_path / "file", model=str(model), settings=("chat_template=chatml",)).start()
    assert server.stop() == 0
    assert re.search(r"weights: [0-9]+ MB read in [0-9.]+ s, [0-9.]+ GB/s", server.log()), server.log()
    assert "[#" not in server.log() and "\r" not in server.log()


def test_restart_keeps(make_server):
    server = make_server().start()
    server.init("me/kept")
    assert server.feedback("me/kept")["version"] == 1
    later = server.chat("me/kept", "Hello again")
    after = server.text("me/kept", "What?")
    server.kill()
    server.start()
    assert server.versions("me/kept")["current"] == 1
    assert server.text("me/kept", "What?") == after
    # An answer of before the restart is still a handle for feedback.
    assert server.feedback("me/kept", response_id=later["id"])["version"] == 2


def test_port_in_use(make_server, tmp_path):
    server = make_server().start()
    port = server.url.rsplit(":", 1)[1]
    code, said = make_server(tmp_path / "other", model="no-such-model", arguments=["--listen", "127.0.0.1:" + port]).fail_to_start()
    assert code == 1 and f"127.0.0.1:{port} is in use by another program" in said  # said before a model is looked for


def test_data_that_cannot_be_written(tmp_path):
    for data, words in ((tmp_path / "file", "file"), ("/proc/claas", "/proc/claas")):
        (tmp_path / "file").write_text("", encoding="utf-8")
        done = subprocess.run([BINARY, "serve", "--data", str(data), "--listen", "127.0.0.1:0", "--model", "no-such-model"], capture_output=True,
                              text=True, timeout=30 * PATIENCE, check=False)
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("claas serve: data: ") and words in done.stderr, done


@pytest.mark.parametrize("arguments, status, words", [
    ([], 2, "no model"),
    (["--model", "/nonexistent.gguf"], 1, "/nonexistent.gguf"),
    (["--model", TINY, "--listen", "nonsense"], 2, "nonsense"),
    (["--model", TINY, "--listen", "0.0.0.0:0"], 2, "loopback"),
    (["--model", TINY, "--set", "cycle.stepz=3"], 2, "cycle.steps"),
    (["--model", TINY, "--set", "cycle.steps=many"], 2, "cycle.steps"),
    (["--model", TINY, "--set", "cycle.steps=-3"], 2, "cycle.steps"),
    (["--model", TINY, "--set", "log.level=loud"], 2, "log.level"),
    (["--model", TINY, "--device", "nope"], 2, "device.name"),
    (["--model", TINY, "--set", "cycle.forms=nope"], 2, "cycle.forms"),
    (["--model", TINY, "--set", "nonsense"], 64, "KEY=VALUE"),
    (["--nonsense"], 64, "--nonsense"),
    (["--model", TINY, "--role", "trainer", "--role", "sampler"], 64, "--role is given once"),
    (["--model", TINY, "--connect", "nonsense"], 2, "'nonsense' is not an address"),
    (["--model", TINY, "--connect", "tcp://127.0.0.1:1"], 2, "is not an address"),
    (["--model", TINY, "--connect", "ipc://"], 2, "is not an address"),
    (["--model", TINY, "--connect", "ipc:///" + 120 * "a"], 2, "at most 107 bytes"),
    (["--model", TINY, "--connect", "ipc:///tmp"], 2, "/tmp is not a socket"),
    (["--model", TINY, "--role", "trainr"], 2, "roles: 'trainr' is not bridge, storage, scheduler, trainer or sampler"),
    (["--model", TINY, "--set", "roles=trainer,samplerx"], 2, "'samplerx' is not"),
    (["--model", TINY, "--roles", ""], 2, "a process without any has nothing to do"),
    (["--model", TINY, "--config", "/nonexistent.yaml"], 2, "/nonexistent.yaml"),
    (["--model", TINY, "--chat-template", "nonsense"], 2, "nonsense"),
])
def test_refusals(tmp_path, arguments, status, words):
    done = subprocess.run([BINARY, "serve", "--data", str(tmp_path / "db"), "--listen", "127.0.0.1:0", *arguments], capture_output=True, text=True,
                          timeout=30 * PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert words in done.stderr


def test_config_file(make_server, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("cycle:\n  stepz: 2\n")
    code, said = make_server(settings=(), arguments=["--config", str(bad)]).fail_to_start()
    assert code == 2
    assert "bad.yaml:2:3" in said and "did you mean 'cycle.steps'" in said and "^" in said
    good = tmp_path / "good.yaml"
    good.write_text("cycle:\n  steps: 3\n  rows: 4\n  max_tokens: 8\nlog:\n  level: warning\n")
    server = make_server(settings=["cycle.max_tokens=4"], arguments=["--config", str(good)],
                         environment={"CLAAS_CYCLE_ROWS": "5"}).start()
    server.init("me/x")
    metadata = server.feedback("me/x")["distill_result"]["metadata"]
    assert len(metadata["steps"]) == 3 and metadata["batch_size"] == 5  # the file, over it the environment
    assert metadata["tokens_processed"] > 0


@pytest.mark.skipif(PATIENCE != 1, reason="sanitizers keep the signals of crashes to themselves")
def test_crashes_park_a_job(make_server):
    """A crash seen from inside is a strike for the job that ran; the third parks it. kill -9 is none."""
    server = make_server(settings=["cycle.steps=500", "cycle.rows=8", "log.level=warning"]).start()
    server.init("me/crash")
    job_id = server.feedback("me/crash", wait=False)["job_id"]
    server.wait_state(job_id, "training")
    server.kill()
    for strikes in (0, 1, 2):
        server.start()
        server.wait_state(job_id, "training")
        assert server.job(job_id)["strikes"] == strikes
        server.process.send_signal(signal.SIGSEGV)
        assert server.wait() == -signal.SIGSEGV
    server.start()
    job = server.job(job_id)
    assert job["state"] == "failed" and "crashed" in job["error"] and "signal 11" in job["error"]
    assert server.versions("me/crash")["current"] == 0
    assert server.stop() == 0
