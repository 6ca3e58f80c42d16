"""PCPMap: closed forms against autograd, Newton from anywhere, every way to differentiate."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from conftest import DEVICES
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

import fastflow
from fastflow import Chain, Flow, Inverse, PCPMap, Permutation, backends
from fastflow.bijections import pcp as pcp_layer
from fastflow.bijections.pcp import CONTEXT_GAIN, GAIN, SHARPNESS
from fastflow.reference import pcp_inverse
from fastflow.reference import pcp_potential as pcp
from fastflow.reference.network import softplus
from fastflow.reference.pcp import BLOCK_ROWS

WIDTHS = [(5,), (6, 5), (4, 5, 6)]
F64 = torch.float64
by_widths = pytest.mark.parametrize("widths", WIDTHS, ids=str)
both = pytest.mark.usefixtures("backend")
by_context = pytest.mark.parametrize("C", [0, 2], ids=["plain", "context"])


@pytest.fixture(params=backends.available("cpu", "pcp_forward"))
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the test once for every backend that has the op, with that backend in force."""
    with fastflow.use_backend(request.param):
        yield


def layer(D: int, C: int, widths: tuple[int, ...], scale: float = 1.0, dtype=F64) -> PCPMap:
    """A layer away from the identity, with all its parameters `scale` times as large.

    Its units bend over a deviation of the points, or Hessians of the large ones would have no
    digits; the slopes of the start do not depend on the draw.
    """
    averages = torch.zeros(D), torch.full((D,), 1.7 / math.sqrt(D))
    with (
        mock.patch.object(pcp_layer, "START_SHARPNESS", 1.0),
        mock.patch.object(PCPMap, "_averages", lambda self: averages),
    ):
        made = PCPMap(D, C, widths)
    gains = {"inputs": SHARPNESS, "weights": 1, "terms": CONTEXT_GAIN if C else GAIN}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter += 0.5 * torch.randn_like(parameter) / gains[name.split(".")[0]]
            parameter *= scale
    return made.to(dtype)


def given(D: int, C: int, *batch: int, dtype=F64) -> tuple[Tensor, Tensor | None]:
    return torch.randn(*batch, D, dtype=dtype), torch.randn(*batch, C, dtype=dtype) if C else None


def autograd_hessian(x: Tensor, net: pcp.Network) -> tuple[Tensor, Tensor]:
    """Gradient (B, D) and Hessian (B, D, D) of the potential by autograd."""
    x = x.detach().requires_grad_()
    (y,) = torch.autograd.grad(pcp.potential(x, net).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(y[:, d].sum(), x, retain_graph=True)[0] for d in range(x.shape[1])]
    return y.detach(), torch.stack(rows, 1)


@by_context
def test_blocks_of_rows_are_put_together(C: int) -> None:
    """Without gradients the rows go through in blocks, with gradients all together."""
    made = layer(3, C, (6, 5))
    x, context = given(3, C, 2 * BLOCK_ROWS + 3)
    with fastflow.use_backend("reference"):
        whole = made(x, context)
        with torch.no_grad():
            blocks = made(x, context)
    torch.testing.assert_close(blocks, whole, rtol=1e-12, atol=1e-12)


