"""Memory of large CPU results, which is kept for the calls to come: csrc/common/recycled.h."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import fastflow
from fastflow import native

MIB = 2**20
STATM = Path("/proc/self/statm")

pytestmark = [
    pytest.mark.skipif("cpp" not in native.libraries, reason="the CPU library is not built"),
    pytest.mark.skipif(not STATM.exists(), reason="needs /proc to see the process's memory"),
]


def flow(rows: int, features: int) -> torch.Tensor:
    """One planar step, whose output has rows x features numbers and its other results few."""
    w, u, b = torch.ones(1, features), torch.ones(1, features), torch.zeros(1)
    with torch.no_grad():
        return fastflow.functional.planar_flow(torch.ones(rows, features), w, u, b)[0]


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held_after(mebibytes: list[int]) -> float:
    """By how many MiB the process has grown by results of these sizes that are gone again."""
    flow(64, 1024)
    before = resident()
    for size in mebibytes:
        flow(size * MIB // 4096, 1024)
    return (resident() - before) / MIB


@pytest.mark.parametrize(
    ("limit", "sizes", "least", "most"),
    [
        (None, [40] * 4, 36, 48),  # the default keeps one, and the same one is used again
        (None, [40, 44, 48], 44, 64),  # the oldest makes room for the newest
        (None, [80], 0, 8),  # above the limit nothing is kept
        ("0", [40] * 4, 0, 8),
        ("-5", [40] * 4, 36, 48),  # no number of MiB: the default
        ("100MiB", [80], 0, 8),
        ("100", [80], 76, 88),
    ],
)
def test_how_much_is_kept(limit: str | None, sizes: list[int], least: int, most: int) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "FASTFLOW_KEEP_MIB"}
    if limit is not None:
        environment["FASTFLOW_KEEP_MIB"] = limit
    code = f"import test_recycled; print(test_recycled.held_after({sizes}))"
    grown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    # inputs of the same size are freed by then; a few MiB are pages of code that has first run now
    assert least <= float(grown.stdout) <= most


def test_a_result_keeps_its_memory_while_it_lives() -> None:
    first = flow(256, 1024)
    kept = first.clone()
    view, address = first[17], first.data_ptr()
    del first
    assert flow(256, 1024).data_ptr() != address  # the view is alive
    assert torch.equal(view, kept[17])
    del view
    assert flow(256, 1024).data_ptr() == address


def test_threads_take_and_give_at_once() -> None:
    expected = {rows: flow(rows, 1024) for rows in (64, 128, 256)}

    def work(seed: int) -> bool:
        sizes = [64, 128, 256] * 20
        alive = []
        for turn, rows in enumerate(sizes):
            alive.append((rows, flow(rows, 1024)))
            if turn % 3 == seed % 3:
                alive = alive[-2:]
        return all(torch.equal(result, expected[rows]) for rows, result in alive)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


# Another thread takes and gives all the time: now and then it holds the lock when a child comes.
FORK = """
import os, threading, torch, test_recycled
torch.set_num_threads(1)  # PyTorch's own operations would wait for threads that a child has not
held, expected = test_recycled.flow(256, 1024), test_recycled.flow(256, 1024).clone()
done = threading.Event()
def work():
    while not done.is_set():
        test_recycled.flow(64, 1024)
thread = threading.Thread(target=work)
thread.start()
for _ in range(50):
    child = os.fork()
    if child == 0:
        del held
        results = [test_recycled.flow(rows, 1024) for rows in (256, 512, 256)]
        os._exit(0 if all(torch.equal(one[:256], expected) for one in results) else 1)
    assert os.waitpid(child, 0)[1] == 0
done.set()
thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_takes_and_gives() -> None:
    command = [sys.executable, "-c", FORK]
    subprocess.run(command, cwd=Path(__file__).parent, check=True, timeout=60)


def test_a_result_can_be_shared_and_stored(tmp_path: Path) -> None:
    """The memory is not PyTorch's own: what moves tensors between processes must cope."""
    result = flow(256, 1024)
    expected = result.clone()
    torch.save(result, tmp_path / "result.pt")
    assert torch.equal(torch.load(tmp_path / "result.pt"), expected)
    assert torch.equal(result.share_memory_(), expected)


# In a process of its own: the C library keeps memory too if other blocks happen to lie behind it.
FAULTS = """
import resource, torch, fastflow
torch.set_num_threads(2)
layer = fastflow.MaskedAffineAutoregressive(64, (1024, 1024))
x = torch.randn(1024, 64)
def differentiate():
    y, ladj = layer(x)
    torch.autograd.grad(y.sum() + ladj.sum(), list(layer.parameters()))
for _ in range(3):
    differentiate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    differentiate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_what_kernels_work_in_is_kept() -> None:
    """A backward pass that works in megabytes asks the system for hardly a page once it has run."""
    environment = {name: value for name, value in os.environ.items() if name != "FASTFLOW_KEEP_MIB"}
    run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=60)
    done = run([sys.executable, "-c", FAULTS], env=environment)
    assert int(done.stdout) < 300  # in five passes; of some 5000 where nothing is kept
