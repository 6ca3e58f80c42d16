"""Flows of other libraries: the original against a copy that fastflow.convert has made fast.

As for layers (bench_autoregressive.py): one benchmark is one contender in one direction of one
case, contenders take turns, and each answer is checked against the original in float64 first. Both
have the same weights; a case has one library.

density is log_prob with the gradients of all parameters, points and contexts; log_prob is without
any; training is a whole step of Adam on it, which needs those of the parameters only; sample takes
noise, the same for both, to samples, without gradients; rsample is with those of parameters, noise
and contexts. Which of density and sample takes the original D passes through each of its networks
depends on the library.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import peers
import pytest
import torch
from comparison import (
    LIBRARY,
    WITH_GRADIENTS,
    Comparison,
    Group,
    Settings,
    adam_step,
    compare,
    results,
)
from masked_network import ACTIVATIONS
from peers import Chain
from pytest_benchmark.fixture import BenchmarkFixture
from suite import MARKS, SETTINGS, Outcomes, parametrize
from torch import Tensor, nn

import fastflow
from fastflow import backends

OP = "convert"
OUTPUTS = {
    **dict.fromkeys(("density", "training", "log_prob"), ("log_prob",)),
    **dict.fromkeys(("sample", "rsample"), ("x",)),
}
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

pytestmark = MARKS


class Case(NamedTuple):
    """A flow of a library, and what to time; nflows and normflows have equal widths."""

    library: str
    B: int
    D: int
    widths: tuple[int, ...]
    context: int = 0
    activation: str = "relu"
    transforms: int = 5
    directions: tuple[str, ...] = ("density", "sample")

    def __str__(self) -> str:
        widths = "x".join(map(str, self.widths))
        context = f"-C{self.context}" if self.context else ""
        sizes = f"B{self.B}-D{self.D}-H{widths}{context}"
        return f"{self.library}-{sizes}-{self.activation}-T{self.transforms}"

    def flops(self, direction: str) -> int:
        """Of dense layers, one pass and, with gradients, two more on the way back."""
        levels = (self.D + self.context, *self.widths, 2 * self.D)
        products = sum(below * above for below, above in pairwise(levels))
        passes = 3 if direction in WITH_GRADIENTS else 1
        return 2 * self.B * products * self.transforms * passes


SMOKE = [
    Case("zuko", 20, 4, (16, 16), 3, transforms=2, directions=tuple(OUTPUTS)),
    Case("nflows", 20, 4, (16, 16), 3, "tanh", transforms=2),
    Case("normflows", 20, 4, (16, 16, 16), transforms=2),
    Case("pyro", 20, 4, (16, 16), 3, transforms=2),
    Case("nflows", 2, 4, (1024,) * 3, transforms=1, directions=("log_prob",)),
    *(Case(library, 20, 1, (16, 16, 16), transforms=1) for library in ("nflows", "pyro")),
]
SHORT = [
    Case("zuko", 256, 64, (512, 512)),
    Case("zuko", 1024, 64, (512, 512), directions=("training",)),
    Case("zuko", 200, 6, (50, 50), 12),
    Case("nflows", 256, 64, (512, 512)),
    Case("nflows", 200, 6, (50, 50, 50), 12, "tanh"),  # what sbi trains by default
    Case("normflows", 200, 16, (128, 128, 128)),
    Case("pyro", 200, 16, (128, 128)),
    Case("pyro", 200, 6, (50, 50), 12),
]
# Wide networks and few rows: what does not pay there is anything done to all weights of a call.
SHORT += [
    Case(library, B, 64, widths, transforms=1, directions=directions)
    for library, widths, rows, directions in (
        ("nflows", (1024,) * 3, (1, 4, 16, 64), ("density", "log_prob")),
        ("nflows", (2048,) * 3, (1, 16, 64), ("density", "log_prob")),
        ("nflows", (512,) * 3, (16,), ("density", "log_prob")),
        ("zuko", (1024, 1024), (1, 16, 64), ("density", "log_prob")),
        ("normflows", (1024,) * 3, (1, 16, 64), ("sample", "rsample")),
        ("pyro", (1024, 1024), (1, 16, 64), ("sample", "rsample")),
    )
    for B in rows
]
SHORT += [  # one feature, of which hidden layers see nothing
    Case(library, 256, 1, (64, 64, 64), transforms=1, directions=("density", "sample"))
    for library in ("nflows", "normflows", "pyro")
]
FULL = [Case("zuko", 1, 64, (512, 512)), Case("zuko", 4096, 64, (512, 512))]


def cases(grid: str) -> list[Case]:
    """The cases of a grid, the most telling ones first."""
    return {"smoke": SMOKE, "short": SHORT, "full": SHORT + FULL}[grid]


class Model(NamedTuple):
    """A flow and its two directions, functions of it, points and, if it takes them, contexts."""

    flow: nn.Module
    density: Callable[..., Tensor]
    sample: Callable[..., Tensor]


def zuko(case: Case) -> Model:
    """zuko.flows.MAF."""
    from zuko.flows import MAF

    activation = ACTIVATIONS[case.activation][1]
    options = {"hidden_features": case.widths, "activation": activation}
    return Model(
        MAF(case.D, case.context, case.transforms, **options),
        lambda flow, x, *c: flow(*c).log_prob(x),
        lambda flow, z, *c: flow(*c).transform.inv(z),
    )


def nflows(case: Case) -> Model:
    """MaskedAffineAutoregressiveTransform without residual blocks, and random permutations."""
    from nflows import distributions, flows, transforms

    steps = []
    for _ in range(case.transforms):
        layer = transforms.MaskedAffineAutoregressiveTransform(
            *(case.D, case.widths[0], case.context or None),
            num_blocks=len(case.widths) - 1,
            use_residual_blocks=False,
            activation=ACTIVATIONS[case.activation][0],
        )
        steps += [layer, transforms.RandomPermutation(case.D)]
    base = distributions.StandardNormal([case.D])
    return Model(
        flows.Flow(transforms.CompositeTransform(steps), base),
        lambda flow, x, *c: flow.log_prob(x, *c),
        lambda flow, z, *c: flow._transform.inverse(z, *c)[0],
    )


def normflows(case: Case) -> Model:
    """MaskedAffineAutoregressive with residual blocks, and random permutations."""
    from normflows import NormalizingFlow, distributions, flows

    steps = []
    for _ in range(case.transforms):
        blocks = len(case.widths) // 2
        layer = flows.MaskedAffineAutoregressive(case.D, case.widths[0], num_blocks=blocks)
        steps += [layer, flows.Permute(case.D)]
    return Model(
        NormalizingFlow(distributions.DiagGaussian(case.D, trainable=False), steps),
        lambda flow, x: flow.log_prob(x),
        lambda flow, z: flow(z),
    )


def pyro(case: Case) -> Model:
    """AffineAutoregressive, or the conditional one, with the random orders that they draw."""
    from pyro import distributions
    from pyro.distributions import transforms

    sizes = (case.D, case.context) if case.context else (case.D,)
    make = transforms.conditional_affine_autoregressive
    make = make if case.context else transforms.affine_autoregressive

    def at(flow: nn.ModuleList, c: tuple[Tensor, ...]) -> list[torch.distributions.Transform]:
        return [layer.condition(*c) if c else layer for layer in flow]

    def density(flow: nn.ModuleList, x: Tensor, *c: Tensor) -> Tensor:
        base = distributions.Normal(torch.zeros_like(x[0]), 1).to_event(1)
        # the view is a new tensor, as a new batch is: Pyro answers for known ones from its memory
        return distributions.TransformedDistribution(base, at(flow, c)).log_prob(x.view_as(x))

    def sample(flow: nn.ModuleList, z: Tensor, *c: Tensor) -> Tensor:
        z = z.view_as(z)
        for transform in at(flow, c):
            z = transform(z)
        return z

    layers = [make(*sizes, hidden_dims=list(case.widths)) for _ in range(case.transforms)]
    return Model(nn.ModuleList(layers), density, sample)


LIBRARIES = {"zuko": zuko, "nflows": nflows, "normflows": normflows, "pyro": pyro}


def contenders(case: Case, device: str) -> list[str]:
    """fastflow's backends, and the library that the flow is from."""
    return [*(LIBRARY + name for name in BACKENDS[device]), case.library]


