# type: ignore  # what Triton makes of a function has other types than its annotations
"""One layer of a masked network in Triton: a launch each for its product and its pullback.

Axis 0 of a grid walks over rows, axis 1 over tiles of units, those with the longest sums first, so
that the stair leaves no multiprocessor idle at the end. `masked_gemm` says what a tile computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastflow.kernels.masked_gemm import product_tile, pullback_tile


@triton.jit(do_not_specialize=["below_at", "order_at", "B"])
def layer_product_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    term_ptr,
    skip_ptr,
    p_ptr,
    out_ptr,
    stairs_ptr,
    below_at,
    order_at,
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`product_tile`, from the last units, which see the most, to the first."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    product_tile(
        *(a_ptr, w_ptr, bias_ptr, term_ptr, skip_ptr, p_ptr, out_ptr),
        *(stairs_ptr + below_at, stairs_ptr + order_at),
        *(rows, (tile.to(tl.int64) * BLOCK_N).to(tl.int32), B, N, K),
        *(ACTIVATION, True, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


@triton.jit(do_not_specialize=["below_at", "order_at", "B"])
def layer_pullback_kernel(
    d_ptr,
    w_ptr,
    p_ptr,
    skip_ptr,
    out_ptr,
    a_ptr,
    stairs_ptr,
    below_at,
    order_at,
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`pullback_tile`, from the first units, which the most units see, to the last."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    pullback_tile(
        *(d_ptr, w_ptr, p_ptr, skip_ptr, out_ptr, a_ptr),
        *(stairs_ptr + below_at, stairs_ptr + order_at),
        *(rows, (tl.program_id(1).to(tl.int64) * BLOCK_N).to(tl.int32), B, N, K),
        *(ACTIVATION, True, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K),
    )


def layer_options(N: int, K: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Blocks and launch options of both kernels, for a layer from K units to N.

    What a tile computes beyond the stair is about (BLOCK_N + BLOCK_K) / 2 for every row of units:
    a tenth of what a layer of 512 or 1024 units has below its stair.
    """
    wide = min(N, K) >= 1024
    return {
        "BLOCK_B": 64,
        "BLOCK_N": 64 if wide else 32,
        "BLOCK_K": 16,
        "num_warps": 8 if wide else 4,
        "num_stages": 3,
        "enable_fp_fusion": True,  # the default depends on the version
    }
