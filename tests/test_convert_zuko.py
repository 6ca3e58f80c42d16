"""zuko's MAF, converted: the same numbers in both directions, and all that PyTorch does with it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conversion import TOLERANCES, check_conversion, check_left_alone, check_same
from torch import Tensor, nn

import fastflow

zuko = pytest.importorskip("zuko")

from zuko.flows import MAF, NSF, MaskedAutoregressiveTransform  # noqa: E402
from zuko.transforms import AutoregressiveTransform, MonotonicAffineTransform  # noqa: E402

CASES = {
    "default": (3, 0, {}),
    "default-context": (3, 5, {}),
    "sbi": (6, 12, {"transforms": 5, "hidden_features": (50, 50), "randperm": True}),
    "wide": (16, 0, {"transforms": 2, "hidden_features": (256, 256), "randperm": True}),
    "deep": (4, 2, {"transforms": 2, "hidden_features": (24, 40, 16, 32, 8, 20)}),
    "narrow": (6, 3, {"hidden_features": (3, 4)}),
    "no-hidden-layer": (4, 2, {"hidden_features": ()}),
    "one-pair": (2, 0, {}),
    "coupling": (5, 0, {"passes": 2}),
    "three-passes": (7, 2, {"passes": 3, "randperm": True}),
    "slope": (4, 0, {"univariate": partial(MonotonicAffineTransform, slope=0.1)}),
    "tanh": (4, 3, {"activation": nn.Tanh}),
    "elu": (4, 0, {"activation": nn.ELU}),
    "silu": (4, 0, {"activation": nn.SiLU}),
    "gelu": (4, 0, {"activation": nn.GELU}),
    "softplus": (4, 0, {"activation": nn.Softplus}),
    "leaky-relu": (4, 0, {"activation": nn.LeakyReLU}),
}


def flow_of(case: str) -> nn.Module:
    features, context, options = CASES[case]
    return MAF(features, context, **options).double()


def pair(case: str) -> tuple[nn.Module, nn.Module]:
    """A flow, and a converted copy of it."""
    flow = flow_of(case)
    fast = copy.deepcopy(flow)
    fastflow.convert(fast, strict=True)
    return flow, fast


def inputs_of(flow: nn.Module) -> list[Tensor]:
    """Points, and contexts if the flow takes them."""
    features = flow.base().event_shape[0]
    context = flow.transform.transforms[0].hyper.in_features - features
    x = torch.randn(9, features).double()
    return [x, torch.randn(9, context).double()] if context else [x]


def density(flow: nn.Module, x: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    distribution = flow(*c)
    return distribution.log_prob(x), *distribution.transform.call_and_ladj(x)


def inverse(flow: nn.Module, z: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    transform = flow(*c).transform
    return transform.inv(z), *transform.inv.call_and_ladj(z)


def samples(flow: nn.Module, _: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return flow(*c).rsample((4,)), *flow(*c).rsample_and_log_prob((2,))


def same(flow: nn.Module, fast: nn.Module) -> None:
    """Both give the same, in all ways."""
    for call in (density, inverse, samples):
        check_same(call, flow, fast, inputs_of(flow))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numbers_before_and_after_training(case: str, dtype: torch.dtype) -> None:
    flow = flow_of(case)
    x, *c = inputs_of(flow)
    calls = [density, inverse]
    check_conversion(flow, calls, [x, *c], len(flow.transform.transforms), dtype)


@pytest.mark.parametrize("case", ["default", "sbi"])
def test_samples(case: str) -> None:
    flow, fast = pair(case)
    check_same(samples, flow, fast, inputs_of(flow))


def test_training_takes_the_same_course() -> None:
    flow, fast = pair("sbi")
    inputs = inputs_of(flow)
    for model in (flow, fast):
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(10):
            optimizer.zero_grad()
            (-density(model, *inputs)[0].mean()).backward()
            optimizer.step()
    for one, other in zip(flow.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


def test_masked_weights_keep_their_values_and_get_no_gradient() -> None:
    _, fast = pair("sbi")
    sum(output.sum() for output in density(fast, *inputs_of(fast))).backward()
    for layer in (part for part in fast.modules() if hasattr(part, "mask")):
        assert layer.weight[~layer.mask].any() and not layer.weight.grad[~layer.mask].any()


def test_it_stays_what_it_was() -> None:
    flow = flow_of("default-context")
    fast = copy.deepcopy(flow)
    parameters = list(fast.parameters())
    fastflow.convert(fast)
    layer = fast.transform.transforms[0]
    assert isinstance(layer, MaskedAutoregressiveTransform)
    assert isinstance(layer(torch.zeros(5).double()), AutoregressiveTransform)
    assert all(one is other for one, other in zip(parameters, fast.parameters(), strict=True))
    assert list(fast.state_dict()) == list(flow.state_dict())
    assert repr(fast) == repr(flow)
    assert layer(torch.zeros(5).double()).inv.inv(torch.zeros(3).double()).shape == (3,)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    fast(torch.zeros(5).double()).log_prob(torch.zeros(3).double())
    assert calls


def test_one_pass_for_value_and_log_determinant(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastflow.convert import zuko as converted

    _, fast = pair("default")
    calls = []
    for name in ("autoregressive", "autoregressive_inverse"):
        original = getattr(converted, name)
        monkeypatch.setattr(
            converted,
            name,
            lambda *args, name=name, original=original, **rest: (
                calls.append(name) or original(*args, **rest)
            ),
        )
    fast().log_prob(torch.zeros(3).double())
    assert calls == ["autoregressive"] * 3
    fast().rsample_and_log_prob((2,))
    assert calls[3:] == ["autoregressive_inverse"] * 3


def test_batches_of_points_and_contexts_broadcast() -> None:
    flow, fast = pair("default-context")
    x, c = torch.randn(4, 1, 3).double(), torch.randn(6, 5).double()
    t, f = flow.transform.transforms[0], fast.transform.transforms[0]
    assert f(c).call_and_ladj(x)[0].shape == (4, 6, 3)
    torch.testing.assert_close(f(c)(x), t(c)(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(f(c).inv(x), t(c).inv(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(f(c[0])(x), t(c[0])(x), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"do not broadcast: x \(4, 1\), context \(5, 2\)"):
        f(c.expand(5, 6, 5)[:, :2])(x.expand(4, 3, 3)[:, :1])


def test_states_of_other_orders_are_followed() -> None:
    flow, fast = pair("sbi")
    density(fast, *inputs_of(fast))
    other = MAF(6, 12, **CASES["sbi"][2]).double()  # permutations of its own, thus other masks
    fast.load_state_dict(other.state_dict())
    same(other, fast)
    flow.load_state_dict(fast.state_dict())
    same(flow, fast)
    fast.transform.transforms[0].hyper.load_state_dict(
        other.transform.transforms[1].hyper.state_dict()
    )
    other.transform.transforms[0].hyper.load_state_dict(
        fast.transform.transforms[0].hyper.state_dict()
    )
    same(other, fast)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda flow: pickle.loads(pickle.dumps(flow))], ids=["copy", "pickle"]
)
def test_copies_after_use(copied) -> None:
    flow, fast = pair("sbi")
    distribution = fast(torch.zeros(12).double())
    distribution.rsample()
    twin = copied(fast)
    assert type(twin.transform.transforms[0]) is type(fast.transform.transforms[0])
    same(flow, twin)
    torch.nn.init.zeros_(twin.transform.transforms[0].hyper[0].weight)
    same(flow, fast)
    x = torch.zeros(6).double()
    torch.testing.assert_close(copied(distribution.transform)(x), distribution.transform(x))


def test_revert() -> None:
    flow, fast = pair("sbi")
    density(fast, *inputs_of(fast))
    assert fastflow.revert(fast) is fast
    for one, other in zip(flow.modules(), fast.modules(), strict=True):
        assert type(one) is type(other) and one.__dict__.keys() == other.__dict__.keys()
    x, *c = inputs_of(flow)
    assert torch.equal(flow(*c).log_prob(x), fast(*c).log_prob(x))
    fastflow.convert(fast)
    same(flow, fast)


class Fork(MaskedAutoregressiveTransform):
    """Might compute anything."""


def with_hook() -> nn.Module:
    layer = MaskedAutoregressiveTransform(3)
    layer.hyper[0].register_forward_hook(lambda *_: None)
    return layer


def with_weight_norm() -> nn.Module:
    layer = MaskedAutoregressiveTransform(3)
    nn.utils.parametrizations.weight_norm(layer.hyper[2])
    return layer


def graph() -> Tensor:
    """0 and 1 depend on nothing, 2 on 0, 3 on 1."""
    adjacency = torch.eye(4, dtype=torch.bool)
    adjacency[2, 0] = adjacency[3, 1] = True
    return adjacency


REFUSED = {
    "spline": (lambda: NSF(3).transform.transforms[0], "univariate is MonotonicRQSTransform"),
    "slope": (
        lambda: MaskedAutoregressiveTransform(
            3, univariate=partial(MonotonicAffineTransform, slope=2.0)
        ),
        "slope is 2.0",
    ),
    "residual": (lambda: MaskedAutoregressiveTransform(3, residual=True), "residual=True"),
    "activation": (
        lambda: MaskedAutoregressiveTransform(3, activation=nn.PReLU),
        "activation PReLU",
    ),
    "graph": (
        lambda: MaskedAutoregressiveTransform(4, adjacency=graph()),
        "are not those of an order",
    ),
    "context": (
        lambda: MaskedAutoregressiveTransform(3, 1, adjacency=torch.ones(3, 4).tril().bool()),
        "hide the context",
    ),
    "hook": (with_hook, "hooks"),
    "subclass": (lambda: Fork(3), "subclass of MaskedAutoregressiveTransform"),
    "weight-norm": (with_weight_norm, "ParametrizedMaskedLinear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone_is_named(case: str) -> None:
    make, reason = REFUSED[case]
    check_left_alone(make(), reason)


def test_an_adjacency_that_is_an_order_is_converted() -> None:
    order = torch.tensor([2, 0, 3, 1])
    layer = MaskedAutoregressiveTransform(4, adjacency=order[:, None] >= order).double()
    fast = copy.deepcopy(layer)
    fastflow.convert(fast, strict=True)
    x = torch.randn(5, 4).double()
    torch.testing.assert_close(fast()(x), layer()(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(fast().inv(x), layer().inv(x), rtol=0, atol=1e-10)


def test_errors_name_the_argument() -> None:
    _, fast = pair("default-context")
    with pytest.raises(TypeError, match="c is None"):
        fast()
    with pytest.raises(ValueError, match=r"c has shape \(4,\), must be \(..., 5\)"):
        fast(torch.zeros(4).double())
    _, fast = pair("default")
    with pytest.raises(TypeError, match="takes no context"):
        fast(torch.zeros(4).double())


def test_log_determinants_keep_their_precision_under_autocast() -> None:
    flow, fast = (flow.float() for flow in pair("default"))
    x = torch.randn(50, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y, ladj = fast().transform.call_and_ladj(x)
    assert y.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(ladj, flow().transform.call_and_ladj(x)[1], rtol=0, atol=1e-5)


class BothWays(nn.Module):
    """Both directions of a flow as a forward pass."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        transform = self.flow().transform
        return *transform.call_and_ladj(x), transform.inv(x), *transform.inv.call_and_ladj(x)


