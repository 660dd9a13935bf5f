#!/usr/bin/env python3
"""What a person at the server notices: time to the first token, gaps in the stream while it learns, how long one feedback
takes, how much memory is resident.

  chat_gap.py --claas build/tools/claas --model SmolLM2-135M-Instruct.Q4_1.gguf [--set key=value]... [--json FILE]
  chat_gap.py --url http://127.0.0.1:8080 [--pid N]          a server that runs already (its adapter me/chat-gap is replaced)

In this order: short streamed chats on the idle server, each another question; one default feedback alone; then --feedbacks
more, one after the other, while --streams clients read one chat after the other each. A gap is the time between two pieces of text as a client reads them. Everything is
measured from outside, over HTTP, so the client's own share of the cores is part of it. Exits 1 if something failed; a
bound that is missed is shown, not an error. With --set log.level=debug the server's lines about what kept its device long are shown, too.
"""
import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import sys
import tempfile
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from server import Server, in_parallel  # pylint: disable=wrong-import-position

NAME = "me/chat-gap"
SHORT = ["What is rain?", "Name a fruit.", "Why is grass green?", "Say hello in French.", "What is a lake?", "Who wrote Hamlet?",
         "How tall is a giraffe?", "What is salt?", "Name a planet.", "Why do cats purr?"]
LONG = ["Tell me a long story about a lighthouse.", "Explain how bread is made, step by step.", "Describe a walk in a forest.",
        "Write about the history of ships.", "Explain how a clock works."]
LESSONS = [("What is your name?", "Your name is Kuro. When asked who you are, say that your name is Kuro."),
           ("What is photosynthesis?", "Too long. Answer in one short sentence.")]


def stream(server, model, question, max_tokens, seed, until=None):
    """Seconds to the first piece of text, and between the others. `until`: an event that ends the reading."""
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens, "seed": seed,
            "temperature": 0.7, "stream": True}
    last, first, gaps = time.perf_counter(), None, []
    for _, _, data in server.events("/v1/chat/completions", body, timeout=600):
        if data == "[DONE]":
            break
        choices = json.loads(data).get("choices")
        if not choices or not choices[0].get("delta", {}).get("content"):
            continue
        now = time.perf_counter()
        if first is None:
            first = now - last
        else:
            gaps.append(now - last)
        last = now
        if until is not None and until.is_set():
            break
    return first, gaps


