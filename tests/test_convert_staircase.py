"""Masks of other libraries, their units in any order, recognised as staircases."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastflow import masks
from fastflow.convert.staircase import staircase_of


def drawn_masks(levels: list[torch.Tensor]) -> list[torch.Tensor]:
    """The masks of levels of these degrees, as `staircase` defines them."""
    *inner, last = pairwise(levels)
    hidden = [above[:, None] >= below for below, above in inner]
    return [*hidden, last[1][:, None] > last[0]]


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("sizes", [(5, 9, 4), (5, 40, 40, 40), (3,), (1, 4)], ids=str)
def test_masks_in_any_order_are_recognised(sizes: tuple[int, ...], blocked: bool) -> None:
    features, *hidden = sizes
    own = torch.randperm(features) + 1
    inner = [torch.randint(0, features, (width,)) for width in hidden]
    outputs = torch.arange(2 * features).view(features, 2)
    layout = outputs.view(2, features).T if blocked else None
    last = own.repeat(2) if blocked else own.repeat_interleave(2)
    given = drawn_masks([own, *inner, last])
    found = staircase_of(given, layout)
    widths = [features, *hidden, 2 * features]
    assert all(map(torch.equal, masks.masks(found, widths), given))
    orders, prefixes = masks.parts(found, widths)
    assert all(prefix.diff().ge(0).all() for prefix in prefixes)
    # the k-th feature in the order has outputs 2 k and 2 k + 1, the first of its pair first
    rows = (outputs if layout is None else layout)[orders[0].long()]
    assert torch.equal(orders[-1].long(), rows.flatten())


def test_units_that_see_the_same_go_by_who_sees_them() -> None:
    own, outputs = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2, 2, 3, 3])
    # nothing below tells the units of degrees 2 and 1 apart
    found = staircase_of(drawn_masks([own, torch.tensor([1]), torch.tensor([2, 1]), outputs]))
    assert masks.parts(found, [3, 1, 2, 6])[0][2].tolist() == [1, 0]
    # nothing sees the features, so that their outputs tell their order
    last = torch.tensor([[True], [True], [False], [False]])
    found = staircase_of([torch.zeros(1, 2, dtype=torch.bool), last])
    assert masks.parts(found, [2, 1, 4])[0][0].tolist() == [1, 0]


def test_what_is_no_staircase_or_sees_itself_is_not_recognised() -> None:
    own = torch.tensor([1, 2, 3])
    good = drawn_masks([own, torch.tensor([1, 2, 2]), own.repeat_interleave(2)])
    assert staircase_of(good) is not None
    crossed = [good[0].clone(), good[1]]
    crossed[0][0] = torch.tensor([False, True, False])  # unit 1 sees more, but not this
    assert staircase_of(crossed) is None
    apart = [good[0], good[1].clone()]
    apart[1][4] = False  # the two outputs of a feature see other units: no order of pairs
    assert staircase_of(apart) is None
    itself = drawn_masks([own, torch.tensor([1, 2, 3]), own.repeat_interleave(2) + 1])
    assert staircase_of(itself) is None
    assert staircase_of([torch.zeros(4, 2, dtype=torch.bool)]) is not None


def test_levels_that_residual_blocks_add_must_depend_on_the_same() -> None:
    own, hidden = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 2, 1])
    outputs = own.repeat_interleave(2)
    equal = drawn_masks([own, hidden, hidden, hidden, outputs])
    found = staircase_of(equal, residual=True)
    orders, _ = masks.parts(found, [3, 4, 4, 4, 6])
    assert torch.equal(orders[1], orders[3])
    other = drawn_masks([own, hidden, hidden, hidden.flip(0), outputs])
    assert staircase_of(other) is not None
    assert staircase_of(other, residual=True) is None
    # same order of units, but those of the second block depend on more features
    more = drawn_masks([own, hidden, hidden, torch.tensor([2, 2, 2, 1]), outputs])
    assert staircase_of(more, residual=True) is None
    # what the level within the block lacks comes with what the block adds
    lacking = drawn_masks([own, hidden, torch.ones_like(hidden), hidden, outputs])
    assert staircase_of(lacking, residual=True) is not None
