"""The modules inside a layer: whether they must be called, and how masked ones are.

A layer takes the tensors of its linear layers into one op, which is the same as calling them only
where a call of each would compute its `forward` and nothing else. Hooks, and what tools put in the
place of a module or of its `forward`, must act as they do in any other module.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from types import MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

try:
    from torch.nn.modules.module import (
        _has_any_global_hook as global_hooks,  # pyright: ignore[reportAssignmentType]
    )
except ImportError:  # a private name: without it every module is called

    def global_hooks() -> bool:
        return True


Linear = nn.Linear
FORWARD = nn.Linear.forward
WEIGHT_HOOKS = (SpectralNorm, WeightNorm, BasePruningMethod)
"""Forward pre-hooks that compute a weight, or a bias, whatever the input is."""

_masking = threading.RLock()

if TYPE_CHECKING:
    M = TypeVar("M", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[M]):
        """`nn.ModuleList`, of modules of one class."""

        def __init__(self, modules: Iterable[M] | None = None) -> None: ...
        def __iter__(self) -> Iterator[M]: ...
        @overload
        def __getitem__(self, idx: int) -> M: ...
        @overload
        def __getitem__(self, idx: slice) -> ModuleList[M]: ...
        def __getitem__(self, idx: Any) -> Any: ...
else:
    ModuleList = nn.ModuleList


def plain(module: nn.Module) -> bool:
    """Whether a call of a module computes the `forward` of its class and nothing else.

    `fastflow.inner.global_hooks` are for the caller to look at, once for all its modules.
    """
    own = module.__dict__
    return not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or ("forward" in own and not own_method(module, "forward"))
    )


def own_method(module: nn.Module, name: str) -> bool:
    """Whether an attribute of an instance is the method of its class, as tools leave it behind."""
    value = module.__dict__.get(name)
    if not isinstance(value, MethodType) or value.__self__ is not module:
        return False
    return value.__func__ is getattr(type(module), name, None)


def inside(root: nn.Module | None) -> list[nn.Module | None]:
    """A module and all those inside it, level after level."""
    modules: list[nn.Module | None] = [root]
    for module in modules:  # which grows
        if module is not None:
            modules += module._modules.values()
    return modules


class Watched:
    """The modules of a network that was found `plain`, to see quickly that it still is.

    Arguments:
        modules: what `inside` gives.
    """

    def __init__(self, modules: Sequence[nn.Module | None]) -> None:
        found = [module for module in modules if module is not None]
        self.root, self._modules, self._kinds = modules[0], found, [*map(type, found)]
        # lists of modules are not called
        self._own = [module.__dict__ for module in found if type(module) is not nn.ModuleList]
        self._parents = [module._modules for module in found if module._modules]
        self._children = [*chain.from_iterable(map(dict.values, self._parents))]

    def holds(self, root: nn.Module | None) -> bool:
        """Whether this is the network, of the same modules, and still plain."""
        if root is not self.root or [*map(type, self._modules)] != self._kinds or global_hooks():
            return False
        if [*chain.from_iterable(map(dict.values, self._parents))] != self._children:
            return False
        for own in self._own:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            ):
                return False
        return True


def plain_tensors(layers: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """The weights and biases of linear layers; None if one is not a plain `nn.Linear`."""
    weights, biases = [], []
    for layer in layers:
        own = layer.__dict__  # not by attribute, which in a small model takes longer than the op
        kept = own["_parameters"]
        if (
            type(layer) is not Linear
            or own["_forward_pre_hooks"]
            or own["_forward_hooks"]
            or own["_backward_pre_hooks"]
            or own["_backward_hooks"]
            or "forward" in own
            or "weight" not in kept
            or "bias" not in kept
        ):
            return None
        weights.append(kept["weight"])
        biases.append(kept["bias"])
    return None if Linear.forward is not FORWARD or global_hooks() else (weights, biases)


def settled_tensors(
    owner: str, names: str, layers: Sequence[nn.Module]
) -> tuple[list[Tensor], list[Tensor | None]] | None:
    """The weights and biases of masked linear layers of which some are not plain.

    Those of parametrizations, and of the hooks of `WEIGHT_HOOKS`, which are run.

    Arguments:
        owner: who asks, for the errors.
        names: how the layers are called there, "layers" say.

    Returns:
        Weights and biases; None where the layers must be called, by `call_masked`.

    Raises:
        TypeError: a layer computes something that no mask can be applied to.
    """
    for number, layer in enumerate(layers):
        _refuse(owner, f"{names}.{number}", layer)
    if global_hooks() or not all(map(_sets_weight_only, layers)):
        return None
    for layer in layers:
        for hook in layer._forward_pre_hooks.values():
            hook(layer, ())
    linear: Sequence[Any] = layers
    return [layer.weight for layer in linear], [layer.bias for layer in linear]


def call_masked(layer: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
    """Calls a linear layer as PyTorch does, hooks and all, but with its weight masked.

    Arguments:
        layer: one that `settled_tensors` has not refused.
        mask: bool (n, n'), True is seen.
        x: (*batch, n').

    Returns:
        (*batch, n).
    """
    if torch.compiler.is_compiling():
        return _call_masked(layer, mask, x)
    with _masking:  # other threads must not find the layer's own forward again too soon
        return _call_masked(layer, mask, x)


def _call_masked(layer: nn.Linear, mask: Tensor, x: Tensor) -> Tensor:
    # hooks set the weight right before forward, and want the layer itself, not a copy
    own = layer.__dict__
    before = own.get("forward")
    own["forward"] = _MaskedForward(layer, mask)
    try:
        return layer(x)
    finally:
        if before is None:
            own.pop("forward")
        else:
            own["forward"] = before


class _MaskedForward:
    """The `forward` of a linear layer while it is called with a mask."""

    def __init__(self, layer: nn.Linear, mask: Tensor) -> None:
        self.layer, self.mask = layer, mask

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias
        dtype = torch.promote_types(x.dtype, weight.dtype)
        bias = None if bias is None else bias.to(dtype)
        return nnf.linear(x.to(dtype), torch.where(self.mask, weight, 0).to(dtype), bias)


def _sets_weight_only(layer: nn.Module) -> bool:
    """Whether all that a linear layer has beside its class are hooks that compute its weight."""
    own = layer.__dict__
    if own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]:
        return False
    if isinstance(own.get("forward"), _MaskedForward):  # another thread calls it just now
        return False
    return all(isinstance(hook, WEIGHT_HOOKS) for hook in own["_forward_pre_hooks"].values())


def _refuse(owner: str, name: str, layer: nn.Module) -> None:
    """Raises TypeError if a mask cannot be applied to what a layer computes."""
    kind = type(layer)
    if not isinstance(layer, Linear) or kind.forward is not FORWARD:
        what = f"is a {kind.__module__}.{kind.__qualname__}, must be a torch.nn.Linear"
        if isinstance(layer, Linear):
            what = f"is computed by {_name(kind.forward)}, must be by torch.nn.Linear.forward"
    else:
        given = layer.__dict__.get("forward")
        if given is None or isinstance(given, _MaskedForward) or own_method(layer, "forward"):
            return
        what = f"has a forward of its own, {_name(given)}, must have none"
    raise TypeError(
        f"{owner}: {name} {what}: its weight is masked here, and whatever computes the layer in "
        "another way knows no mask. Change the weight by a parametrization "
        "(torch.nn.utils.parametrize); wrap the flow or a whole bijection instead of its linear "
        "layers; leave them out when you quantize"
    )


def _name(function: Any) -> str:
    shown = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or type(function).__module__}.{shown}"
