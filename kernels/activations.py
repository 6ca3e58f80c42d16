"""The activations of masked networks and their derivatives, for Triton kernels.

Both are functions of the pre-activation, chosen at compile time by the activation's number, its
position in `fastflow.reference.network.ACTIVATIONS`. Values keep NaN: `x < 0`, not `x > 0`, decides
where a constant is chosen.
"""

import triton
import triton.language as tl

from fastflow.kernels import math

NONE = tl.constexpr(-1)  # the identity, in place of an activation's number
RELU = tl.constexpr(0)
TANH = tl.constexpr(1)
ELU = tl.constexpr(2)
SILU = tl.constexpr(3)
GELU = tl.constexpr(4)
SOFTPLUS = tl.constexpr(5)
LEAKY_RELU = tl.constexpr(6)

LEAK = tl.constexpr(0.01)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), to the last places on both sides."""
    e = math.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + exp(x))."""
    return tl.where(x < 0.0, 0.0, x) + math.log1p(math.exp(-tl.abs(x)))


@triton.jit
def normal_cdf(x):
    """The share of a standard normal distribution below x."""
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def value(x, ACTIVATION: tl.constexpr):
    """act(x)."""
    if ACTIVATION == NONE:
        result = x
    elif ACTIVATION == RELU:
        result = tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == TANH:
        result = math.with_sign(math.tanh_sech2(x)[0], x)
    elif ACTIVATION == ELU:
        v = tl.where(x < -40.0, -40.0, tl.where(x > 0.0, 0.0, x))  # expm1(-40) is -1
        result = tl.where(x > 0.0, x, math.expm1_from(v, math.exp(v)))
    elif ACTIVATION == SILU:
        result = x * sigmoid(x)
    elif ACTIVATION == GELU:
        result = x * normal_cdf(x)
    elif ACTIVATION == SOFTPLUS:
        result = softplus(x)
    else:
        tl.static_assert(ACTIVATION == LEAKY_RELU, "no activation has this number")
        result = tl.where(x > 0.0, x, LEAK * x)
    return result


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act'(x); at a kink that of the negative side."""
    # in x's type: `where` between two constants would give float32
    one = tl.full(x.shape, 1.0, x.dtype)
    if ACTIVATION == NONE:
        result = one
    elif ACTIVATION == RELU:
        result = tl.where(x > 0.0, one, 0.0)
    elif ACTIVATION == TANH:
        result = math.tanh_sech2(x)[1]
    elif ACTIVATION == ELU:
        result = tl.where(x > 0.0, one, math.exp(tl.where(x > 0.0, 0.0, x)))
    elif ACTIVATION == SILU:
        s = sigmoid(x)
        result = s + x * s * sigmoid(-x)
    elif ACTIVATION == GELU:
        result = normal_cdf(x) + x * INVERSE_SQRT_2PI * math.exp(-0.5 * x * x)
    elif ACTIVATION == SOFTPLUS:
        result = sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == LEAKY_RELU, "no activation has this number")
        result = tl.where(x > 0.0, one, LEAK)
    return result
