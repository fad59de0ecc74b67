"""Made-up rows of merging policies: times, memory, counters and multiplicities beside what sweep_rows has."""

import json

import sweep_rows

WIKI, RETRIEVAL = sweep_rows.TRACES
PHASES = {"append": 1.0, "attend": 150.0, "observe": 9.0, "score": 3.0, "select": 2.0, "compact": 5.0}
HEADS, PROMPT, TOKENS = 12, 768, 1024


def row(policy: str, trace: str, mode: str, budget: str, lost: int = 0, **more) -> dict:
    """One finished run of a merging policy that lost `lost` tokens; `more` overrides."""
    slots, appended = 4000, HEADS * TOKENS
    values = {f"us.{phase}.p50": us for phase, us in PHASES.items()}
    values |= {f"us.prompt.{phase}": 1000 * us for phase, us in PHASES.items()}
    values |= {"memory.workspace_bytes": 1.5 * 2**20, "count.lost_in_folds": lost, "count.lost_by_clip": 0}
    values |= {"count.evictions": lost, "count.merges": appended - slots - lost}
    values |= {"multiplicity.values": [1, 2, 7], "multiplicity.slots": [3000, 900, 100], "policy.merge": True}
    return sweep_rows.row(policy, trace, mode, budget, **(values | more))


def dropped(policy: str, trace: str, mode: str, budget: str, **more) -> dict:
    """The control that evicts what `policy` would merge."""
    return row(policy, trace, mode, budget, **({"policy.merge": False, "count.merges": 0} | more))


def write_folder(out, rows: list[dict]):
    """The folder of sweep_rows.write_folder, whose manifest knows the traces' lengths; returns it."""
    sweep_rows.write_folder(out, rows)
    manifest = json.loads((out / "manifest.json").read_text())
    lengths = {"tokens": TOKENS, "prompt_tokens": PROMPT}
    manifest["traces"] = dict.fromkeys({r["trace"] for r in rows}, lengths)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out
