"""The VAE benchmark's own laws: the rivals are the same model, a wrong flow is never timed."""

import sys
from pathlib import Path

import pytest
import torch

for library in ("matplotlib", "tabulate", "pytest_benchmark"):
    pytest.importorskip(library)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import vae_peers  # noqa: E402
from bench_vae import SMOKE, builder, contenders, run_comparison  # noqa: E402
from comparison import Settings, results  # noqa: E402

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_rivals_are_the_same_model_to_rounding(case):
    cotangents = (torch.full((case.B,), 1 / case.B, dtype=torch.float64),) * 2
    values = {}
    for name in contenders(case, "cpu"):
        if name == "zuko":
            pytest.importorskip("zuko")
        # in float64 the reference serves fastflow's model: the kernels are for the timed run
        chain = builder(name, case, torch.float64, CPU)()
        values[name] = results(chain, "training", vae_peers.NAMES, cotangents)
    plain = values.pop("eager")
    assert len(plain) > 10
    for others in values.values():
        assert others.keys() == plain.keys()
        for name, expected in plain.items():
            torch.testing.assert_close(others[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_a_wrong_flow_is_refused(case, monkeypatch):
    settings = Settings(CPU, "smoke")
    outcome = run_comparison(case, "training", settings, timed=False)
    assert not outcome.refused and "eager" in outcome.errors
    exact = builder("eager", case, torch.float64, CPU)

    def build(contender, case, dtype, device):  # only what is timed is wrong, not the truth
        if dtype == torch.float64:
            return exact
        make = builder(contender, case, dtype, device)
        return make if contender == "eager" else lambda: broken(make())

    def broken(chain):
        run = chain.run
        return vae_peers.Chain(
            lambda: (run()[0], 1.001 * run()[1]),
            chain.leaves,
            chain.collect,
            chain.context,
            chain.names,
        )

    monkeypatch.setattr("bench_vae.builder", build)
    outcome = run_comparison(case, "training", settings, timed=False)
    assert set(outcome.refused) == set(contenders(case, "cpu")) - {"eager"} - set(outcome.absent)


def test_training_steps_change_the_parameters():
    for name in contenders(SMOKE[0], "cpu"):
        chain = builder(name, SMOKE[0], torch.float32, CPU)()
        with chain.context():
            step = chain.step()
            before = [leaf.detach().clone() for leaf in chain.leaves]
            for _ in range(50):
                step(None)
        moved = [(a - b).abs().max() for a, b in zip(before, chain.leaves, strict=True)]
        # 50 steps of Adam at 1e-7
        assert 1e-6 < max(moved) < 1e-5
