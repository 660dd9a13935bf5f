"""Two processes: bridge, storage and sampler in one; scheduler and trainer in the other. Either may be killed at any time."""
import pathlib
import signal
import threading

import pytest

from server import FAST, PATIENCE, ends_of, Server

LONG = FAST + ("cycle.steps=400", "cycle.rows=16", "cycle.max_tokens=64")


class Pair:
    def __init__(self, tmp_path):
        self.data = tmp_path / "db"
        self.main = Server(self.data, arguments=["--roles", "bridge,storage,sampler"])
        self.node = self.new_node(FAST)

    def new_node(self, settings):
        return Server(self.data, settings=settings, arguments=["--roles", "scheduler,trainer", "--connect", f"ipc://{self.data}/claas.ipc"],
                      log=str(self.data) + ".node.log")

    def start_node(self, settings=FAST):
        self.node = self.new_node(settings).start()

    def wait_joined(self):
        self.main.wait_until(lambda: self.main.health()["status"] == "healthy", what="a joined node")


@pytest.fixture
def pair(tmp_path):
    both = Pair(tmp_path)
    both.main.start()
    yield both
    both.node.kill()
    both.main.kill()


def test_loop_over_two_processes(pair):
    pair.start_node()
    pair.wait_joined()
    pair.main.init("a/one")
    before = pair.main.text("a/one")
    reply = pair.main.feedback("a/one")
    assert reply["status"] == "ok" and reply["version"] == 1
    assert pair.main.text("a/one@0") == before
    assert pair.main.call("POST", "/v1/lora/rollback", {"lora_id": "a/one", "version": 0})["version"] == 0
    assert pair.node.stop() == 0
    assert pair.main.stop() == 0


def test_without_the_node(pair):
    """Chat goes on; what needs the node says so at once."""
    assert pair.main.chat("base")["choices"]
    assert pair.main.health()["status"] == "degraded"
    refused = pair.main.request("POST", "/v1/lora/init", {"lora_id": "a/one"})
    assert refused.status == 503 and refused.headers["Retry-After"]
    pair.start_node()
    pair.wait_joined()
    pair.main.init("a/one")


def test_kill_the_node_during_a_cycle(pair):
    pair.start_node(LONG)
    pair.wait_joined()
    pair.main.init("a/one")
    answer = pair.main.chat("a/one")["id"]
    jobs = [pair.main.feedback("a/one", response_id=answer, wait=False)["job_id"]]
    for settings in (LONG, FAST):
        pair.main.wait_until(lambda: any(e["kind"] == "step" for e in pair.main.job(jobs[0])["events"]), what="a step")
        jobs.append(pair.main.feedback("a/one", response_id=answer, wait=False)["job_id"])
        pair.node.kill()
        refused = pair.main.request("POST", "/v1/feedback", {"lora_id": "a/one", "response_id": answer, "feedback": "x"})
        assert refused.status == 503, refused
        assert pair.main.chat("a/one")["choices"]
        pair.start_node(settings)
        pair.wait_joined()
    ended = pair.main.wait_jobs(jobs, 60)
    assert all(ends_of(job) == ["done"] for job in ended.values()), ended
    assert pair.main.versions("a/one")["current"] == max(job["version"] for job in ended.values())


def test_kill_the_main_process_during_a_cycle(pair):
    """The node finds the new main process by itself, and its jobs go on."""
    pair.start_node(FAST + ("cycle.steps=60", "cycle.rows=16", "cycle.max_tokens=64"))
    pair.wait_joined()
    pair.main.init("a/one")
    answer = pair.main.chat("a/one")["id"]
    jobs = [pair.main.feedback("a/one", response_id=answer, wait=False)["job_id"]]
    pair.main.wait_state(jobs[0], "training")
    pair.main.kill()
    pair.main.start()
    pair.wait_joined()
    jobs.append(pair.main.feedback("a/one", response_id=answer, wait=False)["job_id"])
    ended = pair.main.wait_jobs(jobs, 60)
    assert all(ends_of(job) == ["done"] for job in ended.values()), ended
    assert pair.node.is_running()
    assert pair.node.stop() == 0


