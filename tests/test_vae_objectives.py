"""The objective against brute force: quadrature in 2-D, closed forms, values by hand."""

import math
from dataclasses import replace

import pytest
import torch
from vae_quadrature import grid, integral, strong_flow

from fastflow.vae import (
    BernoulliLikelihood,
    Config,
    GaussianLikelihood,
    build,
    diagonal_normal_log_prob,
    evaluate,
    evaluation,
    gaussian_kl,
    importance_weighted_bound,
    mean_negative_elbo,
    negative_elbo,
    standard_normal_log_prob,
    training_loss,
)
from fastflow.vae.objectives import ElboTerms

SHAPE = (2, 3)
pytestmark = pytest.mark.usefixtures("float64")
STANDARD_ERRORS = 5  # the seeds are fixed, so a mean this far off is a mistake

CONFIGS = {
    "gaussian": Config(posterior="gaussian", hidden=12),
    "planar": Config(posterior="planar", hidden=12, steps=3),
    "shared": Config(posterior="planar", hidden=12, steps=3, amortised=False),
    "centred": Config(posterior="planar", hidden=12, steps=3, constraint="centred"),
    "iaf": Config(posterior="iaf", hidden=12, steps=2, width=8, context=4),
    "maf": Config(posterior="maf", hidden=12, steps=2, width=8, context=4),
    "normal pixels": Config(posterior="planar", hidden=12, likelihood="gaussian", variance=0.3),
}


def small_model(name):
    model = build(CONFIGS[name], SHAPE)
    strong_flow(model.posterior)
    return model, torch.rand(1, 6)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_negative_elbo_and_likelihood_equal_quadrature(name):
    model, x = small_model(name)
    points = grid()
    prior = torch.distributions.Normal(0, 1).log_prob(points).sum(-1)
    joint = prior - model.likelihood.nll(model.decode(points), x)  # (G, 1)
    log_q = model.posterior.log_prob(points, model.encoder(x))
    elbo, elbo_error = (value.item() for value in integral(torch.exp(log_q) * (joint - log_q)))
    log_likelihood = torch.log(integral(torch.exp(joint))[0]).item()

    noise = torch.randn(100_000, 1, 2)
    loss, reconstruction, kl = (term.flatten() for term in negative_elbo(model, x, noise))
    torch.testing.assert_close(loss, reconstruction + kl)
    error = loss.std() / math.sqrt(len(loss))
    assert abs(loss.mean() + elbo) < STANDARD_ERRORS * error + elbo_error

    z, log_q, _ = model.infer(x, noise)
    log_weights = standard_normal_log_prob(z) - model.likelihood.nll(model.decode(z), x) - log_q
    weights = torch.exp(log_weights - log_likelihood)  # their mean is 1
    error = weights.std() / math.sqrt(len(weights))
    estimate = importance_weighted_bound(log_weights).item()
    assert abs(math.exp(estimate - log_likelihood) - 1) < STANDARD_ERRORS * error


@pytest.mark.parametrize("name", CONFIGS)
def test_importance_sampled_bound_is_above_the_elbo(name):
    model, _ = small_model(name)
    images = torch.rand(5, 6)
    values = {}
    for samples in (1, 10, 1000):
        generator = torch.Generator().manual_seed(1)
        values[samples] = evaluate(model, images, generator, samples)
        assert values[samples]["negative_elbo"] == pytest.approx(
            values[samples]["reconstruction"] + values[samples]["kl"]
        )
    best = values[1000]
    assert best["negative_log_likelihood"] < best["negative_elbo"]
    if name != "gaussian":  # whose KL is not an estimate from the same draws
        one = values[1]
        assert one["negative_log_likelihood"] == pytest.approx(one["negative_elbo"], rel=1e-12)
        assert values[10]["negative_log_likelihood"] < values[10]["negative_elbo"]


def test_evaluation_in_parts_is_the_whole(monkeypatch):
    model, _ = small_model("planar")
    images = torch.rand(50, 6)
    drawn = []

    def noise(model, samples, batch, generator):
        drawn.append((samples, batch))
        return torch.full((samples, batch, 2), 0.3)

    monkeypatch.setattr(evaluation, "_noise", noise)
    generator = torch.Generator()
    whole = (
        evaluate(model, images, generator, samples=100),
        mean_negative_elbo(model, images, generator),
    )
    assert drawn == [(100, 50), (1, 50)]
    drawn.clear()
    monkeypatch.setattr(evaluation, "MAX_ROWS", 64)  # parts of the samples, then of the images
    parts = (
        evaluate(model, images, generator, samples=100),
        mean_negative_elbo(model, images, generator),
    )
    assert drawn == [(64, 1), (36, 1)] * 50 + [(1, 50)]
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1] == pytest.approx(whole[1], rel=1e-12)


