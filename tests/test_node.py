"""The autograd node in C++: what it takes, what it leaves to Python, what it keeps and how long.

That it computes the right thing is tested with every op, by the targets whose name ends in -node.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
        assert y.grad_fn.name() == "fastflow::autoregressive_backward"
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


# ---------------------------------------------------------------- any op

SCHEMAS = [
    "product_forward(Tensor x, Tensor[] weights, Tensor? shift, float scale, int power, bool sure) "
    "-> (Tensor y, Tensor h)",
    "product_backward(Tensor dy, Tensor h, Tensor[] weights, Tensor x, float scale, "
    "bool param_grads) -> (Tensor dx, Tensor[] dweights)",
]


@pytest.fixture
def product(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """An op with a list of tensors, y = scale x w_1 w_2...; what param_grads its backward got."""
    library = torch.library.Library("fastflow", "FRAGMENT")
    flags = []

    def forward(
        x: Tensor, weights: list, shift: None, scale: float, power: int, sure: bool
    ) -> tuple[Tensor, Tensor]:
        assert shift is None and power == 3 and sure is True
        h = torch.stack(weights).prod(0)
        return scale * x * h, h

    def backward(
        dy: Tensor, h: Tensor, weights: list, x: Tensor, scale: float, param_grads: bool
    ) -> tuple[Tensor, list[Tensor]]:
        flags.append(param_grads)
        return dy * scale * h, [dy * scale * x * h / w for w in weights] if param_grads else []

    def in_python(arguments: tuple, outputs: tuple, cotangents: tuple, wanted: tuple) -> list:
        x, weights, shift, scale, *_ = arguments
        assert len(wanted) == 1 + len(weights) and outputs[0] is None and shift is None
        y = scale * x * torch.stack(weights).prod(0)
        tensors = [t for t, want in zip((x, *weights), wanted) if want]
        found = iter(torch.autograd.grad(y, tensors, *cotangents, create_graph=True))
        return [next(found) if want else None for want in wanted]

    for schema in SCHEMAS:
        library.define(schema)
    library.impl("product_forward", forward, "CPU")
    library.impl("product_backward", backward, "CPU")
    monkeypatch.setattr(node, "_ops", dict(node._ops))
    node.define("product_forward", "product_backward", "BD * * * * *", in_python)
    yield flags
    library._destroy()


@needs_node
@pytest.mark.parametrize("count", [1, 3])
def test_lists_of_tensors(product: list[bool], count: int) -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(count)]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        (y,) = node.run("product_forward", x, list(weights), None, 2.0, 3, True)
        return y

    torch.autograd.gradcheck(run, (x, *weights))
    torch.autograd.gradgradcheck(run, (x, *weights))
    assert node.run("product_forward", x, [[1.0]], None, 2.0, 3, True) is None
    assert node.run("product_forward", x, weights, None, 2.0, 3) is None  # one argument too few


@needs_node
def test_gradients_that_nobody_wants_are_not_computed(product: list[bool]) -> None:
    x, fixed, free = (torch.randn(4, 3, requires_grad=i != 1) for i in range(3))
    (y,) = node.run("product_forward", x, [fixed, free], None, 2.0, 3, True)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), free, retain_graph=True)
    assert product == [False, True]
    y.sum().backward()
    assert product == [False, True, True]
    assert fixed.grad is None and torch.allclose(free.grad, 2 * x * fixed)


LAYERS = [
    "layers_forward(Tensor x, Tensor[] terms, Tensor[] weights, Tensor[] biases, bool save) "
    "-> (Tensor y, Tensor h)",
    "layers_backward(Tensor dy, Tensor h, Tensor x, Tensor[] weights, int terms_grad, "
    "int biases_given, bool x_grad, bool param_grads) "
    "-> (Tensor dx, Tensor[] dterms, Tensor[] dweights, Tensor[] dbiases)",
]


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple]]:
    """An op on a list of layers; what its passes were told to save and to compute."""
    library = torch.library.Library("fastflow", "FRAGMENT")
    told = []

    def forward(
        x: Tensor, terms: list, weights: list, biases: list, save: bool
    ) -> tuple[Tensor, Tensor]:
        assert all(tensor.shape == (0,) or tensor.numel() for tensor in (*terms, *biases))
        if len(weights) > 2:
            raise ValueError("three layers are too many")
        told.append((save,))
        return x * 1, x.new_ones(3)

    def backward(
        dy: Tensor, h: Tensor, x: Tensor, weights: list, *flags: object
    ) -> tuple[Tensor, list, list, list]:
        told.append(flags)
        filled = [torch.full_like(w, 2.0) for w in weights]
        extra = [dy.new_full((len(dy), len(w)), 9.0) for w in weights]  # terms or not
        return dy * 1, extra, filled, [torch.full_like(w[:, 0], 3.0) for w in weights]

    for schema in LAYERS:
        library.define(schema)
    library.impl("layers_forward", forward, "CPU")
    library.impl("layers_backward", backward, "CPU")
    monkeypatch.setattr(node, "_ops", dict(node._ops))
    node.define("layers_forward", "layers_backward", "Bn [Bn]? [nn'] [n]? *", None)
    yield told
    library._destroy()


def network_of(*widths: int) -> tuple[Tensor, list, list, list]:
    """x (4, n_0), terms, weights and biases of layers, none of them missing."""
    x = torch.randn(4, widths[0])
    weights = [torch.randn(n, m, requires_grad=True) for m, n in pairwise(widths)]
    biases = [torch.randn(n) for n in widths[1:]]
    return x, [torch.randn(4, n) for n in widths[1:]], weights, biases


@needs_node
def test_flags_tell_what_is_wanted_and_given(layers: list[tuple]) -> None:
    x, terms, weights, biases = network_of(3, 5, 2)
    (y,) = node.run("layers_forward", x, (), weights, [None, biases[1]], True)
    y.sum().backward()
    assert layers == [(True,), (0, 0b10, False, True)]
    assert all((w.grad == 2).all() for w in weights)
    terms[1].requires_grad_()
    x.requires_grad_()
    frozen = [w.detach() for w in weights]
    (y,) = node.run("layers_forward", x, terms, frozen, biases, False)
    y.sum().backward()
    assert layers[2:] == [(True,), (0b10, 0b11, True, False)]
    node.run("layers_forward", x.detach(), (), frozen, biases, True)
    with torch.no_grad():
        node.run("layers_forward", x, terms, weights, biases, True)
    assert layers[4:] == [(False,), (False,)]  # nothing to save where nothing is recorded


@needs_node
@pytest.mark.parametrize(
    ("place", "entries"),
    [
        (1, [torch.zeros(3, 5), None]),
        (1, [torch.zeros(4, 5)]),
        (2, []),
        (2, [None, torch.zeros(2, 5)]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 4)]),
        (2, [torch.zeros(5, 4), torch.zeros(2, 5)]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 5).double()]),
        (2, [torch.zeros(5, 3), torch.zeros(5, 2).T]),
        (2, [torch.zeros(5, 3), torch.zeros(2, 5).as_subclass(Labelled)]),
        (2, torch.zeros(2, 5)),
        (3, [torch.zeros(5), torch.zeros(5)]),
        (3, [torch.zeros(5), torch.zeros(2, 1)]),
        (3, None),
    ],
    ids=["rows", "few", "none", "missing", "chain", "first", "dtypes", "strides", "subclass"]
    + ["tensor", "bias", "dimensions", "nothing"],
)
def test_lists_that_do_not_fit_are_declined(
    layers: list[tuple], place: int, entries: object
) -> None:
    arguments = list(network_of(3, 5, 2))
    assert node.run("layers_forward", *arguments, True) is not None
    arguments[place] = entries
    assert node.run("layers_forward", *arguments, True) is None and len(layers) == 1


@needs_node
def test_arguments_that_the_op_refuses_are_declined(layers: list[tuple]) -> None:
    assert node.run("layers_forward", *network_of(3, 5, 2, 4), True) is None


@needs_node
def test_schemas_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(RuntimeError, match="speaks of b, which is no argument or output"):
        node.define("planar_flow_backward", "planar_flow_inverse_backward", "*", None)
    with pytest.raises(RuntimeError, match="must have a word for every argument"):
        node.define(FORWARD, "planar_flow_backward", "BD KD", None)


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
