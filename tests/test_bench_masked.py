"""The autoregressive benchmark's laws: peers are the same layer, wrong answers are not timed."""

import dataclasses
import sys

import pytest
import torch
from environments import ROOT

for library in ("matplotlib", "tabulate", "pytest_benchmark"):
    pytest.importorskip(library)

sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_autoregressive as masked  # noqa: E402
import masked_eager  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
from comparison import Settings, results, saved_bytes  # noqa: E402

from fastflow import scales  # noqa: E402
from fastflow.reference import scales as reference_scales  # noqa: E402

CPU = torch.device("cpu")
PLAIN_NETWORK, WITH_CONTEXT = masked.SMOKE[1], masked.SMOKE[0]
MASKED_DIRECTIONS = [*masked.PARALLEL, *masked.INVERSE]


def compare_masked(monkeypatch, members, direction, case=WITH_CONTEXT, timed=False):
    """A comparison of the masked layer with some contenders only."""
    monkeypatch.setattr(masked, "contenders", lambda *_: members)
    return masked.run_comparison(case, direction, Settings(CPU, "smoke"), timed)


def ignores_a_mask(network, t):
    dense = torch.ones_like(network.masks[1])
    masks = [network.masks[0], dense, *network.masks[2:]]
    return masked_eager.eager(dataclasses.replace(network, masks=masks), t)


def stops_one_pass_early(network, t):
    x = torch.zeros_like(t["x"])
    for _ in range(x.shape[-1] - 1):
        m, log_s = masked_eager.outputs(network, t, x)
        x = (t["x"] - m) * (-log_s).exp()
    return x, -log_s.sum(-1)


def adds_to_ladj(network, t):
    y, ladj = masked_eager.eager(network, t)
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
                return lambda: masked_eager.of_function(network, wrong)
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
        torch.manual_seed(1)
        x = network.tensors["x"]
        given = torch.randn_like(x), torch.randn_like(x[:, 0])
        implicit = masked_eager.inverse_and_gradients(network, given)
        chain = masked_eager.of_function(network, masked_eager.eager_inverse)
        unrolled = results(chain, "inverse_backward", ("x", "ladj"), given)
        torch.testing.assert_close(implicit, unrolled)

    def test_memory_for_backward_is_what_a_pass_keeps(self):
        x, w = torch.randn(100, 7, requires_grad=True), torch.randn(7, 7, requires_grad=True)
        chain = peers.Chain(lambda: ((x @ w).exp(), x.sum(-1)), [x, w])
        assert saved_bytes(chain) == 100 * 7 * 4  # what exp returns; x and w are there anyway
