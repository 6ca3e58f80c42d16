"""The benchmarks' own laws: a wrong answer is never timed, the report says what was measured."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

for library in ("matplotlib", "tabulate", "pytest_benchmark"):
    pytest.importorskip(library)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_autoregressive as masked  # noqa: E402
import gate  # noqa: E402
import masked_peers  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
from bench_planar_flow import SHORT, SMOKE, Case, exact_results  # noqa: E402
from comparison import Group, Settings, compare, results, saved_bytes  # noqa: E402

from fastflow import scales  # noqa: E402
from fastflow.reference import scales as reference_scales  # noqa: E402

CPU = torch.device("cpu")
NAMES = ("z_K", "ladj")
SHARED, AMORTISED = Case(50, 3, 4), Case(50, 3, 4, amortised=True)


def cotangents(inputs):
    torch.manual_seed(1)
    return torch.randn_like(inputs[0]), torch.randn_like(inputs[0][:, 0])


def compare_with_eager(function, direction="forward_backward", timed=False):
    inputs = SHARED.inputs(CPU)
    given = cotangents(inputs)
    builders = {
        "eager": lambda: peers.of_function(peers.eager_planar, inputs),
        "candidate": lambda: peers.of_function(function, inputs),
    }
    return compare(
        [Group(builders, None, exact_results(inputs, direction, NAMES, given))],
        {},
        direction,
        NAMES,
        given,
        SHARED.K,
        Settings(CPU, "smoke"),
        timed=timed,
    )


def drops_a_step(z, w, u, b):
    return peers.eager_planar(z, w[:-1], u[:-1], b[:-1])


def adds_an_eps_to_the_log(z, w, u, b):
    z_K, ladj = peers.eager_planar(z, w, u, b)
    return z_K, ladj + 1e-3


def rounds_to_tf32(z, w, u, b):
    def truncated(x):
        bits = x.detach().view(torch.int32)  # 13 bits of the mantissa go
        return x + (bits.bitwise_and(-(2**13)).view(x.dtype) - x).detach()

    return peers.eager_planar(truncated(z), truncated(w), u, b)


def drops_a_gradient(z, w, u, b):
    return peers.eager_planar(z, w, u, b.detach() + 0 * b)


def returns_nan_in_one_row(z, w, u, b):
    z_K, ladj = peers.eager_planar(z, w, u, b)
    return z_K, ladj + torch.where(torch.arange(len(z)) == 7, torch.nan, 0.0)


def forgets_a_dimension(z, w, u, b):
    z_K, ladj = peers.eager_planar(z, w, u, b)
    return z_K, ladj.unsqueeze(-1)


class TestGate:
    @pytest.mark.parametrize(
        "wrong",
        [
            drops_a_step,
            adds_an_eps_to_the_log,
            rounds_to_tf32,
            drops_a_gradient,
            returns_nan_in_one_row,
        ],
    )
    def test_refuses_a_wrong_answer_and_does_not_time_it(self, wrong):
        outcome = compare_with_eager(wrong, timed=True)
        assert "no time is reported" in outcome.refused["candidate"]
        assert list(outcome.times) == ["eager"]

    def test_refuses_another_shape_or_set_of_results(self):
        outcome = compare_with_eager(forgets_a_dimension, direction="forward")
        assert "ladj has shape (50, 1), must be (50,)" in outcome.refused["candidate"]
        one = {"ladj": torch.zeros(3)}
        with pytest.raises(gate.Disagreement, match="returned"):
            gate.check("candidate", {}, one, one, 1)

    @pytest.mark.parametrize("direction", ["forward", "backward", "forward_backward"])
    def test_times_a_right_answer(self, direction):
        outcome = compare_with_eager(peers.eager_planar, direction, timed=True)
        assert not outcome.refused
        rounds = {name: len(times) for name, times in outcome.times.items()}
        assert rounds["eager"] == rounds["candidate"] >= 3
        speedup = outcome.speedups("candidate")["eager"]
        assert speedup["q1"] <= speedup["median"] <= speedup["q3"]


class TestMeasure:
    def test_setup_is_not_timed(self):
        effort = measure.Effort(seconds=0.05, slice=1e-4, min_rounds=3, max_rounds=3)
        tasks = {"a": measure.Task(lambda _: None, setup=lambda: time.sleep(0.01))}
        times = measure.interleave(tasks, CPU, effort)
        assert len(times["a"]) == 3 and max(times["a"]) < 0.005

    def test_a_long_call_takes_part_in_the_first_rounds_only(self, monkeypatch):
        monkeypatch.setattr(measure, "LONG", 0.02)
        effort = measure.Effort(seconds=0.1, slice=1e-4, min_rounds=5, max_rounds=5)
        tasks = {
            name: measure.Task(lambda _, seconds=seconds: time.sleep(seconds))
            for name, seconds in {"quick": 0.0, "long": 0.04, "longest": 0.15}.items()
        }
        times = measure.interleave(tasks, CPU, effort)
        assert len(times["quick"]) == 5 and 1 <= len(times["long"]) <= 2
        assert len(times["longest"]) == 1
        ratio = measure.ratio(times["longest"], times["quick"])
        assert ratio["q1"] == ratio["median"] == ratio["q3"] > 1

    def test_ratio_pairs_the_rounds(self):
        slow_then_fast = [4.0, 40.0, 400.0], [1.0, 10.0, 100.0]
        assert measure.ratio(*slow_then_fast) == {"median": 4.0, "q1": 4.0, "q3": 4.0}

    def test_recorded_clock_yields_the_recorded_durations(self):
        clock, durations = measure.RecordedClock(), [0.5, 0.25, 1.0]
        advance, seen = clock.player(durations), []
        for _ in durations:
            start = clock.now()
            advance()
            seen.append(clock.now() - start)
        assert seen == durations


class TestPeers:
    @pytest.mark.parametrize("case", [SHARED, AMORTISED], ids=str)
    def test_newton_inverts_the_chain(self, case):
        inputs = [tensor.double() for tensor in case.inputs(CPU)]
        z_K, ladj = peers.eager_planar(*inputs)
        z, back = peers.eager_planar_inverse_exact(z_K, *inputs[1:])
        torch.testing.assert_close(z, inputs[0])
        torch.testing.assert_close(back, -ladj)

    def test_newton_converges_in_the_steps_it_is_given(self):
        for case in {*SHORT, *SMOKE}:
            z, *parameters = case.inputs(CPU)
            z_K, _ = peers.eager_planar(z, *parameters)
            torch.testing.assert_close(
                peers.eager_planar_inverse(z_K, *parameters),
                peers.eager_planar_inverse(z_K, *parameters, newton_steps=12),
            )

    @pytest.mark.parametrize(
        ("library", "build", "case"),
        [
            ("normflows", peers.normflows_planar, SHARED),
            ("pyro", peers.pyro_planar, SHARED),
            ("pyro", peers.pyro_planar, AMORTISED),
        ],
    )
    def test_peers_pass_the_gate(self, library, build, case):
        pytest.importorskip(library)
        inputs = case.inputs(CPU)
        given = cotangents(inputs)
        everything = "forward_backward", NAMES, given
        plain = results(peers.of_function(peers.eager_planar, inputs), *everything)
        values = results(build(inputs), *everything)
        gate.check(library, values, plain, exact_results(inputs, *everything), case.K)

    def test_pyro_does_not_answer_from_its_cache(self):
        pytest.importorskip("pyro")
        chain = peers.pyro_planar(SHARED.inputs(CPU))
        with torch.no_grad():
            before, _ = chain.run()
            chain.leaves[1].mul_(2)  # w of the first layer
            after, _ = chain.run()
        assert not torch.equal(before, after)


PLAIN_NETWORK, WITH_CONTEXT = masked.SMOKE[1], masked.SMOKE[0]
MASKED_DIRECTIONS = [*masked.PARALLEL, *masked.INVERSE]


def compare_masked(monkeypatch, members, direction, case=WITH_CONTEXT, timed=False):
    """A comparison of the masked layer with some contenders only."""
    monkeypatch.setattr(masked, "contenders", lambda *_: members)
    return masked.run_comparison(case, direction, Settings(CPU, "smoke"), timed)


def ignores_a_mask(network, t):
    dense = torch.ones_like(network.masks[1])
    masks = [network.masks[0], dense, *network.masks[2:]]
    return masked_peers.eager(dataclasses.replace(network, masks=masks), t)


def stops_one_pass_early(network, t):
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1] - 1):
        m, log_s = masked_peers.outputs(network, t, x)
        x = (t["x"] - m) * (-log_s).exp()
    return x, -log_s.sum(-1)


def adds_to_ladj(network, t):
    y, ladj = masked_peers.eager(network, t)
    return y, ladj + 1e-4


class TestMaskedPeers:
    @pytest.mark.parametrize("direction", MASKED_DIRECTIONS)
    @pytest.mark.parametrize("case", [PLAIN_NETWORK, WITH_CONTEXT], ids=str)
    @pytest.mark.parametrize("rival", ["eager", "dense", "jacobi", *masked.PEERS])
    def test_agree_with_fastflow(self, rival, case, direction, monkeypatch):
        if rival not in masked.contenders(case, direction, "cpu"):
            pytest.skip("it does not know this case")
        if rival in masked.MODULES:
            pytest.importorskip(masked.MODULES[rival])
        members = ["fastflow-reference", rival]
        outcome = compare_masked(monkeypatch, members, direction, case)
        assert not outcome.refused and not outcome.absent
        assert set(members) <= set(outcome.errors)

    @pytest.mark.parametrize(
        ("wrong", "direction"),
        [
            (ignores_a_mask, "forward"),
            (ignores_a_mask, "training"),
            (adds_to_ladj, "forward_backward"),
            (stops_one_pass_early, "inverse"),
            (stops_one_pass_early, "inverse_backward"),
        ],
    )
    def test_a_wrong_answer_is_refused_and_not_timed(self, wrong, direction, monkeypatch):
        builder = masked.builder

        def planted(contender, network, inverse):
            if contender == "eager":
                return lambda: masked_peers.of_function(network, wrong)
            return builder(contender, network, inverse)

        monkeypatch.setattr(masked, "builder", planted)
        members = ["fastflow-reference", "eager"]
        outcome = compare_masked(monkeypatch, members, direction, timed=True)
        assert "no time is reported" in outcome.refused["eager"]
        assert list(outcome.times) == ["fastflow-reference"]

    def test_a_backend_that_is_wrong_in_one_form_is_not_timed_in_any(self, monkeypatch):
        pytest.importorskip("nflows")
        step = reference_scales.step

        def wrong(x, m, a, scale, c0, c1):
            y, log_s = step(x, m, a, scale, c0, c1)
            return y, log_s + 1e-3 * (scale == scales.Softplus.number)

        monkeypatch.setattr(reference_scales, "step", wrong)
        members = ["fastflow-reference", "eager", "nflows"]
        outcome = compare_masked(monkeypatch, members, "forward", timed=True)
        assert "fastflow-reference as nflows" in outcome.refused["fastflow-reference"]
        assert sorted(outcome.times) == ["eager", "nflows"]

    def test_a_rival_is_compared_with_its_own_form(self, monkeypatch):
        pytest.importorskip("pyro")
        members = ["fastflow-reference", "eager", "pyro"]
        outcome = compare_masked(monkeypatch, members, "forward", timed=True)
        twin = outcome.times["fastflow-reference as pyro"]
        speedups = outcome.speedups("fastflow-reference")
        assert speedups["pyro"] == measure.ratio(outcome.times["pyro"], twin)
        assert set(speedups) == {"eager", "pyro"}

    @pytest.mark.parametrize("rival", masked.PEERS)
    def test_absent_peers_are_left_out_with_a_reason(self, rival, monkeypatch):
        monkeypatch.setattr(peers, "missing", lambda library: f"{library} is not installed")
        case = PLAIN_NETWORK
        reason = masked.absence(rival, case, "forward", Settings(CPU, "smoke"))
        assert reason == f"{rival} is not installed"

    def test_implicit_gradients_are_those_of_the_unrolled_inverse(self):
        network = PLAIN_NETWORK.network(masked.PLAIN, CPU).double()
        given = cotangents([network.tensors["x"]])
        implicit = masked_peers.inverse_and_gradients(network, given)
        chain = masked_peers.of_function(network, masked_peers.eager_inverse)
        unrolled = results(chain, "inverse_backward", ("x", "ladj"), given)
        torch.testing.assert_close(implicit, unrolled)

    def test_memory_for_backward_is_what_a_pass_keeps(self):
        x, w = torch.randn(100, 7, requires_grad=True), torch.randn(7, 7, requires_grad=True)
        chain = peers.Chain(lambda: ((x @ w).exp(), x.sum(-1)), [x, w])
        assert saved_bytes(chain) == 100 * 7 * 4  # what exp returns; x and w are there anyway


FACTS = {"device_name": "Some Chip", "threads": 2, "cores": 2, "torch": "2.11.0"}
FACTS |= {"python": "3.12.0", "fastflow": "0.1.0"}


def entry(
    contender,
    direction="forward",
    case=SHARED,
    seconds=1e-3,
    over=None,
    share=None,
    op="planar_flow",
):
    own = {
        "op": op,
        "case": str(case),
        "direction": direction,
        "contender": contender,
        "backend": contender.removeprefix("fastflow-") if "fastflow" in contender else None,
        "median_seconds": seconds,
        "speedup_over": {
            rival: {"median": value, "q1": 0.9 * value, "q3": 1.1 * value}
            for rival, value in (over or {}).items()
        },
        "errors": {"z_K": 1e-7, "ladj": 2e-7},
        "D": case.D,
        "gbps": 1.0,
        "share_of_copy": share,
    }
    return {"name": contender, "extra_info": own}


@pytest.fixture
def write_json(tmp_path):
    def write(*entries, device="cpu", load=0.1):
        path = tmp_path / f"{device}.json"
        facts = {"fastflow": FACTS | {"device": device, "load": load}}
        path.write_text(json.dumps({"machine_info": facts, "benchmarks": list(entries)}))
        return path

    return write


class TestReport:
    def test_takes_the_fastest_backend_and_marks_where_it_is_slower(self, write_json):
        path = write_json(
            entry("fastflow-cpp", seconds=1e-3, over={"eager": 12.34, "compile": 0.8}),
            entry("fastflow-reference", seconds=5e-3, over={"eager": 2.0, "compile": 0.1}),
            entry("eager", seconds=12.34e-3),
            entry("compile", seconds=0.8e-3),
        )
        run = report.load(path)
        lines = report.summary(run, run.rows).splitlines()
        assert len(lines) == 3
        assert "| cpp " in lines[2] and "| 12.3x " in lines[2] and "| **0.80x** ▼ " in lines[2]
        assert "normflows" not in lines[0]

    def test_shows_seconds_for_gpus_only(self, write_json):
        for device, shown in (("cpu", False), ("cuda", True)):
            own = entry("fastflow-cpp", seconds=42e-6, over={"eager": 2.0}, share=0.5)
            run = report.load(write_json(own, entry("eager"), device=device))
            assert ("42.0 µs" in report.summary(run, run.rows)) == shown
            assert "| 50% " in report.summary(run, run.rows)

    def test_says_that_the_machine_was_busy(self, write_json):
        own = entry("fastflow-cpp", over={"eager": 2.0})
        assert "busy" not in report.versions(report.load(write_json(own)))
        assert "busy" in report.versions(report.load(write_json(own, load=2.0)))

    def test_writes_page_picture_and_readme(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0}), entry("eager"))
        readme = tmp_path / "README.md"
        readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
        out = tmp_path / "results"
        assert report.main([str(path), "--out", str(out), "--readme", str(readme)]) == 0
        assert (out / "planar_flow-cpu.png").read_bytes().startswith(b"\x89PNG")
        assert "Some Chip, 2 threads, PyTorch 2.11.0" in (out / "report.md").read_text()
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
        assert "(results/planar_flow-cpu.png)" in text and "stale" not in text
        report.main([str(path), "--out", str(out), "--readme", str(readme)])
        assert readme.read_text() == text

    def test_the_readme_gets_few_rows_and_every_loss(self, write_json, tmp_path):
        path = write_json(
            *(
                entry("fastflow-cpp", direction, case=Case(100, 2, K), over={"eager": K / 5})
                for K in range(1, 10)
                for direction in ("forward", "forward_backward", "inverse")
            )
        )
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 0
        text = readme.read_text()
        assert text.count("| shared-") == 8 and "| forward  " not in text
        assert "All 27 rows, with errors and spreads, are in [report.md](report.md)" in text
        assert "slower in 12 of 27 comparisons: shared-B100-D2-K1 forward against" in text
        assert (tmp_path / "report.md").read_text().count("| shared-") == 54

    def test_draws_the_inverse_against_d(self, write_json, tmp_path):
        path = write_json(
            *(
                entry("fastflow-cpp", direction, case, over={"eager": 2.0}, op=masked.SWEEP_OP)
                for case in masked.SWEEP["smoke"]
                for direction in case.directions
            )
        )
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.BEGIN}\n{report.END}\n")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 0
        picture = f"{masked.SWEEP_OP}-cpu.png"
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
        assert f"({picture})" in readme.read_text() and "| B8-D2-" not in readme.read_text()
        assert "| B8-D2-" in (tmp_path / "report.md").read_text()

    def test_marks_what_was_timed_once_and_counts_no_floor_as_a_rival(self, write_json):
        over = {"nflows": 50.0, "dense": 0.5}
        own = entry("fastflow-cpp", "inverse", PLAIN_NETWORK, over=over, op=masked.OP)
        nflows = entry("nflows", "inverse", PLAIN_NETWORK, op=masked.OP)
        nflows["extra_info"]["rounds"] = 1
        dense = entry("dense", "inverse", PLAIN_NETWORK, op=masked.OP)
        run = report.load(write_json(own, nflows, dense))
        line = report.summary(run, run.rows).splitlines()[2]
        assert "| 50.0x † " in line and "| 0.50x " in line
        assert report.slower(run) == "fastflow is slower in 0 of 1 comparisons."

    def test_keeps_the_figures_it_was_made_from(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0 / 3}), entry("eager"))
        before = path.read_bytes()
        assert report.main([str(path), "--out", str(tmp_path)]) == 0
        assert path.read_bytes() == before  # it is what was measured, the copy is shorter
        for out in (tmp_path / "once", tmp_path / "twice"):
            assert report.main([str(path), "--out", str(out)]) == 0
            path = out / "cpu.json"
        pages = [(tmp_path / out / "report.md").read_text() for out in ("", "once", "twice")]
        assert len(set(pages)) == 1
        assert (tmp_path / "once" / "cpu.json").read_text() == path.read_text()
        assert "0.666667" in path.read_text()

    @pytest.mark.parametrize(
        ("content", "message"),
        [("{", "not a JSON file"), ("{}", "no fastflow benchmarks"), (None, "No such file")],
    )
    def test_refuses_other_files_in_one_line(self, content, message, tmp_path, capsys):
        path = tmp_path / "some.json"
        if content is not None:
            path.write_text(content)
        assert report.main([str(path), "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1

    def test_leaves_a_readme_without_marks_alone(self, write_json, tmp_path):
        path = write_json(entry("fastflow-cpp", over={"eager": 2.0}))
        readme = tmp_path / "README.md"
        readme.write_text(f"{report.END} {report.BEGIN}")
        assert report.main([str(path), "--out", str(tmp_path), "--readme", str(readme)]) == 2
        assert readme.read_text() == f"{report.END} {report.BEGIN}"


SABOTAGE = """
from fastflow.reference import planar_flow as reference

