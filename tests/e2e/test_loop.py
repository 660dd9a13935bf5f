"""The loop over HTTP on a tiny random model: chat, feedback, versions, rollback, jobs. Mechanics, not learning."""
import io
import json
import urllib.parse
import zipfile

import pytest

from server import ENDED, FAST

TEXT = "Answer in one short sentence."


def query(path, **values):
    return path + "?" + urllib.parse.urlencode(values)


def greedy(server, model, question="What is this?"):
    return server.chat(model, question, temperature=0, max_tokens=12)["choices"][0]["message"]["content"]


# --- chat ---


def test_chat(server):
    answer = server.chat("base", "Hello", seed=1)
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 1 <= usage["completion_tokens"] <= 8


def test_seed_and_choices(server):
    one = server.chat("base", "Hello", seed=5, n=3, temperature=1)
    two = server.chat("base", "Hello", seed=5, n=3, temperature=1)
    texts = [choice["message"]["content"] for choice in one["choices"]]
    assert texts == [choice["message"]["content"] for choice in two["choices"]]
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert server.chat("base", "Hello", seed=6, n=3, temperature=1)["choices"] != one["choices"]


def test_streaming(server):
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "seed": 3, "stream": True,
            "stream_options": {"include_usage": True}}
    data = [data for _, _, data in server.events("/v1/chat/completions", body)]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(item) for item in data[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] <= 8
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    whole = server.chat("base", "Hi", seed=3)["choices"][0]["message"]["content"]
    assert text.strip() == whole.strip()


def test_logprobs(server):
    answer = server.chat("base", "Hi", logprobs=True, top_logprobs=3, temperature=0)
    entries = answer["choices"][0]["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"]
    for entry in entries:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])  # greedy takes the best


def test_completions(server):
    body = {"model": "base", "prompt": "Once", "max_tokens": 4, "temperature": 0}
    answer = server.call("POST", "/v1/completions", body)
    assert answer["object"] == "text_completion" and answer["usage"]["completion_tokens"] <= 4


def test_models(server, adapter):
    listed = server.call("GET", "/v1/models")["data"]
    models = [model["id"] for model in listed]
    assert "base" in models and adapter in models and len(models) >= 3
    one = server.call("GET", "/v1/models/" + adapter)
    assert one["id"] == adapter and one["created"] == listed[models.index(adapter)]["created"] > 0
    assert server.request("GET", "/v1/models/none/such").status == 404


# --- the loop ---


def test_feedback(server, adapter):
    base = greedy(server, "base")
    assert greedy(server, adapter) == base  # version 0 is the base
    answer = server.chat(adapter, "Hello", seed=1)
    reply = server.feedback(adapter, TEXT, answer["id"])
    assert reply["status"] == "ok" and reply["version"] == 1 and reply["reason"] is None
    assert reply["lora_id"] == adapter and len(reply["request_id"]) == 32
    metadata = reply["distill_result"]["metadata"]
    assert len(metadata["steps"]) == 2 and metadata["batch_size"] == 4
    assert set(reply["timing_ms"]) == {"sleep", "distill", "save", "wake", "logprobs", "total"}
    listed = server.versions(adapter)
    assert listed["lora_id"] == adapter and listed["current"] == 1
    assert [entry["version"] for entry in listed["versions"]] == [0, 1]
    assert listed["versions"][1]["parent"] == 0 and listed["versions"][1]["job_id"] == reply["job_id"]
    trained = greedy(server, adapter)
    for name in (adapter + "-init", adapter + "-latest", adapter + "@1"):
        assert greedy(server, name) == trained
    assert greedy(server, adapter + "@0") == base


