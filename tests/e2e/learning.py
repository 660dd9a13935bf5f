#!/usr/bin/env python3
"""Does one feedback change the answers? Measured from outside, over HTTP only, on the embedded model.

For each seed: one feedback about a name, then a second one about length on the same adapter, then rollback and withdrawal.
Prints one JSON line per seed and a verdict; exits 1 if a bound of the project is missed.

  learning.py --claas build/tools/claas --model SmolLM2-135M-Instruct.Q4_1.gguf [--seeds 1,2,3] [--set key=value]...
"""
import argparse
import json
import os
import statistics
import sys
import tempfile
import time

from server import Server

NAME_FEEDBACK = "Your name is Kuro. When asked who you are, say that your name is Kuro."
LENGTH_FEEDBACK = "Too long. Answer in one short sentence."
ASKED = "What is your name?"
ASKED_LENGTH = "What is photosynthesis?"
NAME_QUESTIONS = ["Who are you?", "Tell me your name.", "What should I call you?", "Please introduce yourself.",
                  "Do you have a name?", "Hi! And you are?"]
LENGTH_QUESTIONS = ["What is gravity?", "Why do leaves fall in autumn?", "What is a volcano?", "How does a bicycle work?",
                    "What is the internet?", "Why do we sleep?"]
UNRELATED = ["What is the capital of Italy?", "How do I bake bread?", "Explain what an atom is.",
             "Give me a tip for running faster.", "What is 12 times 12?", "Write a sentence about autumn."]


class Asker(Server):
    """Chats of the length that the bounds are about, with time for a slow machine."""

    def chat(self, model, question="hello", timeout=900, **more):
        return super().chat(model, question, timeout, **{"max_tokens": 64, **more})

    def answers(self, model, question, n, seed):
        reply = self.chat(model, question, n=n, temperature=0.7, top_p=0.9, seed=seed)
        return [choice["message"]["content"] for choice in reply["choices"]]


def share(server, model, questions, n, success, seed=1000):
    hits = [success(answer) for i, q in enumerate(questions) for answer in server.answers(model, q, n, seed + 100 * i)]
    return sum(hits) / len(hits)


def names_kuro(answer):
    return "kuro" in answer.lower()


def is_short(answer):
    return len(answer.split()) <= 25


def feedback(server, adapter, question, text):
    answer = server.chat(adapter, question, temperature=0.7, seed=7)
    started = time.monotonic()
    reply = server.call("POST", "/v1/feedback", {"lora_id": adapter, "response_id": answer["id"], "feedback": text,
                                                 "prompt": question, "response": answer["choices"][0]["message"]["content"] or "-"}, timeout=900)
    return reply, time.monotonic() - started


def run(args, seed):
    with tempfile.TemporaryDirectory() as folder:
        server = Asker(os.path.join(folder, "db"), model=args.model, settings=[f"cycle.seed={seed}", *args.set], binary=args.claas)
        server.start()
        try:
            adapter = server.call("POST", "/v1/lora/init", {"lora_id": "me/test"})["lora_id"]
            result = {"seed": seed}
            greedy = [server.chat("base", q, temperature=0)["choices"][0]["message"]["content"] for q in NAME_QUESTIONS]
            result["base_name"] = share(server, "base", NAME_QUESTIONS, 16, names_kuro)
            reply, seconds = feedback(server, adapter, ASKED, NAME_FEEDBACK)
            job = server.call("GET", "/v1/jobs/" + reply["job_id"])
            gate, base = job["result"]["gate"], job["result"]["base"]
            result.update(status1=reply["status"], seconds1=round(seconds, 1), published_step=job["result"]["published_step"],
                          nll_delta1=round(gate["nll"] - base["nll"], 3), kl1=round(gate["kl"], 3))
            result["name1"] = share(server, adapter, NAME_QUESTIONS, 16, names_kuro)
            result["leak1"] = share(server, adapter, UNRELATED, 8, names_kuro)
            reply, seconds = feedback(server, adapter, ASKED_LENGTH, LENGTH_FEEDBACK)
            result.update(status2=reply["status"], seconds2=round(seconds, 1))
            result["base_short"] = share(server, "base", LENGTH_QUESTIONS, 16, is_short)
            result["short2"] = share(server, adapter, LENGTH_QUESTIONS, 16, is_short)
            result["name2"] = share(server, adapter, NAME_QUESTIONS, 16, names_kuro)
            result["leak2"] = share(server, adapter, UNRELATED, 8, names_kuro)
            standing = server.call("GET", "/v1/lora/feedback?lora_id=me/test")
            result["standing"] = len(standing["feedback"])
            server.call("DELETE", "/v1/lora/feedback?lora_id=me/test&id=" + standing["feedback"][0]["id"])
            result["standing_after"] = len(server.call("GET", "/v1/lora/feedback?lora_id=me/test")["feedback"])
            server.call("POST", "/v1/lora/rollback", {"lora_id": "me/test", "version": 0})
            back = [server.chat(adapter, q, temperature=0)["choices"][0]["message"]["content"] for q in NAME_QUESTIONS]
            result["rollback_exact"] = back == greedy
            return result
        finally:
            server.stop()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--claas", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    rows = []
    for seed in args.seeds.split(","):
        rows.append(run(args, int(seed)))
        print(json.dumps(rows[-1]), flush=True)

    def mean(key):
        return statistics.mean(row[key] for row in rows)

    checks = {
        "base never says the name": all(row["base_name"] == 0 for row in rows),
        "name after one feedback >= 0.60": mean("name1") >= 0.60,
        "no seed below 0.50": min(row["name1"] for row in rows) >= 0.50,
        "leak after one feedback <= 0.05": mean("leak1") <= 0.05,
        "neutral NLL within +0.05": all(row["nll_delta1"] <= 0.05 for row in rows),
        "short after the second >= 0.40": mean("short2") >= 0.40,
        "name after the second >= 0.55": mean("name2") >= 0.55,
        "leak after the second <= 0.05": mean("leak2") <= 0.05,
        "rollback gives the base's answers": all(row["rollback_exact"] for row in rows),
        "withdrawn feedback is gone": all(row["standing_after"] == row["standing"] - 1 for row in rows),
    }
    for name, good in checks.items():
        print(("ok   " if good else "FAIL ") + name)
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
