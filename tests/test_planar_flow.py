"""planar_flow and planar_flow_inverse on every backend: values, gradients, shapes, rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import Target
from oracle import (
    assert_error,
    inverse_vjp,
    plain_errors,
    planar_chain,
    problem,
)
from torch import Tensor

import fastflow
from fastflow.functional import planar_flow, planar_flow_inverse

CONSTRAINTS = ["paper", "centred"]
KINDS = [pytest.param(True, id="shared"), pytest.param(False, id="amortised")]
# odd sizes, one feature, one step, vector widths and their neighbours, more steps than features
SIZES = [(1, 1), (2, 3), (3, 1), (5, 7), (8, 16), (17, 5), (31, 2), (33, 9), (64, 4)]


def loss(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar in which every entry has another weight."""
    z, ladj = outputs
    weights = torch.linspace(-1, 1, z.numel()).to(z).view_as(z)
    return (z * weights).sum() + (
        ladj * torch.linspace(0.5, 2, ladj.numel()).to(ladj).view_as(ladj)
    ).sum()


def grads(function: object, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(function(*leaves)), leaves)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize(("features", "steps"), SIZES)
def test_forward_and_gradients(
    target: Target, features: int, steps: int, shared: bool, dtype: torch.dtype, constraint: str
) -> None:
    leaves = [
        leaf.detach().to(target.device, dtype).requires_grad_()
        for leaf in problem(target.rows, features, steps, shared)
    ]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]

    def results(function: object, arguments: list[Tensor], order: Tensor) -> list[Tensor]:
        z_K, ladj = function(*arguments, constraint)
        weights = torch.linspace(-1, 1, z_K.numel()).to(z_K).view_as(z_K)[:, order]
        loss = (z_K * weights).sum() + (ladj * torch.linspace(0.5, 2, len(ladj)).to(ladj)).sum()
        return [z_K, ladj, *torch.autograd.grad(loss, arguments)]

    natural = torch.arange(features)
    got, want = results(planar_flow, leaves, natural), results(planar_chain, exact, natural)
    plain = plain_errors(partial(results, planar_chain), exact, want)
    for name, one, error, other in zip(("z_K", "ladj", "dz", "dw", "du", "db"), got, plain, want):
        assert_error(one, error, other, name)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize(("features", "steps"), SIZES)
def test_inverse_and_gradients(
    target: Target, features: int, steps: int, shared: bool, constraint: str
) -> None:
    z, *parameters = problem(target.rows, features, steps, shared, device=target.device)
    z_K, ladj = (x.detach().requires_grad_() for x in planar_flow(z, *parameters, constraint))
    x, back = planar_flow_inverse(z_K, *parameters, constraint)
    torch.testing.assert_close(x, z, rtol=0, atol=1e-11 * float(1 + z.detach().abs().max()))
    torch.testing.assert_close(back, -ladj, rtol=1e-10, atol=1e-10)

    dx, dladj = torch.randn_like(x), torch.randn_like(back)
    got = torch.autograd.grad((x, back), (z_K, *parameters), (dx, dladj))
    want = inverse_vjp(z, parameters, dx, dladj, constraint)
    for name, one, other in zip(["z_K", "w", "u", "b"], got, want):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9 * (1 + scale), msg=name)


@pytest.mark.parametrize("shared", KINDS)
def test_inverse_residual_float32(target: Target, shared: bool) -> None:
    """|F(x) - y| stays within the rounding of the steps that lead there and back."""
    z, w, u, b = problem(target.rows, 12, 10, shared, torch.float32, target.device)
    z_K, _ = planar_flow(z, w, u, b)
    x, _ = planar_flow_inverse(z_K, w, u, b)
    again, _ = planar_chain(*(t.detach().cpu().double() for t in (x, w, u, b)))
    moved = [z_K.detach().abs().max(), x.detach().abs().max()]
    # each of 10 steps rounds a dot product of 12 terms, a tanh and a sum, and u_hat is of size 5
    bound = 10 * 16 * torch.finfo(torch.float32).eps * float(max(moved))
    assert (again - z_K.cpu()).abs().max() < bound


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_gradcheck(target: Target, direction: object, shared: bool, constraint: str) -> None:
    leaves = problem(3, 4, 3, shared, device=target.device)
    torch.autograd.gradcheck(
        lambda *args: direction(*args, constraint),
        leaves,
        nondet_tol=0.0,
        check_batched_grad=not target.slow,  # which the fast mode does not know
        fast_mode=target.slow,
    )


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_double_backward(target: Target, direction: object, shared: bool) -> None:
    leaves = problem(3, 2, 3, shared, device=target.device)
    torch.autograd.gradgradcheck(direction, leaves, fast_mode=target.slow)

    first = torch.autograd.grad(loss(direction(*leaves)), leaves, create_graph=True)
    sum(g.square().sum() for g in first).backward()
    with fastflow.use_backend("reference"):
        again = torch.autograd.grad(loss(direction(*leaves)), leaves, create_graph=True)
        want = torch.autograd.grad(sum(g.square().sum() for g in again), leaves)
    for leaf, expected in zip(leaves, want):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-9, atol=1e-9)


