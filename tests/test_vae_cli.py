"""The command line: exit codes, one line per error, files, and runs that are interrupted."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from vae_command import COMMAND, call, complaint
from vae_files import NAMES, SHAPE, idx_bytes, random_images

from fastflow import vae
from fastflow.vae import Config, build
from fastflow.vae.checkpoint import save_model
from fastflow.vae.run_folder import FILES

TINY = ["--hidden", "8", "--epochs", "1", "--importance-samples", "4", "--device", "cpu"]
FEW_PICTURES = ["--latent", "5"]  # runs of 2 latents have more of them, which take time


# tiny models only lose time to threads, and the command line sets their number, if told to
pytestmark = pytest.mark.usefixtures("one_thread")


def train(images, out, *words):
    data = ("--data", "mnist", "--data-root", images)
    return call("train", *TINY, "--out", out, *data, *words)


@pytest.mark.usefixtures("no_pictures")
def test_the_run_folder_has_a_default(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*TINY, "--posterior", "planar", "--data", "mnist", "--data-root", images]
    assert call("train", *words) == 0
    assert (tmp_path / "runs" / "planar-mnist" / "model.safetensors").is_file()


def wait_for_epochs(process, folder, count):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        table = folder / "metrics.csv"
        if table.is_file() and len(table.read_text().splitlines()) > count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended or hung before epoch {count}")


@pytest.mark.usefixtures("no_pictures")
def test_killed_and_interrupted_runs_end_like_an_unbroken_one(tmp_path, capsys):
    pytest.importorskip("sklearn")
    settings = ["--posterior", "planar", "--epochs", "12", "--hidden", "20", "--seed", "3"]
    settings += ["--importance-samples", "8"]
    words = ["train", *settings, "--threads", "1", "--device", "cpu", "--out"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call(*words, whole) == 0
    said = capsys.readouterr()
    assert said.out.count("images/s") == 12 and "test: -ELBO" in said.out and said.err == ""

    broken.mkdir()
    for count, number, code in ((2, signal.SIGKILL, -signal.SIGKILL), (5, signal.SIGINT, 130)):
        process = subprocess.Popen(
            [*COMMAND, *words, broken, "--resume"],
            stderr=subprocess.PIPE,
            text=True,
            # shells ignore it in what they run in the background, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        wait_for_epochs(process, broken, count)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        if number == signal.SIGINT:
            assert errors == "fastflow.vae: interrupted; train --resume continues a run\n"
    assert call("train", "--out", broken, "--resume", "--device", "cpu") == 0
    for name in ("metrics.json", "metrics.csv", "model.safetensors", "state.safetensors"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}

    epochs = json.loads((whole / "metrics.json").read_text())["epochs"]
    assert epochs[-1]["train_loss"] < 0.9 * epochs[0]["train_loss"]
    assert epochs[-1]["test_loss"] < 0.95 * epochs[0]["test_loss"]


def test_error_in_a_process_of_its_own(tmp_path):
    out = tmp_path / "out"
    words = [*COMMAND, "train", "--data", "mnist", "--colour", "red", "--out", out]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and not out.exists()
    assert done.stderr.startswith("fastflow.vae: error: unrecognized arguments: --colour red")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("form", [["--amortised"], ["--shared"], ["--posterior", "gaussian"]])
def test_train_and_sample(tmp_path, images, form, capsys):
    words = form if "--posterior" in form else ["--posterior", "planar", *form]
    assert train(images, tmp_path / "run", *words) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(FILES)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["amortised"] == ("--shared" not in form)
    model = tmp_path / "run" / "model.safetensors"
    capsys.readouterr()
    for more in ([], ["--manifold", "--grid", "3"], ["--seed", "1"]):
        picture = tmp_path / f"{len(more)}.png"
        assert call("sample", "--checkpoint", model, "--out", picture, *more) == 0
        assert capsys.readouterr() == (f"{picture}\n", "")
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "0.png").read_bytes() != (tmp_path / "2.png").read_bytes()


def test_same_seed_same_metrics(tmp_path, images):
    for name in ("a", "b"):
        words = ["--posterior", "planar", "--seed", "5", *FEW_PICTURES]
        assert train(images, tmp_path / name, *words) == 0
    for name in {path.name for path in (tmp_path / "b").iterdir()} - {"timing.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_gaussian_likelihood_dynamic_binarisation_and_more_latents(tmp_path, images):
    words = ["--likelihood", "gaussian", "--variance", "0.2", *FEW_PICTURES]
    assert train(images, tmp_path / "g", *words) == 0
    assert train(images, tmp_path / "b", "--binarise", "dynamic", *FEW_PICTURES) == 0
    assert not (tmp_path / "b" / "posterior.png").exists()


def test_resume_of_nothing_is_refused_and_of_a_finished_run_changes_nothing(
    tmp_path, images, capsys
):
    out = tmp_path / "run"
    assert train(images, out, "--resume", *FEW_PICTURES) == 2
    assert f"error: {out}: does not exist, --resume has nothing to continue" in complaint(capsys)
    assert not out.exists()
    out.mkdir()  # as a run leaves it that is killed at once
    assert train(images, out, "--resume", *FEW_PICTURES) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert call("train", "--out", out, "--data-root", images, "--resume", "--device", "cpu") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


USAGE = {
    "no command": ([], "required: command"),
    "unknown command": (["frain"], "invalid choice: 'frain'"),
    "abbreviated": (["train", "--out", "x", "--epoch", "3"], "unrecognized arguments: --epoch"),
    "posterior": (["train", "--out", "x", "--posterior", "best"], "invalid choice: 'best'"),
    "data": (["train", "--out", "x", "--data", "cifar"], "invalid choice: 'cifar'"),
    "text for a number": (["train", "--out", "x", "--epochs", "ten"], "invalid int value"),
    "both forms": (["train", "--out", "x", "--shared", "--amortised"], "not allowed with"),
    "no epochs": (["train", "--out", "x", "--epochs", "0"], "epochs: 0 must be within"),
    "no images": (["train", "--out", "x", "--batch-size", "0"], "batch_size: 0 must be within"),
    "learning rate": (["train", "--out", "x", "--lr", "nan"], "lr: nan must be positive"),
    "seed": (["train", "--out", "x", "--seed", "-1"], "seed: -1 must be within"),
    "threads": (["train", "--out", "x", "--threads", "0"], "--threads: must be at least 1"),
    "too many threads": (["train", "--threads", "9" * 20], "--threads: must be at most 4096, not"),
    "a huge grid": (
        ["sample", "--out", "x.png", "--checkpoint", "y", "--grid", "10000000"],
        "--grid: must be at most 256, not 10000000",
    ),
    "grid": (["sample", "--out", "x.png", "--checkpoint", "y", "--grid", "0"], "--grid: must be"),
    "no checkpoint": (["sample", "--out", "x.png", "--checkpoint", "y"], "y: not a file"),
    "suffix": (["sample", "--out", "a/x.jpg", "--checkpoint", "y"], "end in .png, not 'x.jpg'"),
    "no suffix": (["sample", "--out", "x", "--checkpoint", "y"], "must end in .png, not 'x'"),
    "steps": (
        ["train", "--out", "x", "--steps", "3"],
        "--steps 3 has no effect with --posterior gaussian, it needs --posterior planar",
    ),
    "constraint": (["train", "--out", "x", "--constraint", "paper"], "paper has no effect"),
    "shared": (["train", "--out", "x", "--shared"], "--shared has no effect with"),
    "variance": (
        ["train", "--out", "x", "--posterior", "planar", "--variance", "1"],
        "--variance 1.0 has no effect with --likelihood bernoulli",
    ),
    "data root": (["train", "--out", "x", "--data-root", "y"], "--data-root has no effect with"),
}


@pytest.mark.parametrize("fault", USAGE)
def test_usage_errors(tmp_path, monkeypatch, capsys, fault):
    words, message = USAGE[fault]
    monkeypatch.chdir(tmp_path)
    assert call(*words) == 2
    assert message in complaint(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device(tmp_path, capsys):
    assert call("train", "--out", tmp_path / "x", "--device", "cuda") == 2
    assert "finds no CUDA device" in complaint(capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("no_pictures")
def test_folder_with_a_run_is_refused_and_left_alone(tmp_path, images, capsys):
    out = tmp_path / "run"
    assert train(images, out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert train(images, out) == 2
    assert "already holds a run; --resume continues it" in complaint(capsys)
    assert train(images, out, "--resume", "--seed", "1") == 2
    assert "its run has --seed 0, not --seed 1" in complaint(capsys)
    assert train(images, out, "--resume", "--steps", "3") == 2  # what its settings say, unused
    assert "--steps 3 has no effect with --posterior gaussian" in complaint(capsys)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_damaged_data_starts_no_run(tmp_path, images, capsys):
    (images / NAMES["test"]).write_bytes(idx_bytes(random_images(12))[:-3])
    assert train(images, tmp_path / "run") == 2
    assert "promises 240 bytes of pixels, it holds only 237" in complaint(capsys)
    assert not (tmp_path / "run").exists()


def test_no_data_names_both_ways_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert train(tmp_path / "nowhere", tmp_path / "run") == 2
    error = complaint(capsys)
    assert "--data-root" in error and "install torchvision" in error
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_written(tmp_path, images, capsys):
    (tmp_path / "file").write_text("in the way")
    assert train(images, tmp_path / "file") == 2
    assert "is not a folder" in complaint(capsys)
    assert train(images, tmp_path / "file" / "run") == 2
    assert "Not a directory" in complaint(capsys)
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk(tmp_path, images, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastflow.vae.files.os.fsync", full)
    assert train(images, tmp_path / "run") == 2
    assert "No space left on device" in complaint(capsys)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.usefixtures("no_pictures")
def test_damaged_checkpoints_are_refused(tmp_path, images, capsys):
    out = tmp_path / "run"
    assert train(images, out) == 0
    capsys.readouterr()
    for name in ("model.safetensors", "state.safetensors"):
        (out / name).write_bytes((out / name).read_bytes()[:-5])
    picture = tmp_path / "grid.png"
    assert call("sample", "--checkpoint", out / "model.safetensors", "--out", picture) == 2
    assert "model.safetensors: damaged" in complaint(capsys)
    assert not picture.exists()
    assert train(images, out, "--resume") == 2
    assert "state.safetensors: damaged" in complaint(capsys)
    (out / "state.safetensors").unlink()
    assert train(images, out, "--resume") == 2
    assert "no state.safetensors to resume from" in complaint(capsys)


@pytest.mark.usefixtures("no_pictures")
def test_commands_take_run_folders_and_checkpoints(tmp_path, images, capsys):
    run, other, picture = tmp_path / "runs" / "a", tmp_path / "b", tmp_path / "grid.png"
    assert train(images, run) == 0
    capsys.readouterr()
    model, root = run / "model.safetensors", ("--data-root", images, "--device", "cpu")
    said = []
    for path in (run, model):
        assert call("sample", "--checkpoint", path, "--out", picture) == 0
        said.append((picture.read_bytes(), capsys.readouterr().out))
        assert call("evaluate", "--checkpoint", path, *root, "--samples", "2") == 0
        said[-1] += (capsys.readouterr().out,)
        assert call("plot", "--runs", path, *root) == 0
        said[-1] += (capsys.readouterr().out,)
        decoder = ("--decoder", path, "--posteriors", "gaussian", "--images", "1", *root)
        words = ("true-posterior", *decoder, "--iterations", "2", "--out", tmp_path / path.name)
        assert call(*words) == 0
        capsys.readouterr()
    assert said[0] == said[1] and said[0][-1] == f"{run}\n"

    other.mkdir()
    (other / "model.safetensors").write_bytes(model.read_bytes())
    for path, reason in (
        (tmp_path / "runs", "runs: is no run folder, it has no model.safetensors, but a in it"),
        (tmp_path / "nowhere", "nowhere: "),
        (images, "images: is no run folder, it has no model.safetensors"),
    ):
        for command in (["sample", "--out", picture], ["evaluate"]):
            assert call(*command, "--checkpoint", path) == 2
            assert reason.partition(", but")[0] in complaint(capsys)
        assert call("true-posterior", "--out", tmp_path / "x", "--decoder", path) == 2
        assert reason.partition(", but")[0] in complaint(capsys)
        assert call("plot", "--runs", run, path) == 2  # before anything is drawn
        assert reason.partition(", but")[0] in complaint(capsys)
    assert call("plot", "--runs", tmp_path / "runs") == 2
    assert ", but a in it" in complaint(capsys)
    for path in (other, other / "model.safetensors"):
        assert call("plot", "--runs", path) == 2
        assert "b: is no run folder, it has no config.json and no metrics.json" in complaint(capsys)
    for record in (1, {}, {"epoch": 1}):
        (run / "metrics.json").write_text(json.dumps({"epochs": [record], "test": {}}))
        assert call("plot", "--runs", run, *root) == 2
        assert "metrics.json: the record of its epochs is malformed" in complaint(capsys)
    assert call("plot", "--runs", run / "config.json") == 2
    assert "is neither a run folder nor the model.safetensors of one" in complaint(capsys)


@pytest.mark.usefixtures("no_pictures")
def test_manifold_of_other_latent_sizes(tmp_path, images, capsys):
    assert train(images, tmp_path / "run", "--latent", "3") == 0
    capsys.readouterr()
    words = ["--checkpoint", tmp_path / "run" / "model.safetensors", "--out", tmp_path / "g.png"]
    assert call("sample", *words, "--manifold") == 2
    assert "--manifold needs 2 latents" in complaint(capsys)


def test_the_seed_of_a_sample_is_one_of_a_run(tmp_path, capsys):
    model = tmp_path / "model.safetensors"
    save_model(model, build(Config(hidden=4), SHAPE), Config(hidden=4), SHAPE)
    words = ["sample", "--checkpoint", model, "--out", tmp_path / "grid.png", "--seed"]
    for seed in (-1, 1 << 63):
        assert call(*words, seed) == 2
        assert f"seed: {seed} must be within 0 and {(1 << 63) - 1}" in complaint(capsys)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("package", ["safetensors", "matplotlib.axes", "tqdm"])
def test_missing_package_is_named(tmp_path, images, capsys, monkeypatch, package):
    for name in (
        "training",
        "run_folder",
        "checkpoint",
        "figures",
        "plots",
        "contours",
        "pictures",
    ):
        # forget what was imported already
        monkeypatch.delitem(sys.modules, f"fastflow.vae.{name}", raising=False)
        monkeypatch.delattr(vae, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert train(images, tmp_path / "run") == 2
    error = complaint(capsys)
    assert package in error and "pip install 'fastflow[vae]'" in error
    assert not (tmp_path / "run").exists()
