"""Planar flow: a chain of K steps and its log-determinant as one op, in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.autograd.planar_flow import planar_flow as apply_chain
from fastflow.functional.checks import check_tensors

CONSTRAINTS = ("paper", "centred")


def planar_flow(
    z: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "paper"
) -> tuple[Tensor, Tensor]:
    r"""Applies a chain of K planar steps to every row of z.

    Step k, with :math:`a_k = w_k^\top z_{k-1} + b_k`, is

    .. math::
        z_k = z_{k-1} + \hat u_k \tanh(a_k), \qquad
        \log\left|\det \frac{\partial z_k}{\partial z_{k-1}}\right|
            = \log\left(1 + \operatorname{sech}^2(a_k)\, w_k^\top \hat u_k\right)

    where :math:`\hat u = u + (m(p) - p)\, w / \|w\|^2` with :math:`p = w^\top u` keeps the step
    invertible: :math:`w^\top \hat u = m(p) > -1`. The constraint is

    - ``"paper"``: :math:`m(p) = -1 + \operatorname{softplus}(p)`, of the source below. It is the
      default, so that parameters mean what they mean in other libraries. :math:`\hat u` grows like
      :math:`0.31 / \|w\|` as w vanishes, and u = 0 is not the identity.
    - ``"centred"``: :math:`m(p) = -1 + \operatorname{softplus}(p + \ln(e - 1))`, for which
      :math:`m(0) = 0`: u = 0 is the identity, and :math:`\hat u` stays bounded as w vanishes.

    A w shorter than 2^-50 is taken as zero: the step is then :math:`z + u \tanh(a)`, whose
    log-determinant is 0 to rounding.

    Arguments:
        z: points, (\*batch, D).
        w: weights, shared (K, D) or one chain for every row (\*batch, K, D).
        u: directions, (K, D) or (\*batch, K, D).
        b: biases, (K,) or (\*batch, K). The batches of z, w, u and b broadcast.
        constraint: "paper" or "centred".

    Returns:
        z_K (\*batch, D), and ladj (\*batch,): the sum over steps of log|det|, in float32 at least.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: shapes, devices or the constraint do not fit; the message names the argument.

    Source:
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015, arXiv 1505.05770.

    Example:
        >>> z, w, u, b = torch.zeros(5, 2), torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3)
        >>> z_K, ladj = planar_flow(z, w, u, b)
        >>> z_K.shape, ladj.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    return _run("planar_flow", z, w, u, b, constraint, inverse=False)


def planar_flow_inverse(
    z_K: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str = "paper"
) -> tuple[Tensor, Tensor]:
    r"""Inverts `planar_flow`: finds the z whose chain ends in z_K.

    One step is undone by solving :math:`a + m(p) \tanh(a) = w^\top z_k + b` for the scalar a, a
    monotone equation, with a bracketed Newton iteration; then
    :math:`z_{k-1} = z_k - \hat u_k \tanh(a)`. Gradients follow from the implicit function theorem.

    Arguments:
        z_K: points, (\*batch, D).
        w, u, b, constraint: the chain's parameters, as in `planar_flow`.

    Returns:
        z (\*batch, D), and ladj (\*batch,) of this map: minus that of the forward chain at z.

    Raises:
        TypeError, ValueError: as `planar_flow`.

    Example:
        >>> w, u, b = torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3)
        >>> z_K, ladj = planar_flow(torch.ones(5, 2), w, u, b)
        >>> z, back = planar_flow_inverse(z_K, w, u, b)
        >>> torch.allclose(z, torch.ones(5, 2), atol=1e-5), torch.allclose(ladj, -back, atol=1e-5)
        (True, True)
    """
    return _run("planar_flow_inverse", z_K, w, u, b, constraint, inverse=True)


def _run(
    name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    if constraint not in CONSTRAINTS:
        raise ValueError(f"{name}: constraint is {constraint!r}, must be one of {CONSTRAINTS}")
    check_tensors(name, **{"z_K" if inverse else "z": z}, w=w, u=u, b=b)
    _check_shapes(name, "z_K" if inverse else "z", z, w, u, b)

    dtype = z.dtype
    if not dtype == w.dtype == u.dtype == b.dtype or dtype.itemsize < 4:
        for parameter in (w, u, b):
            dtype = torch.promote_types(dtype, parameter.dtype)
        compute = torch.promote_types(dtype, torch.float32)
        z, w, u, b = (tensor.to(compute) for tensor in (z, w, u, b))

    batch, features = z.shape[:-1], z.shape[-1]
    if w.dim() != 2 or u.dim() != 2 or b.dim() != 1:
        z, w, u, b, batch = _amortised_rows(name, z, w, u, b)
    elif len(batch) != 1:
        z = z.reshape(-1, features)
    out, ladj = apply_chain(
        z.contiguous(),
        w.contiguous(),
        u.contiguous(),
        b.contiguous(),
        constraint == "centred",
        inverse,
    )
    if len(batch) != 1:
        out, ladj = out.reshape(*batch, features), ladj.reshape(batch)
    return (out if out.dtype == dtype else out.to(dtype)), ladj


def _amortised_rows(
    name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Size]:
    """Everything broadcast to one batch and flattened to rows: (B, D), (B, K, D) twice, (B, K)."""
    batches = {"z": z.shape[:-1], "w": w.shape[:-2], "u": u.shape[:-2], "b": b.shape[:-1]}
    try:
        batch = torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        shown = ", ".join(f"{key} {tuple(shape)}" for key, shape in batches.items())
        raise ValueError(f"{name}: the batch shapes do not broadcast: {shown}") from None
    rows, (steps, features) = batch.numel(), w.shape[-2:]
    z = z.expand(*batch, features).reshape(rows, features)
    w, u = (t.expand(*batch, steps, features).reshape(rows, steps, features) for t in (w, u))
    return z, w, u, b.expand(*batch, steps).reshape(rows, steps), batch


def _check_shapes(name: str, z_name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> None:
    if not z.dim() or not z.shape[-1]:
        raise ValueError(
            f"{name}: {z_name} has shape {tuple(z.shape)}, must be (*batch, D), D >= 1"
        )
    for key, tensor, tail, form in (("w", w, 2, "K, D"), ("u", u, 2, "K, D"), ("b", b, 1, "K")):
        if tensor.dim() < tail:
            raise ValueError(
                f"{name}: {key} has shape {tuple(tensor.shape)}, "
                f"must be ({form}) or (*batch, {form})"
            )
    if w.shape[-1] != z.shape[-1]:
        raise ValueError(f"{name}: w has {w.shape[-1]} features, {z_name} has {z.shape[-1]}")
    if u.shape[-1] != z.shape[-1]:
        raise ValueError(f"{name}: u has {u.shape[-1]} features, {z_name} has {z.shape[-1]}")
    if u.shape[-2] != w.shape[-2]:
        raise ValueError(f"{name}: u has {u.shape[-2]} steps, w has {w.shape[-2]}")
    if b.shape[-1] != w.shape[-2]:
        raise ValueError(f"{name}: b has {b.shape[-1]} steps, w has {w.shape[-2]}")
