#!/usr/bin/env python3
"""The speed table: this project beside PyTorch and llama.cpp on the same machine, in one run.

  table.py --claas build/tools/claas --model SmolLM2-135M-Instruct.Q4_1.gguf [--rows NAME,...] [--iters N] [--json FILE]

Rows, in the order they run, one process at a time:
  torch-f32, torch-bf16  the step 4 x (128 + 128), hint 64, in PyTorch + PEFT (peers/pytorch_step.py, mode strong)
  torch-reference        the same as the Python system does it (mode reference, float32)
  step                   the same by `claas bench step`
  llama-decode, decode   tokens per second, one stream (and 8 for decode)
  llama-prefill, prefill tokens per second of a prompt of 512

Medians of --iters runs after each program's own warm-up. A ratio is shown where both of its sides ran; a row whose Python
packages are missing (tools/deps --bench installs them) is skipped with the reason. Peers run with --python (default: this
interpreter), without BLAS and OpenMP variables of the environment. Exits 1 if a row failed; a bound that is missed is shown,
not an error.

The machine must have nothing else to do. On a busy one a ratio flatters us, since threads that spin at barriers suffer most:
beside other work llama.cpp was seen at 2.8 tokens/s with two threads, where it has about 110 alone. So a ratio gets no verdict
when other processes had more than --busy CPUs' worth of time during a row of either side.
"""
import argparse
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
SHAPE = ["--batch", "4", "--prompt", "128", "--response", "128", "--hint", "64"]
ENVIRONMENT = {key: value for key, value in os.environ.items()
               if not key.startswith(("OPENBLAS_", "OMP_", "MKL_", "GOTO_", "BLIS_", "KMP_", "GOMP_", "ATEN_"))}
# (what, ours, peers of which the best counts, the figure, bound, goal)
RATIOS = [("step, against PyTorch's better one", "step", ("torch-f32", "torch-bf16"), "median_ms", 1.7, 2.3),
          ("step, against the reference's loop", "step", ("torch-reference",), "median_ms", None, None),
          ("decode, one stream, against llama.cpp", "decode", ("llama-decode",), "tok_s", 1.0, 1.5),
          ("prefill, against llama.cpp", "prefill", ("llama-prefill",), "tok_s", 3.0, None)]


def commands(args):
    """Row name -> (modules a peer needs, command)."""
    torch_step = [args.python, HERE / "peers/pytorch_step.py", "--model", "smollm2-135m", *SHAPE, "--device", "cpu",
                  "--threads", str(args.threads), "--iters", str(args.iters)]
    llama = [args.python, HERE / "peers/llama_cpp_speed.py", args.model, "--threads", str(args.threads), "--iters", str(args.iters)]
    ours = ["--model", args.model, "--threads", str(args.threads), "--iters", str(args.iters), "--json"]
    torch_needs = ("torch", "transformers", "peft")
    return {
        "torch-f32": (torch_needs, [*torch_step, "--mode", "strong", "--dtype", "float32"]),
        "torch-bf16": (torch_needs, [*torch_step, "--mode", "strong", "--dtype", "bfloat16"]),
        "torch-reference": (torch_needs, [*torch_step, "--mode", "reference", "--dtype", "float32"]),
        "step": ((), [args.claas, "bench", "step", *ours, *SHAPE]),
        "llama-decode": (("llama_cpp",), [*llama, "--mode", "decode"]),
        "decode": ((), [args.claas, "bench", "decode", *ours, "--batch", "1,8"]),
        "llama-prefill": (("llama_cpp",), [*llama, "--mode", "prefill"]),
        "prefill": ((), [args.claas, "bench", "prefill", *ours, "--prompt", "512"]),
    }


def missing_module(python, modules):
    for module in modules:
        done = subprocess.run([python, "-c", f"import {module}"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"cannot import {module}"])[-1]
    return None


