# type: ignore  # what Triton makes of a function has other types than its annotations
"""Planar flow in Triton: the parameter gradients of a chain whose parameters all rows share.

With T (B, K) of tanh(a), Gamma (B, K) of the cotangents of the pre-activations, X the input of the
chain, G the cotangent of its output, and j < i "visited before":

    S      = Gamma^T T
    dw_i   = (Gamma^T X)_i + sigma sum_{j<i} S_ij u_hat_j          (before u_hat)
    du_hat = sigma ((T^T G)_i + sum_{j>i} S_ji w_j)

Each chunk of the batch yields partial products; chunks depend on the sizes alone and are added in a
fixed order, so that the gradients are the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels import math


@triton.jit(do_not_specialize=["B", "K", "chunk"])
def planar_flow_products_kernel(
    x_ptr,  # (B, D)
    g_ptr,  # (B, D)
    dladj_ptr,  # (B,)
    a_ptr,  # (B, K)
    gamma_ptr,  # (B, K)
    pn_ptr,  # (2, K)
    products_ptr,  # (chunks, K (2 D + K + 2)): Gamma^T X, T^T G, S, sums of dp, sums of gamma
    B,
    K,
    chunk,  # rows, a multiple of BLOCK_R
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A chunk's products for one tile of steps and one tile of columns, of X and G or of T."""
    dtype = products_ptr.dtype.element_ty
    D_TILES: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    first_row = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(first_row + chunk, B)
    steps = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    step_ok = steps < K
    column_tile = tl.program_id(2)
    out_ptr = products_ptr + tl.program_id(0).to(tl.int64) * K * (2 * D + K + 2)

    if column_tile < D_TILES:
        cols = column_tile.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        gx_kc = tl.zeros([BLOCK_K, BLOCK_C], dtype)
        tg_kc = tl.zeros([BLOCK_K, BLOCK_C], dtype)
        for start in range(0, chunk, BLOCK_R):
            rows = first_row + start + tl.arange(0, BLOCK_R)
            at = rows[:, None] * K + steps[None, :]
            ok = (rows < end)[:, None] & step_ok[None, :]
            gamma_rk = tl.load(gamma_ptr + at, mask=ok, other=0.0)
            a_rk = tl.load(a_ptr + at, mask=ok, other=0.0)
            t_rk = math.with_sign(math.tanh_sech2(a_rk)[0], a_rk)
            tile = rows[:, None] * D + cols[None, :]
            tile_ok = (rows < end)[:, None] & (cols < D)[None, :]
            x_rc = tl.load(x_ptr + tile, mask=tile_ok, other=0.0)
            g_rc = tl.load(g_ptr + tile, mask=tile_ok, other=0.0)
            gx_kc = tl.dot(tl.trans(gamma_rk), x_rc, gx_kc, input_precision="ieee", out_dtype=dtype)
            tg_kc = tl.dot(tl.trans(t_rk), g_rc, tg_kc, input_precision="ieee", out_dtype=dtype)
        at = steps[:, None] * D + cols[None, :]
        ok = step_ok[:, None] & (cols < D)[None, :]
        tl.store(out_ptr + at, gx_kc, mask=ok)
        tl.store(out_ptr + K.to(tl.int64) * D + at, tg_kc, mask=ok)
    else:
        others = (column_tile - D_TILES).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        other_ok = others < K
        p_k = tl.load(pn_ptr + steps, mask=step_ok, other=0.0)
        n_k = tl.load(pn_ptr + K + steps, mask=step_ok, other=0.0)
        x_k, root_s_k, s1_k, s_k, ds_k, _alpha_k = math.planar_step(p_k, n_k, CENTRED)
        s_kc = tl.zeros([BLOCK_K, BLOCK_C], dtype)
        dp_rk = tl.zeros([BLOCK_R, BLOCK_K], dtype)
        db_rk = tl.zeros([BLOCK_R, BLOCK_K], dtype)
        for start in range(0, chunk, BLOCK_R):
            rows = first_row + start + tl.arange(0, BLOCK_R)
            row_ok = rows < end
            at = rows[:, None] * K + steps[None, :]
            ok = row_ok[:, None] & step_ok[None, :]
            gamma_rk = tl.load(gamma_ptr + at, mask=ok, other=0.0)
            at_others = rows[:, None] * K + others[None, :]
            a_rc = tl.load(a_ptr + at_others, mask=row_ok[:, None] & other_ok[None, :], other=0.0)
            t_rc = math.with_sign(math.tanh_sech2(a_rc)[0], a_rc)
            s_kc = tl.dot(tl.trans(gamma_rk), t_rc, s_kc, input_precision="ieee", out_dtype=dtype)
            if column_tile == D_TILES:
                a_rk = tl.load(a_ptr + at, mask=ok, other=0.0)
                dladj_r = tl.load(dladj_ptr + rows, mask=row_ok, other=0.0)[:, None]
                dladj_r = -dladj_r if INVERSE else dladj_r
                t_rk, q_rk = math.tanh_sech2(a_rk)
                _ladj_da_rk, ladj_dp_rk, _det_rk = math.step_ladj_grads(
                    a_rk,
                    t_rk,
                    q_rk,
                    x_k[None, :],
                    root_s_k[None, :],
                    s1_k[None, :],
                    s_k[None, :],
                    ds_k[None, :],
                )
                t_rk = math.with_sign(t_rk, a_rk)
                dp_rk += math.p_grad(dladj_r, ladj_dp_rk, ds_k[None, :], t_rk, gamma_rk, INVERSE)
                db_rk += gamma_rk
        s_ptr = out_ptr + K.to(tl.int64) * (2 * D)
        at = steps[:, None] * K + others[None, :]
        tl.store(s_ptr + at, s_kc, mask=step_ok[:, None] & other_ok[None, :])
        if column_tile == D_TILES:
            sum_ptr = s_ptr + K.to(tl.int64) * K + steps
            tl.store(sum_ptr, tl.sum(dp_rk, axis=0), mask=step_ok)
            tl.store(sum_ptr + K, tl.sum(db_rk, axis=0), mask=step_ok)


