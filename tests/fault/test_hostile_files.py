"""Files that are not what they say: uploads to /v1/lora/import, configuration, model files. Each gets its error; the server lives."""
import io
import json
import os
import pathlib
import random
import shutil
import struct
import subprocess
import zipfile

import pytest

from server import BINARY, PATIENCE, serving

CONFIG, WEIGHTS, MOMENTS = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"
IMPORT = "/v1/lora/import?lora_id="
TINY_MODEL = pathlib.Path(__file__).resolve().parents[1] / "golden" / "tiny_models" / "tiny-llama"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        running.init("a/one")
        assert running.feedback("a/one")["status"] == "ok"
        running.zip = running.request("GET", "/v1/lora/export?lora_id=a/one&optimizer=true").body
        with zipfile.ZipFile(io.BytesIO(running.zip)) as archive:
            running.files = {name: archive.read(name) for name in archive.namelist()}
        yield running


def upload(server, data, name="h/x", timeout=60):
    """What is refused is called by the names in the zip, not by where it lies on the server's disk."""
    answer = server.request("POST", IMPORT + name, data, {"Content-Type": "application/zip"}, timeout)
    if answer.status >= 400:
        assert not any(part in answer.detail for part in (server.data, "staging", "unpacked", "upload-")), answer
    return answer


