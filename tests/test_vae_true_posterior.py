"""The gridded true posterior against normals known in closed form, fits, and the command."""

import json
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from vae_command import call, complaint
from vae_files import SHAPE

from fastflow.vae import VAE, Config, GaussianLikelihood, GaussianPosterior, VaeError, build
from fastflow.vae.checkpoint import load_model, save_model
from fastflow.vae.four_images import Experiment
from fastflow.vae.true_posterior import LARGEST_SIDE, SIDE, fit, kl_to_true, true_posterior

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")


def linear_model(weight, variance, mean=(0.0, 0.0), log_var=(0.0, 0.0)):
    """A model in float64 whose decoder is x = W z and whose encoder ignores the image."""
    pixels = len(weight)
    posterior = GaussianPosterior(1, 2)
    decoder = nn.Linear(2, pixels)
    model = VAE(nn.Linear(pixels, 1), posterior, decoder, GaussianLikelihood(variance)).double()
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.zero_()
        for layer, value in ((posterior.mean, mean), (posterior.log_var, log_var)):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor(value))
    return model


def exact_posterior(weight, variance, x):
    """p(z | x) and log p(x) of the linear model."""
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / variance
    covariance = torch.linalg.inv(precision)
    covariance = (covariance + covariance.T) / 2
    posterior = MultivariateNormal(covariance @ weight.T @ x[0] / variance, covariance)
    joint = weight @ weight.T + variance * torch.eye(len(weight), dtype=torch.float64)
    zero = torch.zeros(len(weight), dtype=torch.float64)
    return posterior, MultivariateNormal(zero, joint).log_prob(x[0]).item()


LINEAR = {
    "wide": ([[0.3, 0.1], [0.0, 0.2], [0.1, 0.1]], 0.5, [0.2, -0.1, 0.4]),
    "narrow": ([[3.0, 1.0], [0.5, 2.0], [1.0, 1.0]], 1e-4, [2.0, 1.0, 1.0]),
    "long and thin": ([[3.0, 3.0], [0.0, 0.0], [0.0, 0.0]], 1e-2, [1.0, 0.0, 0.0]),
    "beyond the first square": ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], 0.01, [9.0, -7.5, 0.0]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_grid_of_a_linear_model_is_the_normal_that_it_must_be(name):
    weight, variance, x = LINEAR[name]
    weight, x = (torch.tensor(value, dtype=torch.float64) for value in (weight, [x]))
    density = true_posterior(linear_model(weight, variance), x)
    posterior, log_evidence = exact_posterior(weight, variance, x)
    # the sum over the grid leaves out what lies below e^-20 of the maximum, all else is rounding
    assert density.log_evidence == pytest.approx(log_evidence, abs=1e-7)
    expected = posterior.log_prob(density.points[:, 0])
    torch.testing.assert_close(density.log_prob[:, 0], expected, rtol=0, atol=1e-6)
    assert math.isqrt(len(density.points)) in (SIDE, 2 * SIDE - 1, LARGEST_SIDE)
    assert density.border_mass < 1e-8 and density.quadrature_error < 1e-3
    mean = (density.log_prob.exp() * density.points[:, 0]).sum(0) / density.log_prob.exp().sum()
    torch.testing.assert_close(mean, posterior.mean, rtol=0, atol=1e-6)


def test_divergence_is_that_of_two_normals():
    weight, variance, x = LINEAR["wide"]
    weight, x = (torch.tensor(value, dtype=torch.float64) for value in (weight, [x]))
    mean, log_var = (0.5, -0.3), (-1.0, 0.2)
    model = linear_model(weight, variance, mean, log_var)
    posterior, log_evidence = exact_posterior(weight, variance, x)
    sigma = torch.tensor(log_var, dtype=torch.float64).mul(0.5).exp()
    q = MultivariateNormal(torch.tensor(mean, dtype=torch.float64), torch.diag(sigma**2))
    kl, error = kl_to_true(model, x, log_evidence, torch.Generator().manual_seed(0), draws=20_000)
    assert abs(kl - kl_divergence(q, posterior).item()) < 5 * error  # 5: once in two million
    assert 0 < error < 0.02


class Ring(nn.Module):
    """A decoder of |z|, whose true posterior is a ring."""

    def forward(self, z):
        return z.norm(dim=-1, keepdim=True)


def ring_model(radius, variance, posterior=None):
    posterior = GaussianPosterior(1, 2) if posterior is None else posterior
    model = VAE(nn.Linear(1, 1), posterior, Ring(), GaussianLikelihood(variance)).double()
    return model, torch.full((1, 1), radius, dtype=torch.float64)


def test_a_ring_is_on_the_grid_and_one_too_thin_for_it_is_refused():
    model, x = ring_model(2.0, 0.01)
    density = true_posterior(model, x)
    radius = torch.linspace(0, 8, 100_001, dtype=torch.float64)
    log_likelihood = Normal(radius, 0.1).log_prob(x[0])
    exact = torch.trapezoid(radius * torch.exp(-(radius**2) / 2 + log_likelihood), radius)
    assert density.log_evidence == pytest.approx(math.log(exact), abs=1e-4)
    with pytest.raises(VaeError, match="does not fit a grid"):
        true_posterior(*ring_model(2.0, 1e-7))


def test_a_density_that_is_not_finite_is_refused():
    model, x = ring_model(2.0, 0.01)
    with pytest.raises(VaeError, match="is not finite"):
        true_posterior(model, x * math.inf)


def test_other_latent_sizes_are_refused():
    model = build(Config(latent=3, hidden=4), SHAPE)
    with pytest.raises(VaeError, match="needs 2 latents, the model has 3"):
        true_posterior(model, torch.rand(1, 20))


