"""Checks and shapes that all ops on masked networks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastflow.autograd import context
from fastflow.autograd.context import ContextTerm
from fastflow.autograd.masked import by_autograd, by_node, masked_network
from fastflow.functional.checks import broadcast_batches, check_tensors
from fastflow.functional.stairs import check_dependence, check_stairs, known_dependence
from fastflow.reference import scales
from fastflow.reference.network import ACTIVATIONS

T = TypeVar("T", bound=Tensor | None)
NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS)}


def check_activation(owner: str, activation: str) -> str:
    """The activation, if there is one of that name; ValueError otherwise."""
    if activation not in NUMBERS:
        raise ValueError(
            f"{owner}: activation is {activation!r}, must be one of {', '.join(NUMBERS)}"
        )
    return activation


def run(
    op: str,
    x_name: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Any,  # Tensor | Sequence[Tensor]
    terms: Sequence[Tensor | None] | ContextTerm | None,
    activation: str,
    residual: bool,
    affine: bool = False,
    constants: tuple[int | float, ...] = (),
    recompute: bool = False,
) -> tuple[Any, ...]:
    """An op on a masked network, for points of any batch shape.

    Arguments:
        op: its name in `fastflow.autograd.masked.OPS`.
        x_name: what the caller calls x, for the errors.
        x: points, (*batch, D).
        weights, biases, stairs, terms, activation, residual: the network, as in `fastflow.made`. A
            `ContextTerm` in the place of terms is the first layer's, the only one then.
        affine: whether the network must have two outputs for every feature, which see the features
            before it only.
        constants: what the op takes after `residual`.

    Returns:
        The outputs of the op, with the batch shape of x and the terms.
    """
    setting = (NUMBERS[check_activation(op, activation)], bool(residual), *constants)
    plain = isinstance(weights, (list, tuple)) and isinstance(stairs, Tensor)
    plain = plain and not (recompute or torch.compiler.is_compiling())
    network, term = (op, x, weights, biases, stairs, setting), None
    alone = affine and not isinstance(terms, ContextTerm) and not terms and _is_alone(x, weights)
    # the node's ops for CPUs look at the stairs themselves
    known = plain and stairs.is_cpu and not alone
    known = known or (plain and known_dependence(weights, stairs, setting[1], affine))
    if known and alone:
        return _of_one_feature(*network, activation)
    if known and (outputs := _quickly(*network, terms)) is not None:
        return outputs  # most calls need nothing below
    if isinstance(terms, ContextTerm):
        term, terms = terms, terms.computed(setting[0], len(weights), _promoted(x, *terms[:2]))
        if known and (outputs := _quickly(*network, terms)) is not None:
            return outputs
    weights = _tensors(op, "weights", weights)
    layers = len(weights)
    if not layers:
        raise ValueError(f"{op}: weights is empty, must hold at least one layer")
    biases = _tensors(op, "biases", [None] * layers if biases is None else biases)
    terms = [] if terms is None else _tensors(op, "terms", terms)
    tensors = {x_name: x}
    tensors |= {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    tensors |= {f"biases[{i}]": bias for i, bias in enumerate(biases) if bias is not None}
    tensors |= {f"terms[{i}]": term for i, term in enumerate(terms) if term is not None}
    check_tensors(op, **tensors)
    _check_shapes(op, x_name, x, weights, biases, terms)
    biases, terms = (_filled(some, weights[0]) for some in (biases, terms))
    if term is not None:  # the caller knows of a context, not of terms
        broadcast_batches(op, **{x_name: x.shape[:-1], "context": term.context.shape[:-1]})
    check_stairs(op, x_name, x, weights, stairs)
    if affine and weights[-1].shape[0] != 2 * x.shape[-1]:
        raise ValueError(
            f"{op}: the last of weights has {weights[-1].shape[0]} outputs, must have two for each "
            f"of the {x.shape[-1]} features of {x_name}"
        )
    hidden = [len(weight) for weight in weights[:-1]]
    if residual and (layers % 2 or len(set(hidden)) > 1):
        raise ValueError(
            f"{op}: residual needs an odd number of hidden layers (a first one, then pairs) of "
            f"equal width, theirs are {hidden}"
        )
    check_dependence(op, x.shape[-1], weights, stairs, setting[1], affine)
    if alone:
        return _of_one_feature(op, x, weights, biases, stairs, setting, activation)
    if plain and not known:
        if term is not None and (outputs := _quickly(*network, term)) is not None:
            return outputs
        if (outputs := _quickly(*network, terms)) is not None:
            return outputs

    if term is not None:  # made in float32 at least, whatever the types of the others
        tensors = {x_name: x, "context": term.context, "weight": term.weight} | {
            name: tensor for name, tensor in tensors.items() if not name.startswith("terms")
        }
    dtype = x.dtype
    for tensor in tensors.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    x, weights, biases, terms = (
        x.to(compute),
        *([tensor.to(compute) for tensor in tensors] for tensors in (weights, biases, terms)),
    )
    biases, terms = _fold(biases, terms)
    x, terms, batch = _rows(op, x_name, x, terms)
    outputs = masked_network(
        *(op, x.contiguous(), [term.contiguous() for term in terms]),
        *([weight.contiguous() for weight in weights], [bias.contiguous() for bias in biases]),
        *(stairs.contiguous() if isinstance(stairs, Tensor) else stairs, setting, recompute),
    )
    y, *rest = outputs
    return y.view(*batch, y.shape[-1]).to(dtype), *(one.view(batch) for one in rest)


def _promoted(*tensors: Tensor) -> torch.dtype:
    """The type in which tensors are computed together: that of PyTorch's promotion, but float32 at
    least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _quickly(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Tensor,
    setting: tuple,
    terms: Sequence[Tensor | None] | ContextTerm | None,
) -> tuple[Tensor, ...] | None:
    """The outputs by the autograd node, which makes its own checks; None if it declines.

    It computes a context's layer in the same op, and declines where there is no such op.
    """
    biases = (None,) * len(weights) if biases is None else biases
    if isinstance(terms, ContextTerm):
        return context.by_node(op, x, terms, weights, biases, stairs, setting)
    terms = () if terms is None else terms
    outputs = by_node(op, x, terms, weights, biases, stairs, setting)
    residual, affine = setting[1], len(setting) > 2
    if outputs is None and _fits(x, terms, weights, biases, stairs, residual, affine):
        if known_dependence(weights, stairs, residual, affine):
            terms, biases = _filled(terms, x), _filled(biases, x)
            outputs = by_autograd(op, x, terms, list(weights), biases, stairs, setting)
    return outputs


