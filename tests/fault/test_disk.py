"""A full disk, and data directories that cannot be used: clear errors, nothing acknowledged is lost, and all works again."""
import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest

from server import FAST, Failed, Server, ends_of, serving

NOBODY = 65534


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(disk):
    """Leaves not one page."""
    with open(disk / "ballast", "ab", buffering=0) as ballast:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    ballast.write(b"\0" * size)
            except OSError:
                continue


def free(disk):
    (disk / "ballast").unlink()


def until_refused(send, tries=300):
    """Sends until the disk is really full: pages that files had already may take a few more."""
    good = []
    for _ in range(tries):
        answer = send()
        if answer.status >= 300:
            return good, answer
        good.append(answer.json)
    raise AssertionError("a full disk was never told")


def test_full_disk(disk):
    with serving(disk / "db", log=disk.parent / "log") as server:
        server.init("a/one")
        ids = [server.chat("a/one", f"question {i}")["id"] for i in range(3)]
        version = server.feedback("a/one", response_id=ids[0])["version"]
        fill(disk)
        good, refused = until_refused(lambda: server.request("POST", "/v1/feedback", {
            "lora_id": "a/one", "response_id": ids[1], "feedback": "Say it better. " * 200, "wait": False}))
        assert refused.status == 507, refused
        assert "no space" in refused.detail
        listed = {job["job_id"] for job in server.call("GET", "/v1/jobs?limit=1000")["jobs"]}
        assert len(listed) == 1 + len(good)  # the refused one is not there
        assert {job["job_id"] for job in good} <= listed
        assert server.request("POST", "/v1/lora/init", {"lora_id": "a/two"}).status == 507
        for stream in (False, True):
            answer = server.request("POST", "/v1/chat/completions", {
                "model": "a/one", "messages": [{"role": "user", "content": "still there?"}], "max_tokens": 4, "stream": stream})
            assert answer.status == 200, answer
        refused = server.request("GET", "/v1/lora/export?lora_id=a/one")
        assert refused.status in (200, 507)
        free(disk)
        server.init("a/two")
        late = server.feedback("a/one", response_id=ids[2], wait=False)["job_id"]
        jobs = server.wait_jobs([job["job_id"] for job in good] + [late], 60)
        assert all(ends_of(job) == ["done"] for job in jobs.values()), jobs
        assert server.versions("a/one")["current"] > version
        assert server.is_healthy()
        current = server.versions("a/one")["current"]
    with serving(disk / "db", log=disk.parent / "log") as server:
        assert server.versions("a/one")["current"] == current
        assert server.text("a/one")


def test_disk_full_during_a_cycle(disk):
    settings = FAST + ("cycle.steps=40", "cycle.rows=16", "cycle.max_tokens=32")
    with serving(disk / "db", settings=settings, log=disk.parent / "log") as server:
        server.init("a/one")
        job = server.feedback("a/one", wait=False)["job_id"]
        server.wait_state(job, "training")
        fill(disk)
        server.wait_until(lambda: "space" in server.log() or server.job(job)["state"] == "done", what="a full disk or an end")
        assert server.job(job)["state"] != "failed"
        assert server.is_healthy()
        free(disk)
        assert ends_of(server.wait_state(job)) == ["done"]
        assert len(server.versions("a/one")["versions"]) == 2
        staging = disk / "db" / "staging"
        server.wait_until(lambda: not list(staging.iterdir()), what="an empty staging folder")


def test_full_disk_at_the_start(disk):
    fill(disk)
    code, said = Server(disk / "db", log=disk.parent / "log").fail_to_start()
    assert code == 1 and "space" in said.lower(), said
    free(disk)
    with serving(disk / "db", log=disk.parent / "log") as server:
        assert server.is_healthy()


def test_upload_that_fills_the_disk(disk):
    with serving(disk / "db", log=disk.parent / "log") as server:
        server.init("a/one")
        refused = server.request("POST", "/v1/lora/import?lora_id=a/big", b"x" * (40 << 20), {"Content-Type": "application/zip"})
        assert refused.status == 507, refused
        server.wait_until(lambda: not list((disk / "db" / "staging").iterdir()), what="the end of the upload's file")
        assert server.feedback("a/one")["status"] == "ok"


def test_read_only_disk(disk):
    with serving(disk / "db", log=disk.parent / "log") as server:
        server.init("a/one")
        kept = server.feedback("a/one")["version"]
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    code, said = Server(disk / "db", log=disk.parent / "log").fail_to_start()
    assert code == 1 and "Read-only" in said and str(disk / "db") in said, said
    code, said = Server(disk / "new", log=disk.parent / "log").fail_to_start()
    assert code == 1 and "Read-only" in said, said
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    with serving(disk / "db", log=disk.parent / "log") as server:
        assert server.versions("a/one")["current"] == kept


