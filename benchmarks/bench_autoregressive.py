"""The affine autoregressive layer of MAF and IAF: fastflow against its peers and plain PyTorch.

As for planar chains (bench_planar_flow.py): one benchmark is one contender in one direction of one
case, contenders take turns, and each answer is checked against float64 first. All have the same
masks and weights (masked_network.py).

forward is the parallel direction without gradients, forward_backward with the gradients of all
inputs and parameters, training a whole step of Adam on the density of the outputs. inverse is what
peers do in D passes; inverse_backward differentiates through it. The floor that "dense" sets is a
network of the same widths without masks.

The cases of `SWEEP` are a comparison of their own: how the cost of the inverse grows with D in
networks of one size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import masked_eager
import masked_peers
import peers
import pytest
import torch
from comparison import LIBRARY, WITH_GRADIENTS, Comparison, Group, Settings, compare, results
from masked_network import FORMS, PLAIN, Form, Network, draw
from masked_peers import PEERS
from peers import Chain
from pytest_benchmark.fixture import BenchmarkFixture
from suite import MARKS, SETTINGS, Outcomes, parametrize
from torch import Tensor

from fastflow import backends

OP = "autoregressive"
SWEEP_OP = "autoregressive_inverse_by_D"
PARALLEL = ("forward", "forward_backward", "training")
INVERSE = ("inverse", "inverse_backward")
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
OPS = {
    "forward": ("autoregressive_forward",),
    "inverse": ("autoregressive_inverse",),
    "inverse_backward": ("autoregressive_inverse", "autoregressive_inverse_backward"),
}  # and for all others:
OTHER_OPS = ("autoregressive_forward", "autoregressive_backward")
MODULES = {"zuko": "zuko", "nflows": "nflows", "normflows": "normflows", "pyro": "pyro"}

REFERENCE_LIMIT = 10**9
"""The reference backend is plain PyTorch too: it is timed up to so many products a pass."""
GRAPH_LIMIT = 64
"""The largest D for which peers differentiate their inverse: all D passes are kept."""
PASSES_LIMIT = {"smoke": 10**9, "short": 2 * 10**11, "full": 2 * 10**12}
"""The most products in D passes on a CPU: at 5e10 a second the full grid's are 40 s. A GPU has a
hundred times as many."""
LEAST_ROWS = 32
"""A product with fewer rows than this costs as much: the weights must be read all the same."""

pytestmark = MARKS


class Case(NamedTuple):
    """Sizes of one comparison; `sweep`: one of those that vary D alone."""

    B: int
    D: int
    widths: tuple[int, ...]
    context: int = 0
    activation: str = "relu"
    sweep: bool = False

    def __str__(self) -> str:
        widths = "x".join(map(str, self.widths))
        context = f"-C{self.context}" if self.context else ""
        return f"B{self.B}-D{self.D}-H{widths}{context}-{self.activation}"

    @property
    def op(self) -> str:
        return SWEEP_OP if self.sweep else OP

    @property
    def directions(self) -> tuple[str, ...]:
        if self.sweep:
            return ("forward", "inverse")
        return ("inverse",) if self.B == 1 else PARALLEL + INVERSE

    def products(self) -> int:
        """Of a dense pass for one row; the masks leave about half of them."""
        levels = (self.D + self.context, *self.widths, 2 * self.D)
        return sum(below * above for below, above in pairwise(levels))

    def flops(self, direction: str) -> int:
        """Of dense layers, one pass forward and, with gradients, two more on the way back.

        An inverse is counted as the pass that it amounts to.
        """
        return 2 * self.B * self.products() * (3 if direction in WITH_GRADIENTS else 1)

    def network(self, form: Form, device: torch.device) -> Network:
        sizes = self.B, self.D, self.widths, self.context, self.activation
        return draw(*sizes, form, device)


SBI = Case(200, 6, (50, 50, 50), 12, "tanh")
"""A layer of the density estimator that simulation-based inference trains by default."""
SMOKE = [Case(20, 3, (16, 16, 16), 4, "tanh"), Case(20, 4, (16, 16)), Case(1, 4, (16, 16))]
SHORT = [
    SBI,
    Case(1024, 16, (256, 256)),
    Case(1024, 64, (512, 512)),
    Case(1, 64, (512, 512)),
    Case(256, 784, (1024, 1024)),
]
FULL = [
    *(SBI._replace(B=rows) for rows in (1, 1000, 65536)),
    Case(1, 784, (1024, 1024)),
    Case(4096, 784, (2048, 2048)),
]
SWEEP = {
    "smoke": [Case(8, D, (16, 16), sweep=True) for D in (2, 4)],
    "short": [Case(64, D, (1024, 1024), sweep=True) for D in (2, 8, 32, 128)],
    "full": [Case(64, D, (1024, 1024), sweep=True) for D in (2, 8, 32, 128, 392, 784)],
}


def cases(grid: str) -> list[Case]:
    """The cases of a grid, the most telling ones first."""
    own = {"smoke": SMOKE, "short": SHORT, "full": SHORT + FULL}[grid]
    return own + SWEEP[grid]


def contenders(case: Case, direction: str, device: str) -> list[str]:
    """Those that know this case and direction, whether or not they can run here."""
    names = [LIBRARY + name for name in (*BACKENDS[device], "reference")]
    plain = ["eager", "jacobi"] if direction == "inverse" else ["eager"]
    if direction in PARALLEL:
        plain += ["compile", "dense"]
    known = [*PEERS] if not case.context else [name for name in PEERS if name != "normflows"]
    return names + plain + known  # normflows' context gates the blocks: another layer


def absence(contender: str, case: Case, direction: str, settings: Settings) -> str | None:
    """None if a contender is to run here, else why not."""
    device = settings.device.type
    if contender.startswith(LIBRARY):
        backend = contender.removeprefix(LIBRARY)
        reason = backends.status(backend)
        if reason is not None:
            return f"{contender}: {reason}"
        rivals = set()
        for op in OPS.get(direction, OTHER_OPS):
            known = backends.available(device, op)
            if backend not in known:
                return f"{contender}: it has no {op}"
            rivals = {*known} - {"reference"}
        large = case.B * case.products() > REFERENCE_LIMIT or case.D > 2 * GRAPH_LIMIT
        if backend == "reference" and rivals and large:
            return f"{contender}: not timed for large networks"
        return None
    if contender in MODULES and (reason := peers.missing(MODULES[contender])):
        return reason
    if contender == "compile":
        return peers.compile_missing(settings.device)
    if direction in INVERSE and contender != "jacobi":
        limit = PASSES_LIMIT[settings.grid] * (100 if device == "cuda" else 1)
        if max(case.B, LEAST_ROWS) * case.products() * case.D > limit:
            return f"{contender}: {case.D} passes take too long for the {settings.grid} grid"
        if direction == "inverse_backward" and case.D > GRAPH_LIMIT:
            return f"{contender}: the graph of {case.D} passes is too large"
    return None


def builder(contender: str, network: Network, inverse: bool) -> Callable[[], Chain]:
    """How to make a contender of this network."""
    if contender.startswith(LIBRARY):
        backend = contender.removeprefix(LIBRARY)
        return partial(masked_peers.fastflow_layer, network, backend, inverse)
    if contender in PEERS:
        return partial(PEERS[contender], network, inverse)
    eager = masked_eager.eager_inverse if inverse else masked_eager.eager
    return {
        "eager": partial(masked_eager.of_function, network, eager),
        "jacobi": partial(masked_eager.of_function, network, masked_eager.jacobi_inverse),
        "compile": partial(masked_eager.compiled, network),
        "dense": partial(masked_eager.dense_chain, network),
    }[contender]


def group(
    case: Case,
    direction: str,
    rival: str | None,
    members: list[str],
    cotangents: tuple[Tensor, Tensor],
    device: torch.device,
) -> Group:
    """Contenders that compute one form of the layer, and what they must return.

    Arguments:
        case, direction: of the comparison.
        rival: the peer whose form it is; None for the common one.
        members: the contenders.
        cotangents: of the two outputs.
        device: where they compute.
    """
    network = case.network(FORMS[rival] if rival else PLAIN, device)
    inverse = direction in INVERSE
    if inverse:
        with torch.no_grad():
            network = network.at(masked_eager.eager(network, network.tensors)[0])
    wanted = [expected(one, direction, cotangents) for one in (network, network.double())]
    return Group({name: builder(name, network, inverse) for name in members}, *wanted, rival)


def expected(
    network: Network, direction: str, cotangents: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """What plain PyTorch returns, in the precision of the network."""
    given = tuple(cotangent.to(network.tensors["x"]) for cotangent in cotangents)
    if direction in INVERSE:
        differentiated = direction in WITH_GRADIENTS
        return masked_eager.inverse_and_gradients(network, given if differentiated else None)
    return results(
        masked_eager.of_function(network, masked_eager.eager), direction, outputs(direction), given
    )


def outputs(direction: str) -> tuple[str, str]:
    """The names of the two outputs."""
    return ("x", "ladj") if direction in INVERSE else ("y", "ladj")


def run_comparison(case: Case, direction: str, settings: Settings, timed: bool) -> Comparison:
    """The contenders of one direction of one case, checked and timed."""
    names = contenders(case, direction, settings.device.type)
    reasons = {name: absence(name, case, direction, settings) for name in names}
    members = [name for name in names if reasons[name] is None]
    own = [name for name in members if name.startswith(LIBRARY)]
    forms: dict[str | None, list[str]] = {None: []}
    for name in members:
        different = FORMS.get(name, PLAIN) != PLAIN
        if different:
            forms[name] = [*own, name]
        else:
            forms[None].append(name)
    torch.manual_seed(0)
    cotangents = tuple(
        torch.randn(*shape).to(settings.device) for shape in ((case.B, case.D), (case.B,))
    )
    return compare(
        [
            group(case, direction, rival, some, cotangents, settings.device)
            for rival, some in forms.items()
        ],
        {name: reason for name, reason in reasons.items() if reason is not None},
        direction,
        outputs(direction),
        cotangents,
        len(case.widths) + 1,
        settings,
        timed=timed,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    settings: Settings = metafunc.config.stash[SETTINGS]
    triples = [
        (case, direction, contender)
        for case in cases(settings.grid)
        for direction in case.directions
        for contender in contenders(case, direction, settings.device.type)
    ]
    parametrize(metafunc, triples)


def test_autoregressive(
    benchmark: BenchmarkFixture, outcomes: Outcomes, case: Case, direction: str, contender: str
) -> None:
    facts = {"D": case.D, "flops": case.flops(direction)}
    outcomes.show(benchmark, run_comparison, case.op, case, direction, contender, **facts)
