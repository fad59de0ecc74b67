"""What recording costs: time with and without, bytes against theory, writer against a plain file, memory.

python tests/bench/capture_bench.py [--long 32768]

The model is a layer of Llama-3-8B's shape (32 query heads, 8 KV heads of 128, bfloat16) on a tiny hidden size, so that
what is recorded is real and everything around it is small: the overhead shown is far above that of a real model.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from kvreplay import capture
from kvreplay.capture.gradients import step_of
from kvreplay.trace import Header, LayerData, Model, Writer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS, DIM = 32, 8, 128
TOKEN_BYTES = 2 * DIM * (2 * HEADS + 2 * KV_HEADS)  # q, o, k, v of one layer


def model_of(layers: int) -> LlamaForCausalLM:
    """Random weights, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=1 << 17, dtype="bfloat16",
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def feed(model, pieces: list[int]) -> float:
    """Seconds for calls of these sizes, with a cache."""
    step, cache = step_of(model), DynamicCache(config=model.config)
    start = time.perf_counter()
    with torch.no_grad():
        for size in pieces:
            step(torch.randint(3, 64, (1, size)), None, cache, 1)
    return time.perf_counter() - start


def overhead(folder: Path, prompt: int, decode: int) -> dict:
    """Median of three: prefill and decode seconds without and with recording, closing apart."""
    model = model_of(2)
    feed(model, [prompt, 1])
    plain = np.median([[feed(model, [prompt]), feed(model, [prompt, *[1] * decode])] for _ in range(3)], axis=0)
    watched = []
    for _ in range(3):
        row = []
        for pieces in ([prompt], [prompt, *[1] * decode]):
            with capture.recorder(model, folder / "t.h5", compression=0, progress=False):
                row.append(feed(model, pieces))
                closing = time.perf_counter()
            row.append(time.perf_counter() - closing)
        watched.append(row)
    watched = np.median(watched, axis=0)
    tokens = prompt + decode
    return {
        "prefill_s": [plain[0], watched[0]],
        "decode_ms_per_token": [1e3 * (plain[1] - plain[0]) / decode, 1e3 * (watched[2] - watched[0]) / decode],
        "close_s": watched[3],
        "bytes_per_token_layer": [TOKEN_BYTES, (folder / "t.h5").stat().st_size / tokens / 2],
    }


def writer(folder: Path, tokens: int) -> dict:
    """MB/s of the trace writer at deflate levels 0 and 1, and of a plain file with the same bytes."""
    rng = np.random.default_rng(0)

    def words(heads: int) -> np.ndarray:
        scale = np.exp(rng.normal(0, 1, DIM)).astype(np.float32)
        values = rng.standard_normal((heads, tokens, DIM), np.float32) * scale
        return (values.view(np.uint32) >> 16).astype(np.uint16)

    layer = LayerData(index=0, q=words(HEADS), k=words(KV_HEADS), v=words(KV_HEADS), o=words(HEADS))
    megabytes = tokens * TOKEN_BYTES / 1e6
    header = Header(tokens, tokens, "bfloat16", Model(1, HEADS, KV_HEADS, DIM, DIM, 0, DIM**-0.5))
    speeds = {}
    for level in (0, 1):
        start = time.perf_counter()
        with Writer(folder / "w.h5", header, level) as trace:
            trace.write_layer(layer)
        speeds[f"deflate_{level}_MB_s"] = megabytes / (time.perf_counter() - start)
        speeds[f"deflate_{level}_ratio"] = megabytes * 1e6 / (folder / "w.h5").stat().st_size
    start = time.perf_counter()
    with open(folder / "plain", "wb") as file:
        for values in (layer.q, layer.k, layer.v, layer.o):
            file.write(values)
        file.flush()
        os.fsync(file.fileno())
    speeds["plain_MB_s"] = megabytes / (time.perf_counter() - start)
    return speeds


def peak_kib() -> int:
    """The program's peak memory; getrusage's also counts the process that it was forked from."""
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def long_prompt(folder: Path, tokens: int) -> dict:
    """One layer, `tokens` in calls of 512: seconds and the process' peak memory."""
    model = model_of(1)
    feed(model, [512])
    before = peak_kib()
    with capture.recorder(model, folder / "long.h5", compression=0, progress=False):
        seconds = feed(model, [512] * (tokens // 512))
        closing = time.perf_counter()
    return {
        "tokens": tokens,
        "run_s": seconds,
        "close_s": time.perf_counter() - closing,
        "file_MiB": (folder / "long.h5").stat().st_size / 2**20,
        "peak_MiB": [before / 1024, peak_kib() / 1024],
    }


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--long", type=int, default=0, help="also record a prompt of this many tokens (32768: minutes)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = {"long": long_prompt(folder, options.long)} if options.long else {}
        results |= {"overhead": overhead(folder, 1024, 64), "writer": writer(folder, 4096)}
    print(json.dumps(results, indent=2, default=float))


if __name__ == "__main__":
    main()
