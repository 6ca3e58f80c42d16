"""The compiled CPU library below every Python layer: the raw ops of torch.ops.fastflow.

What must be seen from outside a process (poisoned memory, guard pages, other builds, a fork) runs
this file as a script: `python test_native.py <task> <library>`.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import problem
from torch import Tensor

SIZES = [(1, 1, 1), (3, 2, 5), (17, 16, 1), (33, 17, 9), (70, 65, 4), (2, 300, 3)]
DTYPES = [torch.float32, torch.float64]
KINDS = pytest.mark.parametrize("shared", [True, False], ids=["shared", "amortised"])
DIRECTIONS = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def arguments(
    rows: int, features: int, steps: int, shared: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """z, w, u, b and cotangents of the output and of ladj, the same whenever they are drawn."""
    torch.manual_seed(rows + 31 * features + 977 * steps)
    inputs = [leaf.detach() for leaf in problem(rows, features, steps, shared)]
    cotangents = [torch.randn_like(inputs[0]), torch.randn(rows, dtype=torch.float64)]
    return [tensor.to(dtype) for tensor in (*inputs, *cotangents)]


def run(inverse: bool, tensors: list[Tensor], param_grads: bool = True) -> dict[str, Tensor]:
    """All outputs of the op and of its backward."""
    z, w, u, b, d_out, dladj = tensors
    ops = torch.ops.fastflow
    apply = ops.planar_flow_inverse if inverse else ops.planar_flow_forward
    backward = ops.planar_flow_inverse_backward if inverse else ops.planar_flow_backward
    out, ladj, a = apply(z, w, u, b, False)
    grads = backward(d_out, dladj, z, out, w, u, a, False, param_grads)
    names = ("out", "ladj", "a", "dz", "dw", "du", "db")
    return dict(zip(names, (out, ladj, a, *grads), strict=True))


def per_row(outputs: dict[str, Tensor], shared: bool) -> dict[str, Tensor]:
    """The outputs that have a row for every row of the batch."""
    summed = ("dw", "du", "db") if shared else ()
    return {name: value for name, value in outputs.items() if name not in summed}


@pytest.fixture(scope="module")
def library() -> Path:
    """The CPU library in use."""
    from fastflow import native

    if "cpp" not in native.libraries:
        pytest.skip(f"no native library: {native.probe('cpp')}")
    return native.libraries["cpp"]


@KINDS
@DIRECTIONS
@pytest.mark.parametrize(("features", "steps"), [(1, 1), (5, 3), (33, 18)])
def test_a_row_is_bitwise_the_same_in_any_batch(
    library: Path, features: int, steps: int, inverse: bool, shared: bool
) -> None:
    rows = 75
    tensors = arguments(rows, features, steps, shared)
    whole = per_row(run(inverse, tensors), shared)
    # single rows and pieces that put a row into every position of a tile
    for start, end in [(0, 1), (74, 75), (7, 40), (16, 49), (31, 75), (40, 41)]:
        piece = [t if shared and i in (1, 2, 3) else t[start:end] for i, t in enumerate(tensors)]
        for name, value in per_row(run(inverse, piece), shared).items():
            assert torch.equal(value, whole[name][start:end]), name


@KINDS
@DIRECTIONS
def test_any_number_of_threads_gives_the_same_bits(
    library: Path, threads: None, inverse: bool, shared: bool
) -> None:
    tensors = arguments(3001, 19, 7, shared)
    torch.set_num_threads(1)
    serial = run(inverse, tensors)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for name, value in run(inverse, tensors).items():
            assert torch.equal(value, serial[name]), (count, name)


@KINDS
@DIRECTIONS
def test_param_grads_off_leaves_dz_alone(library: Path, inverse: bool, shared: bool) -> None:
    tensors = arguments(37, 21, 4, shared)
    full, short = run(inverse, tensors), run(inverse, tensors, param_grads=False)
    assert torch.equal(full["dz"], short["dz"])
    assert all(short[name].shape == (0,) for name in ("dw", "du", "db"))


@KINDS
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("flaw", ["dtype", "strides", "size", "dimensions"])
def test_a_wrong_input_of_forward_is_refused(
    library: Path, position: int, flaw: str, shared: bool
) -> None:
    tensors = arguments(6, 4, 3, shared)[:4]
    torch.ops.fastflow.planar_flow_forward(*tensors, False)
    tensors[position] = spoil(tensors[position], flaw)
    with pytest.raises(RuntimeError, match="planar_flow: "):
        torch.ops.fastflow.planar_flow_forward(*tensors, False)


@KINDS
@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("flaw", ["dtype", "strides", "size", "dimensions"])
def test_a_wrong_input_of_backward_is_refused(
    library: Path, position: int, flaw: str, shared: bool
) -> None:
    z, w, u, b, d_out, dladj = arguments(6, 4, 3, shared)
    out, _, a = torch.ops.fastflow.planar_flow_forward(z, w, u, b, False)
    tensors = [d_out, dladj, z, out, w, u, a]
    torch.ops.fastflow.planar_flow_backward(*tensors, False, True)
    tensors[position] = spoil(tensors[position], flaw)
    with pytest.raises(RuntimeError, match="planar_flow: "):
        torch.ops.fastflow.planar_flow_backward(*tensors, False, True)


def spoil(tensor: Tensor, flaw: str) -> Tensor:
    if flaw == "dtype":
        return tensor.double()
    if flaw == "strides":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if flaw == "size":
        return tensor[..., :-1].contiguous()
    return tensor[None]


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.complex64])
def test_other_dtypes_are_refused(library: Path, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in arguments(6, 4, 3, True)[:4]]
    with pytest.raises(RuntimeError, match="must be float32 or float64"):
        torch.ops.fastflow.planar_flow_forward(*tensors, False)


@pytest.mark.parametrize("empty", range(3))
def test_empty_sizes_are_refused(library: Path, empty: int) -> None:
    rows, features, steps = (0 if i == empty else 2 for i in range(3))
    with pytest.raises(RuntimeError, match="must be at least 1"):
        torch.ops.fastflow.planar_flow_forward(*arguments(rows, features, steps, True)[:4], False)


# ---------------------------------------------------------------- in processes of their own


def outside(task: str, library: Path, **environment: str) -> str:
    command = [sys.executable, "-X", "faulthandler", __file__, task, str(library)]
    process = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def cases(dtype: torch.dtype) -> Iterator[tuple[bool, list[Tensor]]]:
    for size, shared, inverse in itertools.product(SIZES, [True, False], [False, True]):
        yield inverse, arguments(*size, shared, dtype)


def print_digest() -> None:
    """A digest of the bits of all results."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for inverse, tensors in cases(dtype):
            for value in run(inverse, tensors).values():
                digest.update(value.numpy().tobytes())
    print(digest.hexdigest())


