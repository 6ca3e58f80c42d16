"""Several processes that train together, and steps as graphs: the numbers of one eager process."""

import json
import math
import os
import signal
import traceback
from unittest import mock

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from safetensors.torch import load_file
from vae_files import SHAPE, write_images

from fastflow.vae import Config, build, cli, graphs
from fastflow.vae.distributed import Team
from fastflow.vae.graphs import WARM_UP, GraphedStep
from fastflow.vae.steps import TrainingStep, make_optimizer

TINY = ["--hidden", "6", "--epochs", "2", "--importance-samples", "4", "--device", "cpu"]
TINY += ["--latent", "3", "--posterior", "planar", "--data", "mnist", "--batch-size", "11"]

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(sizes):
    """Joint batches of images and noise in float64."""
    generator = torch.Generator().manual_seed(0)
    pixels = SHAPE[0] * SHAPE[1]
    for size in sizes:
        x = torch.rand(size, pixels, generator=generator, dtype=torch.float64)
        yield x, torch.randn(size, 2, generator=generator, dtype=torch.float64)


def train(team, posterior, free_bits, sizes):
    """Parameters and totals after a few steps in float64."""
    model = build(Config(posterior=posterior, hidden=5), SHAPE).double()
    step = TrainingStep(model, make_optimizer(model, 1e-2), free_bits, team)
    step.begin(1e-2, 0.5)
    for x, noise in batches(sizes):
        step(x, noise)
    return [parameter.detach() for parameter in model.parameters()], step.totals


def member(rank, size, folder, cases):
    """One process of a team: leaves its results, or its error, in the folder."""
    try:
        store = distributed.FileStore(str(folder / "store"), size)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
        results = [train(Team(rank, size), *case) for case in cases]
        torch.save(results, folder / f"{rank}.pt")
        distributed.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        raise


SIZES = (4, 5, 1, 3)  # even, odd, and fewer images than processes
CASES = [(name, 0.0, SIZES) for name in ("gaussian", "planar", "iaf")]
CASES += [("planar", bits, SIZES) for bits in (1e-3, 1e3)]  # free bits of the joint batch: off, on
CASES += [("gaussian", 0.12, SIZES)]  # between the KLs of the shares of a batch