def absence(contender: str, case: Case) -> str | None:
    """None if a contender is to run here, else why not."""
    if reason := peers.missing(case.library):
        return reason
    return backends.status(contender.removeprefix(LIBRARY)) if LIBRARY in contender else None


def chain(model: Model, direction: str, contender: str, inputs: list[Tensor]) -> Chain:
    """A copy of the flow, converted if the contender is fastflow's, in one direction."""
    flow = copy.deepcopy(model.flow)
    call = model.sample if OUTPUTS[direction] == ("x",) else model.density
    points = [one.detach().clone().requires_grad_(direction != "training") for one in inputs]
    named = zip(("x", "context"), points)
    leaves = {f"d{name}": one for name, one in named if one.requires_grad}
    leaves |= {f"d{name}": one for name, one in flow.named_parameters()}
    if contender.startswith(LIBRARY):
        fastflow.convert(flow, strict=True)

    def run() -> tuple[Tensor]:
        return (call(flow, *points),)

    def step() -> Callable[[object], None]:
        return adam_step(lambda: -run()[0].mean(), flow.parameters())

    made = Chain(run, [*leaves.values()], names=tuple(leaves), step=step)
    if not contender.startswith(LIBRARY):
        return made
    backend = contender.removeprefix(LIBRARY)
    if backend == backends.available(inputs[0].device.type)[0]:
        return made  # as users have it: calls may be left to the library
    return replace(made, context=lambda: fastflow.use_backend(backend))


