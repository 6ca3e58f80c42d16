"""The benchmarks' own laws: a wrong answer is never timed, time is measured fairly."""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

for library in ("matplotlib", "tabulate", "pytest_benchmark"):
    pytest.importorskip(library)

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gate  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
from bench_planar_flow import SHORT, SMOKE, Case, exact_results  # noqa: E402
from comparison import Comparison, Group, Settings, compare, results  # noqa: E402
from suite import Outcomes  # noqa: E402

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


class TestOutcomes:
    def test_a_comparison_is_made_once_and_none_is_begun_too_late(self):
        benchmark = mock.MagicMock(enabled=False)
        run = mock.Mock(return_value=Comparison(absent={"pyro": "it is not here"}))
        outcomes = Outcomes(Settings(CPU, "smoke"))
        show = functools.partial(outcomes.show, benchmark, run, "op", "case")
        show("forward", "eager")
        show("forward", "compile")
        assert run.call_args_list == [mock.call("case", "forward", outcomes.settings, False)]
        with pytest.raises(pytest.skip.Exception, match="it is not here"):
            show("forward", "pyro")
        outcomes.settings = Settings(CPU, "smoke", deadline=time.monotonic() - 1)
        show("forward", "eager")
        with pytest.raises(pytest.skip.Exception, match="the time set by --bench-seconds"):
            show("inverse", "eager")
        assert run.call_count == 1


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
    # a worker of pytest-xdist tells its children that they are one
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    numbers = tmp_path / "numbers.json"
    start = "import sys, pytest; del sys.path[0]; sys.exit(pytest.main())"
    options = ["--bench-grid=smoke", "--bench-device=cpu", f"--benchmark-json={numbers}"]
    options += ["-p", "sabotage", "-p", "no:cacheprovider", "-rs"]
    run = subprocess.run(
        [sys.executable, "-c", start, str(ROOT / "benchmarks"), "--benchmark-only", *options]
        + ["-k", "B100 and forward and not backward"],
        cwd=ROOT,
        env={**own, **no_compiler, "PYTHONPATH": path},
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
