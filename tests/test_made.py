"""masked_linear and made on every backend, and the MADE layer."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import Target, target_id, targets
from masked_oracle import ACTIVATIONS, Problem, problem
from torch.nn.utils import parametrize

import fastflow
from fastflow import MADE, masks
from fastflow.functional import autoregressive, autoregressive_inverse, made, masked_linear


@pytest.fixture(params=targets("made_forward"), ids=target_id)
def target(request: pytest.FixtureRequest) -> Target:
    with request.param.in_force():
        yield request.param


# features, hidden widths: no hidden layer, one feature, fewer units than degrees, odd sizes, wide
SIZES = [(1, (3,)), (4, ()), (5, (3,)), (6, (50, 50, 50)), (17, (33, 70)), (64, (130, 65))]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """Sums of at most 130 products of order one, a few layers deep."""
    return (
        {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    )


def compare(given: Problem, target: Target, dtype: torch.dtype, **options: bool) -> None:
    """Outputs and all gradients against the masked dense network in float64."""
    ours = given.to(target.device, dtype)
    exact = ours.to("cpu", torch.float64)
    exact = exact.to(torch.float64)
    y, want = made(ours.x, **ours.network, **options), exact.outputs()
    cotangent = torch.randn_like(want)
    grads = torch.autograd.grad(y, ours.leaves, cotangent.to(y))
    expected = torch.autograd.grad(want, exact.leaves, cotangent)
    for one, other in zip((y, *grads), (want, *expected)):
        scale = float(other.detach().abs().max()) + 1
        torch.testing.assert_close(one.cpu().double() / scale, other / scale, **tolerance(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize(("features", "hidden"), SIZES)
def test_outputs_and_gradients(
    target: Target, features: int, hidden: tuple[int, ...], context: bool, dtype: torch.dtype
) -> None:
    given = problem(target.rows, features, hidden, context=context, activation="tanh")
    compare(given, target, dtype)


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(target: Target, activation: str, residual: bool) -> None:
    hidden = (20,) * (5 if residual else 2)
    for dtype in (torch.float32, torch.float64):
        given = problem(target.rows, 5, hidden, activation=activation, residual=residual)
        compare(given, target, dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
def test_units_in_any_order_and_without_biases(target: Target, recompute: bool) -> None:
    given = problem(
        *(target.rows, 7, (19, 23)), sorted_units=False, biases=False, context=True, per_feature=3
    )
    compare(given, target, torch.float64, recompute=recompute)


@pytest.mark.parametrize("strict", [False, True])
def test_masked_linear(target: Target, strict: bool) -> None:
    in_degrees, out_degrees = torch.randint(0, 5, (13,)), torch.randint(0, 5, (9,))
    x, weight, bias = torch.randn(3, 4, 13), torch.randn(9, 13), torch.randn(9)
    seen = out_degrees[:, None] > in_degrees if strict else out_degrees[:, None] >= in_degrees
    want = x.double() @ (weight * seen).double().T + bias
    tensors = [tensor.to(target.device) for tensor in (x, weight, bias, in_degrees, out_degrees)]
    got = masked_linear(*tensors, strict=strict)
    torch.testing.assert_close(got.cpu(), want.float())


def test_masked_weights_do_not_leak(target: Target) -> None:
    """An inf or NaN in one changes no output, and its gradient is exactly zero."""
    given = problem(target.rows, 6, (21, 34), context=True).to(target.device, torch.float32)
    clean = made(given.x, **given.network)
    with torch.no_grad():
        for weight, seen in zip(given.weights, given.masks()):
            weight[~seen] = (
                torch.tensor([torch.inf, torch.nan])
                .to(weight)
                .repeat(int((~seen).sum()) // 2 + 1)[: int((~seen).sum())]
            )
    y = made(given.x, **given.network)
    assert torch.equal(y, clean)
    grads = torch.autograd.grad(y.square().sum(), [given.x, *given.weights])
    assert all(grad.isfinite().all() for grad in grads)
    assert all((grad[~seen] == 0).all() for grad, seen in zip(grads[1:], given.masks()))


def test_earlier_outputs_are_bitwise_unchanged(target: Target) -> None:
    given = problem(target.rows, 9, (40, 40)).to(target.device, torch.float32)
    y = made(given.x, **given.network)
    for feature in range(9):
        moved = given.x.detach().clone()
        moved[:, feature] += 1
        same = (made(moved, **given.network) == y).all(0).cpu()
        later = given.degrees[-1] > given.degrees[0][feature]
        assert same[~later].all() and (not later.any() or not same[later].all())


def test_rows_are_independent(target: Target) -> None:
    """A NaN stays in its row, and the other rows are bitwise what they were."""
    given = problem(target.rows, 5, (20, 20)).to(target.device, torch.float32)
    clean = made(given.x, **given.network)
    x = given.x.detach().clone()
    x[2] = torch.nan
    y = made(x, **given.network)
    others = torch.arange(target.rows) != 2
    assert torch.equal(y[others], clean[others]) and y[2].isnan().any()


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_gradcheck(target: Target, residual: bool) -> None:
    features, width = (2, 3) if target.slow else (3, 6)
    hidden = (width,) * 3
    given = problem(features, features, hidden, context=True, activation="tanh", residual=residual)
    given = given.to(target.device, torch.float64)

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        layers = len(given.weights)
        x, lists = leaves[0], leaves[1:]
        terms = [lists[2 * layers], *[None] * (layers - 1)]
        network = given.network | {
            "weights": lists[:layers],
            "biases": lists[layers : 2 * layers],
            "terms": terms,
        }
        return made(x, **network)

    assert torch.autograd.gradcheck(function, given.leaves, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(function, given.leaves, nondet_tol=0.0)


def test_batches_broadcast_and_may_be_empty(target: Target) -> None:
    net = MADE(4, 3, (16,), context_features=2).to(target.device)
    x, context = torch.randn(5, 1, 4, device=target.device), torch.randn(7, 2, device=target.device)
    y = net(x, context)
    assert y.shape == (5, 7, 4, 3)
    torch.testing.assert_close(y[2, 3], net(x[2, 0], context[3]))
    torch.testing.assert_close(net(x, context[3])[:, 0], y[:, 3])  # one context for all points
    assert net(x[:0], context).shape == (0, 7, 4, 3)
    net(x[:0], context).sum().backward()
    assert all((p.grad == 0).all() for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(target: Target, dtype: torch.dtype) -> None:
    given = problem(target.rows, 5, (32, 32)).to(target.device, dtype)
    got = made(given.x, **given.network)
    want = given.to(target.device, torch.float32)
    assert got.dtype == dtype
    assert torch.equal(got, made(want.x, **want.network).to(dtype))


def test_strides_do_not_matter(target: Target) -> None:
    given = problem(target.rows, 6, (20,)).to(target.device, torch.float32)
    wide = torch.stack([given.x.detach()] * 2, -1)
    weights = [weight.detach().T.contiguous().T for weight in given.weights]
    again = made(wide[..., 0], **(given.network | {"weights": weights}))
    assert torch.equal(again, made(given.x, **given.network))


def test_context_reaches_every_output() -> None:
    net = MADE(4, 2, (16, 16), context_features=3)
    context = torch.randn(1, 3, requires_grad=True)
    y = net(torch.randn(1, 4), context)
    for feature in range(4):
        (grad,) = torch.autograd.grad(y[:, feature].sum(), context, retain_graph=True)
        assert (grad != 0).any(), feature


@pytest.mark.parametrize("order", [None, "reverse", "random", [2, 0, 3, 1]])
def test_jacobian_is_triangular_in_the_order(order: object) -> None:
    net = MADE(4, 1, (32, 32), order=order)
    jacobian = torch.autograd.functional.jacobian(net, torch.randn(4))[:, 0]
    ranks = net.order
    seen = ranks[:, None] > ranks
    assert (jacobian[~seen] == 0).all() and (jacobian[seen] != 0).all()


def test_too_narrow_layers_warn_with_names() -> None:
    with pytest.warns(
        UserWarning, match="hidden layer 1 has 3 units for 7 degrees.*feature 6, 5, 3, 2 in"
    ):
        MADE(8, 2, (16, 3), order="reverse")
    with pytest.warns(UserWarning, match="2 degrees: the context does not reach the first feature"):
        MADE(2, 2, (1,), context_features=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MADE(8, 2, (7, 16))
        MADE(8, 2, (8, 16), context_features=1)
        MADE(1, 2, (4,))


@pytest.mark.parametrize("place", range(2))
def test_an_empty_tensor_is_no_bias_and_no_term(target: Target, place: int) -> None:
    """None says that there is none; a tensor of shape (0,) is a mistake."""
    given = problem(3, 4, (6,)).to(target.device)
    empty, rest = given.x.new_empty(0), {"weights": given.weights, "stairs": given.stairs}
    degrees = torch.tensor([1, 2, 3])
    some = [empty if i == place else None for i in range(2)]
    for name, form in (("biases", r"\(\d+,\)"), ("terms", r"\(\*batch, \d+\)")):
        for op in (made, autoregressive, autoregressive_inverse):
            message = rf"{name}\[{place}\] has shape \(0,\), must be {form} or None"
            with pytest.raises(ValueError, match=f"{op.__name__}: {message}"):
                op(given.x, **{"biases": None, **rest, name: some})
    x, weight = torch.ones(3, device=target.device), torch.ones(3, 3, device=target.device)
    with pytest.raises(ValueError, match=r"masked_linear: bias has shape \(0,\), must be \(3,\)"):
        masked_linear(x, weight, empty, degrees, degrees)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MADE(8, 2, (3, 3)),
        lambda: MADE(4, 2, (1, 1), adjacency=torch.ones(4, 4).tril(-1).bool()),
        lambda: fastflow.MaskedAffineAutoregressive(8, (3, 3)),
        lambda: fastflow.MAF(8, 5, (3, 3)),
        lambda: fastflow.IAF(8, 5, (3, 3), context_features=2, order="random"),
        lambda: fastflow.Inverse(fastflow.MAF(8, 3, (3,)).bijection),
    ],
)
def test_they_warn_once_at_the_users_line(make: Callable) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            make()
    assert [(one.filename, one.lineno) for one in caught] == [
        (__file__, make.__code__.co_firstlineno)
    ] * 2


def test_state_dict_brings_the_order(target: Target) -> None:
    net, other = MADE(6, 2, (20,), order="random"), MADE(6, 2, (20,))
    assert set(net.state_dict()) >= {"order", "layers.0.weight", "layers.1.bias"}
    other.load_state_dict(net.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(
        net.to(target.device)(x.to(target.device)), other.to(target.device)(x.to(target.device))
    )
    with pytest.raises(RuntimeError, match=r"must hold each of 0 \.\. 5 once"):
        other.load_state_dict(net.state_dict() | {"order": torch.zeros(6, dtype=torch.int64)})


def test_copies_and_meta_device() -> None:
    net = MADE(5, 2, (20,), context_features=2, order="random")
    x, context = torch.randn(3, 5), torch.randn(3, 2)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x, context), net(x, context))
    with torch.device("meta"):
        late = MADE(5, 2, (20,), context_features=2)
    assert late(x.to("meta"), context.to("meta")).shape == (3, 5, 2)
    late.to_empty(device="cpu").load_state_dict(net.state_dict())
    assert torch.equal(late(x, context), net(x, context))
    late.reset_parameters()
    assert late.order.tolist() == net.order.tolist()
    assert torch.equal(late.stairs, masks.staircase(late.degrees()))


def test_parameters_may_be_replaced_after_construction(target: Target) -> None:
    """By another Parameter, a parametrization, a shared one, or for one call."""
    net, twin = (MADE(4, 2, (8, 8)).to(target.device) for _ in range(2))
    x = torch.randn(3, 4, device=target.device)
    assert not torch.equal(net(x), twin(x))
    swapped = torch.func.functional_call(net, dict(twin.named_parameters()), (x,))
    assert torch.equal(swapped, twin(x))
    for layer, other in zip(net.layers, twin.layers):
        layer.weight = torch.nn.Parameter(other.weight.detach().clone())
        layer.bias = other.bias
    assert torch.equal(net(x), twin(x))
    with torch.no_grad():
        twin.layers[2].bias += 1
    y = net(x)
    assert torch.equal(y, twin(x))
    y.sum().backward()
    assert twin.layers[0].bias.grad is not None and twin.layers[0].weight.grad is None
    parametrize.register_parametrization(net.layers[1], "weight", Doubled())
    with torch.no_grad():
        twin.layers[1].weight *= 2
    y = net(x)
    assert torch.equal(y, twin(x))
    original = net.layers[1].parametrizations.weight.original
    (grad,) = torch.autograd.grad(y.sum(), original)
    (want,) = torch.autograd.grad(twin(x).sum(), twin.layers[1].weight)
    assert torch.equal(grad, 2 * want)


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"features": 0}, "features is 0, must be at least 1"),
        ({"hidden_features": 64}, "hidden_features is 64, must be a sequence"),
        ({"hidden_features": (8, 0)}, "hidden_features is 0, must be at least 1"),
        ({"activation": "sine"}, "activation is 'sine', must be one of relu"),
        ({"order": [0, 0, 1]}, "order is .*must hold each"),
        (
            {"hidden_features": (8, 9), "residual": True},
            "hidden_features is .* must be an even number of equal",
        ),
        ({"context_features": -1}, "context_features is -1"),
    ],
)
def test_bad_constructions(arguments: dict, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"MADE: {error}"):
        MADE(**({"features": 3, "params_per_feature": 2} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"x": torch.zeros(3, 5)}, r"weights\[0\] has shape \(8, 4\), must be \(units, 5\)"),
        ({"x": [1.0]}, "x is a list"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"weights": []}, "weights is empty"),
        ({"biases": [None]}, "biases has 1 entries, weights has 2"),
        ({"biases": [torch.zeros(3), None]}, r"biases\[0\] has shape \(3,\), must be \(8,\)"),
        ({"terms": [torch.zeros(2, 8), None]}, "the batches of x .* do not broadcast"),
        ({"stairs": torch.zeros(3)}, "stairs must be the int32 tensor"),
        (
            {"stairs": torch.zeros(3, dtype=torch.int32)},
            r"stairs has shape \(3,\), must be \(28,\)",
        ),
        ({"activation": "sine"}, "activation is 'sine'"),
        ({"residual": True}, "residual needs an odd number of hidden layers"),
        ({"weights": [None]}, r"weights\[0\] is None, must be a torch.Tensor"),
        ({"weights": torch.zeros(3, 3)}, "weights is a Tensor, must be a sequence"),
    ],
)
def test_bad_calls(arguments: dict, error: str) -> None:
    given = problem(3, 4, (8,), per_feature=1)
    if "residual" in arguments:
        given = problem(3, 4, (8, 8), per_feature=1)
    with pytest.raises((TypeError, ValueError), match=f"made: {error}"):
        made(**({"x": given.x, **given.network} | arguments))


@pytest.mark.parametrize("last", [[2, 1, 2, 1], [2, 2, 2, 2]], ids=str)
def test_blocks_add_units_of_the_same_degrees(target: Target, last: list[int]) -> None:
    """Kernels add sorted units to sorted units, the reference unit to unit."""
    x, hidden = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 1, 2])
    stairs = masks.staircase([x, hidden, hidden, torch.tensor(last), x.repeat_interleave(2)])
    shapes = [(4, 3), (4, 4), (4, 4), (6, 4)]
    weights = [torch.randn(shape, device=target.device) for shape in shapes]
    network = (torch.randn(5, 3, device=target.device), weights, None, stairs.to(target.device))
    ops = [autoregressive, autoregressive_inverse] + [made] * (last[0] != last[1])
    for op in ops:
        with pytest.raises(ValueError, match=f"{op.__name__}: .* level 3 depend on other features"):
            op(*network, residual=True)
