"""Planar chains: fastflow against plain PyTorch, torch.compile, normflows and Pyro.

One benchmark is one contender in one direction of one case. The contenders of a direction take
turns in one run (measure.py); the first benchmark of a direction sets it off, and every one reports
its own share of it. Each answer is checked against float64 first (gate.py).

forward is evaluation (no_grad), backward the backward pass alone, forward_backward what a training
step does; gradients are taken in z, w, u and b.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import peers
import pytest
import torch
from comparison import LIBRARY, Comparison, Group, Settings, compare, results
from pytest_benchmark.fixture import BenchmarkFixture
from suite import MARKS, SETTINGS, Outcomes, parametrize
from torch import Tensor

import fastflow
from fastflow import backends

OP = "planar_flow"
DIRECTIONS = ("forward", "backward", "forward_backward", "inverse")
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
REFERENCE_LIMIT = 2**20
"""The reference backend is plain PyTorch too: it is timed for cases up to this many B D K."""

pytestmark = MARKS


class Case(NamedTuple):
    """Sizes of one comparison. `bandwidth`: too large for any cache, timed from memory."""

    B: int
    D: int
    K: int
    amortised: bool = False
    bandwidth: bool = False

    def __str__(self) -> str:
        kind = "amortised" if self.amortised else "shared"
        return f"{kind}-B{self.B}-D{self.D}-K{self.K}"

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """z, w, u, b with w.u of order 1: the peers return infinities on extreme weights."""
        generator = torch.Generator(device).manual_seed(self.B + self.D + self.K)
        draw = partial(torch.randn, generator=generator, device=device)
        rows = (self.B,) if self.amortised else ()
        z = draw(self.B, self.D)
        w, u = (draw(*rows, self.K, self.D) / self.D**0.5 for _ in range(2))
        return z, w, u, draw(*rows, self.K) / 2

    def bytes_moved(self, direction: str) -> int:
        """The fewest: every input read once, every output written once, in float32."""
        rows = self.B * self.D
        parameters = (2 * self.D + 1) * self.K * (self.B if self.amortised else 1)
        once = 2 * rows + self.B + parameters  # z, z_K, ladj, parameters
        gradients = 3 * rows + self.B + 2 * parameters  # z, dz_K, dz, dladj, parameters and theirs
        counts = {"backward": gradients, "forward_backward": once + gradients}
        return 4 * counts.get(direction, once)

    def flops(self, direction: str) -> int:
        """On vectors of length D, by the textbook recursion; scalars of a step are not counted.

        Forward: w.z and z + u_hat t. Backward: u_hat.g, g + gamma w, the products for dw and du.
        Amortised parameters need w.u, |w|^2 and u_hat for every row, and the way back through them.
        """
        forward, backward = (10, 22) if self.amortised else (4, 8)
        counts = {"backward": backward, "forward_backward": forward + backward}
        return counts.get(direction, forward) * self.B * self.D * self.K


TUTORIAL = Case(100, 2, 3)
SMOKE = [TUTORIAL, Case(64, 4, 2, amortised=True)]
SHORT = [
    TUTORIAL,
    Case(1024, 16, 8),
    Case(8192, 64, 16),
    Case(2048, 32, 16, amortised=True),
]
LARGE = {
    "cpu": [Case(2**15, 64, 16, bandwidth=True)],
    "cuda": [
        Case(2**20, 64, 16, bandwidth=True),
        Case(2**17, 32, 16, amortised=True, bandwidth=True),
    ],
}
FULL = [
    Case(100, 2, 3, amortised=True),
    Case(1024, 2, 32),
    Case(8192, 64, 1),
    Case(4096, 256, 8),
    Case(256, 40, 8, amortised=True),
    Case(8192, 64, 4, amortised=True),
]
FULL_LARGE = {
    "cpu": [Case(2**15, 2, 3, bandwidth=True), Case(2**15, 16, 8, amortised=True, bandwidth=True)],
    "cuda": [Case(2**20, 2, 3, bandwidth=True), Case(2**20, 8, 4, amortised=True, bandwidth=True)],
}


def cases(grid: str, device: str) -> list[Case]:
    """The cases of a grid, the most telling ones first."""
    if grid == "smoke":
        return SMOKE
    short = SHORT + LARGE[device]
    return short if grid == "short" else short + FULL + FULL_LARGE[device]


def contenders(case: Case, direction: str, device: str) -> list[str]:
    """Those that know this case and direction, whether or not they are installed."""
    names = [LIBRARY + name for name in BACKENDS[device]]
    if case.B * case.D * case.K <= REFERENCE_LIMIT:
        names.append(LIBRARY + "reference")
    names.append("eager")
    if direction == "inverse":  # no peer has one: the baseline is Newton's method in plain PyTorch
        return [*names, "compile"]
    names += ["hoisted", "compile"]
    return [*names, "pyro"] if case.amortised else [*names, "normflows", "pyro"]


def absence(contender: str, device: torch.device) -> str | None:
    """None if a contender can run on this machine, else why not."""
    if contender.startswith(LIBRARY):
        reason = backends.status(contender.removeprefix(LIBRARY))
        return reason and f"{contender}: {reason}"
    if contender == "compile":
        return peers.compile_missing(device)
    return None if contender in ("eager", "hoisted") else peers.missing(contender)


def builder(contender: str, inputs: peers.Parameters, inverse: bool) -> Callable[[], peers.Chain]:
    """How to make a contender of these inputs."""
    if contender.startswith(LIBRARY):
        functional = fastflow.functional
        function = functional.planar_flow_inverse if inverse else functional.planar_flow
        backend = contender.removeprefix(LIBRARY)
        in_force = partial(fastflow.use_backend, backend)
        return partial(peers.of_function, function, inputs, in_force)
    plain = peers.eager_planar_inverse if inverse else peers.eager_planar
    best = peers.eager_planar_inverse if inverse else peers.hoisted_planar
    return {
        "eager": partial(peers.of_function, plain, inputs),
        "hoisted": partial(peers.of_function, best, inputs),
        "compile": partial(peers.compiled, best, inputs),
        "normflows": partial(peers.normflows_planar, inputs),
        "pyro": partial(peers.pyro_planar, inputs),
    }[contender]


def exact_results(
    inputs: peers.Parameters, direction: str, names: tuple[str, ...], cotangents: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """The answer in float64, some rows at a time: activations of all rows may not fit in memory."""
    function = peers.eager_planar_inverse_exact if direction == "inverse" else peers.eager_planar
    z, *parameters = (tensor.double() for tensor in inputs)
    amortised = parameters[0].dim() == 3
    parts = []
    for rows in torch.arange(len(z), device=z.device).split(2**16):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1)
        own = [tensor[chunk] for tensor in parameters] if amortised else parameters
        chain = peers.of_function(function, (z[chunk], *own))
        given = tuple(cotangent[chunk].double() for cotangent in cotangents)
        parts.append(results(chain, direction, names, given))
    summed = () if amortised else ("dw", "du", "db")
    return {
        name: sum(part[name] for part in parts) if name in summed
        else torch.cat([part[name] for part in parts])
        for name in parts[0]
    }  # fmt: skip


def run_comparison(case: Case, direction: str, settings: Settings, timed: bool) -> Comparison:
    """The contenders of one direction of one case, checked and timed."""
    device = settings.device
    names = contenders(case, direction, device.type)
    needed = 4 * 8 * case.B * case.D * case.K  # plain PyTorch keeps several (B, D) for every step
    if needed > memory(device) / 2:
        reason = f"needs about {needed / 2**30:.0f} GiB, too much for this device"
        return Comparison(absent=dict.fromkeys(names, reason))

    inverse = direction == "inverse"
    inputs = case.inputs(device)
    outputs = ("z", "ladj") if inverse else ("z_K", "ladj")
    if inverse:
        with torch.no_grad():
            inputs = (peers.eager_planar(*inputs)[0], *inputs[1:])
    torch.manual_seed(0)
    cotangents = (torch.randn_like(inputs[0]), torch.randn_like(inputs[0][:, 0]))
    exact = exact_results(inputs, direction, outputs, cotangents)
    reasons = {name: absence(name, device) for name in names}
    builders = {name: builder(name, inputs, inverse) for name in names if reasons[name] is None}
    return compare(
        [Group(builders, None, exact)],
        {name: reason for name, reason in reasons.items() if reason is not None},
        direction,
        outputs,
        cotangents,
        case.K,
        settings,
        case.bytes_moved(direction) if case.bandwidth else None,
        timed,
    )


def memory(device: torch.device) -> int:
    """Bytes of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    device = settings.device.type
    triples = [
        (case, direction, contender)
        for case in cases(settings.grid, device)
        for direction in DIRECTIONS
        for contender in contenders(case, direction, device)
    ]
    parametrize(metafunc, triples)


def test_planar_flow(
    benchmark: BenchmarkFixture, outcomes: Outcomes, case: Case, direction: str, contender: str
) -> None:
    facts = {"bytes_moved": case.bytes_moved(direction), "flops": case.flops(direction)}
    outcomes.show(benchmark, run_comparison, OP, case, direction, contender, **facts)
