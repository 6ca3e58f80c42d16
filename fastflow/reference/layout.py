"""What the reference reads of masks, kept for as long as the masks are what they were.

Making masks of a staircase takes longer than a small network. A staircase belongs to a layer and
hardly ever changes, so that they are made once: they live as long as the very tensor that they were
made of, and are made anew when that was written to. (PyTorch does not count writes through `.data`:
after one into a staircase, the masks are the old ones.)
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow import masks
from fastflow.memo import Snapshot
from fastflow.transforms import functorch_active, readable

_known: dict[tuple[Hashable, ...], tuple[Snapshot, Any]] = {}


class Layout(NamedTuple):
    """What a pass through the network needs.

    Arguments:
        masks: bool (n_l, n_{l-1}) of every layer, True is seen; not to be written to.
        interleaved: whether the outputs are known to be m_1, a_1, m_2, a_2, .., two for every
            feature in the order in which features lie.
    """

    masks: list[Tensor]
    interleaved: bool


def layout(stairs: Tensor | Sequence[Tensor], widths: Sequence[int]) -> Layout:
    """The layout of a network with n_0 .. n_L units, from its staircase or list of masks."""
    if not isinstance(stairs, Tensor):
        return Layout(list(stairs), True)

    def make() -> Layout:
        return Layout(masks.masks(stairs, widths), _interleaved(stairs, widths))

    kept = remembered(make, (stairs,), tuple(widths))
    return Layout(masks.masks(stairs, widths), False) if kept is None else kept


def remembered(
    make: Callable[[], Any], sources: Sequence[Tensor], key: tuple[Hashable, ...] = ()
) -> Any:
    """What `make` makes of masks, from memory while they are unchanged; None if it cannot be kept.

    What is made inside a transform, or of symbols, is no value to keep.

    Arguments:
        make: no function of anything but the sources and the key.
        sources: the masks.
        key: what else the result depends on.
    """
    if torch.compiler.is_compiling():
        return None
    key = (make.__qualname__, *key, *map(id, sources))
    found = _known.get(key)
    if found is not None and found[0].holds(sources):
        return found[1]
    if functorch_active() or not all(map(readable, sources)):
        return None
    if torch._C._len_torch_dispatch_stack():
        return None
    with torch.inference_mode(False):  # autograd takes no masks that were made in that mode
        made = make()
    if not any(source.is_inference() for source in sources):
        if found is None:
            for source in sources:
                weakref.finalize(source, _known.pop, key, None).atexit = False
        _known[key] = Snapshot(sources), made
    return made


def output_rows(stairs: Tensor | Sequence[Tensor], features: int) -> Tensor:
    """The rows (D, 2) of shift and raw scale in the last layer, for the features as they are."""
    if not isinstance(stairs, Tensor):
        return _natural(stairs[0], 2 * features).view(features, 2)
    pairs = stairs[-4 * features : -2 * features].long().view(features, 2)
    return pairs[stairs[:features].long().argsort()]


def _interleaved(stairs: Tensor, widths: Sequence[int]) -> bool:
    features, outputs = widths[0], widths[-1]
    if outputs != 2 * features:
        return False
    return torch.equal(output_rows(stairs, features).flatten(), _natural(stairs, outputs))


def _natural(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device)
