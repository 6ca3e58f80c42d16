"""The walk, the report, and what a converted layer knows beside its parameters stays true."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from conversion import check_same
from torch import Tensor, nn

import fastflow
from fastflow.convert import Report, Unsupported
from fastflow.convert.layer import Converted

pytest.importorskip("nflows")
from nflows import transforms
from nflows.transforms import MaskedAffineAutoregressiveTransform

D, H = 5, 12


def layer(**options) -> MaskedAffineAutoregressiveTransform:
    options = {"use_residual_blocks": False, "activation": torch.tanh} | options
    return MaskedAffineAutoregressiveTransform(D, H, **options).double()


def pair(**options) -> tuple[nn.Module, nn.Module]:
    """A layer and its converted copy."""
    original = layer(**options)
    converted = copy.deepcopy(original)
    fastflow.convert(converted)
    return original, converted


def both_ways(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return *model(x), *model.inverse(x)


def agree(original: nn.Module, converted: nn.Module) -> None:
    """Asserts the same numbers, and that it is fastflow that makes them."""
    assert isinstance(converted, Converted)
    check_same(both_ways, original, converted, [torch.randn(7, D, dtype=torch.float64)])
    assert converted._stairs is not None


@pytest.fixture
def model() -> nn.Module:
    shared = layer()
    return nn.ModuleDict(
        {
            "flow": transforms.CompositeTransform(
                [shared, transforms.RandomPermutation(D), layer(), shared]
            ),
            "head": nn.Linear(D, 2),
            "other": layer(dropout_probability=0.5),
        }
    )


def test_the_report_names_what_was_replaced_and_what_was_not(model: nn.Module) -> None:
    report = fastflow.convert(model)
    assert isinstance(report, Report) and report.model is model
    name = "MaskedAffineAutoregressiveTransform"
    assert [row[:2] for row in report.replaced] == [
        ("flow._transforms.0", name),
        ("flow._transforms.2", name),
    ]
    ((path, skipped, reason),) = report.skipped
    assert (path, skipped) == ("other", name) and "dropout" in reason
    head, rule, *rows = str(report).splitlines()
    assert head.split() == ["path", "class", "replaced"] and set(rule) == {"-", " "}
    assert [row.split()[2] for row in rows] == ["yes", "yes", "no:"]
    assert len({row.index(name) for row in rows}) == 1  # columns


def test_a_shared_layer_stays_shared_and_twice_is_once(model: nn.Module) -> None:
    fastflow.convert(model)
    first, _, second, last = model["flow"]._transforms
    assert first is last and isinstance(first, Converted) and isinstance(second, Converted)
    hooks = len(first._load_state_dict_post_hooks)
    again = fastflow.convert(model)
    assert not again.replaced and type(first).__bases__[-1] is MaskedAffineAutoregressiveTransform
    assert len(first._load_state_dict_post_hooks) == hooks


def test_strict_names_all_and_changes_nothing(model: nn.Module) -> None:
    model["more"] = layer(use_batch_norm=True)
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    with pytest.raises(Unsupported, match=r"other \(Masked.*dropout.*more \(Masked.*batch norm"):
        fastflow.convert(model, strict=True)
    for module, kind, attributes in before:
        assert type(module) is kind and module.__dict__ == attributes


def test_an_error_changes_nothing(model: nn.Module) -> None:
    del model["other"].autoregressive_net  # no such layer was ever built
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    with pytest.raises(AttributeError, match="autoregressive_net"):
        fastflow.convert(model)
    for module, kind, attributes in before:
        assert type(module) is kind and module.__dict__ == attributes


def test_revert_gives_back_what_was_there(model: nn.Module) -> None:
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    hooks = [dict(module._load_state_dict_post_hooks) for module in model.modules()]
    x = torch.randn(7, D, dtype=torch.float64)
    want = model["flow"](x)
    fastflow.convert(model)
    assert fastflow.revert(model) is model
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before
    assert [dict(module._load_state_dict_post_hooks) for module in model.modules()] == hooks
    assert all(map(torch.equal, model["flow"](x), want))
    fastflow.revert(model)  # nothing to do


class Posterior:
    """As sbi has them: no module, but with a network in an attribute, or in its potential's."""

    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


