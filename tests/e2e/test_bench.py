"""`claas bench`: that it measures something, and leaves nothing behind. How fast it is, tests/bench/table.py says."""
import json
import os
import signal
import subprocess
import time

import pytest

from server import BINARY, PATIENCE, TINY


def bench(*arguments, tmp):
    return subprocess.run([BINARY, "bench", *arguments, "--model", TINY, "--json"], env={**os.environ, "TMPDIR": str(tmp)},
                          capture_output=True, text=True, timeout=120 * PATIENCE, check=False)


def test_cycle(tmp_path):
    done = bench("cycle", "--steps", "3", "--rows", "4", "--tokens", "8", "--iters", "2", tmp=tmp_path)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert (line["bench"], line["steps"], line["rows"], line["rollout_tokens"], line["iterations"]) == ("cycle", 3, 4, 8, 2)
    assert 3 * 4 <= line["tokens"] <= 3 * 4 * 8 and line["published"] in (0, 1, 2)
    parts = [line[name + "_ms"] for name in ("rollout", "teacher", "train", "gate", "other")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(line["median_ms"], abs=0.01)
    assert line["min_ms"] <= line["median_ms"] and line["peak_bytes"] > 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_interrupted_cycle(tmp_path):
    with subprocess.Popen([BINARY, "bench", "cycle", "--model", TINY, "--steps", "1000", "--json"], stderr=subprocess.PIPE,
                          env={**os.environ, "TMPDIR": str(tmp_path)}, text=True) as process:
        deadline = time.monotonic() + 60 * PATIENCE
        while not list(tmp_path.glob("*/adapters/bench/cycle-0/*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == 1 and "interrupted" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["step", "cycle"])
def test_unknown_device(tmp_path, verb):
    done = bench(verb, "--device", "abacus", tmp=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "abacus" in done.stderr
    assert list(tmp_path.iterdir()) == []
