"""The table of a comparison: what its run folders hold, averaged over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tabulate import tabulate

from fastflow.vae.checkpoint import RECORD
from fastflow.vae.config import Config, parse_json
from fastflow.vae.errors import VaeError
from fastflow.vae.files import write_csv, write_json, write_text

LEGEND = (
    "Nats per test image: mean over seeds ± standard error over seeds ± standard error over test "
    "images. These are the same for all posteriors, and so are the seeds: what differs between two "
    "posteriors is surer than either figure. Gain: how much smaller −log p(x) is than that of the "
    "first row, seed by seed, ± standard error over seeds. −log p(x) is importance-sampled."
)


@dataclass(frozen=True)
class Result:
    """What a run folder says about its run."""

    config: dict[str, Any]
    epochs: list[dict[str, float]]
    test: dict[str, Any]  # numbers; empty for a run that is not finished
    seconds_per_step: float | None  # None where nothing was trained by the clock


@dataclass(frozen=True)
class Row:
    """A posterior in the table; an error is None where there is a single run or image."""

    posterior: str
    seeds: int
    epochs: float  # mean over seeds of those that were trained
    negative_elbo: float
    negative_elbo_error_over_seeds: float | None
    negative_elbo_error_over_images: float | None
    negative_log_likelihood: float
    negative_log_likelihood_error_over_seeds: float | None
    negative_log_likelihood_error_over_images: float | None
    importance_samples: int
    gain: float  # of -log p(x) on the first posterior
    gain_error_over_seeds: float | None
    seconds_per_step: float | None  # median over epochs, mean over seeds


def read_result(folder: Path) -> Result:
    """Reads what a run folder says about its run.

    Raises:
        VaeError: it holds no run, or one of its files is damaged.
    """
    config, metrics = (_read(folder / name) for name in ("config.json", "metrics.json"))
    timing = _read(folder / "timing.json") if (folder / "timing.json").exists() else {}
    epochs, test = metrics.get("epochs"), metrics.get("test")
    if not (isinstance(epochs, list) and isinstance(test, dict)):
        raise VaeError(f"{folder / 'metrics.json'}: has no epochs and test")
    if not all(map(_is_record, epochs)):
        raise VaeError(f"{folder / 'metrics.json'}: the record of its epochs is malformed")
    return Result(config, epochs, test, timing.get("seconds_per_step"))


def _is_record(content: object) -> bool:
    """Whether this is what a run writes down of an epoch."""
    return isinstance(content, dict) and all(
        type(content.get(name)) in (int, float) for name in RECORD
    )


def is_finished(folder: Path, config: Config) -> bool:
    """Whether a folder holds a run with these settings that was trained and evaluated."""
    try:
        result = read_result(folder)
    except VaeError:
        return False
    return bool(result.test) and asdict(config).items() <= result.config.items()


def summarise(groups: Mapping[str, Sequence[Path]]) -> list[Row]:
    """Averages finished runs.

    Arguments:
        groups: the run folders of every posterior.

    Raises:
        VaeError: a folder is damaged, or its run is not finished.
    """
    results = {name: [_finished(folder) for folder in runs] for name, runs in groups.items()}
    first = next(iter(results.values()))
    return [_row(name, several, first) for name, several in results.items()]


def _finished(folder: Path) -> Result:
    result = read_result(folder)
    if not result.test:
        raise VaeError(f"{folder}: its run is not finished")
    return result


def _row(posterior: str, results: Sequence[Result], first: Sequence[Result]) -> Row:
    figures: dict[str, Any] = {}
    for name in ("negative_elbo", "negative_log_likelihood"):
        values = [result.test[name] for result in results]
        errors = [result.test[f"{name}_error"] for result in results]
        figures[name] = mean(values)
        figures[f"{name}_error_over_seeds"] = _standard_error(values)
        figures[f"{name}_error_over_images"] = _mean_of_all(errors)
    name = "negative_log_likelihood"
    gains = [base.test[name] - own.test[name] for base, own in zip(first, results, strict=True)]
    seconds = [result.seconds_per_step for result in results]
    return Row(
        posterior=posterior,
        seeds=len(results),
        epochs=mean(len(result.epochs) for result in results),
        importance_samples=results[0].test["importance_samples"],
        gain=mean(gains),
        gain_error_over_seeds=_standard_error(gains),
        seconds_per_step=_mean_of_all(seconds),
        **figures,
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """The mean, None where one of them is missing."""
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def _standard_error(values: Sequence[float]) -> float | None:
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def write_summary(folder: Path, rows: Sequence[Row]) -> str:
    """Writes compare.md, compare.csv and compare.json, and returns the table."""
    lines = [asdict(row) for row in rows]
    write_json(folder / "compare.json", lines)
    write_csv(folder / "compare.csv", [field.name for field in fields(Row)], lines)
    table = render(rows)
    write_text(folder / "compare.md", f"{table}\n\n{LEGEND}\n")
    return table


def render(rows: Sequence[Row]) -> str:
    """The table as text, Markdown at the same time."""
    lines = [
        {
            "posterior": row.posterior,
            "seeds": row.seeds,
            "epochs": f"{row.epochs:g}",
            "−ELBO": _figure(
                row.negative_elbo,
                row.negative_elbo_error_over_seeds,
                row.negative_elbo_error_over_images,
            ),
            "−log p(x)": _figure(
                row.negative_log_likelihood,
                row.negative_log_likelihood_error_over_seeds,
                row.negative_log_likelihood_error_over_images,
            ),
            "gain": "–" if row is rows[0] else _figure(row.gain, row.gain_error_over_seeds),
            "samples": row.importance_samples,
            "ms per step": "–" if seconds is None else f"{1e3 * seconds:.2f}",
        }
        for row in rows
        for seconds in [row.seconds_per_step]
    ]
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def _figure(value: float, *errors: float | None) -> str:
    shown = ["–" if error is None else f"{error:.2f}" for error in errors]
    return " ± ".join([f"{value:.2f}", *shown])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text())
    except FileNotFoundError as error:
        raise VaeError(f"{path.parent}: holds no run, {path.name} is missing") from error
    except (VaeError, UnicodeDecodeError) as error:
        raise VaeError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise VaeError(f"{path}: is no JSON object")
    return content