@both
@by_context
@by_widths
def test_closed_forms_are_those_of_autograd(widths: tuple[int, ...], C: int) -> None:
    made = layer(3, C, widths)
    x, context = given(3, C, 7)
    y, ladj = made(x, context)
    want, matrix = autograd_hessian(x, made.network(context, F64))
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(matrix)[1], rtol=1e-9, atol=1e-9)
    net = made.network(context, F64)
    own, _ = pcp.hessian(pcp.gradient(x, net)[1], net)
    torch.testing.assert_close(own, matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@by_context
@by_widths
def test_the_jacobian_is_symmetric_and_positive_definite(
    widths: tuple[int, ...], C: int, scale: float
) -> None:
    for _ in range(20):
        made = layer(3, C, widths, scale)
        x, context = given(3, C, 5)
        # a row's image depends on this row alone
        jacobian = torch.autograd.functional.jacobian(
            lambda x, made=made, context=context: made(x, context)[0].sum(0), x
        )
        jacobian = jacobian.transpose(0, 1)
        size = jacobian.abs().amax((-2, -1), keepdim=True)
        assert ((jacobian - jacobian.mT).abs() <= 1e-13 * size).all()
        assert (torch.linalg.eigvalsh(jacobian)[:, :1] > -1e-13 * size[..., 0]).all()
        # what is solved and factorised: no eigenvalue is below the least curvature
        net = made.network(context, F64)
        least = torch.linalg.eigvalsh(pcp.hessian(pcp.gradient(x, net)[1], net)[0])[:, 0]
        floor = net.curvature.amin(-1)
        assert (floor >= 1e-3).all() and (least >= floor - 1e-13 * size[:, 0, 0]).all()


@pytest.mark.parametrize("scale", [1.0, 10.0])
@by_context
def test_the_potential_is_convex_along_every_line(C: int, scale: float) -> None:
    made = layer(4, C, (6, 5), scale)
    ends, context = given(4, C, 2, 50)
    net = made.network(None if context is None else context[0], F64)
    left, right = 3 * ends
    t = torch.rand(50, 1, dtype=F64)
    between = pcp.potential(left + t * (right - left), net)
    chord = (1 - t[:, 0]) * pcp.potential(left, net) + t[:, 0] * pcp.potential(right, net)
    bend = 0.5 * (net.curvature * t * (1 - t) * (right - left) ** 2).sum(-1)
    assert (between <= chord - bend + 1e-12 * (chord.abs() + 1)).all()


def test_softplus_has_its_slope_where_it_bends() -> None:
    x = torch.zeros((), dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(softplus(x), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope, x)
    assert slope == 0.5 and bend == 0.25


@both
@by_context
@by_widths
def test_gradcheck(widths: tuple[int, ...], C: int) -> None:
    made = layer(2, C, widths)
    tensors = [one for one in given(2, C, 3) if one is not None]
    leaves = [one.requires_grad_() for one in tensors]
    for direction in (made, made.inverse):
        call = lambda *some, go=direction: go(*some[: len(leaves)])  # noqa: E731
        every = (*leaves, *made.parameters())
        assert torch.autograd.gradcheck(call, every, check_batched_grad=True, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, every, fast_mode=True)


@both
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_the_backward_pass_by_hand_is_that_of_autograd(inverse: bool) -> None:
    """Every gradient, with shared and per-row terms, against the reference that PyTorch does."""
    for C, widths in ((0, (7,)), (2, (7,)), (0, (7, 6)), (2, (7, 6)), (2, (7, 6, 5, 4))):
        made = layer(3, C, widths)
        x, context = given(3, C, 9)
        tensors = [one.detach().requires_grad_() for one in made.network(context, F64).tensors]
        net, x = pcp.Network.of(tensors, len(widths)), x.requires_grad_()
        plain = pcp_inverse.inverse if inverse else pcp.forward
        want = plain(x, net)
        got = fastflow.autograd.pcp.gradient_map(x, net, inverse)
        cotangents = [torch.randn_like(one) for one in want]
        expected = torch.autograd.grad(want, [x, *tensors], cotangents)
        found = torch.autograd.grad(got, [x, *tensors], cotangents)
        for one, other in zip((*got, *found), (*want, *expected)):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def rounding_of_gradient(x: Tensor, y: Tensor, net: pcp.Network) -> Tensor:
    """What a unit in the last place of x, of y and of the layers' sums does to grad P - y."""
    eps = torch.finfo(x.dtype).eps
    matrix, _ = pcp.hessian(pcp.gradient(x, net)[1], net)
    of_x = (matrix.abs() @ x.abs()[..., None])[..., 0]
    sizes = pcp_inverse.magnitude(x, y, net)[:, None]
    steep = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
    return eps * (of_x + y.abs() + net.shift.abs() + steep * sizes.sqrt() + sizes)


# the Hessian of weights ten times as large is not positive definite to the precision of float32
@both
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [(1.0, torch.float32), (3.0, torch.float32), (1.0, F64), (3.0, F64), (10.0, F64)],
)
@by_context
@by_widths
def test_newton_ends_at_rounding_from_anywhere(
    widths: tuple[int, ...], C: int, scale: float, dtype: torch.dtype
) -> None:
    made = layer(4, C, widths, scale, dtype)
    y, context = given(4, C, 40, dtype=dtype)
    y = y * 10.0 ** torch.randint(-3, 5, (40, 1))  # starts that are far off
    with torch.no_grad():
        x, _ = made.inverse(y, context)
        net = made.network(context, dtype)
        residual = (pcp.gradient(x, net)[0] - y).abs()
    assert torch.isfinite(x).all()
    assert (residual <= 16 * rounding_of_gradient(x, y, net)).all()


@both
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_newton_ends_for_every_finite_point(dtype: torch.dtype) -> None:
    """Squares overflow on the way to the largest: NaN then, and no search without an end."""
    made = layer(4, 2, (6, 5), 3.0, dtype)
    largest = math.log10(torch.finfo(dtype).max)
    y, context = given(4, 2, 40, dtype=dtype)
    size = torch.linspace(0, largest - 0.5, 40)[:, None].to(dtype)
    y = y / y.abs().amax(-1, keepdim=True) * 10**size
    with torch.no_grad():
        x, ladj = made.inverse(y, context)
    small = size[:, 0] < largest / 2 - 3
    assert torch.isfinite(x[small]).all() and torch.isfinite(ladj[small]).all()
    assert (x.isfinite().all(-1) | x.isnan().all(-1)).all()


def test_every_newton_step_lowers_the_objective() -> None:
    made = layer(4, 2, (6, 5), 5.0)
    y, context = given(4, 2, 30)
    net, y = made.network(context, F64), 100 * y
    with torch.no_grad():
        x, steps = torch.zeros_like(y), 0
        value = pcp_inverse.objective(x, y, net)[0]
        arrived = torch.zeros(30, dtype=torch.bool)
        while not arrived.all():
            x, arrived = pcp_inverse.newton_step(x, y, net)
            after = pcp_inverse.objective(x, y, net)[0]
            eps = torch.finfo(F64).eps * pcp_inverse.magnitude(x, y, net)
            assert (after <= value + 8 * eps).all()
            value, steps = after, steps + 1
    assert steps > 4  # full Newton steps from afar do not do it
    torch.testing.assert_close(made(x, context)[0], y, rtol=1e-9, atol=1e-9)


@both
@by_context
def test_float32(C: int) -> None:
    """At most twice the error of the potential differentiated by PyTorch, in float32 too."""
    made = layer(5, C, (16, 16), dtype=torch.float32)
    x, context = given(5, C, 100, dtype=torch.float32)
    wide = copy.deepcopy(made).double()
    with torch.no_grad():
        y, ladj = made(x, context)
        exact = wide(x.double(), None if context is None else context.double())
    plain, matrix = autograd_hessian(x, made.network(context, torch.float32))
    for one, other, want in zip((y, ladj), (plain, torch.logdet(matrix)), exact):
        error, bar = ((value - want).abs().max() for value in (one, other))
        few = 4 * 2.0**-23 * want.abs().max()  # PyTorch may be lucky
        assert error <= 2 * bar + few
    assert ladj.dtype == torch.float32


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    made = layer(3, 2, (6, 5), dtype=dtype)
    x, context = given(3, 2, 20, dtype=dtype)
    wide = copy.deepcopy(made).float()
    for direction in ("forward", "inverse"):
        image, ladj = getattr(made, direction)(x, context)
        want, exact = getattr(wide, direction)(x.float(), context.float())
        assert image.dtype == dtype and ladj.dtype == torch.float32
        assert torch.equal(image, want.to(dtype)) and torch.equal(ladj, exact)


@both
def test_autocast_changes_nothing() -> None:
    made = layer(3, 2, (6, 5), dtype=torch.float32)
    x, context = given(3, 2, 20, dtype=torch.float32)
    want, grads = [], []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, ladj = made(x, context)
            back, _ = made.inverse(y, context)
        want.append((y, ladj, back))
        grads.append(torch.autograd.grad((ladj + back.sum(-1)).sum(), made.parameters()))
    for one, other in zip((*want[0], *grads[0]), (*want[1], *grads[1])):
        assert torch.equal(one, other)


@by_context
def test_function_transforms(C: int) -> None:
    made = layer(3, C, (6, 5))
    x, context = given(3, C, 4)
    rows = (x,) if context is None else (x, context)
    y, ladj = made(*rows)
    for one, other in zip(vmap(made)(*rows), (y, ladj)):
        torch.testing.assert_close(one, other)
    value = lambda *row: made(*row)[0]  # noqa: E731
    forwards, backwards = vmap(jacfwd(value))(*rows), vmap(jacrev(value))(*rows)
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.linalg.slogdet(forwards)[1], ladj, rtol=1e-9, atol=1e-9)
    back = jacrev(lambda y: made.inverse(y, context)[0])(y)
    own = torch.stack([back[i, :, i] for i in range(4)])
    torch.testing.assert_close(own @ forwards, torch.eye(3, dtype=F64).expand(4, 3, 3))