@pytest.mark.skipif(os.geteuid() != 0 or not os.stat("/").st_mode & 0o001, reason="needs another user, who may enter the root directory")
@pytest.mark.parametrize("name", ["db", "new/db", "kept"])
def test_no_permission(name):
    """As nobody, in a directory of root's."""
    with tempfile.TemporaryDirectory(dir="/tmp") as path:
        folder = pathlib.Path(path)
        folder.chmod(0o755)
        shutil.copy(Server(folder).binary, folder / "claas")
        (folder / "db").mkdir(mode=0o755)
        if name == "kept":
            with serving(folder / "kept") as server:
                server.init("a/one")
        ran = subprocess.run([folder / "claas", "serve", "--listen", "127.0.0.1:0", "--data", folder / name, "--model", "random:tiny-llama"],
                             user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 1 and "Permission denied" in ran.stderr and str(folder / name.split("/")[0]) in ran.stderr, ran


@pytest.mark.parametrize("name", ["file", "link", "devnull"])
def test_data_is_no_directory(tmp_path, name):
    path = tmp_path / name
    if name == "file":
        path.write_text("x")
    elif name == "link":
        path.symlink_to(tmp_path / "nowhere" / "at" / "all")
    else:
        path = pathlib.Path("/dev/null")
    code, said = Server(path, log=tmp_path / "log").fail_to_start()
    assert code == 1 and str(path) in said, said


def damage(path, at, data=b"\xff" * 64):
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def test_damaged_database(tmp_path):
    """It is said at the start, with the file's name."""
    with serving(tmp_path / "db") as server:
        server.init("a/one")
    damage(tmp_path / "db" / "claas.db", 0)
    code, said = Server(tmp_path / "db", log=tmp_path / "log").fail_to_start()
    assert code == 1 and "claas.db" in said, (code, said)


@pytest.mark.parametrize("harm", ["gone", "cut", "header"])
def test_damaged_weights(tmp_path, harm):
    """A damaged current version: a line at the start, an error for its chats, and none for the others. Its feedback waits."""
    with serving(tmp_path / "db") as server:
        for name in ("a/one", "b/two"):
            server.init(name)
            server.feedback(name)
        answer = server.chat("a/one")["id"]
    version = tmp_path / "db" / "adapters" / "a" / "one" / "v000001"
    weights = version / "adapter_model.safetensors"
    if harm == "gone":
        shutil.rmtree(version)
    elif harm == "cut":
        os.truncate(weights, 100)
    else:
        damage(weights, 8)
    with serving(tmp_path / "db", log=tmp_path / "log") as server:
        assert "current version 1 of adapter 'a/one' is lost" in server.log() and "v000001" in server.log()
        with pytest.raises(Failed) as raised:
            server.chat("a/one")
        assert raised.value.answer.status == 500 and "lost on the server's disk" in raised.value.answer.detail
        job_id = server.feedback("a/one", response_id=answer, wait=False)["job_id"]
        wait_for_weights(server, job_id)
        assert server.chat("b/two")["choices"] and server.feedback("b/two")["version"] == 2
        assert server.versions("a/one")["versions"][1]["state"] == "missing"
        server.call("POST", "/v1/lora/rollback", {"lora_id": "a/one", "version": 0})
        job = server.wait_state(job_id)
        assert ends_of(job) == ["done"] and job["version"] == 2 and job["strikes"] == 0, job
        assert server.chat("a/one")["choices"] and server.feedback("a/one")["version"] == 3
        assert server.is_healthy()


def wait_for_weights(server, job_id):
    """Until the job says that it waits for lost weights."""
    server.wait_until(lambda: any("lost on the server's disk" in event.get("reason", "") for event in server.job(job_id)["events"]), what="the reason")
    assert server.job(job_id)["state"] == "queued"


def wait_for_tries(server, count):
    """Until so many more cycles found no weights."""
    before = server.log().count("lost on the server's disk")
    server.wait_until(lambda: server.log().count("lost on the server's disk") >= before + count, what="another try")


def test_restored_weights(tmp_path):
    """Feedback that was acknowledged before its version was lost waits, through any number of starts, until it is restored."""
    version, aside = tmp_path / "db" / "adapters" / "a" / "one" / "v000000", tmp_path / "aside"
    with serving(tmp_path / "db") as server:
        server.init("a/one")
    with serving(tmp_path / "db", arguments=["--roles", "bridge,storage,scheduler,sampler"]) as server:
        job_id = server.feedback("a/one", wait=False)["job_id"]
    version.rename(aside)
    for _ in range(2):
        with serving(tmp_path / "db") as server:
            wait_for_tries(server, 2)
            wait_for_weights(server, job_id)
            events = server.job(job_id)["events"]
            wait_for_tries(server, 1)
            assert server.job(job_id)["events"] == events  # said once
    aside.rename(version)
    with serving(tmp_path / "db") as server:
        job = server.wait_state(job_id)
        assert ends_of(job) == ["done"] and job["strikes"] == 0, job


def test_odd_name_of_the_data_directory(tmp_path):
    with serving(tmp_path / "my..data") as server:
        server.init("a/one")
        content = server.request("GET", "/v1/lora/export?lora_id=a/one").body
        server.call("POST", "/v1/lora/import?lora_id=a/two", content, headers={"Content-Type": "application/zip"})
        assert server.chat("a/two")["choices"]
