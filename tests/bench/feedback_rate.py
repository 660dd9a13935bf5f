#!/usr/bin/env python3
"""How many feedbacks a second are accepted durably: each one answered after its fsync, not before.

Producers are ZeroMQ clients with some requests outstanding each, as a busy front end has them; the HTTP rate is for
comparison. Learning is held back by cycles that take long, so only acceptance is measured. Every acknowledged
feedback is looked up in the end.

  feedback_rate.py --claas build/tools/claas [--producers 8] [--outstanding 32] [--seconds 5] [--floor 2000]

The last line is one JSON object. Exit 1 below the floor, or if one acknowledged feedback is missing.
"""
import argparse
import http.client
import json
import multiprocessing
import os
import pathlib
import sqlite3
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))

from server import Server
from wire import FEEDBACK, REP, Client

# One cycle for the whole run: the queue only grows.
SETTINGS = ("cycle.steps=1000", "cycle.rows=1", "cycle.max_tokens=1", "log.level=error", "feedback.queue_max=10000000", "feedback.items_max=1")


def body(lora, answer):
    return {"lora_id": lora, "response_id": answer, "feedback": "Your name is Kuro. When asked who you are, say that your name is Kuro."}


def produce_zmq(data, lora, answer, outstanding, seconds, results):
    """Keeps `outstanding` requests under way for `seconds`."""
    request = {"requests": [body(lora, answer)]}
    with Client(data) as client:
        sent_at, jobs, waits, under_way = {}, [], [], 0
        end = time.monotonic() + seconds
        while time.monotonic() < end or under_way:
            while under_way < outstanding and time.monotonic() < end:
                sent_at[client.send("scheduler", FEEDBACK, request)] = time.monotonic()
                under_way += 1
            if not under_way:
                break
            reply = client.receive(60)
            if reply is None or reply.kind != REP:
                raise SystemExit(f"FAIL {reply}")
            under_way -= 1
            waits.append(time.monotonic() - sent_at.pop(reply.correlation))
            jobs.append(reply.body["job_id"])
    results.put((jobs, waits))


def produce_http(url, lora, answer, seconds, results):
    """One request at a time on a kept connection."""
    host, port = url.split("//")[1].split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    text = json.dumps({**body(lora, answer), "wait": False})
    jobs, waits = [], []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        start = time.monotonic()
        connection.request("POST", "/v1/feedback", text, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        content = reply.read()
        if reply.status != 202:
            raise SystemExit(f"FAIL {reply.status} {content!r}")
        waits.append(time.monotonic() - start)
        jobs.append(json.loads(content)["job_id"])
    results.put((jobs, waits))


def measure(function, arguments, producers):
    """Runs the producers as processes: acknowledged jobs, rate, and latencies in milliseconds."""
    results = multiprocessing.Queue()
    processes = [multiprocessing.Process(target=function, args=(*arguments(i), results)) for i in range(producers)]
    start = time.monotonic()
    for process in processes:
        process.start()
    collected = [results.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    elapsed = time.monotonic() - start
    jobs = [job for part, _ in collected for job in part]
    waits = sorted(wait for _, part in collected for wait in part)
    return jobs, {"per_s": round(len(jobs) / elapsed), "count": len(jobs), "p50_ms": round(1e3 * waits[len(waits) // 2], 2),
                  "p99_ms": round(1e3 * waits[len(waits) * 99 // 100], 2)}


def check_on_disk(data, jobs):
    """After a kill -9: every acknowledged job and its feedback is there."""
    database = sqlite3.connect(os.path.join(data, "claas.db"))
    found = {row[0] for row in database.execute("SELECT job_id FROM jobs JOIN feedback ON feedback.job = jobs.seq")}
    database.close()
    return len(set(jobs) - found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", default="random:tiny-llama")
    parser.add_argument("--producers", type=int, default=8)
    parser.add_argument("--outstanding", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--floor", type=float, default=2000)
    parser.add_argument("--dir", help="where the data directory is made: the disk that is measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        data = os.path.join(folder, "db")
        server = Server(data, model=args.model, settings=SETTINGS, binary=args.claas).start()
        try:
            names = [f"rate/{i}" for i in range(args.producers)]
            for name in names:
                server.init(name)
            answers = [server.chat(name)["id"] for name in names]
            zmq_jobs, over_zmq = measure(produce_zmq, lambda i: (data, names[i], answers[i], args.outstanding, args.seconds), args.producers)
            http_jobs, over_http = measure(produce_http, lambda i: (server.url, names[i], answers[i], args.seconds), args.producers)
        finally:
            server.kill()
        missing = check_on_disk(data, zmq_jobs + http_jobs)
    print(f"ZeroMQ, {args.producers} producers x {args.outstanding} outstanding: {over_zmq['per_s']} feedbacks/s, "
          f"p50 {over_zmq['p50_ms']} ms, p99 {over_zmq['p99_ms']} ms")
    print(f"HTTP, {args.producers} connections, one request each at a time: {over_http['per_s']} feedbacks/s, "
          f"p50 {over_http['p50_ms']} ms, p99 {over_http['p99_ms']} ms")
    print(f"after kill -9: {missing} of {len(zmq_jobs) + len(http_jobs)} acknowledged feedbacks are missing")
    print(json.dumps({"zmq": over_zmq, "http": over_http, "missing": missing, "floor": args.floor}))
    sys.exit(0 if missing == 0 and over_zmq["per_s"] >= args.floor else 1)


if __name__ == "__main__":
    main()