def test_vmap_of_the_inverse_by_any_argument() -> None:
    """Of points, contexts and weights whichever have a batch, at any place, and twice."""
    made = layer(3, 2, (6, 5))
    y, context = given(3, 2, 4, 5)
    want = made.inverse(y, context)[0]
    undo = lambda y, context: made.inverse(y, context)[0]  # noqa: E731
    close = torch.testing.assert_close
    close(vmap(undo, in_dims=(1, 1), out_dims=1)(y, context), want)
    close(vmap(vmap(undo))(y, context), want)
    plain = layer(3, 0, (6, 5))
    rule = vmap(lambda y: pcp_inverse.solve(y, plain.network(None, F64)), in_dims=1, out_dims=1)
    close(rule(y), plain.inverse(y)[0])  # the op's own rule: the batch is not in front
    close(vmap(undo, in_dims=(0, None))(y, context[0]), made.inverse(y, context[0])[0])
    close(vmap(undo, in_dims=(None, 0))(y[0], context), made.inverse(y[0], context)[0])
    weights = torch.stack([made.weights[0], made.weights[0] + 1])

    def of_weight(weight: Tensor, y: Tensor) -> Tensor:
        flow = torch.func.functional_call(
            Inverse(made), {"bijection.weights.0": weight}, (y, context)
        )
        return flow[0]

    found = vmap(of_weight, in_dims=(0, None))(weights, y)
    for weight, one in zip(weights, found):
        close(one, of_weight(weight, y))
    spoilt = y.clone()
    spoilt[1, 2, 0] = torch.nan
    found = vmap(undo)(spoilt, context)
    assert found[1, 2].isnan().all() and found.isnan().sum() == 3


