"""Save, restart, continue = never stopped, bit for bit: what two servers publish after the same chats and feedback.

One learns from two feedbacks in one life; the other is ended between them and started again on its directory, by SIGTERM or
by kill -9. Weights and moments of every version must be the same bytes: the moments, the replayed rollouts and the standing
feedback all come back from disk as they were.
"""
import hashlib
import pathlib

import pytest

# Random choices of a cycle come from cycle.seed, not from the job's random id. Enough rows for replay to have a share.
SETTINGS = ("cycle.steps=4", "cycle.rows=6", "cycle.max_tokens=8", "cycle.seed=11", "log.level=warning", "log.format=text")
NAME = "e2e/continue"
LESSONS = (("What is your name?", "Your name is Kuro.", 5), ("Tell me about rain.", "Shorter, please.", 6))
FILES = ("adapter_model.safetensors", "optimizer.safetensors")


def teach(server, lesson):
    """One chat and feedback on it; what was learned from and the version."""
    question, words, seed = lesson
    answer = server.chat(NAME, question, seed=seed, temperature=0.7)
    reply = server.feedback(NAME, words, answer["id"])
    assert reply["status"] == "ok", reply
    return answer["choices"][0]["message"]["content"], reply["version"]


def published(data, version, name=NAME):
    """Digests of a version's files, after a look at what is in them."""
    directory = pathlib.Path(data) / "adapters" / name / f"v{version:06d}"
    contents = [(directory / file).read_bytes() for file in FILES]
    assert all(len(content) > 1000 for content in contents)
    return [hashlib.sha256(content).hexdigest() for content in contents]


def learn(make_server, data, end):
    """Both lessons, with an end of the process between them or not: the answers, and both versions' files."""
    server = make_server(data, settings=SETTINGS).start()
    server.init(NAME)
    first, version = teach(server, LESSONS[0])
    files = [published(data, version)]
    if end == "term":
        assert server.stop() == 0, server.log()
    elif end == "kill":
        server.kill()
    if end:
        server.start()
    second, version = teach(server, LESSONS[1])
    files.append(published(data, version))
    assert server.stop() == 0, server.log()
    return (first, second), files


@pytest.mark.parametrize("end", ["term", "kill"])
def test_a_restart_changes_no_bit(make_server, tmp_path, end):
    answers, whole = learn(make_server, tmp_path / "whole", None)
    again, resumed = learn(make_server, tmp_path / "resumed", end)
    assert again == answers
    assert resumed[0] == whole[0], "two servers differ before any restart"
    assert resumed[1] == whole[1], "the restart changed what was learned"
    assert all(before != after for before, after in zip(*whole)), "the second feedback changed nothing"


def test_the_comparison_can_fail(make_server, tmp_path):
    """Another seed of the cycle gives other bytes, so equal bytes mean something."""
    _, whole = learn(make_server, tmp_path / "whole", None)
    server = make_server(tmp_path / "other", settings=[*SETTINGS, "cycle.seed=12"]).start()
    server.init(NAME)
    _, version = teach(server, LESSONS[0])
    assert published(tmp_path / "other", version) != whole[0]