def test_waiting_client_survives_the_node(pair):
    """A request that waits for its version is not failed by the restart of who trains."""
    pair.start_node(LONG)
    pair.wait_joined()
    pair.main.init("a/one")
    results = []
    waiting = threading.Thread(target=lambda: results.append(pair.main.feedback("a/one")))
    waiting.start()
    pair.main.wait_until(lambda: any(j["state"] == "training" for j in pair.main.call("GET", "/v1/jobs")["jobs"]))
    pair.node.kill()
    pair.start_node()
    waiting.join(60)
    assert results and results[0]["status"] == "ok" and results[0]["version"] == 1


def test_two_nodes_of_one_kind(pair):
    """They would take the names from each other in turns: the second is refused."""
    pair.start_node()
    pair.wait_joined()
    second = pair.new_node(FAST)
    second.log_path += ".second"
    try:
        code, said = second.fail_to_start(timeout=20)
        assert code == 1 and "another server runs on" in said, said
    finally:
        second.kill()
    pair.main.init("a/one")
    assert pair.main.feedback("a/one")["status"] == "ok"


def test_trainer_before_its_server(tmp_path):
    """It waits, says so, can be told to end, and joins the server that comes at last."""
    main = Server(tmp_path / "db", arguments=["--roles", "bridge,storage,scheduler,sampler"])
    alone = Server(tmp_path / "db", arguments=["--role", "trainer"], log=tmp_path / "trainer.log")
    launched = []
    try:
        for count in (1, 2):
            launched.append(threading.Thread(target=lambda: alone.launch()))  # pylint: disable=unnecessary-lambda
            launched[-1].start()
            line = f"waiting for the node at ipc://{tmp_path}/db/claas.ipc: no server answers there yet"
            alone.wait_until(lambda said=count: alone.log().count(line) == said, what="the line that says so")  # pylint: disable=cell-var-from-loop
            assert alone.is_running()
            if count == 1:
                alone.terminate()
                assert alone.process.wait(20 * PATIENCE) == 0, alone.log()
                launched[-1].join()
                alone.kill()
        main.start()
        main.wait_until(lambda: main.health()["status"] == "healthy", what="a joined trainer")
        main.init("a/one")
        assert main.feedback("a/one")["version"] == 1
        launched[-1].join(20 * PATIENCE)
        assert alone.stop() == 0
        assert main.stop() == 0
    finally:
        for server in (alone, main):
            server.kill()
        for thread in launched:
            thread.join()


@pytest.mark.skipif(PATIENCE != 1, reason="sanitizers keep the signals of crashes to themselves")
def test_a_job_that_crashes_its_trainer(tmp_path):
    """Also in a process of its own: kill -9 is no strike, a crash seen from inside is, and the third parks the job."""
    main = Server(tmp_path / "db", arguments=["--roles", "bridge,storage,scheduler,sampler"], settings=LONG)
    alone = Server(tmp_path / "db", arguments=["--role", "trainer"], settings=LONG, log=tmp_path / "trainer.log")
    try:
        main.start()
        alone.start()
        main.wait_until(lambda: main.health()["status"] == "healthy", what="a joined trainer")
        main.init("a/one")
        main.init("a/two")
        job_id = main.feedback("a/one", wait=False)["job_id"]
        main.wait_state(job_id, "training")
        alone.kill()
        for strikes in (0, 1, 2):
            cycles = batches(main, job_id)
            alone.start()
            main.wait_until(lambda: batches(main, job_id) > cycles and main.job(job_id)["state"] == "training",  # pylint: disable=cell-var-from-loop
                            what="another cycle")
            assert main.job(job_id)["strikes"] == strikes
            alone.process.send_signal(signal.SIGSEGV)
            assert alone.wait() == -signal.SIGSEGV
        job = main.wait_state(job_id, "failed", seconds=30)
        assert "the trainer crashed while it worked (signal 11)" in job["error"] and job["strikes"] == 3
        assert main.versions("a/one")["current"] == 0
        alone.start()
        other = main.feedback("a/two", wait=False, training={"steps": 1})["job_id"]
        assert ends_of(main.wait_state(other)) == ["done"]
        assert main.job(other)["strikes"] == 0
        assert alone.stop() == 0
        assert main.stop() == 0
    finally:
        for server in (alone, main):
            server.kill()


