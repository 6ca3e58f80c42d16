"""Every flow in two processes, replicated and sharded, has the gradients that it has in one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from flow_zoo import FLOWS, make, points
from torch import Tensor

from fastflow import ConditionalPlanarFlow, Flow, MaskedAffineAutoregressive, PlanarFlow
from fastflow.sharding import register_fsdp_methods

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)
WAYS = ("replicated", "sharded", "sharded-by-layer")
LAYERS = (ConditionalPlanarFlow, MaskedAffineAutoregressive, PlanarFlow)


def data(flow: Flow) -> tuple[Tensor, Tensor | None]:
    """Two processes take every second row."""
    torch.manual_seed(1)
    return points(flow, 8)


def by_draws(flow: Flow) -> Tensor:
    """A loss of draws, the same ones everywhere."""
    _, context = data(flow)
    torch.manual_seed(2)
    return flow.rsample_and_log_prob(() if context is not None else (8,), context)[1].mean()


def gradients(name: str, way: str, rank: int) -> list[list[float]]:
    """Of a loss by data and, where sharded, of one by draws."""
    flow = make(name).double()
    x, context = data(flow)
    rows = (x[rank::2], None if context is None else context[rank::2])
    if way == "replicated":
        model = torch.nn.parallel.DistributedDataParallel(flow)
        model(*rows).mean().backward()
        return [p.grad.tolist() for p in flow.parameters()]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in list(flow.modules()):
        if isinstance(module, LAYERS) and way == "sharded-by-layer":
            fully_shard(module, mesh=mesh)
    fully_shard(flow, mesh=mesh)
    register_fsdp_methods(flow)
    assert flow.sample((3,), None if context is None else context[0]).shape == (3, x.shape[-1])
    (flow(*rows).mean() + flow.log_prob(*rows).mean()).backward()
    by_draws(flow).backward()
    return [p.grad.full_tensor().tolist() for p in flow.parameters()]


def work(rank: int, meeting: str, queue: multiprocessing.Queue) -> None:
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    try:
        found = {(name, way): gradients(name, way, rank) for name in FLOWS for way in WAYS}
    except Exception as problem:  # the test is to say so, not to wait
        found = f"{type(problem).__name__}: {problem}"
    queue.put((rank, found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """The gradients that both processes found."""
    context = multiprocessing.get_context("spawn")
    # a file of this test alone: a port may be taken
    meeting: Path = tmp_path_factory.mktemp("meeting") / "file"
    queue = context.Queue()
    workers = [
        context.Process(target=work, args=(rank, meeting.as_uri(), queue)) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    try:
        found = {}
        for _ in workers:
            rank, result = queue.get(timeout=150)
            assert isinstance(result, dict), result
            found[rank] = result
        for worker in workers:
            worker.join(timeout=30)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FLOWS)
def test_two_processes_are_one(results: dict[int, dict], name: str, way: str) -> None:
    flow = make(name).double()
    loss = flow(*data(flow)).mean()
    if way != "replicated":
        loss = 2 * loss + by_draws(flow)
    want = torch.autograd.grad(loss, list(flow.parameters()))
    one, other = (results[rank][name, way] for rank in range(2))
    assert one == other
    for got, grad in zip(one, want):
        torch.testing.assert_close(torch.tensor(got, dtype=grad.dtype), grad)
