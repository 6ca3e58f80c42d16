"""The autograd node in C++ on ops that are made here: lists of tensors, missing ones, flags."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastflow.autograd import node

needs_node = pytest.mark.skipif(not node.enabled, reason=f"no autograd node: {node.reason}")


class Labelled(Tensor):
    """A subclass, whose __torch_function__ must see what is done with it."""


SCHEMAS = [
    "product_forward(Tensor x, Tensor[] weights, Tensor? shift, float scale, int power, bool sure) "
    "-> (Tensor y, Tensor h)",
    "product_backward(Tensor dy, Tensor h, Tensor[] weights, Tensor x, float scale, "
    "bool param_grads) -> (Tensor dx, Tensor[] dweights)",
]


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An op with a list of tensors, y = scale x w_1 w_2...; what param_grads its backward got."""
    library = torch.library.Library("fastflow", "FRAGMENT")
    flags = []

    def forward(
        x: Tensor, weights: list, shift: None, scale: float, power: int, sure: bool
    ) -> tuple[Tensor, Tensor]:
        assert shift is None and power == 3 and sure is True
        h = torch.stack(weights).prod(0)
        return scale * x * h, h

    def backward(
        dy: Tensor, h: Tensor, weights: list, x: Tensor, scale: float, param_grads: bool
    ) -> tuple[Tensor, list[Tensor]]:
        flags.append(param_grads)
        return dy * scale * h, [dy * scale * x * h / w for w in weights] if param_grads else []

    def in_python(arguments: tuple, outputs: tuple, cotangents: tuple, wanted: tuple) -> list:
        x, weights, shift, scale, *_ = arguments
        assert len(wanted) == 1 + len(weights) and outputs[0] is None and shift is None
        y = scale * x * torch.stack(weights).prod(0)
        tensors = [t for t, want in zip((x, *weights), wanted) if want]
        found = iter(torch.autograd.grad(y, tensors, *cotangents, create_graph=True))
        return [next(found) if want else None for want in wanted]

    for schema in SCHEMAS:
        library.define(schema)
    library.impl("product_forward", forward, "CPU")
    library.impl("product_backward", backward, "CPU")
    monkeypatch.setattr(node, "_ops", dict(node._ops))
    node.define("product_forward", "product_backward", "BD * * * * *", in_python)
    yield flags
    library._destroy()


@needs_node
@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_tensors(product: list[bool], count: int) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        (y,) = node.run("product_forward", x, list(weights), None, 2.0, 3, True)
        return y

    torch.autograd.gradcheck(run, (x, *weights))
    torch.autograd.gradgradcheck(run, (x, *weights))
    assert node.run("product_forward", x, [[1.0]], None, 2.0, 3, True) is None
    assert node.run("product_forward", x, weights, None, 2.0, 3) is None  # one argument too few


@needs_node
def test_gradients_that_nobody_wants_are_not_computed(product: list[bool]) -> None:
    x, fixed, free = (torch.randn(4, 3, requires_grad=i != 1) for i in range(3))
    (y,) = node.run("product_forward", x, [fixed, free], None, 2.0, 3, True)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), free, retain_graph=True)
    assert product == [False, True]
    y.sum().backward()
    assert product == [False, True, True]
    assert fixed.grad is None and torch.allclose(free.grad, 2 * x * fixed)