def spread(seconds):
    """Milliseconds: median, 99th percentile, worst."""
    ordered = sorted(1e3 * s for s in seconds)
    if not ordered:
        return {"count": 0, "median": None, "p99": None, "worst": None}
    return {"count": len(ordered), "median": round(statistics.median(ordered), 2),
            "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2), "worst": round(ordered[-1], 2)}


def memory(pid):
    """Resident megabytes (2^20 bytes) now and at most."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        values = dict(line.split(":", 1) for line in file)
    return {key: round(int(values[key].split()[0]) / 1024, 1) for key in ("VmRSS", "VmHWM")}


def give_feedback(server, lesson, seed):
    """Seconds from the request to the served version, and the answer."""
    question, words = lesson
    answer = server.chat(NAME, question, seed=seed, temperature=0.7, max_tokens=64)
    started = time.perf_counter()
    reply = server.feedback(NAME, words, answer["id"], timeout=1200)
    return time.perf_counter() - started, reply


def feedback_under_chat(server, feedbacks, streams):
    """Feedbacks one after the other while every stream has one chat after the other: their figures, first tokens, gaps."""
    ended, results, firsts, gaps = threading.Event(), [], [], []

    def teach():
        try:
            for number in range(feedbacks):
                seconds, reply = give_feedback(server, LESSONS[(number + 1) % len(LESSONS)], 8 + number)
                results.append({"seconds": round(seconds, 2), "status": reply["status"], "version": reply["version"]})
        finally:
            ended.set()

    def read(which):
        number = which
        while not ended.is_set():
            first, more = stream(server, NAME, LONG[number % len(LONG)], 256, 100 + number, ended)
            firsts.extend([first] if first is not None else [])
            gaps.extend(more)
            number += streams

    in_parallel([teach, *(lambda which=which: read(which) for which in range(streams))])
    return results, firsts, gaps


def measure(server, pid, chats, feedbacks, streams):
    figures = {"memory_mib": {}}

    def note_memory(when):
        if pid:
            figures["memory_mib"][when] = memory(pid)

    server.call("POST", "/v1/lora/init", {"lora_id": NAME, "overwrite": True})
    note_memory("started")
    stream(server, NAME, "Hi", 4, 1)  # the first chat loads the adapter
    idle = [stream(server, NAME, SHORT[i % len(SHORT)], 16, i) for i in range(chats)]
    figures["first_token_idle_ms"] = spread([first for first, _ in idle if first is not None])
    figures["gap_idle_ms"] = spread([gap for _, gaps in idle for gap in gaps])
    seconds, reply = give_feedback(server, LESSONS[0], 7)
    figures["feedback_alone"] = {"seconds": round(seconds, 2), "status": reply["status"], "version": reply["version"]}
    note_memory("after one feedback")
    figures["feedbacks_under_chat"], firsts, gaps = feedback_under_chat(server, feedbacks, streams)
    figures["streams"] = streams
    figures["first_token_learning_ms"] = spread(firsts)
    figures["gap_learning_ms"] = spread(gaps)
    note_memory("after feedback under chat")
    return figures


def show(what, value, unit, bound=None):
    if value is None:
        verdict = "not measured"
    elif bound is None:
        verdict = ""
    else:
        verdict = f"bound {bound:g}: " + ("met" if value <= bound else "MISSED")
    print(f"{what:52} {'-' if value is None else format(value, '10.1f')} {unit:4} {verdict}".rstrip())


def report(figures, worst_gap, most_memory):
    if "ready_seconds" in figures:
        show("ready after", figures["ready_seconds"], "s", 10)
    show("first token of a short chat, idle, median", figures["first_token_idle_ms"]["median"], "ms", 100)
    show("first token of a short chat, idle, worst", figures["first_token_idle_ms"]["worst"], "ms")
    show("gap between tokens, idle, median", figures["gap_idle_ms"]["median"], "ms")
    show("one default feedback, end to end", figures["feedback_alone"]["seconds"], "s", 45)
    under_chat = figures["feedbacks_under_chat"]
    show(f"one default feedback while {figures['streams']} stream, median of {len(under_chat)}",
         statistics.median(one["seconds"] for one in under_chat), "s")
    show(f"gap while learning, median of {figures['gap_learning_ms']['count']}", figures["gap_learning_ms"]["median"], "ms")
    show("gap while learning, 99th percentile", figures["gap_learning_ms"]["p99"], "ms")
    show("gap while learning, worst", figures["gap_learning_ms"]["worst"], "ms", worst_gap)
    show("first token while learning, worst", figures["first_token_learning_ms"]["worst"], "ms")
    for when, values in figures["memory_mib"].items():
        show(f"resident, {when}", values["VmRSS"], "MiB")
        show(f"resident at most, {when}", values["VmHWM"], "MiB", most_memory)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", help="the binary; starts a server of its own")
    parser.add_argument("--model", help="of that server")
    parser.add_argument("--set", action="append", default=[], help="a setting of that server")
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process, for the memory")
    parser.add_argument("--chats", type=int, default=20, help="short chats on the idle server")
    parser.add_argument("--streams", type=int, default=1, help="chats at the same time while it learns")
    parser.add_argument("--feedbacks", type=int, default=1, help="feedbacks while chats stream")
    parser.add_argument("--worst-gap", type=float, default=250, help="bound of the gap while learning, in ms")
    parser.add_argument("--most-memory", type=float, default=1.2e9 / 2**20,
                        help="bound of resident memory in MiB; 0 = none, as where device.host_cache_mb keeps adapters there")
    parser.add_argument("--json", help="file for everything measured; - for standard output")
    args = parser.parse_args()
    if bool(args.url) == bool(args.claas and args.model):
        parser.error("either --url, or --claas and --model")
    # So that SIGTERM too runs what ends the server.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    # Many readers in one interpreter: none may hold it for long while another's token waits.
    sys.setswitchinterval(5e-4)
    load, reasons = os.getloadavg()[0], []
    if args.url:
        server = Server("unused")
        server.url = args.url
        figures = measure(server, args.pid, args.chats, args.feedbacks, args.streams)
    else:
        with tempfile.TemporaryDirectory() as directory:
            settings = ["log.level=warning", "log.format=text", *args.set]
            server = Server(pathlib.Path(directory) / "data", model=args.model, settings=settings, binary=args.claas)
            started = time.perf_counter()
            server.start()
            ready = time.perf_counter() - started
            try:
                figures = {"ready_seconds": round(ready, 2),
                           **measure(server, server.process.pid, args.chats, args.feedbacks, args.streams)}
            finally:
                server.stop()
            reasons = [line for line in server.log().splitlines() if re.search(r" ms for its turn| took \d+ ms$| passes before the first chat", line)]
    figures["load_before"] = round(load, 2)
    busy = load > 0.5
    print(f"load before: {load:.2f}" + (": BUSY, so the times below are no measurement and their verdicts mean nothing" if busy else ""))
    report(figures, args.worst_gap, args.most_memory or None)
    for line in reasons:
        print(line)
    if args.json:
        text = json.dumps(figures)
        if args.json == "-":
            print(text)
        else:
            pathlib.Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
