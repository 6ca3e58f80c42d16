"""The CUDA kernels of planar_flow, executed on the CPU thread by thread (cuda_on_host.py).

Every call runs in two opposite orders of threads and blocks, which must agree to the last bit, on
memory that starts as NaN between unreadable pages: this finds what a wrong index, a missing barrier
or a wrong lane mask does. It says nothing of speed, and nothing of CUDA's own exp and log.
"""

from __future__ import annotations

import ctypes

import cuda_on_host
import pytest
import torch
from oracle import assert_as_good, problem
from torch import Tensor

from fastflow.reference import planar_flow as reference

if cuda_on_host.compiler() is None:
    pytest.skip("no g++ to compile the kernels for the host", allow_module_level=True)

# steps and rows: one, fewer and more than a warp's lanes, beyond one and two panels of steps
STEPS_ROWS = [(1, 3), (2, 1), (3, 33), (5, 3), (17, 3)]
# (centred, inverse), so that every second one has both values of each
FLAGS = [(False, False), (False, True), (True, True), (True, False)]
KINDS = [pytest.param(True, id="shared"), pytest.param(False, id="amortised")]
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(scope="session")
def kernels(host_library: ctypes.CDLL) -> cuda_on_host.Kernels:
    return cuda_on_host.Kernels(host_library)


def check(
    kernels: cuda_on_host.Kernels, inputs: list[Tensor], centred: bool, inverse: bool
) -> list[Tensor]:
    """Forward and backward of one direction against the reference; the kernels' outputs.

    They are to be as good as the reference is in float32 or, in float64, would be.
    """
    forward = reference.planar_flow_inverse if inverse else reference.planar_flow_forward
    backward = reference.planar_flow_inverse_backward if inverse else reference.planar_flow_backward

    def in_type(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.to(dtype) for tensor in tensors]

    out, ladj, a = kernels.forward(*inputs, centred, inverse)
    plain = forward(*in_type(torch.float32, inputs), centred)
    exact = forward(*in_type(torch.float64, inputs), centred)
    for name, one, rough, true in zip(("out", "ladj", "a"), (out, ladj, a), plain, exact):
        assert_as_good(one, rough, true, name)

    z, w, u, _ = inputs
    given = [torch.randn_like(out), torch.randn_like(ladj), z, out, w, u, a]
    grads = kernels.backward(*given, centred, inverse)
    plain = backward(*in_type(torch.float32, given), centred, True)
    exact = backward(*in_type(torch.float64, given), centred, True)
    for name, one, rough, true in zip(("d_in", "dw", "du", "db"), grads, plain, exact):
        assert_as_good(one, rough, true, name)

    return [out, ladj, a, *grads]


def inputs_of(
    rows: int, features: int, steps: int, shared: bool, dtype: torch.dtype
) -> list[Tensor]:
    return [leaf.detach() for leaf in problem(rows, features, steps, shared, dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("features", [1, 2, 3, 31, 33, 64, 100, 130])
def test_small(
    kernels: cuda_on_host.Kernels, features: int, shared: bool, dtype: torch.dtype
) -> None:
    for turn, (steps, rows) in enumerate(STEPS_ROWS):
        inputs = inputs_of(rows, features, steps, shared, dtype)
        for centred, inverse in FLAGS[(turn + features) % 2 :: 2]:
            check(kernels, inputs, centred, inverse)


# A row of more threads than a warp, of the largest block, and one that no block holds in registers.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", [260, 521, 2056, 4097])
def test_wide_rows(kernels: cuda_on_host.Kernels, features: int, dtype: torch.dtype) -> None:
    for shared, inverse in FLAGS:
        check(kernels, inputs_of(2, features, 3, shared, dtype), False, inverse)


@pytest.mark.parametrize("steps", [33, 70])
def test_many_steps(kernels: cuda_on_host.Kernels, steps: int) -> None:
    for shared, inverse in FLAGS:
        check(kernels, inputs_of(5, 6, steps, shared, torch.float64), False, inverse)


@pytest.mark.parametrize("steps", [3, 9, 17])
def test_large_batch(kernels: cuda_on_host.Kernels, steps: int) -> None:
    """Tiles of 64 rows, and many pieces of the batch in the sums; the rows' bits do not change."""
    inputs = inputs_of(16384 + 5, 2, steps, True, torch.float32)
    whole = check(kernels, inputs, False, False)
    some = slice(16370, 16389)
    z, w, u, b = inputs
    for one, other in zip(kernels.forward(z[some], w, u, b, False, False), whole):
        assert torch.equal(one, other[some])


@pytest.mark.parametrize("shared", KINDS)
def test_rows_are_independent(kernels: cuda_on_host.Kernels, shared: bool) -> None:
    inputs = inputs_of(19, 6, 4, shared, torch.float32)
    whole = kernels.forward(*inputs, False, False)
    alone = [x[7:8] if x.shape[0] == 19 else x for x in inputs]
    for one, all_rows in zip(kernels.forward(*alone, False, False), whole):
        assert torch.equal(one, all_rows[7:8])
    inputs[0][3] = torch.nan
    for poisoned, clean in zip(kernels.forward(*inputs, False, False), whole):
        assert poisoned[3].isnan().all()
        keep = torch.arange(19) != 3
        assert torch.equal(poisoned[keep], clean[keep])


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("features", [6, 2056])
def test_without_parameter_gradients(
    kernels: cuda_on_host.Kernels, features: int, shared: bool
) -> None:
    z, w, u, b = inputs_of(3, features, 2, shared, torch.float64)
    out, ladj, a = kernels.forward(z, w, u, b, False, False)
    given = [torch.randn_like(out), torch.randn_like(ladj), z, out, w, u, a, False, False]
    (alone,) = kernels.backward(*given, param_grads=False)
    assert torch.equal(alone, kernels.backward(*given)[0])


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("norm", [0.0, 1e-30])
def test_vanishing_w(kernels: cuda_on_host.Kernels, norm: float, shared: bool) -> None:
    z, w, u, b = inputs_of(3, 4, 2, shared, torch.float32)
    w[..., 0, :] = norm
    for centred, inverse in FLAGS:
        results = check(kernels, [z, w, u, b], centred, inverse)
        assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("shared", KINDS)
def test_rows_off_16_bytes(kernels: cuda_on_host.Kernels, shared: bool) -> None:
    """Whole quads at an address that admits no 16-byte access take the other path, same bits."""
    inputs = inputs_of(3, 8, 2, shared, torch.float32)
    aligned = kernels.forward(*inputs, False, False)
    kernels.shift = 4
    try:
        shifted = kernels.forward(*inputs, False, False)
    finally:
        kernels.shift = 0
    for one, other in zip(aligned, shifted):
        assert torch.equal(one, other)
