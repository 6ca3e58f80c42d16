"""Planar flow in plain PyTorch, the backward pass by hand.

Letters: B batch, D features, K steps. z (B, D). Parameters are shared, w, u (K, D) and b (K,), or
amortised, w, u (B, K, D) and b (B, K). One step, with p = w.u and n = |w|^2, is

    z' = z + u_hat tanh(a),   a = w.z + b,   u_hat = u + alpha w,   alpha = (s1 - p) / n
    L  = log det = log(1 + q s1),   q = sech^2(a),   s1 = w.u_hat = softplus(x) - 1

where x = p (constraint "paper", Rezende & Mohamed 2015) or x = p + ln(e - 1) ("centred"). Both
directions of a chain share one algebra. Steps are visited in order i = 0 .. K-1 (the inverse visits
them backwards) with sigma = +1 (forward) or -1 (inverse):

    x_{i+1} = x_i + sigma u_hat_i tanh(a_i),    ladj = sigma sum_i L_i
    r_i = w_i.x_i + b_i;   forward: a_i = r_i;   inverse: a_i + s1_i tanh(a_i) = r_i

Everything here is differentiable and free of data-dependent control flow under PyTorch's function
transforms, so these functions also answer double backward, forward-mode AD, vmap and torch.func.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.transforms import transforms_active

LOG_E_MINUS_1 = 0.5413248546129181  # ln(e - 1): softplus there is 1
# the same as head + rest: without the rest s1 is wrong where it crosses zero
LOG_E_MINUS_1_HEAD = {torch.float32: 0.5413248538970947, torch.float64: LOG_E_MINUS_1}
LOG_E_MINUS_1_REST = {torch.float32: 7.158233824158563e-10, torch.float64: -1.8138570925507326e-17}
E_MINUS_1_OVER_E = 0.6321205588285577
GUARD = 2.0**-100  # |w|^2 below which a step is that of w = 0
NEWTON_STEPS = 24  # no start of `solve_step` needs more than 17 in float64


class StepParameters(NamedTuple):
    """What a step derives from w and u alone; every field but u_hat has the shape of b."""

    p: Tensor
    n: Tensor
    guarded: Tensor  # bool: |w| < 2^-50, the step is that of w = 0
    x: Tensor  # the argument of softplus
    root: Tensor  # exp(x / 2) without the rounding of x, sqrt(s) where s is small
    s: Tensor  # softplus(x), to full relative accuracy where s1 <= -1/2
    s1: Tensor
    ds: Tensor  # ds1/dp
    alpha: Tensor
    u_hat: Tensor


def step_parameters(w: Tensor, u: Tensor, centred: bool) -> StepParameters:
    """The terms of every step that do not depend on z. w, u (..., K, D)."""
    p, n = (w * u).sum(-1), (w * w).sum(-1)
    guarded = n < GUARD
    if centred:
        v, x, growth = p, p + LOG_E_MINUS_1, math.e - 1
    else:
        v = (p - LOG_E_MINUS_1_HEAD[p.dtype]) - LOG_E_MINUS_1_REST[p.dtype]
        x, growth = p, 1.0
    large = x > 1.5
    s1 = torch.where(
        large,
        (x - 1) + torch.log1p(torch.exp(-x.clamp(min=1.5))),
        torch.log1p(E_MINUS_1_OVER_E * torch.expm1(v.clamp(max=1.5))),
    )
    exp_x = growth * torch.exp(p.clamp(max=0))  # exp(p + c) would lose the digits of p + c
    s = torch.where(p > 0, 1 + s1, torch.log1p(exp_x))
    ds = torch.where(p > 0, torch.sigmoid(x), exp_x / (1 + exp_x))
    root = math.sqrt(growth) * torch.exp(0.5 * p.clamp(max=0))

    n_safe = torch.where(guarded, torch.ones_like(n), n)
    alpha = torch.where(guarded, torch.zeros_like(n), (s1 - p) / n_safe)
    s1_guarded = p.clamp(min=-0.5)
    s1 = torch.where(guarded, s1_guarded, s1)
    s = torch.where(guarded, 1 + s1_guarded, s)
    ds = torch.where(guarded, (p > -0.5).to(p.dtype), ds)
    x = torch.where(guarded, torch.zeros_like(x), x)
    u_hat = u + alpha[..., None] * w
    return StepParameters(p, n_safe, guarded, x, root, s, s1, ds, alpha, u_hat)


def sech2(a: Tensor) -> Tensor:
    """sech^2(a) to full relative accuracy; 1 - tanh^2(a) has none left from |a| = 10."""
    largest = math.log(torch.finfo(a.dtype).max) - 1  # the square is zero long before
    sech = 1 / torch.cosh(a.clamp(-largest, largest))
    return sech * sech


def step_ladj(a: Tensor, s1: Tensor, s: Tensor, x: Tensor) -> Tensor:
    """L = log(1 + q s1) = log(t^2 + q s), without cancellation for any a and w.u."""
    t, q = torch.tanh(a), sech2(a)
    y = q * s1
    plain, tiny = y > -0.5, x < -60
    t2, one = t * t, torch.ones_like(t)
    near = torch.log1p(torch.where(plain, y, 0 * one))
    far = torch.log(torch.where(plain | tiny, one, t2 + q * s))
    # s underflows: log(t^2 + q s) from the logarithms of the two terms, log s being x
    moving = t != 0
    log_t2 = torch.where(moving, 2 * torch.log(torch.where(moving, t, one).abs()), -torch.inf)
    log_qs = torch.log(torch.where(tiny, q, one).clamp(min=torch.finfo(q.dtype).tiny)) + x
    deep = torch.where(moving, torch.logaddexp(log_t2, log_qs), log_qs)
    return torch.where(plain, near, torch.where(tiny, deep, far))


def step_ladj_grads(a: Tensor, step: StepParameters) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/da, dL/dp, det) of one step, as in `step_ladj`; t below is tanh|a|."""
    t, q = torch.tanh(a.abs()), sech2(a)
    y = q * step.s1
    det = torch.where(y > -0.5, 1 + y, t * t + q * step.s)
    es = step.root
    r = torch.where(t > 0, t / es, 0 * t)
    # es/t may overflow only where t/det is t/(q es^2) to rounding, and es = 0 leaves 1/t
    t_over_det = torch.where(t > 0, 1 / (t + torch.where(es > 0, q * es * (es / t), 0 * t)), 0 * t)
    tiny = (step.x < -60) & (y <= -0.5)
    t_over_det = torch.where(tiny, t_over_det, t / det)
    dp = torch.where(tiny, q / (q + r * r), q * step.ds / det)
    return -torch.sign(a) * ((2 * t_over_det) * y), dp, det


