#!/usr/bin/env python3
"""The error of each bfloat16 kernel beside that of PyTorch's own bfloat16.

  dump_ops FOLDER && pytorch_error.py FOLDER [--device cpu]

Reads what dump_ops wrote: inputs, and what our kernels made of them. The truth is computed in float64 from the same inputs; the
peer is what good PyTorch code does in bfloat16 (F.rms_norm, scaled_dot_product_attention, addmm, autograd, AdamW; rotation and
log-softmax in float32). Where a kernel takes several operations at once (LoRA, head and loss), the peer does them one by one.
Prints `op, output: ours E, torch E, ratio`, E = ||got - truth|| / ||truth||, and fails where ours is above 1e-2 or above 1.5 times
PyTorch's.
"""
import argparse
import json
import pathlib
import sys

import torch
import torch.nn.functional as F

LIMIT, RATIO = 1e-2, 1.5
TYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "i32": torch.int32}
BF16, F64 = torch.bfloat16, torch.float64


def load(folder, array, device):
    data = bytearray((folder / array["file"]).read_bytes())
    return torch.frombuffer(data, dtype=TYPES[array["type"]]).reshape(array["shape"]).to(device)


class Op:
    """An operation's parameters and arrays; op["x"] is an array as it was written."""

    def __init__(self, folder, entry, device):
        self.entry, self.name, self.device = entry, entry["name"], device
        self.arrays = {name: load(folder, array, device) for name, array in entry["arrays"].items()}

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def leaf(self, name, dtype):
        """An input that has a gradient."""
        return self[name].to(dtype).detach().clone().requires_grad_()


# Each function below computes an operation's outputs in `dtype`: F64, in plain formulas, or BF16, as good code does.

def norm(x, w, eps, dtype):
    if dtype == BF16:
        return F.rms_norm(x, (x.shape[-1],), w, eps)
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * w


def rmsnorm(op, dtype):
    x = op.leaf("x", dtype)
    y = norm(x, op["w"].to(dtype).reshape(-1), op.entry["eps"], dtype)
    y.backward(op["dy"].to(dtype))
    return {"y": y, "dx": op["start"].to(dtype) + x.grad}


def rotate(x, table, dtype):
    """x [rows][heads][d], table [rows][d/2][2]."""
    wide = torch.float32 if dtype == BF16 else dtype
    table = table.to(wide).reshape(x.shape[0], 1, -1, 2)
    cos, sin = table[..., 0], table[..., 1]
    a, b = x.to(wide).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(dtype)


def qkv(op, dtype):
    e = op.entry
    heads, kv_heads, d = e["heads"], e["kv_heads"], e["head_dim"]
    given = op.leaf("qkv", dtype)
    rows = given.shape[0]
    q, k, _ = given.split([heads * d, kv_heads * d, kv_heads * d], -1)
    q, k = q.reshape(rows, heads, d), k.reshape(rows, kv_heads, d)
    if e["norm"]:
        q = norm(q, op["norm_q"].to(dtype).reshape(-1), e["eps"], dtype)
        k = norm(k, op["norm_k"].to(dtype).reshape(-1), e["eps"], dtype)
    n = (heads + kv_heads) * d
    out = torch.cat([rotate(q, op["table"], dtype), rotate(k, op["table"], dtype)], 1).reshape(rows, n)
    out.backward(op["dout"][:, :n].to(dtype))
    return {"out": out, "dqkv": given.grad[:, :n]}


def swiglu(op, dtype):
    gate_up = op.leaf("gate_up", dtype)
    gate, up = gate_up.chunk(2, -1)
    h = F.silu(gate) * up if dtype == BF16 else gate * torch.sigmoid(gate) * up
    h.backward(op["dh"].to(dtype))
    return {"h": h, "dgu": gate_up.grad}


def attend(q, k, v, scale, causal, dtype):
    """q [.., heads, rows, d], k and v with as many heads."""
    if dtype == BF16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ v


def attention(op, dtype):
    e = op.entry
    heads, kv_heads, d = e["heads"], e["kv_heads"], e["head_dim"]
    given = op.leaf("qkv", dtype)
    outs = []
    for run in given.split(op["lengths"].reshape(-1).tolist()):
        q, k, v = run.split([heads * d, kv_heads * d, kv_heads * d], -1)
        q = q.reshape(1, -1, heads, d).transpose(1, 2)
        k, v = (x.reshape(1, -1, kv_heads, d).transpose(1, 2).repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        outs.append(attend(q, k, v, e["scale"], True, dtype).transpose(1, 2).reshape(-1, heads * d))
    out = torch.cat(outs)
    out.backward(op["dout"].to(dtype))
    dq, dk, dv = given.grad.split([heads * d, kv_heads * d, kv_heads * d], -1)
    return {"out": out, "dqkv.q": dq, "dqkv.k": dk, "dqkv.v": dv}


def attention_parts(op, got):
    e = op.entry
    widths = [e["heads"] * e["head_dim"]] + 2 * [e["kv_heads"] * e["head_dim"]]
    return dict(zip(("dqkv.q", "dqkv.k", "dqkv.v"), got["dqkv"].split(widths, -1)), out=got["out"])


def decoding(op, dtype):
    e = op.entry
    heads, kv_heads, d = e["heads"], e["kv_heads"], e["head_dim"]
    q = op["qkv"].to(dtype)[:, :heads * d].reshape(-1, heads, 1, d)
    kv = op["kv"].to(dtype).reshape(q.shape[0], e["blocks"], 2, kv_heads, 16, d)
    kv = kv.permute(2, 0, 3, 1, 4, 5).reshape(2, q.shape[0], kv_heads, -1, d)[..., :e["positions"], :]
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in kv)
    return {"out": attend(q, k, v, e["scale"], False, dtype).reshape(-1, heads * d)}