def test_results_do_not_depend_on_uninitialised_memory(library: Path) -> None:
    # glibc fills new memory with the complement of this byte: -1.7e38 and 3.5e21 in float32
    digests = {outside("print_digest", library, MALLOC_PERTURB_=str(x)) for x in (0, 1, 0x9D)}
    assert len(digests) == 1


def print_results() -> None:
    """Sums of all results, weighted, in full precision."""
    for dtype in DTYPES:
        for inverse, tensors in cases(dtype):
            for value in run(inverse, tensors).values():
                flat = value.double().flatten()
                weights = torch.arange(1, flat.numel() + 1, dtype=torch.float64).cos()
                print(str(dtype), (flat * weights).sum().item(), flat.norm().item())


def test_builds_for_all_vector_units_agree(library: Path) -> None:
    from fastflow import native

    flavours = native.CPU_LIBRARIES.get(torch.backends.cpu.get_cpu_capability(), ("default",))
    files = [library.with_name(f"_cpu_{flavour}.so") for flavour in flavours]
    files = [file for file in files if file.exists()]
    if len(files) < 2:
        pytest.skip("one build alone runs here")
    tables = [
        [line.split() for line in outside("print_results", file).splitlines()] for file in files
    ]
    for table in tables[1:]:
        assert len(table) == len(tables[0]) > 0
        for (dtype, value, _), (_, expected, norm) in zip(table, tables[0], strict=True):
            # chains of steps amplify rounding errors; a wrong lane is off by far more than this
            tolerance = 2000 * torch.finfo(getattr(torch, dtype[6:])).eps
            assert abs(float(value) - float(expected)) <= tolerance * (1 + float(norm))


class GuardedMemory:
    """Copies of tensors that start right after, or end right before, pages that fault."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def copy(self, tensor: Tensor, at_end: bool) -> Tensor:
        page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
        room = -(-size // page) * page
        memory = mmap.mmap(-1, room + 2 * page)
        self.maps.append(memory)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (start, start + page + room):
            assert self.libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0  # PROT_NONE
        offset = page + (room - size if at_end else 0)
        flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape).copy_(tensor)


def read_guarded() -> None:
    """All cases with all inputs between pages that must not be touched."""
    memory = GuardedMemory()
    for dtype, at_end in itertools.product(DTYPES, [True, False]):
        for inverse, tensors in cases(dtype):
            expected = run(inverse, tensors)
            guarded = [memory.copy(tensor, at_end) for tensor in tensors]
            for name, value in run(inverse, guarded).items():
                assert torch.equal(value, expected[name]), name
    os._exit(0)  # the mappings cannot be closed while tensors look into them


def test_nothing_is_read_outside_the_inputs(library: Path) -> None:
    outside("read_guarded", library)


def run_in_child() -> None:
    """Threads in the parent, then the same in a forked child, which calls nothing else of torch."""
    torch.set_num_threads(2)
    tensors = arguments(4000, 32, 8, True)
    expected = [value.numpy().tobytes() for value in run(False, tensors).values()]
    child = os.fork()
    if child == 0:
        found = [value.numpy().tobytes() for value in run(False, tensors).values()]
        os._exit(0 if found == expected else 1)
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            sys.exit(os.waitstatus_to_exitcode(status))
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    sys.exit("the forked child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_can_run(library: Path) -> None:
    outside("run_in_child", library)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[2])
    tasks = (print_digest, print_results, read_guarded, run_in_child)
    {task.__name__: task for task in tasks}[sys.argv[1]]()