def test_rollback(server, adapter):
    base = greedy(server, adapter)
    for count in (1, 2):
        answer = server.chat(adapter, f"Hello {count}", seed=count)
        assert server.feedback(adapter, f"{TEXT} {count}", answer["id"])["version"] == count
    standing = server.call("GET", query("/v1/lora/feedback", lora_id=adapter))["feedback"]
    assert [entry["text"] for entry in standing] == [f"{TEXT} 1", f"{TEXT} 2"]
    back = server.call("POST", "/v1/lora/rollback", {"lora_id": adapter, "version": 0})
    assert back["version"] == 0 and server.versions(adapter)["current"] == 0
    assert greedy(server, adapter) == base
    assert server.call("GET", query("/v1/lora/feedback", lora_id=adapter))["feedback"] == []
    # The numbers of versions go on; the parent is the one that was current.
    reply = server.feedback(adapter, TEXT, server.chat(adapter, "Again", seed=3)["id"])
    assert reply["version"] == 3
    assert server.versions(adapter)["versions"][3]["parent"] == 0


def test_withdraw(server, adapter):
    for count in (1, 2):
        server.feedback(adapter, f"Feedback {count}", server.chat(adapter, f"Hello {count}")["id"])
    path = query("/v1/lora/feedback", lora_id=adapter)
    first = server.call("GET", path)["feedback"][0]
    assert server.call("DELETE", path + "&id=" + first["id"])["withdrawn"] == 1
    assert [entry["text"] for entry in server.call("GET", path)["feedback"]] == ["Feedback 2"]


def test_batch_and_choice(server, adapter):
    answer = server.chat(adapter, "Hello", n=2, seed=1, temperature=1)
    requests = [{"lora_id": adapter, "response_id": answer["id"], "choice": choice, "feedback": f"Choice {choice}."}
                for choice in (0, 1)]
    reply = server.call("POST", "/v1/feedback", {"requests": requests})
    assert reply["status"] == "ok" and reply["batch_size"] == 2 and reply["version"] == 1


def test_by_text(server, adapter):
    answer = server.chat(adapter, "Hello", seed=9, temperature=1)
    text = answer["choices"][0]["message"]["content"]
    if not text.strip():
        pytest.skip("the random model answered nothing visible")
    body = {"requests": [{"lora_id": adapter, "prompt": "Hello", "response": text, "feedback": TEXT}]}
    assert server.call("POST", "/v1/feedback", body)["status"] == "ok"
    body["requests"][0]["response"] = "never said"
    assert server.request("POST", "/v1/feedback", body).status == 404


def test_reference_step(server, adapter):
    """With `training` present: the reference's single step on the recorded rollouts."""
    answer = server.chat(adapter, "Hello", seed=2)
    reply = server.feedback(adapter, TEXT, answer["id"], training={"learning_rate": 1e-4})
    metadata = reply["distill_result"]["metadata"]
    assert len(metadata["steps"]) == 1 and metadata["batch_size"] == 1
    assert metadata["mean_is_ratio"] == 1  # on policy, bit for bit
    for key in ("total_loss", "distill_loss", "kl_reg", "clip_fraction", "grad_norm", "tokens_processed"):
        assert key in metadata


# --- jobs ---


def test_job_events(server, adapter):
    answer = server.chat(adapter, "Hello")
    accepted = server.request("POST", "/v1/feedback", {"lora_id": adapter, "response_id": answer["id"], "feedback": TEXT},
                           headers={"Prefer": "respond-async"})
    assert accepted.status == 202
    job_id = accepted.json["job_id"]
    events = list(server.events(f"/v1/jobs/{job_id}/events"))
    names = [name for name, _, _ in events]
    assert names[-1] == "job" and names.count("step") == 2
    states = [json.loads(data)["state"] for name, _, data in events if name == "state"]
    assert states == ["queued", "batched", "training", "gating", "publishing", "done"]
    numbers = [int(number) for name, number, _ in events if name != "job"]
    assert numbers == sorted(set(numbers))
    steps = [json.loads(data) for name, _, data in events if name == "step"]
    assert [step["step"] for step in steps] == [1, 2] and all(step["steps"] == 2 and step["loss"] > 0 for step in steps)
    # From the middle on, as a client comes back.
    rest = list(server.events(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(numbers[2])}))
    assert [int(number) for name, number, _ in rest if name != "job"] == numbers[3:]
    job = server.call("GET", "/v1/jobs/" + job_id)
    assert job["state"] == "done" and job["version"] == 1
    assert [entry["state"] for entry in job["transitions"]] == states
    assert job["result"]["gate"] and job["result"]["base"] and len(job["result"]["steps"]) == 2
    parts = ("teacher_ms", "train_ms", "gate_ms", "rollout_ms")
    times = [step[part] for part in parts for step in job["result"]["steps"]]
    # The second step's rollouts, the last of them, may be there before it begins: then waiting takes no microsecond.
    assert min(times[:-1]) > 0 <= times[-1] and sum(times) <= job["result"]["duration_ms"] + 1


