"""PyTorch transforms of the ops: right derivatives from each, by a kernel or the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import Target
from oracle import planar_chain, problem
from torch import Tensor
from torch.autograd import forward_ad

import fastflow
from fastflow.functional import planar_flow, planar_flow_inverse

KINDS = [pytest.param(True, id="shared"), pytest.param(False, id="amortised")]
close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)


def scalar(function: object, *args: Tensor) -> Tensor:
    z, ladj = function(*args)
    return z.sin().sum() + ladj.square().sum()


def inputs(target: Target, shared: bool, rows: int = 4) -> list[Tensor]:
    return [t.detach() for t in problem(rows, 3, 2, shared, device=target.device)]


@pytest.mark.parametrize("shared", KINDS)
def test_vmap(target: Target, shared: bool) -> None:
    z, w, u, b = inputs(target, shared)
    stacked = torch.stack([z, z + 1, -z])
    got = torch.func.vmap(planar_flow, in_dims=(0, None, None, None))(stacked, w, u, b)
    for row, points in enumerate(stacked):
        close(tuple(t[row] for t in got), planar_chain(points, w, u, b))


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("argument", range(4))
def test_grad_and_its_vmap(target: Target, shared: bool, argument: int) -> None:
    args = inputs(target, shared)
    ours, theirs = (partial(scalar, function) for function in (planar_flow, planar_chain))
    close(
        torch.func.grad(ours, argnums=argument)(*args),
        torch.func.grad(theirs, argnums=argument)(*args),
    )
    many = torch.stack([args[0], -args[0]])
    dims = (0, None, None, None)
    close(
        torch.func.vmap(torch.func.grad(ours, argnums=argument), in_dims=dims)(many, *args[1:]),
        torch.func.vmap(torch.func.grad(theirs, argnums=argument), in_dims=dims)(many, *args[1:]),
    )


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian])
def test_jacobians(target: Target, shared: bool, transform: object) -> None:
    args = inputs(target, shared, rows=2)
    ours, theirs = (
        (lambda *a, f=function: f(*a)[1].square().sum()) for function in (planar_flow, planar_chain)
    )
    for argument in range(4):
        close(
            transform(ours, argnums=argument)(*args),
            transform(theirs, argnums=argument)(*args),
            rtol=1e-9,
            atol=1e-9,
        )


@pytest.mark.parametrize("shared", KINDS)
def test_jacobian_of_the_inverse_is_the_inverse_jacobian(target: Target, shared: bool) -> None:
    z, *parameters = inputs(target, shared, rows=1)
    z_K, _ = planar_flow(z, *parameters)
    forward = torch.func.jacfwd(lambda x: planar_flow(x, *parameters)[0])(z)[0, :, 0]
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        backward = transform(lambda y: planar_flow_inverse(y, *parameters)[0])(z_K)[0, :, 0]
        close(forward @ backward, torch.eye(3).to(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("argument", range(4))
def test_forward_mode(target: Target, shared: bool, argument: int) -> None:
    args = inputs(target, shared)
    tangent = torch.randn_like(args[argument])
    results = []
    for function in (planar_flow, planar_chain):
        with forward_ad.dual_level():
            dual = [
                forward_ad.make_dual(t, tangent) if i == argument else t for i, t in enumerate(args)
            ]
            results.append([forward_ad.unpack_dual(out).tangent for out in function(*dual)])
        results[-1] += torch.func.jvp(
            lambda x, f=function: f(*args[:argument], x, *args[argument + 1 :]),
            (args[argument],),
            (tangent,),
        )[1]
    for one, other in zip(*results):
        assert one.abs().max() > 0
        close(one, other)


def test_batched_cotangents(target: Target) -> None:
    leaves = [t.requires_grad_() for t in inputs(target, shared=True)]
    z, _ = planar_flow(*leaves)
    cotangents = torch.randn(3, *z.shape, dtype=z.dtype, device=z.device)
    got = torch.autograd.grad(z, leaves, cotangents, is_grads_batched=True, retain_graph=True)
    for row, cotangent in enumerate(cotangents):
        close(
            [g[row] for g in got],
            list(torch.autograd.grad(z, leaves, cotangent, retain_graph=True)),
        )


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", [planar_flow, planar_flow_inverse])
def test_compile_without_graph_breaks(target: Target, function: object, compiler: str) -> None:
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("interpreted kernels are Python that Dynamo cannot trace")
    if compiler == "inductor" and function is planar_flow_inverse and target.backend == "reference":
        pytest.skip("inductor takes minutes over the unrolled Newton iterations of the reference")
    torch._dynamo.reset()
    compiles = 0

    def counting(graph: torch.fx.GraphModule, example: list) -> object:
        nonlocal compiles
        compiles += 1
        return torch._dynamo.lookup_backend(compiler)(graph, example)

    compiled = torch.compile(
        lambda *args: scalar(function, *args), fullgraph=True, dynamic=True, backend=counting
    )
    _, *parameters = inputs(target, shared=True)
    for rows in (2, 3, 5, 8, 13, 21):
        z = torch.randn(rows, 3, dtype=torch.float64, device=target.device)
        leaves = [t.detach().clone().requires_grad_() for t in (z, *parameters)]
        got = compiled(*leaves)
        want = scalar(function, *leaves)
        close(got, want)
        for one, other in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves)):
            close(one, other, rtol=1e-9, atol=1e-9)
    assert compiles <= 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_ladj_in_float32(target: Target, dtype: torch.dtype) -> None:
    flow = fastflow.ConditionalPlanarFlow(3, 4, steps=2).to(target.device)
    x, context = torch.randn(5, 3).to(target.device), torch.randn(5, 4).to(target.device)
    with torch.autocast(target.device, dtype=dtype):
        y, ladj = flow(x, context)
    assert ladj.dtype == y.dtype == torch.float32
    (y.sum() + ladj.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in flow.parameters())


def test_activation_checkpointing(target: Target) -> None:
    leaves = [t.requires_grad_() for t in inputs(target, shared=True)]
    plain = torch.autograd.grad(scalar(planar_flow, *leaves), leaves)
    out = torch.utils.checkpoint.checkpoint(
        lambda *args: scalar(planar_flow, *args), *leaves, use_reentrant=False
    )
    for one, other in zip(torch.autograd.grad(out, leaves), plain):
        assert torch.equal(one, other)