def excess_over_tanh(a: Tensor) -> Tensor:
    """a - tanh(a) for a >= 0 to full relative accuracy: (a cosh a - sinh a) / cosh a in series."""
    small = a.clamp(max=1)
    square = small * small
    series = torch.zeros_like(a)
    for n in range(10, 0, -1):
        series = series * square + 2 * n / math.factorial(2 * n + 1)
    return torch.where(a < 1, series * square * small / torch.cosh(small), a - torch.tanh(a))


def newton_step(a: Tensor, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(f(a) - r, its Newton correction) for f(a) = a + s1 tanh(a) = s tanh(a) + (a - tanh(a))."""
    t = torch.tanh(a)
    excess = s * t + excess_over_tanh(a) - r
    slope = t * t + sech2(a) * s
    return excess, excess / slope.clamp(min=torch.finfo(a.dtype).tiny)


def solve_step(r: Tensor, s1: Tensor, s: Tensor) -> Tensor:
    """The root a >= 0 of a + s1 tanh(a) = r for r >= 0, s1 > -1, by bracketed Newton.

    The left side is increasing, concave for s1 >= 0 and convex otherwise, so that Newton approaches
    the root monotonically from the side chosen here; a bracket catches what rounding does to that.
    """
    stretched = s1 >= 0
    by_slope = r / s.clamp(min=torch.finfo(s.dtype).tiny)
    low = torch.where(stretched, torch.maximum(by_slope, r - s1), r)
    # a - tanh(a) >= a^3 / 4.2 up to a = 1 bounds the root where the slope at 0 nearly vanishes
    cubic = torch.where(stretched, torch.ones_like(r), 4.2 * r / s1.abs())
    high = torch.minimum(r + s1.abs(), by_slope)
    high = torch.where(cubic < 1, torch.minimum(high, cubic ** (1 / 3)), high)
    high = torch.where(stretched, r, high)
    a = torch.where(stretched, low, high)
    settled = a != a  # each row stops on its own, whatever its neighbours do
    for _ in range(NEWTON_STEPS):
        excess, correction = newton_step(a, r, s)
        low, high = torch.where(excess <= 0, a, low), torch.where(excess >= 0, a, high)
        step = a - correction
        inside = (step >= low) & (step <= high)
        step = torch.where(inside, step, 0.5 * (low + high))
        close = (step - a).abs() <= 4 * torch.finfo(a.dtype).eps * a
        a = torch.where(settled, a, step)
        settled = settled | close
        if not (transforms_active() or settled.is_meta) and bool(settled.all()):
            break
    return a


def solve_step_differentiable(r: Tensor, s1: Tensor, s: Tensor) -> Tensor:
    """`solve_step` for any sign of r, with derivatives.

    A Newton step at the root leaves its value alone and doubles the order of the derivatives that
    are right: two of them serve up to the third.
    """
    sign = torch.where(r < 0, -1.0, 1.0).to(r.dtype)
    a = solve_step(r.detach() * sign, s1.detach(), s.detach())
    for _ in range(2):
        a = a - newton_step(a, r * sign, s)[1]
    return a * sign


def run_chain(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Either direction of the chain: (out (B, D), ladj (B,), a (B, K))."""
    step = step_parameters(w, u, centred)
    sigma, steps = -1 if inverse else 1, w.shape[-2]
    if not steps:
        return z, torch.zeros_like(z[..., 0]), z[..., :0]
    visited = []
    for k in visiting_order(steps, inverse):
        r = (w[..., k, :] * z).sum(-1) + b[..., k]
        s1, s = step.s1[..., k], step.s[..., k]
        a = solve_step_differentiable(r, s1, s) if inverse else r
        z = z + sigma * step.u_hat[..., k, :] * torch.tanh(a)[..., None]
        visited.append(a)
    a = torch.stack(visited[:: -1 if inverse else 1], -1)
    # of all steps at once: many small operations, as its formula has, cost more than the numbers
    return z, sigma * step_ladj(a, step.s1, step.s, step.x).sum(-1), a


def run_chain_backward(
    d_out: Tensor,
    dladj: Tensor,
    z: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    centred: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The VJP of `run_chain` at input z with pre-activations a: (dz, dw, du, db)."""
    step = step_parameters(w, u, centred)
    order = visiting_order(w.shape[-2], inverse)
    sigma = -1 if inverse else 1
    shared = w.dim() == 2

    # of all steps at once, as in `run_chain`
    tanh, sech, of_ladj = torch.tanh(a), sech2(a), step_ladj_grads(a, step)
    states = [z]  # x_i, the state before step i
    for k in order[:-1]:
        states.append(states[-1] + sigma * step.u_hat[..., k, :] * tanh[..., k, None])

    def total(per_row: Tensor) -> Tensor:
        return per_row.sum(0) if shared else per_row

    g, g_ladj = d_out, sigma * dladj
    visited = []
    for k in reversed(order):
        x = states.pop()
        t, q = tanh[..., k], sech[..., k]
        dladj_da, dladj_dp, det = (field[..., k] for field in of_ladj)
        h = (step.u_hat[..., k, :] * g).sum(-1)
        if inverse:
            gamma = (g_ladj * dladj_da - q * h) / det.clamp(min=torch.finfo(det.dtype).tiny)
            dp_row = g_ladj * dladj_dp - step.ds[..., k] * t * gamma
        else:
            gamma = g_ladj * dladj_da + q * h
            dp_row = g_ladj * dladj_dp
        dw_k, du_hat_k = total(gamma[..., None] * x), total(sigma * t[..., None] * g)
        visited.append((dw_k, du_hat_k, total(gamma), total(dp_row)))
        g = g + gamma[..., None] * w[..., k, :]

    dw, du_hat, db, dp = zip(*visited[:: 1 if inverse else -1])
    dw, du_hat = torch.stack(dw, -2), torch.stack(du_hat, -2)
    dw, du = through_u_hat(w, u, step, dw, du_hat, torch.stack(dp, -1))
    return g, dw, du, torch.stack(db, -1)


def through_u_hat(
    w: Tensor, u: Tensor, step: StepParameters, dw: Tensor, du_hat: Tensor, dp: Tensor
) -> tuple[Tensor, Tensor]:
    """From the cotangents of w (direct), u_hat and p to those of the parameters w and u."""
    g_alpha_n = torch.where(step.guarded, 0 * step.n, (du_hat * w).sum(-1) / step.n)
    dp = (dp + g_alpha_n * (step.ds - 1))[..., None]
    # alpha / n overflows for small w; (g_alpha / n) (alpha w) does not
    alpha_w = step.alpha[..., None] * w
    dw = dw + step.alpha[..., None] * du_hat + dp * u - 2 * g_alpha_n[..., None] * alpha_w
    return dw, du_hat + dp * w


def visiting_order(steps: int, inverse: bool) -> list[int]:
    """The steps in the order in which a direction of the chain applies them."""
    return list(range(steps))[:: -1 if inverse else 1]


def planar_flow_forward(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_K (B, D), ladj (B,), a (B, K)) of a chain applied to z."""
    return run_chain(z, w, u, b, centred, inverse=False)


def planar_flow_inverse(
    z_K: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z (B, D), ladj (B,), a (B, K)) with z_K = chain(z); ladj is minus the forward's."""
    return run_chain(z_K, w, u, b, centred, inverse=True)


def planar_flow_backward(
    dz_K: Tensor,
    dladj: Tensor,
    z: Tensor,
    z_K: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    centred: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dw, du, db); the last three are empty when param_grads is False."""
    dz, dw, du, db = run_chain_backward(dz_K, dladj, z, w, u, a, centred, inverse=False)
    if param_grads:
        return dz, dw, du, db
    return dz, dw.new_empty(0), du.new_empty(0), db.new_empty(0)


def planar_flow_inverse_backward(
    dz: Tensor,
    dladj: Tensor,
    z_K: Tensor,
    z: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    centred: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz_K, dw, du, db) by the implicit function theorem; empty as in `planar_flow_backward`."""
    dz_K, dw, du, db = run_chain_backward(dz, dladj, z_K, w, u, a, centred, inverse=True)
    if param_grads:
        return dz_K, dw, du, db
    return dz_K, dw.new_empty(0), du.new_empty(0), db.new_empty(0)
