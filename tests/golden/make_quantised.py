#!/usr/bin/env python3
"""A tiny llama of quantised blocks, step/quantised.gguf: decoding reads the file's blocks there, so its bits can be
compared with those of prefill and training, which read rounded copies. The first layer mixes encodings within q|k|v and
gate|up, the second does not. Random weights; needs numpy and gguf. Run again only when an encoding is added."""
import pathlib

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType
HIDDEN, WIDTH, VOCAB, HEADS, KV_HEADS, HEAD = 64, 96, 288, 4, 2, 16
MIXED = dict(attn_q=Q.Q4_1, attn_k=Q.Q8_0, attn_v=Q.Q5_0, attn_output=Q.Q4_0, ffn_gate=Q.Q5_1, ffn_up=Q.Q4_1,
             ffn_down=Q.Q8_0)
PLAIN = dict.fromkeys(MIXED, Q.Q4_1)
ROWS = dict(attn_q=HEADS * HEAD, attn_k=KV_HEADS * HEAD, attn_v=KV_HEADS * HEAD, attn_output=HIDDEN, ffn_gate=WIDTH,
            ffn_up=WIDTH, ffn_down=HIDDEN)


def byte_alphabet():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(others)}
    return [table[b] for b in range(256)]


def main():
    rng = np.random.default_rng(5)
    writer = gguf.GGUFWriter(pathlib.Path(__file__).resolve().parent / "step" / "quantised.gguf", "llama")
    writer.add_name("quantised")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_block_count(2)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(byte_alphabet() + ["he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
                          + [f"<|unused{i}|>" for i in range(VOCAB - 260)])
    writer.add_token_types([1] * 257 + [3] * (VOCAB - 257))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(259)

    def add(name, rows, columns, qtype):
        values = (rng.standard_normal((rows, columns)) / columns ** 0.5).astype(np.float32)
        if name == "token_embd.weight":
            values *= 2
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)

    add("token_embd.weight", VOCAB, HIDDEN, Q.Q8_0)
    writer.add_tensor("output_norm.weight", (1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32))
    for layer, types in enumerate((MIXED, PLAIN)):
        for name, qtype in types.items():
            add(f"blk.{layer}.{name}.weight", ROWS[name], WIDTH if name == "ffn_down" else HIDDEN, qtype)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight",
                              (1 + 0.2 * rng.standard_normal(HIDDEN)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
