"""Pictures of densities over two latents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastflow.vae.figures import new_figure, save_figure, show_image
from fastflow.vae.models import VAE
from fastflow.vae.posteriors import FlowPosterior
from fastflow.vae.true_posterior import GridDensity

PRIOR, BASE, POSTERIOR = "0.65", "tab:blue", "tab:orange"
MASSES = (0.9, 0.6, 0.3)  # of the regions that the contours enclose
TRUE = "tab:blue"
GRID = 161  # points per side on which densities are evaluated
SHOWN = 7.0  # nats below the maximum of a true posterior that its panels reach


@torch.no_grad()
def draw_posterior(
    path: Path,
    model: VAE,
    images: Tensor,
    shape: tuple[int, int],
    generator: torch.Generator,
    count: int = 4,
) -> None:
    """Draws the 2-D prior and posterior of a few test images, with the normal that the posterior's
    flow starts from, if it has one. The images have one pair of axes in common."""
    x = images[:count]
    posterior = model.posterior
    has_flow = isinstance(posterior, FlowPosterior)
    figure = new_figure(3.2 * len(x) + 0.4, 5.2)
    thumbnails, panels = figure.subplots(
        2, len(x), sharex="row", sharey="row", squeeze=False, height_ratios=(1, 3)
    )
    h = model.encoder(x)
    noise = torch.randn(1000, len(x), 2, generator=generator, device=generator.device)
    drawn = posterior(h, noise).z
    if has_flow:
        drawn = torch.cat([drawn, posterior.base_draw(h, noise)])
    everything = _square_around(drawn.reshape(-1, 2))
    for column, axes in enumerate(panels):
        show_image(thumbnails[column], x[column], shape)
        h_x = h[column : column + 1]
        points = _square_around(drawn[:, column])  # its own: a narrow density needs a fine grid
        _contour_prior(axes, everything)
        _contour(axes, points, posterior.log_prob(points, h_x), POSTERIOR, filled=True)
        if has_flow:
            _contour(axes, points, posterior.base_log_prob(points, h_x), BASE, filled=False)
        axes.set(xlabel="$z_1$", ylabel="$z_2$" if column == 0 else None, aspect="equal")
    low, high = everything.amin((0, 1)).tolist(), everything.amax((0, 1)).tolist()
    panels[0].set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    for axis in (panels[0].xaxis, panels[0].yaxis):  # their lengths are equal, so are their steps
        axis.set_major_locator(MaxNLocator(6))
    masses = ", ".join(f"{100 * mass:.0f}" for mass in MASSES)
    legend = [Line2D([], [], color=PRIOR, lw=0.8, label="prior N(0, I), at the |z| written on it")]
    if has_flow:
        legend.append(Line2D([], [], color=BASE, ls="--", label="normal before the flow"))
        name = "posterior after the flow"
    else:
        name = "Gaussian posterior"
    legend.append(Line2D([], [], color=POSTERIOR, lw=2, label=f"{name} ({masses} % of its mass)"))
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.suptitle("Posterior over the latents of single test images")
    save_figure(figure, path)


def _square_around(draws: Tensor) -> Tensor:
    """A square grid (GRID^2, 1, 2) that holds the draws (N, 2) with a margin."""
    low, high = draws.amin(0), draws.amax(0)
    centre, half = (low + high) / 2, 0.6 * (high - low).max()
    steps = torch.linspace(-1, 1, GRID, device=draws.device) * half
    vertical, horizontal = torch.meshgrid(centre[1] + steps, centre[0] + steps, indexing="ij")
    return torch.stack([horizontal, vertical], -1).reshape(-1, 1, 2)


@torch.no_grad()
def draw_true_posterior(
    path: Path,
    true: Sequence[GridDensity],
    models: Mapping[str, VAE],
    divergences: Mapping[str, Sequence[tuple[float, float | None]]],
    images: Tensor,
    shape: tuple[int, int],
) -> None:
    """Draws the true posterior of images, and approximations upon it: a row for every image, whose
    panels have one pair of axes in common.

    Arguments:
        path: the picture.
        true: the true posterior of every image.
        models: whose posteriors are drawn, by their names.
        divergences: KL(q || p) of every model and image, with its standard error.
        images: shape (N, pixels).
        shape: height and width of an image.
    """
    columns = ("image", "true posterior", *models)
    figure = new_figure(2.6 * len(columns) + 0.3, 2.6 * len(images) + 0.9)
    grid = figure.subplots(len(images), len(columns), squeeze=False)
    for row, (panels, density) in enumerate(zip(grid, true, strict=True)):
        x = images[row : row + 1]
        show_image(panels[0], x[0], shape)
        logs = {
            name: m.posterior.log_prob(density.points, m.encoder(x)) for name, m in models.items()
        }
        seen = torch.stack([density.log_prob, *logs.values()]).amax(0)
        inside = density.points[seen > density.log_prob.max() - SHOWN]
        (left, bottom), (right, top) = inside.amin(0).tolist(), inside.amax(0).tolist()
        for axes, name in zip(panels[1:], columns[1:], strict=True):
            _contour_prior(axes, density.points)
            _contour(axes, density.points, density.log_prob, TRUE, filled=True)
            if name in logs:
                _contour(axes, density.points, logs[name], POSTERIOR, filled=False)
                kl, error = divergences[name][row]
                figures = f"{kl:.3f}" if error is None else f"{kl:.3f} ± {error:.3f}"
                axes.set_xlabel(f"KL {figures}")
            axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
            axes.tick_params(labelsize=7)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name)
    masses = ", ".join(f"{100 * mass:.0f}" for mass in MASSES)
    legend = [
        Line2D([], [], color=PRIOR, lw=0.8, label="prior N(0, I), at the |z| written on it"),
        Line2D([], [], color=TRUE, lw=5, alpha=0.5, label=f"true posterior ({masses} % of mass)"),
        Line2D([], [], color=POSTERIOR, ls="--", label="approximate posterior (the same)"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    save_figure(figure, path)


def _contour(axes: Axes, points: Tensor, log_prob: Tensor, colour: str, filled: bool) -> None:
    """Draws the smallest regions that hold the given parts of the mass on the grid."""
    z_1, z_2 = _on_grid(points[..., 0]), _on_grid(points[..., 1])
    density = torch.exp(log_prob - log_prob.max())
    ordered = density.flatten().sort(descending=True).values.double()
    enclosed = ordered.cumsum(0) / ordered.sum()
    # fewer than MASSES where one point of the grid holds the mass of several
    levels = sorted({ordered[int((enclosed < mass).sum())].item() for mass in MASSES})
    if filled:
        for level, alpha in zip(levels, (0.15, 0.2, 0.3)):
            axes.contourf(z_1, z_2, _on_grid(density), [level, 2], colors=[colour], alpha=alpha)
    style = "solid" if filled else "dashed"
    axes.contour(z_1, z_2, _on_grid(density), levels, colors=[colour], linestyles=style)


def _contour_prior(axes: Axes, points: Tensor) -> None:
    """Draws circles of the prior, labelled by their radius."""
    radius = points.norm(dim=-1)
    levels = MaxNLocator(6).tick_values(radius.min().item(), radius.max().item())
    z_1, z_2 = _on_grid(points[..., 0]), _on_grid(points[..., 1])
    circles = axes.contour(
        z_1, z_2, _on_grid(radius), [r for r in levels if r > 0], colors=[PRIOR], linewidths=0.8
    )
    axes.clabel(circles, fmt="%g", fontsize=7, inline_spacing=2)


def _on_grid(values: Tensor) -> list[list[float]]:
    side = math.isqrt(values.numel())
    return values.reshape(side, side).tolist()
