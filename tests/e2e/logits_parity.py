#!/usr/bin/env python3
"""Logits of the CPU back-end against transformers and PEFT on the same weights.

usage: logits_parity.py --tool BUILD/tests/kernels/dump_logits [--gguf MODEL.gguf] [--models DIRECTORY] [--json]

The GGUF (a Llama-family model) is turned into a Hugging Face directory by tests/bench/peers/gguf_to_hf.py: the same
dequantised weights, so what is left is arithmetic. --models holds small Hugging Face directories of the other families
(tests/golden/tiny_models). Checked for each model, over every position of every prompt:

  base         float32 within 1e-3 of transformers' float32
  bfloat16     (GGUF only) root mean square error against transformers' float32 no worse than that of transformers in
               bfloat16; the largest error is shown beside it
  ours -> PEFT an adapter trained here for some steps loads in PEFT and gives the same logits, within 1e-3 in float32
  PEFT -> ours an adapter with random A and B, written by PEFT, loads here and gives the same logits

What is left in float32 is rounding times the model's own sensitivity: every dot product here is one sum in increasing k
(the price of bits that do not depend on how rows are packed), which rounds about twice as much as PyTorch's blocked sums;
typical errors against float64 are 1.5 times PyTorch's. The more an adapter bends the model, the more sensitive single
positions become: the adapters are therefore those of a default cycle's steps and rates. One of rank 8 after 12 steps at a
constant 1e-3 was seen to be off by 1.6e-3 at 1 of 1066 positions, which is 17 times more sensitive than the median.

An adapter counts only if it moves the logits a hundred times further than the tolerance. Prints one line per check and
`N passed, N failed`; exits 1 on a failure, 77 where torch, transformers, peft or gguf is missing.
"""
import argparse
import inspect
import json
import pathlib
import subprocess
import sys
import tempfile
import textwrap

try:
    import gguf  # pylint: disable=unused-import  # gguf_to_hf.py needs it
    import numpy as np
    import peft
    import torch
    import transformers
except ImportError as missing:
    print(f"SKIPPED: {missing}")
    sys.exit(77)

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOLERANCE = 1e-3
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A default cycle's shape (rank, steps); dump_logits takes its rates too. All seeds count.
RANK, STEPS, SEEDS = 32, 8, (1, 2, 3)
PROSE = """The harbour town had two clocks, and they never agreed. The older one sat above the customs house and ran on
weights that a man called Anselm wound every Sunday; the newer one, electric and silent, looked down from the railway
station. For years the difference was four minutes, and people learned to live inside it: a wedding could begin on time
by one clock and late by the other, and nobody was to blame. Then a schoolteacher proposed that the town should choose.
She wrote to the council that four minutes a day were twenty-four hours a year, and that a whole day of every year was
being lost between the harbour and the station. The council met in March. The fishermen spoke for the customs house,
since the tide had been reckoned by it for two hundred years; the merchants spoke for the station, since a train does
not wait for a tide. A boy of eleven asked why both clocks could not be right in their own street. They laughed, and
then they stopped laughing, because it was the only proposal that cost nothing. So a brass line was laid across the
market square, and beside it, in letters the size of a hand, the words: here it is four minutes later. """

results = {True: 0, False: 0}
lines = []


def check(name, passed, text, **figures):
    passed = bool(passed)
    results[passed] += 1
    lines.append({"check": name, "passed": passed, **figures})
    print(f"{'ok      ' if passed else 'FAILED  '}{name}: {text}", flush=True)


# --- prompts ---