def gemm(op, dtype):
    a, b = op["a"].to(dtype), op["b"].to(dtype)
    b = b.T if op.entry["form"] == "NT" else b
    return {"out": torch.addmm(op["add"].to(dtype), a, b) if "add" in op else a @ b}


def lora(op, dtype):
    """y = y_before + s (x A^T) B^T; of dx, what it adds to dx_before."""
    scale = op.entry["scale"]
    x, a = op.leaf("x", dtype), op.leaf("a", dtype)
    b = (op["sb"].to(F64) / scale).to(dtype).requires_grad_()  # exact
    s = x @ a.T
    s.retain_grad()
    y = op["y_before"].to(dtype) + s @ b.T * scale
    outs = {"y": y}
    if "dy" in op:
        y.backward(op["dy"].to(dtype))
        outs.update(s=s, ds=s.grad, da=a.grad, db=b.grad, dx=op["dx_before"].to(dtype) + x.grad)
    return outs


def divergence(s, t, alpha):
    """Of rows of log-probs."""
    if alpha == 0:
        return (t.exp() * (t - s)).sum(-1)
    if alpha == 1:
        return (s.exp() * (s - t)).sum(-1)
    m = torch.log((1 - alpha) * s.exp() + alpha * t.exp())
    return (1 - alpha) * (s.exp() * (s - m)).sum(-1) + alpha * (t.exp() * (t - m)).sum(-1)


def loss(op, dtype):
    wide = torch.float32 if dtype == BF16 else dtype
    head = op["head"].to(dtype)
    z = (op["student"].to(dtype) @ head.T).detach().requires_grad_()
    s = z.to(wide).log_softmax(-1)
    t = (op["teacher"].to(dtype) @ head.T).to(wide).log_softmax(-1)
    losses = divergence(s, t, op.entry["alpha"])
    losses.sum().backward()
    return {"loss": losses, "logprob": s.gather(-1, op["tokens"].long()), "dlogits": z.grad}


def adamw_truth(op):
    e = op.entry
    p, m, v, g = (op[name].to(F64) for name in "pmvg")
    g = g * min(1.0, e["max_norm"] / (g.norm().item() + 1e-6))
    m = e["beta1"] * m + (1 - e["beta1"]) * g
    v = e["beta2"] * v + (1 - e["beta2"]) * g * g
    p = p * (1 - e["rate"] * e["weight_decay"])
    c1, c2 = 1 - e["beta1"] ** e["step"], 1 - e["beta2"] ** e["step"]
    p = p - e["rate"] / c1 * m / (v.sqrt() / c2 ** 0.5 + e["eps"])
    return {"p_after": p, "m_after": m, "v_after": v}


def adamw(op, dtype):
    if dtype == F64:
        return adamw_truth(op)
    e = op.entry
    p = op.leaf("p", dtype)
    p.grad = op["g"].to(dtype)
    optimizer = torch.optim.AdamW([p], lr=e["rate"], betas=(e["beta1"], e["beta2"]), eps=e["eps"],
                                  weight_decay=e["weight_decay"], fused=p.is_cuda)
    optimizer.state[p] = {"step": torch.tensor(float(e["step"] - 1), device=p.device if p.is_cuda else "cpu"),
                          "exp_avg": op["m"].to(dtype), "exp_avg_sq": op["v"].to(dtype)}
    torch.nn.utils.clip_grad_norm_([p], e["max_norm"])
    optimizer.step()
    state = optimizer.state[p]
    return {"p_after": p, "m_after": state["exp_avg"], "v_after": state["exp_avg_sq"]}


KINDS = {"rmsnorm": rmsnorm, "qkv": qkv, "swiglu": swiglu, "attention": attention, "decoding": decoding, "gemm": gemm,
         "lora": lora, "loss": loss, "adamw": adamw}


def ours(op, truth):
    """Our outputs, by the names and in the shapes of the truth."""
    got = op.arrays
    if op.entry["op"] == "attention":
        got = attention_parts(op, got)
    if op.entry["op"] == "qkv":  # values pass through unchanged
        n = truth["out"].shape[-1]
        got = {"out": got["out"][:, :n], "dqkv": got["dqkv"][:, :n]}
    return {name: got[name].reshape(truth[name].shape) for name in truth}


def error(got, truth):
    """NaN if anything is."""
    return ((got.detach().to(F64) - truth).norm() / truth.norm()).item()


def compare(op):
    """One line for each output; how many failed."""
    compute = KINDS[op.entry["op"]]
    truth = {name: value.detach() for name, value in compute(op, F64).items()}
    peer, mine = compute(op, BF16), ours(op, truth)
    failed = 0
    for name, value in truth.items():
        e1, e2 = error(mine[name], value), error(peer[name], value)
        good = e1 <= LIMIT and e1 <= RATIO * e2  # false if NaN
        print(f"{'ok' if good else 'FAILED'} {op.name}, {name}: ours {e1:.3g}, torch {e2:.3g}, ratio {e1 / e2:.3f}", flush=True)
        failed += not good
    return len(truth) - failed, failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__} on {torch.cuda.get_device_name() if args.device == 'cuda' else 'the CPU'}")
    passed = failed = 0
    for entry in json.loads((args.folder / "ops.json").read_text()):
        good, bad = compare(Op(args.folder, entry, args.device))
        passed, failed = passed + good, failed + bad
    print(f"{passed} passed, {failed} failed")
    return failed > 0 or passed == 0


if __name__ == "__main__":
    sys.exit(main())
