"""Makes an output folder as `kvreplay run` would (9 policies, 4 budgets, 2 traces, 2 modes) without running it."""

import json

import numpy as np

TITLES = {
    "full": "Full cache",
    "random": "Random",
    "streaming_llm": "StreamingLLM",
    "h2o": "H2O",
    "tova": "TOVA",
    "snapkv": "SnapKV",
    "knorm": "Key norm",
    "keydiff": "KeyDiff",
    "weighted_kv": "WeightedKV",
}
ERROR = {
    "random": 0.6,
    "streaming_llm": 0.34,
    "h2o": 0.2,
    "tova": 0.24,
    "snapkv": 0.15,
    "knorm": 0.45,
    "keydiff": 0.3,
    "weighted_kv": 0.18,
}
TRACES = {"tests/data/smollm2-135m-wikitext2.h5": 1.0, "tests/data/smollm2-135m-retrieval.h5": 1.7}
BUDGETS = {"6.25%": 48, "12.5%": 96, "25%": 192, "50%": 384}
MODES = ("prompt", "always")
LAYERS, HEADS = (0, 9, 19, 29), 9
SLOT_BYTES = 4 * 3 * 260  # layers * KV heads * (key + value + position)


def row(policy: str, trace: str, mode: str, budget: str, **more) -> dict:
    """One finished run with smooth made-up numbers, the same at every call."""
    rng = np.random.default_rng(abs(hash_of(policy, trace, mode, budget)) % 2**32)
    slots = BUDGETS.get(budget, 1024)
    mean_slots = 896.5 if policy == "full" else slots + (128 if mode == "prompt" else 0)
    error = (
        0.0
        if policy == "full"
        else ERROR.get(policy, 0.25)
        * TRACES.get(trace, 1.0)
        * (slots / 192) ** -0.7
        * (0.9 if mode == "prompt" else 1.1)
        * (1 + 0.1 * rng.random())
    )
    output2 = rng.uniform(5, 20, (len(LAYERS), HEADS))
    error2 = output2 * error**2 * rng.lognormal(0, 0.9, output2.shape) * np.linspace(2, 0.5, len(LAYERS))[:, None]
    values = {
        "run": f"{hash_of(policy, trace, mode, budget, json.dumps(more, sort_keys=True)) % 2**64:016x}",
        "status": "ok",
        "error": None,
        "trace": trace,
        "trace.dataset": "wikitext-2",
        "policy": policy,
        "replay.compress": mode,
        "replay.block": "all",
        "replay.positions": "cache" if policy == "streaming_llm" else "absolute",
        "replay.measure": "decode",
        "budget": None if policy == "full" else budget,
        "budget_slots": slots,
        "slots.decode_mean": mean_slots,
        "seed": 0,
        "backend": "cpu",
        "layers": list(LAYERS),
        "nmse": error,
        "rel_l2.mean": error * 0.8,
        "rel_l2.p50": error * 0.6,
        "rel_l2.p95": error * 2.1,
        "rel_l2.p99": error * (3 + rng.random()),
        "sums.error2": error2.tolist(),
        "sums.output2": output2.tolist(),
        "bytes.full": 1024 * SLOT_BYTES,
        "bytes.full_mean": 896.5 * SLOT_BYTES,
        "bytes.cache_mean": mean_slots * SLOT_BYTES,
        "noise_floor.nmse": 0.0018,
        "leaks": policy == "oracle_mass",
        "seconds": 0.7 + rng.random(),
    }
    if policy == "h2o":
        values["policy.recent"] = 0.5
    if policy == "snapkv":
        values.update({"policy.window": 32, "policy.kernel": 7})
    return values | more


def hash_of(*parts: str) -> int:
    """A hash that does not change from process to process."""
    import hashlib

    return int.from_bytes(hashlib.sha256("|".join(map(str, parts)).encode()).digest()[:8], "big")


def grid() -> list[dict]:
    """The whole sweep: `full` once a trace, the others at every budget and mode."""
    rows = [row("full", trace, "always", "100%") for trace in TRACES]
    return rows + [
        row(policy, trace, mode, budget) for trace in TRACES for mode in MODES for policy in ERROR for budget in BUDGETS
    ]


def write_folder(out, rows: list[dict]):
    """runs.jsonl and manifest.json in folder `out`; returns it."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (out / "manifest.json").write_text(
        json.dumps(
            {
                "git": {"sha": "0123456789abcdef", "dirty": True},
                "policies": {name: {"title": title, "paper": ""} for name, title in TITLES.items()},
                "metrics": {"nmse": {"unit": "", "better": "lower", "formula": "", "label": "error (nmse)"}},
            }
        )
    )
    return out
