"""Models and training states as safetensors files: no pickle, no code, everything checked.

A file's metadata has one entry, a JSON object with the file's kind, the settings and the shape of
the images. (One, because safetensors writes several in random order, and equal runs shall write
equal files.) A reader rebuilds the model that the settings describe, without memory, and compares
names, shapes and types with the file's header before it loads a single value.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fastflow.vae.config import Config, parse_json
from fastflow.vae.errors import VaeError
from fastflow.vae.files import write_bytes
from fastflow.vae.models import VAE, build

ENTRY = "fastflow.vae"
MODEL = "model/2"  # the number grows when settings or tensors change
STATE = "state/2"
LARGEST_SIDE = 1 << 12  # pixels: bounds what a header can make us allocate
RECORD = ("epoch", "train_loss", "elbo", "reconstruction", "kl", "test_loss")  # of one epoch
ADAM = ("exp_avg", "exp_avg_sq", "step")
TYPES = {torch.float32: "F32", torch.int64: "I64"}  # as safetensors names them


@dataclass(frozen=True)
class State:
    """A run after some epochs. It alone decides how a run goes on."""

    config: Config
    shape: tuple[int, int]
    history: list[dict[str, float]]  # one record per finished epoch
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # "<parameter>.<moment>", empty before the first step
    best: dict[str, Tensor]  # the model of the best epoch, empty without validation


def record_of(config: Config) -> tuple[str, ...]:
    """The entries of the record of an epoch."""
    return RECORD + ("validation_loss",) * (config.validation > 0)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's moments and step counts by name, such as `decoder.0.weight.exp_avg`."""
    return {
        f"{name}.{moment}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        if parameter in optimizer.state
        for moment in ADAM
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Adam, tensors: dict[str, Tensor]
) -> None:
    """Gives Adam the moments and step counts that `optimizer_tensors` named."""
    if not tensors:
        return
    moments = {
        index: {moment: tensors[f"{name}.{moment}"] for moment in ADAM}
        for index, (name, _) in enumerate(model.named_parameters())
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def restore_model(path: Path, model: VAE, tensors: dict[str, Tensor]) -> None:
    """Gives a model the tensors of the file at `path`.

    Raises:
        VaeError: a tensor of fitting shape and type has values that mean nothing.
    """
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:  # such as the order of an autoregressive network
        raise VaeError(f"{path}: {' '.join(str(error).split())}") from error


def save_model(path: Path, model: VAE, config: Config, shape: tuple[int, int]) -> None:
    """Writes a model in one step."""
    content = {"kind": MODEL, "config": asdict(config), "shape": shape}
    _write(path, model.state_dict(), content)


def load_model(path: Path, device: torch.device) -> tuple[VAE, Config, tuple[int, int]]:
    """Reads a model.

    Returns:
        The model, its settings, and the height and width of its images.

    Raises:
        VaeError: the file is damaged, of another kind, or does not hold what its settings describe.
    """
    with _Reader(path, MODEL) as reader:
        reader.check_header(reader.model().state_dict())
        tensors = reader.load()
    model = build(reader.config, reader.shape)
    restore_model(path, model, tensors)
    return model.to(device), reader.config, reader.shape


def save_state(path: Path, state: State) -> None:
    """Writes a training state in one step."""
    content = {
        "kind": STATE,
        "config": asdict(state.config),
        "shape": state.shape,
        "history": state.history,
    }
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in state.optimizer.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    _write(path, tensors, content)


def load_state(path: Path) -> State:
    """Reads a training state, onto the CPU.

    Raises:
        VaeError: as `load_model`.
    """
    with _Reader(path, STATE) as reader:
        history = reader.history()
        model = reader.model()
        expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        if reader.config.validation:
            expected |= {f"best.{name}": tensor for name, tensor in model.state_dict().items()}
        if history:
            for name, parameter in model.named_parameters():
                for moment in ADAM:
                    like = parameter.new_empty(()) if moment == "step" else parameter
                    expected[f"optimizer.{name}.{moment}"] = like
        reader.check_header(expected)
        tensors = reader.load()
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return State(reader.config, reader.shape, history, **parts)


class _Reader:
    """A safetensors file of ours, opened, its metadata checked, no tensor loaded yet."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        if not path.is_file():
            raise VaeError(f"{path}: not a file")
        try:
            self.file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise VaeError(f"{path}: damaged, or no safetensors file ({error})") from error
        try:
            self.content = _checked_content((self.file.metadata() or {}).get(ENTRY), kind)
            self.config = Config.from_dict(self.content.get("config"))
            self.shape = _checked_shape(self.content.get("shape"))
        except VaeError as error:
            raise VaeError(f"{path}: {error}") from error

    def __enter__(self) -> _Reader:
        self.file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.__exit__(*exception)

    def history(self) -> list[dict[str, float]]:
        history = self.content.get("history")
        good = isinstance(history, list) and all(
            isinstance(record, dict)
            and set(record) == set(record_of(self.config))
            and record["epoch"] == epoch
            and all(type(value) in (int, float) for value in record.values())
            for epoch, record in enumerate(history, start=1)
        )
        if not isinstance(history, list) or not good:
            raise VaeError(f"{self.path}: the record of its epochs is malformed")
        return history

    def model(self) -> VAE:
        """The model that the settings describe, without memory behind its tensors."""
        try:
            with torch.device("meta"):
                return build(self.config, self.shape)
        except VaeError as error:
            raise VaeError(f"{self.path}: {error}") from error

    def check_header(self, expected: dict[str, Tensor]) -> None:
        names = set(self.file.keys())
        if names != set(expected):
            odd = sorted(names.symmetric_difference(expected))
            raise VaeError(f"{self.path}: its tensors are not the model's, first {odd[0]!r:.80}")
        for name, tensor in expected.items():
            header = self.file.get_slice(name)
            found = f"{header.get_dtype()} {header.get_shape()}"
            if found != (wanted := f"{TYPES[tensor.dtype]} {list(tensor.shape)}"):
                raise VaeError(f"{self.path}: {name} is {found}, must be {wanted}")

    def load(self) -> dict[str, Tensor]:
        tensors = {name: self.file.get_tensor(name) for name in self.file.keys()}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise VaeError(f"{self.path}: {name} holds NaN or infinite values")
        return tensors


def _write(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {ENTRY: json.dumps(content, allow_nan=False)}))


def _checked_content(text: str | None, kind: str) -> dict[str, Any]:
    content = parse_json(text) if text is not None else None
    if not isinstance(content, dict):
        raise VaeError(f"is no checkpoint of {ENTRY}")
    if content.get("kind") != kind:
        raise VaeError(f"is of kind {content.get('kind')!r:.40}, must be {kind!r}")
    return content


def _checked_shape(content: Any) -> tuple[int, int]:
    good = (
        isinstance(content, list)
        and len(content) == 2
        and all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in content)
    )
    if not good:
        raise VaeError("the image shape is malformed")
    return content[0], content[1]
