"""What PyTorch does to modules, done to every flow: compiling, exporting, transforming, copying."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from flow_zoo import FLOWS, D, make, points
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fastflow
from fastflow import Flow

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow:
    return make(request.param).double()


@pytest.fixture
def single(flow: Flow) -> Iterator[Flow]:
    """The flow in float32."""
    return flow.float()


def gradients(flow: Flow, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), list(flow.parameters())))


def drawn(flow: Flow, rows: int, context: Tensor | None) -> Tensor:
    """The density of draws, the same ones at every call."""
    torch.manual_seed(5)
    return flow.rsample_and_log_prob(() if context is not None else (rows,), context)[1]


@pytest.mark.parametrize(
    "name",
    ["maf-context", "iaf-residual", "recomputing", "adjacency", "planar-context", "pcp-context"],
)
def test_compile_with_a_dynamic_batch(name: str) -> None:
    """Both directions in one graph, without breaks, compiled at most three times for six sizes."""
    torch._dynamo.reset()
    flow, compiles = make(name).double(), 0

    def counting(graph: torch.fx.GraphModule, example: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    def function(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = x.shape[:1] if context is None else ()
        return flow.log_prob(x, context), flow.rsample_and_log_prob(shape, context)[1]

    compiled = torch.compile(function, fullgraph=True, backend=counting)
    for rows in (2, 5, 21, 230, 300, 500):
        x, context = points(flow, rows)
        values = []
        for one in (compiled, function):
            torch.manual_seed(rows)
            values.append(torch.stack(one(x, context)))
        close(*values)
        close(*(gradients(flow, value) for value in values), rtol=1e-7)
    assert compiles <= 3


@pytest.mark.parametrize("name", ["planar", "pcp-context"])
def test_inductor_and_a_marked_dimension(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flow = make(name).double()
    compiled = torch.compile(flow, fullgraph=True)
    for rows in (4, 9):
        arguments = [one for one in points(flow, rows) if one is not None]
        for one in arguments:
            torch._dynamo.mark_dynamic(one, 0)
        got, want = compiled(*arguments), flow(*arguments)
        close(got, want)
        close(gradients(flow, got), gradients(flow, want), rtol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def export(flow: Flow) -> torch.export.ExportedProgram:
    """The program of a flow's log_prob for batches of any size, written to a file and back."""
    arguments = tuple(one for one in points(flow, 6) if one is not None)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(flow, arguments, dynamic_shapes=(batch,) * len(arguments))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def test_export(flow: Flow) -> None:
    """A program for inference, of kernels where there are any."""
    program = export(flow).module()
    for rows in (1, 11, 300):
        arguments = [one for one in points(flow, rows) if one is not None]
        with torch.no_grad():
            close(program(*arguments), flow(*arguments))


@pytest.mark.parametrize("name", ["maf", "iaf-residual"])
def test_export_of_the_reference(name: str) -> None:
    """It needs no fastflow, and has derivatives."""
    flow = make(name).double()
    with fastflow.use_backend("reference"):
        program = export(flow)
    assert not any("fastflow" in str(node.target) for node in program.graph.nodes)
    program = program.module()
    arguments = [one for one in points(flow, 5) if one is not None]
    value, parameters = program(*arguments), dict(program.named_parameters())
    got = dict(zip(parameters, torch.autograd.grad(value.sum(), list(parameters.values()))))
    names = [name for name, _ in flow.named_parameters()]
    for name, want in zip(names, gradients(flow, flow(*arguments))):
        close(got[name], want, rtol=1e-7)


def test_functions_of_parameters(flow: Flow) -> None:
    """vmap, jacrev, jacfwd and hessian of functional_call, by points and by parameters."""
    x, context = points(flow, 4)
    parameters = dict(flow.named_parameters())
    own = None if context is None else context[0]

    def density(parameters: dict, x: Tensor, context: Tensor | None) -> Tensor:
        return torch.func.functional_call(flow, parameters, (x, context))

    rows = (None, 0, None if context is None else 0)
    close(torch.func.vmap(density, in_dims=rows)(parameters, x, context), flow(x, context))
    jacobians = torch.func.vmap(torch.func.jacrev(density), in_dims=rows)(parameters, x, context)
    for row in range(4):
        value = flow(x[row], None if context is None else context[row])
        for jacobian, want in zip(jacobians.values(), gradients(flow, value)):
            close(jacobian[row], want)
    hessian = torch.func.hessian(density, argnums=1)(parameters, x[0], own)
    close(hessian, torch.autograd.functional.hessian(lambda x: flow(x, own), x[0]))
    forward = torch.func.jacfwd(density)(parameters, x[0], own)
    for one, want in zip(forward.values(), gradients(flow, flow(x[0], own))):
        close(one, want)