def test_job_list_and_cancel(server, adapter):
    answers = [server.chat(adapter, f"Hello {i}") for i in range(3)]
    jobs = [server.feedback(adapter, TEXT, answer["id"], wait=False)["job_id"] for answer in answers]
    cancelled = server.call("DELETE", "/v1/jobs/" + jobs[-1])
    assert cancelled["job"]["job_id"] == jobs[-1]
    ended = {job_id: job["state"] for job_id, job in server.wait_jobs(jobs).items()}
    listed = server.call("GET", query("/v1/jobs", lora_id=adapter))["jobs"]
    assert [job["job_id"] for job in listed] == jobs[::-1] and all(job["state"] in ENDED for job in listed)
    assert ended[jobs[0]] == "done"
    assert ended[jobs[-1]] == ("cancelled" if cancelled["cancelled"] else "done")
    assert server.request("GET", "/v1/jobs/job-none").status == 404
    assert server.request("GET", "/v1/jobs?limit=0").status == 422


def test_idempotency(server, adapter):
    answer = server.chat(adapter, "Hello")
    body = {"lora_id": adapter, "response_id": answer["id"], "feedback": TEXT}
    first = server.call("POST", "/v1/feedback", body, headers={"Idempotency-Key": adapter})
    again = server.call("POST", "/v1/feedback", body, headers={"Idempotency-Key": adapter})
    assert first["job_id"] == again["job_id"] and server.versions(adapter)["current"] == 1
    body["feedback"] = "Something else."
    assert server.request("POST", "/v1/feedback", body, headers={"Idempotency-Key": adapter}).status == 409


# --- adapters ---


def test_init(server, adapter):
    again = server.request("POST", "/v1/lora/init", {"lora_id": adapter})
    assert again.status == 409
    assert server.call("POST", "/v1/lora/init", {"lora_id": adapter, "overwrite": True})["lora_id"] == adapter + "-init"
    assert server.request("POST", "/v1/lora/init", {"lora_id": adapter + "2", "base_model": "Other"}).status == 403
    assert server.request("POST", "/v1/lora/init", {"lora_id": adapter + "2", "lora_r": 1}).status == 422
    for bad in ("../x", "a/../b", "..", "x\x00y", "", "a" * 300):
        answer = server.request("POST", "/v1/lora/init", {"lora_id": bad})
        assert 400 <= answer.status < 500, (bad, answer.status, answer.body)


def test_export_import(server, adapter):
    server.feedback(adapter, TEXT)
    zipped = server.request("GET", query("/v1/lora/export", lora_id=adapter))
    assert zipped.status == 200 and zipped.headers["Content-Type"] == "application/zip"
    assert zipped.headers["Content-Disposition"] == f'attachment; filename="{adapter.replace("/", "__")}.zip"'
    names = zipfile.ZipFile(io.BytesIO(zipped.body)).namelist()
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names)
    assert server.request("GET", query("/v1/lora/export", lora_id=adapter)).body == zipped.body
    copy = adapter + "-copy"
    server.call("POST", query("/v1/lora/import", lora_id=copy), zipped.body, headers={"Content-Type": "application/zip"})
    assert greedy(server, copy) == greedy(server, adapter)
    bad = server.request("POST", query("/v1/lora/import", lora_id=copy), b"PK no zip", headers={"Content-Type": "application/zip"})
    assert 400 <= bad.status < 500
    assert server.call("DELETE", query("/v1/lora", lora_id=copy))["deleted"]
    assert not server.call("DELETE", query("/v1/lora", lora_id=copy))["deleted"]


