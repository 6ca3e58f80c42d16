"""Trains MAF and IAF in both directions on two moons: python benchmarks/two_moons.py --out DIR.

Maximum likelihood needs the density of data, which IAF computes by the inverse of its layers;
reverse KL needs samples with densities, for which MAF inverts its own. Either costs about what the
other direction does. Writes two_moons.png and two_moons.json, and prints the table. The picture
needs matplotlib, which the extra `vae` brings.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastflow

SIDE, STEP = 4.0, 0.02  # of the grid on which the target is normalised and drawn from


def potential(x: Tensor) -> Tensor:
    """Two crescents: a ring of radius 2, of which the top and the bottom are left out.

    After Rezende and Mohamed, 2015, arXiv 1505.05770, table 1, with wider moons.
    """
    ring = ((x.norm(dim=-1) - 2) / 0.4) ** 2 / 2
    sides = torch.stack([-(((x[..., 0] - s) / 0.6) ** 2) / 2 for s in (-2.0, 2.0)])
    return ring - torch.logsumexp(sides, 0)


class Target:
    """The density exp(-potential) / Z, with Z and draws from a grid."""

    def __init__(self) -> None:
        side = torch.arange(-SIDE, SIDE, STEP) + STEP / 2
        self.grid = torch.cartesian_prod(side, side)
        log_mass = -potential(self.grid) + 2 * math.log(STEP)
        self.log_normaliser = torch.logsumexp(log_mass, 0)
        self.mass = (log_mass - self.log_normaliser).exp()

    def log_prob(self, x: Tensor) -> Tensor:
        return -potential(x) - self.log_normaliser

    def sample(self, count: int) -> Tensor:
        cells = self.grid[torch.multinomial(self.mass, count, replacement=True)]
        return cells + STEP * (torch.rand(count, 2) - 0.5)


def by_data(flow: fastflow.Flow, target: Target, rows: int, progress: float) -> Tensor:
    """Maximum likelihood: the cross-entropy of a batch of data."""
    return -flow.log_prob(target.sample(rows)).mean()


def by_density(flow: fastflow.Flow, target: Target, rows: int, progress: float) -> Tensor:
    """Reverse KL of a batch of samples; the target warms up, so that no moon is missed."""
    x, log_prob = flow.rsample_and_log_prob((rows,))
    return (log_prob - min(1.0, 0.1 + 2 * progress) * target.log_prob(x)).mean()


def train(
    flow: fastflow.Flow, loss: Callable[..., Tensor], target: Target, steps: int, rows: int
) -> float:
    """Fits the flow with Adam; the median seconds of a step."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    times = []
    for step in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(flow, target, rows, step / steps).backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


@torch.no_grad()
def divergences(flow: fastflow.Flow, target: Target, rows: int = 100_000) -> tuple[float, float]:
    """KL(p|q) by draws from the target p and KL(q|p) by draws from the flow q, in nats."""
    x = target.sample(rows)
    forward = (target.log_prob(x) - flow.log_prob(x)).mean()
    x, log_prob = flow.rsample_and_log_prob((rows,))
    return float(forward), float((log_prob - target.log_prob(x)).mean())


def flows() -> dict[str, tuple[fastflow.Flow, Callable[..., Tensor], str]]:
    """Every flow with every objective, and which direction of its layers that trains."""
    options = {"transforms": 6, "hidden_features": (64, 64), "activation": "silu"}
    return {
        "MAF, maximum likelihood": (fastflow.MAF(2, **options), by_data, "parallel"),
        "IAF, maximum likelihood": (
            fastflow.IAF(2, scale="softclip", **options),
            by_data,
            "inverse",
        ),
        "IAF, reverse KL": (
            fastflow.IAF(2, scale="softclip", **options),
            by_density,
            "parallel",
        ),
        "MAF, reverse KL": (fastflow.MAF(2, **options), by_density, "inverse"),
    }


def draw(target: Target, trained: dict[str, fastflow.Flow], file: Path) -> None:
    """The densities of target and flows side by side, on one scale of colours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    side = torch.linspace(-SIDE, SIDE, 201)
    y, x = torch.meshgrid(side, side, indexing="ij")
    grid = torch.stack([x, y], -1)
    with torch.no_grad():
        densities = {"target": target.log_prob(grid).exp()}
        densities |= {name: flow.log_prob(grid).exp() for name, flow in trained.items()}
    figure, axes = pyplot.subplots(1, len(densities), figsize=(3 * len(densities), 3.4))
    top = float(densities["target"].max())
    for axis, (name, density) in zip(axes, densities.items()):
        axis.imshow(density.numpy(), origin="lower", extent=(-SIDE, SIDE) * 2, vmin=0, vmax=top)
        axis.set_title(name, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Trains all four, and returns the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/two_moons"), help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--rows", type=int, default=512, help="batch size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    target, rows, trained = Target(), [], {}
    print(f"{'':26}{'layers run':>12}{'KL(p|q)':>10}{'KL(q|p)':>10}{'ms a step':>11}")
    for name in flows():
        torch.manual_seed(options.seed)
        flow, loss, direction = flows()[name]
        seconds = train(flow, loss, target, options.steps, options.rows)
        forward, reverse = divergences(flow, target)
        row = {"flow": name, "direction": direction, "KL(p|q)": forward, "KL(q|p)": reverse}
        rows.append(row | {"seconds": seconds})
        print(f"{name:26}{direction:>12}{forward:10.4f}{reverse:10.4f}{1e3 * seconds:11.2f}")
        trained[name] = flow
    draw(target, trained, options.out / "two_moons.png")
    (options.out / "two_moons.json").write_text(json.dumps(rows, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