@both
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_vmap_of_the_backward_pass(inverse: bool) -> None:
    """Of a graph recorded before, by cotangents."""
    made = layer(3, 2, (6, 5))
    x, context = given(3, 2, 4)
    x.requires_grad_()
    image, _ = made.inverse(x, context) if inverse else made(x, context)
    back = lambda v: torch.autograd.grad(image, x, v, retain_graph=True)[0]  # noqa: E731
    cotangents = torch.randn(6, *image.shape, dtype=F64)
    torch.testing.assert_close(vmap(back)(cotangents), torch.stack([*map(back, cotangents)]))


@both
def test_compiles_to_one_graph() -> None:
    made = layer(3, 2, (6, 5), dtype=torch.float32)
    x, context = given(3, 2, 8, dtype=torch.float32)

    def both_ways(x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return (*made(x, context), *made.inverse(x, context))

    compiled = torch.compile(both_ways, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, context), both_ways(x, context)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    found, expected = (
        torch.autograd.grad(sum(one.sum() for one in some), made.parameters())
        for some in (got, want)
    )
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif("cpp" not in backends.available("cpu"), reason="there are no kernels")
def test_kernels_in_an_exported_graph() -> None:
    made = layer(3, 2, (6, 5))
    with torch.no_grad():
        program = torch.export.export(Flow(made), given(3, 2, 8))
    targets = [
        str(node.target)
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    assert any("fastflow.pcp_inverse" in target for target in targets)
    assert not any("cholesky" in target for target in targets)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "of_context"),
    [((), ()), ((0,), ()), ((3,), ()), ((), (3,)), ((5, 3), (3,)), ((5, 1), (1, 3)), ((4,), (1,))],
)
def test_batches_broadcast(batch: tuple, of_context: tuple, device: str) -> None:
    made = layer(1, 2, (4, 3)).to(device)
    x, context = (
        torch.randn(*some, dtype=F64, device=device) for some in ((*batch, 1), (*of_context, 2))
    )
    shape = torch.broadcast_shapes(batch, of_context)
    y, ladj = made(x, context)
    assert y.shape == (*shape, 1) and ladj.shape == shape
    whole = made(x.expand(*shape, 1), context.expand(*shape, 2))
    torch.testing.assert_close((y, ladj), whole)
    back, other = made.inverse(y, context)
    torch.testing.assert_close((back, other), (x.expand(*shape, 1), -ladj), rtol=1e-9, atol=1e-9)


