"""Conversations that fill the context: neither the user's recent ones nor earlier feedback nor a long list of standing
feedback may spoil the learning of new feedback."""
import pytest

from server import FAST, serving

CONTEXT = 2048  # of the tiny model; its tokenizer takes a byte for a token
LONG = "word " * ((CONTEXT - 120) // 5)
ROWS = FAST + ("cycle.rows=8", "cycle.other_share=0.25", "cycle.forms=list,hindsight")


@pytest.fixture(scope="module")
def server():
    with serving(settings=ROWS) as running:
        yield running


def test_a_long_recent_conversation(server):
    server.init("long/recent")
    server.chat("long/recent", LONG, max_tokens=4)
    assert server.feedback("long/recent", response_id=server.chat("long/recent")["id"])["version"] == 1


def test_long_feedback_is_learnt_or_says_why(server):
    """A conversation that only just holds its feedback is trained with short rollouts; then it is earlier feedback."""
    server.init("long/replay")
    answer = server.chat("long/replay", LONG, max_tokens=4)
    job = server.job(server.feedback("long/replay", "No.", answer["id"], wait=False)["job_id"])
    server.wait_state(job["job_id"])
    job = server.job(job["job_id"])
    assert job["state"] == "done" or "context" in job["error"], job
    reply = server.feedback("long/replay", response_id=server.chat("long/replay")["id"])
    assert reply["status"] == "ok"


def test_a_long_list_of_standing_feedback(server):
    server.init("long/list")
    for i in range(4):
        answer = server.chat("long/list", f"question {i}", max_tokens=4)
        assert server.feedback("long/list", f"{i}: " + "please, " * 80, answer["id"])["version"] == i + 1


def test_too_long_alone_is_nobody_elses_failure(server):
    """The feedback itself does not fit: its job fails with a sentence, and the others of the cycle are learnt."""
    server.init("long/mixed")
    long_one = server.chat("long/mixed", LONG, max_tokens=4)["id"]
    short = server.chat("long/mixed")["id"]
    jobs = [server.feedback("long/mixed", text, answer, wait=False)["job_id"]
            for text, answer in (("First.", short), ("No, " * 200, long_one), ("Second.", short))]
    server.wait_jobs(jobs)
    assert [server.job(job)["state"] for job in jobs] == ["done", "failed", "done"]
    assert "context" in server.job(jobs[1])["error"]
