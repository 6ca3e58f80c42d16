"""Masked networks whose units are in no order: their weights are used where they lie, for few rows.

The twin of such a network has its units sorted, and so other kernels: the results must be the same
bits. What may crash a process runs this file as a script.
"""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from masked_case import Case, flatten
from test_autoregressive_kernels import assert_agrees
from test_native import GuardedMemory

from fastflow import native

if reason := native.probe("cpp"):
    pytest.skip(reason, allow_module_level=True)

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
WIDE = (35, 130, 301, 70)
# Wide enough that more rows than a tile has find the weights where they lie: in float64 up to 274.
VERY_WIDE = (9, 1500, 1470, 18)


def sorted_twin(case: Case) -> Case:
    """The same network with the units of every level, features included, in sorted order."""
    twin = replace(case)
    below = case.orders[0]
    twin.x = case.x[:, below].contiguous()
    twin.weights, twin.biases, twin.term_list = [], [], []
    parts = [torch.arange(len(below))]
    for layer, order in enumerate(case.orders[1:]):
        twin.weights.append(case.weights[layer][order][:, below].contiguous())
        bias = case.biases[layer]
        twin.biases.append(bias[order] if bias.numel() else bias)
        if case.term_list:
            term = case.term_list[layer]
            twin.term_list.append(term[:, order].contiguous() if term.numel() else term)
        parts += [torch.arange(len(order)), case.prefixes[layer]]
        below = order
    twin.stairs = torch.cat(parts).to(torch.int32)
    return twin


def assert_same_bits(case: Case) -> None:
    """Values and all gradients of a network are those of its sorted twin, bit by bit."""
    *outputs, saved = case.forward()
    cotangents = case.cotangents(outputs)
    dx, dterms, dweights, dbiases = case.backward(cotangents, saved)
    first, last = case.orders[0], case.orders[-1]
    sides = [first if case.scale else last]
    twin = sorted_twin(case)
    *twin_outputs, saved = twin.forward()
    turned = [cotangents[0][:, sides[0]].contiguous(), *cotangents[1:]]
    twin_dx, twin_dterms, twin_dweights, twin_dbiases = twin.backward(turned, saved)

    assert torch.equal(outputs[0][:, sides[0]], twin_outputs[0])
    assert all(map(torch.equal, outputs[1:], twin_outputs[1:]))
    assert torch.equal(dx[:, first], twin_dx)
    for layer, (below, order) in enumerate(itertools.pairwise(case.orders)):
        assert torch.equal(dweights[layer][order][:, below], twin_dweights[layer])
        for got, want in ((dterms, twin_dterms), (dbiases, twin_dbiases)):
            if got[layer].numel():
                assert torch.equal(got[layer][..., order], want[layer])


@FLOATS
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 257])
def test_the_order_of_units_changes_no_bit(batch: int, dtype: torch.dtype) -> None:
    """On both sides of every switch: rows in lanes or not, one tile or several, copies or none."""
    assert_same_bits(Case(batch, WIDE, "relu", scale="softplus", dtype=dtype))


@FLOATS
@pytest.mark.parametrize("batch", [2, 65, 130, 257, 280])
def test_the_order_of_very_many_units_changes_no_bit(batch: int, dtype: torch.dtype) -> None:
    assert_same_bits(Case(batch, VERY_WIDE, "relu", scale="softplus", dtype=dtype))


