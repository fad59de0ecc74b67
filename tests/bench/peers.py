"""What other programs do on this machine: H2O as an eager PyTorch loop, on two cores and on the GPU, a large matrix product
there, and cuDNN's attention. Writes JSON for `kvreplay bench --peers FILE`; run both in one go. Without a GPU only what the
cores do.

    python tests/bench/peers.py out/peers.json && build/kvreplay bench --peers out/peers.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch


def milliseconds(work, repeats: int = 7) -> float:
    """The median of several passes on the GPU by events, after two that do not count."""
    times = []
    for repeat in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        if repeat > 1:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def cpu_milliseconds(work, repeats: int = 7) -> float:
    """The same on the cores, by the clock."""
    times = []
    for repeat in range(repeats + 2):
        begin = time.perf_counter()
        work()
        if repeat > 1:
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def gemm_flops(n: int = 8192) -> float:
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (milliseconds(lambda: a @ b) * 1e-3)


def attention_us(tokens: int = 16384) -> float:
    """Full causal attention of one layer, 32 query and 8 KV heads of 128, by cuDNN."""
    q = torch.randn(1, 32, tokens, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, 8, tokens, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        def work():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return milliseconds(work) * 1e3


def eager_h2o_us(
    device: str, slots: int = 1024, steps: int = 64, group: int = 4, heads: int = 8, dim: int = 128
) -> float:
    """A token of H2O in one layer as the usual loop writes it: append, attend, add up, drop the least, gather."""
    k, v = (torch.randn(heads, slots, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    mass = torch.rand(heads, slots, device=device)

    def work():
        nonlocal k, v, mass
        for _ in range(steps):
            q = torch.randn(heads, group, dim, device=device, dtype=torch.bfloat16)
            new_k, new_v = (torch.randn(heads, 1, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
            k, v = torch.cat([k, new_k], 1), torch.cat([v, new_v], 1)
            p = torch.softmax((q @ k.transpose(1, 2)).float() * dim**-0.5, -1)
            p.to(v.dtype) @ v
            mass = torch.nn.functional.pad(mass, (0, 1)) + p.mean(1)
            old = mass[:, : slots + 1 - slots // 2]
            keep = torch.ones_like(mass, dtype=torch.bool).scatter_(1, old.argmin(1, keepdim=True), False)
            rows = keep.nonzero()[:, 1].view(heads, slots)
            index = rows[..., None].expand(-1, -1, dim)
            k, v, mass = k.gather(1, index), v.gather(1, index), mass.gather(1, rows)

    passes = cpu_milliseconds if device == "cpu" else milliseconds
    return passes(work, 3) * 1e3 / steps


def main(output: str) -> None:
    torch.set_num_threads(2)  # as many as `kvreplay bench` gives the CPU engine
    peers = {"eager_cpu_h2o_us": eager_h2o_us("cpu")}
    if torch.cuda.is_available():
        peers |= {"gemm_flops": gemm_flops(), "attention_16k_us": attention_us(), "eager_h2o_us": eager_h2o_us("cuda")}
    with open(output, "w", encoding="utf-8") as file:
        json.dump(peers, file)
    print(peers)


if __name__ == "__main__":
    main(sys.argv[1])
