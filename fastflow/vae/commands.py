"""What each command does, from its options to what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastflow.vae.config import Config, choices, flag, refuse_without_effect
from fastflow.vae.data import load
from fastflow.vae.distributed import Team, local_device
from fastflow.vae.errors import VaeError
from fastflow.vae.options import given_settings
from fastflow.vae.seeding import generator_for
from fastflow.vae.splits import splits_of

if TYPE_CHECKING:
    from fastflow.vae.checkpoint import State

# The optional packages are imported where they are needed, so that --help and usage errors do
# without.


def train(options: argparse.Namespace) -> None:
    """Trains one model into its run folder."""
    from fastflow.vae.run_folder import find_state, require_no_run, require_run_folder
    from fastflow.vae.training import Run

    settings, device = given_settings(options), local_device(_device(options.device))
    names = (settings.get(name, getattr(Config, name)) for name in ("posterior", "data"))
    folder = options.out or Path("runs", "-".join(names))
    team = Team.join(device)

    def before() -> State | None:
        if options.resume:
            require_run_folder(folder)
            return find_state(folder, settings)
        require_no_run(folder)
        return None

    state = team.of_first(before)
    config = state.config if state else Config(**settings)
    refuse_without_effect(vars(config), settings)
    data = load(config.data, _data_root(options, config.data))
    if state:
        run = Run.resume(folder, state, data, device, team)
    else:
        run = Run.start(folder, config, data, device, team)
    run.train(_say if team.is_first else _be_silent)
    if team.is_first:
        test = run.finish()
        _say(
            f"test: -ELBO {test['negative_elbo']:.3f}, -log p(x) "
            f"{test['negative_log_likelihood']:.3f} nats per image "
            f"({test['importance_samples']} samples); see {folder}"
        )
    team.leave()


def compare(options: argparse.Namespace) -> None:
    """Trains all runs of a comparison that are not finished, and tables them."""
    from fastflow.vae.compare import Comparison
    from fastflow.vae.redraw import draw_runs
    from fastflow.vae.summary import summarise, write_summary

    device = _device(options.device)
    comparison = Comparison.open(
        options.out, options.posteriors, options.seeds, given_settings(options), options.resume
    )
    data_root = _data_root(options, comparison.data)
    comparison.train(data_root, device, options.jobs, _say)
    _say(write_summary(options.out, summarise(comparison.groups())))
    draw_runs(options.out, comparison.groups(), data_root, device)
    _say(f"see {options.out}")


def evaluate(options: argparse.Namespace) -> None:
    """Evaluates a checkpoint on test images and prints JSON."""
    from fastflow.vae.checkpoint import load_model
    from fastflow.vae.evaluation import evaluate_run
    from fastflow.vae.files import write_json
    from fastflow.vae.run_folder import checkpoint_at

    device, checkpoint = _device(options.device), checkpoint_at(options.checkpoint)
    model, config, shape = load_model(checkpoint, device)
    settings = given_settings(options)
    if options.samples is not None:
        settings["importance_samples"] = options.samples
    config = replace(config, **settings)
    data = splits_of(checkpoint, config, shape, _data_root(options, config.data))
    test = evaluate_run(model, config, data.test.to(device))
    _say(json.dumps(test, indent=2))
    if options.out is not None:
        write_json(options.out, test)


def sample(options: argparse.Namespace) -> None:
    """Draws images of a checkpoint."""
    from fastflow.vae.checkpoint import load_model
    from fastflow.vae.plots import PRIOR_TITLE, draw_manifold, draw_samples, sample_images
    from fastflow.vae.run_folder import checkpoint_at

    device, checkpoint = _device(options.device), checkpoint_at(options.checkpoint)
    model, config, shape = load_model(checkpoint, device)
    config = replace(config, seed=options.seed)
    if options.manifold:
        if config.latent != 2:
            raise VaeError(f"--manifold needs 2 latents, {checkpoint} has {config.latent}")
        draw_manifold(options.out, model, shape, options.grid)
    else:
        drawn = sample_images(model, options.grid, generator_for(device, config.seed, "samples"))
        draw_samples(options.out, {PRIOR_TITLE: drawn}, shape)
    _say(str(options.out))


def plot(options: argparse.Namespace) -> None:
    """Draws the pictures of runs again."""
    from fastflow.vae.redraw import draw_runs, redraw_run
    from fastflow.vae.run_folder import run_folder_at

    device, runs = _device(options.device), [run_folder_at(path) for path in options.runs]
    for folder in runs:
        redraw_run(folder, options.data_root, device)
        _say(str(folder))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        groups = {label: [folder] for label, folder in zip(_labels(runs), runs)}
        draw_runs(options.out, groups, options.data_root, device)
        _say(str(options.out))


def _labels(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart: their names where these differ, else all of their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def true_posterior(options: argparse.Namespace) -> None:
    """Fits posteriors to a few images and draws them beside the true posterior."""
    from fastflow.vae.compare import refuse_for_all
    from fastflow.vae.four_images import FIT_SETTINGS, NUMBERS, Experiment, perform
    from fastflow.vae.run_folder import checkpoint_at

    device, settings = _device(options.device), given_settings(options)
    if options.out.exists() and not options.out.is_dir():  # said before hours of fitting
        raise VaeError(f"{options.out}: is not a folder")
    if (options.out / NUMBERS).exists():
        raise VaeError(f"{options.out}: already holds an experiment")
    posteriors = options.posteriors or choices("posterior")
    refuse_for_all(posteriors, settings)
    if options.decoder is None:
        root = _data_root(options, settings.get("data", Config.data))
        experiment = Experiment.of_few(settings, options.images, options.iterations, root, device)
    else:
        for name in settings:
            if name not in FIT_SETTINGS:
                raise VaeError(f"{flag(name, settings[name])} has no effect with --decoder")
        decoder = checkpoint_at(options.decoder)
        experiment = Experiment.of_checkpoint(decoder, options.images, options.data_root, device)
    options.out.mkdir(parents=True, exist_ok=True)
    perform(options.out, experiment, posteriors, settings, options.iterations, _say)
    _say(f"see {options.out}")


def _data_root(options: argparse.Namespace, data: str) -> Path | None:
    if data == "digits" and options.data_root is not None:
        raise VaeError("--data-root has no effect with --data digits, which needs no files")
    return options.data_root


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise VaeError("--device cuda: PyTorch finds no CUDA device")
    return torch.device(name)


def _be_silent(line: str) -> None:
    pass


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