def test_double_backward_where_parameters_depend_on_z(target: Target) -> None:
    """What the parameters pass on to z is theirs to pass on, once."""
    z, w, u, b = problem(3, 2, 2, False, device=target.device)
    results = []
    for function in (planar_flow, planar_chain):
        mixed = w + z.sin()[:, None, :]
        (dz,) = torch.autograd.grad(loss(function(z, mixed, u, b)), z, create_graph=True)
        results.append((dz, *torch.autograd.grad(dz.square().sum(), (z, w, u, b))))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("output", [0, 1])
def test_needed_gradients_and_missing_cotangents(
    target: Target, shared: bool, wanted: tuple[int, ...], output: int
) -> None:
    leaves = problem(target.rows, 3, 2, shared, device=target.device)
    exact = [leaf.detach().cpu().clone().requires_grad_() for leaf in leaves]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index in wanted)
    got = torch.autograd.grad(
        planar_flow(*leaves)[output].sin().sum(), [leaves[i] for i in wanted], allow_unused=True
    )
    want = torch.autograd.grad(planar_chain(*exact)[output].sin().sum(), [exact[i] for i in wanted])
    for one, other in zip(got, want):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", KINDS)
def test_strides_do_not_matter(target: Target, shared: bool) -> None:
    z, w, u, b = (t.detach() for t in problem(6, 5, 3, shared, torch.float32, target.device))
    odd = [
        z.t().contiguous().t(),
        torch.stack([w, w + 1], -1)[..., 0],
        torch.cat([u * 0, u], -1)[..., u.shape[-1] :],
        torch.stack([b, b], 0)[1],
    ]
    results = []
    for leaves in ([z, w, u, b], odd):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        z_K, ladj = planar_flow(*leaves)
        # the gradient of a sum has strides (0, 0)
        results.append([z_K, ladj, *torch.autograd.grad(z_K.sum() + ladj.sum(), leaves)])
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("z_batch", "parameter_batch"),
    [
        ((), ()),
        ((), (4,)),
        ((4,), (1,)),
        ((2, 3), (3,)),
        ((2, 1), (1, 3)),
        ((0,), ()),
        ((2, 0), (0,)),
    ],
)
def test_batches_broadcast(target: Target, z_batch: tuple, parameter_batch: tuple) -> None:
    D, K = 3, 2
    dtype = {"dtype": torch.float64, "device": target.device}
    z = torch.randn(*z_batch, D, **dtype, requires_grad=True)
    w = torch.randn(*parameter_batch, K, D, **dtype, requires_grad=True)
    u = torch.randn(*parameter_batch, K, D, **dtype, requires_grad=True)
    b = torch.randn(*parameter_batch, K, **dtype, requires_grad=True)
    z_K, ladj = planar_flow(z, w, u, b)
    batch = torch.broadcast_shapes(z_batch, parameter_batch)
    want, want_ladj = planar_chain(z.expand(*batch, D), w, u, b)
    assert z_K.shape == (*batch, D) and ladj.shape == batch
    torch.testing.assert_close((z_K, ladj), (want, want_ladj), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(loss((z_K, ladj)), (z, w, u, b), allow_unused=True)
    for one, leaf, other in zip(
        got, (z, w, u, b), torch.autograd.grad(loss((want, want_ladj)), (z, w, u, b))
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert one.shape == leaf.shape


def test_only_some_parameters_amortised(target: Target) -> None:
    z, w, u, _ = problem(4, 3, 2, shared=True, device=target.device)
    amortised_b = torch.randn(4, 2, dtype=z.dtype, device=z.device)
    want = planar_chain(z, w, u, amortised_b)
    torch.testing.assert_close(planar_flow(z, w, u, amortised_b), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_no_steps_is_the_identity(target: Target, direction: object) -> None:
    z = torch.randn(4, 3, device=target.device)
    empty = torch.empty(0, 3, device=target.device)
    out, ladj = direction(z, empty, empty, empty[:, 0])
    assert torch.equal(out, z) and torch.equal(ladj, torch.zeros_like(ladj))


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize(("features", "steps"), [(4097, 2), (8192, 1), (3, 256), (130, 70)])
def test_large(target: Target, features: int, steps: int, shared: bool) -> None:
    if target.slow and features * steps > 5000:
        steps = 2
    exact = problem(3, features, steps, shared)
    leaves = [leaf.detach().to(target.device).requires_grad_() for leaf in exact]
    torch.testing.assert_close(
        tuple(t.cpu() for t in planar_flow(*leaves)), planar_chain(*exact), rtol=1e-9, atol=1e-9
    )
    for one, other in zip(grads(planar_flow, leaves), grads(planar_chain, exact)):
        scale = float(other.abs().max())
        torch.testing.assert_close(one.cpu(), other, rtol=0, atol=1e-9 * (1 + scale))


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_a_bad_row_harms_no_other(
    target: Target, direction: object, shared: bool, bad: float
) -> None:
    z, *parameters = problem(7, 3, 2, shared, torch.float32, target.device)
    broken = z.detach().clone()
    broken[3, 1] = bad
    others = [0, 1, 2, 4, 5, 6]
    results = []
    for points in (z.detach().clone(), broken):
        points.requires_grad_()
        out, ladj = direction(points, *parameters)
        (dz,) = torch.autograd.grad(out[others].sum() + ladj[others].sum(), points)
        results.append((out[others], ladj[others], dz[others]))
        assert torch.isfinite(out[others]).all()
    for one, other in zip(*results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shared", KINDS)
@pytest.mark.parametrize("direction", [planar_flow, planar_flow_inverse])
def test_a_row_does_not_depend_on_its_batch(
    target: Target, direction: object, shared: bool
) -> None:
    if target.backend == "reference":
        pytest.skip("PyTorch's own reductions depend on the batch they are in")
    leaves = [t.detach() for t in problem(target.rows, 6, 4, shared, torch.float32, target.device)]
    order = torch.randperm(target.rows, device=target.device)

    def run(rows: Tensor) -> list[Tensor]:
        picked = [t[rows] if i == 0 or not shared else t for i, t in enumerate(leaves)]
        picked = [t.clone().requires_grad_() for t in picked]
        out, ladj = direction(*picked)
        return [
            out,
            ladj,
            *torch.autograd.grad(out.sum() + ladj.sum(), picked)[: 1 if shared else 4],
        ]

    whole = run(torch.arange(target.rows, device=target.device))
    for one, other in zip(run(order), whole):
        assert torch.equal(one, other[order])
    for row in (0, target.rows - 1):
        for one, other in zip(run(torch.tensor([row], device=target.device)), whole):
            assert torch.equal(one[0], other[row])


@pytest.mark.parametrize("shared", KINDS)
def test_runs_repeat_bitwise(target: Target, shared: bool, threads: None) -> None:
    leaves = problem(
        target.rows if target.slow else 3001, 6, 4, shared, torch.float32, target.device
    )
    first = None
    for run in range(2 if target.slow else 20):
        if target.backend != "reference":  # PyTorch's sums split by thread
            torch.set_num_threads(1 + run % 2)
        result = [*planar_flow(*leaves), *grads(planar_flow, leaves)]
        first = first or result
        assert all(torch.equal(one, other) for one, other in zip(result, first))


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": torch.zeros(2, 3)}, ValueError, "w has 3 features, z has 4"),
        ({"u": torch.zeros(2, 5)}, ValueError, "u has 5 features, z has 4"),
        ({"u": torch.zeros(3, 4)}, ValueError, "u has 3 steps, w has 2"),
        ({"b": torch.zeros(3)}, ValueError, "b has 3 steps, w has 2"),
        ({"b": torch.zeros(())}, ValueError, r"b has shape \(\), must be \(K\)"),
        ({"w": torch.zeros(4)}, ValueError, r"w has shape \(4,\)"),
        ({"z": torch.zeros(())}, ValueError, r"z has shape \(\)"),
        ({"z": torch.zeros(5, 0)}, ValueError, "D >= 1"),
        ({"z": torch.zeros(5, 4, dtype=torch.int64)}, TypeError, "z is torch.int64"),
        ({"u": torch.zeros(2, 4, dtype=torch.complex64)}, TypeError, "u is torch.complex64"),
        ({"w": [[1.0]]}, TypeError, "w is a list"),
        ({"w": torch.zeros(2, 4, device="meta")}, ValueError, "w is on meta, z is on cpu"),
        (
            {"b": torch.zeros(7, 2)},
            ValueError,
            r"batches do not broadcast: z \(5,\), w \(\), u \(\), b \(7,\)",
        ),
        ({"constraint": "none"}, ValueError, "constraint is 'none'"),
    ],
)
def test_bad_arguments_are_named(change: dict, error: type, message: str) -> None:
    arguments = {"z": torch.zeros(5, 4), "w": torch.zeros(2, 4), "u": torch.zeros(2, 4)}
    arguments |= {"b": torch.zeros(2), "constraint": "paper"} | change
    with pytest.raises(error, match=f"planar_flow: .*{message}"):
        planar_flow(*arguments.values())


def test_dtypes_promote_as_in_pytorch(target: Target) -> None:
    z, w, u, b = (t.detach() for t in problem(4, 3, 2, True, torch.float32, target.device))
    z_K, ladj = planar_flow(z.to(torch.bfloat16), w, u.double(), b)
    assert z_K.dtype == ladj.dtype == torch.float64
