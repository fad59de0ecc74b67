"""Driving the program from tests: a configuration in, rows and series out (design.md section 9)."""
from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

if TYPE_CHECKING:
    from oracle import Result

RELATIVE = 1e-3  # metrics against the oracle (design.md section 10)


class Limits(NamedTuple):
    """How far arithmetic alone moves an engine's numbers from the oracle's.

    Heads without near-ties made the same choices: `head` is for the nmse of any such query head, `median` for the
    median over them, which sees a fold that is not rounded to the trace's dtype (5e-5; the CPU is at 6e-8).
    """

    floor: float   # absolute, of metrics: what an error of 0 may read
    head: float
    median: float
    mass: float    # lost mass of any query of such a head


# CUDA multiplies probabilities as two 16-bit words: outputs are off by 2e-5, log-sum-exps by 3e-5; the median head was off
# by 7.2e-5 at most on an H200, so an unrounded fold shows on the CPU only.
LIMITS = {"cpu": Limits(1e-6, 2e-4, 1e-5, 2e-5), "cuda": Limits(2e-5, 4e-4, 1e-4, 1e-4)}
PLAIN = re.compile(r"[A-Za-z/][\w./%:-]*|\d+(\.\d+)?(e[+-]?\d+)?%?")


def scalar(value: Any) -> str:
    """A YAML scalar; strings that YAML could take for something else are quoted."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    return repr(value)


def yaml(value: Any, indent: int = 0) -> str:
    """Nested dicts and lists as block-style YAML; dicts of scalars inside lists in flow style."""
    pad = "  " * indent
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            nested = isinstance(item, (dict, list)) and item
            lines.append(f"{pad}{key}:\n{yaml(item, indent + 1)}" if nested else f"{pad}{key}: {yaml(item)}")
        return "\n".join(lines)
    if isinstance(value, list) and value:
        return "\n".join(f"{pad}- {_flow(item)}" for item in value)
    return scalar(value)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    return scalar(value)


def execute(binary: Path, config: dict[str, Any], folder: Path, timeout: float = 7200) -> subprocess.CompletedProcess:
    """Run a configuration into `folder`/out, whatever comes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml(config) + "\n")
    command = [str(binary), "run", str(folder / "config.yaml"), "--out", str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def run(binary: Path, config: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Run a configuration into `folder`/out and return its rows; any failure shows the program's own words."""
    done = execute(binary, config, folder)
    assert done.returncode == 0, f"kvreplay exited {done.returncode}: {done.stderr.strip()}\n{yaml(config)[:2000]}"
    rows = [json.loads(line) for line in (folder / "out" / "runs.jsonl").read_text().splitlines()]
    bad = [row for row in rows if row["status"] != "ok"]
    assert not bad, bad
    return rows


class Series:
    """The series file of one run: error2, output2, rel_l2, lost_mass [L, Hq, query], slots, final sets."""

    def __init__(self, folder: Path, row: dict[str, Any]) -> None:
        with h5py.File(folder / "out" / "series" / f"{row['run']}.h5", "r") as file:
            self.error2, self.output2, self.rel_l2, self.lost_mass = (
                file[name][:].astype(np.float64) for name in ("error2", "output2", "rel_l2", "lost_mass"))
            self.slots = file["slots"][:]
            self._position, self._multiplicity = file["final/position"][:], file["final/multiplicity"][:]

    @property
    def heads(self) -> tuple[int, int]:
        """(layers, KV heads)."""
        return self._position.shape[:2]

    def kept(self, layer: int, head: int) -> list[int]:
        """Positions of the final slots of a head, as stored, without padding."""
        return self._position[layer, head][self._position[layer, head] >= 0].tolist()

    def multiplicity(self, layer: int, head: int) -> list[int]:
        """Multiplicities of the final slots."""
        return self._multiplicity[layer, head][self._position[layer, head] >= 0].tolist()


def near(got: float | None, want: float, floor: float = LIMITS["cpu"].floor) -> bool:
    """Equal to 1e-3 relative or `floor` absolute; NaN and None are never near."""
    return got is not None and abs(got - want) <= max(RELATIVE * abs(want), floor)


def differences(row: dict[str, Any], series: Series, want: Result) -> list[str]:
    """How a run departs from the oracle's: metrics always, kept sets and multiplicities where no scores nearly tied."""
    limits = LIMITS[row["backend"]]
    found = [f"{name}: program {row.get(name)}, oracle {value}" for name, value in
             (("nmse", want.nmse), ("rel_l2.mean", want.rel_l2_mean), ("lost_mass.mean", float(want.lost_mass.mean())))
             if not near(row.get(name), value, limits.floor)]
    ties = want.near_ties()
    if series.error2.shape != want.error2.shape or series.heads != ties.shape:
        return [*found, f"series {series.error2.shape}, heads {series.heads}, oracle {want.error2.shape}, {ties.shape}"]
    for layer, head in np.ndindex(ties.shape):
        got, kept = series.kept(layer, head), want.kept[layer][head].tolist()
        where = f"layer {layer} KV head {head}"
        if len(got) != len(kept) or sorted(set(got)) != got:
            found.append(f"{where}: keeps {len(got)} slots, oracle {len(kept)} (ascending, none twice)")
        elif not ties[layer, head] and got != kept:
            found.append(f"{where}: kept only by the program {sorted(set(got) - set(kept))}, "
                         f"only by the oracle {sorted(set(kept) - set(got))}")
        elif not ties[layer, head] and series.multiplicity(layer, head) != want.multiplicity[layer][head].tolist():
            found.append(f"{where}: multiplicities differ")
    return found + _head_differences(series, want, ties == 0, limits)


def _head_differences(series: Series, want: Result, same: np.ndarray, limits: Limits) -> list[str]:
    """The tighter comparison of the query heads whose KV head chose alike.

    A number that was folded to within fp32's reach of the middle between two stored ones may be stored as either. One
    such element of a key has moved a head by 5e-4 (KVMerger, retrieval, 50 %): those heads are held to RELATIVE.
    """
    rounded = getattr(want, "near_roundings", None)
    free = np.ones(same.shape, bool) if rounded is None else rounded == 0
    same, free = (np.repeat(x, want.error2.shape[1] // x.shape[1], axis=1) for x in (same, free))
    got, error = (np.sqrt(x.error2.sum(axis=2) / x.output2.sum(axis=2)) for x in (series, want))
    apart = np.abs(got - error) / np.maximum(error, 0.1)
    mass = np.abs(series.lost_mass - want.lost_mass).max(axis=2)
    checks = (("nmse of a head", apart[same & free], np.max, limits.head),
              ("nmse of a head with a near rounding", apart[same & ~free], np.max, RELATIVE),
              ("median head's nmse", apart[same], np.median, limits.median),
              ("lost mass of a query", mass[same], np.max, limits.mass))
    return [f"{what} is {which(x):.1e} apart, allowed {limit:.0e}" for what, x, which, limit in checks
            if x.size and not which(x) <= limit]
