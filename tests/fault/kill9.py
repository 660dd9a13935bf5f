#!/usr/bin/env python3
"""kill -9 at random instants of chat, feedback, training and publishing: nothing acknowledged may be lost.

After every kill the server must start again. In the end every acknowledged feedback has ended done or rejected, exactly once,
every version directory is whole, and the versions form a chain without holes.

  kill9.py --claas build/tools/claas [--model random:tiny-llama] [--kills 100] [--seconds S] [--seed 1] [--backlog 200] [--set key=value]...
"""
import argparse
import collections
import http.client
import json
import os
import pathlib
import random
import signal
import struct
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))

from server import ENDED, TINY, Failed, Server, ends_of

FAST = ("cycle.steps=3", "cycle.rows=4", "cycle.max_tokens=8", "log.level=warning")


class Load:
    """Chats and sends feedback until told to stop; what was acknowledged is remembered. Of an adapter's jobs at most `backlog` are
    open, so that a slow device comes to their end."""

    def __init__(self, server, adapters, seed, backlog):
        self.server, self.adapters, self.random, self.backlog = server, adapters, random.Random(seed), backlog
        self.jobs, self.lock, self.running, self.failures = {}, threading.Lock(), True, []
        self.threads = [threading.Thread(target=self.run, args=(name,)) for name in adapters]
        for thread in self.threads:
            thread.start()

    def has_room(self, open_jobs):
        while open_jobs and self.server.job(open_jobs[0])["state"] in ENDED:
            open_jobs.popleft()
        return len(open_jobs) < self.backlog

    def run(self, name):
        open_jobs = collections.deque()
        while self.running:
            try:
                if len(open_jobs) >= self.backlog and not self.has_room(open_jobs):
                    time.sleep(0.05)
                    continue
                answer = self.server.chat(name, f"hello {self.random.random()}", timeout=20, max_tokens=6)
                reply = self.server.feedback(name, response_id=answer["id"], timeout=20, wait=False)
                with self.lock:
                    self.jobs[reply["job_id"]] = name
                open_jobs.append(reply["job_id"])
            except Failed as failed:
                # 404: the answer was sent, but what it was had not come to the disk. Nothing else may go wrong.
                if failed.answer.status not in (404, 503):
                    self.failures.append(str(failed))
            except (OSError, http.client.HTTPException, ValueError):
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
    for folder, _, files in os.walk(os.path.join(data, "adapters")):
        if os.path.basename(folder).startswith("v0") and files:
            if "adapter_config.json" not in files or "adapter_model.safetensors" not in files:
                raise SystemExit(f"FAIL {folder} is not whole: {files}")
            with open(os.path.join(folder, "adapter_config.json"), encoding="utf-8") as file:
                json.load(file)
            for name in files:
                if name.endswith(".safetensors"):
                    check_safetensors(os.path.join(folder, name))
            count += 1
    return count


def check_jobs(jobs):
    states = {}
    for job_id, job in jobs.items():
        ends = ends_of(job)
        if len(ends) != 1 or ends[0] not in ("done", "rejected"):
            raise SystemExit(f"FAIL {job_id} ended {ends}: {json.dumps(job)[:2000]}")
        states[ends[0]] = states.get(ends[0], 0) + 1
    return states


def check_versions(server, name):
    answer = server.versions(name)
    numbers = [v["version"] for v in answer["versions"]]
    if sorted(numbers) != list(range(len(numbers))) or answer["current"] != max(numbers):
        raise SystemExit(f"FAIL {name} has versions {numbers}, current {answer['current']}")
    for entry in answer["versions"][1:]:
        if entry["parent"] != entry["version"] - 1:
            raise SystemExit(f"FAIL {name}: {entry}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=1e9, help="no more kills after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest", type=float, default=0.6, help="longest life of a server in seconds")
    parser.add_argument("--backlog", type=int, default=200, help="feedbacks of an adapter that may be unfinished")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    chance = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(os.path.join(folder, "db"), model=args.model, settings=[*FAST, *args.set], binary=args.claas).start()
        adapters = ["a/one", "a/two", "b/three"]
        for name in adapters:
            server.init(name)
        load, kills = Load(server, adapters, args.seed, args.backlog), 0
        try:
            end = time.monotonic() + args.seconds
            while kills < args.kills and time.monotonic() < end:
                time.sleep(chance.uniform(0.02, args.longest))
                server.kill()
                server.start()
                kills += 1
        finally:
            load.stop()
        try:
            states = check_jobs(server.wait_jobs(load.jobs))
            for name in adapters:
                check_versions(server, name)
            server.process.send_signal(signal.SIGTERM)
            code = server.wait()
        finally:
            server.kill()
        directories = check_directories(server.data)
        if load.failures:
            raise SystemExit(f"FAIL {load.failures[0]}")
        print(f"{kills} kills, {len(load.jobs)} acknowledged feedbacks ended {states}, "
              f"{directories} version directories whole, exit {code}")
        sys.exit(0 if code == 0 and load.jobs else 1)


if __name__ == "__main__":
    main()
