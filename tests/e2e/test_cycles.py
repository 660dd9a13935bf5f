"""What happens around learning cycles: jobs taken together, many adapters, the gate, and what is done to an adapter meanwhile."""
import json

import pytest

from server import FAST, ends_of, in_parallel, serving

LONG = FAST + ("cycle.steps=60", "cycle.rows=8", "cycle.max_tokens=32")


@pytest.fixture(scope="module")
def slow_server():
    """Cycles take about a second: long enough to do something meanwhile."""
    with serving(settings=LONG) as running:
        yield running


def start_cycle(server, name):
    """A job that is training now."""
    job = server.feedback(name, wait=False)["job_id"]
    server.wait_state(job, "training")
    return job


# --- names ---

@pytest.mark.parametrize("form", ["{}", "{}-init", "{}-latest", "{}@0", "/{}/"])
def test_feedback_on_every_name(server, adapter, form):
    name = form.format(adapter)
    answer = server.chat(adapter)
    reply = server.feedback(name, response_id=answer["id"])
    assert reply["lora_id"] == adapter and reply["version"] == 1
    if form != "{}@0" and not form.startswith("/"):
        assert server.feedback(name, response_id=server.chat(name)["id"])["version"] == 2


def test_names_that_look_alike(server):
    """Prefixes are whole segments; -init is a form, not a part of the name."""
    for name in ("u1/a", "u10/a", "u1/a-b"):
        server.init(name, overwrite=True)
    listed = server.call("GET", "/v1/lora?prefix=u1")["loras"]
    assert all(name.startswith("u1/") for name in listed) and "u1/a" in listed
    assert server.feedback("u1/a")["version"] == 1
    assert server.versions("u10/a")["current"] == 0 and server.versions("u1/a-b")["current"] == 0
    assert server.request("POST", "/v1/lora/init", {"lora_id": "u1/a-init"}).status == 409


def test_answers_of_the_base_teach_any_adapter(server, adapter):
    answer = server.chat("base", "hello")
    assert server.feedback(adapter, response_id=answer["id"])["version"] == 1


# --- together and in turns ---

def test_waiting_feedback_is_taken_together(slow_server):
    server = slow_server
    server.init("t/one")
    first = start_cycle(server, "t/one")
    answers = [server.chat("t/one", f"question {i}")["id"] for i in range(5)]
    jobs = [server.feedback("t/one", f"feedback {i}", answer, wait=False)["job_id"] for i, answer in enumerate(answers)]
    waited = server.feedback("t/one", "feedback 5", answers[0])
    ended = server.wait_jobs([first] + jobs)
    assert {ended[job]["version"] for job in jobs} == {waited["version"]}
    assert ended[first]["version"] == waited["version"] - 1
    standing = server.call("GET", "/v1/lora/feedback?lora_id=t/one")["feedback"]
    assert [entry["text"] for entry in standing] == ["Say it better."] + [f"feedback {i}" for i in range(6)]


def test_two_at_once(server, adapter):
    """Concurrent clients: each waits for its version; versions have no holes."""
    answer = server.chat(adapter)["id"]
    replies = in_parallel([lambda: server.feedback(adapter, response_id=answer) for _ in range(8)])
    versions = {reply["version"] for reply in replies}
    current = server.versions(adapter)["current"]
    assert versions == set(range(1, current + 1))


def test_different_training_is_not_mixed(slow_server):
    server = slow_server
    server.init("t/two")
    start_cycle(server, "t/two")
    answer = server.chat("t/two")["id"]
    plain = server.feedback("t/two", response_id=answer, wait=False)["job_id"]
    own = server.feedback("t/two", response_id=answer, wait=False, training={"learning_rate": 1e-4})["job_id"]
    ended = server.wait_jobs([plain, own])
    assert ended[plain]["version"] != ended[own]["version"]
    assert len(ended[own]["result"]["steps"]) == 1


def test_fair_between_adapters(slow_server):
    """One adapter's long queue does not make another wait for all of it."""
    server = slow_server
    for name in ("f/busy", "f/rare"):
        server.init(name)
    start_cycle(server, "f/busy")
    answer = server.chat("f/busy")["id"]
    busy = [server.feedback("f/busy", response_id=answer, wait=False, training={"steps": 20, "alpha": i / 10})["job_id"] for i in range(5)]
    rare = server.feedback("f/rare")
    assert rare["version"] == 1
    assert sum(server.job(job)["state"] == "done" for job in busy) <= 2
    server.wait_jobs(busy)


