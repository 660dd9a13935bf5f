"""`claas bench`: that it measures something, and leaves nothing behind. How fast it is, tests/bench/table.py says."""
import json
import os
import pathlib
import signal
import subprocess
import time

import pytest

from server import BINARY, PATIENCE, TINY


QUANTISED = pathlib.Path(__file__).resolve().parents[1] / "golden" / "step" / "quantised.gguf"
FIGURES = {"bench", "model", "device", "gflop_s", "gemm_peak_gflop_s", "share_of_peak", "read_gb_s", "memory_gb_s", "share_of_bandwidth",
           "peak_bytes", "weights_bytes", "kv_bytes", "adapters_bytes", "workspace_bytes", "memory"}


def bench(*arguments, tmp, model=TINY):
    return subprocess.run([BINARY, "bench", *arguments, "--model", model, "--json"], env={**os.environ, "TMPDIR": str(tmp)},
                          capture_output=True, text=True, timeout=120 * PATIENCE, check=False)


def lines_of(done):
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for line in lines:
        assert FIGURES <= set(line), FIGURES - set(line)
        parts = [line[part + "_bytes"] for part in ("weights", "kv", "adapters", "workspace")]
        assert sum(parts) <= sum(line["memory"].values()) and "keys and values" in line["memory"], line
        assert sum(parts) <= line["peak_bytes"]
        if line["device"].startswith("cpu"):
            assert line["peak_bytes"] < 256 << 20  # without what measuring the machine takes
        for rate, most, share in (("gflop_s", "gemm_peak_gflop_s", "share_of_peak"), ("read_gb_s", "memory_gb_s", "share_of_bandwidth")):
            assert line[rate] > 0 and line[share] == pytest.approx(line[rate] / line[most], rel=1e-3), (share, line)
    return lines


def test_cycle(tmp_path):
    done = bench("cycle", "--steps", "3", "--rows", "4", "--tokens", "8", "--iters", "2", tmp=tmp_path)
    line, = lines_of(done)
    assert (line["bench"], line["steps"], line["rows"], line["rollout_tokens"], line["iterations"]) == ("cycle", 3, 4, 8, 2)
    assert 3 * 4 <= line["tokens"] <= 3 * 4 * 8 and line["published"] in (0, 1, 2)
    parts = [line[name + "_ms"] for name in ("rollout", "teacher", "train", "gate", "other")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(line["median_ms"], abs=0.01)
    assert line["min_ms"] <= line["median_ms"] and line["peak_bytes"] > 1 << 20
    assert list(tmp_path.iterdir()) == []


def test_cycle_with_template(tmp_path):
    """A file without one: the error names the option, and the option is there."""
    done = bench("cycle", "--steps", "2", "--rows", "2", "--tokens", "4", "--iters", "1", tmp=tmp_path, model=QUANTISED)
    assert done.returncode == 1 and "--chat-template" in done.stderr
    done = bench("cycle", "--chat-template", "chatml", "--steps", "2", "--rows", "2", "--tokens", "4", "--iters", "1", tmp=tmp_path, model=QUANTISED)
    assert lines_of(done)[0]["steps"] == 2


def test_step(tmp_path):
    line, = lines_of(bench("step", "--batch", "2", "--prompt", "8", "--response", "8", "--hint", "4", "--iters", "2", tmp=tmp_path))
    assert line["bench"] == "step" and line["loss"] > 0 and line["min_ms"] <= line["median_ms"]


def test_decode(tmp_path):
    lines = lines_of(bench("decode", "--batch", "1,4", "--adapters", "2", "--prompt", "8", "--tokens", "32", "--iters", "2", tmp=tmp_path))
    assert [(line["batch"], line["adapters"]) for line in lines] == [(1, 1), (4, 2)]
    for line in lines:
        assert line["tok_s"] * line["median_gap_ms"] / 1000 < 8 * line["batch"], line


def test_prefill(tmp_path):
    """A file without a chat template: nothing is rendered."""
    lines = lines_of(bench("prefill", "--prompt", "32,64", "--chunk", "32", "--iters", "2", tmp=tmp_path, model=QUANTISED))
    assert [line["prompt"] for line in lines] == [32, 64]
    read = [line["read_gb_s"] * line["median_ms"] for line in lines]  # MB: two passes over the layers instead of one
    assert 1 < read[1] / read[0] < 2, lines


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
def test_no_such_model(tmp_path, verb):
    done = bench(verb, tmp=tmp_path, model="model.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no file or directory model.gguf here, and no random model 'model.gguf' (tiny-llama, " in done.stderr, done.stderr
    done = bench(verb, tmp=tmp_path, model=".")
    assert done.returncode == 1 and "no config.json in this directory" in done.stderr and "no file or" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["step", "cycle"])
def test_unknown_device(tmp_path, verb):
    done = bench(verb, "--device", "abacus", tmp=tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "abacus" in done.stderr
    assert list(tmp_path.iterdir()) == []
