"""Backward passes where they meet PyTorch: batched cotangents, and hooks on saved tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from conftest import Target, target_id, targets
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

import fastflow
from fastflow import MADE, ConditionalPlanarFlow, MaskedAffineAutoregressive, PCPMap, PlanarFlow

C = 2
TREE = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).bool()
autoregressive = partial(MaskedAffineAutoregressive, activation="tanh")
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "made": lambda: MADE(3, 2, (8, 8), activation="tanh"),
    "made-context": lambda: MADE(3, 2, (8, 8), C, activation="tanh"),
    "autoregressive": lambda: autoregressive(2, (8, 8)),
    "autoregressive-linear": lambda: autoregressive(3, ()),
    "autoregressive-residual": lambda: autoregressive(1, (8, 8), residual=True),
    "autoregressive-context": lambda: autoregressive(2, (8,), C),
    "autoregressive-recompute": lambda: autoregressive(2, (8,), recompute=True),
    "autoregressive-adjacency": lambda: autoregressive(3, (8,), adjacency=TREE),
    "planar": lambda: PlanarFlow(3, 2),
    "planar-context": lambda: ConditionalPlanarFlow(3, C, 2, (4,)),
    "pcp": lambda: PCPMap(2, 0, (5, 5)),
    "pcp-context": lambda: PCPMap(2, C, (5, 5, 5)),
}
# kernels that are interpreted know no more of this than others, and take minutes
TARGETS = [one for one in targets("autoregressive_forward") if one.device == "cpu" and not one.slow]


@pytest.fixture(params=TARGETS, ids=target_id)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with request.param.in_force():
        yield request.param


class Case:
    """One direction of a layer: a function of a tensor x, and the leaves of its graph."""

    def __init__(self, layer: nn.Module, direction: str) -> None:
        self.layer, self.direction = layer.double(), direction
        like = {"dtype": torch.float64}
        self.x = torch.randn(3, layer.features, **like, requires_grad=True)
        self.context = torch.randn(3, C, **like) if layer.context_features else None
        self.leaves = [self.x, *layer.parameters()]

    def outputs(self, x: Tensor | None = None) -> tuple[Tensor, ...]:
        found = getattr(self.layer, self.direction)(self.x if x is None else x, self.context)
        return found if isinstance(found, tuple) else (found,)


CASES = [
    pytest.param(name, direction, id=f"{name}-{direction}")
    for name in LAYERS
    for direction in ("forward", "inverse")
    if hasattr(LAYERS[name](), direction)
]


def make(name: str, direction: str, target: Target) -> Case:
    if name == "autoregressive-adjacency" and target.backend != "reference":
        pytest.skip("kernels are for staircases")
    return Case(LAYERS[name](), direction)


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- batched cotangents


@pytest.mark.parametrize("create_graph", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("functorch", [False, True], ids=["is_grads_batched", "vmap"])
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_batched_cotangents(
    name: str, direction: str, functorch: bool, create_graph: bool, target: Target
) -> None:
    case = make(name, direction, target)
    outputs = case.outputs()
    cotangents = [torch.randn(4, *output.shape, dtype=output.dtype) for output in outputs]

    def vjp(*cotangents: Tensor, **options: bool) -> tuple[Tensor, ...]:
        options = {"retain_graph": True, "create_graph": create_graph, **options}
        return torch.autograd.grad(outputs, case.leaves, cotangents, **options)

    rows = zip(*cotangents)
    want = [torch.stack(several) for several in zip(*(vjp(*row) for row in rows))]
    if functorch:
        found = torch.func.vmap(vjp)(*cotangents)
    else:
        found = vjp(*cotangents, is_grads_batched=True)
    close(list(found), want)


# the issue with slices of everything: sweeps go by blocks of 16 features, one alone, exactly full
@pytest.mark.parametrize(("features", "widths"), [(2, (64, 64)), (1, (8,)), (16, (16,)), (17, ())])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_vectorised_jacobians(
    features: int, widths: tuple[int, ...], direction: str, target: Target
) -> None:
    case = Case(autoregressive(features, widths), direction)
    function, x = (lambda x: case.outputs(x)[0]), case.x.detach()
    close(jacobian(function, x, vectorize=True), jacobian(function, x))
    if features < 16:
        scalar = lambda x: case.outputs(x)[0].square().sum()  # noqa: E731
        close(hessian(scalar, x, vectorize=True), hessian(scalar, x))


# ---------------------------------------------------------------- hooks on saved tensors


def every_other(tensor: Tensor) -> Tensor:
    """The same values, with others between them."""
    return torch.stack([tensor, torch.full_like(tensor, 7)], -1)[..., 0]


def transposed(tensor: Tensor) -> Tensor:
    """The same values, columns first."""
    return tensor.mT.contiguous().mT if tensor.dim() > 1 else every_other(tensor)


HOOKS = {
    "every-other": lambda: saved_tensors_hooks(lambda tensor: tensor, every_other),
    "transposed": lambda: saved_tensors_hooks(transposed, lambda tensor: tensor),
    "save-on-cpu": save_on_cpu,
}


def gradients(case: Case, hooks: Callable[[], object]) -> list[Tensor]:
    """First and second derivatives of a scalar, by all leaves."""
    with hooks():
        total = sum(output.square().sum() for output in case.outputs())
    first = torch.autograd.grad(total, case.leaves, retain_graph=True)
    again = torch.autograd.grad(total, case.x, create_graph=True)[0].square().sum()
    return [*first, *torch.autograd.grad(again, case.leaves)]


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(("name", "direction"), CASES)
def test_hooks_that_return_other_strides(
    name: str, direction: str, hooks: str, target: Target
) -> None:
    case = make(name, direction, target)
    close(gradients(case, HOOKS[hooks]), gradients(case, nullcontext))


def test_stairs_of_other_strides_are_stairs(target: Target) -> None:
    layer = MADE(3, 2, (8,))
    network, x = layer.network(None), torch.randn(5, 3)
    want = fastflow.functional.made(x, **network)
    network["stairs"] = every_other(network["stairs"])
    assert torch.equal(fastflow.functional.made(x, **network), want)
