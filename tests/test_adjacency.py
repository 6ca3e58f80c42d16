"""Networks whose features see what a matrix says, which no order of them can."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

import fastflow
from fastflow import MADE, MaskedAffineAutoregressive, masks
from fastflow.functional import autoregressive, autoregressive_inverse
from fastflow.reference import network

# two branches from feature 3: 1 and then 0; 2 by itself
TREE = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()


def layer(hidden: tuple[int, ...] = (9, 7), **options: object) -> MaskedAffineAutoregressive:
    made = MaskedAffineAutoregressive(4, hidden, activation="tanh", adjacency=TREE, **options)
    return made.double()


def test_masks_in_the_function() -> None:
    """An adjacency matrix of which no degrees are: its zeros are the Jacobian's, and it inverts."""
    adjacency = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    given = masks.adjacency_masks(adjacency, (9, 7), 2)
    weights = [torch.randn(mask.shape, dtype=torch.float64, requires_grad=True) for mask in given]
    x = torch.randn(5, 4, dtype=torch.float64)
    y, ladj = autoregressive(x, weights, None, given, activation="tanh")
    jacobian = torch.autograd.functional.jacobian(
        lambda v: autoregressive(v, weights, None, given, activation="tanh")[0], x[0]
    )
    assert torch.equal(jacobian != 0, adjacency | torch.eye(4).bool())
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(jacobian)[1])
    back, inverse_ladj = autoregressive_inverse(y, weights, None, given, activation="tanh")
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)
    for weight, mask in zip(torch.autograd.grad(back.square().sum(), weights), given):
        assert weight.isfinite().all() and (weight[~mask] == 0).all()
    circle = [torch.ones_like(mask) for mask in given]
    for op in (autoregressive, autoregressive_inverse):
        with pytest.raises(ValueError, match=f"{op.__name__}: stairs is not .* has a circle"):
            op(x, weights, None, circle)
    with pytest.raises(ValueError, match=r"stairs\[0\] has shape \(9, 3\) on cpu, must be"):
        autoregressive(x, weights, None, [given[0][:, :3], *given[1:]])


def test_masks_that_are_no_staircase_are_for_the_reference() -> None:
    given = [torch.tensor([[0, 0], [0, 0], [1, 0], [1, 0]]).bool()]
    with fastflow.use_backend("reference"):
        autoregressive(torch.zeros(3, 2), [torch.zeros(4, 2)], None, given)
    for name in set(fastflow.backends.available("cpu")) - {"reference"}:
        with pytest.raises(RuntimeError, match=f"backend {name} needs masks that are a staircase"):
            with fastflow.use_backend(name):
                autoregressive(torch.zeros(3, 2), [torch.zeros(4, 2)], None, given)


@pytest.mark.parametrize("options", [{}, {"context_features": 2}, {"residual": True}], ids=str)
def test_the_jacobian_is_that_of_the_matrix(options: dict) -> None:
    flow = layer((8, 8), **options)
    x = torch.randn(4, dtype=torch.float64)
    context = torch.randn(2, dtype=torch.float64) if flow.context_features else None
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v, context)[0], x)
    assert torch.equal(jacobian != 0, TREE | torch.eye(4).bool())
    y, ladj = flow(x, context)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian)[1])
    back, inverse_ladj = flow.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_ladj, -ladj)


def test_the_context_reaches_every_output() -> None:
    net = MADE(4, 2, (9, 9), context_features=3, activation="tanh", adjacency=TREE)
    context = torch.randn(3)
    jacobian = torch.autograd.functional.jacobian(lambda c: net(torch.zeros(4), c), context)
    assert (jacobian != 0).all()


def test_the_inverse_takes_as_many_passes_as_the_longest_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes, forward = 0, network.forward

    def counting(*args: object) -> list[torch.Tensor]:
        nonlocal passes
        passes += 1
        return forward(*args)

    monkeypatch.setattr(network, "forward", counting)
    layer().inverse(torch.randn(5, 4, dtype=torch.float64))
    assert passes == masks.depth(TREE) == 3


@pytest.mark.parametrize("middle", [(), (0,), (0, 1), (2,)], ids=str)
def test_residual_blocks_without_units_of_some_sets(middle: tuple[int, ...]) -> None:
    """What a block adds to itself is seen, though the level within it sees less."""
    first, *_, last = masks.adjacency_masks(TREE, (6, 6, 6), 2)
    none = torch.zeros(6, 6, dtype=torch.bool)
    inner = none.clone()
    inner[list(middle)] = masks.adjacency_masks(TREE, (6, 6), 2)[1][list(middle)]
    given = [first, inner, none, last]
    weights = [torch.randn(mask.shape, dtype=torch.float64) for mask in given]
    x = torch.randn(5, 4, dtype=torch.float64)
    y, _ = autoregressive(x, weights, None, given, residual=True)
    torch.testing.assert_close(autoregressive_inverse(y, weights, None, given, residual=True)[0], x)


