"""The affine step of an autoregressive layer in Triton, given the outputs of its network.

Formulas and numbers of the scale maps are those of `fastflow.reference.scales`. Position r in the
order of the features has its shift m at sorted position 2 r of the outputs, its raw scale a at
2 r + 1. A tile is a program's rows and all features, BLOCK_D positions at a time.
"""

import torch
import triton
import triton.language as tl

from fastflow.kernels import activations, math

NONE = tl.constexpr(-1)  # a network whose outputs are wanted as they are
SOFT_CLIP = tl.constexpr(0)
SOFTPLUS = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
CLAMP = tl.constexpr(3)
GATE = tl.constexpr(4)


@triton.jit
def scale_of(a, SCALE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """(s, l) of the raw scale a, l = log s."""
    if SCALE == SOFT_CLIP:
        l = a / (1.0 + tl.abs(a / C0))  # noqa: E741
        s = math.exp(l)
    elif SCALE == SOFTPLUS:
        s = activations.softplus(a + C0) + C1
        l = tl.log(s)  # noqa: E741
    elif SCALE == SIGMOID:
        s = activations.sigmoid(a + C0) + C1
        l = tl.log(s)  # noqa: E741
    elif SCALE == CLAMP:
        l = tl.where(a < C0, C0, tl.where(a > C1, C1, a))  # noqa: E741
        s = math.exp(l)
    else:
        tl.static_assert(SCALE == GATE, "no scale map has this number")
        s = activations.sigmoid(a + C0)
        l = -activations.softplus(-a - C0)  # noqa: E741
    return s, l


@triton.jit
def inverse_scale(a, SCALE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """1 / s of the raw scale a."""
    if SCALE == GATE:
        inverse = 1.0 + math.exp(-a - C0)
    elif (SCALE == SOFT_CLIP) | (SCALE == CLAMP):
        inverse = math.exp(-scale_of(a, SCALE, C0, C1)[1])
    else:
        s = scale_of(a, SCALE, C0, C1)[0]
        inverse = math.divide(tl.full(s.shape, 1.0, s.dtype), s)
    return inverse


@triton.jit
def log_slope(a, SCALE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """dl/da; for the clamp 1 everywhere (straight-through)."""
    if SCALE == SOFT_CLIP:
        root = 1.0 + tl.abs(a / C0)
        slope = 1.0 / (root * root)
    elif SCALE == SOFTPLUS:
        slope = activations.sigmoid(a + C0) / (activations.softplus(a + C0) + C1)
    elif SCALE == SIGMOID:
        s = activations.sigmoid(a + C0)
        slope = s * activations.sigmoid(-a - C0) / (s + C1)
    elif SCALE == CLAMP:
        slope = tl.full(a.shape, 1.0, a.dtype)
    else:
        tl.static_assert(SCALE == GATE, "no scale map has this number")
        slope = activations.sigmoid(-a - C0)
    return slope


@triton.jit
def positions(stairs_ptr, order_at, rows, r, B, D):
    """Where rows and sorted features r are in tensors (B, D), and their m and a in (B, 2 D)."""
    ok_r = r < D
    features = tl.load(stairs_ptr + r, mask=ok_r, other=0)
    pairs_ptr = stairs_ptr + order_at + (r + r)
    shifts = tl.load(pairs_ptr, mask=ok_r, other=0)
    raws = tl.load(pairs_ptr + 1, mask=ok_r, other=0)
    ok = (rows < B)[:, None] & ok_r[None, :]
    at = rows[:, None] * D
    return at + features[None, :], 2 * at + shifts[None, :], 2 * at + raws[None, :], ok


@triton.jit
def affine_tile(
    x_ptr,  # (B, D)
    o_ptr,  # (B, 2 D) outputs of the network
    y_ptr,  # (B, D)
    ladj_ptr,  # (B,)
    stairs_ptr,
    order_at,  # where the order of the outputs starts in stairs
    rows,
    B,
    D,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = s x + m, for the gate s x + (1 - s) m, and ladj = sum of l."""
    l_bd = tl.zeros([BLOCK_B, BLOCK_D], y_ptr.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        at, m_at, a_at, ok = positions(
            stairs_ptr, order_at, rows, first + tl.arange(0, BLOCK_D), B, D
        )
        x_bd = tl.load(x_ptr + at, mask=ok, other=0.0)
        m_bd = tl.load(o_ptr + m_at, mask=ok, other=0.0)
        a_bd = tl.load(o_ptr + a_at, mask=ok, other=0.0)
        s_bd, new_bd = scale_of(a_bd, SCALE, C0, C1)
        if SCALE == GATE:
            m_bd = activations.sigmoid(-a_bd - C0) * m_bd
        tl.store(y_ptr + at, s_bd * x_bd + m_bd, mask=ok)
        l_bd += tl.where(ok, new_bd, 0.0)
    tl.store(ladj_ptr + rows, tl.sum(l_bd, axis=1), mask=rows < B)


@triton.jit
def affine_grad_tile(
    dy_ptr,  # (B, D)
    dladj_ptr,  # (B,)
    x_ptr,  # (B, D)
    o_ptr,  # (B, 2 D)
    dx_ptr,  # (B, D) or None: what reaches x past the network
    do_ptr,  # (B, 2 D)
    stairs_ptr,
    order_at,
    rows,
    B,
    D,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The cotangents of x and of the network's outputs from those of y and ladj."""
    dladj_b = tl.load(dladj_ptr + rows, mask=rows < B, other=0.0)
    for first in range(0, D, BLOCK_D):
        at, m_at, a_at, ok = positions(
            stairs_ptr, order_at, rows, first + tl.arange(0, BLOCK_D), B, D
        )
        dy_bd = tl.load(dy_ptr + at, mask=ok, other=0.0)
        x_bd = tl.load(x_ptr + at, mask=ok, other=0.0)
        a_bd = tl.load(o_ptr + a_at, mask=ok, other=0.0)
        s_bd, _l_bd = scale_of(a_bd, SCALE, C0, C1)
        dx_bd = s_bd * dy_bd
        if SCALE == GATE:
            m_bd = tl.load(o_ptr + m_at, mask=ok, other=0.0)
            dm_bd = activations.sigmoid(-a_bd - C0) * dy_bd
            dl_bd = dx_bd * (x_bd - m_bd) + dladj_b[:, None]
        else:
            dm_bd = dy_bd
            dl_bd = dx_bd * x_bd + dladj_b[:, None]
        if dx_ptr is not None:
            tl.store(dx_ptr + at, dx_bd, mask=ok)
        tl.store(do_ptr + m_at, dm_bd, mask=ok)
        tl.store(do_ptr + a_at, dl_bd * log_slope(a_bd, SCALE, C0, C1), mask=ok)


@triton.jit(do_not_specialize=["order_at", "B"])
def affine_kernel(
    x_ptr,
    o_ptr,
    y_ptr,
    ladj_ptr,
    stairs_ptr,
    order_at,
    B,
    D,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`affine_tile` for BLOCK_B rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    affine_tile(
        *(x_ptr, o_ptr, y_ptr, ladj_ptr, stairs_ptr, order_at, rows, B, D),
        *(SCALE, C0, C1, BLOCK_B, BLOCK_D),
    )


@triton.jit(do_not_specialize=["order_at", "B"])
def affine_grad_kernel(
    dy_ptr,
    dladj_ptr,
    x_ptr,
    o_ptr,
    dx_ptr,
    do_ptr,
    stairs_ptr,
    order_at,
    B,
    D,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`affine_grad_tile` for BLOCK_B rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    affine_grad_tile(
        *(dy_ptr, dladj_ptr, x_ptr, o_ptr, dx_ptr, do_ptr, stairs_ptr, order_at, rows, B, D),
        *(SCALE, C0, C1, BLOCK_D),
    )


def affine_options(D: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Blocks and launch options of both kernels: 4 float32 or 2 float64 numbers a thread."""
    block_d = min(max(triton.next_power_of_2(D), 4), 64)
    return {
        "BLOCK_B": 256 // block_d if dtype == torch.float64 else 512 // block_d,
        "BLOCK_D": block_d,
        "num_warps": 4,
        "enable_fp_fusion": True,  # the default depends on the version
    }
