# type: ignore  # what Triton makes of a function has other types than its annotations
"""Elementary functions and the terms of a planar step, for Triton kernels.

Triton has no log1p, expm1 or tanh that its interpreter can run, and its float32 exp loses a unit
in the last place for every unit of |x|. The functions below keep their relative accuracy and
compile for float32 and float64. They propagate NaN and produce no other non-finite intermediate.

The formulas are those of `fastflow.reference.planar_flow`; p = w.u, n = |w|^2, x is the argument of
softplus, s = softplus(x), s1 = s - 1 = w.u_hat, t = tanh|a|, q = sech^2(a).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2_HEAD = tl.constexpr(0.693359375)  # ln 2 = head + rest; head * n is exact for |n| < 2^14
LN2_REST = tl.constexpr(-2.1219444005469057e-4)
LOG_E_MINUS_1 = tl.constexpr(0.5413248546129181)  # ln(e - 1): softplus there is 1
LOG_E_MINUS_1_HEAD = tl.constexpr(0.5413248538970947)  # exact in float32
LOG_E_MINUS_1_REST = tl.constexpr(7.158233824158563e-10)
E_MINUS_1 = tl.constexpr(1.718281828459045)
SQRT_E_MINUS_1 = tl.constexpr(1.3108324944320862)
E_MINUS_1_OVER_E = tl.constexpr(0.6321205588285577)
GUARD = tl.constexpr(2.0**-100)  # |w|^2 below which a step is that of w = 0
TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
ONE_MINUS_TINY_IS_ONE = tl.constexpr(1e-17)  # in float64, so in float32
NEWTON_STEPS = tl.constexpr(24)  # no start of `solve_step` needs more than 17 in float64


@triton.jit
def divide(x, y):
    """x / y to the last place, 2^-126 < |y| < 2^126: plain `/` on float32 is off by 2 on a GPU.

    One step of Newton from there has no rare slow path, which `tl.div_rn` keeps registers for.
    """
    if y.dtype == tl.float32:
        inverse = 1.0 / y
        rough = x * inverse
        quotient = tl.fma(tl.fma(-rough, y, x), inverse, rough)
    else:
        quotient = x / y
    return quotient


@triton.jit
def exp(x):
    """e^x for x below about 80."""
    if x.dtype == tl.float32:
        x = tl.where(x < -110.0, -110.0, x)
        n = tl.floor(x * LOG2_E + 0.5)
        r = (x - n * LN2_HEAD) - n * LN2_REST
        result = tl.exp(r) * tl.exp2(n)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def log1p(v):
    """log(1 + v) for v > -1 (Kahan: what rounding u costs, log(u) / (u - 1) does not feel)."""
    u = 1.0 + v
    d = u - 1.0
    return tl.where(d == 0.0, v, v * divide(tl.log(u), tl.where(d == 0.0, 1.0, d)))


@triton.jit
def expm1_from(v, u):
    """e^v - 1 for v >= -40, given u = e^v."""
    log_u = tl.log(u)
    return tl.where(log_u == 0.0, v, (u - 1.0) * divide(v, tl.where(log_u == 0.0, 1.0, log_u)))


@triton.jit
def tanh_sech2(a):
    """(t, q) = (tanh|a|, sech^2(a))."""
    v = -2.0 * tl.abs(a)
    e = exp(v)
    saturated = e < ONE_MINUS_TINY_IS_ONE
    numerator = tl.where(saturated, 1.0, -expm1_from(v, tl.where(saturated, 0.5, e)))
    return numerator / (1.0 + e), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def with_sign(magnitude, a):
    """magnitude, negated where a < 0."""
    return tl.where(a < 0.0, -magnitude, magnitude)


@triton.jit
def planar_step(p, n, CENTRED: tl.constexpr):
    """(x, root_s, s1, s, ds, alpha): the terms of a step that do not depend on z.

    root_s = exp(x / 2), which is sqrt(s) where s is small; ds = ds1/dp.
    """
    root_s = exp(tl.where(p < 0.0, 0.5 * p, 0.0))
    if CENTRED:
        x = p + LOG_E_MINUS_1
        v = p
        # exp(-|x|) without the rounding of x
        e = exp(tl.where(x > 0.0, -p, p))
        e = tl.where(x > 0.0, e / E_MINUS_1, e * E_MINUS_1)
        root_s = root_s * SQRT_E_MINUS_1
    else:
        x = p
        v = (p - LOG_E_MINUS_1_HEAD) - LOG_E_MINUS_1_REST
        e = exp(-tl.abs(x))
    log1p_e = log1p(e)
    s = tl.where(x > 0.0, x, 0.0) + log1p_e
    ds = tl.where(x > 0.0, 1.0, e) / (1.0 + e)
    # beyond these bounds either x > 1.5, or expm1(v) is -1
    v = tl.where(v > 1.0, 1.0, tl.where(v < -40.0, -40.0, v))
    s1 = log1p(E_MINUS_1_OVER_E * expm1_from(v, exp(v)))
    s1 = tl.where(x > 1.5, (x - 1.0) + log1p_e, s1)

    guarded = n < GUARD
    alpha = tl.where(guarded, 0.0, (s1 - p) / tl.where(guarded, 1.0, n))
    s1 = tl.where(guarded, tl.where(p < -0.5, -0.5, p), s1)
    s = tl.where(guarded, 1.0 + s1, s)
    ds = tl.where(guarded, tl.where(p > -0.5, 1.0, 0.0), ds)
    x = tl.where(guarded, 0.0, x)
    return x, root_s, s1, s, ds, alpha


@triton.jit
def step_ladj(t, q, x, root_s, s1, s):
    """L = log(1 + q s1) = log(t^2 + q s), without cancellation or underflow."""
    y = q * s1
    near = y > -0.5
    deep = (x <= -60.0) & (y <= -0.5)  # where t^2 and s may both underflow
    above = t > root_s
    ratio = tl.where(above, root_s, t) / tl.where(above, t, tl.where(root_s < TINY, TINY, root_s))
    # one logarithm serves all branches: of 1 + v to the precision of v, or of u
    v = tl.where(near, y, q * ratio * ratio)
    is_log1p = near | (deep & above)
    u = tl.where(is_log1p, 1.0 + v, tl.where(deep, q + ratio * ratio, t * t + q * s))
    d = u - 1.0
    log_u = tl.log(u)
    log_1p = tl.where(d == 0.0, v, v * divide(log_u, tl.where(d == 0.0, 1.0, d)))
    base = tl.where(above, 2.0 * tl.log(tl.where(above, t, 1.0)), x)
    return tl.where(is_log1p, log_1p, log_u) + tl.where(deep, base, 0.0)


@triton.jit
def step_ladj_grads(a, t, q, x, root_s, s1, s, ds):
    """(dL/da, dL/dp, det) of one step, with the branches of `step_ladj`."""
    y = q * s1
    # y carries the errors of q and s1, which y / (1 + y) magnifies for y < 0
    det = tl.where(y > -0.25, 1.0 + y, t * t + q * s)
    deep = (x <= -60.0) & (y <= -0.5)
    above = t > root_s
    floor = tl.where(root_s < TINY, TINY, root_s)
    ratio = tl.where(above, root_s, t) / tl.where(above, t, floor)
    r2 = ratio * ratio
    # t / det and q s / det, with t^2 or root_s^2 cancelled from both
    deep_t = tl.where(above, 1.0, ratio) / tl.where(above, t + q * root_s * ratio, (r2 + q) * floor)
    deep_dp = q * tl.where(above, r2, 1.0) / tl.where(above, 1.0 + q * r2, q + r2)
    safe = tl.where(deep, 1.0, det)
    t_over_det = tl.where(deep, deep_t, t / safe)
    dp = tl.where(deep, deep_dp, q * ds / safe)
    return -with_sign((2.0 * t_over_det) * y, a), dp, det


@triton.jit
def pre_activation_grad(h, dladj, q, da, det, INVERSE: tl.constexpr):
    """gamma, the cotangent of r = w.x + b, from h = u_hat.g, dladj and dL/da."""
    if INVERSE:
        gamma = (dladj * da - q * h) / tl.where(det < TINY, TINY, det)
    else:
        gamma = dladj * da + q * h
    return gamma


@triton.jit
def p_grad(dladj, dp, ds, t, gamma, INVERSE: tl.constexpr):
    """The cotangent of p = w.u, but for what flows through alpha, from dladj and dL/dp."""
    if INVERSE:
        grad = dladj * dp - ds * t * gamma
    else:
        grad = dladj * dp
    return grad


@triton.jit
def through_u_hat(w_pd, u_pd, dw_pd, du_hat_pd, dp_p, n_p, ds_p, alpha_p):
    """(dw, du) from the cotangents of w (its direct part), u_hat and p."""
    guarded = n_p < GUARD
    g_alpha_n = tl.sum(du_hat_pd * w_pd, axis=1) / tl.where(guarded, 1.0, n_p)
    g_alpha_n = tl.where(guarded, 0.0, g_alpha_n)
    dp_pd = (dp_p + g_alpha_n * (ds_p - 1.0))[:, None]
    # alpha / n overflows for small w; (g_alpha / n) (alpha w) does not
    alpha_w = alpha_p[:, None] * w_pd
    dw_pd += alpha_p[:, None] * du_hat_pd + dp_pd * u_pd - 2.0 * g_alpha_n[:, None] * alpha_w
    return dw_pd, du_hat_pd + dp_pd * w_pd


@triton.jit
def excess_over_tanh(a, t, q):
    """a - tanh(a) for a >= 0: (a cosh a - sinh a) / cosh a, in series below 1."""
    m = tl.where(a < 1.0, a, 1.0)
    m2 = m * m
    series = tl.full(a.shape, 1.0, a.dtype)
    for i in tl.static_range(9):
        # c_n = 2 n / (2 n + 1)! = c_{n-1} / (2 (n - 1) (2 n + 1)), c_1 = 1/3
        series = 1.0 + series * m2 * (1.0 / (2 * (9 - i) * (2 * (9 - i) + 3)))
    return tl.where(a < 1.0, series * m2 * m * (1.0 / 3.0) * tl.sqrt(q), a - t)


@triton.jit
def solve_step(r, s1, s):
    """The root a of a + s1 tanh(a) = r, s1 > -1, by bracketed Newton on |r|.

    The left side is odd; for a > 0 it is increasing, concave if s1 >= 0 and convex otherwise, so
    that Newton approaches the root monotonically from the side chosen here. The bracket catches
    what rounding does to that. A row stops by itself: its result does not depend on its neighbours.
    """
    goal = tl.abs(r)
    s1 = s1 + 0.0 * goal  # the shape of r
    s = s + 0.0 * goal
    stretched = s1 >= 0.0
    by_slope = goal / tl.where(s < TINY, TINY, s)
    low = tl.where(stretched, tl.maximum(by_slope, goal - s1), goal)
    # a - tanh(a) >= a^3 / 4.2 up to a = 1 bounds the root where the slope at 0 nearly vanishes
    cubic = 4.2 * goal / tl.where(stretched, 1.0, -s1)
    root = exp(tl.log(tl.where((cubic > TINY) & (cubic < 1.0), cubic, 1.0)) * (1.0 / 3.0))
    high = tl.minimum(goal - s1, by_slope)
    high = tl.where((cubic > TINY) & (cubic < 1.0), tl.minimum(high, root * 1.00001), high)
    high = tl.where(stretched, goal, high)
    a = tl.where(stretched, low, high)
    active = a == a
    steps = 0
    while (steps < NEWTON_STEPS) & (tl.max(active.to(tl.int32), axis=0) > 0):
        t, q = tanh_sech2(a)
        excess = s * t + excess_over_tanh(a, t, q) - goal
        slope = t * t + q * s
        low = tl.where(excess <= 0.0, a, low)
        high = tl.where(excess >= 0.0, a, high)
        step = a - excess / tl.where(slope < TINY, TINY, slope)
        step = tl.where((step >= low) & (step <= high), step, 0.5 * (low + high))
        changed = active & (step != a)
        a = tl.where(active, step, a)
        active = changed
        steps += 1
    return with_sign(a, r)
