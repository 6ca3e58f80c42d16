"""The Triton kernels of masked networks: both ways of launching them, and what they skip.

A small network is one launch, a wide one a launch for every layer; here both serve the same small
problems, since kernels run in Triton's interpreter where there is no GPU (conftest.py).
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from masked_oracle import ACTIVATIONS, problem
from oracle import assert_as_good
from torch import Tensor

from fastflow import kernels, masks
from fastflow.reference import autoregressive as step_reference
from fastflow.reference import made as reference

if kernels.probe() is not None:
    pytest.skip(kernels.probe(), allow_module_level=True)

import triton
import triton.language as tl
from test_kernels import Fenced

from fastflow.kernels import (
    activations,
    autoregressive,
    launch,
    made,
    masked_layers,
    masked_network,
    masked_weights,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
TANH = list(ACTIVATIONS).index("tanh")
STEP = (0, -6.9, 0.0)  # softclip
# rows, features, hidden: single ones, odd ones, several tiles of rows, units and columns
SHAPES = [(1, 1, (1,)), (3, 4, ()), (5, 3, (7,)), (17, 5, (40, 33)), (3, 18, (70,))]


@pytest.fixture(params=[True, False], ids=["network", "layers"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers in one launch, or one after the other."""
    monkeypatch.setattr(masked_network, "is_small", lambda widths: request.param)


class Inputs:
    """The arguments of the ops for one problem of `masked_oracle`."""

    def __init__(self, *sizes: object, dtype: torch.dtype = torch.float32, **options: object):
        given = problem(*sizes, **options).to(DEVICE, dtype)
        none = given.x.detach().new_empty(0)
        lists = (given.terms or [], given.weights, given.biases)
        self.x, self.stairs, self.residual = given.x.detach(), given.stairs, given.residual
        self.terms, self.weights, self.biases = (
            [none if tensor is None else tensor.detach() for tensor in tensors] for tensors in lists
        )
        self.masks = given.masks()

    def to(self, kind: torch.dtype) -> Inputs:
        other = object.__new__(Inputs)
        other.__dict__ = self.__dict__ | {"x": self.x.to(kind)}
        for name in ("terms", "weights", "biases"):
            setattr(other, name, [tensor.to(kind) for tensor in getattr(self, name)])
        return other

    @property
    def bits(self) -> tuple[int, int]:
        """terms_grad and biases_given."""
        lists = (self.terms, self.biases)
        return tuple(sum((t.numel() > 0) << i for i, t in enumerate(tensors)) for tensors in lists)


def ramp(like: Tensor) -> Tensor:
    return torch.linspace(-1, 2, like.numel()).to(like).view_as(like)


def named(dx: Tensor, terms: list[Tensor], weights: list[Tensor], biases: list[Tensor]) -> dict:
    lists = {"dterm": terms, "dw": weights, "db": biases}
    found = {f"{name}{i}": t for name, tensors in lists.items() for i, t in enumerate(tensors, 1)}
    return {"dx": dx} | found


def run_made(module: object, given: Inputs, wanted: tuple = (True, True), act: int = TANH) -> dict:
    """Everything that made and its backward return, with a fixed cotangent."""
    setting = given.stairs, act, given.residual
    y, saved = module.made_forward(
        given.x, given.terms, given.weights, given.biases, *setting, True
    )
    grads = module.made_backward(
        ramp(y), given.x, saved, given.weights, *setting, *given.bits, *wanted
    )
    return {"y": y} | named(*grads)


def run_step(module: object, given: Inputs, wanted: tuple = (True, True)) -> dict:
    """Likewise for the affine autoregressive layer."""
    setting = given.stairs, TANH, given.residual, *STEP
    y, ladj, saved = module.autoregressive_forward(
        given.x, given.terms, given.weights, given.biases, *setting, True
    )
    grads = module.autoregressive_backward(
        *(ramp(y), -ramp(ladj), given.x, saved, given.weights, *setting, *given.bits, *wanted)
    )
    return {"y": y, "ladj": ladj} | named(*grads)


def run_inverse(module: object, given: Inputs) -> dict:
    """Likewise for its inverse."""
    setting = given.stairs, TANH, given.residual, *STEP
    x, ladj, saved = module.autoregressive_inverse(
        given.x, given.terms, given.weights, given.biases, *setting, True
    )
    grads = module.autoregressive_inverse_backward(
        *(ramp(x), -ramp(ladj), x, saved, given.weights, *setting, *given.bits, True, True)
    )
    return {"x": x, "ladj": ladj} | named(*grads)


def assert_matches(given: Inputs) -> None:
    """As good as the reference in the same type, both measured by the reference in float64."""
    for run, ours, theirs in (
        (run_made, made, reference),
        (run_step, autoregressive, step_reference),
    ):
        exact, plain = run(theirs, given.to(torch.float64)), run(theirs, given)
        for name, actual in run(ours, given).items():
            assert actual.is_contiguous() and actual.shape == plain[name].shape
            if actual.numel():
                assert_as_good(actual, plain[name], exact[name], name)


