#!/usr/bin/env python3
"""From a feedback to the version that is served, for one tenant and for several at the same time.

Each tenant has an adapter of its own, chats with it and sends one feedback after the other; the time is that from sending a
feedback until its answer says that the new version is current. Refused ones are counted, not timed.

  tenants.py --claas build/tools/claas --model SmolLM2-135M-Instruct.Q4_1.gguf [--tenants 1,8] [--rounds 4] [--set key=value]...

The last line is one JSON object. Exit 1 if a version was not the one served, or nothing was published.
"""
import argparse
import json
import math
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from server import Server, in_parallel  # pylint: disable=wrong-import-position

LESSONS = [("What is your name?", "Your name is Kuro. When asked who you are, say that your name is Kuro."),
           ("What is photosynthesis?", "Too long. Answer in one short sentence."),
           ("What is your favourite colour?", "Say that your favourite colour is green."),
           ("Hello!", "Greet people with the words: Good day.")]


def teach(server, name, rounds, seed):
    """One tenant: seconds of the published feedbacks, and how many were refused."""
    seconds, refused = [], 0
    for number in range(rounds):
        question, words = LESSONS[(seed + number) % len(LESSONS)]
        answer = server.chat(name, question, timeout=600, temperature=0.7, seed=seed, max_tokens=48)
        started = time.perf_counter()
        reply = server.feedback(name, words, answer["id"], timeout=1200)
        passed = time.perf_counter() - started
        if reply.get("status") == "ok":
            seconds.append(passed)
            current = server.versions(name)["current"]
            if current != reply["version"]:
                raise SystemExit(f"FAIL {name}: version {reply['version']} was answered, {current} is served")
        else:
            refused += 1
    return seconds, refused


def quantile(ordered, share):
    """Nearest rank."""
    return round(ordered[max(0, math.ceil(share * len(ordered)) - 1)], 3) if ordered else None


def measure(args, tenants):
    with tempfile.TemporaryDirectory() as folder:
        settings = ["log.level=warning", "log.format=text", *args.set]
        server = Server(pathlib.Path(folder) / "db", model=args.model, settings=settings, binary=args.claas).start()
        try:
            names = [f"tenant{i}/chat" for i in range(tenants)]
            for name in names:
                server.call("POST", "/v1/lora/init", {"lora_id": name})
            # The first cycle of a process measures the base and chooses kernels: no tenant's everyday.
            server.call("POST", "/v1/lora/init", {"lora_id": "warm/up"})
            started = time.perf_counter()
            teach(server, "warm/up", 1, 0)
            first = time.perf_counter() - started
            started = time.perf_counter()
            results = in_parallel([lambda i=i: teach(server, names[i], args.rounds, i) for i in range(tenants)])
            passed = time.perf_counter() - started
        finally:
            server.stop()
    ordered = sorted(s for seconds, _ in results for s in seconds)
    return {"tenants": tenants, "published": len(ordered), "refused": sum(refused for _, refused in results),
            "p50_s": quantile(ordered, 0.5), "p95_s": quantile(ordered, 0.95), "worst_s": quantile(ordered, 1),
            "first_of_process_s": round(first, 3), "all_s": round(passed, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tenants", default="1,8", help="how many at the same time; several runs")
    parser.add_argument("--rounds", type=int, default=4, help="feedbacks of each")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    rows = []
    for tenants in args.tenants.split(","):
        row = measure(args, int(tenants))
        rows.append(row)
        print(f"{row['tenants']:3} tenants: {row['published']} published, {row['refused']} refused; seconds from feedback to "
              f"served version: p50 {row['p50_s']}, p95 {row['p95_s']}, worst {row['worst_s']}", flush=True)
    print(json.dumps(rows))
    return 0 if all(row["published"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
