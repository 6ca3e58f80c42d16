# type: ignore  # what Triton makes of a function has other types than its annotations
"""Masked matrix products in Triton which skip what the mask removes.

Letters: layer W (N, K) between a level of K units and one of N. `stairs` (see `fastflow.masks`)
sorts both levels so that unit k of the upper one sees the first prefix_k of the lower one, a
nondecreasing number. Kernels walk through sorted positions and find the units by their order:

    product_tile    P = A W^T + ...       a tile of units contracts up to the prefix of its last one
    pullback_tile   dA = dP W, ...        a tile of units below starts at the first unit seeing it
    weight_tile     dW = dP^T A           tiles that no unit sees are zero and cost a store

Inside those ranges the mask decides which weights are loaded at all, so that masked-out ones may
hold anything. Where all of a tile's mask is set and the levels are stored in their order, as
fastflow's own hidden levels are, loads are contiguous (SORTED); whether they are is seen on the
device, since a launch must not wait for it. The order of a row's sums depends on the sizes alone.

A tile leaves its plain sums in its output and takes them up again slice by slice: what is left to
do with them, an activation above all, would spill registers if done to a whole tile at once.
"""

import triton
import triton.language as tl

from fastflow.kernels import activations

SCAN = tl.constexpr(256)  # numbers of a staircase that are read at once
SLICE = tl.constexpr(512)  # sums of a tile that are finished at once


@triton.jit
def is_sorted(order_ptr, begin, end):
    """Whether the units at sorted positions begin .. end-1 are stored there."""
    moved = tl.zeros([SCAN], tl.int32)
    for first in range(begin, end, SCAN):
        k = first + tl.arange(0, SCAN)
        units = tl.load(order_ptr + k, mask=k < end, other=0)
        moved += ((units != k) & (k < end)).to(tl.int32)
    return tl.sum(moved) == 0


@triton.jit
def count_up_to(prefix_ptr, N, bound):
    """How many units have a prefix of at most `bound`."""
    found = tl.zeros([SCAN], tl.int32)
    for first in range(0, N, SCAN):
        k = first + tl.arange(0, SCAN)
        prefix = tl.load(prefix_ptr + k, mask=k < N, other=0)
        found += ((prefix <= bound) & (k < N)).to(tl.int32)
    return tl.sum(found)


@triton.jit
def units_at(order_ptr, k, ok, SORTED: tl.constexpr):
    """The units at sorted positions k."""
    if SORTED:
        units = k
    else:
        units = tl.load(order_ptr + k, mask=ok, other=0)
    return units.to(tl.int64)