@both
def test_a_bad_row_stays_alone() -> None:
    made = layer(3, 2, (6, 5))
    x, context = given(3, 2, 6)
    spoilt = x.clone()
    spoilt[1, 0], spoilt[4, 2] = torch.nan, torch.inf
    bad = torch.tensor([1, 4])
    for direction in (made, made.inverse):
        want, got = direction(x, context), direction(spoilt, context)
        for one, other in zip(want, got):
            good = torch.tensor([0, 2, 3, 5])
            torch.testing.assert_close(one[good], other[good])
            assert not other[bad].flatten(1).isfinite().all(-1).any() if other.dim() > 1 else True
        assert got[1][bad].isnan().all()


@by_context
@pytest.mark.parametrize("features", [1, 2, 8])
def test_starts_near_the_identity(features: int, C: int) -> None:
    made = PCPMap(features, C)
    x, context = given(features, C, 100, dtype=torch.float32)
    y, ladj = made(x, context)
    assert (y - x).abs().max() < 0.3 and ladj.abs().max() < 0.5
    assert not torch.equal(y, x)


@by_context
def test_a_stack_starts_near_the_identity(C: int) -> None:
    chain = Chain(*(PCPMap(4, C) for _ in range(10)))
    x, context = given(4, C, 100, dtype=torch.float32)
    y, ladj = chain(x, context)
    assert (y - x).abs().max() < 1 and ladj.abs().max() < 1.5
    torch.testing.assert_close(chain.inverse(y, context)[0], x, rtol=1e-4, atol=1e-4)


def test_learns_at_the_usual_rate() -> None:
    """Adam at 1e-3 finds a curve in 300 steps, and tilts that depend on a context."""
    theta = 4 * torch.rand(200)
    data = torch.stack([theta.cos(), theta.sin()], 1) + 0.1 * torch.randn(200, 2)
    normal = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov())
    flow = Flow(Inverse(PCPMap(2, 0, (32, 32))))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(300):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < -normal.log_prob(data).mean() - 0.5

    flow, losses = Flow(PCPMap(2, 4, (32, 32))), []
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    for _ in range(300):
        context = torch.randn(128, 4)
        x, log_prob = flow.rsample_and_log_prob((), context)
        mean = torch.stack([0 * x[:, 0], 0.8 * context[:, 0].sign() * x[:, 0]], 1)
        target = torch.distributions.Normal(mean, torch.tensor([1.0, 0.3])).log_prob(x).sum(-1)
        losses.append((log_prob - target).mean())  # KL(q|p)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-30:]) / 30 < 0.45  # of a normal without a tilt at best 0.9


