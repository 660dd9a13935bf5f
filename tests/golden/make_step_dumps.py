#!/usr/bin/env python3
"""Golden values of whole training steps: tiny models, PyTorch and PEFT on them, and what came out.

Writes step/<model>/ beside this file: a Hugging Face directory (config.json, bfloat16 model.safetensors, a byte-level
tokenizer.json) and dump.safetensors with

  tokens.<row>.{student,teacher,response}  int32      rollout.<row>, mask.<row>   float32
  logits                                   base logits of row 2's prompt and response
  init.<name>                              LoRA parameters, names as PEFT writes them
  <loss>.loss, <loss>.norm                 first step: loss, gradient norm before clipping
  <loss>.grad.<name>                       first step: gradients before clipping
  <loss>.losses                            losses of the ten steps
  <loss>.after.<name>                      parameters after ten steps

all computed in float64 and stored as float32, for the losses "kl" (forward KL, whole vocabulary, token mean) and "jsd" (alpha 0.5, whole vocabulary, mean of sample
means, KL to base 0.1). Needs torch, transformers, peft, tokenizers. Run again only when a model or a loss is added.
"""
import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

HERE = pathlib.Path(__file__).resolve().parent / "step"
VOCAB = 288
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
THETA = 10000.0
RATE, BETAS, EPS, DECAY, CLIP = 5e-4, (0.9, 0.999), 1e-8, 0.01, 1.0
IS_CLIP, KL_WEIGHT = 2.0, 0.1
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, dict(head_dim=16, rms_norm_eps=1e-5)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, dict(rms_norm_eps=1e-6)),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=32, rms_norm_eps=1e-6)),
}


def make_model(family, tied, generator):
    config_class, model_class, extra = FAMILIES[family]
    shape = dict(SHAPE)
    if family == "qwen2":
        shape["hidden_size"] = 64  # its head size is hidden / heads
    config = config_class(**shape, **extra, tie_word_embeddings=tied, attn_implementation="sdpa", pad_token_id=None,
                          bos_token_id=None, eos_token_id=257)
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                value = 1 + 0.2 * noise
            elif "embed" in name or "lm_head" in name:
                value = 0.2 * noise
            elif name.endswith("bias"):
                value = 0.3 * noise
            else:
                value = noise / p.shape[-1] ** 0.5
            p.copy_(value.to(torch.bfloat16).to(torch.float32))
    return model.eval()


