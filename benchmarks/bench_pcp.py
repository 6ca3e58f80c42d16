"""PCPMap: the closed-form Hessian against the potential differentiated twice by autograd.

As for planar chains (bench_planar_flow.py): one benchmark is one contender in one direction of one
case, contenders take turns, and each answer is checked against float64 first. Whole layers are
timed, the way from the context to the network's terms included; it is the same for all.

forward is the map with its log-determinant, without gradients; forward_backward with the gradients
of points, context and all parameters; inverse is to rounding, for the rivals by as many undamped
Newton steps as the benchmark's weights need.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import pcp_peers
import pytest
import torch
from comparison import LIBRARY, WITH_GRADIENTS, Comparison, Group, Settings, compare, results
from pcp_peers import HESSIANS, NEWTON_STEPS, NEWTON_STEPS_EXACT, Problem
from pytest_benchmark.fixture import BenchmarkFixture
from suite import MARKS, SETTINGS, Outcomes, parametrize

import fastflow
from fastflow import backends
from fastflow.bijections.pcp import CONTEXT_GAIN, SHARPNESS, START_SHARPNESS

OP = "pcp"
DIRECTIONS = ("forward", "forward_backward", "inverse")
BACKENDS = {"cpu": ("cpp", "reference"), "cuda": ("reference",)}

pytestmark = MARKS


class Case(NamedTuple):
    """Sizes of one comparison: H units in both layers, C features of the context."""

    B: int
    D: int
    H: int = 64
    C: int = 32

    def __str__(self) -> str:
        return f"B{self.B}-D{self.D}-H{self.H}x{self.H}-C{self.C}"

    def problem(self, device: torch.device) -> Problem:
        """A layer away from the identity, and points in its domain."""
        torch.manual_seed(self.B + self.D)
        layer = fastflow.PCPMap(self.D, self.C, (self.H, self.H))
        with torch.no_grad():
            # blunt units, for which the rivals' undamped search converges
            for parameter in (*layer.inputs, *(terms.bias[: self.H] for terms in layer.terms[:-1])):
                parameter /= START_SHARPNESS
            gains = {"inputs": SHARPNESS, "terms": CONTEXT_GAIN}
            for name, parameter in layer.named_parameters():
                noise = 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
                parameter += noise / gains.get(name.split(".")[0], 1)
            layer.terms[-1].bias[: self.H] += 3 / CONTEXT_GAIN  # slopes of order 1 / sqrt(H)
        x, context = torch.randn(self.B, self.D), torch.randn(self.B, self.C)
        return Problem(layer.to(device), x.to(device), context.to(device))

    def flops(self, direction: str) -> int:
        """Of the Hessian in closed form, and twice that on the way back; the inverse is counted as
        one evaluation."""
        spread, quadratic = self.D * self.H**2, 2 * self.D**2 * self.H
        return 2 * self.B * (spread + quadratic) * (3 if direction in WITH_GRADIENTS else 1)


CASES = {
    "smoke": [Case(20, 2, 16, 4), Case(20, 3, 16, 4)],
    "short": [Case(128, 2), Case(128, 8), Case(128, 16), Case(1024, 16)],
}
CASES["full"] = CASES["short"] + [Case(16, 16), Case(1024, 2), Case(1024, 32, 128)]


def contenders(device: str) -> list[str]:
    """Those of a device, whether or not they work here."""
    return [*(LIBRARY + name for name in BACKENDS[device]), *HESSIANS]


def run_comparison(case: Case, direction: str, settings: Settings, timed: bool) -> Comparison:
    """The contenders of one direction of one case, checked and timed."""
    known = BACKENDS[settings.device.type]
    problem, inverse = case.problem(settings.device), direction == "inverse"
    if inverse:
        with torch.no_grad():
            problem = problem._replace(point=problem.layer(problem.point, problem.context)[0])
    names = ("x" if inverse else "y", "ladj")
    cotangents = (torch.randn_like(problem.point), torch.randn_like(problem.point[:, 0]))
    plain, exact = (
        results(
            pcp_peers.differentiated(one, HESSIANS["vjps"], inverse, steps),
            *(direction, names, tuple(cotangent.to(one.point) for cotangent in cotangents)),
        )
        for one, steps in ((problem, NEWTON_STEPS), (problem.double(), NEWTON_STEPS_EXACT))
    )
    reasons = {LIBRARY + name: backends.status(name) for name in known}
    builders = {
        LIBRARY + name: partial(pcp_peers.fastflow_layer, problem, inverse, name)
        for name in known
        if reasons[LIBRARY + name] is None
    }
    for name, find in HESSIANS.items():
        builders[name] = partial(pcp_peers.differentiated, problem, find, inverse, NEWTON_STEPS)
    group, layers = Group(builders, plain, exact), 2
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    return compare([group], absent, direction, names, cotangents, layers + 1, settings, timed=timed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    triples = [
        (case, direction, contender)
        for case in CASES[settings.grid]
        for direction in DIRECTIONS
        for contender in contenders(settings.device.type)
    ]
    parametrize(metafunc, triples)


def test_pcp(
    benchmark: BenchmarkFixture, outcomes: Outcomes, case: Case, direction: str, contender: str
) -> None:
    facts = {"flops": case.flops(direction)}
    outcomes.show(benchmark, run_comparison, OP, case, direction, contender, **facts)