@pytest.mark.skipif(PATIENCE != 1, reason="sanitizers keep the signals of crashes to themselves")
def test_a_job_that_crashes_its_node(pair):
    """The scheduler crashes with the trainer, and counts at its next start. A crash of the process without either is no job's."""
    pair.start_node(LONG)
    pair.wait_joined()
    pair.main.init("a/one")
    job_id = pair.main.feedback("a/one", wait=False)["job_id"]
    pair.main.wait_state(job_id, "training")
    pair.main.process.send_signal(signal.SIGSEGV)
    assert pair.main.wait() == -signal.SIGSEGV
    pair.main.start()
    pair.wait_joined()
    cycles = 0  # until the node is there again, the job says what it was at
    for strikes in (0, 1, 2):
        pair.main.wait_until(lambda: batches(pair.main, job_id) > cycles and pair.main.job(job_id)["state"] == "training",  # pylint: disable=cell-var-from-loop
                             what="another cycle")
        assert pair.main.job(job_id)["strikes"] == strikes
        cycles = batches(pair.main, job_id)
        pair.node.process.send_signal(signal.SIGSEGV)
        assert pair.node.wait() == -signal.SIGSEGV
        pair.start_node(LONG if strikes < 2 else FAST)
    job = pair.main.wait_state(job_id, "failed", seconds=30)
    assert "the trainer crashed while it worked (signal 11)" in job["error"] and job["strikes"] == 3
    assert not pathlib.Path(pair.data, "crash-marker").exists()
    pair.main.wait_until(lambda: not pathlib.Path(pair.data, "crash-marker.trainer").exists(), what="a marker that was counted")
    assert pair.main.feedback("a/one")["version"] == 1
    assert pair.node.stop() == 0
    assert pair.main.stop() == 0


def batches(server, job_id):
    """How many cycles have taken the job."""
    return sum(transition["state"] == "batched" for transition in server.job(job_id)["transitions"])


def test_trainer_alone(tmp_path):
    """A server without a trainer, and the trainer beside it by --role: its lost device is its own end, not the server's."""
    main = Server(tmp_path / "db", arguments=["--roles", "bridge,storage,scheduler,sampler"])
    alone = [Server(tmp_path / "db", arguments=["--role", "trainer"], log=tmp_path / "trainer.log", environment=environment)
             for environment in ({"CLAAS_DEVICE_FAULT": "DEVICE_LOST:1"}, {})]
    try:
        main.start()
        assert main.health()["worker"]["status"] == "unhealthy"
        alone[0].start()
        main.wait_until(lambda: main.health()["status"] == "healthy", what="a joined trainer")
        main.init("a/one")
        job_id = main.feedback("a/one", wait=False)["job_id"]
        assert alone[0].wait(20) == 75, alone[0].log()
        assert main.chat("a/one")["choices"]
        assert ends_of(main.job(job_id)) == []
        alone[1].start()
        job = main.wait_state(job_id, seconds=60)
        assert ends_of(job) == ["done"] and main.versions("a/one")["current"] == 1
        assert alone[1].stop() == 0
        assert main.stop() == 0
    finally:
        for server in (*alone, main):
            server.kill()


@pytest.mark.parametrize("model", ["random:tiny-llama:1", "random:tiny-qwen3"])
def test_trainer_of_another_model(tmp_path, model):
    """Nothing is trained on it, and nothing is lost: the feedback waits, with the reason, for the right one."""
    main = Server(tmp_path / "db", arguments=["--roles", "bridge,storage,scheduler,sampler"])
    right, wrong = (Server(tmp_path / "db", arguments=["--role", "trainer"], log=tmp_path / "trainer.log", **more)
                    for more in ({}, {"model": model}))
    try:
        main.start()
        right.start()
        main.wait_until(lambda: main.health()["status"] == "healthy", what="a joined trainer")
        main.init("a/one")
        assert right.stop() == 0
        wrong.start()
        main.wait_until(lambda: main.health()["status"] == "healthy", what="a joined trainer")
        job_id = main.feedback("a/one", wait=False)["job_id"]
        reason = main.wait_until(lambda: next((e["reason"] for e in main.job(job_id)["events"] if "the trainer has" in e.get("reason", "")), None),
                                 what="the reason")
        assert f"the trainer has the model {model.replace(':', '-')} (" in reason and "the sampler random-tiny-llama (" in reason, reason
        assert wrong.stop() == 0
        right.start()
        job = main.wait_state(job_id)
        assert ends_of(job) == ["done"] and job["strikes"] == 0, job
        assert main.chat("a/one")["choices"]
        assert main.stop() == 0
    finally:
        for server in (right, wrong, main):
            server.kill()