@contextmanager
def float64() -> Iterator[None]:
    """Pyro's inverse makes tensors of the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_comparison(case: Case, direction: str, settings: Settings, timed: bool) -> Comparison:
    """The contenders of one direction of one case, checked and timed."""
    names = contenders(case, settings.device.type)
    reasons = {name: absence(name, case) for name in names}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    if case.library in absent:
        return Comparison(absent=absent)
    torch.manual_seed(0)
    model = LIBRARIES[case.library](case)
    model = model._replace(flow=model.flow.to(settings.device))
    shapes = [(case.B, case.D)] + [(case.B, case.context)] * bool(case.context)
    inputs = [torch.randn(*shape).to(settings.device) for shape in shapes]
    shape = (case.B, case.D) if OUTPUTS[direction] == ("x",) else (case.B,)
    cotangents = (torch.randn(*shape, device=settings.device),)
    plain = chain(model, direction, case.library, inputs)
    wanted = results(plain, direction, OUTPUTS[direction], cotangents)
    with float64():
        double = model._replace(flow=copy.deepcopy(model.flow).double())
        exact = chain(double, direction, case.library, [one.double() for one in inputs])
        given = tuple(cotangent.double() for cotangent in cotangents)
        exact = results(exact, direction, OUTPUTS[direction], given)
    builders = {
        name: lambda name=name: chain(model, direction, name, inputs)
        for name in names
        if name not in absent
    }
    return compare(
        [Group(builders, wanted, exact)],
        absent,
        direction,
        OUTPUTS[direction],
        cotangents,
        case.transforms * (len(case.widths) + 1),
        settings,
        timed=timed,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    triples = [
        (case, direction, contender)
        for case in cases(settings.grid)
        for direction in case.directions
        for contender in contenders(case, settings.device.type)
    ]
    parametrize(metafunc, triples)


def test_convert(
    benchmark: BenchmarkFixture, outcomes: Outcomes, case: Case, direction: str, contender: str
) -> None:
    facts = {"D": case.D, "flops": case.flops(direction)}
    outcomes.show(benchmark, run_comparison, OP, case, direction, contender, **facts)