def busy_seconds():
    """CPU seconds that the whole machine has spent, and those of our ended children."""
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    times = os.times()
    return ((user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"),
            times.user + times.system + times.children_user + times.children_system)


def run_row(args, name, modules, command):
    """{"row", "state": ok|skipped|failed, "results" or "reason"}."""
    reason = missing_module(args.python, modules)
    if reason:
        return {"row": name, "state": "skipped", "reason": reason}
    command = [str(word) for word in command]
    row = {"row": name, "command": command}
    started, (all_before, ours_before) = time.monotonic(), busy_seconds()
    try:
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return {**row, "state": "failed", "reason": f"not done after {args.timeout:g} s"}
    all_after, ours_after = busy_seconds()
    others = (all_after - all_before) - (ours_after - ours_before)
    row["others_cpus"] = round(max(others, 0) / (time.monotonic() - started), 2)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not results:
        said = done.stderr.strip().splitlines()[-3:]
        return {**row, "state": "failed", "reason": f"exit {done.returncode}: " + " | ".join(said)}
    return {**row, "state": "ok", "results": results}


def cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def show_row(row):
    if row["state"] != "ok":
        print(f"{row['row']:16} {row['state']}: {row['reason']}", flush=True)
        return
    for result in row["results"]:
        batch = f" x{result['batch']}" if row["row"] == "decode" else ""
        more = []
        if "median_ms" in result:
            more.append(f"{result['median_ms']:10.1f} ms")
        if "tok_s" in result:
            more.append(f"{result['tok_s']:9.1f} tok/s")
        if "share_of_peak" in result:
            more.append(f"{100 * result['share_of_peak']:.0f} % of the GEMM peak of {result['gemm_peak_gflop_s']:.0f} GFLOP/s")
        if "peak_bytes" in result:
            more.append(f"{result['peak_bytes'] / 2**20:.0f} MiB")
        print(f"{row['row'] + batch:16} {'   '.join(more)}", flush=True)


def ratios(rows, busy):
    """How many times faster ours is; where both sides ran. The first result of a row is the one compared (batch 1)."""
    figures = {row["row"]: row["results"][0] for row in rows if row["state"] == "ok"}
    others = {row["row"]: row["others_cpus"] for row in rows if row["state"] == "ok"}
    out = []
    for what, ours, peers, key, bound, goal in RATIOS:
        present = [peer for peer in peers if peer in figures]
        if ours not in figures or not present:
            continue
        is_time = key.endswith("_ms")
        best = (min if is_time else max)(figures[peer][key] for peer in present)
        ratio = best / figures[ours][key] if is_time else figures[ours][key] / best
        verdict = "" if bound is None else "met" if ratio >= bound else "MISSED"
        disturbed = max(others[name] for name in (ours, *present))
        if disturbed > busy:
            verdict = f"INVALID, the machine was busy (others had {disturbed:.1f} CPUs)"
        elif len(present) < len(peers):
            verdict = f"incomplete, without {', '.join(set(peers) - set(present))}"
        out.append({"what": what, "ratio": round(ratio, 3), "bound": bound, "goal": goal, "verdict": verdict})
    return out


def show_ratio(entry):
    bound = f"bound {entry['bound']}x" if entry["bound"] else ""
    goal = f", goal {entry['goal']}x" if entry["goal"] else ""
    print(f"{entry['what']:40} {entry['ratio']:6.2f}x   {bound}{goal}   {entry['verdict']}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", required=True, help="the binary")
    parser.add_argument("--model", required=True, help="the GGUF that both sides read")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument("--rows", help="comma separated; default all")
    parser.add_argument("--iters", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", type=float, default=0.1, help="CPUs' worth of other processes from which on ratios are invalid")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one row")
    parser.add_argument("--json", help="file for everything measured; - for standard output")
    args = parser.parse_args()
    # So that SIGTERM too ends the program that runs.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    table = commands(args)
    wanted = args.rows.split(",") if args.rows else list(table)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(table)}")
    print(f"{cpu_name()}, {os.cpu_count()} CPUs, {args.threads} threads, {args.iters} runs each, load {os.getloadavg()[0]:.2f}")
    rows = []
    for name in table:
        if name in wanted:
            rows.append(run_row(args, name, *table[name]))
            show_row(rows[-1])
    compared = ratios(rows, args.busy)
    for entry in compared:
        show_ratio(entry)
    if args.json:
        text = json.dumps({"cpu": cpu_name(), "threads": args.threads, "iters": args.iters, "rows": rows, "ratios": compared})
        if args.json == "-":
            print(text)
        else:
            pathlib.Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 1 if any(row["state"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
