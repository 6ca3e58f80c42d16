"""The Triton kernels themselves: odd shapes, every flag, accuracy, isolation of rows, memory.

On a machine without a GPU the kernels run in Triton's interpreter (conftest.py), hence small sizes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import mpmath
import pytest
import torch
from oracle import assert_as_good, problem, step_by_mpmath
from torch import Tensor

from fastflow import kernels
from fastflow.reference import planar_flow as reference

if kernels.probe() is not None:
    pytest.skip(kernels.probe(), allow_module_level=True)

import triton
import triton.language as tl

from fastflow.kernels import math, planar_flow, planar_flow_shared

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
BOTH = [pytest.param(False, id="forward"), pytest.param(True, id="inverse")]
KINDS = [pytest.param(True, id="shared"), pytest.param(False, id="amortised")]
# B, D, K: single ones, odd ones, partial blocks of every kind, several blocks of rows
SHAPES = [
    (1, 1, 1),
    (3, 1, 2),
    (1, 2, 3),
    (3, 3, 7),
    (33, 5, 2),
    (33, 17, 1),
    (3, 64, 2),
    (1, 130, 3),
]


def arguments(B: int, D: int, K: int, shared: bool, dtype: torch.dtype) -> list[Tensor]:
    """z, w, u, b on the device."""
    return [leaf.detach() for leaf in problem(B, D, K, shared, dtype, DEVICE)]


def ops(module: object, inverse: bool) -> tuple:
    if inverse:
        return module.planar_flow_inverse, module.planar_flow_inverse_backward
    return module.planar_flow_forward, module.planar_flow_backward


def run(
    module: object, inputs: list[Tensor], centred: bool, inverse: bool, param_grads: bool = True
) -> dict[str, Tensor]:
    """Everything an op and its backward return, with fixed cotangents."""
    forward, backward = ops(module, inverse)
    z, w, u, b = inputs
    out, ladj, a = forward(z, w, u, b, centred)
    g = torch.linspace(-1, 2, z.numel()).to(z).view_as(z)
    dladj = torch.linspace(2, -1, len(z)).to(z)
    grads = backward(g, dladj, z, out, w, u, a, centred, param_grads)
    return dict(zip(("out", "ladj", "a", "dz", "dw", "du", "db"), (out, ladj, a, *grads)))


def assert_matches(inputs: list[Tensor], centred: bool, inverse: bool) -> None:
    """As good as the reference in float32, both measured by the reference in float64."""
    exact = run(reference, [x.double() for x in inputs], centred, inverse)
    plain = run(reference, [x.float() for x in inputs], centred, inverse)
    for name, actual in run(planar_flow, inputs, centred, inverse).items():
        assert actual.is_contiguous()
        assert_as_good(actual, plain[name], exact[name], name)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize(("B", "D", "K"), SHAPES)
def test_matches_the_reference(B: int, D: int, K: int, shared: bool, inverse: bool) -> None:
    for dtype, centred in ((torch.float32, False), (torch.float64, True)):
        assert_matches(arguments(B, D, K, shared, dtype), centred, inverse)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float32_centred_and_float64_paper(dtype: torch.dtype, inverse: bool) -> None:
    for shared in (True, False):
        assert_matches(arguments(5, 3, 3, shared, dtype), dtype is torch.float32, inverse)


@pytest.mark.parametrize("inverse", BOTH)
def test_shared_gradients_over_many_tiles(inverse: bool) -> None:
    """Several chunks of rows; then several tiles of steps, of columns and of the products S."""
    B, D, K = 300, 2, 2
    grid, chunk = planar_flow_shared.product_grid(B, D, K, planar_flow_shared.product_options(D, K))
    assert grid[0] > 1 and B % chunk
    assert_matches(arguments(B, D, K, True, torch.float64), False, inverse)
    assert_matches(arguments(2, 70, 34, True, torch.float64), True, inverse)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("shared", KINDS)
def test_without_parameter_gradients(shared: bool, inverse: bool) -> None:
    inputs = arguments(3, 5, 3, shared, torch.float32)
    full, bare = (run(planar_flow, inputs, False, inverse, flag) for flag in (True, False))
    assert torch.equal(full["dz"], bare["dz"])
    assert all(bare[name].shape == (0,) for name in ("dw", "du", "db"))


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_and_extreme_parameters(dtype: torch.dtype, centred: bool, inverse: bool) -> None:
    """w = 0, |w| on both sides of the guard, w.u = -1e4 .. 1e4, |a| = 100: finite and right.

    An error of eps in p = w.u is one of |p| eps in softplus(p), so that is what a row may lose. The
    slope of the inverse is 1 / det, which overflows at a = 0, w.u = -1e4: only finite is asked.
    """
    norms = [0.0, 1e-30, 2.0**-51, 2.0**-49, 1e-6, 1.0, 1.0, 1.0, 1.0, 1.0]
    products = [0.0, -0.25e-30, -3.0, 0.5, 0.1, 1e4, -1e4, -70.0, -30.0, 30.0]
    w = torch.tensor([[[n, 0.0]] for n in norms])
    u = torch.tensor([[[p / n if n else 1.0, 0.5]] for p, n in zip(products, norms)])
    eps = torch.finfo(dtype).eps
    allowed = 32 * eps * (1 + torch.tensor(products).abs().double())
    for a in (0.0, 1e-9, -0.7, 100.0):
        inputs = [x.to(DEVICE, dtype) for x in (torch.zeros(10, 2), w, u, torch.full((10, 1), a))]
        got = run(planar_flow, inputs, centred, inverse)
        exact = run(reference, [x.double() for x in inputs], centred, inverse)
        assert got["ladj"][0] == 0
        for name, value in got.items():
            assert value.isfinite().all(), (name, a)
            value, expected = (x.reshape(10, -1).double().cpu() for x in (value, exact[name]))
            error, size = (value - expected).abs().amax(1), expected.abs().amax(1)
            right = error <= allowed * size + torch.finfo(dtype).tiny
            if inverse:
                right[6] = True
            assert right.all(), (name, a, error, size)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("shared", KINDS)
def test_rows_do_not_see_each_other(shared: bool, inverse: bool) -> None:
    """NaN and inf stay in their row; a row alone gives the bits that it gives in a batch."""
    inputs = arguments(35, 5, 2, shared, torch.float32)
    clean = run(planar_flow, inputs, False, inverse, param_grads=not shared)
    dirty = [inputs[0].clone(), *inputs[1:]]
    dirty[0][3], dirty[0][34, 1] = NAN, float("inf")
    got = run(planar_flow, dirty, False, inverse, param_grads=not shared)
    others = torch.tensor([i for i in range(35) if i not in (3, 34)], device=DEVICE)
    for name, value in got.items():
        if value.numel():
            assert torch.equal(value[others], clean[name][others]), name
            assert not value[3].isfinite().all(), name

    forward, _ = ops(planar_flow, inverse)
    alone = [x[7:8] if x is inputs[0] or not shared else x for x in inputs]
    for one, all_rows in zip(forward(*alone, False), (clean["out"], clean["ladj"], clean["a"])):
        assert torch.equal(one, all_rows[7:8])


class Fenced:
    """Allocations and inputs between fences of values that nobody may read or overwrite."""

    def __init__(self, fill: float) -> None:
        self.fill, self.storages = fill, []

    def allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        n = torch.Size(shape).numel()
        storage = torch.full((n + 512,), self.fill, dtype=like.dtype, device=like.device)
        self.storages.append((storage, n))
        return storage[256 : 256 + n].view(shape)

    def empty_like(self, tensor: Tensor) -> Tensor:
        return self.allocate(tensor.shape, tensor)

    @property
    def new_empty(self) -> Callable:
        """A stand-in for the method; the interpreter's own calls, by keyword, pass through."""
        plain = Tensor.new_empty
        return lambda tensor, *shape, **how: (
            plain(tensor, *shape, **how) if how else self.allocate(shape, tensor)
        )

    def copy(self, tensor: Tensor) -> Tensor:
        return self.allocate(tensor.shape, tensor).copy_(tensor)

    def intact(self) -> bool:
        fences = [part for s, n in self.storages for part in (s[:256], s[256 + n :])]
        fill = torch.full_like(fences[0], self.fill)
        return all(torch.allclose(part, fill, 0, 0, equal_nan=True) for part in fences)