@pytest.mark.parametrize("name", FLOWS)
def test_an_ensemble_is_one_call(name: str) -> None:
    """vmap over stacked parameters and buffers, the masks included."""
    flows = [make(name, seed).double() for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(flows)
    x, context = points(flows[0], 4)

    def density(parameters: dict, buffers: dict) -> Tensor:
        return torch.func.functional_call(flows[0], (parameters, buffers), (x, context))

    close(
        torch.func.vmap(density)(parameters, buffers),
        torch.stack([flow(x, context) for flow in flows]),
    )


def test_autocast_and_half_precision(single: Flow) -> None:
    x, context = points(single, 5)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, (_, ladj) = single(x, context), single.bijection(x.bfloat16(), context)
    assert log_prob.dtype == ladj.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients(single, log_prob))
    half = copy.deepcopy(single).bfloat16()
    context = None if context is None else context.bfloat16()
    y, ladj = half.bijection(x.bfloat16(), context)
    assert y.dtype == torch.bfloat16 and ladj.dtype == torch.float32
    far = torch.full((D,), 300.0).half()
    assert half.half().base_log_prob(far).isfinite()  # though 300^2 is none in float16


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(flow: Flow, reentrant: bool) -> None:
    x, context = points(flow, 4)
    x.requires_grad_()  # reentrant checkpointing needs an input with gradients
    want = gradients(flow, flow(x, context))
    checkpoint(flow, x, context, use_reentrant=reentrant).sum().backward()
    assert all(map(torch.equal, (p.grad for p in flow.parameters()), want))


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(flow: Flow, copied: Callable, used: bool) -> None:
    x, context = points(flow, 4)
    if used:
        flow(x, context).sum().backward()
        drawn(flow, 4, context)
    twin = copied(flow)
    assert torch.equal(twin(x, context), flow(x, context))
    assert torch.equal(drawn(twin, 4, context), drawn(flow, 4, context))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter += 1
    assert not torch.allclose(twin(x, context), flow(x, context))  # it shares nothing


@pytest.mark.parametrize("name", FLOWS)
def test_deferred_initialisation(name: str) -> None:
    flow = make(name).double()
    x, context = points(flow, 4)
    with torch.device("meta"):
        late = FLOWS[name]().double()
    assert late(*(None if one is None else one.to("meta") for one in (x, context))).is_meta
    late.to_empty(device="cpu")
    for module in late.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    own = None if context is None else context[0]
    assert late(x, context).isfinite().all() and late.sample((5,), own).isfinite().all()
    z = torch.randn_like(x)
    close(late.bijection.inverse(late.bijection(z, context)[0], context)[0], z, atol=1e-6)
    with torch.device("meta"):
        other = FLOWS[name]()
    for twin, options in ((late, {}), (other, {"assign": True})):
        twin.load_state_dict(flow.state_dict(), **options)
        assert torch.equal(twin(x, context), flow(x, context))
        assert twin.sample((5,), own).dtype == torch.float64
        assert torch.equal(drawn(twin, 4, context), drawn(flow, 4, context))


@pytest.mark.parametrize("name", FLOWS)
def test_default_dtype_and_device(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        flow = FLOWS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    x, context = points(flow, 4)
    tensors = [*flow.parameters(), flow(x, context), *flow.rsample_and_log_prob((2,), context)]
    assert all(tensor.dtype == torch.float64 for tensor in tensors)
    want = flow(x, context)
    with torch.device("meta"):  # which is none of the flow's business
        assert torch.equal(flow(x, context), want)
        assert (
            flow.sample((2,), context).device.type == drawn(flow, 4, context).device.type == "cpu"
        )


@pytest.mark.parametrize("name", FLOWS)
def test_state_dicts(name: str) -> None:
    """All that a flow is, under names, and nothing that depends on where it is."""
    flow, other = make(name), make(name, seed=1)
    x, context = points(flow, 4)
    assert not torch.equal(flow(x, context), other(x, context))
    file = io.BytesIO()
    torch.save(torch.nn.ModuleDict({"flow": flow}).state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(name.startswith("flow.") for name in loaded)
    torch.nn.ModuleDict({"flow": other}).load_state_dict(loaded)
    assert torch.equal(flow(x, context), other(x, context))
    assert torch.equal(drawn(flow, 4, context), drawn(other, 4, context))


class Densities(Dataset):
    """A data set whose workers run a flow in a forked process."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow.requires_grad_(False)
        self.points = points(flow, 2, 600)

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        x, context = self.points
        return self.flow(x[index], None if context is None else context[index])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["maf-context", "iaf-residual", "adjacency"])
def test_forked_data_loader_workers(name: str, threads: None) -> None:
    """The parent's threads do not exist in a forked child; waiting for them would hang."""
    torch.set_num_threads(2)
    data = Densities(make(name))
    want = [data[index] for index in range(2)]
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(map(torch.equal, loader, want))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cuda_graphs(single: Flow) -> None:
    flow = single.to("cuda")
    x, context = (None if one is None else one.to("cuda") for one in points(flow, 64))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels are compiled and stairs looked at
        for _ in range(3):
            gradients(flow, flow(x, context))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        log_prob = flow(x, context)
        grads = gradients(flow, log_prob)
    for _ in range(3):
        x.normal_()
        graph.replay()
        want = flow(x, context)
        torch.testing.assert_close(log_prob, want)
        torch.testing.assert_close(grads, gradients(flow, want), rtol=1e-4, atol=1e-4)
