"""Real clients against the real program: the openai package, and PEFT with what goes out and comes in as a zip."""
import io
import pathlib
import zipfile

import pytest

from server import FAST, ROOT, serving

TINY_DIRECTORY = ROOT / "tests" / "golden" / "tiny_models" / "tiny-llama"


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def checks():
    pytest.importorskip("openai")
    import openai_client  # pylint: disable=import-outside-toplevel
    return openai_client.CHECKS


@pytest.mark.parametrize("name", ["base", "random-tiny-llama", "clients/one", "clients/one-latest", "clients/one@1"])
def test_openai(server, client, name):
    """Every check of openai_client.py under every kind of name."""
    if "clients/one" not in server.call("GET", "/v1/lora")["loras"]:
        server.init("clients/one")
        server.feedback("clients/one")
    for check in checks():
        check(client, name)


def test_openai_feedback_by_the_answers_id(server, client):
    """The loop as a user of the openai package writes it."""
    server.init("clients/loop", overwrite=True)
    answer = client.chat.completions.create(model="clients/loop", messages=[{"role": "user", "content": "What is your name?"}], max_tokens=8)
    reply = client.post("/feedback", cast_to=object, body={"lora_id": "clients/loop", "response_id": answer.id, "feedback": "Say Kuro."})
    assert reply["status"] == "ok" and reply["version"] == 1
    chunks = list(client.chat.completions.create(model="clients/loop", messages=[{"role": "user", "content": "Who?"}], max_tokens=8, stream=True))
    reply = client.post("/feedback", cast_to=object, body={"lora_id": "clients/loop", "response_id": chunks[0].id, "feedback": "Say Kuro."})
    assert reply["version"] == 2


def test_openai_too_large(client):
    import openai  # pylint: disable=import-outside-toplevel
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x" * 20_000_000}])
    assert raised.value.status_code == 413


def test_openai_retries(tmp_path):
    """While the queue of requests is full the answers are 503 with Retry-After; the package's own retries get through."""
    openai = pytest.importorskip("openai")
    from concurrent.futures import ThreadPoolExecutor  # pylint: disable=import-outside-toplevel
    with serving(tmp_path / "db", settings=FAST + ("http.max_inflight=2",)) as server:
        patient = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=20, timeout=60)
        hasty = patient.with_options(max_retries=0)

        def ask(client):
            return client.chat.completions.create(model="base", messages=[{"role": "user", "content": "x"}], max_tokens=100)

        with ThreadPoolExecutor(8) as pool:
            assert all(answer.choices for answer in pool.map(ask, [patient] * 8))

            def ask_once(client):
                try:
                    return ask(client)
                except openai.APIStatusError as error:
                    return error

            answers = list(pool.map(ask_once, [hasty] * 24))
        refused = [answer for answer in answers if isinstance(answer, openai.APIStatusError)]
        assert refused and all(error.status_code == 503 and error.response.headers["retry-after"] for error in refused)
        assert len(refused) < len(answers)


# --- PEFT ---

@pytest.fixture(scope="module")
def f32_server():
    """A model that transformers has, too, in float32."""
    with serving(model=str(TINY_DIRECTORY), settings=FAST + ("device.precision=f32", "cycle.rate=5e-3")) as running:
        yield running


def logprobs_of(server, name, prompt="Once upon a time, in a far"):
    """The greedy continuation: its token texts' bytes and log-probs."""
    entries = server.chat(name, prompt, temperature=0, logprobs=True, max_tokens=12)["choices"][0]["logprobs"]["content"]
    return [bytes(entry["bytes"]) for entry in entries], [entry["logprob"] for entry in entries]


def torch_logprobs(model, prompt="Once upon a time, in a far"):
    """The same from transformers: greedy from the same chat template."""
    import torch  # pylint: disable=import-outside-toplevel
    from transformers import AutoTokenizer  # pylint: disable=import-outside-toplevel
    tokenizer = AutoTokenizer.from_pretrained(TINY_DIRECTORY)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=False)
    tokens, values = [], []
    with torch.no_grad():
        for _ in range(12):
            row = torch.log_softmax(model(ids).logits[0, -1].float(), -1)
            best = int(row.argmax())
            tokens.append(best)
            values.append(float(row[best]))
            if best in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
                break
            ids = torch.cat([ids, torch.tensor([[best]])], 1)
    return tokens, values


def base_model():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(TINY_DIRECTORY, dtype=torch.float32)


def check_same(ours, theirs):
    assert len(ours[1]) == len(theirs[1])
    assert max(abs(a - b) for a, b in zip(ours[1], theirs[1])) <= 1e-3, (ours, theirs)


def test_export_loads_in_peft(f32_server, tmp_path):
    peft = pytest.importorskip("peft")
    f32_server.init("p/out", overwrite=True)
    f32_server.feedback("p/out")
    plain, trained = logprobs_of(f32_server, "base"), logprobs_of(f32_server, "p/out")
    assert plain != trained
    exported = f32_server.request("GET", "/v1/lora/export?lora_id=p/out").body
    with zipfile.ZipFile(io.BytesIO(exported)) as archive:
        archive.extractall(tmp_path)
    check_same(plain, torch_logprobs(base_model()))
    check_same(trained, torch_logprobs(peft.PeftModel.from_pretrained(base_model(), tmp_path)))


def test_import_from_peft(f32_server, tmp_path):
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base_model(), config)
    model.save_pretrained(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in pathlib.Path(tmp_path).iterdir():
            archive.write(path, "some/folder/" + path.name)
    answer = f32_server.request("POST", "/v1/lora/import?lora_id=p/in", buffer.getvalue(), {"Content-Type": "application/zip"})
    assert answer.status == 200, answer
    check_same(logprobs_of(f32_server, "p/in"), torch_logprobs(model))
    assert f32_server.feedback("p/in")["status"] == "ok"  # and it can be trained on


def test_there_and_back(f32_server):
    """Export, import, export: the same answers, and the same bytes of weights."""
    f32_server.init("p/again", overwrite=True)
    f32_server.feedback("p/again")
    first = f32_server.request("GET", "/v1/lora/export?lora_id=p/again").body
    f32_server.request("POST", "/v1/lora/import?lora_id=p/copy", first, {"Content-Type": "application/octet-stream"})
    second = f32_server.request("GET", "/v1/lora/export?lora_id=p/copy").body
    names = [zipfile.ZipFile(io.BytesIO(data)).read("adapter_model.safetensors") for data in (first, second)]
    assert names[0] == names[1]
    assert logprobs_of(f32_server, "p/again") == logprobs_of(f32_server, "p/copy")
