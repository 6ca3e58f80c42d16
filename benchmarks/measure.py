"""Time rival computations fairly: in turns, in one run, so that a ratio compares like with like.

A machine's speed drifts: clocks, neighbours, caches. So contenders are not timed one after the
other. They take turns, in an order drawn anew for every round, and a ratio of two contenders is the
median over rounds of their ratio within a round.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LONG = 0.5
"""Seconds of a call, from which on it is not worth all the rounds."""


@dataclass(frozen=True)
class Effort:
    """How long the contenders of one comparison take turns.

    Arguments:
        seconds: time for all rounds together, as far as min_rounds permits.
        slice: a contender's turn is repeated until it takes about this long, in seconds.
        min_rounds, max_rounds: bounds of the number of rounds.
    """

    seconds: float
    slice: float
    min_rounds: int
    max_rounds: int


@dataclass(frozen=True)
class Task:
    """What is timed: `call` alone, on what `setup` returned, inside `context`."""

    call: Callable[[Any], object]
    setup: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager] = nullcontext


def interleave(
    tasks: dict[str, Task], device: torch.device, effort: Effort, cold: bool = False
) -> dict[str, list[float]]:
    """Seconds per call of every task, one figure per round; rounds of different tasks pair up.

    A task whose call is `LONG` takes part in the first rounds only: as many as fit into the seconds
    of the effort, but at least one.

    Arguments:
        tasks: by name.
        device: where they compute. On a GPU, events on the current stream read the time.
        effort: how many rounds, how long.
        cold: evict the caches before every call.
    """
    evict = _evictor(device) if cold else None
    read = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    repeats, turns, round_seconds = {}, {}, 0.0
    for name, task in tasks.items():
        with task.context():
            elapsed = _elapsed(read, task, evict)  # the first call loads code, fills pools
            if elapsed > LONG:
                repeats[name], turns[name] = 1, max(1, int(effort.seconds / elapsed))
                continue
            read(task, 1, evict)
            elapsed = min(_elapsed(read, task, evict) for _ in range(2))
        repeats[name] = max(1, min(1000, round(effort.slice / elapsed)))
        round_seconds += repeats[name] * elapsed
    rounds = int(effort.seconds / round_seconds) if round_seconds else effort.min_rounds
    rounds = max(effort.min_rounds, min(effort.max_rounds, rounds))

    times: dict[str, list[float]] = {name: [] for name in tasks}
    order, shuffle = list(tasks), random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            shuffle(order)
            for name in (name for name in order if number < turns.get(name, rounds)):
                with tasks[name].context():
                    if repeats[name] > 1:
                        read(tasks[name], 1, evict)  # do not charge this one for its rival's caches
                    times[name].append(read(tasks[name], repeats[name], evict))
    finally:
        if collecting:
            gc.enable()
    return times


def _elapsed(read: Callable[..., float], task: Task, evict: Callable[[], object] | None) -> float:
    """What one call costs the run, preparations included."""
    start = time.perf_counter()
    read(task, 1, evict)
    return time.perf_counter() - start


def _cpu_seconds(task: Task, repeats: int, evict: Callable[[], object] | None) -> float:
    total = 0.0
    for _ in range(repeats):
        state = task.setup()
        if evict is not None:
            evict()
        start = time.perf_counter()
        task.call(state)
        total += time.perf_counter() - start
    return total / repeats


def _cuda_seconds(task: Task, repeats: int, evict: Callable[[], object] | None) -> float:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        state = task.setup()
        if evict is not None:
            evict()
        start.record()
        task.call(state)
        end.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(end) for start, end in events) / (1e3 * repeats)


def median(times: list[float]) -> float:
    return statistics.median(times)


def ratio(numerator: list[float], denominator: list[float]) -> dict[str, float]:
    """Median and quartiles, over the rounds that both took part in, of the ratio within a round."""
    ratios = [a / b for a, b in zip(numerator, denominator)]
    if len(ratios) == 1:
        return {"median": ratios[0], "q1": ratios[0], "q3": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "q1": low, "q3": high}


def copy_task(device: torch.device) -> tuple[Task, int]:
    """A plain copy that no cache can hold, and the bytes it moves, read and written."""
    moved = 2**30 if device.type == "cuda" else 2**28
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    return Task(lambda _: target.copy_(source)), moved


def _evictor(device: torch.device) -> Callable[[], object]:
    size = 2 * _last_level_cache(device)
    return torch.empty(size, dtype=torch.uint8, device=device).zero_


def _last_level_cache(device: torch.device) -> int:
    """Its size in bytes; 64 MiB where the system does not say, 256 MiB at most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(text[:-1]) * 1024 for text in map(_first_line, caches) if text.endswith("K")]
    return min(max(sizes, default=2**26), 2**28)


def _first_line(path: Path) -> str:
    return path.read_text().strip()


class RecordedClock:
    """Hands durations that were measured elsewhere to pytest-benchmark.

    pytest-benchmark reads `now` before and after it calls a target: a target that moves this clock
    by a recorded duration yields exactly the statistics of the recorded rounds.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def now(self) -> float:
        return self._seconds

    def player(self, durations: list[float]) -> Callable[[], None]:
        """A target for `benchmark.pedantic(..., rounds=len(durations))`."""
        remaining: Iterator[float] = iter(durations)

        def advance() -> None:
            self._seconds += next(remaining)

        return advance
