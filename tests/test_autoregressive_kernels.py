"""The CPU ops made and autoregressive, parallel direction, against plain PyTorch in float64."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from masked_case import ACTIVATIONS, OPS, SCALES, Case, flatten
from torch import Tensor

from fastflow import native

if reason := native.probe("cpp"):
    pytest.skip(reason, allow_module_level=True)


def assert_agrees(case: Case) -> None:
    """Values and gradients equal those of float64, or in float32 err at most twice as PyTorch.

    The gradient of a parameter is a sum over rows that may cancel: its error is measured against
    the sum of the sizes of its parts, which are the gradients of 16 parts of the batch.
    """
    outputs, leaves = case.reference()
    cotangents = case.cotangents(outputs)
    wanted = [tensor.to(torch.float64) for tensor in cotangents]
    sizes: list = [0.0] * len(leaves)
    for part in torch.arange(case.batch).chunk(16):
        some = [torch.zeros_like(cotangent) for cotangent in wanted]
        for to, cotangent in zip(some, wanted, strict=True):
            to[part] = cotangent[part]
        parts = torch.autograd.grad(outputs, leaves, some, retain_graph=True, allow_unused=True)
        sizes = [a if b is None else a + b.abs() for a, b in zip(sizes, parts, strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, wanted, allow_unused=True)
    *values, saved = case.forward()
    found = flatten(case.backward(cotangents, saved))
    # Missing terms come back as empty tensors, the reference has no leaf for an empty list.
    found = [*values, *found[: len(leaves)]]
    exact = [*outputs, *gradients]
    plain = exact
    if case.dtype == torch.float32:
        outputs, leaves = case.reference(torch.float32)
        plain = [
            *outputs,
            *torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True),
        ]
    sizes = [*(output.abs() for output in outputs), *sizes]
    for index, (got, want, other) in enumerate(zip(found, exact, plain, strict=True)):
        if want is None or not want.numel():
            assert not got.numel()
            continue
        assert got.dtype == case.dtype and got.shape == want.shape
        size = sizes[index].max().clamp_min(1e-30)
        error = (got.double() - want).abs().max() / size
        # Sums of different order differ by a few units of the largest element.
        bound = 1e-13 if case.dtype == torch.float64 else 2 * (other - want).abs().max() / size
        floor = 8 * torch.finfo(case.dtype).eps
        assert error <= max(bound, floor), (case, index, float(error), float(bound))


SIZES = [
    (1, 1),
    (3, 7),
    (1, 5, 2),
    (5, 1, 1, 10),
    (6, 50, 50, 50, 12),
    (17, 33, 65, 34),
    (130, 261, 67),
]


@pytest.mark.parametrize("batch", [1, 3, 16, 67, 200, 1100])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("sorted", [False, True], ids=["unsorted", "sorted"])
def test_made_agrees_with_pytorch(batch: int, sizes: tuple[int, ...], sorted: bool) -> None:
    assert_agrees(Case(batch, sizes, sorted=sorted))
    assert_agrees(Case(batch, sizes, sorted=sorted, terms="none", dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype) -> None:
    assert_agrees(Case(37, (9, 40, 31, 18), activation, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layers", [1, 3, 5])
def test_residual(layers: int, dtype: torch.dtype) -> None:
    sizes = (5, *[44] * layers, 10)
    assert_agrees(Case(70, sizes, residual=True, dtype=dtype))
    assert_agrees(Case(70, sizes, "relu", residual=True, scale="gate", dtype=dtype, sorted=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 2), (1, 9, 2), (7, 30, 25, 14), (150, 70, 300)], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_scale_maps(scale: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_agrees(Case(75, sizes, scale=scale, dtype=dtype, seed=1))


@pytest.mark.parametrize("scale", [None, "gate"])
def test_flags_leave_out_what_is_not_wanted(scale: str | None) -> None:
    case = Case(90, (6, 20, 12), scale=scale)
    *outputs, saved = case.forward()
    cotangents = case.cotangents(outputs)
    full = flatten(case.backward(cotangents, saved))
    for x_grad in (False, True):
        for param_grads in (False, True):
            part = case.backward(cotangents, saved, x_grad, param_grads)
            kept = [x_grad] + [param_grads] * 4 + [True] * 2
            for got, want, keep in zip(flatten(part), full, kept, strict=True):
                assert torch.equal(got, want if keep else want.new_empty(0))
    assert not case.forward(save=False)[-1].numel()
    for got, want in zip(case.forward(save=False)[:-1], outputs, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    case = Case(1500, (20, 70, 70, 40), scale="softclip", dtype=dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            *outputs, saved = case.forward()
            results.append([*outputs, *flatten(case.backward(case.cotangents(outputs), saved))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_does_not_depend_on_its_batch(activation: str, dtype: torch.dtype) -> None:
    whole = Case(700, (20, 70, 70, 40), activation, scale="softplus", dtype=dtype)
    *outputs, saved = whole.forward()
    cotangents = whole.cotangents(outputs)
    dx, dterms, *_ = whole.backward(cotangents, saved)
    for rows in (slice(0, 1), slice(3, 6), slice(40, 57), slice(100, 101), slice(333, 600)):
        part = Case(700, (20, 70, 70, 40), activation, scale="softplus", dtype=dtype)
        part.x = whole.x[rows]
        part.term_list = [t[rows].contiguous() if t.numel() else t for t in whole.term_list]
        *found, saved = part.forward()
        part_dx, part_dterms, *_ = part.backward([c[rows] for c in cotangents], saved)
        for got, want in zip([*found, part_dx, *part_dterms], [*outputs, dx, *dterms], strict=True):
            assert torch.equal(got, want[rows]) or not want.numel()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_row_stays_alone(poison: float) -> None:
    good = Case(50, (6, 20, 20, 12), scale="gate")
    bad = Case(50, (6, 20, 20, 12), scale="gate")
    bad.x[17, 2] = poison
    rest = torch.arange(50) != 17
    for case in (good, bad):
        *outputs, saved = case.forward()
        dx, dterms, *_ = case.backward(good.cotangents(outputs), saved)
        case.results = [*outputs, dx, *(t for t in dterms if t.numel())]
    for got, want in zip(bad.results, good.results, strict=True):
        assert torch.equal(got[rest], want[rest])
        assert not torch.equal(got[17], want[17])


def test_outputs_see_nothing_beyond_their_prefix() -> None:
    case = Case(40, (12, 50, 50, 24))
    reach = [torch.arange(12)]  # per sorted unit, how many sorted features it depends on
    for prefix in case.prefixes:
        last = torch.cat([torch.zeros(1, dtype=torch.long), reach[-1] + (len(reach) == 1)])
        reach.append(last.cummax(0).values[prefix])
    y, _ = case.forward()
    for rank in range(12):
        moved = case.x.clone()
        moved[:, case.orders[0][rank]] = math.nan
        changed, _ = case.forward(moved)
        blind = case.orders[-1][reach[-1] <= rank]
        assert torch.equal(changed[:, blind], y[:, blind])


def test_masked_weights_get_exactly_no_gradient() -> None:
    case = Case(80, (9, 30, 30, 18), scale="softplus")
    *outputs, saved = case.forward()
    _, _, dweights, _ = case.backward(case.cotangents(outputs), saved)
    for mask, dweight in zip(case.masks, dweights, strict=True):
        assert (dweight[~mask] == 0).all() and dweight.isfinite().all()


# Value and slope, and the size of the slope's terms where they cancel.
EXACT = {
    "relu": lambda v: (max(v, 0), mpmath.mpf(v > 0)),
    "tanh": lambda v: (mpmath.tanh(v), mpmath.sech(v) ** 2),
    "elu": lambda v: (v if v > 0 else mpmath.expm1(v), 1 if v > 0 else mpmath.exp(v)),
    "silu": lambda v: (
        v / (1 + mpmath.exp(-v)),
        (1 + v / (1 + mpmath.exp(v))) / (1 + mpmath.exp(-v)),
        (1 + abs(v) / (1 + mpmath.exp(v))) / (1 + mpmath.exp(-v)),
    ),
    "gelu": lambda v: (
        v * mpmath.ncdf(v),
        mpmath.ncdf(v) + v * mpmath.npdf(v),
        mpmath.ncdf(v) + abs(v) * mpmath.npdf(v),
    ),
    "softplus": lambda v: (mpmath.log1p(mpmath.exp(v)), 1 / (1 + mpmath.exp(-v))),
    "leaky_relu": lambda v: (v if v > 0 else v / 100, 1 if v > 0 else mpmath.mpf(1) / 100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_right_to_a_few_ulp(activation: str, dtype: torch.dtype) -> None:
    """A 1-1-1 network with unit weights is the activation itself, and dx its slope."""
    random = torch.Generator().manual_seed(3)
    points = torch.cat(
        [
            torch.randn(400, generator=random, dtype=torch.float64) * 3,
            torch.randn(100, generator=random, dtype=torch.float64) * 1e-6,
            torch.randn(100, generator=random, dtype=torch.float64) * 30,
        ]
    ).to(dtype)
    weights = [torch.ones(1, 1, dtype=dtype)] * 2
    biases = [torch.zeros(0, dtype=dtype)] * 2
    stairs = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32)
    kind = list(ACTIVATIONS).index(activation)
    y, saved = OPS.made_forward(points[:, None], [], weights, biases, stairs, kind, False, True)
    dx, *_ = OPS.made_backward(
        torch.ones_like(y), points[:, None], saved, weights, stairs, kind, False, 0, 0, True, False
    )
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    worst = [0.0, 0.0]
    with mpmath.workdps(40):
        for v, value, slope in zip(
            points.tolist(), y[:, 0].tolist(), dx[:, 0].tolist(), strict=True
        ):
            exact = EXACT[activation](mpmath.mpf(v))
            sizes = abs(exact[0]), abs(exact[-1])
            for i, got in enumerate((value, slope)):
                error = abs(got - exact[i]) / max(sizes[i], tiny / eps)
                worst[i] = max(worst[i], float(error / eps))
    assert worst[0] <= 4 and worst[1] <= 6, worst


def test_wrong_calls_are_refused() -> None:
    case = Case(4, (3, 8, 6), scale="gate")
    x, rest = case.x, (case.term_list, case.weights, case.biases)
    stairs, *constants = case.constants

    def call(stairs: Tensor = stairs, constants: list = constants, x: Tensor = x) -> None:
        OPS.autoregressive_forward(x, *rest, stairs, *constants, True)

    call()
    short, negative, repeated = stairs[:-1], stairs.clone(), stairs.clone()
    negative[-1] = 9
    repeated[0] = repeated[1]
    for bad, message in (
        (short, "wrong length"),
        (negative, "prefixes"),
        (repeated, "permutation"),
        (stairs.long(), "int32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(bad)
    with pytest.raises(RuntimeError, match="activation"):
        call(constants=[9, *constants[1:]])
    with pytest.raises(RuntimeError, match="scale"):
        call(constants=[*constants[:2], 5, *constants[3:]])
    with pytest.raises(RuntimeError, match="dtype"):
        call(x=x.float())