@FLOATS
@pytest.mark.parametrize("batch", [1, 3, 7, 31, 64])
@pytest.mark.parametrize(
    "sizes", [(1, 2), (3, 5, 6), (17, 33, 65, 34), (50, 47, 49, 100), (9, 300, 513, 18)], ids=str
)
def test_odd_sizes(batch: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_same_bits(Case(batch, sizes, dtype=dtype))
    assert_agrees(Case(batch, sizes, scale="gate", terms="none", dtype=dtype))


@FLOATS
@pytest.mark.parametrize("batch", [2, 11, 64, 100])
def test_residual_blocks(batch: int, dtype: torch.dtype) -> None:
    assert_same_bits(Case(batch, (35, *[130] * 3, 70), residual=True, scale="gate", dtype=dtype))


@pytest.mark.parametrize("batch", [1, 3, 40, 150])
def test_agrees_with_pytorch_where_it_is_wide(batch: int) -> None:
    assert_agrees(Case(batch, WIDE, "relu", scale="softplus"))
    assert_agrees(Case(batch, WIDE, scale="softclip", terms="none", dtype=torch.float32))


@FLOATS
@pytest.mark.parametrize("sizes", [WIDE, VERY_WIDE], ids=str)
def test_a_row_does_not_depend_on_its_batch(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    def part(rows: slice) -> Case:
        case = Case(300, sizes, scale="softplus", dtype=dtype)
        case.x = case.x[rows]
        case.term_list = [t[rows].contiguous() if t.numel() else t for t in case.term_list]
        return case

    whole = part(slice(None))
    *outputs, saved = whole.forward()
    cotangents = whole.cotangents(outputs)
    dx, dterms, *_ = whole.backward(cotangents, saved)
    for rows in [slice(7, 7 + n) for n in (1, 3, 6, 50, 100, 256)]:
        case = part(rows)
        *found, saved = case.forward()
        part_dx, part_dterms, *_ = case.backward([c[rows] for c in cotangents], saved)
        for got, want in zip([*found, part_dx, *part_dterms], [*outputs, dx, *dterms], strict=True):
            assert torch.equal(got, want[rows]) or not want.numel()


@FLOATS
@pytest.mark.parametrize("batch", [1, 4, 20, 64, 270])
def test_results_do_not_depend_on_threads(batch: int, dtype: torch.dtype) -> None:
    sizes = WIDE if batch <= 64 else VERY_WIDE
    case = Case(batch, sizes, scale="softclip", dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            *outputs, saved = case.forward()
            found.append([*outputs, *flatten(case.backward(case.cotangents(outputs), saved))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@FLOATS
@pytest.mark.parametrize("batch", [1, 3, 7, 64, 100])
def test_masked_weights_get_exactly_no_gradient(batch: int, dtype: torch.dtype) -> None:
    """Whatever a row holds: the cotangent of an output stays with the weights that it sees."""
    for poison in (0.0, math.inf, math.nan):
        case = Case(batch, WIDE, "relu", dtype=dtype)
        outputs, saved = case.forward()
        cotangent = torch.randn(outputs.shape, dtype=dtype)
        cotangent[-1, case.orders[-1][-1]] += poison
        _, _, dweights, _ = case.backward([cotangent], saved)
        for mask, dweight in zip(case.masks, dweights, strict=True):
            assert (dweight[~mask] == 0).all()


@pytest.mark.parametrize("batch", [1, 3, 7, 64, 100])
def test_outputs_see_nothing_beyond_their_prefix(batch: int) -> None:
    case = Case(batch, WIDE)
    y, saved = case.forward()
    dy = case.cotangents([y])
    dx, *_ = case.backward(dy, saved)
    reach = [torch.arange(WIDE[0])]  # per sorted unit, how many sorted features it depends on
    for prefix in case.prefixes:
        last = torch.cat([torch.zeros(1, dtype=torch.long), reach[-1] + (len(reach) == 1)])
        reach.append(last.cummax(0).values[prefix])
    for rank in range(0, WIDE[0], 6):
        moved = case.x.clone()
        moved[:, case.orders[0][rank]] = math.nan
        changed, _ = case.forward(moved)
        blind = case.orders[-1][reach[-1] <= rank]
        assert torch.equal(changed[:, blind], y[:, blind])
        poisoned = dy[0].clone()  # and nothing comes back from an output that is blind
        poisoned[:, blind] = math.nan
        changed_dx, *_ = case.backward([poisoned], saved)
        unseen = case.orders[0][rank:]
        assert torch.equal(changed_dx[:, unseen], dx[:, unseen])


@pytest.mark.parametrize("batch", [3, 64, 100])
def test_flags_leave_out_what_is_not_wanted(batch: int) -> None:
    case = Case(batch, WIDE, scale="gate")
    *outputs, saved = case.forward()
    cotangents = case.cotangents(outputs)
    full = flatten(case.backward(cotangents, saved))
    for x_grad, param_grads in itertools.product((False, True), repeat=2):
        part = case.backward(cotangents, saved, x_grad, param_grads)
        kept = [x_grad] + [param_grads] * 6 + [True] * 3
        for got, want, keep in zip(flatten(part), full, kept, strict=True):
            assert torch.equal(got, want if keep else want.new_empty(0))
    assert not case.forward(save=False)[-1].numel()
    for got, want in zip(case.forward(save=False)[:-1], outputs, strict=True):
        assert torch.equal(got, want)


def read_guarded() -> None:
    """All inputs between pages that must not be touched."""
    memory = GuardedMemory()
    sizes = [(3, 5, 6), (17, 33, 65, 34), (35, 100, 131, 70)]
    for dtype, at_end in itertools.product([torch.float32, torch.float64], [True, False]):
        for size, batch in itertools.product(sizes, [1, 2, 3, 6, 17, 64]):
            case = Case(batch, size, scale="softplus", dtype=dtype)

            def run(case: Case = case, at_end: bool = at_end) -> list[torch.Tensor]:
                *outputs, saved = case.forward()
                cotangents = [memory.copy(c, at_end) for c in case.cotangents(outputs)]
                saved = memory.copy(saved, at_end)
                return [*outputs, *flatten(case.backward(cotangents, saved))]

            expected = run()
            case.x, case.stairs = memory.copy(case.x, at_end), memory.copy(case.stairs, at_end)
            for tensors in (case.weights, case.biases, case.term_list):
                tensors[:] = [memory.copy(t, at_end) if t.numel() else t for t in tensors]
            assert all(map(torch.equal, run(), expected))
    os._exit(0)  # the mappings cannot be closed while tensors look into them


def test_nothing_is_read_outside_the_inputs() -> None:
    subprocess.run([sys.executable, __file__], check=True, timeout=300)


if __name__ == "__main__":
    read_guarded()
