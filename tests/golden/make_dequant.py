#!/usr/bin/env python3
"""Golden values of the block decoders: random blocks and what the gguf package decodes them to.

Writes dequant.bin beside this file (needs numpy and gguf). Layout, little-endian, until the end of the file:
u32 ggml type, u32 elements, u32 bytes, the blocks, the float32 values. Scales are finite float16 numbers, denormal and
negative ones among them; every other byte is random. Run again only when a type is added.
"""
import pathlib
import struct

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType
# Byte offsets of the float16 fields in a block.
HALVES = {
    Q.Q4_0: [0], Q.Q4_1: [0, 2], Q.Q5_0: [0], Q.Q5_1: [0, 2], Q.Q8_0: [0], Q.Q2_K: [80, 82],
    Q.Q3_K: [108], Q.Q4_K: [0, 2], Q.Q5_K: [0, 2], Q.Q6_K: [208],
}


def halves(rng, count):
    """Finite float16 numbers: a third of them denormal, some zero."""
    values = (rng.standard_normal(count) * 10.0 ** rng.uniform(-4, 1, count)).astype(np.float16)
    bits = values.view(np.uint16).copy()
    tiny = rng.random(count) < 0.33
    bits[tiny] &= 0x83FF
    return bits.astype("<u2")


def plain(rng, qtype, count):
    if qtype == Q.F32:
        return rng.standard_normal(count).astype("<f4").tobytes()
    if qtype == Q.F16:
        return halves(rng, count).tobytes()
    return (rng.standard_normal(count).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def blocks(rng, qtype, count, size):
    data = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for offset in HALVES[qtype]:
        data[:, offset:offset + 2] = halves(rng, count).view(np.uint8).reshape(count, 2)
    return data.tobytes()


def main():
    rng = np.random.default_rng(7)
    out = bytearray()
    for qtype in [Q.F32, Q.F16, Q.BF16, *HALVES]:
        elements, size = gguf.GGML_QUANT_SIZES[qtype]
        count = 2048 if elements == 1 else 2048 // elements
        raw = plain(rng, qtype, count) if elements == 1 else blocks(rng, qtype, count, size)
        array = np.frombuffer(raw, dtype=np.uint8)
        if qtype == Q.F16:
            values = array.view("<f2").astype("<f4")
        elif qtype == Q.F32:
            values = array.view("<f4")
        else:
            values = gguf.quants.dequantize(array, qtype)
        assert values.size == count * elements and np.isfinite(values).all()
        out += struct.pack("<III", int(qtype), values.size, len(raw)) + raw
        out += values.astype("<f4").tobytes()
    pathlib.Path(__file__).with_name("dequant.bin").write_bytes(out)


if __name__ == "__main__":
    main()
