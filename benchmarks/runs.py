"""The numbers of a benchmark run, read back from pytest-benchmark's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

RIVALS = {
    "eager": "PyTorch",
    "hoisted": "PyTorch, hoisted",
    "compile": "torch.compile",
    "jacobi": "PyTorch, fixed point",
    "zuko": "zuko",
    "nflows": "nflows",
    "normflows": "normflows",
    "pyro": "Pyro",
    "vjps": "PyTorch, D vjps",
    "hessian": "torch.func",
    "dense": "dense (floor)",
}
FLOORS = ("dense",)
"""No rivals: they compute less."""
DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
    "training": "training step",
    "inverse": "inverse",
    "inverse_backward": "inverse + backward",
    "density": "log_prob + backward",
    "log_prob": "log_prob",
    "sample": "samples",
    "rsample": "samples + backward",
}
SWEEP_OPS = ("autoregressive_inverse_by_D",)
"""Whose cases differ in D alone: a curve."""


class ReportError(Exception):
    """The input is not what it should be; the message is one line."""


@dataclass
class Row:
    """One direction of one case: what each contender reported about itself."""

    op: str
    case: str
    direction: str
    contenders: dict[str, dict] = field(default_factory=dict)

    @property
    def fastest(self) -> dict | None:
        """The entry of fastflow's fastest backend."""
        own = [entry for entry in self.contenders.values() if entry["backend"] is not None]
        return min(own, key=lambda entry: entry["median_seconds"], default=None)


@dataclass
class Run:
    """The contents of one JSON file."""

    source: Path
    facts: dict
    rows: list[Row]

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(row.op for row in self.rows))

    def rows_of(self, op: str) -> list[Row]:
        return [row for row in self.rows if row.op == op]

    @property
    def on_gpu(self) -> bool:
        return self.facts["device"] == "cuda"

    @property
    def title(self) -> str:
        facts = self.facts
        parts = [facts["device_name"]]
        if not self.on_gpu:
            threads = facts["threads"]
            parts.append("1 thread" if threads == 1 else f"{threads} threads")
        parts.append(f"PyTorch {facts['torch']}")
        return ", ".join(parts)


def load(path: Path) -> Run:
    """Reads one file.

    Raises:
        ReportError: there is no such file, it is no JSON, or has none of our benchmarks.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as failure:
        raise ReportError(f"{path}: {failure.strerror}") from None
    except ValueError:
        raise ReportError(f"{path}: not a JSON file") from None
    content = content if isinstance(content, dict) else {}
    rows: dict[tuple[str, str, str], Row] = {}
    for benchmark in content.get("benchmarks", []):
        entry = benchmark["extra_info"]
        if "contender" not in entry:
            continue
        key = entry["op"], entry["case"], entry["direction"]
        rows.setdefault(key, Row(*key)).contenders[entry["contender"]] = entry
    if not rows:
        raise ReportError(f"{path}: has no fastflow benchmarks")
    facts = content["machine_info"]["fastflow"]
    return Run(path, facts, [row for row in rows.values() if row.fastest])


def save(run: Run, path: Path) -> None:
    """Writes what `load` reads, a line per contender, and no more."""
    entries = [entry for row in run.rows for entry in row.contenders.values()]
    lines = ",\n".join(json.dumps({"extra_info": _rounded(entry)}) for entry in entries)
    facts = json.dumps({"fastflow": run.facts})
    path.write_text(f'{{"machine_info": {facts}, "benchmarks": [\n{lines}\n]}}\n')


def _rounded(value: object) -> object:
    """With six digits of every figure: more than any clock is good for."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
