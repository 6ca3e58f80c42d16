"""Checkpoints: what was written is read back, everything else is refused."""

import json
import pickle
import struct
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("safetensors")
from safetensors.torch import load, save

from fastflow.vae import Config, VaeError, build
from fastflow.vae.checkpoint import (
    ADAM,
    RECORD,
    State,
    load_model,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_model,
    save_state,
)
from fastflow.vae.objectives import negative_elbo

CPU = torch.device("cpu")
CONFIG = Config(posterior="planar", hidden=6, latent=2)
SHAPE = (3, 4)
HISTORY = [dict.fromkeys(RECORD, 0.5) | {"epoch": 1}]


def trained():
    model = build(CONFIG, SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    negative_elbo(model, torch.rand(5, 12), torch.randn(5, 2)).loss.mean().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def model_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, trained()[0], CONFIG, SHAPE)
    return path


def metadata_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["fastflow.vae"])


def rewrite(path, metadata=None, **tensors):
    """Changes entries of a file; None removes one, and a string replaces all metadata."""
    content = path.read_bytes()
    if not isinstance(metadata, str):
        entries = metadata_of(content) | (metadata or {})
        metadata = json.dumps({key: value for key, value in entries.items() if value is not None})
    everything = load(content) | tensors
    kept = {name: value for name, value in everything.items() if value is not None}
    path.write_bytes(save(kept, {"fastflow.vae": metadata}))


def config(**changes):
    return asdict(CONFIG) | changes


def test_model_round_trip(tmp_path):
    model, _ = trained()
    save_model(tmp_path / "m", model, CONFIG, SHAPE)
    again, settings, shape = load_model(tmp_path / "m", CPU)
    assert settings == CONFIG and shape == SHAPE
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_state_round_trip_continues_alike(tmp_path):
    model, optimizer = trained()
    moments = optimizer_tensors(model, optimizer)
    save_state(tmp_path / "s", State(CONFIG, SHAPE, HISTORY, model.state_dict(), moments, {}))
    state = load_state(tmp_path / "s")
    assert state.history == HISTORY

    again = build(CONFIG, SHAPE)
    again.load_state_dict(state.model)
    optimizer_again = torch.optim.Adam(again.parameters(), lr=0.1)
    restore_optimizer(again, optimizer_again, state.optimizer)
    x, noise = torch.rand(5, 12), torch.randn(5, 2)
    for one, stepper in ((model, optimizer), (again, optimizer_again)):
        stepper.zero_grad()
        negative_elbo(one, x, noise).loss.mean().backward()
        stepper.step()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_state_before_the_first_epoch(tmp_path):
    model = build(CONFIG, SHAPE)
    save_state(tmp_path / "s", State(CONFIG, SHAPE, [], model.state_dict(), {}, {}))
    state = load_state(tmp_path / "s")
    assert state.history == [] and state.optimizer == {}


def test_every_truncation_is_refused(model_file):
    content = model_file.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    for length in {0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(content) - 1}:
        model_file.write_bytes(content[:length])
        with pytest.raises(VaeError, match="damaged"):
            load_model(model_file, CPU)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


FOREIGN = {
    "pickle": pickle.dumps(Bomb()),
    "header of 2^63 bytes": struct.pack("<Q", 1 << 63) + b"{}",
    "no JSON": raw(b"{]"),
    "nested JSON": raw(b"[" * 50_000),
    "offsets outside": raw({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "offsets that overlap": raw(
        {key: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for key in "ab"}, bytes(8)
    ),
    "shape that overflows": raw(
        {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 0]}}
    ),
    "no metadata": save({"a": torch.zeros(2)}),
    "other metadata": save({"a": torch.zeros(2)}, {"format": "pt"}),
}


@pytest.mark.parametrize("content", FOREIGN)
@pytest.mark.parametrize("reader", [lambda path: load_model(path, CPU), load_state])
def test_foreign_files_are_refused(tmp_path, content, reader):
    path = tmp_path / "m.safetensors"
    path.write_bytes(FOREIGN[content])
    with pytest.raises(VaeError, match=r"m\.safetensors"):
        reader(path)