def make_zip(files, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in files if isinstance(files, list) else files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def read_safetensors(data):
    length, = struct.unpack("<Q", data[:8])
    return json.loads(data[8:8 + length]), data[8 + length:]


def write_safetensors(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(autouse=True)
def lives(server):
    """Nothing refused leaves an adapter or a file behind, and the rest works."""
    yield
    assert server.is_healthy()
    assert server.chat("a/one")["choices"]
    assert not any(name.startswith("h/") for name in server.call("GET", "/v1/lora")["loras"])
    server.wait_until(lambda: not os.listdir(os.path.join(server.data, "staging")), 10, "an empty staging folder")


def check_refused(server, data, words=""):
    answer = upload(server, data)
    assert answer.status in (400, 413, 422, 501), answer  # 501: what adapters may have, and is not supported
    assert words.lower() in answer.detail.lower(), answer


# --- zips ---

def test_no_zip_at_all(server):
    for data in (b"", b"x", b"PK", b"PK\x03\x04" + b"\0" * 100, b"PK\x05\x06" + b"\0" * 18, os.urandom(5000), b"\x1f\x8b" + os.urandom(100),
                 b"Rar!\x1a\x07\0" + os.urandom(100), server.files[WEIGHTS], b"{}" * 1000, b"\0" * (5 << 20)):
        check_refused(server, data)


def test_truncated_zips(server):
    """Cut anywhere before the directory: refused whole."""
    chance = random.Random(1)
    whole = server.zip
    for length in sorted(chance.randrange(len(whole) - 400) for _ in range(60)):
        check_refused(server, whole[:length])


def test_flipped_bytes(server):
    """Refused, or still the same adapter (a time stamp, say): never a broken one."""
    chance = random.Random(2)
    imported = 0
    for _ in range(300):
        flipped = bytearray(server.zip)
        at = chance.randrange(len(flipped)) if chance.random() < 0.5 else chance.choice((chance.randrange(300), len(flipped) - 1 - chance.randrange(300)))
        flipped[at] ^= 1 << chance.randrange(8)
        answer = upload(server, bytes(flipped), "h/flipped")
        assert answer.status in (200, 400, 413, 422), answer
        if answer.status == 200:
            imported += 1
            assert server.chat("h/flipped")["choices"]
            server.call("DELETE", "/v1/lora?lora_id=h/flipped")
    assert imported < 290


def test_bombs(server):
    """Small uploads that unpack to gigabytes end at what an adapter of this model can have at most."""
    zeros = b"\0" * (256 << 20)
    for files in ([(CONFIG, server.files[CONFIG]), (WEIGHTS, zeros)], [(CONFIG, zeros), (WEIGHTS, server.files[WEIGHTS])],
                  [(CONFIG, server.files[CONFIG]), (WEIGHTS, server.files[WEIGHTS]), (MOMENTS, zeros)]):
        data = make_zip(files, zipfile.ZIP_DEFLATED)
        assert len(data) < 2 << 20
        answer = upload(server, data)
        assert answer.status == 413 and "larger than any adapter of this model" in answer.detail, answer
    other = make_zip({CONFIG: server.files[CONFIG], "README.md": zeros, WEIGHTS: server.files[WEIGHTS]}, zipfile.ZIP_DEFLATED)
    assert upload(server, other, "n/x").status == 200  # passed over
    server.call("DELETE", "/v1/lora?lora_id=n/x")
    many = make_zip([(f"{i}.txt", b"") for i in range(5000)])
    check_refused(server, many, "files")


def test_names_in_zips(server):
    """Paths in the archive never decide where anything is written."""
    files = server.files
    outside = os.path.join(os.path.dirname(server.data), "outside")
    for prefix in ("../../../../", "/tmp/", "a/../../", "..\\..\\", os.path.join(server.data, "adapters", "a", "one") + "/"):
        answer = upload(server, make_zip([(prefix + CONFIG, files[CONFIG]), (prefix + WEIGHTS, files[WEIGHTS]), ("../../../outside", b"x")]), "n/x")
        assert answer.status in (200, 400), answer
        assert not os.path.exists(outside) and not os.path.exists("/tmp/" + CONFIG) and not os.path.exists("/tmp/" + WEIGHTS)
        if answer.status == 200:
            server.call("DELETE", "/v1/lora?lora_id=n/x")
    check_refused(server, make_zip([(CONFIG, files[CONFIG]), (WEIGHTS, files[WEIGHTS]), ("x/" + WEIGHTS, files[WEIGHTS])]), "twice")
    link = zipfile.ZipInfo(WEIGHTS)
    link.external_attr = 0o120777 << 16
    link.create_system = 3
    check_refused(server, make_zip([(CONFIG, files[CONFIG]), (link, "/etc/passwd")]), WEIGHTS)
    check_refused(server, make_zip({CONFIG: files[CONFIG]}), WEIGHTS)
    check_refused(server, make_zip({WEIGHTS: files[WEIGHTS]}), CONFIG)
    check_refused(server, make_zip({CONFIG + "/": b"", WEIGHTS + "/": b""}))


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "a/b/c", "base", "x@1", "a b"])
def test_names_of_imports(server, name):
    assert upload(server, server.zip, name.replace(" ", "%20")).status == 400


def test_import_over_an_adapter(server):
    """A good one becomes the next version; a bad one changes nothing."""
    server.init("i/over")
    check_refused(server, make_zip({CONFIG: b"{}", WEIGHTS: b""}))
    assert upload(server, b"garbage", "i/over").status == 400
    assert server.versions("i/over")["current"] == 0
    assert upload(server, server.zip, "i/over").json == {"lora_id": "i/over", "version": 1}
    assert server.text("i/over") == server.text("a/one")
    assert server.feedback("i/over")["version"] == 2


# --- what is in them ---

def with_config(server, **more):
    config = json.loads(server.files[CONFIG])
    config.update(more)
    return make_zip({**server.files, CONFIG: json.dumps(config)})


@pytest.mark.parametrize("fault", [
    {"r": 0}, {"r": -1}, {"r": 10**9}, {"r": "4"}, {"r": 8}, {"r": None}, {"lora_alpha": "x"}, {"lora_alpha": -1e400}, {"target_modules": []},
    {"target_modules": ["lm_head"]}, {"target_modules": 5}, {"target_modules": ["q_proj"] * 1000}, {"peft_type": "PREFIX_TUNING"}, {"peft_type": 3},
    {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["lm_head"]}, {"layers_to_transform": [0]},
])
def test_wrong_configs_of_adapters(server, fault):
    if fault == {"lora_alpha": -1e400}:
        data = make_zip({**server.files, CONFIG: server.files[CONFIG].replace(b'"lora_alpha"', b'"lora_alpha": 1e999, "x"')})
    else:
        data = with_config(server, **fault)
    check_refused(server, data)