@pytest.mark.parametrize("function", [fastflow.convert, fastflow.revert])
def test_a_module_inside_something_else_is_found(function) -> None:
    net = nn.Linear(2, 2)
    direct = Posterior(prior=torch.distributions.Normal(0, 1), _same=net, posterior_estimator=net)
    direct.itself = direct
    potential = Posterior(potential_fn=Posterior(likelihood_estimator=nn.Tanh()))
    ensemble = Posterior(posteriors=[direct, Posterior(net=nn.Tanh())], weights={"a": nn.ReLU()})
    for model, paths in (
        (direct, ["posterior_estimator"]),
        (potential, ["potential_fn.likelihood_estimator"]),
        (ensemble, ["posteriors[0].posterior_estimator", "posteriors[1].net", "weights['a']"]),
    ):
        shown = ", ".join(f"{function.__name__}(model.{path})" for path in paths)
        message = f"model is a Posterior, must be a torch.nn.Module; there are some in it: {shown}"
        with pytest.raises(TypeError, match=re.escape(message) + "$"):
            function(model)
    deep = Posterior(a=Posterior(b=Posterior(c=net)))
    with pytest.raises(TypeError, match=r"model is a Posterior, must be a torch\.nn\.Module$"):
        function(deep)


@pytest.mark.parametrize("function", [fastflow.convert, fastflow.revert])
def test_what_is_no_module_is_refused(function) -> None:
    with pytest.raises(TypeError, match="model is a list, must be"):
        function([layer()])


def test_what_was_converted_before_is_said() -> None:
    own = layer()
    assert not fastflow.convert(own).before
    report = fastflow.convert(own)
    assert [row.path for row in report.before] == [""] and not report.replaced
    assert str(report).splitlines()[-1].endswith("before")


def test_a_model_without_such_layers() -> None:
    report = fastflow.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    assert not report.replaced and not report.skipped
    assert str(report) == "no layer that fastflow knows"


def test_masks_that_are_no_such_masks_leave_the_layer_alone() -> None:
    own = layer()
    own.autoregressive_net.initial_layer.mask[0] = 1  # sees all: so do some outputs
    (row,) = fastflow.convert(own).skipped
    assert "staircase" in row.reason
    own = layer()
    own.autoregressive_net.initial_layer.mask.mul_(0.5)  # scales weights
    (row,) = fastflow.convert(own).skipped
    assert "other numbers than 0 and 1" in row.reason


def test_hooks_names_and_printing_stay() -> None:
    original, seen = layer(), []
    text = repr(original)
    original.register_forward_hook(lambda *_: seen.append(1))
    fastflow.convert(original)
    original(torch.randn(3, D, dtype=torch.float64))
    assert seen and repr(original) == text
    assert type(original).__name__ == MaskedAffineAutoregressiveTransform.__name__


def test_state_dicts_pass_both_ways() -> None:
    (original, converted), (other, other_converted) = pair(), pair(random_mask=True)
    assert list(converted.state_dict()) == list(original.state_dict())
    assert dict(converted.named_buffers()).keys() == dict(original.named_buffers()).keys()
    converted.load_state_dict(other.state_dict())  # the masks are others too
    agree(other, converted)
    original.load_state_dict(other_converted.state_dict())
    agree(original, other_converted)


def test_loading_into_a_part_replacing_a_mask_and_writing_to_one_are_noticed() -> None:
    original, converted = pair()
    other = layer(random_mask=True)
    for model in (original, converted):
        model.autoregressive_net.load_state_dict(other.autoregressive_net.state_dict())
    agree(original, converted)
    for model in (original, converted):
        net = model.autoregressive_net
        net.final_layer.mask = torch.zeros_like(net.final_layer.mask)
    agree(original, converted)
    for model in (original, converted):
        model.autoregressive_net.initial_layer.mask.zero_()
    agree(original, converted)
    state = layer(random_mask=True).state_dict()
    for model in (original, converted):
        model.load_state_dict(copy.deepcopy(state), assign=True)
    agree(original, converted)


