"""What the command line accepts: its commands, their arguments and their help."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from fastflow.vae.options import (
    SETTINGS,
    add_checkpoint,
    add_count,
    add_data_root,
    add_file,
    add_folder,
    add_posteriors,
    add_settings,
)
from fastflow.vae.registry import FLOW_SETTINGS

PROGRAM = "python -m fastflow.vae"
FEW_SETTINGS = ("network", "hidden", "likelihood", "variance", "binarise", "lr", "seed")


def complain(message: str, code: int) -> int:
    """Writes one line to stderr and returns the exit code."""
    sys.stderr.write(f"fastflow.vae: {' '.join(message.split())}\n")
    return code


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"error: {message} (see {self.prog} --help)", 2))


def _add_train(train: argparse.ArgumentParser) -> None:
    add_folder(train, "--out", "run folder, runs/POSTERIOR-DATA if not given")
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR, which must exist; settings that are not given are the run's",
    )
    add_data_root(train)
    add_settings(train, SETTINGS)


def _add_compare(compare: argparse.ArgumentParser) -> None:
    add_folder(
        compare, "--out", "folder of the runs, and of what compares them", Path("runs", "compare")
    )
    compare.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished runs in DIR and continue the others; what is not given is as "
        "before, more posteriors and seeds may be",
    )
    add_posteriors(compare)
    compare.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="one run for each; default: 0"
    )
    add_count(compare, "--jobs", "runs at a time, each a process", 1)
    add_data_root(compare)
    add_settings(compare, [name for name in SETTINGS if name not in ("posterior", "seed")])


def _add_evaluate(evaluate: argparse.ArgumentParser) -> None:
    add_checkpoint(evaluate)
    add_settings(evaluate, ["data"], "the checkpoint's")
    add_data_root(evaluate)
    add_count(evaluate, "--samples", "draws per image (default: the checkpoint's)")
    add_settings(evaluate, ["seed"], "the checkpoint's")
    add_file(evaluate, "--out", ".json", "writes FILE.json, too")


def _add_sample(sample: argparse.ArgumentParser) -> None:
    add_checkpoint(sample)
    add_file(sample, "--out", ".png", "the picture, FILE.png", required=True)
    add_count(sample, "--grid", "images per side", 8, most=256)
    sample.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)"
    )
    sample.add_argument(
        "--manifold", action="store_true", help="a regular grid over a 2-D latent space"
    )


def _add_plot(plot: argparse.ArgumentParser) -> None:
    plot.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="run folders, or their models",
    )
    add_folder(plot, "--out", "learning curves of all runs on one axis, and more")
    add_data_root(plot)


def _add_true(true: argparse.ArgumentParser) -> None:
    true.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    true.add_argument(
        "--decoder",
        type=Path,
        metavar="FILE",
        help="a model.safetensors or its run folder, whose decoder is used on test images; if not "
        "given, a model is trained on the first training images alone",
    )
    add_posteriors(true)
    add_count(true, "--images", "how many", 4)
    add_count(true, "--iterations", "of every fit", 2000)
    add_data_root(true)
    add_settings(true, ["data", *FEW_SETTINGS, *FLOW_SETTINGS])


COMMANDS = {  # what --help says in short and at length, and what adds their arguments
    "train": (
        "train a model into a run folder",
        "Trains a model and writes checkpoints, metrics and pictures into a folder.",
        _add_train,
    ),
    "compare": (
        "train several posteriors and table them",
        "Trains every posterior with every seed, each into a run folder of its own, and writes a "
        "table and pictures that compare them. A setting goes to the posteriors that it concerns.",
        _add_compare,
    ),
    "evaluate": (
        "-ELBO and -log p(x) of a trained model",
        "Estimates -ELBO and -log p(x) of test images, with standard errors, and prints JSON.",
        _add_evaluate,
    ),
    "sample": (
        "draw images from a trained model",
        "Draws a grid of expected images of a trained model, and says where it is.",
        _add_sample,
    ),
    "plot": (
        "draw the pictures of runs again",
        "Draws the pictures of run folders again, and with --out those that compare the runs.",
        _add_plot,
    ),
    "true-posterior": (
        "contours of posteriors beside the true one",
        "Fits posteriors to a few images under one fixed decoder of 2 latents, and writes contours "
        "of all beside the true posterior, which quadrature gives, and their KL from it.",
        _add_true,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; the one that was chosen is `command`."""
    parser = _Parser(
        prog=PROGRAM,
        description="Variational autoencoders with Gaussian and flow posteriors.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, (text, description, add_arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
        add_arguments(command)
        command.add_argument(
            "--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: auto"
        )
        add_count(command, "--threads", "of the CPU", most=1 << 12)
    return parser