def test_many_adapters(server):
    """More than the device keeps: each answers with its own version, in any order, also at the same time."""
    names = [f"many/{i}" for i in range(12)]
    for name in names:
        server.init(name)
    answers = {name: server.chat(name)["id"] for name in names}
    jobs = [server.feedback(name, f"Say {name}.", answers[name], wait=False, training={"learning_rate": 1e-3, "steps": 3})["job_id"] for name in names]
    ended = server.wait_jobs(jobs)
    assert all(ends_of(job)[0] in ("done", "rejected") for job in ended.values())
    alone = {name: server.text(name, "Who?") for name in names}
    together = in_parallel([lambda name=name: server.text(name, "Who?") for name in names for _ in range(2)])
    assert together == [alone[name] for name in names for _ in range(2)]


def test_few_versions_of_an_adapter(make_server):
    """The device keeps two of each; every version answers as itself all the same."""
    server = make_server().start()
    server.init("few/versions")

    def resident():
        return server.health()["model"]["device"]["bytes_adapters"]

    def ask(version):
        answer = server.chat(f"few/versions@{version}", "Who?", temperature=0, logprobs=True)
        return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]

    answers = {}
    for version in (1, 2, 3):
        assert server.feedback("few/versions", training={"learning_rate": 1e-3, "steps": 2})["version"] == version
        answers[version] = ask(version)
    assert len({tuple(answer) for answer in answers.values()}) == 3
    assert server.stop() == 0
    server.start()  # without a cycle's adapter
    assert ask(1) == answers[1]
    one = server.wait_until(resident)
    for version in (2, 3, 3, 1, 2):
        assert ask(version) == answers[version]
        server.wait_until(lambda: resident() == 2 * one, what="two versions on the device")
    assert server.stop() == 0


# --- the gate ---

def test_rejected(tmp_path):
    with serving(tmp_path / "db", settings=FAST + ("gate.kl_max=0",)) as server:
        server.init("a/one")
        before = server.text("a/one")
        reply = server.feedback("a/one")
        assert reply["status"] == "rejected" and reply["version"] is None and reply["distill_result"] is None
        assert "KL to base" in reply["reason"]
        job = server.job(reply["job_id"])
        assert ends_of(job) == ["rejected"] and job["reason"] == reply["reason"]
        assert server.versions("a/one")["current"] == 0 and server.text("a/one") == before
        assert server.call("GET", "/v1/lora/feedback?lora_id=a/one")["feedback"] == []


@pytest.mark.parametrize("training", [{"learning_rate": 1e30}, {"learning_rate": 1e30, "steps": 4}, {"learning_rate": 1e38}])
def test_rates_that_break_an_adapter(server, adapter, training):
    """Refused by the gate; and what the broken candidate left on the device harms nobody."""
    before = server.text("base", "Who are you, and what is it that you do all day?")
    reply = server.feedback(adapter, training=training)
    assert reply["status"] == "rejected", reply
    assert server.versions(adapter)["current"] == 0
    assert in_parallel([lambda: server.text("base", "Who are you, and what is it that you do all day?") for _ in range(4)]) == [before] * 4
    assert server.feedback(adapter)["version"] == 1


# --- meanwhile ---

def test_rollback_during_a_cycle(slow_server):
    """The cycle begins anew on what is current then."""
    server = slow_server
    server.init("m/roll")
    server.feedback("m/roll", training={"steps": 2})
    job = start_cycle(server, "m/roll")
    server.call("POST", "/v1/lora/rollback", {"lora_id": "m/roll", "version": 0})
    ended = server.wait_state(job)
    assert ends_of(ended) == ["done"]
    entry = next(v for v in server.versions("m/roll")["versions"] if v["version"] == ended["version"])
    assert entry["parent"] == 0