right = reference.planar_flow_forward

def wrong(*arguments):
    z_K, ladj, a = right(*arguments)
    return z_K, ladj + 1e-3, a

reference.planar_flow_forward = wrong
"""


@pytest.mark.parametrize("sabotaged", [False, True])
def test_a_whole_run_reports_right_backends_only(sabotaged, tmp_path):
    (tmp_path / "sabotage.py").write_text(SABOTAGE if sabotaged else "")
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    # without a compiler torch.compile is left out: that is tested here too, and saves its time
    no_compiler = {
        "CXX": str(tmp_path / "none"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }
    numbers = tmp_path / "numbers.json"
    start = "import sys, pytest; del sys.path[0]; sys.exit(pytest.console_main())"
    options = ["--bench-grid=smoke", "--bench-device=cpu", f"--benchmark-json={numbers}"]
    options += ["-p", "sabotage", "-p", "no:cacheprovider", "-rs"]
    run = subprocess.run(
        [sys.executable, "-c", start, str(ROOT / "benchmarks"), "--benchmark-only", *options]
        + ["-k", "B100 and forward and not backward"],
        cwd=ROOT,
        env={**os.environ, **no_compiler, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == int(sabotaged), run.stdout + run.stderr
    assert "torch.compile cannot build here" in run.stdout
    content = json.loads(numbers.read_text())
    assert set(content["machine_info"]) == {"fastflow"}
    assert {"device_name", "threads", "torch"} <= set(content["machine_info"]["fastflow"])
    measured = {benchmark["extra_info"]["contender"] for benchmark in content["benchmarks"]}
    assert "eager" in measured
    assert ("fastflow-reference" in measured) != sabotaged
    assert ("fastflow-reference: ladj is off by" in run.stdout) == sabotaged