def norm_forward(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotary_forward(self, x, position_ids):
    dim = 2 * len(self.inv_freq)
    frequency = THETA ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.cat([position_ids[..., None].double() * frequency] * 2, -1)
    return angle.cos(), angle.sin()


def make_exact(model):
    """Norms, angles and softmax in float64 too: transformers computes them in float32 whatever the model's type."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm_forward.__get__(module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = rotary_forward.__get__(module)
    return model.double()


def write_tokenizer(directory):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}) + "\n")


def write_model(model, directory, tied):
    directory.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    for key in ("attn_implementation", "_attn_implementation", "transformers_version"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    tensors = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in model.named_parameters()}
    if not tied:
        assert "lm_head.weight" in tensors
    save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})
    write_tokenizer(directory)


def make_rows(generator):
    def tokens(count):
        return torch.randint(0, VOCAB, (count,), generator=generator, dtype=torch.int64)

    prompt, hinted = tokens(9), tokens(14)
    rows = []
    for student, teacher, count in [(prompt, hinted, 7), (prompt, hinted, 20), (tokens(21), tokens(30), 18),
                                    (tokens(17), tokens(23), 1), (prompt, tokens(33), 12)]:
        response = tokens(count)
        mask = torch.ones(count)
        if count == 18:
            mask[2:5] = 0
            mask[-2:] = 0
        rows.append(dict(student=student, teacher=teacher, response=response, mask=mask))
    return rows


def logprobs(model, prompt, response):
    """Log-probabilities [response, vocabulary] that predict the response."""
    ids = torch.cat([prompt, response])[None]
    return torch.log_softmax(model(ids).logits[0, len(prompt) - 1:-1], -1)


def position_losses(kind, s, t, row, base):
    """Per position, as include/claas/loss.h defines it."""
    y = row["response"][:, None]
    if kind == "kl":
        divergence = (t.exp() * (t - s)).sum(-1)
    else:
        m = torch.log(0.5 * s.exp() + 0.5 * t.exp())
        divergence = 0.5 * (s.exp() * (s - m)).sum(-1) + 0.5 * (t.exp() * (t - m)).sum(-1)
    own = s.gather(-1, y)[:, 0]
    ratio = (own.detach() - row["rollout"]).clamp(-20, 20).exp().clamp(max=IS_CLIP)
    loss = ratio * divergence
    if kind == "jsd":
        x = base.gather(-1, y)[:, 0] - own
        loss = loss + KL_WEIGHT * (x.exp() - 1 - x)
    return loss


def total_loss(kind, model, rows, frozen):
    losses, masks = [], []
    for row, (teacher, base) in zip(rows, frozen):
        losses.append(position_losses(kind, logprobs(model, row["student"], row["response"]), teacher, row, base))
        masks.append(row["mask"].to(losses[-1].dtype))
    if kind == "kl":
        return sum((a * b).sum() for a, b in zip(losses, masks)) / sum(b.sum() for b in masks)
    return sum((a * b).sum() / b.sum() for a, b in zip(losses, masks)) / len(rows)


def lora_names(model):
    return {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}


def run_loss(kind, model, rows, frozen, init, dump):
    parameters = lora_names(model)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(init[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=DECAY)
    losses = []
    for step in range(10):
        optimizer.zero_grad()
        loss = total_loss(kind, model, rows, frozen)
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            for name, p in parameters.items():
                dump[f"{kind}.grad.{name}"] = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        if step == 0:
            dump[f"{kind}.loss"] = loss.detach().clone()[None]
            dump[f"{kind}.norm"] = norm.detach().clone()[None]
        optimizer.step()
    dump[f"{kind}.losses"] = torch.tensor(losses)
    for name, p in parameters.items():
        dump[f"{kind}.after.{name}"] = p.detach().clone()
    print(f"  {kind}: {losses[0]:.6f} -> {losses[-1]:.6f}")


def main():
    for index, (family, tied) in enumerate((f, t) for f in FAMILIES for t in (True, False)):
        generator = torch.Generator().manual_seed(100 + index)
        name = f"{family}-{'tied' if tied else 'untied'}"
        print(name)
        base_model = make_model(family, tied, generator)
        write_model(base_model, HERE / name, tied)
        rows = make_rows(generator)
        dump = {}
        model = make_exact(get_peft_model(base_model, LoraConfig(r=4, lora_alpha=8, target_modules=MODULES)))
        with torch.no_grad(), model.disable_adapter():
            frozen = [(logprobs(model, r["teacher"], r["response"]), logprobs(model, r["student"], r["response"]))
                      for r in rows]
            dump["logits"] = model(torch.cat([rows[2]["student"], rows[2]["response"]])[None]).logits[0]
        for row, (_, base) in zip(rows, frozen):
            own = base.gather(-1, row["response"][:, None])[:, 0]
            row["rollout"] = own + 0.3 * torch.randn(own.shape, generator=generator)
            row["rollout"] = row["rollout"].float()
        init = {}
        for key, p in lora_names(model).items():
            scale = p.shape[1] ** -0.5 if "lora_A" in key else 0.05
            init[key] = (scale * torch.randn(p.shape, generator=generator)).float()
            dump[f"init.{key}"] = init[key]
        for i, row in enumerate(rows):
            for key in ("student", "teacher", "response"):
                dump[f"tokens.{i}.{key}"] = row[key].to(torch.int32)
            dump[f"rollout.{i}"] = row["rollout"]
            dump[f"mask.{i}"] = row["mask"]
        for kind in ("kl", "jsd"):
            run_loss(kind, model, rows, frozen, init, dump)
        dump = {k: (v if v.dtype == torch.int32 else v.detach().float()).contiguous() for k, v in dump.items()}
        save_file(dump, str(HERE / name / "dump.safetensors"), metadata={"torch": torch.__version__})


if __name__ == "__main__":
    sys.exit(main())
