# type: ignore  # what Triton makes of a function has other types than its annotations
"""A whole small masked network in Triton: one launch for a pass over all of its layers.

A program owns BLOCK_B rows and walks through the layers tile by tile. Activations of its rows go
through global memory, where no other program touches them, with a barrier after each layer: Triton
cannot take a slice of a tensor in registers, and a dot product over a whole level does not fit
there. They stay in the caches. Levels lie one after the other in a buffer, (B, n_l) each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastflow.kernels import activations, affine
from fastflow.kernels.masked_gemm import product_tile, pullback_tile


@triton.jit
def layer_forward(
    in_ptr,
    w_ptr,
    bias_ptr,
    term_ptr,
    p_ptr,
    a_ptr,
    o_ptr,
    below_ptr,
    order_ptr,
    rows,
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
    """All units of a level, for the rows of a program."""
    SKIPS: tl.constexpr = RESIDUAL and LEVEL % 2 == 1 and LEVEL >= 3 and LEVEL <= HIDDEN
    AS_IS: tl.constexpr = RESIDUAL and LEVEL == HIDDEN
    for first in range(0, N, BLOCK_N):
        product_tile(
            *(in_ptr, w_ptr, bias_ptr, term_ptr),
            p_ptr - B64 * (2 * N) if SKIPS else None,  # two levels below, as wide as this one
            o_ptr if LEVEL > HIDDEN else p_ptr,
            a_ptr if LEVEL <= HIDDEN else None,
            *(below_ptr, order_ptr, rows, first, B, N, K),
            activations.NONE if AS_IS else ACTIVATION,
            *(False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
    tl.debug_barrier()


@triton.jit(do_not_specialize=["B"])
def network_forward_kernel(
    x_ptr,  # (B, n_0)
    terms,  # (B, n_l) or None for every layer
    weights,  # (n_l, n_{l-1})
    biases,  # (n_l,) or None
    stairs_ptr,
    p_ptr,  # (B, n_l) of every hidden level, or None: pre-activations
    a_ptr,  # (B, n_l) of every hidden level: activations
    o_ptr,  # (B, n_{L+1}) outputs
    y_ptr,  # (B, D) and
    ladj_ptr,  # (B,) of the affine step, if there is one
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
    BLOCK_D: tl.constexpr,
):
    """The outputs of all layers for BLOCK_B rows, then the affine step."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    B64 = tl.cast(B, tl.int64)
    HIDDEN: tl.constexpr = len(WIDTHS) - 2
    below_ptr, order_ptr = stairs_ptr, stairs_ptr + WIDTHS[0]
    in_ptr = x_ptr
    for level in tl.static_range(1, HIDDEN + 2):
        layer_forward(
            *(in_ptr, weights[level - 1], biases[level - 1], terms[level - 1]),
            *(p_ptr, a_ptr, o_ptr, below_ptr, order_ptr, rows, B, B64),
            *(level, HIDDEN, WIDTHS[level], WIDTHS[level - 1], ACTIVATION, RESIDUAL),
            *(PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
        in_ptr = a_ptr
        a_ptr += B64 * WIDTHS[level]
        if p_ptr is not None:
            p_ptr += B64 * WIDTHS[level]
        below_ptr = order_ptr
        order_ptr += 2 * WIDTHS[level]
    if SCALE != affine.NONE:
        affine.affine_tile(
            *(x_ptr, o_ptr, y_ptr, ladj_ptr, stairs_ptr, WIDTHS[0] + 2 * HIDDEN_UNITS, rows, B),
            *(WIDTHS[0], SCALE, C0, C1, BLOCK_B, BLOCK_D),
        )


@triton.jit
def layer_backward(
    d_ptr,
    w_ptr,
    p_ptr,
    below_d_ptr,
    a_ptr,
    dx_ptr,
    past_ptr,
    below_ptr,
    order_ptr,
    rows,
    B,
    B64,
    LEVEL: tl.constexpr,  # the lower level
    HIDDEN: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PARAM_GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The cotangents of all units of a level, given those of the level above."""
    SKIPPED: tl.constexpr = RESIDUAL and LEVEL % 2 == 1 and LEVEL >= 1 and LEVEL + 2 <= HIDDEN
    AS_IS: tl.constexpr = RESIDUAL and LEVEL == HIDDEN
    for first in range(0, K, BLOCK_N):
        if LEVEL == 0:
            pullback_tile(
                *(d_ptr, w_ptr, None, past_ptr, dx_ptr, None),
                *(below_ptr, order_ptr, rows, first, B, N, K),
                *(activations.NONE, False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
            )
        else:
            pullback_tile(
                *(d_ptr, w_ptr, p_ptr),
                below_d_ptr + B64 * (2 * K) if SKIPPED else None,
                *(below_d_ptr, a_ptr if PARAM_GRADS else None),
                *(below_ptr, order_ptr, rows, first, B, N, K),
                activations.NONE if AS_IS else ACTIVATION,
                *(False, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
            )
    tl.debug_barrier()


@triton.jit(do_not_specialize=["B"])
def network_backward_kernel(
    dy_ptr,  # (B, D) and
    dladj_ptr,  # (B,) of the affine step, if there is one
    x_ptr,  # (B, n_0)
    weights,  # (n_l, n_{l-1}) for every layer
    stairs_ptr,
    p_ptr,  # (B, n_l) of every hidden level: pre-activations
    o_ptr,  # (B, n_{L+1}) outputs, for the affine step
    a_ptr,  # (B, n_l) of every hidden level, if PARAM_GRADS: activations
    d_ptr,  # (B, n_l) of every hidden level: cotangents of the pre-activations
    do_ptr,  # (B, n_{L+1}) cotangent of the outputs, made here if there is an affine step
    dx_ptr,  # (B, n_0) or None
    past_ptr,  # (B, n_0) or None: what reaches x past the network, for dx after an affine step
    B,
    WIDTHS: tl.constexpr,  # n_0 .. n_{L+1}
    HIDDEN_UNITS: tl.constexpr,  # n_1 + .. + n_L
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALE: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    PARAM_GRADS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The affine step's cotangents, then those of all levels from the outputs to x."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    B64 = tl.cast(B, tl.int64)
    HIDDEN: tl.constexpr = len(WIDTHS) - 2
    ORDER_AT: tl.constexpr = WIDTHS[0] + 2 * HIDDEN_UNITS
    if SCALE != affine.NONE:
        affine.affine_grad_tile(
            *(dy_ptr, dladj_ptr, x_ptr, o_ptr, past_ptr, do_ptr, stairs_ptr, ORDER_AT, rows, B),
            *(WIDTHS[0], SCALE, C0, C1, BLOCK_D),
        )
        tl.debug_barrier()
    order_ptr = stairs_ptr + ORDER_AT
    p_ptr += B64 * HIDDEN_UNITS
    d_ptr += B64 * HIDDEN_UNITS
    if PARAM_GRADS:
        a_ptr += B64 * HIDDEN_UNITS
    above_ptr = do_ptr
    for i in tl.static_range(HIDDEN + (dx_ptr is not None)):
        below_ptr = order_ptr - WIDTHS[HIDDEN - i] * (1 if i == HIDDEN else 2)
        if i < HIDDEN:
            p_ptr -= B64 * WIDTHS[HIDDEN - i]
            d_ptr -= B64 * WIDTHS[HIDDEN - i]
            if PARAM_GRADS:
                a_ptr -= B64 * WIDTHS[HIDDEN - i]
        layer_backward(
            *(above_ptr, weights[HIDDEN - i], p_ptr, d_ptr, a_ptr, dx_ptr, past_ptr),
            *(
                below_ptr,
                order_ptr,
                rows,
                B,
                B64,
                HIDDEN - i,
                HIDDEN,
                WIDTHS[HIDDEN - i + 1],
                WIDTHS[HIDDEN - i],
            ),
            *(ACTIVATION, RESIDUAL, PARAM_GRADS),
            *(PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
        )
        above_ptr = d_ptr
        order_ptr = below_ptr


def is_small(widths: tuple[int, ...]) -> bool:
    """Whether one program per rows is to walk through all layers of a network.

    Every program reads all weights, which the caches hold; every layer is code of its own.
    """
    return max(widths) <= 128 and len(widths) <= 9


def network_options(widths: tuple[int, ...]) -> dict[str, int | bool]:
    """Blocks and launch options of both kernels: few rows each, so that small batches spread."""
    return {
        "BLOCK_B": 16,
        "BLOCK_N": 32 if max(widths) <= 32 else 64,
        "BLOCK_K": 16,
        "BLOCK_D": max(4, min(triton.next_power_of_2(widths[0]), 16)),
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 255,  # without it ptxas spills for the sake of occupancy
        "enable_fp_fusion": True,  # the default depends on the version
    }
