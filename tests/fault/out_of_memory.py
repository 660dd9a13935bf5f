#!/usr/bin/env python3
"""The device's memory ends in the middle of learning: what was acknowledged stays, chat goes on, nothing else is touched.

First a server with all the memory it wants learns from one feedback and says what that took. Then, on the same directory, one
whose device has enough to chat but not to learn: its job must wait again with the reason, while chats are answered (or
refused as overloaded). Then one without a limit again, in which the job ends and its version is served.

  out_of_memory.py --claas PROGRAM [--model random:tiny-llama] [--device cuda] [--share 0.1] [--limit BYTES] [--set key=value]...

On a CUDA device the limit is CLAAS_CUDA_MEMORY_LIMIT: what is held at rest plus --share of what a cycle took beyond it, or
--limit. On the CPU, which has no such limit, training steps fail as if there were one (CLAAS_DEVICE_FAULT).
"""
import argparse
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from server import TINY, Server, ends_of  # pylint: disable=wrong-import-position

# The pool of keys and values would shrink with the limit and make room.
FAST = ("device.kv_tokens=16384", "cycle.steps=2", "cycle.rows=4", "cycle.max_tokens=8", "log.level=warning", "log.format=text")
NAME = "a/one"


def device_of(server):
    return server.health()["model"]["device"]


def errors_of(job):
    return [event for event in job["events"] if event.get("error")]


def chat_goes_on(server):
    """Answers or refusals, nothing else; how many of each."""
    counts = {}
    for number in range(4):
        for model in ("base", NAME):
            body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": f"hello {number}"}]}
            answer = server.request("POST", "/v1/chat/completions", body)
            counts[answer.status] = counts.get(answer.status, 0) + 1
    if not counts.keys() <= {200, 503}:
        raise SystemExit(f"FAIL chat was answered with {counts}: {answer}")
    return counts


def learn_unlimited(make, args):
    """The limit to set, after one feedback with all the memory there is."""
    server = make().start()
    try:
        server.init(NAME)
        server.chat(NAME)
        rest = device_of(server)["bytes_peak"]
        reply = server.feedback(NAME, timeout=300)
        peak = device_of(server)["bytes_peak"]
        if server.stop() != 0:
            raise SystemExit("FAIL the first server did not end well")
    finally:
        server.kill()
    limit = args.limit or int(rest + args.share * max(0, peak - rest))
    print(f"at rest {rest / 1e6:.1f} MB, at most {peak / 1e6:.1f} MB, {reply['status']}; the limit is {limit / 1e6:.1f} MB", flush=True)
    return limit


def starve(make, environment):
    """One feedback while there is not enough: the job, which must wait for better times."""
    server = make(environment).start()
    try:
        before = server.versions(NAME)
        job_id = server.feedback(NAME, wait=False)["job_id"]
        job = server.wait_until(lambda: (lambda j: j if errors_of(j) else None)(server.job(job_id)), 120, "an error of the job")
        print("the job's error:", json.dumps(errors_of(job)[0]), flush=True)
        if ends_of(job):
            raise SystemExit(f"FAIL the job ended at the first failure: {job}")
        print("chats meanwhile:", chat_goes_on(server), flush=True)
        if server.versions(NAME) != before:
            raise SystemExit(f"FAIL versions changed: {before} to {server.versions(NAME)}")
        if server.stop() != 0:
            raise SystemExit(f"FAIL the server without memory did not end well:\n{server.log()[-3000:]}")
    finally:
        server.kill()
    return job_id


def recover(make, job_id):
    server = make().start()
    try:
        job = server.wait_state(job_id, seconds=120)
        if ends_of(job) not in (["done"], ["rejected"]):
            raise SystemExit(f"FAIL the job ended {ends_of(job)}: {job}")
        if job["state"] == "done" and server.versions(NAME)["current"] != job["version"]:
            raise SystemExit(f"FAIL version {job['version']} is not served: {server.versions(NAME)}")
        if server.stop() != 0:
            raise SystemExit("FAIL the last server did not end well")
    finally:
        server.kill()
    return job["state"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", default=TINY)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        def make(environment=None):
            return Server(os.path.join(folder, "db"), model=args.model, settings=[*FAST, f"device.name={args.device}", *args.set],
                          binary=args.claas, environment=environment)

        limit = learn_unlimited(make, args)
        environment = {"CLAAS_CUDA_MEMORY_LIMIT": str(limit)} if args.device == "cuda" else {"CLAAS_DEVICE_FAULT": "NO_MEMORY:1"}
        job_id = starve(make, environment)
        print(f"out of memory, then with all of it: the job ended {recover(make, job_id)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
