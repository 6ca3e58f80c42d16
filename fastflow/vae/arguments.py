"""What the command line accepts: its commands, their arguments and their help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from fastflow.vae.config import Config, choices
from fastflow.vae.registry import FLOW_SETTINGS

PROGRAM = "python -m fastflow.vae"
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
FEW_SETTINGS = ("network", "hidden", "likelihood", "variance", "binarise", "lr", "seed")


def complain(message: str, code: int) -> int:
    """Writes one line to stderr and returns the exit code."""
    sys.stderr.write(f"fastflow.vae: {' '.join(message.split())}\n")
    return code


def given_settings(options: argparse.Namespace) -> dict[str, object]:
    """The settings of a model and its training that a command line has."""
    return {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; the one that was chosen is `command`."""
    parser = _Parser(
        prog=PROGRAM,
        description="Variational autoencoders with Gaussian and flow posteriors.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for add in (_add_train, _add_compare, _add_evaluate, _add_sample, _add_plot, _add_true):
        command = add(commands)
        command.add_argument(
            "--device", choices=("cpu", "cuda", "auto"), default="auto", help="default: auto"
        )
        command.add_argument("--threads", type=_count, metavar="N", help="of the CPU")
    return parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(complain(f"error: {message} (see {self.prog} --help)", 2))


def _add_train(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    train = _command(
        commands,
        "train",
        "train a model into a run folder",
        "Trains a model and writes checkpoints, metrics and pictures into a folder.",
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder, runs/POSTERIOR-DATA if not given"
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in DIR, or start it; settings that are not given are the run's",
    )
    _add_data_root(train)
    _add_settings(train, SETTINGS)
    return train


def _add_compare(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    compare = _command(
        commands,
        "compare",
        "train several posteriors and table them",
        "Trains every posterior with every seed, each into a run folder of its own, and writes a "
        "table and pictures that compare them. A setting goes to the posteriors that it concerns.",
    )
    compare.add_argument(
        "--out", type=Path, default=Path("runs", "compare"), metavar="DIR", help="%(default)s"
    )
    compare.add_argument(
        "--resume",
        action="store_true",
        help="keep the finished runs in DIR and continue the others; what is not given is as "
        "before, more posteriors and seeds may be",
    )
    _add_posteriors(compare)
    compare.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="one run for each; default: 0"
    )
    compare.add_argument(
        "--jobs",
        type=_count,
        default=1,
        metavar="N",
        help="runs at a time, each a process (default: 1)",
    )
    _add_data_root(compare)
    _add_settings(compare, [name for name in SETTINGS if name not in ("posterior", "seed")])
    return compare


def _add_evaluate(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    evaluate = _command(
        commands,
        "evaluate",
        "-ELBO and -log p(x) of a trained model",
        "Estimates -ELBO and -log p(x) of test images, with standard errors, and prints JSON.",
    )
    _add_checkpoint(evaluate)
    _add_settings(evaluate, ["data"], "the checkpoint's")
    _add_data_root(evaluate)
    evaluate.add_argument(
        "--samples", type=_count, metavar="K", help="draws per image; default: the checkpoint's"
    )
    _add_settings(evaluate, ["seed"], "the checkpoint's")
    evaluate.add_argument(
        "--out", type=_file(".json"), metavar="FILE", help="writes FILE.json, too"
    )
    return evaluate


def _add_sample(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    sample = _command(
        commands,
        "sample",
        "draw images from a trained model",
        "Draws a grid of expected images of a trained model, and says where it is.",
    )
    _add_checkpoint(sample)
    sample.add_argument(
        "--out", type=_file(".png"), required=True, metavar="FILE", help="the picture, FILE.png"
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
    return sample


def _add_plot(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    plot = _command(
        commands,
        "plot",
        "draw the pictures of runs again",
        "Draws the pictures of run folders again, and with --out those that compare the runs.",
    )
    plot.add_argument(
        "--runs", type=Path, nargs="+", required=True, metavar="DIR", help="run folders"
    )
    plot.add_argument(
        "--out", type=Path, metavar="DIR", help="learning curves of all runs on one axis, and more"
    )
    _add_data_root(plot)
    return plot


def _add_true(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    true = _command(
        commands,
        "true-posterior",
        "contours of posteriors beside the true one",
        "Fits posteriors to a few images under one fixed decoder of 2 latents, and writes contours "
        "of all beside the true posterior, which quadrature gives, and their KL from it.",
    )
    true.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    true.add_argument(
        "--decoder",
        type=Path,
        metavar="FILE",
        help="a model.safetensors, whose decoder is used on test images; if not given, a model is "
        "trained on the first training images alone",
    )
    _add_posteriors(true)
    true.add_argument("--images", type=_count, default=4, metavar="N", help="default: 4")
    true.add_argument(
        "--iterations", type=_count, default=2000, metavar="N", help="of every fit; default: 2000"
    )
    _add_data_root(true)
    _add_settings(true, ["data", *FEW_SETTINGS, *FLOW_SETTINGS])
    return true


def _add_posteriors(parser: argparse.ArgumentParser) -> None:
    names = choices("posterior")
    parser.add_argument(
        "--posteriors",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"some of {', '.join(names)}; default: all",
    )


def _command(
    commands: argparse._SubParsersAction, name: str, text: str, description: str
) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=description, allow_abbrev=False)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="FILE", help="a model.safetensors"
    )


def _add_data_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-root",
        type=Path,
        metavar="DIR",
        help="folder of IDX files, plain or .gz, or of downloads",
    )


def _add_settings(
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


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _file(suffix: str) -> Callable[[str], Path]:
    """The type of an argument that names a file with a suffix."""

    def path_of(text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, not {path.name!r}")
        return path

    return path_of
