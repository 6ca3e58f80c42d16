"""The affine autoregressive layer as a module, and the flows made of it, on every backend."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from conftest import Target, target_id, targets
from masked_oracle import SCALES, problem
from torch import Tensor

from fastflow import IAF, MAF, MaskedAffineAutoregressive
from fastflow.functional import autoregressive
from fastflow.scales import Scale, SoftClip


@pytest.fixture(params=targets("autoregressive_inverse"), ids=target_id)
def target(request: pytest.FixtureRequest) -> Target:
    with request.param.in_force():
        yield request.param


def test_log_prob_of_a_sample_is_the_returned_one(target: Target) -> None:
    D, H = (4, 20) if target.slow else (12, 48)
    for flow in (MAF(D, 3, (H, H), context_features=2), IAF(D, 3, (H,), context_features=2)):
        flow = flow.to(target.device).double()
        context = torch.randn(5, 2, device=target.device, dtype=torch.float64)
        x, log_prob = flow.rsample_and_log_prob((7,), context)
        assert x.shape == (7, 5, D) and log_prob.shape == (7, 5)
        torch.testing.assert_close(flow.log_prob(x, context), log_prob)


@pytest.mark.parametrize("order", [None, "reverse", "random"])
@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_ladj_is_the_jacobian_determinant(target: Target, scale: Scale, order: str) -> None:
    rows, features, hidden = (1, 3, (8,)) if target.slow else (3, 4, (16, 16))
    layer = MaskedAffineAutoregressive(
        features, hidden, activation="tanh", order=order, scale=scale
    )
    layer = layer.to(target.device).double()
    x = torch.randn(rows, features, device=target.device, dtype=torch.float64)
    for direction in (layer.forward, layer.inverse):
        for row in x:
            jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(v)[0], row)
            _, want = torch.linalg.slogdet(jacobian)
            torch.testing.assert_close(direction(row)[1], want, rtol=0, atol=1e-10)
            before = layer.network.order[:, None] < layer.network.order
            assert (jacobian[before] == 0).all()


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_without_graph_breaks(target: Target, direction: str, compiler: str) -> None:
    if target.backend == "triton" and target.device == "cpu":
        pytest.skip("interpreted kernels are Python that Dynamo cannot trace")
    if target.backend == "reference" and direction == "inverse":
        pytest.skip("its sweep reads the stairs, so that Dynamo would have to know their values")
    torch._dynamo.reset()
    layer = MaskedAffineAutoregressive(5, (16,), context_features=2).to(target.device)
    function = layer.forward if direction == "forward" else layer.inverse
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for rows in (3, 8, 21):
        x = torch.randn(rows, 5, device=target.device, requires_grad=True)
        context = torch.randn(rows, 2, device=target.device)
        results = []
        for f in (compiled, function):
            y, ladj = f(x, context)
            leaves = [x, *layer.parameters()]
            results.append([y, ladj, *torch.autograd.grad(y.sum() + ladj.sum(), leaves)])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_half_precision(target: Target) -> None:
    layer = MaskedAffineAutoregressive(6, (16,), context_features=3).to(target.device)
    x = torch.randn(5, 6, device=target.device)
    context = torch.randn(5, 3, device=target.device)
    want, _ = layer(x, context)
    with torch.autocast(target.device, torch.bfloat16):
        y, ladj = layer(x, context)
    assert ladj.dtype == torch.float32
    torch.testing.assert_close(y.float(), want, rtol=0, atol=0.05)  # the context layer is bfloat16
    half = copy.deepcopy(layer).half()
    y, ladj = half(x.half(), context.half())
    assert y.dtype == torch.float16 and ladj.dtype == torch.float32
    assert half.inverse(y, context.half())[0].dtype == torch.float16


def test_layers_survive_copies_and_checkpoints(target: Target) -> None:
    flow = MAF(5, 2, (16,), order="random").to(target.device)
    x = torch.randn(4, 5, device=target.device)
    buffer = io.BytesIO()
    torch.save(flow, buffer)
    buffer.seek(0)
    fresh = MAF(5, 2, (16,), order="random").to(target.device)
    fresh.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), torch.load(buffer, weights_only=False), fresh):
        assert torch.equal(twin.log_prob(x), flow.log_prob(x))
        assert torch.equal(twin.bijection(x)[0], flow.bijection(x)[0])


def test_training_in_either_direction_needs_one_set_of_activations(target: Target) -> None:
    """Saved memory: the hidden layers and outputs once, not D times; none of them if recomputed."""
    rows, features, hidden = 5 if target.slow else 256, 8, (64, 64)
    sizes = {}
    for recompute in (False, True):
        layer = MaskedAffineAutoregressive(features, hidden, recompute=recompute).to(target.device)
        x = torch.randn(rows, features, device=target.device)
        for direction in (layer.forward, layer.inverse):
            saved: dict[int, int] = {}

            def pack(tensor: Tensor, saved: dict = saved) -> Tensor:
                saved[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                direction(x)
            numbers = sum(p.numel() for p in layer.parameters()) + layer.network.stairs.numel()
            sizes[recompute, direction.__name__] = sum(saved.values()) - numbers
    points = 2 * rows * features
    kept = rows * (sum(hidden) + 2 * features)
    assert sizes[False, "forward"] <= kept + points and sizes[False, "inverse"] <= kept + points
    assert sizes[True, "forward"] <= points and sizes[True, "inverse"] <= points


@pytest.mark.parametrize("flow", [MAF, IAF])
def test_density_integrates_to_one(flow: type) -> None:
    model = flow(2, 3, (32, 32), activation="tanh").double()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the identity
            parameter += 0.2 * torch.randn_like(parameter)
        side = torch.linspace(-14, 14, 701, dtype=torch.float64)
        grid = torch.cartesian_prod(side, side)
        mass = model.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert math.isclose(float(mass), 1, abs_tol=1e-4)


def test_bad_arguments() -> None:
    for scale in ("tanh", 3):
        with pytest.raises((TypeError, ValueError), match="MaskedAffineAutoregressive: scale is"):
            MaskedAffineAutoregressive(3, scale=scale)
    with pytest.raises(ValueError, match="MAF: order is 'natural', must be"):
        MAF(3, order="natural")
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\), must be \(..., 3\)"):
        MaskedAffineAutoregressive(3)(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="MaskedAffineAutoregressive: context is None, must"):
        MaskedAffineAutoregressive(3, context_features=2)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="last of weights has 4 outputs, must have two for each"):
        given = problem(2, 3, (), per_feature=1)
        autoregressive(given.x, [torch.zeros(4, 3)], None, torch.zeros(11, dtype=torch.int32))
    with pytest.raises(ValueError, match="slope is 2"):
        SoftClip(2)
