"""The folder of a run: its files, and whether a run may start or continue there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastflow.vae.checkpoint import State, load_state
from fastflow.vae.config import flag
from fastflow.vae.errors import VaeError
from fastflow.vae.pictures import RUN_PICTURES

STATE_FILE = "state.safetensors"
FILES = (
    STATE_FILE,
    "config.json",
    "metrics.json",
    "metrics.csv",
    "timing.json",
    "model.safetensors",
    *RUN_PICTURES,
)


def require_no_run(folder: Path) -> None:
    """Refuses a folder that holds a run, or that is no folder.

    Raises:
        VaeError: a file of a run lies there.
    """
    if folder.exists() and not folder.is_dir():
        raise VaeError(f"{folder}: is not a folder")
    held = [name for name in FILES if (folder / name).exists()]
    if STATE_FILE in held:
        raise VaeError(f"{folder}: already holds a run; --resume continues it")
    if held:
        raise VaeError(f"{folder}: holds {held[0]} of a run, but no {STATE_FILE} to resume from")


def find_state(folder: Path, settings: dict[str, object]) -> State | None:
    """Reads the state of the run in a folder, None if there is none, and fits it to settings.

    Arguments:
        folder: the folder of a run, or one that is empty or missing.
        settings: fields of `Config` that the caller asks for; all but `importance_samples` and,
            under a constant learning rate, `epochs` must be those of the run.

    Raises:
        VaeError: the state is damaged, or a setting differs.
    """
    if not (folder / STATE_FILE).exists():
        require_no_run(folder)
        return None
    state = load_state(folder / STATE_FILE)
    changeable = ["importance_samples"]
    if state.config.schedule == "constant":  # any other depends on the number of epochs
        changeable.append("epochs")
    for name, value in settings.items():
        held = getattr(state.config, name)
        if name not in changeable and value != held:
            raise VaeError(f"{folder}: its run has {flag(name, held)}, not {flag(name, value)}")
    config = replace(state.config, **settings)
    if config.epochs < len(state.history):
        raise VaeError(
            f"{folder}: has {len(state.history)} epochs already, --epochs is {config.epochs}"
        )
    return replace(state, config=config)