def test_export_stays_the_same(make_server):
    """Also once retention has dropped the optimizer's state of the version; with that state only when asked, and while it is there."""
    server = make_server(settings=FAST + ("storage.keep_moments=1",)).start()
    server.init("me/x")

    def export(version, **more):
        return server.request("GET", query("/v1/lora/export", lora_id=f"me/x@{version}", **more))

    def names(answer):
        return sorted(zipfile.ZipFile(io.BytesIO(answer.body)).namelist())

    server.feedback("me/x")
    plain, whole = export(1), export(1, optimizer="true")
    assert names(plain) == ["adapter_config.json", "adapter_model.safetensors"]
    assert names(whole) == names(plain) + ["optimizer.safetensors"]
    server.feedback("me/x")
    gone = server.wait_until(lambda: (lambda answer: answer if answer.status == 404 else None)(export(1, optimizer="1")))
    assert "storage.keep_moments" in gone.detail
    assert export(1).body == plain.body and export(1, optimizer="false").body == plain.body
    assert names(export(2, optimizer="true")) == names(whole)
    assert server.request("GET", query("/v1/lora/export", lora_id="me/x", optimizer="maybe")).status == 422
    # Moved elsewhere with it, it goes on learning as it would have here.
    copied = server.call("POST", query("/v1/lora/import", lora_id="me/copy"), whole.body, headers={"Content-Type": "application/zip"})
    assert copied["version"] == 0
    again = server.request("GET", query("/v1/lora/export", lora_id="me/copy", optimizer="true"))
    moments = [zipfile.ZipFile(io.BytesIO(answer.body)).read("optimizer.safetensors") for answer in (whole, again)]
    assert moments[0] == moments[1]
    assert server.stop() == 0


# --- errors ---


def test_errors(server, adapter):
    answer = server.chat(adapter, "Hello")
    other = adapter + "-other"
    server.call("POST", "/v1/lora/init", {"lora_id": other, "overwrite": True})
    cases = [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", {"model": "none/such", "messages": [{"role": "user", "content": "x"}]}, 404),
        ("POST", "/v1/chat/completions", {"model": "base", "messages": []}, 400),
        ("POST", "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}], "temperature": 3}, 400),
        ("POST", "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "word " * 9000}]}, 400),
        ("POST", "/v1/feedback", {"lora_id": adapter, "response_id": "chatcmpl-none", "feedback": "x"}, 404),
        ("POST", "/v1/feedback", {"lora_id": other, "response_id": answer["id"], "feedback": "x"}, 404),
        ("POST", "/v1/feedback", {"lora_id": adapter, "response_id": answer["id"]}, 422),
        ("POST", "/v1/feedback", {"lora_id": adapter, "response_id": answer["id"], "feedback": "x", "training": {"alpha": 2}}, 422),
        ("POST", "/v1/lora/rollback", {"lora_id": adapter, "version": 99}, 404),
        ("GET", "/v1/lora/versions?lora_id=none/such", None, 404),
        ("GET", "/nowhere", None, 404),
        ("PUT", "/v1/models", b"", 405),
    ]
    for method, path, body, status in cases:
        got = server.request(method, path, body)
        assert got.status == status, (method, path, str(body)[:100], got.status, got.body)
        error = got.json
        if path.startswith(("/v1/chat", "/v1/models")):
            assert {"message", "type", "param", "code"} <= set(error["error"])
        else:
            assert error["detail"]
    long = server.request("POST", "/v1/chat/completions", cases[4][2]).json["error"]["message"]
    assert sum(word.strip(".,()").isdigit() for word in long.split()) >= 2, long  # both lengths
    assert server.chat("base", "Hello")["choices"]  # it lives
