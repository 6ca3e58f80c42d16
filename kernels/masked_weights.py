# type: ignore  # what Triton makes of a function has other types than its annotations
"""Gradients of masked weights and of biases in Triton: dW = dP^T A under the stair, db = sum dP.

The last axis of a grid cuts the batch into chunks, which depend on the sizes alone and are added in
a fixed order, so that the gradients are the same in every run. The gradients of a chunk lie side by
side: dW_1, db_1, dW_2, db_2, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels.masked_gemm import is_sorted, units_at


@triton.jit
def add_outer_products(
    acc_nj,
    d_ptr,
    a_ptr,
    units,
    columns,
    ok_n,
    ok_j,
    begin,
    end,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc += dP^T A over rows begin .. end-1."""
    for first in range(begin, end, BLOCK_R):
        rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)
        ok_r = (rows < end)[:, None]
        d_rn = tl.load(
            d_ptr + rows[:, None] * N + units[None, :], mask=ok_r & ok_n[None, :], other=0.0
        )
        a_rj = tl.load(
            a_ptr + rows[:, None] * K + columns[None, :], mask=ok_r & ok_j[None, :], other=0.0
        )
        acc_nj = tl.dot(
            tl.trans(d_rn), a_rj, acc_nj, input_precision=PRECISION, out_dtype=acc_nj.dtype
        )
    return acc_nj


