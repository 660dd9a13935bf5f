#!/usr/bin/env python3
"""Tiny models as transformers writes them, for the readers' tests.

usage: make_tiny_models.py DIRECTORY        (needs torch, transformers, tokenizers)

Writes tiny-llama (float32, tied), tiny-qwen2 (float16, untied, biases, two and more shards) and tiny-qwen3 (bfloat16,
QK-norm, head_dim != hidden / heads), each a whole directory with a byte-level tokenizer and the ChatML template, and
expected.json: per model a few fields, and per tensor the sum of value * (1 + index % 7) over its elements.
Committed as tests/golden/tiny_models.
"""
import json
import pathlib
import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
          "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHAPE = dict(vocab_size=288, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=256, bos_token_id=257, eos_token_id=258)


def make_tokenizer():
    vocab = {text: i for i, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for text in SPECIALS:
        vocab[text] = len(vocab)
    merges = [("h", "e"), ("l", "l"), ("\u0120", "t"), ("he", "ll")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")
    fast.chat_template = CHATML
    return fast


def randomise(model, generator):
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else 1.0 + 0.2 * noise)


def checksum(tensor):
    values = tensor.detach().to(torch.float64).flatten()
    return float((values * (1 + torch.arange(values.numel()) % 7)).sum())


def main():
    root = pathlib.Path(sys.argv[1])
    generator = torch.Generator().manual_seed(11)
    plans = [
        ("tiny-llama", LlamaForCausalLM, torch.float32,
         LlamaConfig(**SHAPE, tie_word_embeddings=True, rms_norm_eps=1e-5,
                     rope_parameters={"rope_theta": 50000.0, "rope_type": "default"}), "1GB"),
        ("tiny-qwen2", Qwen2ForCausalLM, torch.float16,
         Qwen2Config(**SHAPE, tie_word_embeddings=False), "24KB"),
        ("tiny-qwen3", Qwen3ForCausalLM, torch.bfloat16,
         Qwen3Config(**SHAPE, head_dim=32, tie_word_embeddings=True), "1GB"),
    ]
    expected = {}
    for name, kind, dtype, config, shard in plans:
        model = kind(config)
        randomise(model, generator)
        model = model.to(dtype)
        model.generation_config.eos_token_id = [258, 256]
        target = root / name
        model.save_pretrained(target, max_shard_size=shard)
        make_tokenizer().save_pretrained(target)
        tensors = dict(model.named_parameters())
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
        expected[name] = {
            "hidden": config.hidden_size,
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            "tied": int(config.tie_word_embeddings), "rope_theta": int(theta), "stops": 2,
            "sums": {key: checksum(value) for key, value in tensors.items()},
        }
    (root / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