def _fits(
    x: Tensor,
    terms: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    stairs: Tensor,
    residual: bool,
    affine: bool,
) -> bool:
    """Whether a glance shows that PyTorch can compute a network with nothing checked or changed."""
    if type(x) is not Tensor or x.dtype not in (torch.float32, torch.float64) or residual:
        return False
    dtype, device, batch, below = x.dtype, x.device, x.shape[:-1], x.shape[-1]
    entries = below
    if len(biases) != len(weights) or (terms and len(terms) != len(weights)):
        return False
    for weight, bias, term in zip(weights, biases, terms or biases):
        units = len(weight)
        if weight.shape != (units, below) or weight.dtype != dtype or weight.device != device:
            return False
        if bias is not None and (bias.shape != (units,) or bias.dtype != dtype):
            return False
        if terms and term is not None and (term.shape != (*batch, units) or term.dtype != dtype):
            return False
        below = units
        entries += 2 * units
    if affine and below != 2 * x.shape[-1]:
        return False
    return stairs.shape == (entries,) and stairs.dtype == torch.int32 and stairs.device == device


def _is_alone(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether hidden layers have one feature to see, which in an affine network they must not."""
    if not isinstance(x, Tensor) or x.shape[-1:] != (1,):
        return False
    if not isinstance(weights, (list, tuple)) or len(weights) < 2:  # biases are rows already
        return False
    kinds = {getattr(weight, "dtype", None) for weight in weights}
    return x.dtype in (torch.float32, torch.float64) and kinds == {x.dtype}


def _of_one_feature(
    op: str,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    stairs: Tensor | Sequence[Tensor],
    setting: tuple,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """An affine op on (*batch, 1) whose network sees nothing: one row stands for all."""
    row = x.new_zeros(1, 1)
    (outputs,) = run("made", "x", row, weights, biases, stairs, None, activation, setting[1])
    outputs = outputs[0]
    if isinstance(stairs, Tensor):  # which says where the shift is
        outputs = outputs.gather(0, stairs[-4:-2].long())
    compute = scales.step_back if op == "autoregressive_inverse" else scales.step
    m, a = outputs.split(1)
    y, l = compute(x, m, a, *setting[2:])  # noqa: E741
    ladj = -l.sum() if op == "autoregressive_inverse" else l.sum()
    return y, ladj.expand(x.shape[:-1]).clone()


def _tensors(op: str, name: str, tensors: Sequence[T]) -> list[T]:
    if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
        raise TypeError(
            f"{op}: {name} is a {type(tensors).__name__}, must be a sequence of tensors"
        )
    return list(tensors)


def _filled(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """The tensors, with one of shape (0,) like another for each that is missing.

    Every one of them is new: torch.compile refuses the same tensor twice.
    """
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


def _check_shapes(
    op: str,
    x_name: str,
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    terms: list[Tensor | None],
) -> None:
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"{op}: {x_name} has shape {tuple(x.shape)}, must be (*batch, D), D >= 1")
    below = x.shape[-1]
    for i, weight in enumerate(weights):
        if weight.dim() != 2 or not weight.numel() or weight.shape[1] != below:
            raise ValueError(
                f"{op}: weights[{i}] has shape {tuple(weight.shape)}, must be (units, {below})"
            )
        below = weight.shape[0]
    for name, tensors in (("biases", biases), ("terms", terms)):
        if name == "biases" or tensors:
            if len(tensors) != len(weights):
                raise ValueError(
                    f"{op}: {name} has {len(tensors)} entries, weights has {len(weights)}"
                )
            for i, (tensor, weight) in enumerate(zip(tensors, weights)):
                if tensor is None:
                    continue
                units = weight.shape[0]
                fits = tensor.dim() and tensor.shape[-1] == units
                if not fits or (name == "biases" and tensor.dim() != 1):
                    form = f"({units},)" if name == "biases" else f"(*batch, {units})"
                    raise ValueError(
                        f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}, must be {form} or None"
                    )


def _fold(biases: list[Tensor], terms: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Terms that are the same for all points become part of the biases."""
    if not any(map(_single, terms)):
        return biases, terms
    folded = [
        (term if bias.shape == (0,) else bias + term) if _single(term) else bias
        for bias, term in zip(biases, terms)
    ]
    left = [term.new_empty(0) if _single(term) else term for term in terms]
    return folded, left if any(term.shape != (0,) for term in left) else []


def _single(term: Tensor) -> bool:
    return term.dim() == 1 and term.shape != (0,)


def _rows(
    op: str, x_name: str, x: Tensor, terms: list[Tensor]
) -> tuple[Tensor, list[Tensor], torch.Size]:
    """x (B, D) and terms (B, n), and the batch shape that they had together."""
    present = [term for term in terms if term.shape != (0,)]
    try:
        batch = torch.broadcast_shapes(x.shape[:-1], *(term.shape[:-1] for term in present))
    except RuntimeError:
        shown = ", ".join(str(tuple(term.shape)) for term in present)
        raise ValueError(
            f"{op}: the batches of {x_name} {tuple(x.shape)} and terms {shown} do not broadcast"
        ) from None

    rows = math.prod(batch)  # batch.numel() would be a constant to torch.export

    def flat(tensor: Tensor) -> Tensor:
        if tensor.shape == (0,):
            return tensor
        return tensor.expand(*batch, tensor.shape[-1]).reshape(rows, tensor.shape[-1])

    return flat(x), [flat(term) for term in terms], batch
