"""The autograd node in C++: what it takes, what it leaves to Python, what it keeps and how long.

That it computes the right thing is tested with every op, by the targets whose name ends in -node;
how it treats arguments of any kind in test_node_ops.py.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import problem
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import fastflow
from fastflow import diagnostics
from fastflow.autograd import node
from fastflow.functional import made, planar_flow, planar_flow_inverse

needs_node = pytest.mark.skipif(not node.enabled, reason=f"no autograd node: {node.reason}")
FORWARD = "planar_flow_forward"


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in problem(5, 3, 2, True, dtype)]


def by_node(output: Tensor) -> bool:
    return output.grad_fn.name() == "fastflow::planar_flow_backward"


# ---------------------------------------------------------------- what it takes


@needs_node
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_tensors_take_the_node(shared: bool, dtype: torch.dtype) -> None:
    z, w, u, b = problem(5, 3, 2, shared, dtype)
    z_K, ladj = planar_flow(z, w, u, b)
    assert by_node(z_K) and by_node(ladj)
    z, _ = planar_flow_inverse(z_K.detach(), w, u, b)
    assert z.grad_fn.name() == "fastflow::planar_flow_inverse_backward"


@needs_node
def test_parameters_of_modules_are_plain() -> None:
    assert by_node(fastflow.PlanarFlow(3, steps=2)(torch.zeros(5, 3))[0])
    layer = fastflow.MaskedAffineAutoregressive(3, (8, 8), context_features=2)
    x, context = torch.zeros(5, 3), torch.zeros(5, 2)
    for y in layer(x, context):
        assert y.grad_fn.name() == "fastflow::autoregressive_context_backward"
    y = made(x, **layer.network.network(context))
    assert y.grad_fn.name() == "fastflow::made_backward"


class Labelled(Tensor):
    """A subclass, whose __torch_function__ must see what is done with it."""


@needs_node
@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.as_subclass(Labelled),
        lambda t: t.double(),
        lambda t: t.to(torch.bfloat16),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t[..., :0],
        lambda t: t[None],
        lambda t: t.to("meta"),
        lambda t: t.tolist(),
        lambda t: t.to_sparse(),
        lambda t: torch.nested.nested_tensor([t]),
        lambda t: t.int(),
    ],
    ids=["subclass", "dtypes", "half", "strides", "empty", "dimensions", "device", "list"]
    + ["sparse", "nested", "integers"],
)
def test_it_declines_what_is_not_plain(change: Callable, position: int) -> None:
    arguments = leaves()
    assert node.run(FORWARD, *arguments, False) is not None
    arguments[position] = change(arguments[position].detach())
    assert node.run(FORWARD, *arguments, False) is None


@needs_node
def test_it_declines_under_modes_and_transforms() -> None:
    arguments = leaves()
    with FlopCounterMode(display=False):
        assert node.run(FORWARD, *arguments, False) is None
    with torch.device("cpu"):  # a mode of __torch_function__
        assert node.run(FORWARD, *arguments, False) is None
    with fastflow.use_backend("reference"):
        assert node.run(FORWARD, *arguments, False) is None
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[0].detach(), torch.ones(5, 3))
        assert node.run(FORWARD, dual, *arguments[1:], False) is None
    torch.func.vmap(lambda z: check_declined(z, *arguments[1:]))(torch.zeros(2, 5, 3))
    torch.func.grad(lambda z: check_declined(z, *arguments[1:]))(torch.zeros(5, 3))


def check_declined(*arguments: Tensor) -> Tensor:
    assert node.run(FORWARD, *arguments, False) is None
    return arguments[0].sum()


@needs_node
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_op() -> None:
    """A node that a trace cannot see would leave constants in its place."""
    z, *parameters = (t.detach() for t in problem(5, 3, 2, True, torch.float32))
    traced = torch.jit.trace(lambda z: planar_flow(z, *parameters), (z,))
    other = torch.randn(5, 3)
    assert torch.equal(traced(other)[0], planar_flow(other, *parameters)[0])


@needs_node
def test_without_gradients_nothing_is_recorded() -> None:
    arguments = leaves()
    with torch.no_grad():
        assert planar_flow(*arguments)[0].grad_fn is None
    with torch.inference_mode():
        assert planar_flow(*arguments)[0].is_inference()
    assert planar_flow(*(t.detach() for t in arguments))[1].grad_fn is None


# ---------------------------------------------------------------- what it keeps


@needs_node
def test_saved_tensors_live_until_backward_and_form_no_cycle() -> None:
    gc.disable()
    try:
        z, *parameters = leaves()
        points = z * 1
        z_K, ladj = planar_flow(points, *parameters)
        alive = weakref.ref(points), weakref.ref(z_K)
        del points
        total = z_K.sum() + ladj.sum()
        del z_K, ladj
        assert alive[0]() is not None  # kept by the node
        total.backward(retain_graph=True)
        assert alive[0]() is not None
        total.backward()
        assert alive[0]() is None  # freed by backward, though the graph is still there
        del total
        assert alive[1]() is None
        z_K, _ = planar_flow(*leaves())
        gone = weakref.ref(z_K)
        del z_K
        assert gone() is None  # freed without a backward
    finally:
        gc.enable()


@needs_node
def test_a_second_backward_is_refused() -> None:
    out = planar_flow(*leaves())[0].sum()
    out.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.backward()


@needs_node
@pytest.mark.parametrize("changed", ["z", "z_K", "w"])
def test_changes_in_place_of_what_is_kept_are_refused(changed: str) -> None:
    z, w, u, b = leaves()
    z, w = z * 1, w * 1
    z_K, ladj = planar_flow(z, w, u, b)
    with torch.no_grad():
        {"z": z, "z_K": z_K, "w": w}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ladj.sum().backward()


@needs_node
def test_ladj_may_be_changed_in_place() -> None:
    arguments = leaves()
    z_K, ladj = planar_flow(*arguments)
    assert by_node(z_K)
    ladj += 1
    (z_K.sum() + ladj.sum()).backward()
    assert arguments[0].grad is not None


@needs_node
def test_hooks_on_saved_tensors_see_all_of_them() -> None:
    arguments = leaves()
    want = torch.autograd.grad(planar_flow(*arguments)[1].sum(), arguments)
    packed = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor.shape)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z_K, ladj = planar_flow(*arguments)
    assert by_node(z_K) and len(packed) == 6  # z, w, u, b, z_K, a
    for one, other in zip(torch.autograd.grad(ladj.sum(), arguments), want):
        assert torch.equal(one, other)
    with torch.autograd.graph.save_on_cpu():
        _, ladj = planar_flow(*arguments)
    for one, other in zip(torch.autograd.grad(ladj.sum(), arguments), want):
        assert torch.equal(one, other)


@needs_node
def test_an_error_in_a_hook_leaves_as_it_is() -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise KeyError("no room")

    with pytest.raises(KeyError, match="no room"):
        with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
            planar_flow(*leaves())
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, refuse):
        out, _ = planar_flow(*leaves())
    with pytest.raises(KeyError, match="no room"):
        out.sum().backward()


@needs_node
def test_threads_share_parameters() -> None:
    _, *parameters = leaves()
    points = [torch.randn(64, 3) for _ in range(8)]

    def gradients(z: Tensor) -> tuple[Tensor, ...]:
        out, ladj = planar_flow(z.requires_grad_(), *parameters)
        return torch.autograd.grad(out.sum() + ladj.sum(), (z, *parameters))

    want = [gradients(z) for z in points]
    with ThreadPoolExecutor(4) as pool:
        for found, expected in zip(pool.map(gradients, points * 20), want * 20):
            assert all(torch.equal(one, other) for one, other in zip(found, expected))


@needs_node
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_names_the_call() -> None:
    z, w, u, b = leaves()
    with torch.autograd.detect_anomaly(check_nan=True):
        out, _ = planar_flow(z, w, u, b * torch.nan)
        with pytest.warns(UserWarning, match="in test_anomaly_mode_names_the_call"):
            with pytest.raises(RuntimeError, match=r"planar_flow_backward. returned nan"):
                out.sum().backward()


# ---------------------------------------------------------------- without it

USE = """
import sys, torch
{before}
import fastflow
from fastflow import diagnostics
from fastflow.autograd import node
x = torch.zeros(3, 2, requires_grad=True)
y, ladj = fastflow.PlanarFlow(2)(x)
(y.sum() + ladj.sum()).backward()
print(node.reason, node.enabled, type(y.grad_fn).__name__, x.grad.shape)
print(diagnostics.report())
"""


@pytest.mark.parametrize(
    ("before", "reason", "remedy"),
    [
        ("torch.version.git_version = '0123456789'", "another torch", "install fastflow again"),
        ("torch.__version__ = '2.99.0'", "another torch or Python: _autograd-", "install fastflow"),
        ("import os; os.environ['FASTFLOW_NODE'] = '0'", "FASTFLOW_NODE=0", "unset it"),
    ],
)
@needs_node
def test_without_it_the_python_path_serves(
    tmp_path: Path, before: str, reason: str, remedy: str
) -> None:
    command = [sys.executable, "-W", "error", "-c", USE.format(before=before)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    first, *report = run.stdout.splitlines()
    assert reason in first and first.endswith("False PlanarFlowBackward torch.Size([3, 2])")
    (line,) = [i for i, line in enumerate(report) if line.split()[:2] == ["node", "missing"]]
    assert reason in report[line] and remedy in report[line + 1]


def test_info_tells_of_it() -> None:
    told = fastflow.info()["node"]
    assert (told["library"] is None) == (told["reason"] is not None)
    assert any(line.split()[:1] == ["node"] for line in diagnostics.report().splitlines())