def test_delete_during_a_cycle(slow_server):
    server = slow_server
    server.init("m/gone")
    job = start_cycle(server, "m/gone")
    answer = server.chat("m/gone")["id"]
    queued = server.feedback("m/gone", response_id=answer, wait=False)["job_id"]
    assert server.call("DELETE", "/v1/lora?lora_id=m/gone") == {"deleted": True}
    for name in (job, queued):
        assert ends_of(server.wait_state(name))[0] in ("failed", "cancelled")
    assert server.request("GET", "/v1/lora/versions?lora_id=m/gone").status == 404
    server.init("m/gone")  # the name is free, and nothing of the old one comes back
    assert server.versions("m/gone")["current"] == 0
    assert server.call("GET", "/v1/lora/feedback?lora_id=m/gone")["feedback"] == []
    assert server.request("POST", "/v1/feedback", {"lora_id": "m/gone", "response_id": answer, "feedback": "x"}).status in (202, 200, 404)


def test_overwrite_during_a_cycle(slow_server):
    server = slow_server
    server.init("m/over")
    job = start_cycle(server, "m/over")
    server.init("m/over", overwrite=True)
    assert ends_of(server.wait_state(job))[0] in ("done", "failed", "cancelled")
    assert server.text("m/over")
    server.feedback("m/over", training={"steps": 1})


def test_cancel_while_training(slow_server):
    """The others of the same cycle are trained without it."""
    server = slow_server
    server.init("m/cancel")
    first = start_cycle(server, "m/cancel")
    answer = server.chat("m/cancel")["id"]
    jobs = [server.feedback("m/cancel", f"feedback {i}", answer, wait=False)["job_id"] for i in range(3)]
    server.call("DELETE", "/v1/jobs/" + first)
    assert ends_of(server.wait_state(first)) == ["cancelled"]
    server.wait_state(jobs[1], "training")
    assert server.call("DELETE", "/v1/jobs/" + jobs[1])["cancelled"]
    ended = server.wait_jobs(jobs)
    assert [ends_of(ended[job]) for job in jobs] == [["done"], ["cancelled"], ["done"]]
    assert ended[jobs[0]]["version"] == ended[jobs[2]]["version"] == 1
    standing = server.call("GET", "/v1/lora/feedback?lora_id=m/cancel")["feedback"]
    assert [entry["text"] for entry in standing] == ["feedback 0", "feedback 2"]
    assert server.call("DELETE", "/v1/jobs/" + jobs[0])["cancelled"] is False


def test_waiting_client_of_a_cancelled_job(slow_server):
    server = slow_server
    server.init("m/wait")
    answer = server.chat("m/wait")["id"]

    def wait():
        return server.request("POST", "/v1/feedback", {"lora_id": "m/wait", "response_id": answer, "feedback": "x"})

    def cancel():
        job = server.wait_until(lambda: next((j for j in server.call("GET", "/v1/jobs?lora_id=m/wait")["jobs"] if j["state"] == "training"), None))
        return server.call("DELETE", "/v1/jobs/" + job["job_id"])

    waited, cancelled = in_parallel([wait, cancel])
    assert cancelled["cancelled"] and waited.status == 409 and waited.json["job_id"] == cancelled["job"]["job_id"]


def test_waiting_client_of_a_deleted_adapter(slow_server):
    """It gets its answer at once, not when the cycle of somebody else ends."""
    server = slow_server
    for name in ("m/busy", "m/leaves"):
        server.init(name)
    answers = [server.chat("m/leaves")["id"] for _ in range(2)]
    busy = start_cycle(server, "m/busy")

    def wait():
        return server.request("POST", "/v1/feedback", {"lora_id": "m/leaves", "response_id": answers[0], "feedback": "x"})

    def delete():
        server.wait_until(lambda: server.call("GET", "/v1/jobs?lora_id=m/leaves")["jobs"])
        server.call("DELETE", "/v1/lora?lora_id=m/leaves")

    waited, _ = in_parallel([wait, delete])
    assert waited.status == 409, waited
    assert server.job(busy)["state"] == "training"
    server.call("DELETE", "/v1/jobs/" + busy)


def test_chat_goes_on_while_training(slow_server):
    """Streams and short chats beside a cycle; a version that comes meanwhile is used by the next chat."""
    server = slow_server
    server.init("m/chat")
    job = start_cycle(server, "m/chat")
    texts = []
    while server.job(job)["state"] not in ("done", "rejected"):
        answer = server.chat("m/chat", "hello", temperature=0)
        texts.append((answer["adapter"]["version"], answer["choices"][0]["message"]["content"]))
    assert len(texts) > 3
    assert len({text for version, text in texts if version == 0}) == 1
    assert server.chat("m/chat")["adapter"]["version"] == 1


