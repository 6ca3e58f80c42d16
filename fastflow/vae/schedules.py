"""What changes from epoch to epoch: the learning rate and the weight of the KL term."""

from __future__ import annotations

import math

from fastflow.vae.config import Config


def learning_rate(config: Config, epoch: int) -> float:
    r"""The learning rate of epoch e = 1 .. E: constant, or falling along half a cosine.

    .. math:: \eta_e = \tfrac12 \eta \big(1 + \cos(\pi (e - 1) / E)\big)

    Source: Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.

    Example:
        >>> falling = Config(lr=1e-3, schedule="cosine", epochs=4)
        >>> [round(1e3 * learning_rate(falling, epoch), 3) for epoch in (1, 2, 3, 4)]
        [1.0, 0.854, 0.5, 0.146]
    """
    if config.schedule == "constant":
        return config.lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs))


def kl_weight(config: Config, epoch: int) -> float:
    """The weight of the KL term in epoch e: e / N, until it is 1 from epoch N = `kl_warmup` on.

    Source: Soenderby et al., Ladder Variational Autoencoders, 2016.

    Example:
        >>> [kl_weight(Config(kl_warmup=4), epoch) for epoch in (1, 2, 3, 4, 5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, epoch / config.kl_warmup) if config.kl_warmup else 1.0
