"""What a training job does to a library: forks, hostile arguments, little memory."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from conftest import Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import problem
from torch.utils.data import DataLoader, Dataset

import fastflow
from fastflow.functional import planar_flow, planar_flow_inverse


class FlowedPoints(Dataset):
    """A data set whose workers run a flow in a forked process."""

    def __init__(self) -> None:
        self.flow = fastflow.PlanarFlow(16, steps=8).requires_grad_(False)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.flow(torch.full((4096, 16), float(index)))[0]


@pytest.mark.timeout(120)
def test_data_loader_workers_run_flows_after_the_parent_did() -> None:
    """A thread pool of the parent does not exist in a forked child; waiting for it would hang."""
    data = FlowedPoints()
    want = [data[index] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork")
    for got, expected in zip(loader, want):
        assert torch.equal(got, expected)


shapes = st.lists(st.integers(0, 4), min_size=0, max_size=4)
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
tensors = st.builds(lambda shape, dtype: torch.ones(shape).to(dtype), shapes, dtypes)
anything = st.one_of(tensors, st.none(), st.floats(), st.text(max_size=3))


@settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([planar_flow, planar_flow_inverse]),
    st.one_of(st.tuples(*[tensors] * 4), st.tuples(*[anything] * 4)),
    st.sampled_from(["paper", "centred", "no such", None]),
)
def test_any_arguments_give_a_result_or_a_clear_error(
    op: object, arguments: tuple, constraint: str
) -> None:
    try:
        out, ladj = op(*arguments, constraint)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(op.__name__)
    else:
        assert out.shape[:-1] == ladj.shape and out.shape[-1] == arguments[0].shape[-1]


@pytest.mark.skipif(
    fastflow.backends.available("cpu")[0] == "reference",
    reason=f"nothing to compare the reference with: {fastflow.backends.status('cpp')}",
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 40),
    steps=st.integers(1, 20),
    shared=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_sizes_agree_with_the_reference(
    rows: int, features: int, steps: int, shared: bool, seed: int
) -> None:
    """In float64, so that what a random chain magnifies stays far below the bar."""
    torch.manual_seed(seed)
    leaves = problem(rows, features, steps, shared)
    results = []
    for backend in ("reference", fastflow.backends.available("cpu")[0]):
        with fastflow.use_backend(backend):
            out, ladj = planar_flow(*leaves)
            grads = torch.autograd.grad(out.sin().sum() + ladj.sum(), leaves)
            back, _ = planar_flow_inverse(out.detach(), *leaves[1:])
            results.append([out, ladj, *grads, back])
    for one, other in zip(*results):
        scale = 1 + float(one.detach().abs().max())
        assert (one - other).abs().max() <= 1e-7 * scale


def modules() -> list[str]:
    """The modules of the package whose docstrings may hold examples."""
    found = pkgutil.walk_packages(fastflow.__path__, "fastflow.")
    # the native libraries are no Python modules, whatever their suffix says
    skipped = ("fastflow._", "fastflow.kernels", "fastflow.vae.__main__")
    return [module.name for module in found if not module.name.startswith(skipped)]


@pytest.mark.parametrize("name", modules())
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    names = {**vars(fastflow), **vars(fastflow.functional), "fastflow": fastflow, "torch": torch}
    result = doctest.testmod(module, extraglobs=names)
    assert result.failed == 0


def test_import_is_quick_and_asks_no_device() -> None:
    """Measured against torch itself, which takes most of the time, in one fresh process."""
    script = """
import time, torch
def refuse(*args): raise SystemExit("import fastflow asked for a device")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = refuse
start = time.process_time()
import fastflow
print(time.process_time() - start)
import sys
print([name for name in sys.modules if name.split(".")[0] in ("triton", "matplotlib", "sklearn")])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, heavy = run.stdout.splitlines()
    assert float(seconds) < 1
    assert heavy == "[]"


def test_numpy_is_not_needed() -> None:
    """torch does without it too: it is no dependency of either."""
    script = """
import sys
sys.modules["numpy"] = None
import torch, fastflow
flow = fastflow.Flow(fastflow.PlanarFlow(2, steps=3))
flow.log_prob(flow.sample((5,))).sum().backward()
from fastflow import vae
model = vae.build(vae.Config(posterior="planar"), (2, 2))
print(vae.evaluate(model, torch.rand(3, 4), torch.Generator())["kl"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) >= 0


def test_memory_saved_for_backward(target: Target) -> None:
    """The input, the output, K numbers a row, and the parameters: O(B (D + K)), not O(B D K)."""
    B, D, K = 64, 16, 32
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    z = torch.randn(B, D, device=target.device, requires_grad=True)
    flow = fastflow.PlanarFlow(D, steps=K).to(target.device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        flow(z)
    parameters = sum(p.numel() for p in flow.parameters())
    assert sum(saved.values()) <= B * (2 * D + K) + parameters
