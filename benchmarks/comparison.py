"""One comparison: the contenders of one direction of one case, checked, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import gate
import measure
import torch
from peers import Chain
from torch import Tensor

BASELINES = (
    *("eager", "hoisted", "compile", "dense", "jacobi"),
    *("zuko", "nflows", "normflows", "pyro"),
    *("vjps", "hessian"),
)
WITH_GRADIENTS = (
    *("backward", "forward_backward", "inverse_backward"),
    *("training", "density", "rsample"),
)
LIBRARY = "fastflow-"
ONCE_SECONDS = 10.0
"""A contender that takes longer for the call that is checked is not called again, unless the first
call says nothing of the others."""
COMPILES = ("compile", LIBRARY + "triton")

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


@dataclass
class Comparison:
    """Its outcome, by contender: rounds in seconds, errors, or why there are none."""

    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    saved_bytes: dict[str, int] = field(default_factory=dict)
    copy_gbps: float | None = None
    share_of_copy: dict[str, float] = field(default_factory=dict)

    def speedups(self, contender: str) -> dict[str, dict[str, float]]:
        """How many times faster it is than each baseline: medians of interleaved rounds."""
        others = [name for name in BASELINES if name in self.times and name != contender]
        return {
            name: measure.ratio(
                self.times[name], self.times.get(twin(contender, name), self.times[contender])
            )
            for name in others
        }


def twin(contender: str, rival: str) -> str:
    """The name of a contender in the rival's variant of the formulas."""
    return f"{contender} as {rival}"


@dataclass
class Group:
    """Contenders that must return the same numbers.

    Arguments:
        builders: how to make each.
        plain: results of plain PyTorch in float32, which set the tolerance; None for those of the
            contender "eager".
        exact: the results in float64.
        rival: the peer whose formulas these are; None for the common ones. All other members are
            `twin`s, there to be compared with it.
    """

    builders: dict[str, Callable[[], Chain]]
    plain: dict[str, Tensor] | None
    exact: dict[str, Tensor]
    rival: str | None = None


def results(
    chain: Chain, direction: str, names: tuple[str, ...], cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """What a contender returns, by name: outputs, and for a backward pass the gradients."""
    if direction not in WITH_GRADIENTS:
        with torch.no_grad(), chain.context():
            return dict(zip(names, chain.run()))
    with chain.context():
        outputs = chain.run()
        grads = chain.collect(torch.autograd.grad(outputs, chain.leaves, cotangents))
    values = dict(zip(names, (tensor.detach() for tensor in outputs)))
    return values | dict(zip(chain.names, grads))


def saved_bytes(chain: Chain) -> int:
    """What a contender keeps for its backward pass, besides what is there anyway.

    Parameters, inputs and masks lie in the same memory in two runs at a time; the rest is counted.
    """
    first, graph = _saved_storages(chain)
    second, _ = _saved_storages(chain)
    del graph  # it kept the memory of the first run from being used by the second
    return sum(size for address, size in second.items() if address not in first)


def _saved_storages(chain: Chain) -> tuple[dict[int, int], tuple[Tensor, ...]]:
    """Sizes of all that is saved, by address, and the outputs that keep it alive."""
    sizes = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with chain.context(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = chain.run()
    return sizes, outputs


def compare(
    groups: list[Group],
    absent: dict[str, str],
    direction: str,
    names: tuple[str, ...],
    cotangents: tuple[Tensor, ...],
    steps: int,
    settings: Settings,
    bytes_moved: int | None = None,
    timed: bool = True,
) -> Comparison:
    """Builds, checks and times the contenders.

    Arguments:
        groups: the contenders that can run here.
        absent: why others cannot, by name.
        direction: forward, backward, forward_backward, training, inverse, inverse_backward, density
            or sample.
        names: of the outputs.
        cotangents: of the outputs.
        steps: length of the chain, for the tolerance.
        settings: device and effort.
        bytes_moved: for a case that must be timed from memory: what it moves at least. A copy takes
            its turns with the contenders then.
        timed: False only checks.
    """
    outcome = Comparison(absent=dict(absent))
    tasks = {}
    for group in groups:
        plain = group.plain
        if plain is None:
            plain = results(group.builders["eager"](), direction, names, cotangents)
        for contender, build in group.builders.items():
            own = group.rival is None or contender == group.rival
            name = contender if own else twin(contender, group.rival)
            chain = build()
            start = time.perf_counter()
            values = results(chain, direction, names, cotangents)
            if next(iter(values.values())).is_cuda:
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - start
            try:
                errors = gate.check(name, values, plain, group.exact, steps)
            except gate.Disagreement as wrong:
                outcome.refused[contender] = str(wrong)
                continue
            if own:
                outcome.errors[contender] = errors
            if not timed:
                continue
            if direction in WITH_GRADIENTS and own and chain.hooks:
                outcome.saved_bytes[contender] = saved_bytes(chain)
            if elapsed > ONCE_SECONDS and contender not in COMPILES:
                outcome.times[name] = [elapsed]
            else:
                tasks[name] = task(chain, direction, cotangents)
    for contender in outcome.refused:  # all its variants
        for name in [name for name in tasks if name.split(" as ")[0] == contender]:
            del tasks[name]
        outcome.times.pop(contender, None)
    if not timed:
        return outcome
    if bytes_moved is not None:
        tasks["copy"], moved = measure.copy_task(settings.device)
    effort = EFFORTS[settings.grid]
    outcome.times |= measure.interleave(tasks, settings.device, effort, bytes_moved is not None)
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
    if direction == "training":
        make = chain.step or partial(training_step, chain)
        return measure.Task(make(), context=chain.context)
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


def training_step(chain: Chain) -> Callable[[object], None]:
    """A step of Adam on the negative log-density of a layer's points, y being standard normal.

    The points' gradient is computed too, as in any layer of a flow but the first.
    """
    point, *parameters = chain.leaves

    def loss() -> Tensor:
        point.grad = None
        y, ladj = chain.run()
        return ((y * y).sum(-1) / 2 - ladj).mean()

    return adam_step(loss, parameters)


def adam_step(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Callable[[object], None]:
    """A step of Adam on a loss, of a rate that goes nowhere in thousands of steps."""
    optimiser = torch.optim.Adam(parameters, lr=1e-7)

    def step(_: object) -> None:
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step


@contextmanager
def _evaluating(chain: Chain) -> Iterator[None]:
    with torch.no_grad(), chain.context():
        yield