def test_masks_that_no_longer_are_a_staircase_are_left_to_the_library() -> None:
    original, converted = pair()
    x = torch.randn(7, D, dtype=torch.float64)
    for model in (original, converted):
        model.autoregressive_net.initial_layer.mask[0] = 1
    with pytest.warns(UserWarning, match="no longer|staircase"):
        found = converted(x)
    assert all(map(torch.equal, found, original(x)))
    good = layer()
    converted.load_state_dict(good.state_dict())
    agree(good, converted)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_copies_are_converted_and_independent(duplicate) -> None:
    original, converted = pair()
    agree(original, duplicate(converted))
    x = torch.randn(7, D, dtype=torch.float64)
    duplicate(converted).train()(x)[0].sum().backward()
    assert all(
        parameter.grad is None or not parameter.grad.any() for parameter in converted.parameters()
    )
    # writes that nothing has looked at yet, before and after
    mask = original.autoregressive_net.blocks[0].linear.mask.clone()
    for model in (original, converted):
        model.autoregressive_net.blocks[0].linear.mask.zero_()
    agree(original, duplicate(converted))
    twin = duplicate(converted)
    for model in (original, twin):
        model.autoregressive_net.blocks[0].linear.mask.copy_(mask)
    agree(original, twin)
    fastflow.revert(twin)
    assert type(twin) is MaskedAffineAutoregressiveTransform


def test_dtypes_and_devices_follow() -> None:
    original, converted = pair()
    for model in (original, converted):
        model.float()
    assert converted(torch.randn(3, D))[0].dtype == torch.float32
    for model in (original, converted):
        model.double()
    agree(original, converted)
    agree(original, converted.to("cpu"))
    meta = converted.to("meta")
    nowhere = torch.randn(3, D, dtype=torch.float64, device="meta")
    torch.compiler.reset()
    for model in (torch.compile(meta, fullgraph=True, backend="eager"), meta):
        y, ladj = model(nowhere)
        assert y.is_meta and ladj.shape == (3,)
    filled = meta.to_empty(device="cpu")
    filled.load_state_dict(original.state_dict())
    agree(original, filled)


def test_layers_moved_in_inference_mode() -> None:
    original, converted = pair()
    with torch.inference_mode():
        original.float().double(), converted.float().double()
        x = torch.randn(7, D, dtype=torch.float64)
        for found, want in zip(converted(x), original(x)):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
        for model in (original, converted):
            model.autoregressive_net.initial_layer.mask.zero_()  # such tensors do not count writes
        for found, want in zip(converted(x), original(x)):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_functional_call_and_ensembles() -> None:
    originals, converted = zip(*(pair(random_mask=True) for _ in range(3)))
    x = torch.randn(7, D, dtype=torch.float64)
    state = {name: tensor.detach() for name, tensor in originals[1].state_dict().items()}
    for found, want in zip(torch.func.functional_call(converted[0], state, (x,)), originals[1](x)):
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    agree(originals[0], converted[0])
    stacked = torch.func.stack_module_state(list(converted))
    calls = torch.vmap(lambda *state: torch.func.functional_call(converted[0], state, (x,))[0])
    want = torch.stack([original(x)[0] for original in originals])
    torch.testing.assert_close(calls(*stacked), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "duplicate", [lambda model: model, copied, pickled], ids=["", "copy", "pickle"]
)
def test_torch_compile_sees_loaded_masks(duplicate) -> None:
    torch.compiler.reset()
    original, converted = pair(context_features=3)
    converted = duplicate(converted)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(7, size, dtype=torch.float64) for size in (D, 3)]

    def call(model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (compiled if model is converted else model)(*inputs)

    check_same(call, original, converted, inputs)
    other = layer(context_features=3, random_mask=True)
    converted.load_state_dict(other.state_dict())
    check_same(call, other, converted, inputs)
