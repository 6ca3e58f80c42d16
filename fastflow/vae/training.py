"""Training: a run folder that is complete after every epoch and can always be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from tqdm import tqdm

from fastflow.vae import plots
from fastflow.vae.checkpoint import (
    RECORD,
    State,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_model,
    save_state,
)
from fastflow.vae.config import Config, flag
from fastflow.vae.data import ImageData, checked
from fastflow.vae.errors import VaeError
from fastflow.vae.evaluation import evaluate, mean_negative_elbo
from fastflow.vae.files import remove_leftovers, write_csv, write_json
from fastflow.vae.models import VAE, build
from fastflow.vae.objectives import negative_elbo
from fastflow.vae.seeding import generator_for

STATE_FILE = "state.safetensors"
FILES = (
    STATE_FILE,
    "config.json",
    "metrics.json",
    "metrics.csv",
    "model.safetensors",
    "loss.png",
    "reconstructions.png",
    "samples.png",
    "posterior.png",
)


@dataclass
class Run:
    """A training run and its folder.

    `state.safetensors` is the truth: parameters, Adam's moments and the record of all epochs, in
    one file that is replaced in one step. Every other file is derived from it, and written again
    when a run is resumed, so a run that is killed at any moment leaves nothing out of step.
    """

    folder: Path
    config: Config
    data: ImageData
    device: torch.device
    history: list[dict[str, float]]
    model: VAE
    optimizer: torch.optim.Adam

    @classmethod
    def start(cls, folder: Path, config: Config, data: ImageData, device: torch.device) -> Run:
        """Starts a run in a folder that holds none.

        Raises:
            VaeError: the folder holds a run, or the images cannot be trained on.
            OSError: the folder cannot be written.
        """
        require_no_run(folder)
        model = build(config, checked(data).train.shape[1])
        run = cls._assemble(folder, config, data, device, [], model)
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, FILES)
        run.save()
        return run

    @classmethod
    def resume(cls, folder: Path, state: State, data: ImageData, device: torch.device) -> Run:
        """Continues the run of a folder from its last state.

        Raises:
            VaeError: the images are not those of the run.
            OSError: the folder cannot be written.
        """
        if checked(data).shape != state.shape:
            raise VaeError(f"images are {data.shape}, those of {folder} are {state.shape}")
        model = build(state.config, data.train.shape[1])
        model.load_state_dict(state.model)
        run = cls._assemble(folder, state.config, data, device, list(state.history), model)
        restore_optimizer(run.model, run.optimizer, state.optimizer)
        remove_leftovers(folder, FILES)
        run.save()
        return run

    @classmethod
    def _assemble(
        cls,
        folder: Path,
        config: Config,
        data: ImageData,
        device: torch.device,
        history: list[dict[str, float]],
        model: VAE,
    ) -> Run:
        model = model.to(device)
        data = ImageData(data.train.to(device), data.test.to(device), data.shape)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        return cls(folder, config, data, device, history, model, optimizer)

    def train(self, report: Callable[[str], None]) -> None:
        """Trains the epochs that are missing, one checkpoint after each.

        Arguments:
            report: gets one line per epoch.

        Raises:
            VaeError: the loss is no longer finite; the last checkpoint stays.
            OSError: the folder cannot be written.
        """
        for epoch in range(len(self.history) + 1, self.config.epochs + 1):
            self.history.append(self._train_epoch(epoch, report))
            self.save()

    def save(self) -> None:
        """Writes the state, then everything that follows from it."""
        state = State(
            self.config,
            self.data.shape,
            self.history,
            self.model.state_dict(),
            optimizer_tensors(self.model, self.optimizer),
        )
        save_state(self.folder / STATE_FILE, state)
        save_model(self.folder / "model.safetensors", self.model, self.config, self.data.shape)
        machine = {"device": str(self.device), "threads": torch.get_num_threads()}
        write_json(self.folder / "config.json", asdict(self.config) | machine)
        write_csv(self.folder / "metrics.csv", RECORD, self.history)
        self._write_metrics({})

    def finish(self) -> dict[str, float]:
        """Evaluates on the test images and draws the pictures.

        Returns:
            What `fastflow.vae.evaluation.evaluate` returns, with the number of samples.
        """
        images = self._test_images()
        samples = self.config.importance_samples
        test = evaluate(self.model, images, self._generator("evaluation"), samples)
        test["importance_samples"] = samples
        plots.draw_loss(self.folder / "loss.png", self.history)
        plots.draw_reconstructions(
            self.folder / "reconstructions.png",
            self.model,
            images,
            self.data.shape,
            self._generator("reconstructions"),
        )
        plots.draw_samples(
            self.folder / "samples.png",
            plots.sample_images(self.model, 8, self._generator("samples")),
            self.data.shape,
        )
        if self.config.latent == 2:
            plots.draw_posterior(
                self.folder / "posterior.png",
                self.model,
                images,
                self.data.shape,
                self._generator("posterior"),
            )
        self._write_metrics(test)
        return test

    def _train_epoch(self, epoch: int, report: Callable[[str], None]) -> dict[str, float]:
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        images = len(self.data.train)
        started = perf_counter()
        # On a terminal only: in a log file the line per epoch is enough.
        with tqdm(total=images, unit="image", leave=False, disable=None) as bar:
            bar.set_description(f"epoch {epoch}/{self.config.epochs}")
            for x, noise in self._batches(epoch):
                terms = negative_elbo(self.model, x, noise)
                self.optimizer.zero_grad(set_to_none=True)
                terms.loss.mean().backward()
                self.optimizer.step()
                with torch.no_grad():
                    totals += torch.stack([terms.reconstruction.sum(), terms.kl.sum()])
                if bar.update(len(x)):  # true when the bar was redrawn: no reading back otherwise
                    bar.set_postfix(loss=f"{totals.sum().item() / bar.n:.2f}", refresh=False)
        reconstruction, kl = (totals / images).tolist()
        rate = images / (perf_counter() - started)
        test = mean_negative_elbo(self.model, self._test_images(), self._generator("test", epoch))
        loss = reconstruction + kl
        record = dict(zip(RECORD, (epoch, loss, -loss, reconstruction, kl, test), strict=True))
        if not (math.isfinite(loss) and math.isfinite(test)):
            raise VaeError(
                f"epoch {epoch}: the loss is not finite, a smaller learning rate than "
                f"{self.config.lr:g} may help"
            )
        report(
            f"epoch {epoch}/{self.config.epochs}  loss {loss:.3f}  "
            f"test {test:.3f}  {rate:,.0f} images/s"
        )
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

    def _test_images(self) -> Tensor:
        """The test images; binarised, they are drawn once and stay the same for all epochs."""
        if self.config.binarise == "none":
            return self.data.test
        return torch.bernoulli(self.data.test, generator=self._generator("test pixels"))

    def _generator(self, *key: str | int) -> torch.Generator:
        return generator_for(self.device, self.config.seed, *key)

    def _write_metrics(self, test: dict[str, float]) -> None:
        write_json(self.folder / "metrics.json", {"epochs": self.history, "test": test})


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
        settings: fields of `Config` that the caller asks for; all but `epochs` and
            `importance_samples`, which may be changed, must be those of the run.

    Raises:
        VaeError: the state is damaged, or a setting differs.
    """
    if not (folder / STATE_FILE).exists():
        require_no_run(folder)
        return None
    state = load_state(folder / STATE_FILE)
    for name, value in settings.items():
        held = getattr(state.config, name)
        if name not in ("epochs", "importance_samples") and value != held:
            raise VaeError(f"{folder}: its run has {flag(name, held)}, not {flag(name, value)}")
    config = replace(state.config, **settings)
    if config.epochs < len(state.history):
        raise VaeError(
            f"{folder}: has {len(state.history)} epochs already, --epochs is {config.epochs}"
        )
    return replace(state, config=config)
