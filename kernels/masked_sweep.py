# type: ignore  # what Triton makes of a function has other types than its annotations
"""The inverse of an affine autoregressive layer in Triton: one sweep over the features.

Stage r computes the units that see r features, level by level, then outputs r, then x_r; backward
undoes the stages from the last to the first. A program owns BLOCK_B rows and walks through all
stages with the tiles of `masked_gemm`: a unit's sum is made once, from the prefix that is there.

A tile may reach beyond its stage. Units that are not due yet get a value that their own stage
replaces, from operands that start as zeros; cotangents that are complete are computed again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.kernels import activations, affine
from fastflow.kernels.masked_gemm import count_up_to, product_tile, pullback_tile


@triton.jit
def due_units(
    prefix_ptr,
    r,
    before,
    known,
    block_before,
    block_known,
    N,
    LEVEL: tl.constexpr,
    HIDDEN: tl.constexpr,
    FEATURES: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The sorted units begin .. end-1 of a level that stage r computes.

    Of the level below, `before` units were known before this stage, `known` are now; of the level
    that a residual block adds to its last one, `block_before` and `block_known`.
    """
    if LEVEL > HIDDEN:
        begin, end = r + r, tl.minimum(r + r + 2, 2 * FEATURES)
    else:
        begin = tl.where(r == 0, 0, count_up_to(prefix_ptr, N, before))
        end = count_up_to(prefix_ptr, N, known)
        if RESIDUAL and LEVEL % 2 == 1 and LEVEL >= 3:
            begin, end = tl.minimum(begin, block_before), tl.minimum(end, block_known)
    return begin, end


