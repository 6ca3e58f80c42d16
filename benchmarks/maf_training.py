"""Times a whole training step of a MAF, zuko's and fastflow's: python benchmarks/maf_training.py.

Three flows of one architecture take turns: zuko.flows.MAF, a copy of it that fastflow.convert has
made fast, and fastflow.MAF, which keeps its hidden units sorted and so moves no weights about. A
step is zero_grad, the mean of -log_prob, its gradients, and Adam with PyTorch's defaults.
"""

from __future__ import annotations

import argparse
import copy

import measure
import torch
import zuko
from comparison import adam_step
from tabulate import tabulate
from torch import Tensor, nn

import fastflow

EFFORT = measure.Effort(seconds=20, slice=0.05, min_rounds=9, max_rounds=60)


def flows(features: int, transforms: int, widths: tuple[int, ...]) -> dict[str, nn.Module]:
    """By name; the first two compute the same."""
    plain = zuko.flows.MAF(features, transforms=transforms, hidden_features=widths)
    converted = copy.deepcopy(plain)
    fastflow.convert(converted, strict=True)
    own = fastflow.MAF(features, transforms, widths)
    return {"zuko": plain, "zuko, converted": converted, "fastflow.MAF": own}


def log_prob(flow: nn.Module, x: Tensor) -> Tensor:
    return flow.log_prob(x) if isinstance(flow, fastflow.Flow) else flow().log_prob(x)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--transforms", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 512])
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    x = torch.randn(options.rows, options.features)
    contenders = flows(options.features, options.transforms, tuple(options.widths))
    with torch.no_grad():
        wanted, found = (log_prob(contenders[name], x) for name in ("zuko", "zuko, converted"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    tasks = {
        name: measure.Task(
            adam_step(lambda flow=flow: -log_prob(flow, x).mean(), flow.parameters())
        )
        for name, flow in contenders.items()
    }
    times = measure.interleave(tasks, torch.device("cpu"), EFFORT)
    rows = [
        [name, 1e3 * measure.median(own), measure.ratio(times["zuko"], own)["median"]]
        for name, own in times.items()
    ]
    print(tabulate(rows, ["", "ms a step", "speed-up"], floatfmt=("", ".1f", ".2f")))


if __name__ == "__main__":
    main()