def make_prompts(directory, longest):
    """Token ids by name: a chat, code, many scripts, more than 300 tokens of prose, tokens drawn at random."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    chat = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": "What is your name?"}]
    prompts = {
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "code": inspect.getsource(textwrap.TextWrapper._wrap_chunks)[:900],
        "scripts": "Съешь ещё этих булок. 敏捷的棕色狐狸跳過了懶狗。 いろはにほへと 👩‍👩‍👧 نصٌّ حكيمٌ \n\n\t½ ∀x∈ℝ",
        "prose": PROSE + PROSE[:700],
    }
    ids = {name: tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in prompts.items()}
    vocab = transformers.AutoConfig.from_pretrained(directory).vocab_size
    ids["random"] = torch.randint(0, vocab, (320,), generator=torch.Generator().manual_seed(1)).tolist()
    ids = {name: tokens[:longest] for name, tokens in ids.items()}
    if longest >= 320 and len(ids["prose"]) < 300:
        raise SystemExit(f"the prose has only {len(ids['prose'])} tokens")
    return ids


# --- the two sides ---

class Ours:
    def __init__(self, tool, source, prompts, work):
        self.tool, self.source, self.prompts, self.work = tool, str(source), prompts, work
        self.files = [work / f"tokens_{name}" for name in prompts]
        for path, tokens in zip(self.files, prompts.values()):
            np.array(tokens, dtype="<i4").tofile(path)

    def logits(self, precision, adapter="-"):
        """Float32 [all tokens][vocab]."""
        out = self.work / "logits"
        subprocess.run([self.tool, "logits", self.source, precision, adapter, out, *self.files], check=True)
        values = np.fromfile(out, dtype="<f4")
        out.unlink()
        return values.reshape(sum(map(len, self.prompts.values())), -1)

    def train(self, directory, seed):
        # In float32: the sums of a step are then those of the parity tests, and the figures do not depend on the CPU.
        subprocess.run([self.tool, "train", self.source, "f32", directory, str(RANK), str(STEPS), str(seed)], check=True)


def open_base(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def theirs(model, prompts):
    with torch.no_grad():
        return np.concatenate([model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
                               for tokens in prompts.values()])


def theirs_exact_head(model, prompts):
    """A bfloat16 model whose last hidden state is multiplied in float32: PyTorch without the rounding of its logits."""
    head = model.get_output_embeddings().weight.float()
    with torch.no_grad():
        return np.concatenate([(model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0].float() @ head.T)
                               .numpy() for tokens in prompts.values()])


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def largest(values):
    """NaN if there is one, so that every comparison with it fails."""
    return float(np.abs(values).max())


# --- checks ---

def check_base(name, ours, exact):
    values = ours.logits("f32")
    worst = largest(values - exact)
    check(f"{name}, base, float32", worst <= TOLERANCE,
          f"largest difference {worst:.1e}, rms {rms(values - exact):.1e}, over {exact.shape[0]} positions "
          f"(logits to {largest(exact):.1f})", largest=worst, rms=rms(values - exact), positions=exact.shape[0])


def check_rounded(name, ours, directory, prompts, exact):
    model = open_base(directory).to(torch.bfloat16)
    columns = {"ours": ours.logits("bf16"), "PyTorch": theirs(model, prompts),
               "PyTorch with a float32 head": theirs_exact_head(model, prompts)}
    figures = {who: {"rms": rms(values - exact), "largest": largest(values - exact)} for who, values in columns.items()}
    check(f"{name}, base, bfloat16", figures["ours"]["rms"] <= figures["PyTorch"]["rms"],
          "; ".join(f"{who}: rms {f['rms']:.4f}, largest {f['largest']:.3f}" for who, f in figures.items()), **figures)
    start = 0
    for prompt, tokens in prompts.items():
        part = slice(start, start + len(tokens))
        start += len(tokens)
        print(f"            {prompt:8} {len(tokens):4} tokens   " + "   ".join(
            f"{who}: {rms(values[part] - exact[part]):.4f} / {largest(values[part] - exact[part]):.3f}"
            for who, values in columns.items()))


def check_adapter(name, ours, model, prompts, exact, adapter):
    peer = theirs(model, prompts)
    values = ours.logits("f32", adapter)
    worst, moved = largest(values - peer), largest(peer - exact)
    beyond = int((~(np.abs(values - peer).max(axis=1) <= TOLERANCE)).sum())
    check(name, worst <= TOLERANCE and moved >= 100 * TOLERANCE,
          f"largest difference {worst:.1e}, rms {rms(values - peer):.1e}; {beyond} of {len(values)} positions beyond "
          f"{TOLERANCE:g}; the adapter moves logits by up to {moved:.2f}", largest=worst, beyond=beyond, moved=moved)


def from_ours(name, ours, directory, prompts, exact, adapter, seed):
    ours.train(adapter, seed)
    model = peft.PeftModel.from_pretrained(open_base(directory), adapter).eval()
    matrices = [p for n, p in model.named_parameters() if "lora_B" in n]
    trained = all(bool((p != 0).any()) for p in matrices)
    check(f"{name}, ours {seed} -> PEFT, every B is trained", trained and matrices, f"{len(matrices)} matrices",
          matrices=len(matrices))
    check_adapter(f"{name}, ours {seed} -> PEFT, logits", ours, model, prompts, exact, adapter)


def from_peft(name, ours, directory, prompts, exact, adapter):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, task_type="CAUSAL_LM")
    model = peft.get_peft_model(open_base(directory), config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_A" in parameter_name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "lora_B" in parameter_name:
                parameter.normal_(std=0.01)
    model.save_pretrained(adapter)
    check_adapter(f"{name}, PEFT -> ours, logits", ours, model.eval(), prompts, exact, adapter)


def check_model(name, tool, source, directory, work, is_rounded, longest):
    prompts = make_prompts(directory, longest)
    ours = Ours(tool, source, prompts, work)
    exact = theirs(open_base(directory), prompts)
    check_base(name, ours, exact)
    if is_rounded:
        check_rounded(name, ours, directory, prompts, exact)
    for seed in SEEDS:
        from_ours(name, ours, directory, prompts, exact, work / f"ours{seed}", seed)
    from_peft(name, ours, directory, prompts, exact, work / "peft")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--tool", required=True, help="the program of tests/kernels/dump_logits.c")
    parser.add_argument("--gguf", help="the embedded model")
    parser.add_argument("--models", type=pathlib.Path, help="directory of Hugging Face directories")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for directory in sorted(p for p in args.models.iterdir() if p.is_dir()) if args.models else []:
        with tempfile.TemporaryDirectory() as work:
            check_model(directory.name, args.tool, directory, directory, pathlib.Path(work), False, 200)
    if args.gguf:
        with tempfile.TemporaryDirectory() as work:
            work = pathlib.Path(work)
            subprocess.run([sys.executable, ROOT / "tests/bench/peers/gguf_to_hf.py", args.gguf, work / "hf"], check=True,
                           stderr=subprocess.DEVNULL)
            check_model(pathlib.Path(args.gguf).name, args.tool, args.gguf, work / "hf", work, True, 400)
    if args.json:
        print(json.dumps({"checks": lines, "torch": torch.__version__, "transformers": transformers.__version__,
                          "peft": peft.__version__}))
    print(f"{results[True]} passed, {results[False]} failed")
    return 1 if results[False] or not results[True] else 0


if __name__ == "__main__":
    sys.exit(main())