@pytest.mark.parametrize("inverse", BOTH)
@pytest.mark.parametrize("shared", KINDS)
def test_memory(shared: bool, inverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing outside a tensor is read or written, and all of every output is written."""
    for (B, D, K), fill in (((5, 3, 3), NAN), ((5, 3, 3), 3.0), ((2, 33, 1), 3.0)):
        inputs = arguments(B, D, K, shared, torch.float32)
        want = run(planar_flow, inputs, False, inverse)
        fence = Fenced(fill)  # NaN shows what is read, a number what is written
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", fence.empty_like)
            patch.setattr(Tensor, "new_empty", fence.new_empty)
            got = run(planar_flow, [fence.copy(x) for x in inputs], False, inverse)
        assert fence.intact()
        for name, value in got.items():
            assert torch.equal(value, want[name]), name


@triton.jit
def terms_kernel(
    a_ptr, p_ptr, out_ptr, N, CENTRED: tl.constexpr, BLOCK: tl.constexpr
):  # out (3, N): L, dL/da, dL/dp
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < N, other=0.0)
    p = tl.load(p_ptr + i, mask=i < N, other=0.0)
    x, root_s, s1, s, ds, _alpha = math.planar_step(p, 0.0 * p + 1.0, CENTRED)
    t, q = math.tanh_sech2(a)
    da, dp, _det = math.step_ladj_grads(a, t, q, x, root_s, s1, s, ds)
    tl.store(out_ptr + i, math.step_ladj(t, q, x, root_s, s1, s), mask=i < N)
    tl.store(out_ptr + N + i, da, mask=i < N)
    tl.store(out_ptr + 2 * N + i, dp, mask=i < N)


def points(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(a, p): the bulk, many magnitudes, around the zero of s1, and a grid of extremes."""
    n = 500
    sign = torch.where(torch.rand(2, n) < 0.5, -1.0, 1.0).double()
    bulk = 3 * torch.randn(2, n).double()
    magnitudes = sign * 10 ** torch.stack([14 * torch.rand(n) - 12, 7 * torch.rand(n) - 5]).double()
    zero = 0.5413248546 + sign[0] * 10 ** (-8 * torch.rand(n).double())
    a = [0, 1e-20, -1e-9, 1e-3, 0.5, -1.5, 10, -40, 100]
    p = [0, 1e-7, -1e-7, 0.5413248546, 1.5, -1, -15, -30, -59.9, -60.1, -100, 100, 1e4, -1e4]
    grid = torch.cartesian_prod(torch.tensor(a).double(), torch.tensor(p).double()).T
    return torch.cat([bulk, magnitudes, torch.stack([bulk[0], zero]), grid], 1).to(dtype)


@pytest.mark.parametrize("constraint", ["paper", "centred"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_of_a_step(dtype: torch.dtype, constraint: str) -> None:
    """L and its derivatives against 400 bits: 10 ulp, on a GPU 40 and 8 units for L."""
    a, p = points(dtype)
    out = torch.full((3, a.numel()), NAN, dtype=dtype, device=DEVICE)
    block = 256 if DEVICE == "cuda" else triton.next_power_of_2(a.numel())
    terms_kernel[(triton.cdiv(a.numel(), block),)](
        *(a.to(DEVICE), p.to(DEVICE), out, a.numel()),
        CENTRED=constraint == "centred",
        BLOCK=block,
        enable_fp_fusion=True,
    )
    assert out.isfinite().all()
    info = torch.finfo(dtype)
    eps, tiny = mpmath.mpf(info.eps), mpmath.mpf(info.tiny)
    for a_i, p_i, got in zip(a.tolist(), p.tolist(), out.cpu().T.tolist()):
        want = step_by_mpmath(a_i, p_i, constraint)
        for name, value, exact in zip(("L", "dL/da", "dL/dp"), got, want):
            error = abs(value - exact)
            allowed = 40 if DEVICE == "cuda" else 10
            floor = tiny * 2**20  # results and factors that are subnormal have fewer digits
            ulp = eps * 2 ** mpmath.floor(mpmath.log(max(abs(exact), floor), 2))
            assert error <= allowed * ulp, (name, a_i, p_i, value, float(exact))
            if name == "L":
                assert error <= (8 if DEVICE == "cuda" else 4) * eps * max(1, abs(exact))


@triton.jit
def solve_kernel(r_ptr, p_ptr, a_ptr, N, CENTRED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    r = tl.load(r_ptr + i, mask=i < N, other=0.0)
    p = tl.load(p_ptr + i, mask=i < N, other=0.0)
    _x, _root_s, s1, s, _ds, _alpha = math.planar_step(p, 0.0 * p + 1.0, CENTRED)
    tl.store(a_ptr + i, math.solve_step(r, s1, s), mask=i < N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solver(dtype: torch.dtype) -> None:
    """a + s1 tanh(a) = r to a few roundings of r, backward: |f(a) - r| <= 8 eps max(|r|, |a|)."""
    r = torch.tensor([0, 1e-30, 1e-12, -1e-6, 1e-3, 0.1, -0.5, 1, 2, 5, -30, 100, 1e4, 1e9])
    p = torch.tensor([-1e4, -80, -40, -20, -15, -5, -1, 0, 0.5413, 1, 3, 20, 1e2, 1e4])
    r, p = torch.cartesian_prod(r, p).to(DEVICE, dtype).T.contiguous()
    a = torch.full_like(r, NAN)
    block = triton.next_power_of_2(r.numel())
    solve_kernel[(1,)](r, p, a, r.numel(), CENTRED=False, BLOCK=block, enable_fp_fusion=True)
    for r_i, p_i, a_i in zip(r.tolist(), p.tolist(), a.tolist()):
        with mpmath.workprec(200):
            s = mpmath.log1p(mpmath.exp(mpmath.mpf(p_i)))
            residual = abs(a_i + (s - 1) * mpmath.tanh(a_i) - r_i)
        assert residual <= 8 * torch.finfo(dtype).eps * max(abs(r_i), 2**-100), (r_i, p_i, a_i)


def in_fresh_python(code: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_import_is_free_of_side_effects() -> None:
    in_fresh_python("import sys, fastflow; assert 'triton' not in sys.modules")
    in_fresh_python(
        "import torch, fastflow.kernels.planar_flow; assert not torch.cuda.is_initialized()"
    )


def test_probe_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = kernels.probe.__wrapped__
    assert probe() is None
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    assert probe() == "triton 3.2.0 is older than 3.6"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert probe() == "triton is not installed"
