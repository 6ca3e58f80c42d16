"""What a flow starts from: a distribution, or a module that makes one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from fastflow.memo import tensors_of


def parts(distribution: Distribution) -> tuple[list[Tensor], list[nn.Module]]:
    """The tensors that a distribution and its parts and transforms hold, and their modules."""
    tensors, modules, seen, things = [], [], set(), [distribution]
    for thing in things:  # which grows
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, nn.Module):
            modules.append(thing)
        elif isinstance(thing, (Distribution, Transform)):
            things += vars(thing).values()
        elif isinstance(thing, dict):
            things += thing.values()
        elif isinstance(thing, (list, tuple)):
            things += thing
    return tensors, modules


def check_constant(owner: str, distribution: Distribution) -> None:
    """Raises ValueError if a distribution holds what is to be trained: nobody would train it."""
    tensors, modules = parts(distribution)
    tensors += [tensor for module in modules for tensor in tensors_of(module)]
    if any(tensor.requires_grad for tensor in tensors):
        kind = type(distribution).__name__
        raise ValueError(
            f"{owner}: base is a {kind} that holds tensors with gradients, which the flow would "
            "neither train nor move nor save: give it as an nn.Module whose forward returns the "
            "distribution (a flow itself, not its distribution()), or detach the tensors"
        )


def moved(distribution: Distribution, change: Callable[[Tensor], Tensor]) -> Distribution:
    """A distribution with its tensors on the devices and in the types that a change gives them.

    The change is what `nn.Module._apply` is called with. Values stay what they are, also where it
    makes tensors without values (`to_empty`, the meta device, to which nothing is moved).
    """
    tensors, modules = parts(distribution)
    new = {}
    for tensor in tensors:
        like = change(tensor)
        if like.is_meta:
            return distribution
        new[id(tensor)] = tensor.to(like.device, like.dtype)
    if not modules and all(new[id(tensor)] is tensor for tensor in tensors):
        return distribution
    new |= {id(module): copy.deepcopy(module)._apply(change) for module in modules}
    return copy.deepcopy(distribution, new)


def takes_context(module: nn.Module) -> tuple[bool, bool]:
    """Whether the forward of a module takes an argument, and whether it needs one."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    arguments = inspect.signature(module.forward).parameters.values()
    found = [argument for argument in arguments if argument.kind in kinds]
    needed = any(one.default is one.empty and one.kind != kinds[2] for one in found)
    return bool(found), needed


def check_made(owner: str, made: Distribution, features: int, batch: tuple[int, ...]) -> None:
    """Raises unless a module made a distribution of events (D,) that fits the context's batch."""
    if not isinstance(made, Distribution):
        raise TypeError(
            f"{owner}: base made a {type(made).__name__}, must make a torch.distributions object"
        )
    own = tuple(made.batch_shape)
    fits = len(own) <= len(batch) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(batch))
    )
    if made.event_shape != (features,) or not fits:
        raise ValueError(
            f"{owner}: base made a distribution of batch shape {own} and event shape "
            f"{tuple(made.event_shape)}, must be {tuple(batch)}, the context's, or one that "
            f"broadcasts to it, and ({features},)"
        )
