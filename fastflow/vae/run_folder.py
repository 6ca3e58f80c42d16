"""The folder of a run: its files, and whether a run may start or continue there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastflow.vae.checkpoint import State, load_state
from fastflow.vae.config import flag
from fastflow.vae.errors import VaeError
from fastflow.vae.pictures import RUN_PICTURES

STATE_FILE, MODEL_FILE = "state.safetensors", "model.safetensors"
FILES = (
    STATE_FILE,
    "config.json",
    "metrics.json",
    "metrics.csv",
    "timing.json",
    MODEL_FILE,
    *RUN_PICTURES,
)


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path names: a file, or the model in a run folder.

    Raises:
        VaeError: the folder holds no model.
    """
    if not path.is_dir():
        return path
    _require(path, MODEL_FILE)
    return path / MODEL_FILE


def run_folder_at(path: Path) -> Path:
    """The run folder that a path names, by itself or by the model in it.

    Raises:
        VaeError: it is none, or lacks what is drawn.
    """
    folder = path.parent if path.name == MODEL_FILE and path.is_file() else path
    if not folder.is_dir():
        raise VaeError(f"{path}: is neither a run folder nor the {MODEL_FILE} of one")
    _require(folder, MODEL_FILE, "config.json", "metrics.json")
    return folder


def _require(folder: Path, *names: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        inside = sorted(file.parent.name for file in folder.glob(f"*/{MODEL_FILE}"))
        hint = f", but {', '.join(inside[:8])} in it" + ", .." * (len(inside) > 8)
        raise VaeError(
            f"{folder}: is no run folder, it has no {' and no '.join(missing)}{hint * bool(inside)}"
        )


def require_run_folder(folder: Path) -> None:
    """Refuses a folder that is missing, where a run or a comparison was to be continued.

    Raises:
        VaeError: it is.
    """
    if not folder.exists():
        raise VaeError(f"{folder}: does not exist, --resume has nothing to continue")


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


def find_state(folder: Path, settings: dict[str, Any]) -> State | None:
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