def test_several_models_at_once_by_vmap() -> None:
    models = [BothWays(pair("default")[1]) for _ in range(3)]
    x = torch.randn(5, 3).double()
    wanted = [torch.stack(each) for each in zip(*(model(x) for model in models))]
    state = torch.func.stack_module_state(models)

    def call(*state: dict) -> tuple[Tensor, ...]:
        return torch.func.functional_call(models[0], state, (x,))

    for want, found in zip(wanted, torch.vmap(call)(*state), strict=True):
        torch.testing.assert_close(found, want)


def test_torch_compile() -> None:
    torch.compiler.reset()
    flow, fast = pair("default-context")
    x, c = inputs_of(flow)
    layer, compiled = (
        lambda x, c, part=one.transform.transforms[0]: (
            *part(c).call_and_ladj(x),
            *part(c).inv.call_and_ladj(x),
        )
        for one in (flow, fast)
    )
    compiled = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for want, found in zip(layer(x, c), compiled(x, c), strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
def test_inverses_are_copied_and_pickled(copied: Callable) -> None:
    flow = zuko.flows.MAF(3, transforms=1)
    fastflow.convert(flow)
    inverse = next(one for one in flow.modules() if hasattr(one, "hyper"))().inv
    again, y = copied(inverse), torch.randn(5, 3)
    assert torch.equal(again(y), inverse(y)) and again.inv.inv is again
    assert torch.equal(copied(inverse.inv).inv(y), inverse(y))
