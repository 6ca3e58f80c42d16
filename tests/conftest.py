"""Every backend that works here, as a fixture. Without a GPU, Triton runs in its interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton decorates anything

import fastflow
from fastflow import backends

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@dataclass(frozen=True)
class Target:
    """A backend and the device on which it runs."""

    device: str
    backend: str

    @property
    def slow(self) -> bool:
        """Whether it interprets kernels, so that tests keep their shapes small."""
        return self.backend == "triton" and self.device == "cpu"

    @property
    def rows(self) -> int:
        """A batch size that takes no time and is no multiple of anything."""
        return 5 if self.slow else 67


def targets(op: str) -> list[Target]:
    """The backends that have an op, on every device here."""
    return [Target(device, name) for device in DEVICES for name in backends.available(device, op)]


def target_id(target: Target) -> str:
    return f"{target.device}-{target.backend}"


@pytest.fixture(params=targets("planar_flow_forward"), ids=target_id)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Runs the test once for every backend, with that backend in force."""
    with fastflow.use_backend(request.param.backend):
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


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
