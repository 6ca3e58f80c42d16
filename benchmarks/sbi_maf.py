"""Trains and samples sbi's neural posterior, converted and not: python benchmarks/sbi_maf.py.

Neural posterior estimation with the `maf` of sbi (github.com/sbi-dev/sbi), all settings at their
defaults: five nflows layers of 50 units, batches of 200. The simulator is linear and Gaussian, so
that the posterior is known, N(x / 2, 1/20) in every dimension. Both contenders take turns in one
process and one thread, of which the processor time is taken, and start from the same weights.
Needs `pip install sbi`.
"""

from __future__ import annotations

import argparse
import copy
import operator
import statistics
import time
import warnings

import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn
from torch import Tensor, nn

import fastflow

VARIANCE = 0.1  # of the prior, and of the simulator's noise


def converted_maf(theta: Tensor, x: Tensor) -> nn.Module:
    """What `NPE(density_estimator=...)` calls to build its network: sbi's own, converted."""
    estimator = posterior_nn("maf")(theta, x)
    fastflow.convert(estimator, strict=True)
    return estimator


BUILD = {"nflows": posterior_nn("maf"), "fastflow": converted_maf}


def trainers(features: int, simulations: int) -> dict[str, NPE]:
    """One trainer for each contender, with the same simulations."""
    prior = torch.distributions.MultivariateNormal(
        torch.zeros(features), VARIANCE * torch.eye(features)
    )
    theta = prior.sample((simulations,))
    x = theta + VARIANCE**0.5 * torch.randn_like(theta)
    return {
        name: NPE(prior, density_estimator=build, show_progress_bars=False).append_simulations(
            theta, x
        )
        for name, build in BUILD.items()
    }


def train(contenders: dict[str, NPE], rounds: int, epochs: int) -> dict[str, list[float]]:
    """Seconds for each contender and round of some epochs; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, trainer in contenders.items():
            torch.manual_seed(number)  # the same batches, and the same weights to begin with
            begin = time.process_time()
            trainer.train(
                max_num_epochs=(number + 1) * epochs - 1,  # sbi trains one more than it is told
                stop_after_epochs=10**6,
                resume_training=number > 0,
            )
            times[name].append(time.process_time() - begin)
    return times


def parts(trainer: NPE, steps: int) -> dict[str, float]:
    """Milliseconds of a training step's parts, medians; the data loader is no part of it."""
    net, optimizer = trainer._neural_net, trainer.optimizer
    theta, x, _ = trainer.get_simulations()
    batch = slice(0, 200)
    found: dict[str, list[float]] = {"loss and gradients": [], "clipping and Adam": []}
    for _ in range(steps):
        optimizer.zero_grad()
        begin = time.process_time()
        net.loss(theta[batch], condition=x[batch]).mean().backward()
        middle = time.process_time()
        nn.utils.clip_grad_norm_(net.parameters(), max_norm=5.0)
        optimizer.step()
        end = time.process_time()
        for name, seconds in zip(found, (middle - begin, end - middle)):
            found[name].append(1e3 * seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def sample(trainer: NPE, x: Tensor, count: int, rounds: int) -> tuple[dict[str, list[float]], dict]:
    """Seconds of drawing from one trained posterior, converted and not, and the last draws."""
    fast = trainer.build_posterior()
    slow = copy.deepcopy(fast)
    fastflow.revert(slow.posterior_estimator)
    times: dict[str, list[float]] = {"nflows": [], "fastflow": []}
    draws = {}
    for number in range(rounds):
        for name, posterior in (("nflows", slow), ("fastflow", fast)):
            torch.manual_seed(number)
            begin = time.process_time()
            draws[name] = posterior.sample((count,), x=x, show_progress_bars=False)
            times[name].append(time.process_time() - begin)
    return times, draws


def check(draws: dict[str, Tensor], x: Tensor) -> str:
    """How far the draws of both are from each other, and from the posterior that is known."""
    torch.testing.assert_close(draws["fastflow"], draws["nflows"], rtol=1e-3, atol=1e-3)
    found, exact = draws["fastflow"], (VARIANCE / 2) ** 0.5
    shift = ((found.mean(0) - x / 2) / exact).abs().max()
    ratio = found.std(0) / exact
    return (
        f"same draws to {(draws['fastflow'] - draws['nflows']).abs().max():.0e}; posterior means "
        f"off by at most {shift:.2f} standard deviations, deviations {ratio.min():.2f} to "
        f"{ratio.max():.2f} of the exact ones"
    )


def line(name: str, times: dict[str, list[float]], scale: float) -> str:
    """A row of the table: the fastest round of both, and the median ratio of rounds."""
    ratio = statistics.median(map(operator.truediv, times["nflows"], times["fastflow"]))
    slow, fast = (1e3 * min(times[key]) / scale for key in ("nflows", "fastflow"))
    return f"{name:<34}{slow:>10.2f} ms{fast:>10.2f} ms{ratio:>8.2f}x"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=10, help="parameters to infer, data too")
    parser.add_argument("--simulations", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4, help="of training in a round")
    parser.add_argument("--samples", type=int, default=10_000)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", message="Maximum number of epochs")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    contenders = trainers(options.features, options.simulations)
    times = train(contenders, options.rounds, options.epochs)
    steps = options.epochs * (int(0.9 * options.simulations) // 200)
    print(f"{options.features} parameters{'nflows':>33}{'fastflow':>13}{'speed-up':>9}")
    print(line("training, a step of NPE.train", times, steps))
    split = {name: parts(trainer, 100) for name, trainer in contenders.items()}
    for part in split["nflows"]:
        pair = {name: [split[name][part] / 1e3] for name in split}
        print(line(f"  of which {part}", pair, 1))
    x = contenders["fastflow"].get_simulations()[1][0]
    times, draws = sample(contenders["fastflow"], x, options.samples, options.rounds)
    print(line(f"{options.samples} samples of the posterior", times, 1))
    print(check(draws, x))


if __name__ == "__main__":
    main()