@triton.jit
def weight_tile(
    d_ptr,  # (B, N)
    a_ptr,  # (B, K)
    dw_ptr,  # (N, K)
    db_ptr,  # (N,)
    below_ptr,  # (K,)
    order_ptr,  # (N,) and prefixes (N,)
    first_unit,
    first_column,
    begin,
    end,
    N,
    K,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dW of a tile over rows begin .. end-1, exactly zero where masked; db beside column 0."""
    dtype = dw_ptr.dtype.element_ty
    k = first_unit + tl.arange(0, BLOCK_N)
    j = first_column + tl.arange(0, BLOCK_J)
    ok_n, ok_j = k < N, j < K
    units = units_at(order_ptr, k, ok_n, False)
    columns = units_at(below_ptr, j, ok_j, False)
    prefix_n = tl.load(order_ptr + N + k, mask=ok_n, other=0)
    last_unit = tl.minimum(first_unit + BLOCK_N, N)

    acc_nj = tl.zeros([BLOCK_N, BLOCK_J], dtype)
    if tl.load(order_ptr + N + last_unit - 1) > first_column:
        contiguous = False
        if LARGE:
            last_column = tl.minimum(first_column + BLOCK_J, K)
            contiguous = is_sorted(order_ptr, first_unit, last_unit)
            contiguous &= is_sorted(below_ptr, first_column, last_column)
        if contiguous:
            acc_nj = add_outer_products(
                *(acc_nj, d_ptr, a_ptr, k.to(tl.int64), j.to(tl.int64), ok_n, ok_j),
                *(begin, end, N, K, PRECISION, BLOCK_R),
            )
        else:
            acc_nj = add_outer_products(
                *(acc_nj, d_ptr, a_ptr, units, columns, ok_n, ok_j),
                *(begin, end, N, K, PRECISION, BLOCK_R),
            )
    at = units[:, None] * K + columns[None, :]
    # selected, since a sum over rows with inf may be NaN even where nothing is seen
    acc_nj = tl.where(j[None, :] < prefix_n[:, None], acc_nj, 0.0)
    tl.store(dw_ptr + at, acc_nj, mask=ok_n[:, None] & ok_j[None, :])

    if first_column == 0:
        sum_rn = tl.zeros([BLOCK_R, BLOCK_N], dtype)
        for first in range(begin, end, BLOCK_R):
            rows = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_R)
            ok = (rows < end)[:, None] & ok_n[None, :]
            sum_rn += tl.load(d_ptr + rows[:, None] * N + units[None, :], mask=ok, other=0.0)
        tl.store(db_ptr + units, tl.sum(sum_rn, axis=0), mask=ok_n)


@triton.jit(do_not_specialize=["below_at", "order_at", "grads_at", "size", "B", "chunk"])
def layer_weights_kernel(
    d_ptr,  # (B, N)
    a_ptr,  # (B, K)
    grads_ptr,  # (chunks, size): dW from grads_at on, then db
    stairs_ptr,
    below_at,
    order_at,
    grads_at,
    size,
    B,
    chunk,  # rows
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of one layer, over one chunk of rows."""
    begin = tl.program_id(2).to(tl.int64) * chunk
    dw_ptr = grads_ptr + tl.program_id(2).to(tl.int64) * size + grads_at
    weight_tile(
        *(d_ptr, a_ptr, dw_ptr, dw_ptr + tl.cast(N, tl.int64) * K),
        *(stairs_ptr + below_at, stairs_ptr + order_at),
        (tl.program_id(1).to(tl.int64) * BLOCK_N).to(tl.int32),
        (tl.program_id(0).to(tl.int64) * BLOCK_J).to(tl.int32),
        *(begin.to(tl.int32), tl.minimum(begin + chunk, B).to(tl.int32), N, K),
        *(True, PRECISION, BLOCK_N, BLOCK_J, BLOCK_R),
    )


@triton.jit
def network_layer_weights(
    d_ptr,
    a_ptr,
    dw_ptr,
    below_ptr,
    begin,
    end,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ORDER_AT: tl.constexpr,  # from the order below to that of this level
):
    """This program's tile of a layer, if the layer has so many."""
    COLUMNS: tl.constexpr = (K + BLOCK_J - 1) // BLOCK_J
    tile = tl.program_id(0)
    if tile < (N + BLOCK_N - 1) // BLOCK_N * COLUMNS:
        weight_tile(
            *(d_ptr, a_ptr, dw_ptr, dw_ptr + N * K, below_ptr, below_ptr + ORDER_AT),
            ((tile // COLUMNS).to(tl.int64) * BLOCK_N).to(tl.int32),
            ((tile % COLUMNS).to(tl.int64) * BLOCK_J).to(tl.int32),
            *(begin, end, N, K, False, PRECISION, BLOCK_N, BLOCK_J, BLOCK_R),
        )


@triton.jit(do_not_specialize=["size", "B", "chunk"])
def network_weights_kernel(
    x_ptr,  # (B, n_0)
    a_ptr,  # (B, n_l) of every hidden level, one level after the other
    d_ptr,  # (B, n_l) of every hidden level, likewise
    do_ptr,  # (B, n_{L+1})
    grads_ptr,  # (chunks, size)
    stairs_ptr,
    size,
    B,
    chunk,  # rows
    WIDTHS: tl.constexpr,  # n_0 .. n_{L+1}
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of some layer of a small network, over one chunk of rows."""
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    B64 = tl.cast(B, tl.int64)
    begin = tl.program_id(2).to(tl.int64) * chunk
    end = tl.minimum(begin + chunk, B).to(tl.int32)
    dw_ptr = grads_ptr + tl.program_id(2).to(tl.int64) * size
    below_ptr, in_ptr = stairs_ptr, x_ptr
    for layer in tl.static_range(LAYERS):
        if tl.program_id(1) == layer:
            network_layer_weights(
                do_ptr if layer == LAYERS - 1 else d_ptr,
                *(in_ptr, dw_ptr, below_ptr, begin.to(tl.int32), end),
                *(WIDTHS[layer + 1], WIDTHS[layer], PRECISION, BLOCK_N, BLOCK_J, BLOCK_R),
                WIDTHS[layer] * (1 if layer == 0 else 2),
            )
        in_ptr = a_ptr
        a_ptr += B64 * WIDTHS[layer + 1]
        d_ptr += B64 * WIDTHS[layer + 1]
        dw_ptr += WIDTHS[layer + 1] * (WIDTHS[layer] + 1)
        below_ptr += WIDTHS[layer] * (1 if layer == 0 else 2)


def weight_options(dtype: torch.dtype) -> dict[str, int | bool]:
    """Blocks and launch options of both kernels."""
    return {
        "BLOCK_N": 32,
        "BLOCK_J": 32,
        "BLOCK_R": 32 if dtype == torch.float32 else 16,
        "num_warps": 4,
        "num_stages": 3,
        "enable_fp_fusion": True,  # the default depends on the version
    }


def weight_chunks(B: int, widths: Sequence[int], options: dict) -> tuple[int, int]:
    """How many chunks the batch is cut into, enough for a large GPU, and the rows of one."""
    tiles = sum(layer_tiles(N, K, options) for K, N in pairwise(widths))
    chunks = max(1, min(triton.cdiv(B, 256), 512 // tiles))
    chunk = triton.cdiv(triton.cdiv(B, chunks), options["BLOCK_R"]) * options["BLOCK_R"]
    return triton.cdiv(B, chunk), chunk


def layer_tiles(N: int, K: int, options: dict) -> int:
    """How many tiles a layer's weights have."""
    return triton.cdiv(N, options["BLOCK_N"]) * triton.cdiv(K, options["BLOCK_J"])


def split_gradients(
    grads: Tensor, widths: Sequence[int], biases_given: int
) -> tuple[list[Tensor], list[Tensor]]:
    """dW_1, .. and db_1, .. of one row of gradients; (0,) for a layer without bias."""
    sizes = [size for K, N in pairwise(widths) for size in (N * K, N)]
    parts = grads.split(sizes)
    d_weights = [part.view(N, K) for part, (K, N) in zip(parts[::2], pairwise(widths))]
    d_biases = [
        part if biases_given >> layer & 1 else grads.new_empty(0)
        for layer, part in enumerate(parts[1::2])
    ]
    return d_weights, d_biases
