"""Training: a run whose folder is complete after every epoch and can always be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

from fastflow.vae.checkpoint import (
    RECORD,
    State,
    optimizer_tensors,
    record_of,
    restore_model,
    restore_optimizer,
    save_model,
    save_state,
)
from fastflow.vae.config import Config
from fastflow.vae.data import ImageData
from fastflow.vae.distributed import Team
from fastflow.vae.errors import VaeError
from fastflow.vae.evaluation import evaluate_run, mean_negative_elbo
from fastflow.vae.files import remove_leftovers, write_csv, write_json
from fastflow.vae.models import VAE, build
from fastflow.vae.pictures import draw_run
from fastflow.vae.run_folder import FILES, STATE_FILE, require_no_run
from fastflow.vae.schedules import kl_weight, learning_rate
from fastflow.vae.seeding import generator_for
from fastflow.vae.splits import Splits, split
from fastflow.vae.steps import TrainingStep, fastest, make_optimizer

ALONE = Team()


@dataclass
class Run:
    """A training run and its folder.

    `state.safetensors` is the truth: parameters, Adam's moments and the record of all epochs, in
    one file that is replaced in one step. Every other file is derived from it, and written again
    when a run is resumed, so a run that is killed at any moment leaves nothing out of step.

    With validation images `best` is the model of the epoch that was best on them, which is the one
    that is written and evaluated; without, it is the model itself.
    """

    folder: Path
    config: Config
    data: Splits
    device: torch.device
    history: list[dict[str, float]]
    model: VAE
    best: VAE
    optimizer: torch.optim.Adam
    team: Team
    step_seconds: list[float] = field(default_factory=list)  # of the epochs of this process

    @classmethod
    def start(
        cls,
        folder: Path,
        config: Config,
        data: ImageData,
        device: torch.device,
        team: Team = ALONE,
    ) -> Run:
        """Starts a run in a folder that holds none. Of a team, the first process writes there.

        Raises:
            VaeError: the folder holds a run, or the images cannot be trained on.
            OSError: the folder cannot be written.
        """
        if team.is_first:
            require_no_run(folder)
        run = cls._assemble(folder, config, split(data, config), device, team)
        if team.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder, FILES)
        run.save()
        return run

    @classmethod
    def resume(
        cls,
        folder: Path,
        state: State,
        data: ImageData,
        device: torch.device,
        team: Team = ALONE,
    ) -> Run:
        """Continues the run of a folder from its last state.

        Raises:
            VaeError: the images are not those of the run.
            OSError: the folder cannot be written.
        """
        splits = split(data, state.config)
        if splits.shape != state.shape:
            raise VaeError(f"images are {data.shape}, those of {folder} are {state.shape}")
        run = cls._assemble(folder, state.config, splits, device, team)
        run.history += state.history
        restore_model(folder / STATE_FILE, run.model, state.model)
        restore_optimizer(run.model, run.optimizer, state.optimizer)
        if state.best:
            restore_model(folder / STATE_FILE, run.best, state.best)
        if team.is_first:
            remove_leftovers(folder, FILES)
        run.save()
        return run

    @classmethod
    def _assemble(
        cls, folder: Path, config: Config, data: Splits, device: torch.device, team: Team
    ) -> Run:
        """A run before its first epoch."""
        model = build(config, data.shape).to(device)
        best = build(config, data.shape).to(device) if config.validation else model
        optimizer = make_optimizer(model, config.lr)
        return cls(folder, config, data.to(device), device, [], model, best, optimizer, team)

    def train(self, report: Callable[[str], None], bars: bool = True) -> None:
        """Trains the epochs that are missing, one checkpoint after each; early stopping ends it.

        Arguments:
            report: gets one line per epoch.
            bars: whether a terminal sees how far an epoch is.

        Raises:
            VaeError: the loss is no longer finite; the last checkpoint stays.
            OSError: the folder cannot be written.
        """
        step = TrainingStep(self.model, self.optimizer, self.config.free_bits, self.team)
        move = fastest(step, self.device)
        while (epoch := len(self.history) + 1) <= self.config.epochs and not self.is_stopped:
            self.history.append(self._train_epoch(epoch, step, move, report, bars))
            if self.config.validation and best_epoch(self.history) == epoch:
                self.best.load_state_dict(self.model.state_dict())
            self.save()
        if self.is_stopped:
            report(f"stopped early, the best epoch was {best_epoch(self.history)}")

    @property
    def is_stopped(self) -> bool:
        """Whether the last `patience` epochs brought no better validation loss."""
        epochs, patience = len(self.history), self.config.patience
        return 0 < patience <= epochs - best_epoch(self.history)

    def save(self) -> None:
        """Writes the state, then everything that follows from it."""
        if not self.team.is_first:
            return
        state = State(
            self.config,
            self.data.shape,
            self.history,
            self.model.state_dict(),
            optimizer_tensors(self.model, self.optimizer),
            self.best.state_dict() if self.config.validation else {},
        )
        save_state(self.folder / STATE_FILE, state)
        save_model(self.folder / "model.safetensors", self.best, self.config, self.data.shape)
        machine = {"device": str(self.device), "threads": torch.get_num_threads()}
        write_json(self.folder / "config.json", asdict(self.config) | machine)
        write_csv(self.folder / "metrics.csv", record_of(self.config), self.history)
        if self.step_seconds:  # else those of the process before stay
            timing = {"seconds_per_step": median(self.step_seconds)}
            write_json(self.folder / "timing.json", timing)
        self._write_metrics({})

    def finish(self) -> dict[str, float | None]:
        """Evaluates on the test images and draws the pictures.

        Returns:
            What `fastflow.vae.evaluation.evaluate_run` returns, with the epoch after which the
            model was what is evaluated here.
        """
        test = evaluate_run(self.best, self.config, self.data.test)
        test["epoch"] = best_epoch(self.history)
        draw_run(self.folder, self.best, self.config, self.history, self.data.test, self.data.shape)
        self._write_metrics(test)
        return test

    def _train_epoch(
        self,
        epoch: int,
        step: TrainingStep,
        move: Callable[[Tensor, Tensor], None],
        report: Callable[[str], None],
        bars: bool,
    ) -> dict[str, float]:
        """Trains an epoch by `move`, which makes the step `step` in the fastest way there is."""
        images = len(self.data.train)
        step.begin(learning_rate(self.config, epoch), kl_weight(self.config, epoch))
        started = perf_counter()
        # On a terminal only: in a log file the line per epoch is enough.
        disable = None if bars and self.team.is_first else True
        with tqdm(total=images, unit="image", leave=False, disable=disable) as bar:
            bar.set_description(f"epoch {epoch}/{self.config.epochs}")
            for x, noise in self._batches(epoch):
                move(x, noise)
                if bar.update(len(x)) and self.device.type == "cpu":  # a GPU would have to wait
                    bar.set_postfix(loss=f"{step.totals.sum().item() / bar.n:.2f}", refresh=False)
        reconstruction, kl = (step.totals / images).tolist()
        seconds = perf_counter() - started
        self.step_seconds.append(seconds / -(-images // self.config.batch_size))
        record = self.team.of_first(lambda: self._record(epoch, reconstruction, kl))
        if not all(map(math.isfinite, record.values())):
            raise VaeError(
                f"epoch {epoch}: the loss is not finite, a smaller learning rate than "
                f"{self.config.lr:g} may help"
            )
        line = f"epoch {epoch}/{self.config.epochs}  loss {record['train_loss']:.3f}"
        line += f"  test {record['test_loss']:.3f}"
        if self.config.validation:
            line += f"  validation {record['validation_loss']:.3f}"
        report(f"{line}  {images / seconds:,.0f} images/s")
        return record

    def _record(self, epoch: int, reconstruction: float, kl: float) -> dict[str, float]:
        """What is known of an epoch, whose mean terms in training are given."""
        test = mean_negative_elbo(self.model, self.data.test, self._generator("test", epoch))
        loss = reconstruction + kl
        values = epoch, loss, -loss, reconstruction, kl, test
        record: dict[str, float] = dict(zip(RECORD, values, strict=True))
        if self.config.validation:
            # The same noise in every epoch: what differs between them is the model.
            noise = self._generator("validation")
            validation = mean_negative_elbo(self.model, self.data.validation, noise)
            record["validation_loss"] = validation
        return record

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (B, pixels) and noise (B, D), the same whenever the epoch is run."""
        order = torch.randperm(
            len(self.data.train),
            generator=generator_for(torch.device("cpu"), self.config.seed, "order", epoch),
        ).to(self.device)
        noise = self._generator("noise", epoch)
        pixels = self._generator("pixels", epoch)
        for rows in order.split(self.config.batch_size):
            x = self.data.train[rows]
            if self.config.binarise == "dynamic":
                x = torch.bernoulli(x, generator=pixels)
            shape = (len(x), self.config.latent)
            yield x, torch.randn(shape, generator=noise, device=self.device)

    def _generator(self, *key: str | int) -> torch.Generator:
        return generator_for(self.device, self.config.seed, *key)

    def _write_metrics(self, test: dict[str, float | None]) -> None:
        write_json(self.folder / "metrics.json", {"epochs": self.history, "test": test})


def best_epoch(history: Sequence[dict[str, float]]) -> int:
    """The first epoch of the lowest validation loss; without validation, the last; 0 if none."""
    losses = [record["validation_loss"] for record in history if "validation_loss" in record]
    return losses.index(min(losses)) + 1 if losses else len(history)
