#!/usr/bin/env python3
"""kill -9 at random instants of chat, feedback, training and publishing: nothing acknowledged may be lost.

After every kill the server must start again. In the end every acknowledged feedback has ended done or rejected, exactly once,
every version directory is whole, and the versions form a chain without holes.

  kill9.py --claas build/tools/claas [--model random:tiny-llama] [--kills 100] [--seed 1] [--set key=value]...
"""
import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

FAST = ["cycle.steps=3", "cycle.rows=4", "cycle.max_tokens=8", "log.level=warning"]


class Server:
    def __init__(self, args, data):
        self.args, self.data, self.url, self.process = args, data, None, None

    def start(self):
        command = [self.args.claas, "serve", "--listen", "127.0.0.1:0", "--data", os.path.join(self.data, "db"), "--model", self.args.model]
        for setting in FAST + self.args.set:
            command += ["--set", setting]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(os.path.join(self.data, "log"), "a"), text=True)
        line = self.process.stdout.readline()
        if not line.startswith("listening on "):
            raise SystemExit("FAIL the server did not start again:\n" + open(os.path.join(self.data, "log")).read()[-3000:])
        self.url = line.split()[-1]

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()

    def call(self, method, path, body=None, timeout=20):
        request = urllib.request.Request(self.url + path, method=method, data=json.dumps(body).encode() if body is not None else None,
                                         headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.loads(reply.read())


class Load:
    """Chats and sends feedback until told to stop; what was acknowledged is remembered."""

    def __init__(self, server, adapters, seed):
        self.server, self.adapters, self.random = server, adapters, random.Random(seed)
        self.jobs, self.lock, self.running = {}, threading.Lock(), True
        self.threads = [threading.Thread(target=self.run, args=(name,)) for name in adapters]
        for thread in self.threads:
            thread.start()

    def run(self, name):
        while self.running:
            try:
                answer = self.server.call("POST", "/v1/chat/completions", {
                    "model": name, "max_tokens": 6, "messages": [{"role": "user", "content": f"hello {self.random.random()}"}]})
                reply = self.server.call("POST", "/v1/feedback", {
                    "lora_id": name, "response_id": answer["id"], "feedback": "Say it better.", "wait": False})
                with self.lock:
                    self.jobs[reply["job_id"]] = name
            except (urllib.error.URLError, ConnectionError, TimeoutError, json.JSONDecodeError, OSError):
                time.sleep(0.01)  # the server is down: try again

    def stop(self):
        self.running = False
        for thread in self.threads:
            thread.join()


def check_safetensors(path):
    with open(path, "rb") as file:
        length, = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        end = max(tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__")
        if os.path.getsize(path) != 8 + length + end:
            raise SystemExit(f"FAIL {path} is not whole")


def check_directories(data):
    count = 0
    for folder, _, files in os.walk(os.path.join(data, "db", "adapters")):
        if os.path.basename(folder).startswith("v0") and files:
            if "adapter_config.json" not in files or "adapter_model.safetensors" not in files:
                raise SystemExit(f"FAIL {folder} is not whole: {files}")
            json.load(open(os.path.join(folder, "adapter_config.json")))
            for name in files:
                if name.endswith(".safetensors"):
                    check_safetensors(os.path.join(folder, name))
            count += 1
    return count


def check_jobs(server, jobs):
    states = {}
    for job_id in jobs:
        job = server.call("GET", "/v1/jobs/" + job_id)
        ends = [t["state"] for t in job["transitions"] if t["state"] in ("done", "rejected", "failed", "cancelled")]
        if len(ends) != 1 or ends[0] not in ("done", "rejected"):
            raise SystemExit(f"FAIL {job_id} ended {ends}: {json.dumps(job)[:2000]}")
        states[ends[0]] = states.get(ends[0], 0) + 1
    return states


def wait_for_jobs(server, jobs, seconds):
    deadline = time.monotonic() + seconds
    left = set(jobs)
    while left and time.monotonic() < deadline:
        for job_id in list(left):
            if server.call("GET", "/v1/jobs/" + job_id)["state"] in ("done", "rejected", "failed", "cancelled"):
                left.remove(job_id)
        if left:
            time.sleep(0.1)
    if left:
        raise SystemExit(f"FAIL {len(left)} jobs have not ended, {next(iter(left))} among them")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", default="random:tiny-llama")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=0.6, help="longest life of a server in seconds")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as data:
        server = Server(args, data)
        server.start()
        adapters = ["a/one", "a/two", "b/three"]
        for name in adapters:
            server.call("POST", "/v1/lora/init", {"lora_id": name, "lora_r": 4, "lora_alpha": 8})
        load = Load(server, adapters, args.seed)
        try:
            for _ in range(args.kills):
                time.sleep(chance.uniform(0.02, args.longest))
                server.kill()
                server.start()
        finally:
            load.stop()
        wait_for_jobs(server, load.jobs, 600)
        states = check_jobs(server, load.jobs)
        versions = {name: server.call("GET", "/v1/lora/versions?lora_id=" + name) for name in adapters}
        for name, answer in versions.items():
            numbers = [v["version"] for v in answer["versions"]]
            if sorted(numbers) != list(range(len(numbers))) or answer["current"] != max(numbers):
                raise SystemExit(f"FAIL {name} has versions {numbers}, current {answer['current']}")
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(40)
        directories = check_directories(data)
        print(f"{args.kills} kills, {len(load.jobs)} acknowledged feedbacks ended {states}, "
              f"{directories} version directories whole, exit {code}")
        sys.exit(0 if code == 0 and load.jobs else 1)


if __name__ == "__main__":
    main()
