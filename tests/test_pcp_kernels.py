"""The CPU kernels of PCPMap below every Python layer: the raw ops of torch.ops.fastflow.

What must be seen from outside a process runs this file as a script: `python test_pcp_kernels.py
LIBRARY` prints sums of results.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ops = torch.ops.fastflow
F32, F64 = torch.float32, torch.float64
WIDTHS = [(1,), (7,), (6, 5), (9, 4, 8), (33, 17), (5, 7, 3, 6)]
SIZES = [(1, 1), (2, 3), (3, 16), (5, 17), (8, 40), (16, 9), (17, 35)]  # D, B


class Problem(NamedTuple):
    """A network in the order of `Network.tensors`, points and cotangents."""

    x: Tensor  # (B, D), also y
    net: list[Tensor]
    layers: int
    d_out: Tensor  # (B, D)
    dladj: Tensor  # (B,)

    def to(self, dtype: torch.dtype) -> Problem:
        net = [tensor.to(dtype) for tensor in self.net]
        x, d_out, dladj = (one.to(dtype) for one in (self.x, self.d_out, self.dladj))
        return Problem(x, net, self.layers, d_out, dladj)

    def rows(self, rows: slice) -> Problem:
        """Some rows alone."""
        matrices = 2 * self.layers - 1
        terms = [term if term.dim() == 1 else term[rows] for term in self.net[matrices:]]
        net = [*self.net[:matrices], *terms]
        return Problem(self.x[rows], net, self.layers, self.d_out[rows], self.dladj[rows])


def problem(B: int, D: int, widths: tuple[int, ...], terms: str = "rows") -> Problem:
    """In float64. `terms`: of every row, shared, without gates and scales, or of both kinds."""
    generator = torch.Generator().manual_seed(B + 31 * D + 977 * sum(widths))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    K, turn = len(widths), iter(range(1000))

    def term(n: int) -> Tensor:
        shared = terms in ("shared", "plain") or (terms == "mixed" and next(turn) % 2 == 0)
        return normal(n) if shared else normal(B, n)

    inputs = [normal(width, D) / D**0.5 for width in widths]
    weights = [normal(b, a).exp() / (2 * a) for a, b in pairwise(widths)]
    offsets = [term(width) for width in widths]
    few = [term(widths[-1]).exp(), term(D), term(D).exp() + 0.1]
    gates = [term(width).exp() / 2 for width in widths[:-1]]
    scales = [term(D) for _ in widths]
    conditional = [] if terms == "plain" else [*gates, *scales]
    net = [*inputs, *weights, *offsets, *few, *conditional]
    return Problem(normal(B, D), net, K, normal(B, D), normal(B))


def run(
    given: Problem, inverse: bool, param_grads: bool = True, ops: Any = ops
) -> dict[str, Tensor]:
    """All outputs of an op and of its backward."""
    forward = ops.pcp_inverse if inverse else ops.pcp_forward
    backward = ops.pcp_inverse_backward if inverse else ops.pcp_backward
    x, net, K, d_out, dladj = given
    out, ladj, saved = forward(x, net, K, True)
    d_in, dnet = backward(d_out, dladj, out if inverse else x, saved, net, K, param_grads)
    return {"out": out, "ladj": ladj, "d_in": d_in} | {f"net {i}": d for i, d in enumerate(dnet)}


def print_results() -> None:
    """Sums of all results, weighted, in full precision."""
    for dtype in (F32, F64):
        for D, B in SIZES:
            for inverse in (False, True):
                given = problem(B, D, (9, 4, 8), "mixed").to(dtype)
                for name, value in run(given, inverse).items():
                    flat = value.double().flatten()
                    weights = torch.arange(1, flat.numel() + 1, dtype=F64).cos()
                    fields = (name.replace(" ", ""), (flat * weights).sum().item())
                    print(str(dtype)[6:], *fields, flat.norm().item())


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    print_results()
    sys.exit()

from oracle import assert_as_good  # noqa: E402

import fastflow  # noqa: E402
from fastflow import native  # noqa: E402
from fastflow.reference import pcp as reference  # noqa: E402

pytestmark = pytest.mark.skipif("cpp" not in native.libraries, reason="needs the CPU library")
by_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
by_terms = pytest.mark.parametrize("terms", ["rows", "shared", "plain", "mixed"])


def by_reference(given: Problem, inverse: bool) -> dict[str, Tensor]:
    """What `run` gives, by plain PyTorch."""
    return run(given, inverse, ops=reference)


@by_terms
@by_direction
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_as_good_as_the_reference(widths: tuple[int, ...], inverse: bool, terms: str) -> None:
    for D, B in SIZES:
        given = problem(B, D, widths, terms)
        exact, plain = by_reference(given, inverse), by_reference(given.to(F32), inverse)
        for name, value in run(given.to(F32), inverse).items():
            assert_as_good(value, plain[name], exact[name], f"{name} D={D} B={B}")
        for name, value in run(given, inverse).items():
            # both are off by some roundings; what is wrong in float64 alone is off by far more
            size = 1 + exact[name].abs().max()
            torch.testing.assert_close(value, exact[name], rtol=0, atol=1e-10 * float(size))


@by_terms
@by_direction
def test_a_row_is_bitwise_the_same_in_any_batch(inverse: bool, terms: str) -> None:
    given = problem(75, 5, (6, 7), terms).to(F32)
    whole, matrices = run(given, inverse), 2 * given.layers - 1
    per_row = ["out", "ladj", "d_in"]
    per_row += [f"net {i}" for i, one in enumerate(given.net) if i >= matrices and one.dim() == 2]
    for start, end in [(0, 1), (74, 75), (7, 40), (16, 49), (31, 75), (40, 41)]:
        piece = run(given.rows(slice(start, end)), inverse)
        for name in per_row:
            assert torch.equal(piece[name], whole[name][start:end]), name


@by_direction
def test_any_number_of_threads_gives_the_same_bits(threads: None, inverse: bool) -> None:
    given = problem(1001, 5, (16, 9), "mixed").to(F32)
    torch.set_num_threads(1)
    serial = run(given, inverse)
    for count in (2, 3):
        torch.set_num_threads(count)
        for name, value in run(given, inverse).items():
            assert torch.equal(value, serial[name]), (count, name)


@by_direction
def test_without_gradients_of_the_net_those_of_the_points_stay(inverse: bool) -> None:
    given = problem(21, 3, (6, 5))
    full, short = run(given, inverse), run(given, inverse, param_grads=False)
    for name, value in short.items():
        wanted = not name.startswith("net")
        assert torch.equal(value, full[name]) if wanted else value.shape == (0,)


@by_terms
@by_direction
def test_no_rows(inverse: bool, terms: str) -> None:
    given = problem(0, 3, (6, 5), terms)
    found, want = run(given, inverse), by_reference(given, inverse)
    for name, value in want.items():
        assert torch.equal(found[name], value), name


@by_direction
def test_terms_may_be_columns_of_a_larger_tensor(inverse: bool) -> None:
    given = problem(19, 3, (6, 5))
    matrices = 2 * given.layers - 1
    wide = torch.cat(given.net[matrices:], -1)
    columns = wide.split([term.shape[-1] for term in given.net[matrices:]], -1)
    split = given._replace(net=[*given.net[:matrices], *columns])
    shared = given._replace(
        net=[*given.net[:matrices], *(one[:1].expand(19, -1) for one in columns)]
    )
    rows = given._replace(net=[one.contiguous() for one in shared.net])
    for one, other in ((given, split), (rows, shared)):
        want, found = run(one, inverse), run(other, inverse)
        assert all(torch.equal(found[name], value) for name, value in want.items())


@by_direction
def test_a_bad_row_stays_alone(inverse: bool) -> None:
    given = problem(20, 4, (6, 5)).to(F32)
    want = run(given, inverse)
    spoilt = given._replace(x=given.x.clone())
    spoilt.x[3, 1], spoilt.x[17, 0] = torch.nan, torch.inf
    found = run(spoilt, inverse)
    good = torch.ones(20, dtype=torch.bool).index_fill(0, torch.tensor([3, 17]), value=False)
    for name in ("out", "ladj", "d_in"):
        assert torch.equal(found[name][good], want[name][good]), name
    assert found["ladj"][~good].isnan().all()


def test_a_hessian_that_is_not_positive_has_no_log_determinant() -> None:
    given = problem(20, 3, (6, 5))
    curvature = given.net[3 * given.layers + 1]
    curvature[7] = -50.0  # which no layer makes
    ladj = run(given, inverse=False)["ladj"]
    assert ladj.isnan().tolist() == [row == 7 for row in range(20)]
    curvature[7, 0] = torch.nan
    given.d_out[7], given.dladj[7] = 0.0, 0.0  # as torch.where leaves a row that is not wanted
    finite = {name: value.isfinite().all() for name, value in run(given, inverse=False).items()}
    assert not finite.pop("ladj") and not finite.pop("out") and not finite.pop("d_in")
    assert all(finite.values())


def arguments(op: str) -> list:
    given = problem(5, 3, (6, 4)).to(F32)
    if op.endswith("backward"):
        return [given.d_out, given.dladj, given.x, [], given.net, given.layers, True]
    return [given.x, given.net, given.layers, True]


@pytest.mark.parametrize("op", [op for op in native.FAKES if op.startswith("pcp")])
def test_opcheck(op: str) -> None:
    values = arguments(op)
    torch.library.opcheck(getattr(native, op), values)
    torch.library.opcheck(getattr(native, op), [*values[:-1], False])


@pytest.mark.parametrize("op", [op for op in native.FAKES if op.startswith("pcp")])
def test_a_raw_op_refuses_to_be_differentiated(op: str) -> None:
    values = arguments(op)
    layer = r"PCPMap\.inverse" if "inverse" in op else "PCPMap"
    net = next(i for i, one in enumerate(values) if isinstance(one, list) and one)
    for position, leaf in ((0, values[0]), (net, values[net][0])):
        leaf = leaf.clone().requires_grad_()
        changed = [leaf, *values[net][1:]] if position else leaf
        with pytest.raises(RuntimeError, match=rf"call fastflow\.{layer} instead"):
            getattr(native, op)(*values[:position], changed, *values[position + 1 :])


def spoil(tensor: Tensor, flaw: str) -> Tensor:
    if flaw == "dtype":
        return tensor.double()
    if flaw == "strides":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if flaw == "size":
        return torch.cat([tensor, tensor], -1)
    return tensor[None, None]


@pytest.mark.parametrize("flaw", ["dtype", "strides", "size", "dimensions"])
@pytest.mark.parametrize("op", ["pcp_forward", "pcp_inverse_backward"])
def test_a_wrong_argument_is_refused(op: str, flaw: str) -> None:
    values = arguments(op)
    net = next(i for i, one in enumerate(values) if isinstance(one, list) and one)
    getattr(ops, op)(*values)
    for position in range(net):
        if isinstance(values[position], Tensor):
            changed = list(values)
            changed[position] = spoil(values[position], flaw)
            with pytest.raises(RuntimeError, match="pcp: "):
                getattr(ops, op)(*changed)
    for position, tensor in enumerate(values[net]):
        changed = list(values)
        changed[net] = list(values[net])
        changed[net][position] = spoil(tensor, flaw)
        with pytest.raises(RuntimeError, match="pcp: "):
            getattr(ops, op)(*changed)


@pytest.mark.parametrize("layers", [0, -1, 1, 4])
def test_a_wrong_number_of_layers_is_refused(layers: int) -> None:
    given = problem(5, 3, (6, 4))
    with pytest.raises(RuntimeError, match=r"pcp: (layers|net) must"):
        ops.pcp_forward(given.x, given.net, layers, False)


def outside(library: Path, **environment: str) -> list[list[str]]:
    """The lines of this file run as a script, in fields."""
    command = [sys.executable, "-X", "faulthandler", __file__, str(library)]
    process = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return [line.split() for line in process.stdout.splitlines()]


def test_results_do_not_depend_on_uninitialised_memory() -> None:
    # glibc fills new memory with the complement of this byte: -1.7e38 and 3.5e21 in float32
    library = native.libraries["cpp"]
    one, other = (outside(library, MALLOC_PERTURB_=str(x)) for x in (1, 0x9D))
    assert one == other


def test_builds_for_all_vector_units_agree() -> None:
    flavours = native.CPU_LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    files = [native.libraries["cpp"].with_name(f"_cpu_{flavour}.so") for flavour in flavours]
    files = [file for file in files if file.exists()]
    if len(files) < 2:
        pytest.skip("one build alone runs here")
    tables = [outside(file) for file in files]
    for table in tables[1:]:
        for (dtype, name, value, _), (*_, expected, norm) in zip(table, tables[0], strict=True):
            # Newton and the inverse of H amplify rounding errors; a wrong lane is off by far more
            tolerance = 2000 * torch.finfo(getattr(torch, dtype)).eps
            assert abs(float(value) - float(expected)) <= tolerance * (1 + float(norm)), name


@by_direction
def test_the_kernels_keep_nothing(inverse: bool) -> None:
    """Of the layer's (B, D, H) and (B, H) tensors; the reference keeps them."""
    layer = fastflow.PCPMap(8, 0, (32, 32))
    x, kept = torch.randn(50, 8, requires_grad=True), {}
    for backend in ("cpp", "reference"):
        sizes: list[int] = []
        pack = lambda one, sizes=sizes: (sizes.append(one.numel()), one)[1]  # noqa: E731
        with (
            fastflow.use_backend(backend),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one),
        ):
            (layer.inverse if inverse else layer)(x)
        kept[backend] = max(sizes)
    assert kept["cpp"] == 32 * 32 < 50 * 8 * 32 == kept["reference"]
