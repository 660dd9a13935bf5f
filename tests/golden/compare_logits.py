#!/usr/bin/env python3
"""Logits of a llama GGUF against transformers on the same dequantised weights.

    compare_logits.py MODEL.gguf PRINT_LOGITS

PRINT_LOGITS is the program of tests/kernels/print_logits.c. Passes when the float32 path is within 1e-3 of PyTorch's
float32 everywhere, and the bfloat16 path's root mean square error is no worse than PyTorch's own in bfloat16.
Needs torch, transformers, gguf."""
import pathlib
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
ENDS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight"}
COUNT = 200


def load(path):
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads, hidden = field("attention.head_count"), field("attention.head_count_kv"), field("embedding_length")
    state = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        if tensor.name in ENDS:
            state[ENDS[tensor.name]] = values
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in ("attn_q", "attn_k"):  # this architecture interleaves the halves of each head
            h = heads if kind == "attn_q" else kv_heads
            values = values.reshape(h, -1, 2, hidden).transpose(1, 2).reshape(-1, hidden)
        state[f"model.layers.{layer}.{NAMES[kind]}.weight"] = values
    tied = "lm_head.weight" not in state
    config = LlamaConfig(vocab_size=state["model.embed_tokens.weight"].shape[0], hidden_size=hidden,
                         intermediate_size=field("feed_forward_length"), num_hidden_layers=field("block_count"),
                         num_attention_heads=heads, num_key_value_heads=kv_heads,
                         rms_norm_eps=field("attention.layer_norm_rms_epsilon"), rope_theta=field("rope.freq_base"),
                         tie_word_embeddings=tied, attn_implementation="eager")
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model.eval()


def main():
    path, program = sys.argv[1:3]
    model = load(path)
    tokens = torch.randint(0, model.config.vocab_size, (COUNT,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(tokens[None]).logits[0].numpy()
        rounded = model.to(torch.bfloat16)(tokens[None]).logits[0].float().numpy()
    ours = {}
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        np.array(tokens, dtype="<i4").tofile(directory / "tokens")
        for precision in ("f32", "bf16"):
            subprocess.check_call([program, path, precision, directory / "tokens", directory / "out"])
            ours[precision] = np.fromfile(directory / "out", dtype="<f4").reshape(exact.shape)
    rms = {name: float(np.sqrt(np.mean((values - exact) ** 2))) for name, values in [*ours.items(), ("torch", rounded)]}
    worst = float(np.abs(ours["f32"] - exact).max())
    print(f"float32: largest difference {worst:.2e} (at most 1e-3), rms {rms['f32']:.2e}")
    print(f"bfloat16: rms error {rms['bf16']:.4f}, PyTorch's {rms['torch']:.4f}")
    return 0 if worst <= 1e-3 and rms["bf16"] <= rms["torch"] else 1


if __name__ == "__main__":
    sys.exit(main())
