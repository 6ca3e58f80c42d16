"""Degrees, orders, masks and the staircase that kernels read."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastflow import masks


@pytest.mark.parametrize("strict", [True, False])
def test_staircase_describes_the_masks_of_the_degrees(strict: bool) -> None:
    degrees = [torch.randint(0, 6, (n,)) for n in (5, 9, 4, 7, 10)]
    found = masks.masks(masks.staircase(degrees, strict), [len(level) for level in degrees])
    for number, (below, above) in enumerate(pairwise(degrees), 1):
        last = strict and number == len(found)
        want = above[:, None] > below if last else above[:, None] >= below
        assert torch.equal(found[number - 1], want)


def test_prefixes_ascend_and_orders_are_permutations() -> None:
    degrees = [torch.randint(0, 6, (n,)) for n in (5, 9, 10)]
    orders, prefixes = masks.parts(masks.staircase(degrees), [5, 9, 10])
    for order, level in zip(orders, degrees):
        assert torch.equal(order.sort().values, torch.arange(len(level), dtype=torch.int32))
        assert level[order.long()].diff().min() >= 0
    assert all(prefix.diff().min() >= 0 for prefix in prefixes)


@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("features", [1, 2, 5, 17])
def test_hidden_degrees_are_spread_evenly(features: int, lowest: int) -> None:
    count = features - min(lowest, features - 1)
    for width in (count, count + 1, 3 * count, 50):
        if width < count:
            continue
        degrees = masks.hidden_degrees(width, features, lowest)
        numbers = torch.bincount(degrees, minlength=features)[features - count :]
        assert degrees.diff().ge(0).all() and len(numbers) == count
        assert numbers.max() - numbers.min() <= 1
        assert masks.unseen(degrees, features, lowest) == []


def test_too_few_units_leave_degrees_without_one() -> None:
    degrees = masks.hidden_degrees(3, features=8)
    # the highest is there: no feature is lost altogether; and the lowest, for the context
    assert degrees.tolist() == [1, 4, 7]
    assert masks.unseen(degrees, 8) == [2, 3, 5, 6]
    assert masks.hidden_degrees(3, features=8, lowest=0).tolist() == [0, 3, 7]


def test_orders() -> None:
    assert masks.ranks(None, 4).tolist() == [0, 1, 2, 3]
    assert masks.ranks("reverse", 4).tolist() == [3, 2, 1, 0]
    assert sorted(masks.ranks("random", 9).tolist()) == list(range(9))
    given = torch.tensor([1, 0, 2])
    taken = masks.ranks(given, 3)
    given[0] = 7
    assert taken.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ("backwards", "order is 'backwards'"),
        ([0, 0, 1], r"order is \[0, 0, 1\], must hold each of 0 .. 2 once"),
        ([0, 1], "must hold each of 0 .. 2 once"),
        ([0.0, 1.0, 2.0], "order is torch.float32, must hold integers"),
    ],
)
def test_bad_orders(order: object, error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        masks.ranks(order, 3)
