# type: ignore  # what Triton makes of a function has other types than its annotations
"""Planar flow in Triton: one kernel per direction of a chain, one for the backward of either.

Letters and equations are those of `fastflow.reference.planar_flow`. A program owns BLOCK_B rows,
keeps their states in registers and walks through the steps. Parameters are a tile of one row
(SHARED) or of one row per row of z; shapes carry the suffix p for that dimension, 1 or BLOCK_B.
The blocks depend on D and the dtype alone, so that a row's result does not depend on its batch.
"""

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastflow.kernels import math
from fastflow.kernels.launch import device_of
from fastflow.kernels.planar_flow_shared import parameter_gradients


@triton.jit(do_not_specialize=["B", "K"])
def planar_flow_forward_kernel(
    z_ptr,  # (B, D)
    w_ptr,  # (P, K, D), P = 1 if SHARED else B
    u_ptr,  # (P, K, D)
    b_ptr,  # (P, K)
    out_ptr,  # (B, D)
    ladj_ptr,  # (B,)
    a_ptr,  # (B, K)
    B,
    K,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    CENTRED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = z + sigma sum_i u_hat_i tanh(a_i) and its ladj; sigma = -1 if INVERSE."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_D)
    row_ok = rows < B
    tile = rows[:, None] * D + cols[None, :]
    tile_ok = row_ok[:, None] & (cols < D)[None, :]
    sets = tl.zeros([1], tl.int64) if SHARED else rows  # which set of parameters
    set_ok = sets < B

    z_bd = tl.load(z_ptr + tile, mask=tile_ok, other=0.0)
    ladj_b = tl.zeros([BLOCK_B], z_bd.dtype)
    for i in range(K):
        k = K - 1 - i if INVERSE else i
        step = sets * K + k
        step_tile = step[:, None] * D + cols[None, :]
        step_ok = set_ok[:, None] & (cols < D)[None, :]
        w_pd = tl.load(w_ptr + step_tile, mask=step_ok, other=0.0)
        u_pd = tl.load(u_ptr + step_tile, mask=step_ok, other=0.0)
        b_p = tl.load(b_ptr + step, mask=set_ok, other=0.0)

        p_p = tl.sum(w_pd * u_pd, axis=1)
        n_p = tl.sum(w_pd * w_pd, axis=1)
        x_p, root_s_p, s1_p, s_p, _ds_p, alpha_p = math.planar_step(p_p, n_p, CENTRED)
        a_b = tl.sum(w_pd * z_bd, axis=1) + b_p
        if INVERSE:
            a_b = math.solve_step(a_b, s1_p, s_p)
        tl.store(a_ptr + rows * K + k, a_b, mask=row_ok)

        t_b, q_b = math.tanh_sech2(a_b)
        l_b = math.step_ladj(t_b, q_b, x_p, root_s_p, s1_p, s_p)
        t_b = math.with_sign(t_b, a_b)
        if INVERSE:
            l_b, t_b = -l_b, -t_b
        ladj_b += l_b
        z_bd += t_b[:, None] * (u_pd + alpha_p[:, None] * w_pd)

    tl.store(out_ptr + tile, z_bd, mask=tile_ok)
    tl.store(ladj_ptr + rows, ladj_b, mask=row_ok)


@triton.jit(do_not_specialize=["B", "K"])
def planar_flow_backward_kernel(
    g_ptr,  # (B, D) cotangent of the output
    dladj_ptr,  # (B,)
    out_ptr,  # (B, D) the output; its input is rebuilt step by step
    w_ptr,  # (P, K, D), P = 1 if SHARED else B
    u_ptr,  # (P, K, D)
    a_ptr,  # (B, K)
    dz_ptr,  # (B, D)
    gamma_ptr,  # (B, K) cotangents of the pre-activations: db, summed later if SHARED
    dw_ptr,  # (B, K, D); if SHARED, not there
    du_ptr,  # (B, K, D); if SHARED, not there
    u_hat_ptr,  # (K, D) for `parameter_gradients`, if SHARED
    pn_ptr,  # (2, K) likewise
    B,
    K,
    D: tl.constexpr,
    SHARED: tl.constexpr,
    CENTRED: tl.constexpr,
    INVERSE: tl.constexpr,
    PARAM_GRADS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the last step to the first, g += gamma w with gamma the cotangent of r = w.x + b."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    cols = tl.arange(0, BLOCK_D)
    row_ok = rows < B
    tile = rows[:, None] * D + cols[None, :]
    tile_ok = row_ok[:, None] & (cols < D)[None, :]
    sets = tl.zeros([1], tl.int64) if SHARED else rows
    set_ok = sets < B

    g_bd = tl.load(g_ptr + tile, mask=tile_ok, other=0.0)
    dladj_b = tl.load(dladj_ptr + rows, mask=row_ok, other=0.0)
    dladj_b = -dladj_b if INVERSE else dladj_b
    if PARAM_GRADS and not SHARED:
        x_bd = tl.load(out_ptr + tile, mask=tile_ok, other=0.0)
    for i in range(K):
        k = i if INVERSE else K - 1 - i
        step = sets * K + k
        step_tile = step[:, None] * D + cols[None, :]
        step_ok = set_ok[:, None] & (cols < D)[None, :]
        w_pd = tl.load(w_ptr + step_tile, mask=step_ok, other=0.0)
        u_pd = tl.load(u_ptr + step_tile, mask=step_ok, other=0.0)
        a_b = tl.load(a_ptr + rows * K + k, mask=row_ok, other=0.0)

        p_p = tl.sum(w_pd * u_pd, axis=1)
        n_p = tl.sum(w_pd * w_pd, axis=1)
        x_p, root_s_p, s1_p, s_p, ds_p, alpha_p = math.planar_step(p_p, n_p, CENTRED)
        u_hat_pd = u_pd + alpha_p[:, None] * w_pd
        t_b, q_b = math.tanh_sech2(a_b)
        da_b, dp_b, det_b = math.step_ladj_grads(a_b, t_b, q_b, x_p, root_s_p, s1_p, s_p, ds_p)
        t_b = math.with_sign(t_b, a_b)
        h_b = tl.sum(u_hat_pd * g_bd, axis=1)
        gamma_b = math.pre_activation_grad(h_b, dladj_b, q_b, da_b, det_b, INVERSE)
        if PARAM_GRADS:
            tl.store(gamma_ptr + rows * K + k, gamma_b, mask=row_ok)
        if PARAM_GRADS and SHARED:
            first = sets + tl.program_id(0) == 0
            tl.store(u_hat_ptr + step_tile, u_hat_pd, mask=step_ok & first[:, None])
            tl.store(pn_ptr + step, p_p, mask=first)
            tl.store(pn_ptr + K + step, n_p, mask=first)
        if PARAM_GRADS and not SHARED:
            dp_b = math.p_grad(dladj_b, dp_b, ds_p, t_b, gamma_b, INVERSE)
            t_b = -t_b if INVERSE else t_b
            x_bd -= t_b[:, None] * u_hat_pd
            dw_pd, du_pd = math.through_u_hat(
                w_pd, u_pd, gamma_b[:, None] * x_bd, t_b[:, None] * g_bd, dp_b, n_p, ds_p, alpha_p
            )
            tl.store(dw_ptr + step_tile, dw_pd, mask=step_ok)
            tl.store(du_ptr + step_tile, du_pd, mask=step_ok)
        g_bd += gamma_b[:, None] * w_pd

    tl.store(dz_ptr + tile, g_bd, mask=tile_ok)


def row_options(D: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Blocks and launch options of the kernels above: one load of up to 16 bytes a thread and tile.

    Rows that are wider than 16 warps take more; from 32 KB a row, 8192 float32, registers spill.
    """
    widest = 16 // dtype.itemsize
    block_d = triton.next_power_of_2(D)
    return {
        "BLOCK_B": max(1, min(128 * gcd(D, widest) // block_d, 128)),
        "BLOCK_D": block_d,
        "num_warps": max(4, min(block_d // (32 * widest), 16)),
        "maxnreg": 128,  # without it ptxas spills for the sake of occupancy
        "enable_fp_fusion": True,  # the default depends on the version
    }


def _run(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (B, D), K = z.shape, w.shape[-2]
    out, ladj, a = torch.empty_like(z), z.new_empty(B), z.new_empty(B, K)
    options = row_options(D, z.dtype)
    with device_of(z):
        planar_flow_forward_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
            *(z, w, u, b, out, ladj, a, B, K, D),
            SHARED=w.dim() == 2,
            CENTRED=centred,
            INVERSE=inverse,
            **options,
        )
    return out, ladj, a


def _run_backward(
    g: Tensor,
    dladj: Tensor,
    z: Tensor,
    out: Tensor,
    w: Tensor,
    u: Tensor,
    a: Tensor,
    centred: bool,
    inverse: bool,
    param_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, D), K, shared = z.shape, w.shape[-2], w.dim() == 2
    dz = torch.empty_like(z)
    gamma = z.new_empty(B, K) if param_grads else None
    dw = du = u_hat = pn = None
    if param_grads and shared:
        u_hat, pn = torch.empty_like(w), z.new_empty(2, K)
    elif param_grads:
        dw, du = torch.empty_like(w), torch.empty_like(u)
    options = row_options(D, z.dtype)
    with device_of(z):
        planar_flow_backward_kernel[(triton.cdiv(B, options["BLOCK_B"]),)](
            *(g, dladj, out, w, u, a, dz, gamma, dw, du, u_hat, pn, B, K, D),
            SHARED=shared,
            CENTRED=centred,
            INVERSE=inverse,
            PARAM_GRADS=param_grads,
            **options,
        )
        if not param_grads:
            return dz, z.new_empty(0), z.new_empty(0), z.new_empty(0)
        if not shared:
            return dz, dw, du, gamma
        return dz, *parameter_gradients(g, dladj, z, w, u, a, gamma, u_hat, pn, centred, inverse)


def planar_flow_forward(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z_K (B, D), ladj (B,), a (B, K)) of a chain applied to z."""
    return _run(z, w, u, b, centred, inverse=False)


def planar_flow_inverse(
    z_K: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(z (B, D), ladj (B,), a (B, K)) with z_K = chain(z); ladj is minus the forward's."""
    return _run(z_K, w, u, b, centred, inverse=True)


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
    return _run_backward(dz_K, dladj, z, z_K, w, u, a, centred, False, param_grads)


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
    return _run_backward(dz, dladj, z_K, z, w, u, a, centred, True, param_grads)
