"""Planar flow: a chain of K steps and its log-determinant as one op, in both directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastflow.autograd import node
from fastflow.autograd.planar_flow import FORWARD
from fastflow.autograd.planar_flow import planar_flow as apply_chain
from fastflow.functional.checks import broadcast_batches, check_tensors

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


def check_constraint(owner: str, constraint: str) -> str:
    """The constraint, if there is one of that name.

    Raises:
        ValueError: there is none.
    """
    if constraint not in CONSTRAINTS:
        raise ValueError(f"{owner}: constraint is {constraint!r}, must be one of {CONSTRAINTS}")
    return constraint


def _run(
    name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor, constraint: str, inverse: bool
) -> tuple[Tensor, Tensor]:
    centred = check_constraint(name, constraint) == "centred"
    results = node.run(FORWARD[inverse], z, w, u, b, centred)
    if results is not None:
        return results
    if _as_kernels_take_them(z, w, u, b):
        return apply_chain(z, w, u, b, centred, inverse)

    z_name = "z_K" if inverse else "z"
    check_tensors(name, **{z_name: z}, w=w, u=u, b=b)
    shapes = {z_name: z.shape, "w": w.shape, "u": u.shape, "b": b.shape}
    _check_shapes(name, **shapes)
    dtype = z.dtype
    for parameter in (w, u, b):
        dtype = torch.promote_types(dtype, parameter.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    z, w, u, b = z.to(compute), w.to(compute), u.to(compute), b.to(compute)
    z, w, u, b, batch = _rows(name, z, w, u, b, shapes)
    z, w, u, b = z.contiguous(), w.contiguous(), u.contiguous(), b.contiguous()
    out, ladj = apply_chain(z, w, u, b, centred, inverse)
    return out.view(*batch, out.shape[-1]).to(dtype), ladj.view(batch)


def _as_kernels_take_them(z: Tensor, w: Tensor, u: Tensor, b: Tensor) -> bool:
    """Whether nothing needs checking or changing: the common case, told in two microseconds."""
    try:
        of_z, of_w = z.shape, w.shape
        return (
            z.dtype == w.dtype == u.dtype == b.dtype
            and z.dtype in (torch.float32, torch.float64)
            and z.device == w.device == u.device == b.device
            and len(of_z) == 2
            and of_z[1] > 0
            and u.shape == of_w
            and b.shape == of_w[:-1]
            and (of_w[1:] == of_z[1:] or (len(of_w) == 3 and of_w[::2] == of_z))
            and z.is_contiguous()
            and w.is_contiguous()
            and u.is_contiguous()
            and b.is_contiguous()
        )
    except AttributeError:  # not all of them are tensors
        return False


def _rows(
    name: str, z: Tensor, w: Tensor, u: Tensor, b: Tensor, shapes: dict[str, torch.Size]
) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.Size]:
    """The op's arguments with at most one batch dimension, and the batch shape of its outputs.

    z becomes (B, D). Shared parameters stay as they are; amortised ones are broadcast to the batch,
    w, u (B, K, D) and b (B, K).
    """
    of_z, of_w, of_u, of_b = shapes.values()
    *z_batch, features = of_z
    if len(of_w) == len(of_u) == 2 and len(of_b) == 1:
        if len(z_batch) != 1:
            z = z.reshape(math.prod(z_batch), features)
        return z, w, u, b, of_z[:-1]
    if len(z_batch) == 1 and of_w[:-2] == of_u[:-2] == of_b[:-1] == of_z[:-1]:
        return z, w, u, b, of_z[:-1]
    batches = (of_z[:-1], of_w[:-2], of_u[:-2], of_b[:-1])
    batch = broadcast_batches(name, **dict(zip(shapes, batches, strict=True)))
    rows, (steps, features) = math.prod(batch), of_w[-2:]
    z = z.expand(*batch, features).reshape(rows, features)
    w, u = (t.expand(*batch, steps, features).reshape(rows, steps, features) for t in (w, u))
    return z, w, u, b.expand(*batch, steps).reshape(rows, steps), batch


def _check_shapes(name: str, **shapes: torch.Size) -> None:
    (z_name, z), (_, w), (_, u), (_, b) = shapes.items()
    if not z or not z[-1]:
        raise ValueError(f"{name}: {z_name} has shape {tuple(z)}, must be (*batch, D), D >= 1")
    for key, rank, form in (("w", 2, "K, D"), ("u", 2, "K, D"), ("b", 1, "K")):
        if len(shapes[key]) < rank:
            raise ValueError(
                f"{name}: {key} has shape {tuple(shapes[key])}, "
                f"must be ({form}) or (*batch, {form})"
            )
    for key, shape in (("w", w), ("u", u)):
        if shape[-1] != z[-1]:
            raise ValueError(f"{name}: {key} has {shape[-1]} features, {z_name} has {z[-1]}")
    for key, steps in (("u", u[-2]), ("b", b[-1])):
        if steps != w[-2]:
            raise ValueError(f"{name}: {key} has {steps} steps, w has {w[-2]}")
