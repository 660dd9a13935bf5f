"""Conversations that fill the context: neither the user's recent ones nor earlier feedback nor a long list of standing
feedback may spoil the learning of new feedback."""
import contextlib
import json
import os
import sqlite3

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


def copy_row(database, table, **changes):
    """The first row of the table once more, with these columns changed."""
    database.row_factory = sqlite3.Row
    row = dict(database.execute(f"SELECT * FROM {table} ORDER BY 1 LIMIT 1").fetchone(), **changes)
    database.execute(f"INSERT INTO {table}({','.join(row)}) VALUES({','.join('?' * len(row))})", list(row.values()))


def test_more_earlier_feedback_than_a_message_holds(tmp_path):
    """The newest of it is replayed; the adapter learns on."""
    with serving(tmp_path / "db") as server:
        server.init("long/much")
        assert server.feedback("long/much")["version"] == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "db" / "claas.db")) as database:
        for i in range(63):
            messages = json.dumps([{"role": "user", "content": "w " * 300000 + str(i)}])
            copy_row(database, "rollouts", seq=5000 + i, response_id=f"r{i}", messages=messages, conversation=os.urandom(32), kept=1)
            copy_row(database, "rollout_choices", rollout=5000 + i)
            copy_row(database, "feedback", seq=5000 + i, id=f"fb-{i:012x}", rollout=5000 + i)
        database.commit()
    with serving(tmp_path / "db") as server:
        assert server.feedback("long/much")["version"] == 2
