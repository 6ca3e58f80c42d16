"""Pyro's transforms, converted: the same numbers in both directions, and nothing stale."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import in_threads
from conversion import TOLERANCES, check_conversion, check_left_alone, check_same
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastflow

pyro = pytest.importorskip("pyro")

from pyro import distributions as dist  # noqa: E402
from pyro.distributions import transforms  # noqa: E402
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN  # noqa: E402

pytestmark = pytest.mark.usefixtures("float64")  # Pyro's inverse makes tensors of the default type
REVERSED = torch.tensor([3, 2, 1, 0])
AFFINE = {
    "default": lambda: transforms.affine_autoregressive(5),
    "stable": lambda: transforms.affine_autoregressive(5, stable=True, sigmoid_bias=1.0),
    "tight-clip": lambda: transforms.affine_autoregressive(
        4, log_scale_min_clip=-0.05, log_scale_max_clip=0.02
    ),
    "reversed": lambda: affine(4, [16], permutation=REVERSED),
    "wide": lambda: transforms.affine_autoregressive(16, [128, 128]),
    "deep": lambda: transforms.affine_autoregressive(4, [16, 24, 8, 12, 4]),
    "one-pair": lambda: transforms.affine_autoregressive(2, [2]),
    "tanh": lambda: affine(4, [16, 16], nonlinearity=nn.Tanh()),
    "elu": lambda: affine(4, [16, 16], nonlinearity=nn.ELU()),
    "gelu": lambda: affine(4, [16, 16], nonlinearity=nn.GELU()),
}
CONDITIONAL = {
    "default-context": lambda: transforms.conditional_affine_autoregressive(5, 3),
    "stable-context": lambda: transforms.conditional_affine_autoregressive(5, 3, stable=True),
    "sbi": lambda: transforms.conditional_affine_autoregressive(6, 12, [50, 50]),
}


def of_a_function() -> nn.Module:
    return transforms.ConditionalPlanar(planar_parameters)


def planar_parameters(context: Tensor) -> tuple[Tensor, ...]:
    """Any function of a context, (*batch, 3), that gives b, u and w."""
    wide = torch.cat([context, context.cos()[..., :2]], -1)
    return context[..., :1], wide, wide.sin() + 1.5


PLANAR = {
    "planar": lambda: transforms.planar(5),
    "planar-context": lambda: transforms.conditional_planar(5, 3),
}
LAYERS = AFFINE | CONDITIONAL | PLANAR
CONTEXTS = {"sbi": 12, "default-context": 3, "stable-context": 3, "planar-context": 3}


def affine(features: int, hidden: list[int], **options) -> nn.Module:
    return transforms.AffineAutoregressive(AutoRegressiveNN(features, hidden, **options))


def at(layer: nn.Module, *c: Tensor) -> torch.distributions.Transform:
    """The transform that a layer is, or makes of a context."""
    return layer.condition(*c) if c else layer


def parallel(layer: nn.Module, x: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    transform = at(layer, *c)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def inverse(layer: nn.Module, y: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    transform = at(layer, *c)
    x = transform.inv(y)
    return x, transform.log_abs_det_jacobian(x, y), transform.inv.log_abs_det_jacobian(y, x)


def density(layer: nn.Module, y: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    base = dist.Normal(torch.zeros_like(y[0]), 1).to_event(1)
    return (dist.TransformedDistribution(base, [at(layer, *c)]).log_prob(y),)


def samples(layer: nn.Module, like: Tensor, *c: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    base = dist.Normal(torch.zeros_like(like[0]), 1).to_event(1)
    flow = dist.TransformedDistribution(base, [at(layer, *c)])
    draw = flow.rsample((len(like),))
    return draw, flow.log_prob(draw)


def calls_of(case: str) -> list[Callable]:
    """What the library's own class can do: it has no inverse of planar steps.

    Their log-determinants are compared where they are not pushed towards -inf, as those of samples
    are in training: Pyro's formula cancels there.
    """
    return [parallel] if case in PLANAR else [parallel, samples, inverse, density]


def inputs_of(case: str, layer: nn.Module) -> list[Tensor]:
    net = next((part for part in layer.modules() if hasattr(part, "permutation")), None)
    x = torch.randn(9, net.input_dim if net else 5)
    return [x, torch.randn(9, CONTEXTS[case])] if case in CONTEXTS else [x]


def pair(case: str) -> tuple[nn.Module, nn.Module]:
    """A layer, and a converted copy of it."""
    layer = LAYERS[case]()
    fast = copy.deepcopy(layer)
    fastflow.convert(fast, strict=True)
    return layer, fast


def same(case: str, layer: nn.Module, fast: nn.Module) -> None:
    """Both give the same, in all ways."""
    for call in calls_of(case):
        check_same(call, layer, fast, inputs_of(case, layer))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", LAYERS)
def test_numbers_before_and_after_training(case: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    layer = LAYERS[case]()
    check_conversion(layer, calls_of(case), inputs_of(case, layer), 1, dtype)


def test_clipped_scales_are_tested() -> None:
    layer = LAYERS["tight-clip"]()
    _, raw = layer.arn(torch.randn(50, 4))
    assert (raw < -0.05).any() and (raw > 0.02).any()


@pytest.mark.parametrize("case", PLANAR)
def test_samples_of_planar_steps(case: str) -> None:
    layer, fast = pair(case)
    check_same(samples, layer, fast, inputs_of(case, layer))


def test_planar_steps_made_by_a_function() -> None:
    layer, c = of_a_function(), torch.randn(9, 3)
    fast = copy.deepcopy(layer)
    fastflow.convert(fast, strict=True)
    check_same(parallel, layer, fast, [torch.randn(9, 5), c])
    check_same(parallel, layer, pickle.loads(pickle.dumps(fast)), [torch.randn(9, 5), c])
    fastflow.revert(fast)
    check_same(parallel, layer, fast, [torch.randn(9, 5), c])


@pytest.mark.parametrize("case", PLANAR)
def test_planar_steps_have_an_inverse(case: str) -> None:
    layer, fast = pair(case)
    y, *c = inputs_of(case, layer)
    x = at(fast, *c).inv(y)
    again = at(layer, *c)
    torch.testing.assert_close(again(x), y, rtol=0, atol=1e-10)
    _, ladj, back = inverse(fast, y, *c)
    torch.testing.assert_close(ladj, again.log_abs_det_jacobian(x, y), rtol=0, atol=1e-10)
    torch.testing.assert_close(back, -ladj)


ONE_OF_EACH = ["default", "stable", "default-context", "planar", "planar-context"]


def step_a_fused_optimizer(fast: nn.Module) -> None:
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        for parameter in fast.parameters():
            parameter.grad = torch.randn_like(parameter)
        kind(fast.parameters(), 0.1, fused=True).step()


def step_an_optimizer(fast: nn.Module) -> None:
    for parameter in fast.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.SGD(fast.parameters(), 0.5).step()


def clamp_data(fast: nn.Module) -> None:
    for parameter in fast.parameters():
        parameter.data.clamp_(-0.1, 0.1)


def set_from_a_vector(fast: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(fast.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, fast.parameters())


CHANGES = [step_a_fused_optimizer, step_an_optimizer, clamp_data, set_from_a_vector]


class TestNothingIsStale:
    """Twins: Pyro's own layer with the same parameters, asked about new tensors."""

    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    @pytest.mark.parametrize("case", ONE_OF_EACH)
    def test_after_a_change_of_parameters(self, case: str, change: Callable) -> None:
        layer, fast = pair(case)
        x, *c = inputs_of(case, layer)
        transform = at(fast, *c)
        y = transform(x)
        z = transform.inv(x) if case not in PLANAR else x
        change(fast)  # between a call and its log-determinant, too
        layer.load_state_dict(fast.state_dict())
        twin = at(layer, *c)
        want = twin.log_abs_det_jacobian(x.clone(), y.clone())
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), want, rtol=0, atol=1e-9)
        torch.testing.assert_close(transform(x), twin(x.clone()), rtol=0, atol=1e-9)
        assert not torch.allclose(transform(x), y)
        if case not in PLANAR:
            want = twin.inv(x.clone())
            torch.testing.assert_close(transform.inv(x), want, rtol=1e-8, atol=1e-8)
            assert not torch.allclose(transform.inv(x), z)
            assert not torch.allclose(transform.inv(y), x)

    @pytest.mark.parametrize("case", ONE_OF_EACH)
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_after_writing_to_points_or_context(self, case: str, mode: Callable) -> None:
        layer, fast = pair(case)
        with mode():
            x, *c = inputs_of(case, layer)
            transform = at(fast, *c)
            y = transform(x)
            for tensor in (x, *c, x.data):
                tensor.add_(1)
                twin = at(layer, *(one.clone() for one in c))
                want = twin(x.clone())
                torch.testing.assert_close(transform(x), want, rtol=0, atol=1e-9)
                want = twin.log_abs_det_jacobian(x.clone(), y.clone())
                found = transform.log_abs_det_jacobian(x, y)
                torch.testing.assert_close(found, want, rtol=0, atol=1e-9)
            z = transform.inv(y)
            y.mul_(1.1)
            assert not torch.equal(transform.inv(y), z)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_parameters_that_change_in_inference_mode(
        self, mode: Callable, change: Callable
    ) -> None:
        layer, fast = pair("default")
        base = dist.Normal(torch.zeros(5), 1).to_event(1)
        law = dist.TransformedDistribution(base, [fast])
        with mode():
            x = law.sample((4,))
            before = law.log_prob(x)
        change(fast)
        layer.load_state_dict(fast.state_dict())
        with mode():
            want = dist.TransformedDistribution(base, [layer]).log_prob(x.clone())
            torch.testing.assert_close(law.log_prob(x), want, rtol=1e-8, atol=1e-8)
            assert not torch.allclose(law.log_prob(x), before)

    @pytest.mark.parametrize("case", ONE_OF_EACH)
    def test_training_on_one_batch(self, case: str) -> None:
        """Step after step on the same tensor: no graph is walked a second time."""
        layer, fast = pair(case)
        data, *c = inputs_of(case, layer)
        optimizer = torch.optim.Adam(fast.parameters(), 0.005, fused=True)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            (log_prob,) = density(fast, data, *c)
            losses.append(-log_prob.mean())
            losses[-1].backward()
            (-density(fast, data, *c)[0].mean()).backward()  # twice at the same parameters
            optimizer.step()
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("case", ONE_OF_EACH)
    def test_a_determinant_after_a_backward_through_the_value(self, case: str) -> None:
        layer, fast = pair(case)
        x, *c = inputs_of(case, layer)
        transform = at(fast, *c)
        y = transform(x)
        y.square().mean().backward()
        for _ in range(2):
            transform.log_abs_det_jacobian(x, y).mean().backward()

    @pytest.mark.parametrize("case", ONE_OF_EACH)
    def test_path_gradients_at_a_copy_of_a_draw(self, case: str) -> None:
        layer, fast = pair(case)
        x, *c = inputs_of(case, layer)
        base = dist.Normal(torch.zeros_like(x), 1).to_event(1)
        law = dist.TransformedDistribution(base, [at(fast, *c)])
        draw = law.rsample()
        (got,) = torch.autograd.grad(law.log_prob(draw.clone()).sum(), draw)
        leaf = draw.detach().requires_grad_()
        (want,) = torch.autograd.grad(law.log_prob(leaf).sum(), leaf)
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)

    def test_gradients_where_a_draw_had_none(self) -> None:
        _, fast = pair("default")
        base = dist.Normal(torch.zeros(5), 1).to_event(1)
        flow = dist.TransformedDistribution(base, [fast])
        draw = flow.sample((4,))
        flow.log_prob(draw).sum().backward()
        assert all(parameter.grad.any() for parameter in fast.parameters())

    @pytest.mark.parametrize("case", ONE_OF_EACH)
    @pytest.mark.parametrize("by_pyro", [False, True], ids=["kernel", "by-pyro"])
    def test_threads_do_not_mix(self, case: str, by_pyro: bool, monkeypatch) -> None:
        layer, fast = pair(case)
        if by_pyro and case in PLANAR:
            pytest.skip("planar steps are always computed here")
        x, *c = inputs_of(case, layer)
        transform = at(fast, *c)
        if by_pyro:  # the way of masks that no kernel takes
            monkeypatch.setattr(type(fast), "network", lambda self, *c: None)
        points = [x + number for number in range(8)]
        wants = []
        for point in points:
            twin = at(layer, *c)
            wants.append(twin.log_abs_det_jacobian(point, twin(point)))

        def work(number: int) -> None:
            for _ in range(200):
                y = transform(points[number])
                found = transform.log_abs_det_jacobian(points[number], y)
                torch.testing.assert_close(found, wants[number], rtol=0, atol=1e-9)

        in_threads(work)

    def test_transforms_of_functions_leave_nothing_behind(self) -> None:
        layer, fast = pair("default")
        x = torch.randn(4, 5)
        jacobian = torch.vmap(torch.func.jacrev(fast))(x)
        ladj = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(ladj, layer.log_abs_det_jacobian(x, layer(x)))

    @pytest.mark.parametrize("case", ["default", "stable", "planar"])
    def test_what_pyro_remembered_is_forgotten(self, case: str) -> None:
        """What was kept before a conversion is not answered after `revert`."""
        layer = LAYERS[case]()
        x = torch.randn(4, 5)
        y = layer(x)
        fastflow.convert(layer, strict=True)
        copy.deepcopy(layer)  # a pair with a history would have no copy
        clamp_data(layer)
        fastflow.revert(layer)
        assert not torch.allclose(layer(x), y)

    @pytest.mark.parametrize("case", ["default", "default-context", "planar"])
    def test_inverses_are_copied_and_pickled(self, case: str) -> None:
        layer, fast = pair(case)
        x, *c = inputs_of(case, layer)
        transform = at(fast, *c)
        for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            inverse = copied(transform.inv)
            assert torch.equal(inverse(x), transform.inv(x))
            # before 2.13 torch's transforms hold their inverses by weak references alone
            assert inverse.inv.inv is inverse or torch.__version__ < (2, 13)


