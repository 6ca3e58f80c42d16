"""Independent answers to compare with: the paper's equations, unoptimised, and mpmath."""

from __future__ import annotations

import math

import mpmath
import torch
from torch import Tensor


def planar_chain(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "paper"
) -> tuple[Tensor, Tensor]:
    """A chain as the paper writes it, for autograd; right in float64 at moderate values."""
    shift = math.log(math.e - 1) if constraint == "centred" else 0.0
    ladj = torch.zeros_like(z[..., 0])
    for k in range(w.shape[-2]):
        w_k, u_k = w[..., k, :], u[..., k, :]
        p = (w_k * u_k).sum(-1, keepdim=True)
        m = torch.log1p(torch.exp(p + shift)) - 1
        u_hat = u_k + (m - p) * w_k / (w_k * w_k).sum(-1, keepdim=True)
        t = torch.tanh((w_k * z).sum(-1, keepdim=True) + b[..., k, None])
        ladj = ladj + torch.log(1 + (1 - t * t) * m).squeeze(-1)
        z = z + u_hat * t
    return z, ladj


def problem(
    rows: int,
    features: int,
    steps: int,
    shared: bool,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> list[Tensor]:
    """Leaves z, w, u, b of moderate size: w.z and w.u are of order one whatever D is."""
    batch = () if shared else (rows,)
    scale = max(features, 1) ** -0.5
    shapes = [
        (rows, features),
        (*batch, steps, features),
        (*batch, steps, features),
        (*batch, steps),
    ]
    scales = [1.0, scale, 1.0 if shared else scale, 1.0]
    return [
        (scale * torch.randn(shape, dtype=torch.float64))
        .to(device=device, dtype=dtype)
        .requires_grad_()
        for shape, scale in zip(shapes, scales)
    ]


def inverse_vjp(
    x: Tensor, parameters: list[Tensor], dx: Tensor, dladj: Tensor, constraint: str
) -> list[Tensor]:
    """Gradients of the inverse at y = F(x) by a dense solve with F's Jacobian, for float64.

    With y = F(x; theta) and ladj = -L(x; theta), the cotangent of x is h = dx - dladj dL/dx,
    that of y is v = J^-T h, and that of theta is -(dF/dtheta)^T v - dladj dL/dtheta.
    """
    x = x.detach().requires_grad_()
    y, ladj = planar_chain(x, *parameters, constraint)
    rows = range(x.shape[-1])
    jacobian = torch.stack(
        [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in rows], 1
    )
    h = dx + torch.autograd.grad(ladj, x, -dladj, retain_graph=True)[0]
    v = torch.linalg.solve(jacobian.mT, h)
    return [v, *torch.autograd.grad((y, ladj), parameters, (-v, -dladj))]


def plain_errors(results: object, leaves: list[Tensor], exact: list[Tensor]) -> list[float]:
    """The largest errors that plain float32 arithmetic makes in z_K, ladj, dz, dw, du and db.

    One run is one draw of the rounding errors, and an ill-conditioned chain multiplies what it
    gets. So this is the worst of several runs with the features in another order: sums round
    differently there, and the exact answers are the same.

    Arguments:
        results: from [z, w, u, b] and the order of the features in them to those six tensors.
        leaves: z, w, u, b in float64.
        exact: the six tensors in float64, features in their natural order.
    """
    worst = [0.0] * len(exact)
    for _ in range(8):
        order = torch.randperm(leaves[0].shape[-1])
        z, w, u, b = (leaf.detach().float() for leaf in leaves)
        moved = [z[:, order], w[..., order], u[..., order], b]
        got = results([t.requires_grad_() for t in moved], order)
        for i, (one, want) in enumerate(zip(got, exact)):
            want = want if i in (1, 5) else want[..., order]
            worst[i] = max(worst[i], float((one.detach().double() - want.detach()).abs().max()))
    return worst


def assert_as_good(actual: Tensor, plain: Tensor, exact: Tensor, what: str) -> None:
    """`assert_error` with the error of one float32 result of plain PyTorch."""
    assert_error(actual, float((plain.double() - exact).abs().max()), exact, what)


def assert_error(actual: Tensor, plain: float, exact: Tensor, what: str) -> None:
    """The error is at most that of plain float32 PyTorch twice over, and 16 roundings.

    In float64 the error of plain PyTorch shrinks as the unit roundoff does. The 16 roundings are
    for cases where plain PyTorch happens to be exact.
    """
    assert actual.shape == exact.shape, (what, actual.shape, exact.shape)
    error = (actual.detach().cpu().double() - exact.detach()).abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    plain *= eps / torch.finfo(torch.float32).eps
    bound = 2 * plain + 16 * eps * max(exact.detach().abs().max().item(), 1.0)
    assert error <= bound, f"{what}: error {error:.3g}, plain PyTorch {plain:.3g}"


def step_by_mpmath(a: float, p: float, constraint: str = "paper") -> tuple[float, float, float]:
    """(L, dL/da, dL/dp) of one step with pre-activation a and w.u = p, to 400 bits."""
    with mpmath.workprec(400):
        a, p = mpmath.mpf(a), mpmath.mpf(p)
        x = p + mpmath.log(mpmath.e - 1) if constraint == "centred" else p
        e = mpmath.exp(-2 * abs(a))
        q, t = 4 * e / (1 + e) ** 2, (1 - e) / (1 + e)
        s = mpmath.log1p(mpmath.exp(x))
        s1 = mpmath.chop(s - 1, tol=1e-100)  # at p = 0 "centred" has s = 1, which 400 bits miss
        det = t * t + q * s
        dl_da = -2 * mpmath.sign(a) * q * s1 * t / det
        ladj = mpmath.log(det) if det < 0.5 else mpmath.log1p(q * s1)
        return ladj, dl_da, q / (1 + mpmath.exp(-x)) / det
