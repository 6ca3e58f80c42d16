"""The command line of `python -m fastflow.vae`, with a command for every verb.

Exit code 0; 2 for a usage or data error, with one line on stderr; 130 when interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastflow.vae import commands
from fastflow.vae.arguments import complain, make_parser
from fastflow.vae.distributed import team_size
from fastflow.vae.errors import VaeError

COMMANDS = {
    "train": commands.train,
    "compare": commands.compare,
    "evaluate": commands.evaluate,
    "sample": commands.sample,
    "plot": commands.plot,
    "true-posterior": commands.true_posterior,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Arguments:
        arguments: the words after the program's name, by default those of this process.

    Returns:
        The exit code.
    """
    parser = make_parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        page = f"{parser.prog} {options.command} --help"
        return complain(f"error: unrecognized arguments: {' '.join(unknown)} (see {page})", 2)
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if team_size() > 1 and options.command != "train":
            raise VaeError(f"{options.command}: torchrun is for train alone")
        COMMANDS[options.command](options)
    except (VaeError, OSError) as error:
        return complain(f"error: {error}", 2)
    except ModuleNotFoundError as error:
        return complain(f"error: {error}; pip install 'fastflow[vae]'", 2)
    except KeyboardInterrupt:
        can_resume = hasattr(options, "resume")
        way_on = f"; {options.command} --resume continues a run" if can_resume else ""
        return complain(f"interrupted{way_on}", 130)
    return 0
