"""Every backend that works here, as a fixture. Without a GPU, Triton runs in its interpreter."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton decorates anything

import cuda_on_host
from vae_files import write_images

import fastflow
from fastflow import backends
from fastflow.autograd import node

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def in_threads(work: Callable[[int], None], threads: int = 8) -> None:
    """Runs work(0), work(1), .. at once, each in a thread; they take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
    finally:
        sys.setswitchinterval(before)


@dataclass(frozen=True)
class Target:
    """A backend, the device on which it runs, and whether the autograd node in C++ may be used."""

    device: str
    backend: str
    node: bool = False

    @property
    def slow(self) -> bool:
        """Whether it interprets kernels, so that tests keep their shapes small."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def rows(self) -> int:
        """A batch size that takes no time and is no multiple of anything."""
        return 5 if self.slow else 67

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Runs the enclosed calls with this backend, by the node or without it."""
        before, node.enabled = node.enabled, self.node
        try:
            with fastflow.use_backend(self.backend):
                yield
        finally:
            node.enabled = before


def targets(op: str) -> list[Target]:
    """The backends that have an op, on every device here, with and without the node."""
    found = [Target(device, name) for device in DEVICES for name in backends.available(device, op)]
    with_node = [replace(one, node=True) for one in found if one.backend in ("cpp", "cuda")]
    return found + with_node * node.enabled


def target_id(target: Target) -> str:
    return f"{target.device}-{target.backend}" + "-node" * target.node


@pytest.fixture(params=targets("planar_flow_forward"), ids=target_id)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test once for every backend, with that backend in force."""
    with request.param.in_force():
        yield request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: None) -> None:
    """Runs the test in one thread."""
    torch.set_num_threads(1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of tiny images for the tests of fastflow.vae."""
    return write_images(tmp_path / "images")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the pictures of runs, which take longer than the training of tiny models."""
    from fastflow.vae import redraw, training  # which need optional packages

    monkeypatch.setattr(training, "draw_run", lambda *arguments: None)
    monkeypatch.setattr(redraw, "draw_runs", lambda *arguments: None)


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA kernels, compiled for the host."""
    return cuda_on_host.compile_kernels(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def float64() -> Iterator[None]:
    """Makes float64 the type of new tensors."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
