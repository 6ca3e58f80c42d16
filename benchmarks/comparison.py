"""One comparison: the contenders of one direction of one case, checked, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import gate
import measure
import pytest
import torch
from peers import Chain
from torch import Tensor

BASELINES = ("eager", "hoisted", "compile", "normflows", "pyro")
WITH_GRADIENTS = ("backward", "forward_backward")

EFFORTS = {
    "smoke": measure.Effort(seconds=0.2, slice=2e-3, min_rounds=3, max_rounds=5),
    "short": measure.Effort(seconds=2.0, slice=5e-3, min_rounds=7, max_rounds=41),
    "full": measure.Effort(seconds=5.0, slice=1e-2, min_rounds=11, max_rounds=81),
}


@dataclass(frozen=True)
class Settings:
    """What a run measures: on which device, how much, and when it stops to begin anything new.

    Arguments:
        device: "cpu" or "cuda".
        grid: "smoke", "short" or "full".
        deadline: on the clock of time.monotonic; None for none.
    """

    device: torch.device
    grid: str
    deadline: float | None = None

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


SETTINGS = pytest.StashKey[Settings]()
"""Where conftest.py leaves the settings of a run."""


@dataclass
class Comparison:
    """Its outcome, by contender: rounds in seconds, errors, or why there are none."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copy_gbps: float | None = None
    share_of_copy: dict[str, float] = field(default_factory=dict)

    def speedups(self, contender: str) -> dict[str, dict[str, float]]:
        """How many times faster it is than each baseline: medians of interleaved rounds."""
        own = self.times[contender]
        others = [name for name in BASELINES if name in self.times and name != contender]
        return {name: measure.ratio(self.times[name], own) for name in others}


def results(
    chain: Chain, direction: str, names: tuple[str, ...], cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """What a contender returns, by name: two outputs, and for a backward pass the gradients."""
    if direction not in WITH_GRADIENTS:
        with torch.no_grad(), chain.context():
            return dict(zip(names, chain.run()))
    with chain.context():
        outputs = chain.run()
        grads = chain.collect(torch.autograd.grad(outputs, chain.leaves, cotangents))
    values = dict(zip(names, (tensor.detach() for tensor in outputs)))
    return values | dict(zip(("dz", "dw", "du", "db"), grads))


def compare(
    builders: dict[str, Callable[[], Chain]],
    absent: dict[str, str],
    direction: str,
    names: tuple[str, ...],
    cotangents: tuple[Tensor, ...],
    exact: dict[str, Tensor],
    steps: int,
    settings: Settings,
    bytes_moved: int | None = None,
    timed: bool = True,
) -> Comparison:
    """Builds, checks and times the contenders.

    Arguments:
        builders: the contenders that can run here; "eager" is among them and sets the tolerance.
        absent: why others cannot, by name.
        direction: forward, backward, forward_backward or inverse.
        names: of the two outputs.
        cotangents: of the two outputs.
        exact: the results in float64.
        steps: length of the chain, for the tolerance.
        settings: device and effort.
        bytes_moved: for a case that must be timed from memory: what it moves at least. A copy takes
            its turns with the contenders then.
        timed: False only checks.
    """
    outcome = Comparison(absent=dict(absent))
    chains = {name: build() for name, build in builders.items()}
    plain = results(chains["eager"], direction, names, cotangents)
    tasks = {}
    for name, chain in chains.items():
        try:
            values = results(chain, direction, names, cotangents)
            outcome.errors[name] = gate.check(name, values, plain, exact, steps)
        except gate.Disagreement as wrong:
            outcome.refused[name] = str(wrong)
        else:
            tasks[name] = task(chain, direction, cotangents)
        values = None
    if not timed:
        return outcome
    if bytes_moved is not None:
        tasks["copy"], moved = measure.copy_task(settings.device)
    effort = EFFORTS[settings.grid]
    outcome.times = measure.interleave(tasks, settings.device, effort, bytes_moved is not None)
    if bytes_moved is not None:
        copy = outcome.times.pop("copy")
        outcome.copy_gbps = moved / measure.median(copy) / 1e9
        for name, own in outcome.times.items():
            share = measure.ratio(copy, own)["median"] * bytes_moved / moved
            outcome.share_of_copy[name] = share
    return outcome


def task(chain: Chain, direction: str, cotangents: tuple[Tensor, ...]) -> measure.Task:
    """The direction of a contender as something to time."""
    if direction not in WITH_GRADIENTS:
        return measure.Task(lambda _: chain.run(), context=lambda: _evaluating(chain))
    if direction == "backward":
        return measure.Task(
            lambda outputs: torch.autograd.grad(outputs, chain.leaves, cotangents),
            setup=chain.run,
            context=chain.context,
        )
    return measure.Task(
        lambda _: torch.autograd.grad(chain.run(), chain.leaves, cotangents),
        context=chain.context,
    )


@contextmanager
def _evaluating(chain: Chain) -> Iterator[None]:
    with torch.no_grad(), chain.context():
        yield
