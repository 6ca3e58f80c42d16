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


def test_masks_of_an_adjacency() -> None:
    """The network connects a feature to those that the matrix names, and to no other."""
    adjacency = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]).bool()
    for hidden in ((), (6,), (7, 5, 9)):
        reach = torch.eye(4)
        for mask in masks.adjacency_masks(adjacency, hidden, 2):
            reach = mask.float() @ reach
        assert torch.equal(reach.bool(), adjacency.repeat_interleave(2, 0))
    assert masks.depth(adjacency) == 3
    assert masks.depth(torch.ones(5, 5).tril(-1).bool()) == 5


def test_some_units_are_left_to_the_context() -> None:
    adjacency = torch.ones(3, 3).tril(-1).bool()
    first, last = masks.adjacency_masks(adjacency, (6,), 1, context=True)
    alone = ~first.any(1)
    assert alone.any() and last[:, alone].all()


@pytest.mark.parametrize(
    ("adjacency", "error"),
    [
        (torch.eye(3).bool(), r"circle among the features \[0, 1, 2\]"),
        (torch.tensor([[0, 1], [1, 0]]).bool(), r"circle among the features \[0, 1\]"),
        (torch.ones(2, 3).bool(), r"shape \(2, 3\)"),
        (torch.zeros(2, 2), "type torch.float32"),
    ],
)
def test_bad_adjacency(adjacency: torch.Tensor, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        masks.depth(adjacency)


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
    found = masks.staircase_of(given, layout)
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
    found = masks.staircase_of(drawn_masks([own, torch.tensor([1]), torch.tensor([2, 1]), outputs]))
    assert masks.parts(found, [3, 1, 2, 6])[0][2].tolist() == [1, 0]
    # nothing sees the features, so that their outputs tell their order
    last = torch.tensor([[True], [True], [False], [False]])
    found = masks.staircase_of([torch.zeros(1, 2, dtype=torch.bool), last])
    assert masks.parts(found, [2, 1, 4])[0][0].tolist() == [1, 0]


def test_what_is_no_staircase_or_sees_itself_is_not_recognised() -> None:
    own = torch.tensor([1, 2, 3])
    good = drawn_masks([own, torch.tensor([1, 2, 2]), own.repeat_interleave(2)])
    assert masks.staircase_of(good) is not None
    crossed = [good[0].clone(), good[1]]
    crossed[0][0] = torch.tensor([False, True, False])  # unit 1 sees more, but not this
    assert masks.staircase_of(crossed) is None
    apart = [good[0], good[1].clone()]
    apart[1][4] = False  # the two outputs of a feature see other units: no order of pairs
    assert masks.staircase_of(apart) is None
    itself = drawn_masks([own, torch.tensor([1, 2, 3]), own.repeat_interleave(2) + 1])
    assert masks.staircase_of(itself) is None
    assert masks.staircase_of([torch.zeros(4, 2, dtype=torch.bool)]) is not None


def test_levels_that_residual_blocks_add_must_depend_on_the_same() -> None:
    own, hidden = torch.tensor([1, 2, 3]), torch.tensor([2, 1, 2, 1])
    outputs = own.repeat_interleave(2)
    equal = drawn_masks([own, hidden, hidden, hidden, outputs])
    found = masks.staircase_of(equal, residual=True)
    orders, _ = masks.parts(found, [3, 4, 4, 4, 6])
    assert torch.equal(orders[1], orders[3])
    other = drawn_masks([own, hidden, hidden, hidden.flip(0), outputs])
    assert masks.staircase_of(other) is not None
    assert masks.staircase_of(other, residual=True) is None
    # same order of units, but those of the second block depend on more features
    more = drawn_masks([own, hidden, hidden, torch.tensor([2, 2, 2, 1]), outputs])
    assert masks.staircase_of(more, residual=True) is None