LAYERS = [
    "layers_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, bool save) "
    "-> (Tensor y, Tensor h)",
    "layers_backward(Tensor dy, Tensor h, Tensor x, Tensor[] weights, int terms_grad, "
    "int biases_given, bool x_grad, bool param_grads) "
    "-> (Tensor dx, Tensor[] dterms, Tensor[] dweights, Tensor[] dbiases)",
]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """An op on a list of layers; what its passes were told to save and to compute."""
    library = torch.library.Library("fastflow", "FRAGMENT")
    told = []

    def forward(
        x: Tensor, terms: list, weights: list, biases: list, save: bool
    ) -> tuple[Tensor, Tensor]:
        assert all(tensor.shape == (0,) or tensor.numel() for tensor in (*terms, *biases))
        if len(weights) > 2:
            raise ValueError("three layers are too many")
        told.append((save,))
        return x * 1, x.new_ones(3)

    def backward(
        dy: Tensor, h: Tensor, x: Tensor, weights: list, *flags: object
    ) -> tuple[Tensor, list, list, list]:
        told.append(flags)
        filled = [torch.full_like(w, 2.0) for w in weights]
        extra = [dy.new_full((len(dy), len(w)), 9.0) for w in weights]  # terms or not
        return dy * 1, extra, filled, [torch.full_like(w[:, 0], 3.0) for w in weights]

    for schema in LAYERS:
        library.define(schema)
    library.impl("layers_forward", forward, "CPU")
    library.impl("layers_backward", backward, "CPU")
    monkeypatch.setattr(node, "_ops", dict(node._ops))
    node.define("layers_forward", "layers_backward", "Bn [Bn]? [nn'] [n]? *", None)
    yield told
    library._destroy()


def network_of(*widths: int) -> tuple[Tensor, list, list, list]:
    """x (4, n_0), terms, weights and biases of layers, none of them missing."""
    x = torch.randn(4, widths[0])
    weights = [torch.randn(n, m, requires_grad=True) for m, n in pairwise(widths)]
    biases = [torch.randn(n) for n in widths[1:]]
    return x, [torch.randn(4, n) for n in widths[1:]], weights, biases


@needs_node
def test_flags_tell_what_is_wanted_and_given(layers: list[tuple]) -> None:
    x, terms, weights, biases = network_of(3, 5, 2)
    (y,) = node.run("layers_forward", x, (), weights, [None, biases[1]], True)
    y.sum().backward()
    assert layers == [(True,), (0, 0b10, False, True)]
    assert all((w.grad == 2).all() for w in weights)
    terms[1].requires_grad_()
    x.requires_grad_()
    frozen = [w.detach() for w in weights]
    (y,) = node.run("layers_forward", x, terms, frozen, biases, False)
    y.sum().backward()
    assert layers[2:] == [(True,), (0b10, 0b11, True, False)]
    node.run("layers_forward", x.detach(), (), frozen, biases, True)
    with torch.no_grad():
        node.run("layers_forward", x, terms, weights, biases, True)
    assert layers[4:] == [(False,), (False,)]  # nothing to save where nothing is recorded


@needs_node
@pytest.mark.parametrize(
    ("place", "entries"),
    [
        (1, [torch.zeros(3, 5), None]),
        (1, [torch.zeros(4, 5)]),
        (2, []),
        (2, [None, torch.zeros(2, 5)]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 4)]),
        (2, [torch.zeros(5, 4), torch.zeros(2, 5)]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 5).double()]),
        (2, [torch.zeros(5, 3), torch.zeros(5, 2).T]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 5).as_subclass(Labelled)]),
        (2, torch.zeros(2, 5)),
        (3, [torch.zeros(5), torch.zeros(5)]),
        (3, [torch.zeros(5), torch.zeros(2, 1)]),
        (3, None),
    ],
    ids=["rows", "few", "none", "missing", "chain", "first", "dtypes", "strides", "subclass"]
    + ["tensor", "bias", "dimensions", "nothing"],
)
def test_lists_that_do_not_fit_are_declined(
    layers: list[tuple], place: int, entries: object
) -> None:
    arguments = list(network_of(3, 5, 2))
    assert node.run("layers_forward", *arguments, True) is not None
    arguments[place] = entries
    assert node.run("layers_forward", *arguments, True) is None and len(layers) == 1


@needs_node
def test_arguments_that_the_op_refuses_are_declined(layers: list[tuple]) -> None:
    assert node.run("layers_forward", *network_of(3, 5, 2, 4), True) is None


@needs_node
def test_schemas_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(RuntimeError, match="speaks of b, which is no argument or output"):
        node.define("planar_flow_backward", "planar_flow_inverse_backward", "*", None)
    with pytest.raises(RuntimeError, match="must have a word for every argument"):
        node.define("planar_flow_forward", "planar_flow_backward", "BD KD", None)
