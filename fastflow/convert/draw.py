"""The memory of a converted transform: its last draw, for those who score what they just drew."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform

from fastflow.transforms import functorch_active


class Draw:
    """x, y and ladj of one pass, and the tensors that y was computed from.

    It gives x and the ladj while all is what it was at the draw: the tensors, their values, and
    that no backward pass has gone through y. Values are compared with copies, for fused optimizers
    and writes to `.data` leave no other trace. It keeps nothing alive for longer than y lives.

    Arguments:
        x: (*batch, D).
        y: (*batch, D), with a history.
        ladj: (*batch,).
        sources: what else y was computed from: parameters, masks and context.
    """

    def __init__(self, x: Tensor, y: Tensor, ladj: Tensor, sources: Sequence[Tensor]) -> None:
        self._kept = kept = [x, ladj, [*sources], *_state((y, x, *sources))]
        self._y = weakref.ref(y, lambda _: kept.clear())
        drawn = weakref.ref(self)  # a node that holds its own ladj would never be freed
        node: Any = y.grad_fn
        self._hook = node.register_prehook(lambda _: _end(drawn()))

        self.inverted = False
        """Whether x was given for y, so that the draw is being scored."""

    def is_of(self, y: Tensor) -> bool:
        """Whether this is the very tensor, and nothing has ended the memory."""
        return self._y() is y and len(self._kept) > 0

    def is_inverted_to(self, x: Tensor) -> bool:
        """Whether this is the very x, and was given for y."""
        return self.inverted and len(self._kept) > 0 and self._kept[0] is x

    def recall(self, sources: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, y and the ladj; None if a pass would give others."""
        x, ladj, before, flags, values = self._kept
        y: Any = self._y()
        now = (y, x, *sources)
        if [*map(id, sources)] != [*map(id, before)] or _flags(now) != flags:
            return None
        return (x, y, ladj) if all(map(torch.equal, now, values)) else None

    def end(self) -> None:
        """Keeps nothing any longer."""
        self._kept.clear()
        self._hook.remove()


class _Draws(threading.local):
    """The last draw of every transform, in this thread."""

    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Transform, Draw] = weakref.WeakKeyDictionary()


_here = _Draws()


def remember(
    transform: Transform, x: Tensor, y: Tensor, ladj: Tensor, sources: Sequence[Tensor]
) -> None:
    """Makes this the last draw of a transform in this thread, unless it cannot be watched."""
    forget(transform)
    if y.grad_fn is not None and all(map(_plain, (x, y, *sources))):
        _here.of[transform] = Draw(x, y, ladj, sources)


def last(transform: Transform) -> Draw | None:
    """The last draw of a transform in this thread."""
    return _here.of.get(transform) if watchable() else None


def forget(transform: Transform) -> None:
    """Ends the memory of the last draw of a transform in this thread."""
    _end(_here.of.pop(transform, None))


def watchable() -> bool:
    """Whether draws may be remembered and recalled now.

    Not where nothing records gradients, where values may be symbolic or batched, or where hooks
    count what is saved for a backward pass, as activation checkpointing does.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or functorch_active():
        return False
    if torch._C._len_torch_dispatch_stack():
        return False
    hooks = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return hooks._top_saved_tensors_default_hooks(True) is None


def _plain(tensor: Tensor) -> bool:
    """Whether comparing values is quick, and tells all: not on GPUs, for which one would wait."""
    kind = type(tensor)
    return (kind is Tensor or kind is nn.Parameter) and tensor.is_cpu and not tensor.is_inference()


def _flags(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(one._version, one.requires_grad, one.dtype, one.device) for one in tensors]


def _state(tensors: Sequence[Tensor]) -> tuple[list[tuple[Any, ...]], list[Tensor]]:
    with torch.no_grad():
        return _flags(tensors), [one.clone() for one in tensors]


def _end(draw: Draw | None) -> None:
    if draw is not None:
        draw.end()