@pytest.mark.parametrize(("B", "D", "hidden"), SHAPES)
def test_matches_the_reference(B: int, D: int, hidden: tuple[int, ...]) -> None:
    assert_matches(Inputs(B, D, hidden, context=True))
    assert_matches(Inputs(B, D, hidden, order=None, dtype=torch.float64, biases=False))


def test_residual_blocks_and_units_in_any_order() -> None:
    assert_matches(Inputs(3, 4, (20,) * 5, residual=True, sorted_units=False, context=True))


def test_batches_in_several_chunks() -> None:
    """The gradients of weights are sums over chunks, the last of which is short."""
    B, widths = 300, (2, 3, 4)
    options = masked_weights.weight_options(torch.float32)
    chunks, chunk = masked_weights.weight_chunks(B, widths, options)
    assert chunks > 1 and B % chunk
    assert_matches(Inputs(B, 2, (3,)))


def test_only_what_is_wanted() -> None:
    given = Inputs(3, 4, (9, 9), context=True)
    for run, module in ((run_made, made), (run_step, autoregressive)):
        full = run(module, given)
        for wanted in ((True, False), (False, True), (False, False)):
            for name, value in run(module, given, wanted).items():
                there = {"x": wanted[0], "w": wanted[1], "b": wanted[1]}.get(name[1:2], True)
                assert torch.equal(value, full[name] if there else full[name].new_empty(0)), name


@pytest.mark.parametrize("run", [run_step, run_inverse])
def test_masked_weights_may_hold_anything(run: Callable) -> None:
    given = Inputs(3, 6, (40, 35))
    clean = run(autoregressive, given)
    for weight, seen in zip(given.weights, given.masks):
        weight[~seen] = torch.tensor([NAN, float("inf")], device=DEVICE).repeat(2000)[
            : int((~seen).sum())
        ]
    dirty = run(autoregressive, given)
    for name, value in dirty.items():
        assert torch.equal(value, clean[name]), name
    for layer, seen in enumerate(given.masks, 1):
        assert (dirty[f"dw{layer}"][~seen] == 0).all()


def test_masked_gradients_are_zero_whatever_a_row_holds() -> None:
    given = Inputs(3, 5, (40,))
    given.x[1] = NAN
    found = run_made(made, given)
    for layer, seen in enumerate(given.masks, 1):
        assert (found[f"dw{layer}"][~seen] == 0).all()


def test_rows_do_not_see_each_other() -> None:
    """NaN and inf stay in their row; a row alone gives the bits that it gives in a batch."""
    given = Inputs(19, 5, (35,), context=True)
    clean = run_step(autoregressive, given, (True, False))
    x, term = given.x, given.terms[0]
    given.x = x.clone()
    given.x[3], given.x[18, 1] = NAN, float("inf")
    got = run_step(autoregressive, given, (True, False))
    others = torch.tensor([i for i in range(19) if i not in (3, 18)], device=DEVICE)
    for name in ("y", "ladj", "dx", "dterm1"):
        assert torch.equal(got[name][others], clean[name][others]), name
        assert not got[name][3].isfinite().all(), name

    given.x, given.terms[0] = x[7:8].contiguous(), term[7:8].contiguous()
    setting = given.stairs, TANH, False, *STEP, False
    alone = autoregressive.autoregressive_forward(
        given.x, given.terms, given.weights, given.biases, *setting
    )
    assert torch.equal(alone[0], clean["y"][7:8]) and torch.equal(alone[1], clean["ladj"][7:8])
    assert alone[2].shape == (0,)


def test_tiles_stop_at_the_stair() -> None:
    """What no unit of a tile sees is not read: NaN there, times a zero weight, would show."""
    D, H, tile, block = 100, 130, 64, 16
    for options in (
        masked_network.network_options((D, H)),
        masked_layers.layer_options(H, D, torch.float32),
    ):
        assert tile % options["BLOCK_N"] == 0 and block == options["BLOCK_K"]
    given = Inputs(2, D, (H,), order=None)
    stairs, weights, biases = given.stairs[: D + 2 * H], given.weights[:1], given.biases[:1]
    _, (prefix,) = masks.parts(stairs, (D, H))
    setting = stairs, TANH, False

    x = given.x.clone()
    x[:, int(prefix[tile - 1]) :] = NAN
    y, saved = made.made_forward(x, [], weights, biases, *setting, True)
    assert y[:, :tile].isfinite().all() and y[:, -1].isnan().all()

    # units that see nothing from feature `tile` on, to the multiple of a block where sums start
    blind = int((prefix <= tile).sum())
    dy = torch.randn_like(y)
    dy[:, : blind - blind % block] = NAN
    dx, *_ = made.made_backward(dy, given.x, saved, weights, *setting, 0, 1, True, False)
    assert blind > block and dx[:, 0].isnan().all() and dx[:, tile:].isfinite().all()


