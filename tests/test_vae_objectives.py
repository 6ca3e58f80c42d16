"""The objective against brute force: densities on a grid in 2-D, Jacobians, quadrature."""

import math

import pytest
import torch

from fastflow.vae import (
    BernoulliLikelihood,
    Config,
    GaussianLikelihood,
    GaussianPosterior,
    PlanarPosterior,
    build,
    diagonal_normal_log_prob,
    evaluate,
    evaluation,
    gaussian_kl,
    importance_weighted_bound,
    mean_negative_elbo,
    negative_elbo,
    posteriors,
    standard_normal_log_prob,
)

FEATURES, BATCH, STEPS = 7, 2, 3
POINTS, STEP = 96, 0.125  # the grid reaches from -12 to 12
ROUNDING = 1e-11  # float64, after some tens of operations on values of order 10
STANDARD_ERRORS = 5  # the seeds are fixed, so a mean this far off is a mistake

CONFIGS = {
    "gaussian": Config(posterior="gaussian", hidden=12),
    "planar": Config(posterior="planar", hidden=12, steps=STEPS),
    "shared": Config(posterior="planar", hidden=12, steps=STEPS, amortised=False),
    "centred": Config(posterior="planar", hidden=12, steps=STEPS, constraint="centred"),
    "normal pixels": Config(posterior="planar", hidden=12, likelihood="gaussian", variance=0.3),
}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(20)
    yield
    torch.set_default_dtype(torch.float32)


def strong_flow(posterior):
    """The posterior, its flow far from the identity: no step may go unnoticed."""
    with torch.no_grad():
        for name, parameter in posterior.named_parameters():
            head = name.split(".")[0]
            if head in ("w", "u", "b", "flow"):
                parameter.normal_(0, 0.6 if head == "flow" else 0.25)
    return posterior


def make_posterior(kind):
    if kind == "gaussian":
        return GaussianPosterior(FEATURES, 2)
    return strong_flow(PlanarPosterior(FEATURES, 2, STEPS, amortised=kind == "planar"))


def grid():
    """Points (G, 1, 2) of a square around the origin."""
    line = torch.arange(-POINTS, POINTS + 1) * STEP
    return torch.cartesian_prod(line, line).unsqueeze(1)


def integral(values):
    """The integral over the grid of values (G, *batch), and what remains of its error.

    The integrands are smooth and die out within the square, where sums over a grid converge faster
    than any power of the step: the change from twice the step bounds the error by far.
    """
    side = 2 * POINTS + 1
    values = values.reshape(side, side, *values.shape[1:])
    fine, coarse = (values[::skip, ::skip].sum((0, 1)) * (skip * STEP) ** 2 for skip in (1, 2))
    error = (fine - coarse).abs()
    assert (error < 0.01 * fine.abs()).all(), "the grid is too coarse for this integrand"
    return fine, error + ROUNDING


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


@pytest.mark.parametrize("kind", ["gaussian", "planar", "shared"])
def test_log_q_is_the_density_of_the_draws(kind):
    check_density(make_posterior(kind))


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


true_planar_flow = posteriors.planar_flow
true_inverse = posteriors.planar_flow_inverse
true_reparametrise = posteriors._reparametrise

FAULTS = {
    "every step is fed z_0": (
        "planar_flow",
        lambda *arguments: plain_chain(*arguments, first, first),
    ),
    "ladj is taken at z_0": (
        "planar_flow",
        lambda *arguments: plain_chain(*arguments, last, first),
    ),
    "the sign of ladj": (
        "planar_flow",
        lambda *arguments: (lambda z, ladj: (z, -ladj))(*true_planar_flow(*arguments)),
    ),
    "the sign of the inverse's ladj": (
        "planar_flow_inverse",
        lambda *arguments: (lambda z, ladj: (z, -ladj))(*true_inverse(*arguments)),
    ),
    "the half of log sigma^2": (
        "_reparametrise",
        lambda mean, log_var, noise: (
            true_reparametrise(mean, log_var, noise)[0],
            standard_normal_log_prob(noise) - log_var.sum(-1),
        ),
    ),
    "the half of the squared noise": (
        "standard_normal_log_prob",
        lambda z: -(0.5 * math.log(2 * math.pi) + z.square()).sum(-1),
    ),
    "the half of the square in the density": (
        "diagonal_normal_log_prob",
        lambda z, mean, log_var: (
            diagonal_normal_log_prob(z, mean, log_var)
            - 0.5 * ((z - mean).square() * torch.exp(-log_var)).sum(-1)
        ),
    ),
}


def test_plain_chain_without_fault_is_the_flow(monkeypatch):
    monkeypatch.setattr(posteriors, "planar_flow", lambda *a: plain_chain(*a, last, last))
    check_density(make_posterior("planar"))


@pytest.mark.parametrize("fault", FAULTS)
def test_density_check_catches(fault, monkeypatch):
    monkeypatch.setattr(posteriors, *FAULTS[fault])
    with pytest.raises(AssertionError):
        check_density(make_posterior("planar"))


def small_model(name):
    model = build(CONFIGS[name], pixels=6)
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


def test_building_leaves_the_global_random_state():
    before = torch.get_rng_state()
    first_model, second_model = (build(CONFIGS["planar"], 6).state_dict() for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first_model[key], second_model[key]) for key in first_model)
