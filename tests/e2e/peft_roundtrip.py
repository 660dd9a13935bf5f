#!/usr/bin/env python3
"""Adapters between this project and PEFT, both ways, on the tiny models of tests/golden/tiny_models.

usage: peft_roundtrip.py ADAPTER_TOOL TINY_MODELS        (needs torch, transformers, peft)

For each model: an adapter written by adapter_tool loads in PEFT without missing or unexpected keys, every matrix is the
file's, the logits differ from the base's and are those of base + alpha/r * B A merged by hand; one written by PEFT (also
with rslora, and from a bfloat16 model) is copied by adapter_tool and gives the same logits in PEFT. Prints one line per
check and `N passed, N failed`; exits 1 on a failure.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9, 200, 37, 258, 11, 64]])
results = {True: 0, False: 0}


def check(name, ok):
    results[bool(ok)] += 1
    print(("ok      " if ok else "FAILED  ") + name)


def run(tool, *args):
    done = subprocess.run([tool, *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr.strip())
    return done.returncode == 0


def base(path, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def adapted(path, adapter):
    return logits(peft.PeftModel.from_pretrained(base(path), adapter).eval())


def merged(path, adapter):
    """Base weights plus alpha/r * B A, by hand."""
    model = base(path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith(".lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                parameters[target] += scale * (b @ a)
    return logits(model)


def from_c(tool, path, work):
    adapter = work / "from_c"
    if not run(tool, "init", path, adapter, 8, 16, 5):
        return check(f"{path.name}: adapter_tool init", False)
    model = peft.PeftModel.from_pretrained(base(path), adapter)
    state = peft.get_peft_model_state_dict(model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    check(f"{path.name}: PEFT has exactly the file's matrices",
          state.keys() == tensors.keys() and all(torch.equal(state[k], tensors[k]) for k in tensors))
    ours = logits(model.eval())
    check(f"{path.name}: the adapter changes the logits", (ours - logits(base(path))).abs().max() > 1e-2)
    check(f"{path.name}: PEFT's logits are those of the merged weights",
          torch.allclose(ours, merged(path, adapter), atol=2e-4, rtol=1e-4))


def from_peft(tool, path, work, label, dtype=torch.float32, **options):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES, task_type="CAUSAL_LM",
                             init_lora_weights=False, **options)
    model = peft.get_peft_model(base(path, dtype), config, autocast_adapter_dtype=False)
    source, target = work / f"peft_{label}", work / f"copy_{label}"
    model.save_pretrained(source)
    if not run(tool, "copy", path, source, target):
        return check(f"{path.name}: adapter_tool copy ({label})", False)
    before, after = load_file(source / "adapter_model.safetensors"), load_file(target / "adapter_model.safetensors")
    check(f"{path.name}: matrices of PEFT survive a copy ({label})",
          before.keys() == after.keys() and all(torch.equal(before[k].float(), after[k]) for k in before))
    check(f"{path.name}: and give PEFT the same logits ({label})",
          torch.allclose(adapted(path, source), adapted(path, target), atol=1e-5, rtol=1e-5))


def main():
    tool, root = sys.argv[1], pathlib.Path(sys.argv[2])
    for path in sorted(p for p in root.iterdir() if p.is_dir()):
        with tempfile.TemporaryDirectory() as name:
            work = pathlib.Path(name)
            from_c(tool, path, work)
            from_peft(tool, path, work, "plain")
            from_peft(tool, path, work, "rslora", use_rslora=True)
            from_peft(tool, path, work, "bfloat16", dtype=torch.bfloat16)
    print(f"{results[True]} passed, {results[False]} failed")
    return 1 if results[False] or not results[True] else 0


if __name__ == "__main__":
    sys.exit(main())
