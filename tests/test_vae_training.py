"""Training in this process: determinism, and a kill at every single write."""

import csv
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from vae_files import write_images

from fastflow.vae import (
    Config,
    ImageData,
    VaeError,
    build,
    checkpoint,
    contours,
    evaluate,
    files,
    load,
    steps,
    training_loss,
)
from fastflow.vae.checkpoint import load_model
from fastflow.vae.run_folder import FILES, STATE_FILE, find_state
from fastflow.vae.training import Run, best_epoch

CPU = torch.device("cpu")
CONFIG = Config(
    posterior="planar", data="mnist", hidden=8, epochs=3, batch_size=20, importance_samples=4
)

EVERYTHING = {  # all that has a random stream or a state of its own
    "binarise": "dynamic",
    "schedule": "cosine",
    "kl_warmup": 2,
    "free_bits": 0.5,
    "validation": 9,
    "patience": 2,
}
OVERFITTING = replace(CONFIG, lr=0.05, epochs=30, validation=9, patience=2)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may handle it."""


pytestmark = pytest.mark.usefixtures("one_thread")  # tiny models only lose time to more


@pytest.fixture
def data(tmp_path):
    return load("mnist", write_images(tmp_path / "data"))


def silent(line):
    pass


def train(folder, config, data):
    run = Run.start(folder, config, data, CPU)
    run.train(silent)
    return run


def resume(folder, settings, data):
    state = find_state(folder, settings)
    if state is None:
        return train(folder, Config(**settings), data)
    run = Run.resume(folder, state, data, CPU)
    run.train(silent)
    return run


def contents(folder):
    """All files but the one that holds the clock's word."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timing.json"}


def test_same_seed_same_bytes(tmp_path, data):
    train(tmp_path / "a", CONFIG, data)
    torch.rand(7)  # the global random state plays no part
    train(tmp_path / "b", CONFIG, data)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    train(tmp_path / "c", Config(**asdict(CONFIG) | {"seed": 1}), data)
    first, other = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in "ac")
    assert first["epochs"][0]["train_loss"] != other["epochs"][0]["train_loss"]


def test_every_epoch_has_all_images_in_an_order_and_with_noise_of_its_own(tmp_path, data):
    config = Config(**asdict(CONFIG) | {"binarise": "none", "batch_size": 20})
    run = Run.start(tmp_path / "run", config, data, CPU)
    epochs = [[torch.cat(parts) for parts in zip(*run._batches(epoch))] for epoch in (1, 2, 1)]
    for images, _ in epochs:
        assert sorted(images.tolist()) == sorted(data.train.tolist())
    (order_1, noise_1), (order_2, noise_2), again = epochs
    assert not torch.equal(order_1, order_2) and not torch.equal(noise_1, noise_2)
    assert torch.equal(order_1, again[0]) and torch.equal(noise_1, again[1])
    assert noise_1.unique().numel() == noise_1.numel()  # batches do not share their noise


def test_dynamic_binarisation_draws_anew_every_epoch_but_not_the_test_images(tmp_path, data):
    config = Config(**asdict(CONFIG) | {"binarise": "dynamic", "batch_size": 45})
    data = data._replace(train=torch.full_like(data.train, 0.5))
    run = Run.start(tmp_path / "run", config, data, CPU)
    (first, _), (second, _) = (next(run._batches(epoch)) for epoch in (1, 2))
    test = run.data.test
    for images in (first, second, test):
        assert ((images == 0) | (images == 1)).all()
    assert not torch.equal(first, second)
    assert torch.equal(test, run.data.test)


