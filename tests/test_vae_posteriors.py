"""Posteriors: their density by Jacobian, inverse and total mass; faults; the registry."""

import math
from unittest import mock

import pytest
import torch
from vae_files import write_images
from vae_quadrature import ROUNDING, grid, integral, strong_flow

import fastflow
from fastflow.bijections import planar
from fastflow.vae import (
    Config,
    FlowPosterior,
    GaussianPosterior,
    VaeError,
    build,
    diagonal_normal_log_prob,
    posteriors,
    register,
    registry,
    standard_normal_log_prob,
)

FEATURES, BATCH, STEPS = 7, 2, 3
pytestmark = pytest.mark.usefixtures("float64")
SETTINGS = {
    "gaussian": {},
    "planar": {"steps": STEPS},
    "planar, shared": {"steps": STEPS, "amortised": False},
    "planar, centred": {"steps": STEPS, "constraint": "centred"},
    "iaf": {"steps": 2, "width": 8, "context": 4},
    "iaf, one layer, the features as context": {"width": 8, "layers": 1, "context": FEATURES},
    "maf": {"steps": 2, "width": 8, "context": 4},
    "pcp": {"width": 8, "context": 4},
}


def make_posterior(kind):
    config = Config(posterior=kind.split(",")[0], **SETTINGS[kind])
    return strong_flow(registry.make_posterior(config, FEATURES))


@torch.no_grad()
def check_density(posterior):
    """log_q is the density of the draws: by their Jacobian, by the inverse, and in total mass."""
    h, noise = torch.randn(BATCH, FEATURES), torch.randn(BATCH, 2)
    z, log_q, _ = posterior(h, noise)

    expected = torch.empty(BATCH)
    for row in range(BATCH):
        jacobian = torch.autograd.functional.jacobian(
            lambda e, row=row: posterior(h[row : row + 1], e).z[0], noise[row : row + 1]
        )
        base = torch.distributions.Normal(0, 1).log_prob(noise[row]).sum()
        expected[row] = base - torch.linalg.slogdet(jacobian.reshape(2, 2)).logabsdet
    assert (log_q - expected).abs().max() < ROUNDING
    assert (posterior.log_prob(z, h) - log_q).abs().max() < ROUNDING

    mass, error = integral(torch.exp(posterior.log_prob(grid(), h)))
    assert ((mass - 1).abs() < error).all()


@pytest.mark.parametrize("kind", SETTINGS)
def test_log_q_is_the_density_of_the_draws(kind):
    check_density(make_posterior(kind))


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("latent", [1, 5])
def test_draws_of_several_samples(kind, latent):
    config = Config(posterior=kind.split(",")[0], latent=latent, **SETTINGS[kind])
    posterior = strong_flow(registry.make_posterior(config, FEATURES))
    h, noise = torch.randn(BATCH, FEATURES), torch.randn(4, 3, BATCH, latent)
    z, log_q, kl = posterior(h, noise)
    assert z.shape == noise.shape and log_q.shape == noise.shape[:-1]
    torch.testing.assert_close(posterior.log_prob(z, h), log_q)
    for row in range(BATCH):  # an image has the posterior of its own features
        alone = posterior(h[row : row + 1], noise[:, :, row : row + 1])
        torch.testing.assert_close(alone.z, z[:, :, row : row + 1])
        torch.testing.assert_close(alone.log_q, log_q[:, :, row : row + 1])
    if kind != "gaussian":
        torch.testing.assert_close(kl, log_q - standard_normal_log_prob(z))


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_parameter_has_a_gradient(kind):
    posterior = make_posterior(kind)
    z, _, kl = posterior(torch.randn(BATCH, FEATURES), torch.randn(9, BATCH, 2))
    (z.square().sum() + kl.sum()).backward()
    for name, parameter in posterior.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("kind", ["planar", "iaf", "maf", "pcp"])
def test_a_flow_follows_the_image(kind):
    posterior = registry.make_posterior(Config(posterior=kind, **SETTINGS[kind]), FEATURES)
    context = posterior._context_of(torch.randn(BATCH, FEATURES))
    moved = [posterior.bijection(torch.zeros(2), context[row])[0] for row in range(BATCH)]
    assert not torch.equal(*moved)


def test_planar_steps_start_near_the_identity():
    posterior = registry.make_posterior(Config(posterior="planar"), FEATURES)
    h, noise = torch.randn(BATCH, FEATURES), torch.randn(50, BATCH, 2)
    z_0, z = posterior.base_draw(h, noise), posterior(h, noise).z
    assert 0 < (z - z_0).square().mean() < 1e-3 * z_0.square().mean()


def test_the_order_is_reversed_between_the_steps():
    for kind in ("iaf", "maf"):
        flow = make_posterior(kind).bijection
        first, second = flow if kind == "iaf" else flow.bijection
        assert first.network.order.tolist() == [0, 1]
        assert second.network.order.tolist() == [1, 0]


def plain_step(z, w, u, b):
    p = (w * u).sum(-1, keepdim=True)
    u_hat = u + (torch.nn.functional.softplus(p) - 1 - p) * w / w.square().sum(-1, keepdim=True)
    t = torch.tanh((z * w).sum(-1, keepdim=True) + b)
    ladj = torch.log1p((1 - t.square()) * (w * u_hat).sum(-1, keepdim=True)).squeeze(-1)
    return u_hat * t, ladj


