"""The example that trains MAF and IAF in both directions, with few steps."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import two_moons


def test_target_is_a_density_and_its_draws_follow_it() -> None:
    target = two_moons.Target()
    assert math.isclose(float(target.mass.sum()), 1, abs_tol=1e-4)
    x = target.sample(20_000)
    # the mean of the potential under the draws is that of the grid, to four standard errors
    inside, want = two_moons.potential(x), (two_moons.potential(target.grid) * target.mass).sum()
    assert abs(inside.mean() - want) < 4 * inside.std() / math.sqrt(len(x)) + 1e-3


def test_both_directions_learn_and_leave_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    rows = two_moons.main(["--out", str(tmp_path), "--steps", "80", "--rows", "256"])
    assert [row["direction"] for row in rows] == ["parallel", "inverse"] * 2
    torch.manual_seed(0)
    for row, (flow, _, _) in zip(rows, two_moons.flows().values()):
        untrained = two_moons.divergences(flow, two_moons.Target(), 5000)
        measure = "KL(p|q)" if "likelihood" in row["flow"] else "KL(q|p)"
        before = untrained[0 if measure == "KL(p|q)" else 1]
        assert 0 < row[measure] < 0.7 * before, row
    assert json.loads((tmp_path / "two_moons.json").read_text()) == rows
    assert (tmp_path / "two_moons.png").stat().st_size > 10_000
    assert "IAF, maximum likelihood" in capsys.readouterr().out