@pytest.mark.parametrize("moment", ["before the rename", "after the rename", "half-way"])
def test_a_kill_at_any_write_is_resumed_to_the_same_run(tmp_path, data, monkeypatch, moment):
    settings = asdict(CONFIG) | EVERYTHING
    train(tmp_path / "whole", Config(**settings), data)
    expected = contents(tmp_path / "whole")
    write = files.write_bytes
    writes = 0

    def killed_write(path, content):
        nonlocal writes
        writes += 1
        if writes == fatal:
            if moment == "half-way":  # a killed process cannot clean up
                path.with_name(f".{path.name}.1.tmp").write_bytes(content[: len(content) // 2])
            elif moment == "after the rename":
                write(path, content)
            raise Killed
        write(path, content)

    monkeypatch.setattr(files, "write_bytes", killed_write)
    monkeypatch.setattr(checkpoint, "write_bytes", killed_write)
    fatal = 0
    while True:
        fatal, writes = fatal + 1, 0
        folder = tmp_path / str(fatal)
        try:
            train(folder, Config(**settings), data)
        except Killed:
            writes = fatal  # no further kill
            resume(folder, settings, data)
            assert contents(folder) == expected, f"killed at write {fatal}"
        else:
            break
    assert fatal > 3 * len(expected)  # every file of every epoch was hit


def test_more_epochs_continue_a_finished_run(tmp_path, data):
    train(tmp_path / "whole", CONFIG, data)
    train(tmp_path / "parts", Config(**asdict(CONFIG) | {"epochs": 1}), data)
    resume(tmp_path / "parts", {"epochs": 3}, data)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_more_epochs_of_another_schedule_are_refused(tmp_path, data):
    train(tmp_path / "run", replace(CONFIG, schedule="cosine"), data)
    with pytest.raises(VaeError, match="its run has --epochs 3, not --epochs 4"):
        find_state(tmp_path / "run", {"epochs": 4})


def test_early_stopping_keeps_the_best_epoch(tmp_path, data):
    run = train(tmp_path / "run", OVERFITTING, data)
    losses = [record["validation_loss"] for record in run.history]
    best = best_epoch(run.history)
    assert losses[best - 1] == min(losses) and len(losses) == best + 2 < OVERFITTING.epochs
    upto = train(tmp_path / "upto", replace(OVERFITTING, epochs=best, patience=0), data)
    kept, _, _ = load_model(tmp_path / "run" / "model.safetensors", CPU)
    for name, value in kept.state_dict().items():
        assert torch.equal(value, upto.model.state_dict()[name])
    last = run.model.state_dict()
    assert any(not torch.equal(value, last[name]) for name, value in kept.state_dict().items())

    test = run.finish()
    assert test["epoch"] == best
    expected = evaluate(kept, data.test, run._generator("evaluation"), 4)
    assert expected.items() <= test.items()


def test_a_run_with_early_stopping_is_resumed_from_every_epoch(tmp_path, data):
    whole = train(tmp_path / "whole", OVERFITTING, data)
    last, best = len(whole.history), best_epoch(whole.history)
    for fatal in {1, best, best + 1, last}:

        def killed(line, fatal=fatal):
            if line.startswith(f"epoch {fatal}/"):
                raise Killed

        folder = tmp_path / str(fatal)
        with pytest.raises(Killed):
            Run.start(folder, OVERFITTING, data, CPU).train(killed)
        resume(folder, asdict(OVERFITTING), data)
        assert contents(folder) == contents(tmp_path / "whole")
    lines = []
    Run.resume(folder, find_state(folder, {}), data, CPU).train(lines.append)
    assert lines == [f"stopped early, the best epoch was {best_epoch(whole.history)}"]
    assert contents(folder) == contents(tmp_path / "whole")


def test_schedules_and_free_bits_reach_the_optimizer(tmp_path, data, monkeypatch):
    seen = []

    def noted(terms, weight, free_bits):
        seen.append((run.optimizer.param_groups[0]["lr"], weight.item(), free_bits))
        return training_loss(terms, weight, free_bits)

    monkeypatch.setattr(steps, "training_loss", noted)
    config = replace(CONFIG, batch_size=45, schedule="cosine", kl_warmup=2, free_bits=0.25)
    run = Run.start(tmp_path / "run", config, data, CPU)
    run.train(silent)
    rates = [CONFIG.lr * 0.5 * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert seen == [(rates[0], 0.5, 0.25), (rates[1], 1, 0.25), (rates[2], 1, 0.25)]
    for record in run.history:  # what is recorded is -ELBO, whatever was minimised
        assert record["train_loss"] == pytest.approx(record["reconstruction"] + record["kl"])


def test_static_binarisation_is_the_same_in_every_epoch(tmp_path, data):
    config = replace(CONFIG, binarise="static", batch_size=45)
    run = Run.start(tmp_path / "run", config, data, CPU)
    (first, _), (second, _) = (next(run._batches(epoch)) for epoch in (1, 2))
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(run.data.train.tolist())


@pytest.mark.parametrize("posterior", ["iaf", "maf"])
def test_flows_with_buffers_and_convolutions_are_resumed(tmp_path, posterior):
    images = torch.rand(30, 64, generator=torch.Generator().manual_seed(0))
    data = ImageData(images, images[:9], (8, 8))
    config = replace(CONFIG, posterior=posterior, network="conv", width=4, context=3)
    train(tmp_path / "whole", config, data)
    train(tmp_path / "parts", replace(config, epochs=1), data)
    resume(tmp_path / "parts", {"epochs": 3}, data)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_files_agree(tmp_path, data):
    run = train(tmp_path / "run", CONFIG, data)
    test = run.finish()
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test"] == test
    assert [record["epoch"] for record in metrics["epochs"]] == [1, 2, 3]
    for record in metrics["epochs"]:
        assert record["elbo"] == -record["train_loss"]
        assert record["train_loss"] == pytest.approx(record["reconstruction"] + record["kl"])
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in rows] == metrics["epochs"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.items() >= asdict(CONFIG).items()
    for name in FILES:
        if name.endswith(".png"):
            assert (tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("posterior", ["gaussian", "planar"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_pictures_of_posteriors_share_their_axes(tmp_path, data, monkeypatch, posterior, count):
    figures, centres, contour = [], [], contours._contour

    def noted(axes, points, *rest, **more):
        centres.append(points.mean((0, 1)).tolist())
        contour(axes, points, *rest, **more)

    monkeypatch.setattr(contours, "save_figure", lambda figure, path: figures.append(figure))
    monkeypatch.setattr(contours, "_contour", noted)
    model = build(replace(CONFIG, posterior=posterior), data.shape)
    with torch.no_grad():
        model.posterior.mean.weight *= 50  # far from each other
    generator = torch.Generator().manual_seed(0)
    contours.draw_posterior(tmp_path / "p.png", model, data.test, data.shape, generator, count)
    panels = figures[0].axes[count:]
    assert len(panels) == count
    (limits,) = {(*axes.get_xlim(), *axes.get_ylim()) for axes in panels}
    left, right, bottom, top = limits
    assert all(left < z_1 < right and bottom < z_2 < top for z_1, z_2 in centres)


def test_other_latent_sizes_have_no_posterior_picture(tmp_path, data):
    config = Config(**asdict(CONFIG) | {"latent": 3, "epochs": 1, "posterior": "gaussian"})
    train(tmp_path / "run", config, data).finish()
    missing = set(FILES) - {path.name for path in (tmp_path / "run").iterdir()}
    assert missing == {"posterior.png", "manifold.png"}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data):
    config = Config(**asdict(CONFIG) | {"lr": 1e18})
    with pytest.raises(VaeError, match="epoch 1: the loss is not finite"):
        train(tmp_path / "run", config, data)
    assert find_state(tmp_path / "run", {}).history == []


def test_bad_images_start_no_run(tmp_path, data):
    data.train[3, 4] = math.nan
    with pytest.raises(VaeError, match="train images range"):
        Run.start(tmp_path / "run", CONFIG, data, CPU)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(tmp_path, data):
    train(tmp_path / "run", CONFIG, data)
    before = contents(tmp_path / "run")
    with pytest.raises(VaeError, match="already holds a run; --resume continues it"):
        Run.start(tmp_path / "run", CONFIG, data, CPU)
    (tmp_path / "run" / STATE_FILE).unlink()
    with pytest.raises(VaeError, match=r"but no state\.safetensors"):
        find_state(tmp_path / "run", {})
    (tmp_path / "run" / STATE_FILE).write_bytes(before[STATE_FILE])
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"posterior": "gaussian"}, "--posterior planar, not --posterior gaussian"),
        ({"seed": 4}, "--seed 0, not --seed 4"),
        ({"batch_size": 7}, "--batch-size 20, not --batch-size 7"),
        ({"amortised": False}, "has --amortised, not --shared"),
        ({"epochs": 2}, "has 3 epochs already, --epochs is 2"),
    ],
)
def test_other_settings_are_not_resumed(tmp_path, data, settings, message):
    train(tmp_path / "run", CONFIG, data)
    with pytest.raises(VaeError, match=message):
        find_state(tmp_path / "run", settings)


def test_other_images_are_not_resumed(tmp_path, data):
    train(tmp_path / "run", CONFIG, data)
    state = find_state(tmp_path / "run", {})
    turned = data._replace(shape=(4, 5))
    with pytest.raises(VaeError, match=r"images are \(4, 5\)"):
        Run.resume(tmp_path / "run", state, turned, CPU)


def test_each_epoch_is_reported_with_loss_and_rate(tmp_path, data):
    lines = []
    Run.start(tmp_path / "run", CONFIG, data, CPU).train(lines.append)
    assert len(lines) == CONFIG.epochs
    for epoch, line in enumerate(lines, start=1):
        assert line.startswith(f"epoch {epoch}/3  loss ") and line.endswith(" images/s")