@triton.jit
def stage_forward(
    in_ptr,
    w_ptr,
    bias_ptr,
    term_ptr,
    p_ptr,
    a_ptr,
    below_ptr,
    order_ptr,
    rows,
    begin,
    end,
    B,
    B64,
    LEVEL: tl.constexpr,
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Units begin .. end-1 of a level, for the rows of a program."""
    SKIPS: tl.constexpr = RESIDUAL and LEVEL % 2 == 1 and LEVEL >= 3 and LEVEL <= HIDDEN
    AS_IS: tl.constexpr = RESIDUAL and LEVEL == HIDDEN
    for first in range(begin, end, BLOCK_N):
        product_tile(
            *(in_ptr, w_ptr, bias_ptr, term_ptr),
            p_ptr - B64 * (2 * N) if SKIPS else None,
            *(p_ptr, a_ptr if LEVEL <= HIDDEN else None),
            *(below_ptr, order_ptr, rows, first, B, N, K),
            activations.NONE if AS_IS else ACTIVATION,
            *(False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
    tl.debug_barrier()


@triton.jit(do_not_specialize=["B"])
def sweep_kernel(
    y_ptr,  # (B, D)
    terms,  # (B, n_l) or None for every layer
    weights,  # (n_l, n_{l-1})
    biases,  # (n_l,) or None
    stairs_ptr,
    p_ptr,  # (B, n_l) of every level but the input: pre-activations and outputs
    a_ptr,  # (B, n_l) of every hidden level, zeros: activations
    x_ptr,  # (B, D), zeros
    ladj_ptr,  # (B,)
    B,
    WIDTHS: tl.constexpr,  # n_0 .. n_{L+1}
    HIDDEN_UNITS: tl.constexpr,  # n_1 + .. + n_L
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x = (y - m) / s, for the gate m + (y - m) / s, and ladj = -sum of l, feature by feature."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    B64 = tl.cast(B, tl.int64)
    HIDDEN: tl.constexpr = len(WIDTHS) - 2
    D: tl.constexpr = WIDTHS[0]
    o_ptr = p_ptr + B64 * HIDDEN_UNITS
    ladj_b = tl.zeros([BLOCK_B], x_ptr.dtype.element_ty)
    for r in range(0, D + 1):
        below_ptr, order_ptr = stairs_ptr, stairs_ptr + D
        in_ptr, p_level_ptr, a_level_ptr = x_ptr, p_ptr, a_ptr
        before, known = r - 1, r
        block_before, block_known = before, known
        for level in tl.static_range(1, HIDDEN + 2):
            before, known = due_units(
                *(order_ptr + WIDTHS[level], r, before, known, block_before, block_known),
                *(WIDTHS[level], level, HIDDEN, D, RESIDUAL),
            )
            if level % 2 == 1:
                block_before, block_known = before, known
            stage_forward(
                *(in_ptr, weights[level - 1], biases[level - 1], terms[level - 1]),
                *(p_level_ptr, a_level_ptr, below_ptr, order_ptr, rows, before, known, B, B64),
                *(level, HIDDEN, WIDTHS[level], WIDTHS[level - 1], ACTIVATION, RESIDUAL),
                *(PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
            )
            in_ptr = a_level_ptr
            p_level_ptr += B64 * WIDTHS[level]
            a_level_ptr += B64 * WIDTHS[level]
            below_ptr = order_ptr
            order_ptr += 2 * WIDTHS[level]
        if r < D:
            at, m_at, a_at, ok = feature(stairs_ptr, D + 2 * HIDDEN_UNITS, rows, r, B, D)
            y_b = tl.load(y_ptr + at, mask=ok, other=0.0)
            m_b = tl.load(o_ptr + m_at, mask=ok, other=0.0)
            a_b = tl.load(o_ptr + a_at, mask=ok, other=0.0)
            _s_b, l_b = affine.scale_of(a_b, SCALE, C0, C1)
            x_b = (y_b - m_b) * affine.inverse_scale(a_b, SCALE, C0, C1)
            if SCALE == affine.GATE:
                x_b += m_b
            tl.store(x_ptr + at, x_b, mask=ok)
            ladj_b -= l_b
            tl.debug_barrier()
    tl.store(ladj_ptr + rows, ladj_b, mask=rows < B)


@triton.jit
def feature(stairs_ptr, order_at, rows, r, B, D):
    """Where the feature at sorted position r is in tensors (B, D), and its m and a in (B, 2 D)."""
    column = tl.load(stairs_ptr + r)
    shift = tl.load(stairs_ptr + order_at + (r + r))
    raw = tl.load(stairs_ptr + order_at + (r + r) + 1)
    return rows * D + column, rows * (2 * D) + shift, rows * (2 * D) + raw, rows < B


@triton.jit
def stage_backward(
    d_ptr,
    w_ptr,
    p_ptr,
    out_ptr,
    a_ptr,
    below_ptr,
    order_ptr,
    rows,
    begin,
    end,
    B,
    B64,
    LEVEL: tl.constexpr,  # the lower level
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The cotangents of units begin .. end-1 of a level, given those of later ones above."""
    SKIPPED: tl.constexpr = RESIDUAL and LEVEL % 2 == 1 and LEVEL >= 1 and LEVEL + 2 <= HIDDEN
    AS_IS: tl.constexpr = LEVEL == 0 or (RESIDUAL and LEVEL == HIDDEN)
    for first in range(begin, end, BLOCK_N):
        pullback_tile(
            *(d_ptr, w_ptr, p_ptr if LEVEL > 0 else None),
            out_ptr + B64 * (2 * K) if SKIPPED else None,
            *(out_ptr, a_ptr if LEVEL > 0 else None),
            *(below_ptr, order_ptr, rows, first, B, N, K),
            activations.NONE if AS_IS else ACTIVATION,
            *(False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
    tl.debug_barrier()


@triton.jit
def due_at(
    stairs_ptr,
    r,
    WIDTHS: tl.constexpr,
    LEVEL: tl.constexpr,
    HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The sorted units of a hidden level that stage r computes."""
    before, known = r - 1, r
    block_before, block_known = before, known
    prefix_ptr = stairs_ptr + WIDTHS[0] + WIDTHS[1]
    for level in tl.static_range(1, LEVEL + 1):
        before, known = due_units(
            *(prefix_ptr, r, before, known, block_before, block_known),
            *(WIDTHS[level], level, HIDDEN, WIDTHS[0], RESIDUAL),
        )
        if level % 2 == 1:
            block_before, block_known = before, known
        prefix_ptr += WIDTHS[level] + WIDTHS[level + 1]
    return before, known


@triton.jit(do_not_specialize=["B"])
def sweep_back_kernel(
    dx_ptr,  # (B, D)
    dladj_ptr,  # (B,)
    x_ptr,  # (B, D) what the sweep has found
    weights,  # (n_l, n_{l-1}) for every layer
    stairs_ptr,
    p_ptr,  # (B, n_l) of every level but the input: pre-activations and outputs
    a_ptr,  # (B, n_l) of every hidden level: activations
    d_ptr,  # (B, n_l) of every level but the input, zeros: cotangents of pre-activations, outputs
    past_ptr,  # (B, D) scratch: what reaches x through the network
    dy_ptr,  # (B, D)
    B,
    WIDTHS: tl.constexpr,  # n_0 .. n_{L+1}
    HIDDEN_UNITS: tl.constexpr,  # n_1 + .. + n_L
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dy and the cotangents of all levels, from the last stage of the sweep to the first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    B64 = tl.cast(B, tl.int64)
    HIDDEN: tl.constexpr = len(WIDTHS) - 2
    D: tl.constexpr = WIDTHS[0]
    ORDER_AT: tl.constexpr = D + 2 * HIDDEN_UNITS
    dladj_b = tl.load(dladj_ptr + rows, mask=rows < B, other=0.0)
    for i in range(0, D + 1):
        r = D - i
        if r < D:
            stage_backward(
                *(d_ptr, weights[0], p_ptr, past_ptr, a_ptr, stairs_ptr, stairs_ptr + D, rows),
                *(r, r + 1, B, B64, 0, HIDDEN, WIDTHS[1], D, ACTIVATION, RESIDUAL),
                *(PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
            )
            at, m_at, a_at, ok = feature(stairs_ptr, ORDER_AT, rows, r, B, D)
            o_ptr, do_ptr = p_ptr + B64 * HIDDEN_UNITS, d_ptr + B64 * HIDDEN_UNITS
            g_b = tl.load(dx_ptr + at, mask=ok, other=0.0)
            g_b += tl.load(past_ptr + at, mask=ok, other=0.0)
            x_b = tl.load(x_ptr + at, mask=ok, other=0.0)
            a_b = tl.load(o_ptr + a_at, mask=ok, other=0.0)
            dy_b = g_b * affine.inverse_scale(a_b, SCALE, C0, C1)
            if SCALE == affine.GATE:
                x_b -= tl.load(o_ptr + m_at, mask=ok, other=0.0)
                dm_b = g_b - dy_b
            else:
                dm_b = -dy_b
            da_b = (-g_b * x_b - dladj_b) * affine.log_slope(a_b, SCALE, C0, C1)
            tl.store(dy_ptr + at, dy_b, mask=ok)
            tl.store(do_ptr + m_at, dm_b, mask=ok)
            tl.store(do_ptr + a_at, da_b, mask=ok)
            tl.debug_barrier()
        order_ptr = stairs_ptr + ORDER_AT
        units = B64 * HIDDEN_UNITS
        for step in tl.static_range(HIDDEN):
            below_ptr = order_ptr - 2 * WIDTHS[HIDDEN - step]
            above = units
            units -= B64 * WIDTHS[HIDDEN - step]
            begin, end = due_at(stairs_ptr, r, WIDTHS, HIDDEN - step, HIDDEN, RESIDUAL)
            stage_backward(
                *(d_ptr + above, weights[HIDDEN - step], p_ptr + units, d_ptr + units),
                *(a_ptr + units, below_ptr, order_ptr, rows, begin, end, B, B64),
                *(HIDDEN - step, HIDDEN, WIDTHS[HIDDEN - step + 1], WIDTHS[HIDDEN - step]),
                *(ACTIVATION, RESIDUAL, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
            )
            order_ptr = below_ptr


def sweep_options() -> dict[str, int | bool]:
    """Blocks and launch options of both kernels: few rows, since a row's sweep is long."""
    return {
        "BLOCK_B": 16,
        "BLOCK_N": 32,
        "BLOCK_K": 16,
        "num_warps": 8,
        "num_stages": 2,
        "maxnreg": 255,  # without it ptxas spills for the sake of occupancy
        "enable_fp_fusion": True,  # the default depends on the version
    }