def test_trains_to_a_curved_density() -> None:
    """Maximum likelihood through the inverse: the flow beats the best normal by far."""
    theta = 4 * torch.rand(400)
    data = torch.stack([theta.cos(), theta.sin()], 1) + 0.1 * torch.randn(400, 2)
    normal = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov())
    flow = Flow(PCPMap(2, 0, (32, 32)))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    for _ in range(100):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < -normal.log_prob(data).mean() - 0.3


@both
def test_takes_part_in_chains_and_flows() -> None:
    made = layer(3, 2, (6, 5))
    chain = Chain(made, Permutation([2, 0, 1]), Inverse(layer(3, 2, (4,))))
    context = torch.randn(4, 2, dtype=F64)
    for flow in (Flow(chain), Flow(Inverse(chain)), copy.deepcopy(Flow(made))):
        samples, log_prob = flow.rsample_and_log_prob((5,), context)
        torch.testing.assert_close(flow.log_prob(samples, context), log_prob, rtol=1e-8, atol=1e-8)
    x = samples[0].detach()
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again(x, context)[0], made(x, context)[0])


def test_draws_parameters_anew() -> None:
    made = layer(2, 3, (4, 3))
    before = copy.deepcopy(made.state_dict())
    made.reset_parameters()
    assert made.state_dict().keys() == before.keys()
    assert all(not torch.equal(one, before[name]) for name, one in made.state_dict().items())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PCPMap(0, 1), ValueError, "PCPMap: features is 0"),
        (lambda: PCPMap(2, -1), ValueError, "PCPMap: context_features is -1"),
        (lambda: PCPMap(2, 1, 64), TypeError, "PCPMap: hidden_features is 64"),
        (lambda: PCPMap(2, 1, ()), ValueError, "PCPMap: hidden_features is empty"),
        (lambda: PCPMap(2, 1, (3, 0)), ValueError, "PCPMap: hidden_features is 0"),
        (lambda: PCPMap(2, 1)(torch.zeros(2)), TypeError, "PCPMap: context is None"),
        (
            lambda: PCPMap(2, 0)(torch.zeros(2), torch.zeros(1)),
            TypeError,
            "context is a Tensor, must be None",
        ),
        (
            lambda: PCPMap(2, 1)(torch.zeros(3), torch.zeros(1)),
            ValueError,
            r"PCPMap: x has shape \(3,\), must be \(..., 2\)",
        ),
        (
            lambda: PCPMap(2, 1).inverse(torch.zeros(2), torch.zeros(2)),
            ValueError,
            r"PCPMap: context has shape \(2,\), must be \(..., 1\)",
        ),
        (
            lambda: PCPMap(2, 1)(torch.zeros(5, 2), torch.zeros(4, 1)),
            ValueError,
            r"PCPMap: these batches do not broadcast: x \(5,\), context \(4,\)",
        ),
        (
            lambda: PCPMap(2, 1).inverse([0.0, 0.0], torch.zeros(1)),
            TypeError,
            "PCPMap: y is a list, must be a torch.Tensor",
        ),
    ],
)
def test_bad_arguments_are_named(make: object, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("context_features", [0, 2])
def test_state_dicts_of_version_1_hold_parameters_without_constants(context_features: int) -> None:
    layer = PCPMap(3, context_features, hidden_features=(8, 8)).double()
    state, gain = layer.state_dict(), CONTEXT_GAIN if context_features else GAIN
    for name in state:
        if not name.startswith("weights"):
            state[name] = state[name] * (SHARPNESS if name.startswith("inputs") else gain)
    state._metadata[""]["version"] = 1
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.load_state_dict(state)
    for one, two in zip(other.parameters(), layer.parameters()):
        torch.testing.assert_close(one, two)
