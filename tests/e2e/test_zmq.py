"""The ZeroMQ side of the real program: the example client, and a second process with scheduler and trainer."""
import subprocess
import sys

import pytest

from server import ROOT, Server

pytest.importorskip("zmq")


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
