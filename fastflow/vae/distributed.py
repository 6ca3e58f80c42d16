"""Several processes that train one model, each with its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train together, of which this one is number `rank`.

    Every process draws the noise of the joint batch and takes its rows of it, so that the numbers
    are those of one process up to rounding, whatever the size of the team. The first process alone
    writes files, prints and evaluates.

    Arguments:
        rank: 0 to size - 1.
        size: how many there are; a team of one needs no communication.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Team:
        """Joins the team that torchrun started this process for; without torchrun, a team of one.

        Arguments:
            device: where this process computes: gloo connects CPUs, nccl GPUs.
        """
        if team_size() == 1:
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    def leave(self) -> None:
        """Ends the connection, when all are done."""
        if self.size > 1:
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes, prints and evaluates."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process' rows of a joint batch (B, ...): every size-th one, none if B is small."""
        return rows[self.rank :: self.size] if self.size > 1 else rows

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module, with gradients that are averaged over the team in every backward pass."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def joint(self, own: Tensor) -> Tensor:
        """The sum of a tensor over the team, with the gradient of this process' share."""
        if self.size == 1:
            return own
        total = own.detach().clone()
        distributed.all_reduce(total)
        return own + (total - own.detach())

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it, in all of them."""
        if self.size == 1:
            return make()
        content: list[Any] = [make() if self.is_first else None]
        distributed.broadcast_object_list(content, 0)
        return content[0]


def team_size() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_device(device: torch.device) -> torch.device:
    """The device of this process: under torchrun every process has a GPU of its own."""
    if device.type == "cuda" and team_size() > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
