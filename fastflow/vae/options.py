"""The arguments that commands share: settings, folders, counts, files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from fastflow.vae.config import Config, choices

SETTINGS = {  # the fields of Config: type and help; `amortised` has flags of its own
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


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a model and its training that a command line has."""
    return {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}


def add_folder(
    parser: argparse.ArgumentParser, flag: str, text: str, default: Path | None = None
) -> None:
    """Adds an argument that names a folder."""
    parser.add_argument(flag, type=Path, default=default, metavar="DIR", help=_help(text, default))


def add_count(
    parser: argparse.ArgumentParser,
    flag: str,
    text: str,
    default: int | None = None,
    most: int = 1 << 31,
) -> None:
    """Adds an argument that is a whole number of at least 1; `most` bounds what it can cost."""
    kind = partial(_count, most=most)
    parser.add_argument(flag, type=kind, default=default, metavar="N", help=_help(text, default))


def add_file(
    parser: argparse.ArgumentParser, flag: str, suffix: str, text: str, required: bool = False
) -> None:
    """Adds an argument that names a file with a suffix."""
    parser.add_argument(flag, type=_file(suffix), required=required, metavar="FILE", help=text)


def _help(text: str, default: object) -> str:
    return text if default is None else f"{text} (default: {default})"


def add_posteriors(parser: argparse.ArgumentParser) -> None:
    """Adds --posteriors, some of all."""
    names = choices("posterior")
    parser.add_argument(
        "--posteriors",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}; default: all",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds --checkpoint, which every command on a trained model needs."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="a model.safetensors, or the run folder that holds one",
    )


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Adds --data-root."""
    add_folder(parser, "--data-root", "folder of IDX files, plain or .gz, or of downloads")


def add_settings(
    parser: argparse.ArgumentParser, names: Iterable[str], default: str | None = None
) -> None:
    """Adds --name for fields of Config. One that is left out is absent from the options, so that
    --resume can tell; `default` says in the help what it is then, if not Config's."""
    for name in names:
        kind, text = SETTINGS[name]
        if name == "amortised":
            _add_form(parser)
            continue
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=choices(name) or None,
            default=argparse.SUPPRESS,
            metavar=None if choices(name) else "N" if kind is int else "X",
            help=f"{text} (default: {default or getattr(Config, name)})",
        )


def _add_form(parser: argparse.ArgumentParser) -> None:
    form = parser.add_mutually_exclusive_group()
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


def _count(text: str, most: int) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, not {value}")
    return value


def _file(suffix: str) -> Callable[[str], Path]:
    """The type of an argument that names a file with a suffix."""

    def path_of(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, not {path.name!r}")
        return path

    return path_of