@pytest.mark.parametrize("op", [autoregressive, autoregressive_inverse])
def test_gradients(op: object) -> None:
    given = masks.adjacency_masks(TREE, (5,), 2, context=True)
    x, term = torch.randn(3, 4), torch.randn(3, 5)
    leaves = [x, term, *(torch.randn(mask.shape) for mask in given)]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]

    def function(x: torch.Tensor, term: torch.Tensor, *weights: torch.Tensor) -> object:
        return op(x, weights, None, given, [term, None], activation="tanh")

    assert torch.autograd.gradcheck(function, leaves)
    for weight, mask in zip(torch.autograd.grad(function(*leaves)[0].sum(), leaves[2:]), given):
        assert (weight[~mask] == 0).all()


def test_the_masks_follow_the_layer() -> None:
    flow = layer()
    x = torch.randn(5, 4, dtype=torch.float64)
    chain = torch.ones(4, 4).tril(-1).bool()
    other = MaskedAffineAutoregressive(4, (9, 7), activation="tanh", adjacency=chain).double()
    assert set(flow.state_dict()) - {name for name, _ in flow.named_parameters()} == {
        "network.adjacency"
    }
    other.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow)), other):
        assert torch.equal(twin(x)[0], flow(x)[0])
        assert torch.equal(twin.inverse(x)[0], flow.inverse(x)[0])
    assert all(mask.is_meta for mask in copy.deepcopy(flow).to("meta").network.masks())
    with torch.device("meta"):
        late = layer()
    late.to_empty(device="cpu").network.reset_parameters()
    assert torch.equal(late.network.adjacency, TREE)
    assert all(map(torch.equal, late.network.masks(), flow.network.masks()))
    late.load_state_dict(flow.state_dict(), assign=True)
    assert torch.equal(late.inverse(x)[0], flow.inverse(x)[0])
    with pytest.raises(RuntimeError, match=r"MADE: adjacency .* depend on themselves"):
        flow.load_state_dict(
            flow.state_dict() | {"network.adjacency": TREE | TREE[:, [1, 0, 2, 3]]}
        )


def test_too_narrow_layers_warn_with_names() -> None:
    with pytest.warns(UserWarning, match=r"\(1,\) are too narrow .* feature 0 does not see 1"):
        MADE(4, 2, (1,), adjacency=TREE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MADE(4, 2, (2,), adjacency=TREE)  # two sets, {1} and {3}
        MADE(4, 2, (), adjacency=TREE)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"order": "reverse"}, "order and adjacency are both given"),
        ({"adjacency": TREE.tolist()}, "adjacency is a list, must be a torch.Tensor"),
        ({"adjacency": TREE.int()}, r"type torch.int32, must be \(4, 4\) and torch.bool"),
        ({"adjacency": TREE[:3, :3]}, r"shape \(3, 3\)"),
        ({"adjacency": TREE | torch.eye(4).bool()}, r"features \[0, 1, 2, 3\] that they depend"),
        ({"adjacency": TREE | TREE.T}, r"a circle among the features \[0, 1, 2, 3\]"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"MADE: .*{error}"):
        MaskedAffineAutoregressive(4, **({"adjacency": TREE} | arguments))
    with pytest.raises(TypeError, match="has no degrees"):
        MADE(4, 2, adjacency=TREE).degrees()


def test_masks_of_an_adjacency() -> None:
    """The network connects a feature to those that the matrix names, and to no other."""
    adjacency = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    for hidden in ((), (6,), (7, 5, 9)):
        reach = torch.eye(4)
        for mask in masks.adjacency_masks(adjacency, hidden, 2):
            reach = mask.float() @ reach
        assert torch.equal(reach.bool(), adjacency.repeat_interleave(2, 0))
    assert masks.depth(adjacency) == 3
    assert masks.depth(torch.ones(5, 5).tril(-1).bool()) == 5


def test_some_units_are_left_to_the_context() -> None:
    adjacency = torch.ones(3, 3).tril(-1).bool()
    first, last = masks.adjacency_masks(adjacency, (6,), 1, context=True)
    alone = ~first.any(1)
    assert alone.any() and last[:, alone].all()


@pytest.mark.parametrize(
    ("adjacency", "error"),
    [
        (torch.eye(3).bool(), r"circle among the features \[0, 1, 2\]"),
        (torch.tensor([[0, 1], [1, 0]]).bool(), r"circle among the features \[0, 1\]"),
        (torch.ones(2, 3).bool(), r"shape \(2, 3\)"),
        (torch.zeros(2, 2), "type torch.float32"),
    ],
)
def test_bad_adjacency(adjacency: torch.Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        masks.depth(adjacency)