def test_configs_that_are_no_json(server):
    for text in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"\0" * 100, b"[" * 100000, b'{"r": 4, "r": 8}'):
        check_refused(server, make_zip({**server.files, CONFIG: text}))


def faults_of_weights(weights):
    header, data = read_safetensors(weights)
    names = [name for name in header if name != "__metadata__"]
    first = names[0]

    def changed(**more):
        return write_safetensors({**header, first: {**header[first], **more}}, data)

    yield "empty", b""
    yield "short", weights[:7]
    yield "length", struct.pack("<Q", 2**63) + weights[8:]
    yield "length 0", struct.pack("<Q", 0) + weights[8:]
    yield "header", weights[:20] + b"\xff" * 20 + weights[40:]
    yield "cut", weights[:-1]
    yield "longer", weights + b"\0" * 64
    yield "shape", changed(shape=[1, 1])
    yield "wrong rank", changed(shape=[header[first]["shape"][0] * 2, header[first]["shape"][1] // 2])
    yield "negative", changed(shape=[-1, -4])
    yield "huge", changed(shape=[2**40, 2**40])
    yield "type", changed(dtype="I64")
    yield "no type", changed(dtype="F7")
    yield "offsets", changed(data_offsets=[0, 2**62])
    yield "backwards", changed(data_offsets=[8, 0])
    yield "missing", write_safetensors({name: header[name] for name in header if name != first}, data)
    yield "unknown", write_safetensors({**header, "base_model.model.evil.weight": header[first]}, data)
    yield "renamed", write_safetensors({("x" + name if name == first else name): value for name, value in header.items()}, data)
    yield "no tensors", write_safetensors({}, b"")
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        start = header[names[-1]]["data_offsets"][0]
        yield name, weights[:len(weights) - len(data) + start] + struct.pack("<f", value) + weights[len(weights) - len(data) + start + 4:]


def test_wrong_weights(server):
    for what, weights in faults_of_weights(server.files[WEIGHTS]):
        answer = upload(server, make_zip({**server.files, WEIGHTS: weights}))
        assert answer.status in (400, 413, 422, 501), (what, answer)


def test_wrong_moments(server):
    """Optimizer state is optional, but not optional to be right."""
    moments = server.files[MOMENTS]
    for data in (b"x", moments[:50], moments[:-4], struct.pack("<Q", 2**60) + moments[8:]):
        answer = upload(server, make_zip({**server.files, MOMENTS: data}))
        assert answer.status in (400, 422), answer


def test_huge_but_finite_weights(server):
    """An import is its owner's wish: chats with it may fail with an error of their own, those of others do not."""
    header, data = read_safetensors(server.files[WEIGHTS])
    broken = write_safetensors(header, struct.pack("<f", 3e38) * (len(data) // 4))
    files = {name: content for name, content in server.files.items() if name != MOMENTS}
    answer = upload(server, make_zip({**files, WEIGHTS: broken}), "w/huge")
    before = server.text("a/one", "What do you think about it, all in all?")
    if answer.status == 200:
        for _ in range(3):
            assert server.request("POST", "/v1/chat/completions", {
                "model": "w/huge", "max_tokens": 20, "messages": [{"role": "user", "content": "x" * 100}]}).status in (200, 422, 500)
        reply = server.request("POST", "/v1/feedback", {"lora_id": "w/huge", "feedback": "x", "response_id": server.chat("base")["id"]})
        assert reply.status in (200, 500), reply
        server.call("DELETE", "/v1/lora?lora_id=w/huge")
    assert server.text("a/one", "What do you think about it, all in all?") == before


# --- configuration files ---

SAMPLE = "# a comment\nlisten: 127.0.0.1:0\nlog:\n  level: warning\ncycle:\n  steps: 3\n  rate: 5e-4\n  forms: [brief, hindsight]\nhttp:\n  max_body: 1MiB\n"


def run_with(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return subprocess.run([BINARY, "serve", "--config", path, "--data", tmp_path / "db", "--model", "/nonexistent"], capture_output=True,
                          timeout=30 * PATIENCE, check=False)


@pytest.mark.parametrize("text, where", [
    ("cycle: 3\n", b":1:8"), ("cycle:\n  steps: [1]\n", b":2:10"), ("cycle:\n  steps: x\n", b":2:10"), ("cycle:\n  steps: 1e400\n", b":2:10"),
    ("cycle:\n  steps: 99999999999999999999\n", b":2:10"), ("nosuch: 1\n", b":1:1"), ("a: &x [*x]\n", b":1"), ("- a\n- b\n", b":1"), ("cycle:\n\tsteps: 3\n", b":2"),
    ("cycle: {steps: 3\n", b":"), ("'", b":1"), ("cycle:\n  steps: 3\n  steps: 4\n", b":3"), ("? [a]\n: b\n", b":1"), (b"\xff\xfe", b""), (b"\0", b""),
    ("a: " + "[" * 5000, b""), ("x: &a [1,1,1]\n" + "".join(f"x{i}: &b{i} [*a,*a]\n" for i in range(50)), b""), ("%YAML 9.9\n---\n", b""), ("listen: {}\n", b":1:9"),
    ("http:\n  max_body: 5 parsecs\n", b":2:13"), ("cycle:\n  forms: [nosuch]\n", b""),
])
def test_hostile_configuration(tmp_path, text, where):
    ran = run_with(tmp_path, text)
    assert ran.returncode in (1, 2) and ran.stderr.startswith(b"claas"), ran
    assert where in ran.stderr, ran.stderr
    if where:
        assert b"c.yaml" in ran.stderr


def test_configuration_cut_and_flipped(tmp_path):
    """Ends in an error about the file, or comes as far as the missing model: never a crash."""
    chance = random.Random(3)
    texts = [SAMPLE[:length] for length in range(0, len(SAMPLE), 7)]
    for _ in range(40):
        flipped = bytearray(SAMPLE.encode())
        for _ in range(chance.randrange(1, 4)):
            flipped[chance.randrange(len(flipped))] = chance.randrange(256)
        texts.append(bytes(flipped))
    for text in texts:
        ran = run_with(tmp_path, text)
        assert ran.returncode in (1, 2), (text, ran)


# --- model files ---

def serve(tmp_path, model):
    return subprocess.run([BINARY, "serve", "--data", tmp_path / "db", "--listen", "127.0.0.1:0", "--model", model], capture_output=True,
                          timeout=30 * PATIENCE, check=False)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 100, b"GGUF\x03\0\0\0" + struct.pack("<QQ", 2**60, 2**60), os.urandom(1000)])
def test_hostile_model(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    ran = serve(tmp_path, path)
    assert ran.returncode == 1 and ran.stderr.count(str(path).encode()) == 1, ran
    directory = tmp_path / "hf"
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_bytes(content)
    ran = serve(tmp_path, directory)
    assert ran.returncode == 1 and str(directory).encode() in ran.stderr, ran


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_pipe_in_a_model(tmp_path, name):
    """A pipe that nobody writes to is an error, not something to wait for."""
    directory = tmp_path / "hf"
    shutil.copytree(TINY_MODEL, directory)
    if name.startswith("model-"):
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}), encoding="utf-8")
    (directory / name).unlink(missing_ok=True)
    os.mkfifo(directory / name)
    ran = serve(tmp_path, directory)
    assert ran.returncode == 1 and name.encode() in ran.stderr, ran
