"""The pictures of a benchmark run: speed-ups, and how the cost of an inverse grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator
from runs import DIRECTIONS, RIVALS, SWEEP_OPS, Row, Run

matplotlib.use("Agg")

COLOURS = {
    "eager": "#4c72b0",
    "hoisted": "#64b5cd",
    "compile": "#dd8452",
    "jacobi": "#64b5cd",
    "zuko": "#c44e52",
    "nflows": "#ccb974",
    "normflows": "#55a868",
    "pyro": "#8172b3",
    "vjps": "#4c72b0",
    "hessian": "#da8bc3",
    "dense": "#8c8c8c",
}
MARKERS = {
    **{"eager": "o", "hoisted": "v", "compile": "s", "jacobi": "v", "dense": "|"},
    **{"zuko": "P", "nflows": "X", "normflows": "^", "pyro": "D"},
    **{"vjps": "o", "hessian": "s"},
}
OWN = "#222222"
INVERSES = ("inverse", "inverse_backward", "sample")
TICKS = {  # within a decade, on an axis whose ends differ by less than a factor
    3: (1, 1.2, 1.5, 2, 3, 4, 6, 8),
    8: (1, 1.5, 2, 3, 5),
    300: (1, 2, 5),
    math.inf: (1,),
}


def plot(run: Run, op: str, path: Path) -> bool:
    """The picture of one op; False if the run was cut short before there was something to draw."""
    if op not in SWEEP_OPS:
        plot_speedups(run, op, path)
        return True
    if {"forward", "inverse"} - {row.direction for row in run.rows_of(op)}:
        return False
    plot_sweep(run, op, path)
    return True


def plot_sweep(run: Run, op: str, path: Path) -> None:
    """The cost of the inverse against D, in passes of fastflow's other direction."""
    rows = run.rows_of(op)
    inverse = sorted((r for r in rows if r.direction == "inverse"), key=_features)
    forward = sorted((r for r in rows if r.direction == "forward"), key=_features)
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    unit = forward[0].fastest["median_seconds"]
    own = inverse[-1].fastest["median_seconds"]
    ends = {}
    for rival in (name for name in RIVALS if any(name in row.contenders for row in inverse)):
        known = [row for row in inverse if rival in row.contenders]
        seconds = [row.contenders[rival]["median_seconds"] for row in known]
        style = {"color": COLOURS[rival], "marker": MARKERS[rival]}
        costs = [one / unit for one in seconds]
        axis.plot([_features(row) for row in known], costs, linewidth=1.2, markersize=5, **style)
        at_last = known[-1] is inverse[-1]
        times = f"  {seconds[-1] / own:.0f}x" if at_last else ""
        ends[f"{RIVALS[rival]}{times}"] = costs[-1], COLOURS[rival]
    for some, style, label in ((inverse, "-", "fastflow"), (forward, "--", "fastflow, forward")):
        costs = [row.fastest["median_seconds"] / unit for row in some]
        style = {"color": OWN, "linestyle": style, "marker": "o"}
        axis.plot([_features(row) for row in some], costs, linewidth=2, markersize=4, **style)
        ends[label] = costs[-1], OWN
    places = [_features(row) for row in inverse]
    if "eager" in inverse[0].contenders:  # below the peers, which start where it does
        start = inverse[0].contenders["eager"]["median_seconds"] / unit / 2
        guide = [start * place / places[0] for place in places]
        axis.plot(places, guide, color="0.6", linestyle=":", linewidth=1.5)
        ends["proportional to D"] = guide[-1], "0.45"
    axis.set(xscale="log", yscale="log", xlabel="D", ylabel="time of one inverse")
    axis.set_xticks(places, [str(place) for place in places])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(color="0.9", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    _label_ends(axis, places[-1], ends)
    axis.set_title(
        f"{inverse[0].case} and other D. 1: fastflow's forward pass at D = {places[0]}\n"
        f"At the right: times fastflow's inverse at D = {places[-1]}\n{run.title}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label_ends(axis: Axes, place: float, ends: dict[str, tuple[float, str]]) -> None:
    """Names curves right of where they end, those that end close to each other one below another.

    Arguments:
        axis: logarithmic, with limits that stay.
        place: where the curves end.
        ends: the ends' heights and colours, by name.
    """
    low, high = (math.log(limit) for limit in axis.get_ylim())
    gap = (high - low) / 22  # a line of the labels
    below = math.inf
    for name, (end, colour) in sorted(ends.items(), key=lambda item: -item[1][0]):
        below = min(math.log(end), below - gap)
        axis.annotate(
            name,
            (place, end),
            xytext=(1.03, (below - low) / (high - low)),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
        )


def _features(row: Row) -> int:
    return row.fastest["D"]


def plot_speedups(run: Run, op: str, path: Path) -> None:
    """Speed-ups of one op on a logarithmic axis: a panel per direction, a line per case."""
    rows = run.rows_of(op)
    cases = list(dict.fromkeys(row.case for row in rows))
    directions = [name for name in DIRECTIONS if any(row.direction == name for row in rows)]
    figure, axes = plt.subplots(
        1,
        len(directions),
        figsize=(3.4 + 2.5 * len(directions), 1.4 + 0.55 * len(cases)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    drawn = {}
    for axis, direction in zip(axes[0], directions):
        for row in (row for row in rows if row.direction == direction):
            drawn |= _draw_speedups(axis, cases.index(row.case), row.fastest["speedup_over"])
        axis.set_title(DIRECTIONS[direction], fontsize=10)
    for inverses in (False, True):  # whose speed-ups may be far from those of the other way
        some = [a for a, name in zip(axes[0], directions) if (name in INVERSES) == inverses]
        if some:
            _style_axes(some, cases)
    figure.supxlabel(
        "speed-up of fastflow, quartiles of rounds (grey: fastflow is slower)", fontsize=9
    )
    figure.suptitle(f"{op} on {run.title}", fontsize=11)
    handles = [drawn[rival] for rival in RIVALS if rival in drawn]
    figure.legend(handles=handles, title="over", loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_speedups(axis: Axes, line: int, over: dict[str, dict[str, float]]) -> dict[str, Artist]:
    """The markers of one case, above each other; returns them by rival."""
    known = [rival for rival in RIVALS if rival in over]
    drawn = {}
    for place, rival in enumerate(known):
        value = over[rival]
        spread = [[value["median"] - value["q1"]], [value["q3"] - value["median"]]]
        drawn[rival] = axis.errorbar(
            value["median"],
            line + min(0.18, 0.9 / len(known)) * (place - (len(known) - 1) / 2),
            xerr=spread,
            fmt=MARKERS[rival],
            color=COLOURS[rival],
            markersize=5.5,
            elinewidth=1.2,
            label=RIVALS[rival],
        )
    return drawn


def _style_axes(axes: Sequence[Axes], cases: list[str]) -> None:
    """One logarithmic axis for all, which always shows 1, and a band for every case."""
    for axis in axes:
        axis.set_xscale("log")
    limits = [axis.get_xlim() for axis in axes]
    low, high = min(0.8, *(low for low, _ in limits)), max(1.25, *(high for _, high in limits))
    steps = next(steps for widest, steps in TICKS.items() if high / low < widest)
    for axis in axes:
        axis.set_xlim(low, high)
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_yticks(range(len(cases)), cases)
        axis.axvspan(low, 1, color="0.9", zorder=0)
        axis.axvline(1, color="0.25", linewidth=1)
        for line in range(1, len(cases)):
            axis.axhline(line - 0.5, color="0.8", linewidth=0.6)
        axis.xaxis.set_major_locator(LogLocator(subs=steps))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(axis="x", color="0.85", linewidth=0.6)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