@pytest.mark.parametrize("H", [512, 700, 1024, 2048])
def test_tiles_skip_what_the_mask_allows(H: int) -> None:
    """Beyond the stair products and pullbacks compute at most a tenth of what is below it."""
    for D in (H // 8, H):
        degrees = masks.hidden_degrees(H, D)
        _, prefixes = masks.parts(masks.staircase([degrees, degrees], strict=False), [H, H])
        prefix = prefixes[0]
        options = masked_layers.layer_options(H, H, torch.float32)
        units, block = options["BLOCK_N"], options["BLOCK_K"]
        product = pullback = 0
        for first in range(0, H, units):
            last = min(first + units, H) - 1
            product += units * triton.cdiv(int(prefix[last]), block)
            begin = int((prefix <= first).sum()) // block
            pullback += units * (triton.cdiv(H, block) - begin)
        needed = int(prefix.sum())
        assert max(product, pullback) * block <= 1.1 * needed


@pytest.mark.parametrize("run", [run_step, run_inverse])
def test_memory(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside a tensor is read or written, and all of every output is written."""
    for sizes, fill in (((5, 3, (7, 35)), NAN), ((5, 3, (7, 35)), 3.0), ((2, 17, ()), 3.0)):
        given = Inputs(*sizes)
        want = run(autoregressive, given)
        fence = Fenced(fill)  # NaN shows what is read, a number what is written
        fenced = given.to(torch.float32)
        fenced.x = fence.copy(given.x)
        fenced.weights, fenced.biases = (
            [fence.copy(t) for t in tensors] for tensors in (given.weights, given.biases)
        )
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "new_empty", fence_new_empty(fence))
            got = run(autoregressive, fenced)
        assert fence.intact()
        for name, value in got.items():
            assert torch.equal(value, want[name]), name


def fence_new_empty(fence: Fenced) -> Callable:
    """`Tensor.new_empty` inside fences; sizes may come as one tuple."""
    plain = fence.new_empty

    def new_empty(tensor: Tensor, *shape: object, **how: object) -> Tensor:
        if len(shape) == 1 and isinstance(shape[0], tuple):
            shape = shape[0]
        return plain(tensor, *shape, **how)

    return new_empty


@triton.jit
def activation_kernel(x_ptr, out_ptr, N, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=0.0)
    tl.store(out_ptr + i, activations.value(x, ACTIVATION), mask=i < N)
    tl.store(out_ptr + N + i, activations.slope(x, ACTIVATION), mask=i < N)


def exact_activation(name: str, x: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """act(x) and act'(x) to 200 bits."""
    x, one = mpmath.mpf(x), mpmath.mpf(1)
    sigmoid = one / (1 + mpmath.exp(-x))
    if name == "relu":
        return max(x, 0), mpmath.mpf(x > 0)
    if name == "tanh":
        return mpmath.tanh(x), mpmath.sech(x) ** 2
    if name == "elu":
        return (x, one) if x > 0 else (mpmath.expm1(x), mpmath.exp(x))
    if name == "silu":
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    if name == "gelu":
        return x * mpmath.ncdf(x), mpmath.ncdf(x) + x * mpmath.npdf(x)
    if name == "softplus":
        return mpmath.log1p(mpmath.exp(x)), sigmoid
    return (x, one) if x > 0 else (x / 100, one / 100)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_activations(dtype: torch.dtype, name: str) -> None:
    """Against 200 bits: 10 ulp; where a sum cancels, silu' and gelu, 4 units of its terms."""
    magnitudes = 10 ** torch.linspace(-12, 1.9, 150, dtype=torch.float64)
    x = torch.cat([magnitudes, -magnitudes, torch.linspace(-12, 12, 201)]).to(DEVICE, dtype)
    x = torch.cat([x, torch.zeros_like(x[:1])])
    out = torch.full((2, len(x)), NAN, dtype=dtype, device=DEVICE)
    number = list(ACTIVATIONS).index(name)
    activation_kernel[(1,)](x, out, len(x), number, BLOCK=triton.next_power_of_2(len(x)))
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    with mpmath.workprec(200):
        for x_i, value, slope in zip(x.tolist(), *out.tolist()):
            exact = exact_activation(name, x_i)
            sums = {"silu": (0, 1), "gelu": (abs(x_i), 1)}.get(name, (0, 0))
            for got, want, terms in zip((value, slope), exact, sums):
                allowed = 10 * eps * abs(want) + 4 * eps * terms + 2**20 * tiny
                assert abs(got - want) <= allowed, (name, x_i, got, float(want))
    out = torch.zeros(2, 1, dtype=dtype, device=DEVICE)
    activation_kernel[(1,)](torch.full_like(x[:1], NAN), out, 1, number, BLOCK=1)
    assert out[0].isnan()


def test_tf32_is_on_request() -> None:
    assert launch.dot_precision(torch.float32) == "ieee"
    try:
        torch.set_float32_matmul_precision("high")
        assert launch.dot_precision(torch.float32) == "tf32"
        assert launch.dot_precision(torch.float64) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_choice_depends_on_the_widths_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert masked_network.is_small((16, 128, 128, 32))
    assert not masked_network.is_small((16, 129, 32))
    assert not masked_network.is_small((4,) * 10)
