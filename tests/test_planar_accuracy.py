"""planar_flow on every backend: errors in units of the last place, small types, extreme values."""

from __future__ import annotations

import pytest
import torch
from conftest import Target
from oracle import planar_chain, problem, step_by_mpmath
from torch import Tensor

from fastflow.functional import planar_flow, planar_flow_inverse
from fastflow.functional.planar_flow import CONSTRAINTS

KINDS = [pytest.param(True, id="shared"), pytest.param(False, id="amortised")]


def bulk_and_extreme_points(count: int = 12_000) -> tuple[Tensor, Tensor]:
    """Pre-activations a and products p = w.u: random, large, tiny, and where terms cancel."""
    special_a = [0.0, 1e-30, 1e-9, 1e-4, 0.3, 0.88, 1.0, 1.3, 5.0, 10.0, 44.0, 50.0, 100.0]
    special_p = [0.0, 1e-9, 0.5413, 0.5413248, 0.54132485, 0.55, 1.4999, 1.5, 1.5001, 10.0, 20.0]
    special_p += [40.0, 60.0, 89.0, 100.0, 1e3, 1e4]
    signed = torch.tensor(special_a + [-a for a in special_a])
    grid = torch.cartesian_prod(signed, torch.tensor(special_p + [-p for p in special_p])).double()
    random = torch.randn(count - len(grid), 2, dtype=torch.float64)
    random *= torch.tensor([0.1, 1.0, 3.0, 30.0])[torch.randint(4, random.shape)]
    a, p = torch.cat([grid, random]).float().double().unbind(-1)
    return a, p


def ulps(actual: Tensor, exact: Tensor, size: Tensor | None = None) -> Tensor:
    """|error| in units of the last place of the exact value, or of `size`."""
    info = torch.finfo(actual.dtype)
    size = exact.abs() if size is None else size
    # below the smallest normal number a relative error means nothing
    return (actual.double() - exact).abs() / (info.eps * size.clamp(min=info.tiny / info.eps))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accuracy_against_mpmath(target: Target, dtype: torch.dtype, constraint: str) -> None:
    """With w = (1, 0), z = (a, 0), u = (p, 0) the op computes a and w.u without rounding."""
    a, p = bulk_and_extreme_points(4_000 if target.slow else 12_000)
    exact = [step_by_mpmath(x, y, constraint) for x, y in zip(a.tolist(), p.tolist())]
    exact = torch.tensor([[float(v) for v in row] for row in exact], dtype=torch.float64)
    zeros = torch.zeros_like(a)
    z = torch.stack([a, zeros], -1).to(target.device, dtype).requires_grad_()
    u = torch.stack([p, zeros], -1)[:, None].to(target.device, dtype).requires_grad_()
    w = torch.zeros_like(u)
    w.data[..., 0] = 1
    b = torch.zeros_like(w[..., 0], requires_grad=True)
    z_K, ladj = planar_flow(z, w, u, b, constraint)
    db, du = torch.autograd.grad(ladj.sum(), (b, u))

    on_gpu = target.device == "cuda"
    got = [t.detach().cpu() for t in (ladj, db[:, 0])]
    assert torch.isfinite(z_K).all() and torch.isfinite(du).all()
    for name, value, want in zip(("L", "dL/da"), got, exact.unbind(-1)):
        assert torch.isfinite(value).all()
        relative, units = ulps(value, want), ulps(value, want, want.abs().clamp(min=1))
        worst = int(relative.argmax())
        where = f"{name} at a={a[worst]:.9g} p={p[worst]:.9g}: {value[worst]} for {want[worst]}"
        assert relative.max() <= (40 if on_gpu else 10), f"{relative.max():.1f} ulp, {where}"
        if name == "L":
            assert units.max() <= (8 if on_gpu else 4), f"{units.max():.1f} units"


def test_gradient_in_p_against_mpmath(target: Target) -> None:
    """du[0] is exactly dL/dp where w has unit length: u_hat then passes nothing else from ladj."""
    a, p = bulk_and_extreme_points(2_000)
    exact = torch.tensor(
        [float(step_by_mpmath(x, y)[2]) for x, y in zip(a.tolist(), p.tolist())],
        dtype=torch.float64,
    )
    z, u = a[:, None].float().to(target.device), p[:, None, None].float().to(target.device)
    u.requires_grad_()
    ladj = planar_flow(z, torch.ones_like(u), u, torch.zeros_like(u[..., 0]))[1]
    (du,) = torch.autograd.grad(ladj.sum(), u)
    error = ulps(du[:, 0, 0].cpu(), exact)
    worst = int(error.argmax())
    assert error.max() <= (40 if target.device == "cuda" else 10), (a[worst], p[worst], error.max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", KINDS)
def test_half_precision_computes_in_float32(
    target: Target, shared: bool, dtype: torch.dtype
) -> None:
    leaves = [t.detach().to(dtype) for t in problem(9, 6, 4, shared, device=target.device)]
    z_K, ladj = planar_flow(*leaves)
    exact, exact_ladj = planar_chain(*(leaf.double().cpu() for leaf in leaves))
    assert z_K.dtype == dtype and ladj.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert ((z_K.cpu() - exact).abs() <= eps * exact.abs().clamp(min=torch.finfo(dtype).tiny)).all()
    torch.testing.assert_close(ladj.cpu(), exact_ladj.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-16, 1e-14, 1e-7])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_vanishing_w(target: Target, shared: bool, size: float, constraint: str) -> None:
    z, w, u, b = (t.detach() for t in problem(4, 3, 2, shared, torch.float32, target.device))
    w = size * w / w.norm(dim=-1, keepdim=True)
    leaves = [t.requires_grad_() for t in (z, w, u, b)]
    z_K, ladj = planar_flow(*leaves, constraint)
    for tensor in (z_K, ladj, *torch.autograd.grad(z_K.sum() + ladj.sum(), leaves)):
        assert torch.isfinite(tensor).all()
    if size < 2**-50:
        want = z + (u * torch.tanh(b)[..., None]).sum(-2)
        torch.testing.assert_close(z_K, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ladj, torch.zeros_like(ladj), rtol=0, atol=1e-6)
    x, back = planar_flow_inverse(z_K.detach(), *leaves[1:], constraint)
    assert torch.isfinite(x).all() and torch.isfinite(back).all()


def test_extreme_sizes_stay_finite(target: Target) -> None:
    a, p = bulk_and_extreme_points(1_000)
    z, u = (t.float().to(target.device)[:, None] for t in (a, p))
    u = u[:, None].requires_grad_()
    w, b = torch.ones_like(u, requires_grad=True), torch.zeros_like(u[..., 0], requires_grad=True)
    z.requires_grad_()
    z_K, ladj = planar_flow(z, w, u, b)
    for tensor in (z_K, ladj, *torch.autograd.grad(z_K.sum() + ladj.sum(), (z, w, u, b))):
        assert torch.isfinite(tensor).all()