def test_a_fit_finds_the_posterior_when_it_is_in_the_family():
    weight = torch.tensor([[2.0, 0.0], [0.0, 0.5], [0.0, 0.0]], dtype=torch.float64)
    x = torch.tensor([[1.0, -0.4, 0.1]], dtype=torch.float64)
    model = linear_model(weight, 0.1)  # its columns are orthogonal: the posterior is diagonal
    parameters = list(model.posterior.parameters())
    fit(model, parameters, x, torch.Generator().manual_seed(0), iterations=400, lr=0.05)
    kl, _ = kl_to_true(model, x, true_posterior(model, x).log_evidence, torch.Generator())
    assert -1e-3 < kl < 2e-2  # it started at 1.3
    assert torch.equal(model.decoder.weight, weight)


def test_flows_come_closer_to_a_bent_posterior_than_the_gaussian():
    config = Config(hidden=8, likelihood="gaussian", variance=0.1, lr=0.01)
    model = build(config, SHAPE)
    with torch.no_grad():
        for layer in (model.decoder[0], model.decoder[2]):
            layer.weight.mul_(3)  # bends it
        images = model.generate(torch.tensor([[0.3, -0.8]]))
    experiment = Experiment(model, config, images, SHAPE, [true_posterior(model, images)])
    before = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    results = {}
    for name in ("gaussian", "iaf", "maf"):
        fitted = experiment.fit(name, {"steps": 2, "width": 16}, iterations=400)
        ((results[name], error),) = experiment.divergences(fitted)
        assert results[name] > -5 * error
        for key, tensor in fitted.decoder.state_dict().items():
            assert torch.equal(tensor, before[key])
    # measured: 0.109, 0.013, 0.086, each with a standard error below 0.004
    assert results["iaf"] < 0.5 * results["gaussian"], results
    assert results["maf"] < 0.9 * results["gaussian"], results


def test_settings_of_the_decoders_run_go_to_the_fits_that_they_concern():
    config = Config(posterior="iaf", hidden=4, steps=4, width=5)
    model, images = build(config, SHAPE), torch.rand(1, 20)
    experiment = Experiment(model, config, images, SHAPE, [])  # a fit needs no true posterior
    assert experiment.fit("planar", {}, iterations=1).posterior.bijection.steps == 4
    assert isinstance(experiment.fit("gaussian", {}, iterations=1).posterior, GaussianPosterior)


# The command


QUICK = ["true-posterior", "--iterations", "20", "--device", "cpu"]
FILES = {"true_posterior.png", "true_posterior.json", "decoder.safetensors"}


def test_command_trains_on_few_images_and_takes_their_decoder_again(tmp_path, images, capsys):
    common = [*QUICK, "--data-root", images, "--posteriors", "gaussian", "planar", "--images", "2"]
    words = ["--data", "mnist", "--hidden", "6", "--steps", "2", "--out", tmp_path / "few"]
    assert call(*common, *words) == 0
    printed = capsys.readouterr().out
    assert printed.count("KL(q || p) of every image") == 2
    assert {path.name for path in (tmp_path / "few").iterdir()} == FILES
    content = json.loads((tmp_path / "few" / "true_posterior.json").read_text())
    assert content["settings"] == {"steps": 2} and len(content["images"]) == 2
    for image in content["images"]:
        assert set(image["kl"]) == set(image["kl_error"]) == {"gaussian", "planar"}
        assert image["border_mass"] < 1e-6 and image["quadrature_error"] < 1e-3
        assert f"{image['kl']['planar']:.4f}" in printed

    assert call(*common, *words) == 2
    assert f"{tmp_path / 'few'}: already holds an experiment" in complaint(capsys)

    decoder = tmp_path / "few" / "decoder.safetensors"
    assert load_model(decoder, CPU)[1].posterior == "gaussian"
    again = ["--decoder", decoder, "--lr", "0.01", "--out", tmp_path / "again"]
    assert call(*common, *again) == 0
    content = json.loads((tmp_path / "again" / "true_posterior.json").read_text())
    assert content["settings"] == {"lr": 0.01}  # of the fits: the decoder's model keeps its own
    assert content["config"]["lr"] == Config.lr
    assert (tmp_path / "again" / "decoder.safetensors").read_bytes() == decoder.read_bytes()
    assert call(*common, *words[:-1], tmp_path / "same") == 0
    for name in FILES:
        first, second = (tmp_path / folder / name for folder in ("few", "same"))
        assert first.read_bytes() == second.read_bytes()


def test_command_errors(tmp_path, capsys):
    out = tmp_path / "out"
    save_model(tmp_path / "m", build(Config(hidden=4), SHAPE), Config(hidden=4), SHAPE)
    wide = Config(latent=3, hidden=4)
    save_model(tmp_path / "wide", build(wide, (8, 8)), wide, (8, 8))
    faults = {
        "--hidden 7 has no effect with --decoder": ["--decoder", tmp_path / "m", "--hidden", "7"],
        "images of digits are (8, 8)": ["--decoder", tmp_path / "m"],
        "needs 2 latents, the model has 3": ["--decoder", tmp_path / "wide"],
        "--steps 2 has no effect": ["--posteriors", "gaussian", "--steps", "2"],
        "required: --out": None,
        "--images: must be at least 1": ["--images", "0"],
        "unrecognized arguments: --latent": ["--latent", "3"],
        "--binarise dynamic": ["--binarise", "dynamic"],
    }
    for message, words in faults.items():
        line = QUICK if words is None else [*QUICK, "--out", out, *words]
        assert call(*line) == 2
        assert message in complaint(capsys)
        assert not out.exists()
