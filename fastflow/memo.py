"""Which tensors there are, and whether they are what they were."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Literal, overload

from torch import Tensor, nn


class Snapshot:
    """Which tensors there were, and in which state; it keeps none of them alive.

    Inference tensors do not tell when they change, so that a snapshot of one never holds.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._entries = [(weakref.ref(tensor), _state(tensor)) for tensor in tensors]

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, and nothing has changed them."""
        if len(tensors) != len(self._entries):
            return False
        for (reference, state), tensor in zip(self._entries, tensors):
            if reference() is not tensor or state is None or state != _state(tensor):
                return False
        return True


def tensors_of(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a module and of those within it; `parameters()`, but quick."""
    found, modules = [], [module]
    for module in modules:  # which grows
        found += module._parameters.values()
        found += module._buffers.values()
        modules += (child for child in module._modules.values() if child is not None)
    return [tensor for tensor in found if tensor is not None]


@overload
def tensors(modules: Sequence[nn.Module], name: Literal["weight", "mask"]) -> list[Tensor]: ...
@overload
def tensors(modules: Sequence[nn.Module], name: str) -> list[Tensor | None]: ...
def tensors(modules: Sequence[nn.Module], name: str) -> Sequence[Tensor | None]:
    """The weight, bias or other tensor of this name of every module, as it is now."""
    # past __getattr__ of modules, which in a small model takes longer than the network
    kept = "_parameters" if name in modules[0]._parameters else "_buffers"
    try:
        return [module.__dict__[kept][name] for module in modules]
    except KeyError:  # parametrized, say
        return [getattr(module, name) for module in modules]


def _state(tensor: Tensor) -> tuple[int, bool] | None:
    return None if tensor.is_inference() else (tensor._version, tensor.requires_grad)