REMEMBERED = ["default", "stable", "default-context", "planar-context"]


def law_of(*steps: torch.distributions.Transform) -> dist.TransformedDistribution:
    return dist.TransformedDistribution(dist.Normal(torch.zeros(5), 1).to_event(1), list(steps))


@pytest.fixture
def passes(monkeypatch) -> list[str]:
    """The names of the functions that compute, call after call."""
    called = []
    module = sys.modules[type(pair("default")[1]).__module__]

    def counting(name: str, call: Callable) -> Callable:
        return lambda *args, **kwargs: (called.append(name), call(*args, **kwargs))[1]

    for name in ("autoregressive", "autoregressive_inverse", "planar_flow", "planar_flow_inverse"):
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return called


@pytest.mark.parametrize("case", REMEMBERED)
class TestTheLastDraw:
    """Twins are copies, which have no memory."""

    def start(self, case: str) -> tuple[nn.Module, Tensor, list[Tensor], Callable]:
        _, fast = pair(case)
        x, *c = inputs_of(case, fast)
        return fast, x, c, lambda y: law_of(at(copy.deepcopy(fast), *c)).log_prob(y)

    @pytest.mark.parametrize("layers", [1, 3])
    def test_draw_and_score_are_one_pass(self, case: str, layers: int, passes: list) -> None:
        steps = [self.start(case) for _ in range(layers)]
        law = law_of(*(at(fast, *c) for fast, _, c, _ in steps))
        draw = law.rsample((9,))
        found = law.log_prob(draw)
        assert len(passes) == layers
        again = law.log_prob(draw)
        assert len(passes) == 3 * layers
        torch.testing.assert_close(again, found, rtol=0, atol=1e-9)
        weights = list(steps[0][0].parameters())  # both have a graph of their own
        one, other = (
            torch.autograd.grad(lp.sum(), weights, retain_graph=True) for lp in (found, again)
        )
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_composed_transforms_score_in_one_pass(self, case: str, passes: list) -> None:
        steps = [self.start(case) for _ in range(3)]
        parts = [at(fast, *c) for fast, _, c, _ in steps]
        law = law_of(torch.distributions.ComposeTransform(parts))
        draw = law.rsample((9,))
        found = law.log_prob(draw)
        assert len(passes) == 3
        torch.testing.assert_close(found, law.log_prob(draw.clone()), rtol=0, atol=1e-9)

    def test_two_calls_have_two_graphs(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        one, other = transform(x), transform(x)
        assert one is not other
        one.sum().backward()
        other.sum().backward()

    def test_training_as_pyro_trains(self, case: str) -> None:
        results = []
        for layer in pair(case):
            _, *c = inputs_of(case, layer)
            c = [torch.ones_like(one) for one in c]
            optimizer = torch.optim.Adam(layer.parameters(), 0.01, fused=True)
            torch.manual_seed(4)
            for _ in range(4):
                optimizer.zero_grad()
                law = law_of(at(layer, *c))
                draw = law.rsample((9,))
                (law.log_prob(draw) + draw.sin().sum(-1)).mean().backward()
                optimizer.step()
            results.append(list(layer.parameters()))
        for own, fast in zip(*results, strict=True):
            torch.testing.assert_close(own, fast, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("moment", ["draw", "inverse"])
    @pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
    def test_a_change_of_parameters(self, case: str, change: Callable, moment: str) -> None:
        fast, x, c, fresh = self.start(case)
        transform = at(fast, *c)
        y = transform(x)
        before = fresh(y)
        if moment == "inverse":
            assert transform.inv(y) is x
        change(fast)
        want = copy.deepcopy(fast)
        if moment == "draw":
            torch.testing.assert_close(
                law_of(transform).log_prob(y), fresh(y), rtol=1e-8, atol=1e-8
            )
            assert not torch.allclose(fresh(y), before)
        ladj = at(want, *c).log_abs_det_jacobian(x, y)
        torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), ladj, rtol=0, atol=1e-9)

    def test_other_parameters_of_the_same_values(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        y = transform(x)
        for module in fast.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
        law_of(transform).log_prob(y).sum().backward()
        assert all(parameter.grad is not None for parameter in fast.parameters())

    def test_parameters_that_thaw(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        first = next(iter(fast.parameters())).requires_grad_(False)
        transform = at(fast, *c)
        y = transform(x)
        first.requires_grad_(True)
        law_of(transform).log_prob(y).sum().backward()
        assert first.grad is not None and first.grad.any()

    @pytest.mark.parametrize("which", ["y", "x", "context"])
    def test_writes_to_points_and_context(self, case: str, which: str) -> None:
        for write in (lambda one: one.add_(0.1), lambda one: one.data.add_(0.1)):
            fast, x, c, fresh = self.start(case)
            if which == "context" and not c:
                return
            transform = at(fast, *c)
            y = transform(x)
            with torch.no_grad():
                write({"y": y, "x": x}.get(which, (*c, x)[0]))
            found = law_of(transform).log_prob(y)
            torch.testing.assert_close(found, fresh(y.detach()), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("which", ["y", "x"])
    def test_a_history_that_is_added_in_place(self, case: str, which: str) -> None:
        """It changes no value."""
        fast, x, c, _ = self.start(case)
        transform, shift = at(fast, *c), torch.zeros(5, requires_grad=True)
        y = transform(x)
        point = {"x": x, "y": y}[which]
        point.add_(shift)
        if which == "y":
            found, want = (law_of(at(fast, *c) if new else transform).log_prob(y) for new in (0, 1))
        else:
            found, want = (
                (at(fast, *c) if new else transform).log_abs_det_jacobian(x, y) for new in (0, 1)
            )
        got, expected = (
            torch.autograd.grad(one.sum(), shift, retain_graph=True)[0] for one in (found, want)
        )
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_modes(self, case: str, mode: Callable) -> None:
        fast, x, c, fresh = self.start(case)
        transform = at(fast, *c)
        with mode():
            y = transform(x.clone())
        y = y.clone()
        law_of(transform).log_prob(y).sum().backward()
        assert all(parameter.grad is not None for parameter in fast.parameters())
        y = transform(x)
        with mode():
            found = law_of(transform).log_prob(y)
        assert not found.requires_grad
        torch.testing.assert_close(found, fresh(y).detach(), rtol=1e-8, atol=1e-8)

    def test_a_draw_without_history(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        with torch.no_grad():
            y = transform(x)
        law_of(transform).log_prob(y).sum().backward()
        assert all(parameter.grad is not None for parameter in fast.parameters())

    def test_a_backward_pass_before(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        gradients = []
        for early in (True, False):
            y = transform(x)
            fast.zero_grad()
            if early:
                y.square().sum().backward(retain_graph=True)
                fast.zero_grad()
            law_of(transform).log_prob(y).sum().backward()
            gradients.append([parameter.grad for parameter in fast.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_a_backward_pass_that_freed_the_graph(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        y = transform(x)
        assert transform.inv(y) is x
        y.square().sum().backward()
        transform.log_abs_det_jacobian(x, y).sum().backward()

    def test_threads(self, case: str) -> None:
        fast, x, c, fresh = self.start(case)
        transform = at(fast, *c)
        points = [x + number for number in range(8)]
        wants = [fresh(transform(point)) for point in points]
        shared = transform(x)
        want = fresh(shared)

        def work(number: int) -> None:
            for _ in range(20):
                y = transform(points[number])
                found = law_of(transform).log_prob(y)
                torch.testing.assert_close(found, wants[number], rtol=0, atol=1e-8)
            torch.testing.assert_close(law_of(transform).log_prob(shared), want, rtol=0, atol=1e-8)

        in_threads(work)

    def test_copies_and_states_hold_no_draw(self, case: str, passes: list) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        keys, size = set(vars(transform)), len(pickle.dumps(transform))
        y = transform(x)
        assert set(vars(transform)) == keys and len(pickle.dumps(transform)) == size
        twin = copy.deepcopy(transform)
        passes.clear()
        torch.testing.assert_close(twin.inv(y), x, rtol=0, atol=1e-9)
        assert len(passes) == 1

    def test_checkpoints(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        gradients = []
        for kept in (True, False):
            y = transform(x)
            fast.zero_grad()
            call = law_of(transform).log_prob
            found = call(y) if kept else checkpoint(call, y, use_reentrant=False)
            found.sum().backward()
            gradients.append([parameter.grad for parameter in fast.parameters()])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)

    def test_functions_that_are_transformed(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *(one[0] for one in c))

        def both(point: Tensor) -> Tensor:
            y = transform(point)
            return law_of(transform).log_prob(y)

        want = torch.stack([both(point) for point in x])
        torch.testing.assert_close(torch.vmap(both)(x), want, rtol=0, atol=1e-8)
        torch.func.jacrev(both)(x[0])
        torch.testing.assert_close(both(x[0]), want[0], rtol=0, atol=1e-8)

    def test_nothing_outlives_the_draw(self, case: str) -> None:
        fast, x, c, _ = self.start(case)
        transform = at(fast, *c)
        gc.collect()
        gc.disable()  # counting references is enough
        try:
            for use in (lambda y: None, transform.inv, law_of(transform).log_prob):
                point = x.clone()
                gone = weakref.ref(point)
                y = transform(point)
                use(y)
                del point
                assert gone() is not None
                later = transform(x)
                del y
                assert gone() is None
                del later
        finally:
            gc.enable()


def test_a_draw_and_another_mask() -> None:
    _, fast = pair("default")
    other = LAYERS["default"]()
    while torch.equal(other.arn.permutation, fast.arn.permutation):
        other = LAYERS["default"]()
    x = torch.randn(4, 5)
    y = fast(x)
    for mask, its in zip(fast.arn.layers, other.arn.layers):
        mask.mask.copy_(its.mask)
    twin = copy.deepcopy(fast)
    torch.testing.assert_close(fast.inv(y), twin.inv(y))
    assert not torch.allclose(fast.inv(y), x)


def test_a_draw_and_a_hook() -> None:
    _, fast = pair("default")
    y, called = fast(torch.randn(4, 5)), []
    fast.arn.layers[0].register_forward_hook(lambda *_: called.append(1))
    law_of(fast).log_prob(y)
    assert called


def test_a_draw_and_a_revert() -> None:
    layer, fast = pair("default")
    y = fast(torch.randn(4, 5))
    clamp_data(fast)
    fastflow.revert(fast)
    layer.load_state_dict(fast.state_dict())
    want = law_of(layer).log_prob(y.detach())
    torch.testing.assert_close(law_of(fast).log_prob(y), want)
    fastflow.convert(fast)
    torch.testing.assert_close(law_of(fast).log_prob(y), want)


def test_a_draw_and_a_dropout() -> None:
    """A context's network that is random, or any function, is asked anew."""
    net = nn.Sequential(nn.Linear(3, 11), nn.Dropout())
    layer = transforms.ConditionalPlanar(lambda c: net(c).split([1, 5, 5], -1))
    fastflow.convert(layer, strict=True)
    transform = layer.condition(torch.randn(9, 3))
    x = torch.randn(9, 5)
    assert transform.inv(transform(x)) is not x


@pytest.mark.parametrize("case", ["default", "planar"])
def test_log_determinants_keep_their_precision_under_autocast(case: str) -> None:
    layer, fast = (one.float() for one in pair(case))
    x = torch.randn(50, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, ladj = parallel(fast, x)
    assert y.dtype == ladj.dtype == torch.float32
    torch.testing.assert_close(ladj, parallel(layer, x)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["default", "stable", "default-context", "planar"])
def test_it_stays_what_it_was(case: str) -> None:
    layer = LAYERS[case]()
    fast = copy.deepcopy(layer)
    parameters = list(fast.parameters())
    fastflow.convert(fast)
    assert isinstance(fast, type(layer)) and type(fast) is not type(layer)
    assert all(one is other for one, other in zip(parameters, fast.parameters(), strict=True))
    assert list(fast.state_dict()) == list(layer.state_dict())
    if case in CONTEXTS:
        context = torch.zeros(3)
        one, other = layer.condition(context), fast.condition(context)
        assert isinstance(other, type(one))
        assert list(one.parameters()) == list(other.parameters()) == []
    else:
        assert fast.domain is layer.domain and fast.codomain is layer.codomain
        assert fast.with_cache() is fast and fast.inv.inv is fast


def test_states_of_other_permutations_are_followed() -> None:
    layer, fast = pair("default")
    other = LAYERS["default"]()
    while torch.equal(other.arn.permutation, fast.arn.permutation):
        other = LAYERS["default"]()
    fast.load_state_dict(other.state_dict())
    same("default", other, fast)
    layer.load_state_dict(fast.state_dict())
    same("default", layer, fast)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("case", ["default", "stable", "default-context", "planar"])
def test_copies_after_use(case: str, copied: Callable) -> None:
    layer, fast = pair(case)
    x, *c = inputs_of(case, layer)
    transform = at(fast, *c)
    y = transform(x)
    twin = copied(fast)
    assert type(twin) is type(fast)
    same(case, layer, twin)
    torch.testing.assert_close(copied(transform)(x), y)
    with torch.no_grad():
        next(iter(twin.parameters())).zero_()
    same(case, layer, fast)


@pytest.mark.parametrize("case", ["default", "stable", "default-context", "planar"])
def test_revert(case: str) -> None:
    layer, fast = pair(case)
    x, *c = inputs_of(case, layer)
    at(fast, *c)(x)
    fastflow.revert(fast)
    assert type(fast) is type(layer) and fast.__dict__.keys() == layer.__dict__.keys()
    one, other = at(layer, *c), at(fast, *c)
    assert torch.equal(one(x), other(x))
    assert torch.equal(one.log_abs_det_jacobian(x, one(x)), other.log_abs_det_jacobian(x, other(x)))
    fastflow.convert(fast)
    same(case, layer, fast)


def skipping() -> nn.Module:
    return affine(3, [8], skip_connections=True)


def three_parameters() -> nn.Module:
    return transforms.AffineAutoregressive(AutoRegressiveNN(3, [8], param_dims=[1, 1, 1]))


def shifted_mask() -> nn.Module:
    layer = transforms.affine_autoregressive(3)
    layer.arn.layers[0].mask.mul_(0.5)
    return layer


REFUSED = {
    "skip": (skipping, "skip_connections=True"),
    "parameters": (three_parameters, "param_dims"),
    "activation": (lambda: affine(3, [8], nonlinearity=nn.Sigmoid()), "activation Sigmoid"),
    "mask": (shifted_mask, "other numbers than 0 and 1"),
    "clip": (
        lambda: transforms.affine_autoregressive(3, log_scale_min_clip=-100.0),
        "low and high",
    ),
    "network": (
        lambda: transforms.AffineAutoregressive(ConditionalAutoRegressiveNN(3, 2, [8])),
        "ConditionalAutoRegressiveNN",
    ),
    "spline": (lambda: transforms.spline_autoregressive(3), "no affine transform"),
    "dense": (lambda: transforms.block_autoregressive(3), "no affine transform"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone_is_named(case: str) -> None:
    make, reason = REFUSED[case]
    check_left_alone(make(), reason)


def test_torch_compile() -> None:
    torch.compiler.reset()
    layer, fast = pair("default")
    # torch 2.11 does not trace the making of an inverse, be the transform Pyro's own or converted
    held = fast.inv if torch.__version__ < (2, 13) else None  # noqa: F841
    x = torch.randn(4, 5)
    for call in (parallel, inverse):
        compiled = torch.compile(partial(call, fast), fullgraph=True, backend="aot_eager")
        for point in (x, x, x + 1):
            for want, found in zip(call(layer, point), compiled(point), strict=True):
                torch.testing.assert_close(found, want, rtol=0, atol=1e-10)
        with torch.no_grad():
            fast.arn.layers[0].weight.mul_(0.9)  # a step, after which x is asked about again
            layer.load_state_dict(fast.state_dict())
        for want, found in zip(call(layer, x.clone()), compiled(x), strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-10)


def test_a_guide_of_pyro() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(torch.zeros(4), 1).to_event(1))
        pyro.sample(
            "y", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1), obs=torch.ones(())
        )

    losses = []
    for converted in (False, True):
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        guide = pyro.infer.autoguide.AutoIAFNormal(model, hidden_dim=[16], num_transforms=2)
        guide()  # it makes its transforms when it is first called
        if converted:
            assert len(fastflow.convert(guide).replaced) == 2
        optimizer = pyro.optim.Adam({"lr": 0.01})
        svi = pyro.infer.SVI(model, guide, optimizer, pyro.infer.Trace_ELBO())
        losses.append([svi.step() for _ in range(10)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-10)
