"""The benchmarks of a file: one for every contender, of a comparison that is made once for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measure
import pytest
from comparison import LIBRARY, Comparison, Settings
from pytest_benchmark.fixture import BenchmarkFixture

CLOCK = measure.RecordedClock()
SETTINGS = pytest.StashKey[Settings]()
"""Where conftest.py leaves the settings of a run."""
MARKS = [
    pytest.mark.benchmark(timer=CLOCK.now),
    # pyro, when it is imported, and torch.func
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]


def parametrize(metafunc: pytest.Metafunc, triples: list[tuple[object, str, str]]) -> None:
    """One benchmark for every case, direction and contender, named after the three."""
    ids = ["-".join(map(str, triple)) for triple in triples]
    metafunc.parametrize(("case", "direction", "contender"), triples, ids=ids)


class Outcomes:
    """The comparisons of a file made so far: the first benchmark of one makes it for all."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.made: dict[tuple[object, str], Comparison] = {}

    def show(
        self,
        benchmark: BenchmarkFixture,
        run: Callable[[Any, str, Settings, bool], Comparison],
        op: str,
        case: object,
        direction: str,
        contender: str,
        **facts: object,
    ) -> None:
        """Makes a benchmark of a contender's share of a comparison; skips or fails without one.

        Arguments:
            benchmark: the one to make; a disabled one only checks the answers.
            run: makes the comparison, of the case, the direction, the settings and whether to
                time it.
            op, case, direction, contender: which comparison, and whose share.
            facts: what else to keep with the numbers: `flops` for all, `bytes_moved` for some.
        """
        if (case, direction) not in self.made:
            if self.settings.late():
                pytest.skip("the time set by --bench-seconds is used up")
            outcome = run(case, direction, self.settings, benchmark.enabled)
            self.made[case, direction] = outcome
        outcome = self.made[case, direction]
        benchmark.group = f"{op} {case} {direction}"
        if contender in outcome.absent:
            pytest.skip(outcome.absent[contender])
        if contender in outcome.refused:
            pytest.fail(outcome.refused[contender], pytrace=False)
        if not benchmark.enabled:
            benchmark(lambda: None)
            return
        times = outcome.times[contender]
        seconds = measure.median(times)
        benchmark.extra_info.update(
            facts,
            op=op,
            case=str(case),
            direction=direction,
            contender=contender,
            backend=contender.removeprefix(LIBRARY) if contender.startswith(LIBRARY) else None,
            median_seconds=seconds,
            rounds=len(times),
            speedup_over=outcome.speedups(contender),
            errors=outcome.errors[contender],
            saved_bytes=outcome.saved_bytes.get(contender),
            copy_gbps=outcome.copy_gbps,
            share_of_copy=outcome.share_of_copy.get(contender),
            gflops=facts["flops"] / seconds / 1e9,
        )
        if facts.get("bytes_moved"):
            benchmark.extra_info["gbps"] = facts["bytes_moved"] / seconds / 1e9
        benchmark.pedantic(CLOCK.player(times), rounds=len(times))
