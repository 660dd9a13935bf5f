"""Several adapters learn at the same time (trainer.jobs): their cycles overlap, and what each publishes is bit for bit what it
publishes when they learn one after the other.
"""
import os

import pytest

from server import PATIENCE, TINY
from test_continue import published

SETTINGS = ("cycle.steps=6", "cycle.rows=6", "cycle.max_tokens=24", "cycle.seed=11", "log.level=warning", "log.format=text")
NAMES = ("t/one", "t/two", "t/three")
LESSONS = ("Your name is Kuro.", "Shorter, please.")


def span(job):
    """When it was in a cycle: from its training to its end."""
    times = {transition["state"]: transition["time"] for transition in job["transitions"]}
    return times["training"], times["done"]


def overlap(jobs):
    """How many were in a cycle at the same time, at most."""
    spans = [span(job) for job in jobs]
    return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)


def learn(make_server, data, model, jobs, settings=SETTINGS):
    """Each adapter gets its lessons one by one, all adapters at once: the ended jobs of each lesson, the versions' files."""
    server = make_server(data, model=model, settings=[*settings, f"trainer.jobs={jobs}"]).start()
    ended, files = [], []
    for name in NAMES:
        server.init(name)
    for number, words in enumerate(LESSONS):
        answers = {name: server.chat(name, f"What is your name, {name}?", seed=5, temperature=0.7, max_tokens=16)["id"] for name in NAMES}
        sent = [server.feedback(name, words, answers[name], wait=False)["job_id"] for name in NAMES]
        found = server.wait_jobs(sent)
        ended.append([found[job] for job in sent])
        assert [job["state"] for job in ended[-1]] == ["done"] * len(NAMES), ended[-1]
        assert [job["version"] for job in ended[-1]] == [number + 1] * len(NAMES)
        assert [server.versions(name)["current"] for name in NAMES] == [number + 1] * len(NAMES)
        files.append([published(data, number + 1, name) for name in NAMES])
    assert server.stop() == 0, server.log()
    return ended, files


def check(make_server, tmp_path, model, **more):
    ended, together = learn(make_server, tmp_path / "together", model, 3, **more)
    alone, one_by_one = learn(make_server, tmp_path / "alone", model, 1, **more)
    assert all(overlap(jobs) == 1 for jobs in alone), [[span(job) for job in jobs] for jobs in alone]
    # The first cycle of all begins alone only if it has measured the base before the others come.
    assert max(overlap(jobs) for jobs in ended) == 3, [[span(job) for job in jobs] for jobs in ended]
    assert together == one_by_one


def test_same_bits_together(make_server, tmp_path):
    check(make_server, tmp_path, TINY)


def test_same_bits_together_for_real(make_server, tmp_path):
    model = os.environ.get("CLAAS_TEST_MODEL")
    if not model or PATIENCE != 1:
        pytest.skip("CLAAS_TEST_MODEL is not set, or a sanitizer would take minutes")
    check(make_server, tmp_path, model, settings=("cycle.steps=1", "cycle.rows=4", "cycle.max_tokens=16", "cycle.seed=11"))


def test_one_is_cancelled_beside_the_others(make_server):
    server = make_server(settings=[*SETTINGS, "trainer.jobs=3", "cycle.steps=500"]).start()
    for name in NAMES:
        server.init(name)
    jobs = [server.feedback(name, wait=False)["job_id"] for name in NAMES]
    for job in jobs:
        server.wait_state(job, "training")
    assert server.call("DELETE", "/v1/jobs/" + jobs[1])["cancelled"]
    assert server.job(jobs[1])["state"] == "cancelled"
    assert [server.job(job)["state"] for job in (jobs[0], jobs[2])] == ["training"] * 2
    assert server.text(NAMES[0])  # chat goes on beside them
    for job in jobs:
        server.request("DELETE", "/v1/jobs/" + job)
    assert server.stop() == 0, server.log()