def test_two_processes_are_one_on_the_joint_batch(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=member, args=(r, 2, tmp_path, CASES)) for r in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    errors = [path.read_text() for path in tmp_path.glob("*.txt")]
    assert [process.exitcode for process in processes] == [0, 0], errors
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for case, first, second in zip(CASES, *results, strict=True):
        parameters, totals = train(Team(), *case)
        for own in (first, second):
            # Another order of summation: a few units of 2^-52, which Adam's steps keep so small
            torch.testing.assert_close(own[0], parameters, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(own[1], totals, rtol=1e-12, atol=0)
        assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def torchrun(processes, *words):
    """What the command of that name does, in this process, which has imported torch already."""
    command = ["--standalone", f"--nproc-per-node={processes}", "-m", "fastflow.vae", "train"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with mock.patch.dict(os.environ):  # it sets OMP_NUM_THREADS
        try:
            run.main([*command, *map(str, words)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_torchrun_trains_and_resumes_what_one_process_trains(tmp_path, capfd):
    images = write_images(tmp_path / "images")
    common = [*TINY, "--data-root", images]
    assert cli.main([*map(str, ["train", *common, "--out", tmp_path / "one"])]) == 0
    capfd.readouterr()
    torchrun(2, *common, "--epochs", 1, "--out", tmp_path / "two")
    printed = capfd.readouterr().out
    assert printed.count("images/s") == 1 and printed.count("test: -ELBO") == 1
    torchrun(2, *common, "--resume", "--out", tmp_path / "two")
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        p.name for p in (tmp_path / "two").iterdir()
    }
    # float32, 10 steps of Adam at 1e-3: where a gradient vanishes to rounding, its sign may differ
    # and a parameter be off by a step; the loss feels that to second order
    for ours, theirs in zip(one["epochs"], two["epochs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert one["test"] == pytest.approx(two["test"], rel=1e-4)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert max((first[name] - second[name]).abs().max() for name in first) < 2e-3


def test_a_process_that_fails_ends_all(tmp_path, capfd):
    with pytest.raises(ChildFailedError):
        torchrun(2, *TINY, "--data-root", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "fastflow.vae: error: mnist: " in capfd.readouterr().err
    images = write_images(tmp_path / "images")
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.json").write_text("{}")  # only the first process looks
    with pytest.raises(ChildFailedError):
        torchrun(2, *TINY, "--data-root", images, "--out", out)
    assert "holds metrics.json of a run" in capfd.readouterr().err
    assert (out / "metrics.json").read_text() == "{}"


def test_torchrun_is_for_train(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "fastflow.vae: error: compare: torchrun is for train alone\n"


# Graphs


class Tape:
    """Records as CUDA graphs do: nothing happens until the replay, which knows addresses alone."""

    def __init__(self):
        self.prepared = self.recorded = self.replayed = 0

    def prepare(self, function):
        self.prepared += 1
        function()

    def record(self, function):
        self.recorded += 1

        def replay():
            self.replayed += 1
            function()

        return replay


@pytest.mark.parametrize("posterior", ["gaussian", "planar"])
def test_a_graphed_step_is_the_step(posterior):
    sizes = (4, 4, 3, 4, 4, 4, 3, 4)
    expected = train(Team(), posterior, 0.0, sizes)
    model = build(Config(posterior=posterior, hidden=5), SHAPE).double()
    step = TrainingStep(model, make_optimizer(model, 1e-2), 0.0, Team())
    step.begin(1e-2, 0.5)
    tape, addresses = Tape(), set()

    def noted(x, noise):
        addresses.add((len(x), x.data_ptr(), noise.data_ptr()))
        step(x, noise)

    graphed = GraphedStep(noted, tape)
    for x, noise in batches(sizes):
        before = x.clone()
        graphed(x, noise)
        assert torch.equal(x, before)
    parameters = [parameter.detach() for parameter in model.parameters()]
    torch.testing.assert_close((parameters, step.totals), expected, rtol=0, atol=0)
    assert (tape.prepared, tape.recorded, tape.replayed) == (WARM_UP, 1, 6 - WARM_UP)
    assert len([address for address in addresses if address[0] == 4]) == 1  # one set of buffers


def test_what_changes_between_epochs_is_in_the_device_tensors():
    model = build(Config(hidden=5), SHAPE)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1.0), capturable=False)
    step = TrainingStep(model, optimizer, 0.0, Team())
    rate, weight, totals = optimizer.param_groups[0]["lr"], step.kl_weight, step.totals
    totals += 1
    step.begin(0.25, 0.125)
    assert rate.item() == 0.25 and weight.item() == 0.125 and totals.tolist() == [0, 0]
    assert optimizer.param_groups[0]["lr"] is rate
    assert step.kl_weight is weight and step.totals is totals


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("posterior", ["gaussian", "planar", "iaf", "maf"])
def test_a_cuda_graph_is_the_step(posterior):
    results = []
    for graphed in (False, True):
        model = build(Config(posterior=posterior, hidden=5), SHAPE).cuda()
        step = TrainingStep(model, make_optimizer(model, 1e-2), 0.0, Team())
        step.begin(1e-2, 0.5)
        move = GraphedStep(step, graphs.CudaRecorder()) if graphed else step
        for x, noise in batches((4, 4, 3, 4, 4, 4, 3, 4)):
            move(x.float().cuda(), noise.float().cuda())
        results.append((list(model.parameters()), step.totals))
    torch.testing.assert_close(*results, rtol=1e-4, atol=math.sqrt(torch.finfo().eps))