def test_torch_checkpoint_folder_and_missing_file_are_refused(tmp_path):
    torch.save({"a": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(VaeError, match="no safetensors file"):
        load_model(tmp_path / "model.pt", CPU)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(VaeError, match="not a file"):
            load_model(path, CPU)


METADATA = {
    "no JSON": ("{", "malformed JSON"),
    "nested JSON": ("[" * 100_000, "malformed JSON"),
    "a number of many digits": ("9" * 10_000, "malformed JSON"),
    "NaN": ('{"lr": NaN}', "NaN is not a JSON number"),
    "a list": ("[]", "no checkpoint"),
    "state for model": ({"kind": "state/2"}, "is of kind 'state/2', must be 'model/2'"),
    "an earlier schema": ({"kind": "model/1"}, "is of kind 'model/1', must be 'model/2'"),
    "no kind": ({"kind": None}, "is of kind None"),
    "no config": ({"config": None}, "unknown or missing"),
    "config is a list": ({"config": []}, "unknown or missing"),
    "config with more": ({"config": config(extra=1)}, "unknown or missing"),
    "type": ({"config": config(hidden=6.0)}, "must be of type int"),
    "bool for int": ({"config": config(latent=True)}, "must be of type int"),
    "string": ({"config": config(posterior="__import__")}, "must be one of"),
    "negative": ({"config": config(hidden=-6)}, "must be within"),
    "huge": ({"config": config(hidden=1 << 60)}, "must be within"),
    "large but not the file's": ({"config": config(hidden=60_000)}, "must be F32"),
    "other posterior": ({"config": config(posterior="gaussian")}, "not the model's"),
    "no shape": ({"shape": None}, "image shape"),
    "half a shape": ({"shape": [3]}, "image shape"),
    "huge shape": ({"shape": [3, 100000000]}, "image shape"),
    "other shape": ({"shape": [4, 4]}, "must be F32"),
}


@pytest.mark.parametrize("fault", METADATA)
def test_bad_metadata_is_refused(model_file, fault):
    changes, message = METADATA[fault]
    rewrite(model_file, changes)
    with pytest.raises(VaeError, match=message) as refusal:
        load_model(model_file, CPU)
    assert str(refusal.value).startswith(str(model_file))


BIAS = "decoder.0.bias"
TENSORS = {
    "missing": ({BIAS: None}, "first 'decoder.0.bias'"),
    "additional": ({"more": torch.zeros(1)}, "first 'more'"),
    "shape": ({BIAS: torch.zeros(7)}, r"F32 \[7\], must be F32 \[6\]"),
    "type": ({BIAS: torch.zeros(6, dtype=torch.float64)}, r"F64 \[6\], must be F32"),
    "NaN": ({BIAS: torch.full((6,), float("nan"))}, "NaN or infinite"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_bad_tensors_are_refused(model_file, fault):
    changes, message = TENSORS[fault]
    rewrite(model_file, **changes)
    with pytest.raises(VaeError, match=message):
        load_model(model_file, CPU)


HISTORIES = {
    "missing": None,
    "no list": {},
    "no record": [1],
    "gap": [HISTORY[0] | {"epoch": 2}],
    "keys": [{"epoch": 1}],
    "text": [HISTORY[0] | {"elbo": "0"}],
    "shorter than the optimizer's": [],
}


@pytest.mark.parametrize("fault", HISTORIES)
def test_bad_history_is_refused(tmp_path, fault):
    model, optimizer = trained()
    path = tmp_path / "state.safetensors"
    moments = optimizer_tensors(model, optimizer)
    save_state(path, State(CONFIG, SHAPE, HISTORY, model.state_dict(), moments, {}))
    rewrite(path, {"history": HISTORIES[fault]})
    with pytest.raises(VaeError, match=r"state\.safetensors: "):
        load_state(path)


AUTOREGRESSIVE = replace(CONFIG, posterior="iaf", width=4, context=3, validation=5)


def test_state_with_buffers_and_a_best_model(tmp_path):
    model, best = (build(replace(AUTOREGRESSIVE, seed=seed), SHAPE) for seed in (0, 1))
    record = HISTORY[0] | {"validation_loss": 0.25}
    moments = {
        f"{name}.{moment}": torch.ones(()) if moment == "step" else torch.ones_like(parameter)
        for name, parameter in model.named_parameters()
        for moment in ADAM
    }
    tensors = model.state_dict(), moments, best.state_dict()
    save_state(tmp_path / "s", State(AUTOREGRESSIVE, SHAPE, [record], *tensors))
    state = load_state(tmp_path / "s")
    assert state.history == [record]
    for read, written in zip((state.model, state.optimizer, state.best), tensors, strict=True):
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) for name in read)
    assert state.model["posterior.bijection.bijections.1.network.order"].dtype == torch.int64

    rewrite(tmp_path / "s", {"history": HISTORY})
    with pytest.raises(VaeError, match="the record of its epochs is malformed"):
        load_state(tmp_path / "s")
    rewrite(tmp_path / "s", {"history": [record]}, **{f"best.{BIAS}": None})
    with pytest.raises(VaeError, match=r"first 'best\.decoder"):
        load_state(tmp_path / "s")


def test_an_order_that_is_none_is_refused(tmp_path):
    path = tmp_path / "m"
    save_model(path, build(AUTOREGRESSIVE, SHAPE), AUTOREGRESSIVE, SHAPE)
    order = "posterior.bijection.bijections.0.network.order"
    for value, message in (
        (torch.tensor([0, 0]), "must hold each of 0 .. 1 once"),
        (torch.tensor([0.0, 1.0]), r"F32 \[2\], must be I64 \[2\]"),
    ):
        rewrite(path, **{order: value})
        with pytest.raises(VaeError, match=message) as refusal:
            load_model(path, CPU)
        assert str(refusal.value).startswith(str(path)) and "\n" not in str(refusal.value)


def test_settings_that_build_no_model_are_refused(model_file):
    rewrite(model_file, {"config": config(network="conv")})
    with pytest.raises(VaeError, match="conv needs images of at least 8 x 8") as refusal:
        load_model(model_file, CPU)
    assert str(refusal.value).startswith(str(model_file))
