#!/usr/bin/env python3
"""How fast a model's weights are read from Hugging Face shards, beside how fast the same files can be read at all.

Writes a model of Qwen3-8B's layers (as many as asked for) with random weights in bfloat16, then reads the shards by four
threads that throw away what they read, and starts the server on them, by turns; the files are dropped from the page cache
before each, unless --warm.

  load_rate.py --claas build/tools/claas [--layers 36] [--rounds 3] [--warm] [--folder DIR] [--set key=value]...

The last line is one JSON object. Exit 1 if the server did not say what it read.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import statistics
import struct
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "e2e"))
from server import Server  # pylint: disable=wrong-import-position

HIDDEN, MLP, HEADS, KV_HEADS, HEAD, VOCAB = 4096, 12288, 32, 8, 128, 151936
SHARD_BYTES = 4_000_000_000
CHUNK = 16 << 20
LINE = re.compile(r"weights: ([0-9.]+) GB read in ([0-9.]+) s, ([0-9.]+) GB/s")


def shapes(layers):
    """Names and shapes of all tensors."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for number in range(layers):
        at = f"model.layers.{number}."
        yield at + "input_layernorm.weight", (HIDDEN,)
        yield at + "post_attention_layernorm.weight", (HIDDEN,)
        yield at + "self_attn.q_norm.weight", (HEAD,)
        yield at + "self_attn.k_norm.weight", (HEAD,)
        yield at + "self_attn.q_proj.weight", (HEADS * HEAD, HIDDEN)
        yield at + "self_attn.k_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield at + "self_attn.v_proj.weight", (KV_HEADS * HEAD, HIDDEN)
        yield at + "self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD)
        yield at + "mlp.gate_proj.weight", (MLP, HIDDEN)
        yield at + "mlp.up_proj.weight", (MLP, HIDDEN)
        yield at + "mlp.down_proj.weight", (HIDDEN, MLP)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def bytes_of(shape):
    size = 2
    for dimension in shape:
        size *= dimension
    return size


def weights(count):
    """bfloat16 of about 0.01, so that nothing overflows: random signs and fractions."""
    raw = bytearray(os.urandom(count))
    raw[1::2] = bytes((byte & 0x80) | 0x3C for byte in raw[1::2])
    return bytes(raw)


def write_shard(path, tensors, block):
    header, at = {}, 0
    for name, shape in tensors:
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + bytes_of(shape)]}
        at += bytes_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while at > 0:
            file.write(block[:min(at, len(block))])
            at -= min(at, len(block))
        file.flush()
        os.fsync(file.fileno())


def write_model(folder, layers):
    """Returns the shards' paths."""
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": HIDDEN, "intermediate_size": MLP,
              "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD,
              "vocab_size": VOCAB, "max_position_embeddings": 4096, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
              "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "eos_token_id": 257}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    special = [{"id": 256 + i, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False,
                "rstrip": False} for i, text in enumerate(("<|im_start|>", "<|im_end|>"))]
    tokenizer = {"version": "1.0", "added_tokens": special, "normalizer": {"type": "NFC"},
                 "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                 "decoder": {"type": "ByteLevel"},
                 "model": {"type": "BPE", "vocab": {signs[byte]: byte for byte in range(256)}, "merges": []}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    shards, filled = [[]], 0
    for tensor in shapes(layers):
        if filled > 0 and filled + bytes_of(tensor[1]) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += bytes_of(tensor[1])
    block = weights(64 << 20)
    index, paths = {}, []
    for number, tensors in enumerate(shards):
        paths.append(folder / f"model-{number + 1:05}-of-{len(shards):05}.safetensors")
        write_shard(paths[-1], tensors, block)
        index.update({name: paths[-1].name for name, _ in tensors})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    return paths


def drop(paths):
    for path in paths:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_piece(path, first, end):
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        while first < end:
            got = os.preadv(file.fileno(), [buffer[:min(CHUNK, end - first)]], first)
            first += got
            if got == 0:
                break


def read_rate(paths):
    """GB/s of four threads that read everything once."""
    pieces = []
    for path in paths:
        size = path.stat().st_size
        pieces += [(path, first, min(first + (256 << 20), size)) for first in range(0, size, 256 << 20)]
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda piece: read_piece(*piece), pieces))
    return sum(path.stat().st_size for path in paths) * 1e-9 / (time.perf_counter() - started)


def load_rate(args, model, work):
    """GB/s that the server says, and seconds until it is ready."""
    settings = ["chat_template=chatml", *args.set]
    server = Server(work / "data", model=str(model), settings=settings, binary=args.claas)
    started = time.perf_counter()
    try:
        server.start()
        ready = time.perf_counter() - started
    finally:
        server.stop()
    found = LINE.search(server.log())
    pathlib.Path(server.log_path).unlink()
    return (float(found[3]), ready) if found else (None, ready)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--claas", required=True)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--folder", help="where the model is written, and removed again")
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the folder is removed
    with tempfile.TemporaryDirectory(prefix="claas-load-", dir=args.folder) as name:
        folder = pathlib.Path(name) / "model"
        folder.mkdir()
        paths = write_model(folder, args.layers)
        reads, loads, ready = [], [], []
        for _ in range(args.rounds):
            if not args.warm:
                drop(paths)
            reads.append(read_rate(paths))
            if not args.warm:
                drop(paths)
            rate, seconds = load_rate(args, folder, pathlib.Path(name))
            loads.append(rate)
            ready.append(seconds)
        total = sum(path.stat().st_size for path in paths)
    if None in loads:
        print("the server did not say what it read", file=sys.stderr)
        return 1
    row = {"gb": round(total * 1e-9, 2), "warm": args.warm, "read_gb_s": round(statistics.median(reads), 2),
           "load_gb_s": round(statistics.median(loads), 2), "ready_s": round(statistics.median(ready), 2)}
    print(f"{row['gb']} GB: loaded at {row['load_gb_s']} GB/s, read at {row['read_gb_s']} GB/s; ready after {row['ready_s']} s")
    print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
