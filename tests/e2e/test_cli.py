"""The command line tool: verbs against a running server, help, wrong usage."""
import json
import re
import subprocess
import zipfile

import pytest

from server import ROOT, TINY


def test_help(claas):
    top = claas("--help")
    assert top.returncode == 0 and top.stderr == ""
    verbs = re.findall(r"^  (\w+) ", top.stdout, re.M)
    assert verbs == ["serve", "chat", "feedback", "jobs", "lora", "model", "bench", "gpu", "health", "version"]
    for verb in verbs:
        for arguments in (("help", verb), (verb, "--help")):
            done = claas(*arguments)
            assert done.returncode == 0 and done.stdout.lower().startswith(f"usage: claas {verb}"), done
    assert claas("help", "--help").stdout == top.stdout
    assert claas("help", "lora", "--help").stdout == claas("lora", "--help").stdout != ""
    below = claas("help", "lora", "rollback")
    assert below.returncode == 0 and below.stdout.startswith("Usage: claas lora rollback")


@pytest.mark.parametrize("arguments, words", [
    ([], "Usage: claas VERB"),
    (["srve"], "The most similar verb is\n\tserve"),
    (["lora", "shw"], "The most similar verb is\n\tshow"),
    (["lora"], "Usage: claas lora VERB"),
    (["zzzzzz"], "'zzzzzz' is not a claas verb"),
    (["lora", "show"], "missing argument: USER/NAME"),
    (["lora", "show", "a", "b"], "unexpected argument 'b'"),
    (["lora", "rollback", "a", "x"], "no whole number"),
    (["chat", "--temperature", "hot"], "no number from 0 to 2"),
    (["jobs", "list", "--limit", "0"], "no whole number from 1"),
    (["feedback", "words"], "--response-id is missing"),
    (["lora", "list", "--nonsense"], "--nonsense"),
])
def test_wrong_usage(claas, arguments, words):
    done = claas(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert words in done.stderr


def test_version(claas):
    assert re.fullmatch(r"claas \d+\.\d+\.\d+ \(protocol \d+\)\n", claas("version").stdout)
    assert claas("--version").stdout == claas("version").stdout
    assert set(json.loads(claas("version", "--json").stdout)) == {"version", "protocol"}


def test_no_server(claas):
    done = claas("health", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "no server at http://127.0.0.1:9" in done.stderr
    for nonsense in ("nonsense", "http://", "https:///", "http://:80"):
        done = claas("health", "--url", nonsense)
        assert done.returncode == 1 and f"'{nonsense}' is no address like http://" in done.stderr


@pytest.mark.parametrize("arguments, status, words", [
    (["--listen"], 64, "tools/quickstart [--once]"),
    (["--once", "--claas"], 64, "tools/quickstart [--once]"),
    (["--model"], 64, "tools/quickstart [--once]"),
    (["--nonsense"], 64, "tools/quickstart [--once]"),
    (["--model", "/nope"], 1, "there is no /nope\n"),
    (["--claas", "/nope/claas"], 1, "there is no /nope/claas\n"),
])
def test_quickstart_refusals(arguments, status, words):
    done = subprocess.run([ROOT / "tools" / "quickstart", *arguments], capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (status, "") and words in done.stderr, done


def test_gpu(claas, server):
    """Here without a card: one line says so, and what the server holds is shown all the same."""
    server.init("gpu/one")
    server.feedback("gpu/one")
    server.chat("gpu/one")
    done = claas("gpu")
    has_card = done.returncode == 0
    assert has_card or (done.returncode == 1 and done.stderr.count("\n") == 1 and "CUDA" in done.stderr), done
    assert re.search(r"the model's weights +\d", done.stdout) and re.search(r"gpu/one@1 +serve +\d+", done.stdout), done.stdout
    body = json.loads(claas("gpu", "--json").stdout)
    assert bool(body["cards"]) == has_card
    assert body["device"]["bytes_weights"] > 0
    parts = ("weights", "kv", "adapters", "workspace")
    assert sum(body["device"]["memory"].values()) >= sum(body["device"]["bytes_" + part] for part in parts)
    assert (body["driver"], body["runtime"]) == (None, None) or has_card
    assert sum(body["device"]["memory"].values()) <= body["device"]["bytes_peak"]
    resident = {adapter["name"]: adapter for adapter in body["device"]["adapters"]}
    assert resident["gpu/one@1"]["use"] == "serve" and 0 < resident["gpu/one@1"]["bytes"] <= body["device"]["bytes_adapters"]
    alone = claas("gpu", "--json", "--url", "http://127.0.0.1:9")
    assert json.loads(alone.stdout)["device"] is None
    assert alone.returncode == 1 and "no server at http://127.0.0.1:9" in alone.stderr, alone
    unnamed = claas("gpu", "--json", url="http://127.0.0.1:9")
    assert json.loads(unnamed.stdout)["device"] is None
    assert (unnamed.returncode == 0) == has_card and "no server" not in unnamed.stderr, unnamed


def test_health(claas):
    done = claas("health")
    assert done.returncode == 0 and "healthy" in done.stdout
    assert json.loads(claas("health", "--json").stdout)["status"] == "healthy"


def test_chat_once(claas, tmp_path):
    saved = tmp_path / "id"
    done = claas("chat", "--adapter", "cli/once", "--once", "Hello", "--seed", "1", "--max-tokens", "8", "--save-id", str(saved))
    assert done.returncode == 0 and done.stdout.endswith("\n")
    again = claas("chat", "--adapter", "cli/once", "--once", "Hello", "--seed", "1", "--max-tokens", "8")
    assert again.stdout == done.stdout
    feedback = claas("feedback", "--adapter", "cli/once", "--response-id", saved.read_text(), "Be brief.")
    assert feedback.returncode == 0 and "cli/once is at version 1 now" in feedback.stdout
    assert feedback.stderr == ""  # no progress bar without a terminal
    missing = claas("feedback", "--adapter", "cli/once", "--response-id", "nope", "Be brief.")
    assert missing.returncode == 1 and "nope" in missing.stderr


def test_chat_loop(claas):
    lines = ["Hello", "/bad Be brief.", "/versions", "/feedback", "/withdraw", "/undo", "/again", "/new", "//slash", "/quit"]
    done = claas("chat", "--adapter", "cli/loop", "--max-tokens", "6", "--seed", "1", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    for words in ("cli/loop is at version 1 now", "VERSION PARENT", "Be brief.", "withdrawn", "version 0 again"):
        assert words in done.stdout
    wrong = claas("chat", "--adapter", "cli/loop", stdin="/bad x\n/nope\n/undo\n")
    assert wrong.returncode == 1
    assert "there is no answer yet" in wrong.stderr and "'/nope' is no command" in wrong.stderr
    base = claas("chat", "--adapter", "base", "--max-tokens", "4", stdin="Hello\n/bad x\n")
    assert base.returncode == 1 and "learns nothing" in base.stderr


def test_lora(claas, tmp_path):
    target = str(tmp_path / "adapter.zip")
    assert claas("lora", "init", "cli/one", "--rank", "8", "--alpha", "16").returncode == 0
    again = claas("lora", "init", "cli/one")
    assert again.returncode == 1 and "exists" in again.stderr
    listed = json.loads(claas("lora", "list", "--json").stdout)["adapters"]
    assert {"lora_id": "cli/one", "current": 0, "versions": 1, "rank": 8, "alpha": 16}.items() <= \
        next(entry for entry in listed if entry["lora_id"] == "cli/one").items()
    assert "cli/one" in claas("lora", "list", "cli").stdout
    assert json.loads(claas("lora", "list", "nobody", "--json").stdout) == {"adapters": []}
    shown = json.loads(claas("lora", "show", "cli/one", "--json").stdout)
    assert shown["current"] == 0 and shown["feedback"] == []
    assert claas("lora", "export", "cli/one", target).returncode == 0
    assert "adapter_config.json" in zipfile.ZipFile(target).namelist()
    assert claas("lora", "export", "cli/one", target, "--optimizer").returncode == 0
    assert "optimizer.safetensors" in zipfile.ZipFile(target).namelist()
    assert claas("lora", "import", "cli/copy", target).returncode == 0
    assert claas("lora", "import", "cli/copy", __file__).returncode == 1
    assert claas("lora", "rollback", "cli/one").returncode == 1  # nothing to undo
    assert claas("lora", "rollback", "cli/one", "0").returncode == 0
    assert claas("lora", "delete", "cli/copy").returncode == 0
    assert claas("lora", "delete", "cli/copy").returncode == 1


def test_jobs(claas, server, adapter):
    answer = server.chat(adapter, "Hello")
    sent = claas("feedback", "--adapter", adapter, "--response-id", answer["id"], "--no-wait", "Be brief.")
    job_id = sent.stdout.strip()
    watched = claas("jobs", "watch", job_id)
    assert watched.returncode == 0 and "version 1" in watched.stdout
    events = [json.loads(line) for line in claas("jobs", "watch", job_id, "--json").stdout.splitlines()]
    assert events[-1]["state"] == "done" and sum(event.get("kind") == "step" for event in events) == 2
    assert json.loads(claas("jobs", "show", job_id, "--json").stdout)["job_id"] == job_id
    assert "Be brief." in claas("jobs", "show", job_id).stdout
    rows = json.loads(claas("jobs", "list", "--adapter", adapter, "--json").stdout)["jobs"]
    assert [row["job_id"] for row in rows] == [job_id]
    assert claas("jobs", "cancel", job_id).returncode == 1
    assert claas("jobs", "show", "job-none").returncode == 1


def test_model(claas, tmp_path):
    shown = json.loads(claas("model", "show", TINY, "--json").stdout)
    assert shown["family"] == "llama" and shown["shape"]["layers"] > 0 and len(shown["fingerprint"]) == 16
    assert "tiny-llama" in claas("model", "show", TINY).stdout
    assert claas("model", "show", str(tmp_path)).returncode == 1
    settings = tmp_path / "settings.yaml"
    measured = json.loads(claas("model", "calibrate", TINY, "--samples", "1", "--json", "--write", str(settings)).stdout)
    assert len(measured["forms"]) == 7 and measured["settings"]["cycle.forms"]
    assert settings.read_text().count("\n") == 5