def test_closed_form_kl():
    mean, log_var = torch.randn(4, 2), torch.randn(4, 2)
    sigma = torch.exp(0.5 * log_var)
    q, p = torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 1.0)
    exact = torch.distributions.kl_divergence(q, p).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, log_var), exact, rtol=1e-13, atol=1e-13)

    z = mean + sigma * torch.randn(100_000, 4, 2)
    estimate = diagonal_normal_log_prob(z, mean, log_var) - standard_normal_log_prob(z)
    error = estimate.std(0) / math.sqrt(len(z))
    distance = (estimate.mean(0) - gaussian_kl(mean, log_var)).abs()
    assert (distance < STANDARD_ERRORS * error).all()


def test_closed_form_kl_keeps_its_digits_near_the_prior():
    log_var = torch.full((1, 2), 1e-3, dtype=torch.float32)
    exact = gaussian_kl(torch.zeros(1, 2), log_var.double()).item()
    # expm1(v) - v loses log2(1/v) of float32's 24 bits, exp(v) - 1 - v would lose twice as many
    assert gaussian_kl(torch.zeros(1, 2).float(), log_var).item() == pytest.approx(exact, rel=2e-4)


def test_likelihoods_equal_torch_distributions():
    output, x = torch.randn(5, 3, 4), torch.randint(0, 2, (3, 4)).double()
    bernoulli = torch.distributions.Bernoulli(logits=output).log_prob(x.expand_as(output)).sum(-1)
    torch.testing.assert_close(BernoulliLikelihood().nll(output, x), -bernoulli)
    normal = torch.distributions.Normal(output, math.sqrt(0.3)).log_prob(x).sum(-1)
    torch.testing.assert_close(GaussianLikelihood(0.3).nll(output, x), -normal)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_learns(name):
    model, x = small_model(name)
    negative_elbo(model, x, torch.randn(1, 2)).loss.sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


def test_training_loss_by_hand():
    reconstruction, kl = torch.tensor([10.0, 20.0]), torch.tensor([1.0, 6.0], requires_grad=True)
    terms = ElboTerms(reconstruction + kl, reconstruction, kl)
    assert training_loss(terms) == 15 + 3.5
    assert training_loss(terms, kl_weight=0.25) == 15 + 0.875
    assert training_loss(terms, free_bits=3.0) == 15 + 3.5  # of the batch's mean, not of each image
    assert training_loss(terms, kl_weight=0.5, free_bits=4.0) == 15 + 2
    for free_bits, expected in ((3.0, 0.25), (4.0, 0.0)):
        loss = training_loss(terms, kl_weight=0.5, free_bits=free_bits)
        (gradient,) = torch.autograd.grad(loss, kl)
        assert gradient.tolist() == [expected, expected]


def test_without_free_bits_a_negative_estimate_of_the_divergence_counts():
    kl = torch.tensor([1.0, -2.0], requires_grad=True)
    loss = training_loss(ElboTerms(kl, torch.zeros(2), kl))
    assert loss == -0.5
    assert torch.autograd.grad(loss, kl)[0].tolist() == [0.5, 0.5]


def test_encoder_and_decoder_start_alike_for_every_posterior():
    gaussian, iaf = (build(CONFIGS[name], SHAPE).state_dict() for name in ("gaussian", "iaf"))
    for name, value in gaussian.items():
        if not name.startswith("posterior."):
            assert torch.equal(value, iaf[name]), name


def test_building_leaves_the_global_random_state():
    before = torch.get_rng_state()
    first_model, second_model = (build(CONFIGS["planar"], SHAPE).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first_model[key], second_model[key]) for key in first_model)
    other = build(replace(CONFIGS["planar"], seed=1), SHAPE).state_dict()
    parts = ("encoder.0.weight", "posterior.mean.weight", "decoder.0.weight")
    assert not any(torch.equal(first_model[key], other[key]) for key in parts)