def plain_chain(z, w, u, b, constraint, input_of_step, input_of_ladj):
    """A planar chain with a choice of where each step and each ladj is evaluated."""
    states, total = [z], 0
    for k in range(w.shape[-2]):
        step = [parameter[..., k, :] for parameter in (w, u)] + [b[..., k, None]]
        move, _ = plain_step(input_of_step(states), *step)
        _, ladj = plain_step(input_of_ladj(states), *step)
        states.append(states[-1] + move)
        total = total + ladj
    return states[-1], total


def first(states):
    return states[0]


def last(states):
    return states[-1]


true_planar_flow = planar.planar_flow
true_inverse = planar.planar_flow_inverse
true_reparametrise = posteriors._reparametrise

FAULTS = {
    "every step is fed z_0": (
        planar,
        "planar_flow",
        lambda *arguments: plain_chain(*arguments, first, first),
    ),
    "ladj is taken at z_0": (
        planar,
        "planar_flow",
        lambda *arguments: plain_chain(*arguments, last, first),
    ),
    "the sign of ladj": (
        planar,
        "planar_flow",
        lambda *arguments: (lambda z, ladj: (z, -ladj))(*true_planar_flow(*arguments)),
    ),
    "the sign of the inverse's ladj": (
        planar,
        "planar_flow_inverse",
        lambda *arguments: (lambda z, ladj: (z, -ladj))(*true_inverse(*arguments)),
    ),
    "the half of log sigma^2": (
        posteriors,
        "_reparametrise",
        lambda mean, log_var, noise: (
            true_reparametrise(mean, log_var, noise)[0],
            standard_normal_log_prob(noise) - log_var.sum(-1),
        ),
    ),
    "the half of the squared noise": (
        posteriors,
        "standard_normal_log_prob",
        lambda z: -(0.5 * math.log(2 * math.pi) + z.square()).sum(-1),
    ),
    "the half of the square in the density": (
        posteriors,
        "diagonal_normal_log_prob",
        lambda z, mean, log_var: (
            diagonal_normal_log_prob(z, mean, log_var)
            - 0.5 * ((z - mean).square() * torch.exp(-log_var)).sum(-1)
        ),
    ),
}


def test_plain_chain_without_fault_is_the_flow(monkeypatch):
    monkeypatch.setattr(planar, "planar_flow", lambda *a: plain_chain(*a, last, last))
    check_density(make_posterior("planar"))


@pytest.mark.parametrize("fault", FAULTS)
def test_density_check_catches(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises(AssertionError):
        check_density(make_posterior("planar"))


@pytest.fixture
def mine():
    """A posterior of a user, for as long as the test runs."""
    with mock.patch.dict(registry.RECIPES):

        @register("mine", settings=("steps", "context"))
        def make(config, in_features):
            flow = fastflow.ConditionalPlanarFlow(config.latent, config.context, config.steps)
            return FlowPosterior(in_features, flow)

        yield


def test_a_registered_posterior_is_a_setting(mine):
    config = Config(posterior="mine", steps=2, context=5, hidden=6)
    with pytest.raises(VaeError, match="--width 9 has no effect with --posterior mine"):
        Config(posterior="mine", width=9)
    posterior = build(config, (2, 3)).posterior
    assert posterior.bijection.steps == 2 and posterior.bijection.context_features == 5
    check_density(strong_flow(registry.make_posterior(config, FEATURES)))


def test_a_registered_posterior_on_the_command_line(mine, tmp_path):
    for package in ("safetensors", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    from fastflow.vae import checkpoint, cli

    torch.set_default_dtype(torch.float32)
    images, out = write_images(tmp_path / "images"), tmp_path / "run"
    words = f"train --posterior mine --steps 2 --context 3 --hidden 8 --epochs 1 --out {out} "
    words += f"--importance-samples 2 --data mnist --data-root {images} --device cpu"
    assert cli.main(words.split()) == 0
    model, config, _ = checkpoint.load_model(out / "model.safetensors", torch.device("cpu"))
    assert config.posterior == "mine" and model.posterior.bijection.steps == 2


def test_unfit_recipes_are_refused(mine):
    with pytest.raises(ValueError, match="'mine' is taken"):
        register("mine")
    with pytest.raises(ValueError, match="setting 'depth' must be one of steps, width"):
        register("other", settings=("depth",))
    with pytest.raises(VaeError, match=r"posterior: 'other' must be one of gaussian, .*mine"):
        Config(posterior="other")
    register("wrong size")(lambda config, in_features: GaussianPosterior(in_features, 9))
    with pytest.raises(VaeError, match="made one of 9 latents, must make one of 2"):
        build(Config(posterior="wrong size"), (2, 3))
    register("no posterior")(lambda config, in_features: torch.nn.Identity())
    with pytest.raises(VaeError, match="made a Identity, must make a"):
        build(Config(posterior="no posterior"), (2, 3))


def test_networks_narrower_than_the_latents_are_refused():
    with pytest.raises(VaeError, match="width: 4 must be at least the number of latents, 5"):
        build(Config(posterior="iaf", latent=5, width=4), (2, 3))
