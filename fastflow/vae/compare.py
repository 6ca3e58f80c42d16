"""Several posteriors and seeds, each a run of its own, in one folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastflow.vae.config import Config, choices, parse_json, refuse_without_effect
from fastflow.vae.data import load
from fastflow.vae.errors import VaeError
from fastflow.vae.files import write_json
from fastflow.vae.jobs import Task, perform
from fastflow.vae.run_folder import find_state, require_no_run, require_run_folder
from fastflow.vae.summary import is_finished

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Comparison:
    """Runs that differ in nothing but the posterior and the seed.

    `settings.json` in the folder keeps what was asked for, so that an interrupted comparison is
    continued without saying it again.

    Arguments:
        folder: holds a run folder POSTERIOR-seedN for every run.
        posteriors: their names.
        seeds: one run of every posterior for each.
        settings: the other settings that were asked for.
    """

    folder: Path
    posteriors: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]

    @classmethod
    def open(
        cls,
        folder: Path,
        posteriors: Sequence[str] | None,
        seeds: Sequence[int] | None,
        settings: dict[str, Any],
        resume: bool,
    ) -> Comparison:
        """Starts a comparison in a folder that holds none, or continues one; writes nothing yet.

        Arguments:
            folder: as of the class.
            posteriors, seeds: as of the class; None for those before, else for all and for 0.
            settings: as of the class; those before are added.
            resume: whether the folder may hold a comparison.

        Raises:
            VaeError: the folder holds one and `resume` is false, or one with other settings, or
                does not exist and `resume` is true; a setting is wrong, or concerns none of the
                posteriors.
        """
        path = folder / SETTINGS_FILE
        if folder.exists() and not folder.is_dir():
            raise VaeError(f"{folder}: is not a folder")
        if resume:
            require_run_folder(folder)
        before: dict[str, Any] = {}
        if path.exists():
            if not resume:
                raise VaeError(f"{folder}: already holds a comparison; --resume continues it")
            before = _read(path)
        comparison = cls(
            folder,
            _unique("posteriors", posteriors or before.get("posteriors") or choices("posterior")),
            _unique("seeds", seeds or before.get("seeds") or (0,)),
            before.get("settings", {}) | settings,
        )
        refuse_for_all(comparison.posteriors, comparison.settings)
        for run, run_settings in comparison.runs().items():
            Config(**run_settings)
            if resume:
                find_state(run, run_settings)
            else:
                require_no_run(run)
        return comparison

    @property
    def data(self) -> str:
        """The name of the image set."""
        return self.settings.get("data", Config.data)

    def runs(self) -> dict[Path, dict[str, Any]]:
        """The settings of every run, by its folder: those that concern its posterior."""
        runs = {}
        for seed in self.seeds:
            for posterior in self.posteriors:
                settings = concerning(posterior, self.settings) | {"seed": seed}
                runs[self.folder / f"{posterior}-seed{seed}"] = settings
        return runs

    def groups(self) -> dict[str, list[Path]]:
        """The folders of the runs of every posterior."""
        return {
            posterior: [self.folder / f"{posterior}-seed{seed}" for seed in self.seeds]
            for posterior in self.posteriors
        }

    def train(
        self, data_root: Path | None, device: torch.device, jobs: int, say: Callable[[str], None]
    ) -> None:
        """Trains and evaluates the runs that are not finished.

        Arguments:
            data_root: where the images are.
            device: where all runs compute.
            jobs: how many at a time.
            say: gets one line per epoch.

        Raises:
            VaeError: the images are not there, and nothing was written; or a run failed, and the
                others are finished nevertheless.
            OSError: the folder cannot be written.
        """
        load(self.data, data_root)  # every run loads them again, but would have begun by then
        self.folder.mkdir(parents=True, exist_ok=True)
        content = asdict(self)
        del content["folder"]
        write_json(self.folder / SETTINGS_FILE, content)
        runs = self.runs()
        tasks, epochs = [], 0
        for folder, settings in runs.items():
            config = Config(**settings)
            if is_finished(folder, config):
                say(f"{folder.name}: finished before")
            else:
                tasks.append(Task(folder, settings, data_root, device))
                epochs += config.epochs
        with tqdm(total=epochs, unit="epoch", desc="all runs", disable=None) as bar:
            failures = perform(tasks, jobs, bar, say)
        if failures:
            name, reason = next(iter(failures.items()))
            raise VaeError(
                f"{len(failures)} of {len(runs)} runs failed, first {name}: {reason}; "
                "the others are finished, --resume tries these again"
            )


def concerning(posterior: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that have an effect with a posterior, and the posterior's name."""
    all_of_them = {**settings, "posterior": posterior}
    return {name: value for name, value in all_of_them.items() if _has_effect(all_of_them, name)}


def _has_effect(settings: Mapping[str, Any], name: str) -> bool:
    try:
        refuse_without_effect(settings, {name: settings[name]})
    except VaeError:
        return False
    return True


def refuse_for_all(posteriors: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuses settings that concern none of the posteriors.

    Raises:
        VaeError: one of them does, or a value is wrong.
    """
    kept = [concerning(posterior, settings) for posterior in posteriors]
    for run in kept:
        Config(**run)
    for name, value in settings.items():
        if not any(name in run for run in kept):
            refuse_without_effect({**settings, "posterior": posteriors[0]}, {name: value})


def _unique(name: str, values: Sequence[Any]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise VaeError(f"--{name}: {' '.join(map(str, values))} has one of them twice")
    return tuple(values)


def _read(path: Path) -> dict[str, Any]:
    """What a comparison was asked for before.

    Raises:
        VaeError: the file is damaged. Names and values are checked where they are used.
    """
    try:
        content = parse_json(path.read_text())
    except (VaeError, UnicodeDecodeError) as error:
        raise VaeError(f"{path}: {error}") from error
    types = {"posteriors": list, "seeds": list, "settings": dict}
    good = (
        isinstance(content, dict)
        and set(content) == set(types)
        and all(isinstance(content[name], kind) for name, kind in types.items())
        and set(content["settings"]) <= {field.name for field in fields(Config)}
        and all(type(name) is str for name in content["posteriors"])
        and all(type(seed) is int for seed in content["seeds"])
    )
    if not good:
        raise VaeError(f"{path}: holds no settings of a comparison")
    return content
