"""The ZeroMQ side of the real program: the example client, and a second process with scheduler and trainer."""
import json
import select
import subprocess
import sys

import pytest

from server import ROOT, Server
from wire import HEADER, JOB_EVENT, JOB_GET, Client

zmq = pytest.importorskip("zmq")


def run_client(data, name):
    command = [sys.executable, ROOT / "examples" / "client.py", f"{data}/claas.ipc", name]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_example_client(server):
    ran = run_client(server.data, "e2e/zmq")
    assert ran.returncode == 0, ran.stderr
    assert "state queued" in ran.stdout and "step 2 loss" in ran.stdout
    assert "\nversion 1 done" in ran.stdout or "rejected" in ran.stdout
    alone = subprocess.run([sys.executable, ROOT / "examples" / "client.py"], capture_output=True, text=True, timeout=20)
    assert alone.returncode == 1 and "python3 examples/client.py" in alone.stderr and "Traceback" not in alone.stderr


def read_events(subscriber, name):
    """The events of the adapter's only job, until it has ended."""
    events = []
    while not events or events[-1].get("state") not in ("done", "rejected"):
        assert subscriber.poll(30000), events
        topic, header, text = subscriber.recv_multipart()
        body = json.loads(text)
        assert topic == b"JOB_EVENT" and HEADER.unpack(header)[3] == JOB_EVENT
        if body["lora_id"] == name:
            events.append(body["event"])
    return events


def await_subscriptions(server, subscriber, watch):
    """A subscription takes a moment; events before it are not heard of, by design."""
    for _ in range(10):
        run_client(server.data, "e2e/other")
        if subscriber.poll(0) and select.select([watch.stdout], [], [], 0)[0]:
            return
    raise AssertionError("no event in ten jobs")


def test_events_are_published(server):
    """A subscriber hears of each event that the job's own list has, once and in order."""
    with zmq.Context.instance().socket(zmq.SUB) as subscriber:
        subscriber.setsockopt(zmq.SUBSCRIBE, b"JOB_EVENT")
        subscriber.connect(f"ipc://{server.data}/events.ipc")
        watch = subprocess.Popen([sys.executable, ROOT / "examples" / "watch.py", f"{server.data}/events.ipc"], stdout=subprocess.PIPE, text=True)
        try:
            assert watch.stdout.readline() == "listening\n"
            await_subscriptions(server, subscriber, watch)
            ran = run_client(server.data, "e2e/events")
            assert ran.returncode == 0, ran.stderr
            events = read_events(subscriber, "e2e/events")
            with Client(server.data) as client:
                job = client.ask("storage", JOB_GET, {"job_id": events[0]["job_id"]}).body["job"]
            assert events == job["events"] and len(events) > 4
            lines = iter(watch.stdout.readline, "")
            assert any(line.startswith(f"{events[0]['job_id']} e2e/events state {events[-1]['state']}") for line in lines)
        finally:
            watch.kill()
            watch.wait()
            watch.stdout.close()


def test_two_processes(make_server):
    main = make_server(arguments=("--set", "roles=bridge,storage,sampler")).start()
    node = make_server(data=main.data, arguments=("--set", "roles=scheduler,trainer", "--set", f"connect=ipc://{main.data}/claas.ipc"))
    node.log_path += ".node"
    assert node.launch() == "ready\n", node.log()
    ran = run_client(main.data, "e2e/zmq")
    assert ran.returncode == 0, ran.stderr + main.log() + node.log()
    node.process.kill()
    node.process.wait()
    ran = run_client(main.data, "e2e/zmq")
    assert ran.returncode == 1 and ran.stderr.startswith("UNAVAILABLE: "), ran.stderr
    assert node.launch() == "ready\n", node.log()
    ran = run_client(main.data, "e2e/zmq")
    assert ran.returncode == 0, ran.stderr + main.log() + node.log()
    node.process.terminate()
    assert node.process.wait(30) == 0
    assert main.stop() == 0, main.log()
