"""Comparisons: every posterior and seed a run, kills and resumption, the table, evaluate, plot."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("tabulate")
from vae_command import COMMAND, call, complaint
from vae_files import SHAPE

from fastflow.vae import Config, build, commands, evaluate, evaluation, jobs
from fastflow.vae.checkpoint import save_model
from fastflow.vae.compare import concerning
from fastflow.vae.summary import Row, read_result, render, summarise

TINY = ["--hidden", "6", "--epochs", "2", "--importance-samples", "4", "--device", "cpu"]
TINY += ["--latent", "3"]  # those of 2 latents have more pictures, which take time
DERIVED = ("compare.json", "compare.csv", "compare.md", "timing.json")  # have times in them

pytestmark = pytest.mark.usefixtures("one_thread")


def compare(images, out, *words):
    return call("compare", *TINY, "--data", "mnist", "--data-root", images, "--out", out, *words)


def contents(folder):
    """All files but those with times in them."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in DERIVED
    }


def without_times(folder):
    rows = json.loads((folder / "compare.json").read_text())
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_a_comparison_is_its_runs(tmp_path, images, capsys):
    out = tmp_path / "out"
    words = ["--posteriors", "gaussian", "planar", "--seeds", "3", "5", "--steps", "2"]
    assert compare(images, out, *words) == 0
    printed = capsys.readouterr().out
    assert (out / "compare.md").read_text().split("\n\n")[0] in printed
    assert printed.count("images/s") == 8

    words = ["--data", "mnist", "--data-root", images, "--out", tmp_path / "alone"]
    assert call("train", *TINY, "--posterior", "planar", "--steps", "2", "--seed", "5", *words) == 0
    assert contents(tmp_path / "alone") == contents(out / "planar-seed5")
    config = json.loads((out / "gaussian-seed3" / "config.json").read_text())
    assert config["posterior"] == "gaussian" and config["steps"] == Config.steps  # not its business

    rows = json.loads((out / "compare.json").read_text())
    assert [row["posterior"] for row in rows] == ["gaussian", "planar"]
    for row in rows:
        tests = [read_result(out / f"{row['posterior']}-seed{seed}").test for seed in (3, 5)]
        for name in ("negative_elbo", "negative_log_likelihood"):
            values = [test[name] for test in tests]
            assert row[name] == mean(values)
            error = stdev(values) / math.sqrt(2)
            assert row[f"{name}_error_over_seeds"] == pytest.approx(error)
            errors = [test[f"{name}_error"] for test in tests]
            assert row[f"{name}_error_over_images"] == mean(errors)
        assert row["seconds_per_step"] > 0
    gain = rows[0]["negative_log_likelihood"] - rows[1]["negative_log_likelihood"]
    assert rows[1]["gain"] == pytest.approx(gain) and rows[0]["gain"] == 0
    with (out / "compare.csv").open() as file:
        assert [float(row["gain"]) for row in csv.DictReader(file)] == [r["gain"] for r in rows]
    for name in ("learning_curves.png", "reconstructions.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_pictures")
def test_more_posteriors_and_seeds_join_and_finished_runs_stay(tmp_path, images, capsys):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    more = ["--posteriors", "planar", "gaussian", "--seeds", "0", "1"]
    assert compare(images, whole, *more) == 0
    assert compare(images, grown, "--posteriors", "gaussian") == 0
    times = (grown / "gaussian-seed0" / "timing.json").read_bytes()
    capsys.readouterr()
    assert call("compare", "--out", grown, "--data-root", images, "--resume", *more) == 0
    assert "gaussian-seed0: finished before" in capsys.readouterr().out
    assert contents(grown) == contents(whole) and without_times(grown) == without_times(whole)
    assert (grown / "gaussian-seed0" / "timing.json").read_bytes() == times


@pytest.mark.usefixtures("no_pictures")
def test_more_epochs_continue_the_runs(tmp_path, images):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert compare(images, whole, "--posteriors", "gaussian") == 0
    assert compare(images, parts, "--posteriors", "gaussian", "--epochs", "1") == 0
    words = ["--out", parts, "--data-root", images, "--resume", "--epochs", "2"]
    assert call("compare", *words) == 0
    assert contents(parts) == contents(whole)


