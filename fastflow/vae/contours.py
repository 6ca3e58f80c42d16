"""Pictures of densities over two latents."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fastflow.vae.figures import new_figure, save_figure, show_image
from fastflow.vae.models import VAE
from fastflow.vae.posteriors import FlowPosterior

PRIOR, BASE, POSTERIOR = "0.65", "tab:blue", "tab:orange"
MASSES = (0.9, 0.6, 0.3)  # of the regions that the contours enclose
GRID = 161  # points per side on which densities are evaluated


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


def _contour(axes: Axes, points: Tensor, log_prob: Tensor, colour: str, filled: bool) -> None:
    """Draws the smallest regions that hold the given parts of the mass on the grid."""
    z_1, z_2 = _on_grid(points[..., 0]), _on_grid(points[..., 1])
    density = torch.exp(log_prob - log_prob.max())
    ordered = density.flatten().sort(descending=True).values.double()
    enclosed = ordered.cumsum(0) / ordered.sum()
    levels = [ordered[int((enclosed < mass).sum())].item() for mass in MASSES]
    if filled:
        for level, alpha in zip(levels, (0.15, 0.2, 0.3), strict=True):
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
    return values.reshape(GRID, GRID).tolist()
