"""The command line: `python -m fastflow.vae train` and `python -m fastflow.vae sample`.

Exit code 0; 2 for a usage or data error, with one line on stderr; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from fastflow.vae.config import Config, choices, refuse_without_effect
from fastflow.vae.data import load
from fastflow.vae.errors import VaeError
from fastflow.vae.seeding import generator_for

PROGRAM = "python -m fastflow.vae"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Arguments:
        arguments: the words after the program's name, by default those of this process.

    Returns:
        The exit code.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        return {"train": _train, "sample": _sample}[options.command](options)
    except (VaeError, OSError) as error:
        return _complain(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        return _complain(f"error: {error}; pip install 'fastflow[vae]'", 2)
    except KeyboardInterrupt:
        return _complain("interrupted; train --resume continues a run", 130)


def _train(options: argparse.Namespace) -> int:
    # Imported here, so that --help and usage errors need none of the optional packages.
    from fastflow.vae.training import Run, find_state, require_no_run

    settings = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
    config, device = Config(**settings), _device(options.device)
    folder = options.out or Path("runs", f"{config.posterior}-{config.data}")
    state = None
    if options.resume:
        state = find_state(folder, settings)
    else:
        require_no_run(folder)
    if state:
        config = state.config
    refuse_without_effect(config, settings)
    if config.data == "digits" and options.data_root is not None:
        raise VaeError("--data-root has no effect with --data digits, which needs no files")
    data = load(config.data, options.data_root)
    if state:
        run = Run.resume(folder, state, data, device)
    else:
        run = Run.start(folder, config, data, device)
    run.train(_say)
    test = run.finish()
    _say(
        f"test: -ELBO {test['negative_elbo']:.3f}, -log p(x) "
        f"{test['negative_log_likelihood']:.3f} nats per image "
        f"({test['importance_samples']} samples); see {folder}"
    )
    return 0


def _sample(options: argparse.Namespace) -> int:
    from fastflow.vae.checkpoint import load_model
    from fastflow.vae.plots import draw_samples, manifold_images, sample_images

    device = _device(options.device)
    model, config, shape = load_model(options.checkpoint, device)
    if options.manifold:
        if config.latent != 2:
            raise VaeError(f"--manifold needs 2 latents, {options.checkpoint} has {config.latent}")
        pictures = manifold_images(model, options.grid, device)
        title = "Expected images over the latents (quantiles of the prior)"
        draw_samples(options.out, pictures, shape, title, ("$z_1$", "$z_2$"))
    else:
        generator = generator_for(device, options.seed, "samples")
        draw_samples(options.out, sample_images(model, options.grid, generator), shape)
    _say(str(options.out))
    return 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(_complain(f"error: {message} (see {self.prog} --help)", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Variational autoencoders with Gaussian and flow posteriors.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    train = commands.add_parser(
        "train",
        help="train a model into a run folder",
        description="Trains a model and writes checkpoints, metrics and pictures into a folder.",
        allow_abbrev=False,
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder, runs/POSTERIOR-DATA if not given"
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR, or start it; settings that are not given are the run's",
    )
    train.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of IDX files, plain or .gz, or of downloads",
    )
    for name, (kind, text) in SETTINGS.items():
        _add_setting(train, name, kind, text)
    form = train.add_mutually_exclusive_group()
    for flag, value, text in (
        ("--amortised", True, "flow parameters from the encoder, per image (default)"),
        ("--shared", False, "one set of flow parameters for all images"),
    ):
        form.add_argument(
            flag,
            dest="amortised",
            action="store_const",
            const=value,
            default=argparse.SUPPRESS,
            help=text,
        )
    sample = commands.add_parser(
        "sample",
        help="draw images from a trained model",
        description="Draws a grid of expected images of a trained model, and says where it is.",
        allow_abbrev=False,
    )
    sample.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a model.safetensors"
    )
    sample.add_argument(
        "--out", type=_picture, required=True, metavar="FILE", help="the picture, FILE.png"
    )
    sample.add_argument(
        "--grid", type=_count, default=8, metavar="N", help="images per side (default: 8)"
    )
    sample.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)"
    )
    sample.add_argument(
        "--manifold", action="store_true", help="a regular grid over a 2-D latent space"
    )
    for command in (train, sample):
        command.add_argument(
            "--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: auto"
        )
        command.add_argument("--threads", type=_count, metavar="N", help="of the CPU")
    return parser


SETTINGS = {
    "posterior": (str, "approximate posterior"),
    "data": (str, "image set"),
    "network": (str, "encoder and decoder: dense, or residual and convolutional"),
    "epochs": (int, "epochs in all"),
    "latent": (int, "latent variables"),
    "hidden": (int, "units of the dense layer of encoder and decoder"),
    "steps": (int, "of the flow: planar steps, or autoregressive networks of iaf and maf"),
    "width": (int, "units of a hidden layer of the flow's networks, with iaf, maf, pcp"),
    "layers": (int, "hidden layers of the flow's networks, with iaf, maf, pcp"),
    "context": (int, "features of an image that the flow sees, with iaf, maf, pcp"),
    "amortised": (bool, ""),
    "constraint": (str, "what keeps a step invertible, with --posterior planar"),
    "likelihood": (str, "what the decoder's output means"),
    "variance": (float, "of the decoder, with --likelihood gaussian"),
    "binarise": (
        str,
        "train on grey values (none), or draw binary pixels once (static) or in every epoch",
    ),
    "batch_size": (int, "images per step"),
    "lr": (float, "learning rate of Adam"),
    "schedule": (str, "of the learning rate over the epochs"),
    "kl_warmup": (int, "epochs in which the weight of the KL term rises to 1"),
    "free_bits": (float, "nats of KL, averaged over a batch, that cost nothing in training"),
    "validation": (int, "training images held out; the epoch best on them is the result"),
    "patience": (int, "stop after so many epochs without a better validation loss, 0: never"),
    "seed": (int, "of everything random"),
    "importance_samples": (int, "draws per test image for -log p(x)"),
}


def _add_setting(parser: argparse.ArgumentParser, name: str, kind: type, text: str) -> None:
    """Adds --name; left out, it is absent from the options, so that --resume can tell."""
    if kind is bool:
        return
    parser.add_argument(
        f"--{name.replace('_', '-')}",
        type=kind,
        choices=choices(name) or None,
        default=argparse.SUPPRESS,
        metavar=None if choices(name) else "N" if kind is int else "X",
        help=f"{text} (default: {getattr(Config, name)})",
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, not {path.name!r}")
    return path


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise VaeError("--device cuda: PyTorch finds no CUDA device")
    return torch.device(name)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _complain(message: str, code: int) -> int:
    sys.stderr.write(f"fastflow.vae: {' '.join(message.split())}\n")
    return code