@pytest.mark.usefixtures("no_pictures")
def test_a_killed_comparison_of_two_jobs_ends_like_an_unbroken_one_of_one_job(tmp_path, images):
    settings = ["--posteriors", "gaussian", "planar", "--hidden", "20", "--epochs", "12"]
    settings += ["--data", "mnist", "--importance-samples", "4", "--latent", "3"]
    common = ["--data-root", str(images), "--device", "cpu", "--threads", "1"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert call("compare", *settings, *common, "--out", whole) == 0
    process = subprocess.Popen(
        [*COMMAND, "compare", *settings, *common, "--jobs", "2", "--out", broken],
        stdout=subprocess.PIPE,
    )
    for _ in range(5):  # lines: in the middle of a run, or of both
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert call("compare", "--out", broken, "--resume", *common) == 0
    assert contents(broken) == contents(whole) and without_times(broken) == without_times(whole)


def test_children_end_with_a_parent_that_is_killed(tmp_path, images):
    words = [*COMMAND, "compare", *TINY, "--epochs", "1000000", "--jobs", "2", "--threads", "1"]
    words += ["--posteriors", "gaussian", "planar", "--data", "mnist", "--data-root", str(images)]
    process = subprocess.Popen([*words, "--out", tmp_path / "out"], stdout=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # returns when nobody holds its stdout any more
    tables = [tmp_path / "out" / f"{name}-seed0" / "metrics.csv" for name in ("gaussian", "planar")]
    before = [table.read_bytes() for table in tables if table.exists()]
    time.sleep(0.5)
    assert before == [table.read_bytes() for table in tables if table.exists()]


@pytest.mark.parametrize("moment", ["at the start", "in training"])
def test_an_interrupt_ends_all_jobs_without_a_trace(tmp_path, images, moment):
    """Ctrl-C reaches every process of a terminal; one of them speaks, none leaves a semaphore."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "fastflow.vae", "compare", *TINY, "--epochs", "1000000"]
    words += ["--posteriors", "gaussian", "planar", "--data", "mnist", "--data-root", str(images)]
    process = subprocess.Popen(
        [*words, "--jobs", "2", "--threads", "1", "--out", out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # shells ignore it in what they run in the background, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if moment == "in training":
        names = set()
        while len(names) < 2:  # lines: both have trained an epoch
            names.add(process.stdout.readline().partition(":")[0])
    else:
        deadline = time.monotonic() + 120
        while not (out / "settings.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.5)  # the children import torch, which takes longer
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == "fastflow.vae: interrupted; compare --resume continues a run\n"


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_fails_does_not_end_the_others(tmp_path, images, monkeypatch, capsys):
    start = jobs.Run.start

    def fail_for_planar(folder, config, *rest):
        run = start(folder, config, *rest)
        if config.posterior == "planar":
            run.model.decoder[0].weight.data.fill_(math.inf)
        return run

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(jobs.Run, "start", fail_for_planar)
        assert compare(images, out, "--posteriors", "planar", "gaussian") == 2
    error = complaint(capsys)
    assert "1 of 2 runs failed, first planar-seed0: epoch 1: the loss is not finite" in error
    assert read_result(out / "gaussian-seed0").test and not (out / "compare.json").exists()
    assert call("compare", "--out", out, "--data-root", images, "--resume") == 0


def test_a_comparison_without_images_writes_nothing(tmp_path, images, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    out = tmp_path / "out"
    assert compare(images / "nowhere", out) == 2
    assert "mnist: not all files are in" in complaint(capsys)
    assert not out.exists()


def child(connection, task, threads):
    """Stands for a process that may end without a word."""
    if task.folder.name == "dead":
        os._exit(7)
    jobs._perform(task, connection.send, bars=False)


def test_children_that_fail_or_die_are_failures(tmp_path, images, monkeypatch, capfd):
    monkeypatch.setattr(jobs, "_child", child)
    settings = {"data": "mnist", "validation": 10_000}
    folders = [tmp_path / name for name in ("failing", "dead")]
    tasks = [jobs.Task(folder, settings, images, torch.device("cpu")) for folder in folders]
    lines = []
    with jobs.tqdm(total=2, disable=True) as bar:
        failures = jobs.perform(tasks, 2, bar, lines.append)
    assert failures["dead"] == "ended with code 7"
    assert failures["failing"].startswith("validation: 10000 must be less than")
    assert sorted(lines) == sorted(f"{name}: {reason}" for name, reason in failures.items())
    assert list(tmp_path.iterdir()) == [images] and capfd.readouterr().err == ""


USAGE = {
    "unknown posterior": (["--posteriors", "best"], "invalid choice: 'best'"),
    "posterior twice": (["--posteriors", "iaf", "iaf"], "iaf iaf has one of them twice"),
    "seed twice": (["--seeds", "1", "1"], "--seeds: 1 1 has one of them twice"),
    "seed": (["--seeds", "-1"], "seed: -1 must be within"),
    "the flag of train": (["--posterior", "iaf"], "unrecognized arguments: --posterior"),
    "no jobs": (["--jobs", "0"], "--jobs: must be at least 1"),
    "steps for none": (["--posteriors", "gaussian", "--steps", "2"], "--steps 2 has no effect"),
    "constraint for none": (
        ["--posteriors", "gaussian", "iaf", "--constraint", "paper"],
        "--constraint paper has no effect",
    ),
    "a wrong value for one": (["--posteriors", "gaussian", "planar", "--steps", "0"], "steps: 0"),
    "data root": (["--data", "digits", "--data-root", "y"], "--data-root has no effect"),
}


@pytest.mark.parametrize("fault", USAGE)
def test_usage_errors(tmp_path, capsys, fault):
    words, message = USAGE[fault]
    assert call("compare", "--out", tmp_path / "out", *words) == 2
    assert message in complaint(capsys)
    assert not list(tmp_path.glob("out/*-seed*"))


def test_a_setting_goes_to_the_posteriors_that_it_concerns():
    settings = {"steps": 4, "constraint": "centred", "latent": 3}
    assert concerning("gaussian", settings) == {"posterior": "gaussian", "latent": 3}
    assert concerning("planar", settings) == {"posterior": "planar", **settings}
    assert concerning("iaf", settings) == {"posterior": "iaf", "steps": 4, "latent": 3}


@pytest.mark.usefixtures("no_pictures")
def test_other_settings_are_not_resumed(tmp_path, images, capsys):
    out = tmp_path / "out"
    assert compare(images, out, "--posteriors", "gaussian") == 0
    before = contents(out)
    capsys.readouterr()
    assert compare(images, out, "--posteriors", "gaussian") == 2
    assert "already holds a comparison; --resume continues it" in complaint(capsys)
    assert compare(images, tmp_path / "nowhere", "--resume") == 2
    assert "nowhere: does not exist, --resume has nothing to continue" in complaint(capsys)
    assert not (tmp_path / "nowhere").exists()
    assert compare(images, out, "--resume", "--hidden", "7") == 2
    assert "its run has --hidden 6, not --hidden 7" in complaint(capsys)
    assert contents(out) == before
    for text in ("", "[]", '{"posteriors": "x"}', '{"posteriors": [], "seeds": [], "settings": 1}'):
        (out / "settings.json").write_text(text)
        assert call("compare", "--out", out, "--resume") == 2
        assert "settings.json: " in complaint(capsys)


def test_the_table_says_what_it_does_not_know():
    row = Row("iaf", 1, 2.0, 80.0, None, None, 79.0, None, 0.25, 128, 0.0, None, None)
    line = render([row]).splitlines()[2]
    assert (
        "80.00 ± – ± –" in line and "79.00 ± – ± 0.25" in line and line.endswith("–             |")
    )


@pytest.mark.usefixtures("no_pictures")
def test_unfinished_runs_are_not_tabled(tmp_path, images, capsys):
    out = tmp_path / "run"
    words = ["--data", "mnist", "--data-root", images, "--out", out]
    assert call("train", *TINY, *words) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics | {"test": {}}))
    with pytest.raises(ValueError, match="its run is not finished"):
        summarise({"gaussian": [out]})


# Evaluation


def test_standard_errors_are_those_of_the_images():
    config = Config(posterior="planar", hidden=4)
    model = build(config, SHAPE)
    images = torch.rand(30, SHAPE[0] * SHAPE[1])

    def generator():
        return torch.Generator().manual_seed(1)

    test = evaluate(model, images, generator(), samples=8)
    reconstruction, kl, nll = evaluation.image_terms(model, images, generator(), 8)
    for name, values in (("elbo", reconstruction + kl), ("log_likelihood", nll)):
        assert test[f"negative_{name}"] == pytest.approx(values.mean().item())
        error = stdev(values.tolist()) / math.sqrt(30)
        assert test[f"negative_{name}_error"] == pytest.approx(error)
    alone = evaluate(model, images[:1], generator(), samples=8)
    assert alone["negative_elbo_error"] is None and alone["negative_log_likelihood_error"] is None


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("how", ["none", "static"])
def test_evaluate_agrees_with_the_run(tmp_path, images, capsys, how):
    out = tmp_path / "run"
    words = ["--data", "mnist", "--data-root", images, "--out", out, "--binarise", how]
    assert call("train", *TINY, "--posterior", "planar", *words) == 0
    capsys.readouterr()
    command = ["evaluate", "--checkpoint", out / "model.safetensors", "--data-root", images]
    assert call(*command, "--device", "cpu", "--out", tmp_path / "test.json") == 0
    printed = json.loads(capsys.readouterr().out)
    test = read_result(out).test
    assert printed == {name: test[name] for name in printed} and "negative_elbo_error" in printed
    assert json.loads((tmp_path / "test.json").read_text()) == printed

    assert call(*command, "--samples", "64", "--seed", "7") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["importance_samples"] == 64 and other["kl"] != printed["kl"]


def test_evaluate_errors(tmp_path, images, capsys):
    path = tmp_path / "model.safetensors"
    assert call("evaluate", "--checkpoint", path) == 2
    assert "not a file" in complaint(capsys)
    save_model(path, build(Config(hidden=4), SHAPE), Config(hidden=4), SHAPE)
    assert call("evaluate", "--checkpoint", path, "--data", "digits") == 2
    assert "images of digits are (8, 8)" in complaint(capsys)
    assert call("evaluate", "--checkpoint", path, "--out", tmp_path / "x.txt") == 2
    assert "must end in .json" in complaint(capsys)
    assert call("evaluate", "--checkpoint", path, "--samples", "0") == 2
    assert "--samples: must be at least 1" in complaint(capsys)


# Pictures


def test_plot_draws_what_training_drew(tmp_path, images, capsys):
    out = tmp_path / "out"
    assert compare(images, out, "--posteriors", "gaussian", "planar", "--latent", "2") == 0
    before = contents(out)
    runs = [out / "gaussian-seed0", out / "planar-seed0"]
    for run in runs:
        for picture in run.glob("*.png"):
            picture.unlink()
    capsys.readouterr()
    command = ["plot", "--data-root", images, "--device", "cpu", "--runs"]
    assert call(*command, *runs, "--out", tmp_path / "pictures") == 0
    assert capsys.readouterr().out.split() == [*map(str, runs), str(tmp_path / "pictures")]
    assert contents(out) == before
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"learning_curves.png", "reconstructions.png", "samples.png"}


def test_curves_are_named_by_what_tells_the_runs_apart():
    different, same = [Path("a/x"), Path("b/y")], [Path("a/x"), Path("b/x")]
    assert commands._labels(different) == ["x", "y"]
    assert commands._labels(same) == [str(path) for path in same]


def test_plot_errors(tmp_path, images, capsys):
    assert call("plot", "--runs", tmp_path) == 2
    assert "is no run folder, it has no model.safetensors" in complaint(capsys)
    assert call("plot") == 2
    assert "required: --runs" in complaint(capsys)
    for name, how in (("a", "none"), ("b", "static")):
        words = ["--data", "mnist", "--data-root", images, "--out", tmp_path / name]
        assert call("train", *TINY, *words, "--binarise", how) == 0
    capsys.readouterr()
    runs = [tmp_path / "a", tmp_path / "b"]
    assert call("plot", "--data-root", images, "--runs", *runs, "--out", tmp_path / "c") == 2
    assert "runs of different images cannot be compared" in complaint(capsys)
