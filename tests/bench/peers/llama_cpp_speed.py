#!/usr/bin/env python3
"""How fast llama.cpp reads a prompt and decodes, on the same GGUF: the peer of `claas bench prefill` and `decode`.

  llama_cpp_speed.py MODEL.gguf --mode decode,prefill --threads 2        needs: llama-cpp-python

Random token ids, so no text is turned into tokens; decoding is timed without sampling, to llama.cpp's advantage. Prints one
JSON line per mode: {mode, prompt, tokens, median_ms, min_ms, tok_s}.
"""
import argparse
import json
import random
import statistics
import time

import llama_cpp


def measure_prefill(model, ids):
    model.reset()
    started = time.perf_counter()
    model.eval(ids)
    return time.perf_counter() - started


def measure_decode(model, prompt, ids):
    model.reset()
    model.eval(prompt)
    started = time.perf_counter()
    for token in ids:
        model.eval([token])
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model")
    parser.add_argument("--mode", default="decode,prefill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that prefill reads")
    parser.add_argument("--context", type=int, default=64, help="tokens before the first one decoded")
    parser.add_argument("--tokens", type=int, default=128, help="tokens decoded")
    parser.add_argument("--iters", type=int, default=5)
    args = parser.parse_args()
    model = llama_cpp.Llama(args.model, n_ctx=max(args.prompt, args.context + args.tokens) + 16, n_batch=args.prompt,
                            n_ubatch=args.prompt, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
    rng = random.Random(1)

    def ids(count):
        return [rng.randrange(model.n_vocab()) for _ in range(count)]

    for mode in args.mode.split(","):
        count = args.tokens if mode == "decode" else args.prompt
        times = []
        for i in range(args.iters + 1):  # the first one warms up
            seconds = measure_decode(model, ids(args.context), ids(count)) if mode == "decode" else measure_prefill(model, ids(count))
            times += [seconds] if i else []
        median = statistics.median(times)
        print(json.dumps({"mode": mode, "prompt": args.context if mode == "decode" else args.prompt, "tokens": count,
                          "threads": args.threads, "median_ms": round(median * 1e3, 2), "min_ms": round(min(times) * 1e3, 2),
                          "tok_s": round(count / median, 1), "llama_cpp_python": llama_cpp.__version__}), flush=True)


if __name__ == "__main__":
    main()
