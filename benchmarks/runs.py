"""The numbers of a benchmark run, read back from pytest-benchmark's JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

RIVALS = {
    "eager": "PyTorch",
    "hoisted": "PyTorch, hoisted",
    "compile": "torch.compile",
    "normflows": "normflows",
    "pyro": "Pyro",
}
DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
    "inverse": "inverse",
}


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

    name: str
    facts: dict
    rows: list[Row]

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
    rows: dict[tuple[str, str, str], Row] = {}
    facts = None
    for benchmark in content.get("benchmarks", []) if isinstance(content, dict) else []:
        entry = benchmark["extra_info"]
        if "contender" not in entry:
            continue
        key = entry["op"], entry["case"], entry["direction"]
        rows.setdefault(key, Row(*key)).contenders[entry["contender"]] = entry
        facts = facts or entry
    if facts is None:
        raise ReportError(f"{path}: has no fastflow benchmarks")
    return Run(path.stem, facts, [row for row in rows.values() if row.fastest])