def test_withdrawn_feedback_comes_back_with_no_version(server, adapter):
    for i in range(3):
        server.feedback(adapter, f"feedback {i}")
    path = f"/v1/lora/feedback?lora_id={adapter}"
    entries = server.call("GET", path)["feedback"]
    server.call("DELETE", path + "&id=" + entries[1]["id"])
    server.call("POST", "/v1/lora/rollback", {"lora_id": adapter, "version": 2})
    assert [e["text"] for e in server.call("GET", path)["feedback"]] == ["feedback 0"]
    server.call("POST", "/v1/lora/rollback", {"lora_id": adapter, "version": 3})
    assert [e["text"] for e in server.call("GET", path)["feedback"]] == ["feedback 0", "feedback 2"]
    assert server.call("DELETE", path)["withdrawn"] == 2
    assert server.call("GET", path)["feedback"] == []
    assert server.feedback(adapter)["version"] == 4


def test_withdrawn_while_training(slow_server):
    """The cycle begins anew: no further step shows it to the teacher, and nothing learnt from it is published."""
    server = slow_server
    server.init("m/withdraw")
    for text in ("Always rhyme.", "Never shout."):
        server.feedback("m/withdraw", text, training={"steps": 1})
    path = "/v1/lora/feedback?lora_id=m/withdraw"
    first, second = server.call("GET", path)["feedback"]
    job = start_cycle(server, "m/withdraw")
    events = server.wait_until(lambda: [e for e in server.job(job)["events"] if e["kind"] == "step"])
    assert server.job(job)["state"] == "training" and len(events) < 60
    assert server.call("DELETE", path + "&id=" + first["id"])["withdrawn"] == 1
    ended = server.wait_state(job)
    assert ends_of(ended) == ["done"], ended
    assert [entry["state"] for entry in ended["transitions"]].count("training") == 2, ended
    assert len(ended["result"]["steps"]) == 60
    shown = " ".join(ended["result"]["metadata"]["teacher_scored_texts"])
    assert second["text"] in shown and "Say it better." in shown and first["text"] not in shown
    assert [e["text"] for e in server.call("GET", path)["feedback"]] == ["Never shout.", "Say it better."]


# --- jobs ---

def test_watching_a_job_that_ended(server, adapter):
    job = server.feedback(adapter)["job_id"]
    events = list(server.events(f"/v1/jobs/{job}/events"))
    assert events[-1][0] == "job" and json.loads(events[-1][2])["state"] == "done"


def test_many_watchers(slow_server):
    server = slow_server
    server.init("w/one")
    job = server.feedback("w/one", wait=False)["job_id"]
    streams = in_parallel([lambda: [data for _, _, data in server.events(f"/v1/jobs/{job}/events")] for _ in range(10)])
    assert all(stream == streams[0] for stream in streams)
    assert json.loads(streams[0][-1])["state"] == "done"


def test_wait_runs_out(tmp_path):
    with serving(tmp_path / "db", settings=LONG + ("feedback.wait=200ms",)) as server:
        server.init("a/one")
        answer = server.chat("a/one")["id"]
        reply = server.request("POST", "/v1/feedback", {"lora_id": "a/one", "response_id": answer, "feedback": "x"})
        assert reply.status == 202 and set(reply.json) == {"job_id"}
        assert ends_of(server.wait_state(reply.json["job_id"])) == ["done"]


def test_queue_limit(tmp_path):
    with serving(tmp_path / "db", settings=LONG + ("feedback.queue_max=3",)) as server:
        server.init("a/one")
        answer = server.chat("a/one")["id"]
        body = {"lora_id": "a/one", "response_id": answer, "feedback": "x", "wait": False}
        replies = [server.request("POST", "/v1/feedback", body) for _ in range(6)]
        assert [reply.status for reply in replies] == [202] * 3 + [503] * 3
        assert all(reply.headers["Retry-After"] for reply in replies[3:])
        jobs = server.wait_jobs([reply.json["job_id"] for reply in replies[:3]])
        assert all(ends_of(job) == ["done"] for job in jobs.values())
        assert server.request("POST", "/v1/feedback", body).status == 202