@triton.jit
def add_products(
    acc_bn,
    a_ptr,
    w_ptr,
    below_ptr,
    rows,
    ok_b,
    units,
    prefix_n,
    begin,
    end,
    K,
    MASKED: tl.constexpr,
    SORTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc += A W^T over sorted positions begin .. end-1; a multiple of BLOCK_K unless MASKED."""
    dtype = w_ptr.dtype.element_ty
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        ok_k = k < end
        columns = units_at(below_ptr, k, ok_k, SORTED)
        a_at = rows[:, None] * K + columns[None, :]
        w_at = units[:, None] * K + columns[None, :]
        if MASKED:
            a_bk = tl.load(a_ptr + a_at, mask=ok_b[:, None] & ok_k[None, :], other=0.0)
            w_nk = tl.load(w_ptr + w_at, mask=k[None, :] < prefix_n[:, None], other=0.0)
        else:
            a_bk = tl.load(a_ptr + a_at, mask=ok_b[:, None], other=0.0)
            w_nk = tl.load(w_ptr + w_at)
        acc_bn = tl.dot(a_bk, tl.trans(w_nk), acc_bn, input_precision=PRECISION, out_dtype=dtype)
    return acc_bn


@triton.jit
def product_tile(
    a_ptr,  # (B, K)
    w_ptr,  # (N, K)
    bias_ptr,  # (N,) or None
    term_ptr,  # (B, N) or None
    skip_ptr,  # (B, N) or None: pre-activations that a residual block adds
    p_ptr,  # (B, N) or None
    out_ptr,  # (B, N) or None: act(P)
    below_ptr,  # (K,) order of the level below
    order_ptr,  # (N,) order of this level, and its prefixes (N,)
    rows,
    first,  # sorted position of the tile's first unit
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,
    LARGE: tl.constexpr,  # whether contiguous loads pay for finding out
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P = A W^T + bias + term + skip and act(P), for a tile of rows and of units."""
    prefix_ptr = order_ptr + N
    ok_b = rows < B
    k_n = first + tl.arange(0, BLOCK_N)
    ok_n = k_n < N
    units = units_at(order_ptr, k_n, ok_n, False)
    prefix_n = tl.load(prefix_ptr + k_n, mask=ok_n, other=0)
    end = tl.load(prefix_ptr + tl.minimum(first + BLOCK_N, N) - 1)

    acc_bn = tl.zeros([BLOCK_B, BLOCK_N], w_ptr.dtype.element_ty)
    dense = 0  # where every unit of the tile sees everything
    if LARGE:
        dense = tl.load(prefix_ptr + first)
        dense -= dense % BLOCK_K
        if is_sorted(below_ptr, 0, dense):
            acc_bn = add_products(
                *(acc_bn, a_ptr, w_ptr, below_ptr, rows, ok_b, units, prefix_n),
                *(0, dense, K, False, True, PRECISION, BLOCK_K),
            )
        else:
            acc_bn = add_products(
                *(acc_bn, a_ptr, w_ptr, below_ptr, rows, ok_b, units, prefix_n),
                *(0, dense, K, False, False, PRECISION, BLOCK_K),
            )
    acc_bn = add_products(
        *(acc_bn, a_ptr, w_ptr, below_ptr, rows, ok_b, units, prefix_n),
        *(dense, end, K, True, False, PRECISION, BLOCK_K),
    )

    tl.static_assert(SLICE // BLOCK_B <= BLOCK_N, "a slice must not reach beyond its tile")
    raw_ptr = p_ptr if out_ptr is None else out_ptr
    tl.store(
        raw_ptr + rows[:, None] * N + units[None, :], acc_bn, mask=ok_b[:, None] & ok_n[None, :]
    )
    tl.debug_barrier()
    for slice_first in range(first, first + BLOCK_N, SLICE // BLOCK_B):
        finish_product(
            *(raw_ptr, bias_ptr, term_ptr, skip_ptr, p_ptr, out_ptr, order_ptr),
            *(rows, slice_first, B, N, ACTIVATION, SLICE // BLOCK_B),
        )


@triton.jit
def finish_product(
    raw_ptr,
    bias_ptr,
    term_ptr,
    skip_ptr,
    p_ptr,
    out_ptr,
    order_ptr,
    rows,
    first,
    B,
    N,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What `product_tile` does to the plain sums A W^T of WIDTH units."""
    k = first + tl.arange(0, WIDTH)
    units = units_at(order_ptr, k, k < N, False)
    at = rows[:, None] * N + units[None, :]
    ok = (rows < B)[:, None] & (k < N)[None, :]
    p_bn = tl.load(raw_ptr + at, mask=ok, other=0.0)
    if bias_ptr is not None:
        p_bn += tl.load(bias_ptr + units, mask=k < N, other=0.0)[None, :]
    if term_ptr is not None:
        p_bn += tl.load(term_ptr + at, mask=ok, other=0.0)
    if skip_ptr is not None:
        p_bn += tl.load(skip_ptr + at, mask=ok, other=0.0)
    if p_ptr is not None:
        tl.store(p_ptr + at, p_bn, mask=ok)
    if out_ptr is not None:
        tl.store(out_ptr + at, activations.value(p_bn, ACTIVATION), mask=ok)


@triton.jit
def add_pullbacks(
    acc_bj,
    d_ptr,
    w_ptr,
    order_ptr,
    rows,
    ok_b,
    j,
    columns,
    begin,
    end,
    N,
    K,
    MASKED: tl.constexpr,
    SORTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc += dP W over sorted positions begin .. end-1 of the upper level."""
    dtype = w_ptr.dtype.element_ty
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        ok_k = k < N
        units = units_at(order_ptr, k, ok_k, SORTED)
        d_at = rows[:, None] * N + units[None, :]
        d_bk = tl.load(d_ptr + d_at, mask=ok_b[:, None] & ok_k[None, :], other=0.0)
        if MASKED:
            prefix_k = tl.load(order_ptr + N + k, mask=ok_k, other=0)
            seen = j[None, :] < prefix_k[:, None]
        else:
            seen = ok_k[:, None] & (j < K)[None, :]
        w_at = units[:, None] * K + columns[None, :]
        w_kj = tl.load(w_ptr + w_at, mask=seen, other=0.0)
        acc_bj = tl.dot(d_bk, w_kj, acc_bj, input_precision=PRECISION, out_dtype=dtype)
    return acc_bj


@triton.jit
def pullback_tile(
    d_ptr,  # (B, N) cotangent of this level's pre-activations
    w_ptr,  # (N, K)
    p_ptr,  # (B, K) pre-activations of the level below, or None if that is the input
    skip_ptr,  # (B, K) or None: a cotangent to add, in memory of its own
    out_ptr,  # (B, K) cotangent of P below, of x if that is the input
    a_ptr,  # (B, K) or None: act(P) below, for the gradients of the weights
    below_ptr,  # (K,)
    order_ptr,  # (N,) and prefixes (N,)
    rows,
    first,
    B,
    N,
    K,
    ACTIVATION: tl.constexpr,  # of the level below
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(dP W) act'(P) + skip and act(P), for a tile of rows and of units of the level below."""
    prefix_ptr = order_ptr + N
    ok_b = rows < B
    j = first + tl.arange(0, BLOCK_N)
    ok_j = j < K
    columns = units_at(below_ptr, j, ok_j, False)
    begin = count_up_to(prefix_ptr, N, first)
    begin -= begin % BLOCK_K

    acc_bj = tl.zeros([BLOCK_B, BLOCK_N], w_ptr.dtype.element_ty)
    dense = N  # from where on every unit sees all of the tile
    if LARGE:
        dense = count_up_to(prefix_ptr, N, tl.minimum(first + BLOCK_N, K) - 1)
        dense += BLOCK_K - 1
        dense -= dense % BLOCK_K
    acc_bj = add_pullbacks(
        *(acc_bj, d_ptr, w_ptr, order_ptr, rows, ok_b, j, columns),
        *(begin, dense, N, K, True, False, PRECISION, BLOCK_K),
    )
    if LARGE:
        last = tl.minimum(first + BLOCK_N, K)
        if is_sorted(order_ptr, dense, N) & is_sorted(below_ptr, first, last):
            acc_bj = add_pullbacks(
                *(acc_bj, d_ptr, w_ptr, order_ptr, rows, ok_b, j, j.to(tl.int64)),
                *(dense, N, N, K, False, True, PRECISION, BLOCK_K),
            )
        else:
            acc_bj = add_pullbacks(
                *(acc_bj, d_ptr, w_ptr, order_ptr, rows, ok_b, j, columns),
                *(dense, N, N, K, False, False, PRECISION, BLOCK_K),
            )

    tl.static_assert(SLICE // BLOCK_B <= BLOCK_N, "a slice must not reach beyond its tile")
    at = rows[:, None] * K + columns[None, :]
    tl.store(out_ptr + at, acc_bj, mask=ok_b[:, None] & ok_j[None, :])
    if (p_ptr is not None) | (skip_ptr is not None):
        tl.debug_barrier()
        for slice_first in range(first, first + BLOCK_N, SLICE // BLOCK_B):
            finish_pullback(
                *(p_ptr, skip_ptr, out_ptr, a_ptr, below_ptr),
                *(rows, slice_first, B, K, ACTIVATION, SLICE // BLOCK_B),
            )


@triton.jit
def finish_pullback(
    p_ptr,
    skip_ptr,
    out_ptr,
    a_ptr,
    below_ptr,
    rows,
    first,
    B,
    K,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """What `pullback_tile` does to the plain sums dP W of WIDTH units."""
    j = first + tl.arange(0, WIDTH)
    at = rows[:, None] * K + units_at(below_ptr, j, j < K, False)[None, :]
    ok = (rows < B)[:, None] & (j < K)[None, :]
    d_bj = tl.load(out_ptr + at, mask=ok, other=0.0)
    if p_ptr is not None:
        p_bj = tl.load(p_ptr + at, mask=ok, other=0.0)
        if ACTIVATION != activations.NONE:
            d_bj *= activations.slope(p_bj, ACTIVATION)
        if a_ptr is not None:
            tl.store(a_ptr + at, activations.value(p_bj, ACTIVATION), mask=ok)
    if skip_ptr is not None:
        d_bj += tl.load(skip_ptr + at, mask=ok, other=0.0)
    tl.store(out_ptr + at, d_bj, mask=ok)