@triton.jit(do_not_specialize=["K"])
def planar_flow_parameters_kernel(
    products_ptr,  # (K (2 D + K + 2),) as above, summed over the chunks
    w_ptr,  # (K, D)
    u_ptr,  # (K, D)
    u_hat_ptr,  # (K, D)
    pn_ptr,  # (2, K)
    dw_ptr,  # (K, D)
    du_ptr,  # (K, D)
    db_ptr,  # (K,)
    K,
    D: tl.constexpr,
    CENTRED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dw, du and db of one step from the products."""
    step = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    cols = tl.arange(0, BLOCK_D)
    col_ok = (cols < D)[None, :]
    tile = step[:, None] * D + cols[None, :]
    K64 = K.to(tl.int64)
    s_ptr = products_ptr + K64 * (2 * D)
    sum_ptr = s_ptr + K64 * K
    w_pd = tl.load(w_ptr + tile, mask=col_ok, other=0.0)
    u_pd = tl.load(u_ptr + tile, mask=col_ok, other=0.0)
    gx_pd = tl.load(products_ptr + tile, mask=col_ok, other=0.0)
    tg_pd = tl.load(products_ptr + K64 * D + tile, mask=col_ok, other=0.0)

    moved_pd = tl.zeros([1, BLOCK_D], w_pd.dtype)  # sum_{j<i} S_ij u_hat_j
    for start in range(0, K, BLOCK_J):
        others = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_J)
        before = others > step if INVERSE else others < step
        after = others < step if INVERSE else others > step
        before, after = before & (others < K), after & (others < K)
        s_ij = tl.load(s_ptr + step * K + others, mask=before, other=0.0)
        s_ji = tl.load(s_ptr + others * K + step, mask=after, other=0.0)
        at = others[:, None] * D + cols[None, :]
        u_hat_jd = tl.load(u_hat_ptr + at, mask=before[:, None] & col_ok, other=0.0)
        w_jd = tl.load(w_ptr + at, mask=after[:, None] & col_ok, other=0.0)
        moved_pd += tl.sum(s_ij[:, None] * u_hat_jd, axis=0)[None, :]
        tg_pd += tl.sum(s_ji[:, None] * w_jd, axis=0)[None, :]
    dw_pd = gx_pd - moved_pd if INVERSE else gx_pd + moved_pd
    du_hat_pd = -tg_pd if INVERSE else tg_pd

    p_p = tl.load(pn_ptr + step)
    n_p = tl.load(pn_ptr + K + step)
    _x_p, _root_s_p, _s1_p, _s_p, ds_p, alpha_p = math.planar_step(p_p, n_p, CENTRED)
    dp_p = tl.load(sum_ptr + step)
    dw_pd, du_pd = math.through_u_hat(w_pd, u_pd, dw_pd, du_hat_pd, dp_p, n_p, ds_p, alpha_p)
    tl.store(dw_ptr + tile, dw_pd, mask=col_ok)
    tl.store(du_ptr + tile, du_pd, mask=col_ok)
    tl.store(db_ptr + step, tl.load(sum_ptr + K + step))


def product_options(D: int, K: int) -> dict[str, int | bool]:
    """Blocks and launch options of the products."""
    return {
        "BLOCK_R": 16,
        "BLOCK_K": min(triton.next_power_of_2(K), 16),
        "BLOCK_C": max(16, min(triton.next_power_of_2(D), 32)),
        "num_warps": 4,
        "num_stages": 2,
        "maxnreg": 255,  # without it ptxas spills for the sake of occupancy
        "enable_fp_fusion": True,  # the default depends on the version
    }


def product_grid(B: int, D: int, K: int, options: dict) -> tuple[tuple[int, int, int], int]:
    """(chunks, tiles of steps, tiles of columns), enough for a large GPU, and rows in a chunk."""
    columns = triton.cdiv(D, options["BLOCK_C"]) + triton.cdiv(K, options["BLOCK_C"])
    tiles = triton.cdiv(K, options["BLOCK_K"]), columns
    chunks = max(1, min(triton.cdiv(B, 128), 512 // (tiles[0] * tiles[1])))
    chunk = triton.cdiv(triton.cdiv(B, chunks), options["BLOCK_R"]) * options["BLOCK_R"]
    return (triton.cdiv(B, chunk), *tiles), chunk


def parameter_options(D: int, K: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Blocks and launch options of the last kernel, which sees each parameter once."""
    block_d = triton.next_power_of_2(D)
    return {
        "BLOCK_J": max(1, min(triton.next_power_of_2(K), 4096 // dtype.itemsize // block_d)),
        "BLOCK_D": block_d,
        "num_warps": max(4, min(block_d * dtype.itemsize // 512, 16)),
        "maxnreg": 128,
        "enable_fp_fusion": True,
    }


def parameter_gradients(
    g: Tensor,
    dladj: Tensor,
    x: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    gamma: Tensor,
    u_hat: Tensor,
    pn: Tensor,
    centred: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dw (K, D), du (K, D), db (K,)) from what the backward kernel of a chain has left behind."""
    (B, D), K = x.shape, w.shape[0]
    flags = {"CENTRED": centred, "INVERSE": inverse}
    options = product_options(D, K)
    grid, chunk = product_grid(B, D, K, options)
    products = x.new_empty(grid[0], K * (2 * D + K + 2))
    planar_flow_products_kernel[grid](
        *(x, g, dladj, a, gamma, pn, products, B, K, chunk, D), **flags, **options
    )
    dw, du, db = torch.empty_like(w), torch.empty_like(u), x.new_empty(K)
    planar_flow_parameters_kernel[(K,)](
        *(products.sum(0), w, u, u_hat, pn, dw, du, db, K, D),
        **flags,
        **parameter_options(D, K, x.dtype),
    )
    return dw, du, db
