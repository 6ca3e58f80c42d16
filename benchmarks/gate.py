"""The correctness gate: no time is reported for a wrong answer.

Every tensor that a contender returns is compared with float64. The bar is what plain PyTorch itself
loses in float32 on the same inputs, times a margin, or a floor where plain PyTorch happens to be
lucky. The floor is 10 units of float32 a step: the bound that a chain of K accurate steps keeps. A
gradient that is summed over the batch may lose sqrt(B) units more, the random walk of the rounding
errors of a plain sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

MARGIN = 4.0
"""How much more than plain PyTorch a contender may lose: another order of summation, a peer's worse
formula for the log-determinant. A dropped term, a wrong sign or TF32 is far outside."""

UNITS_PER_STEP = 10.0
UNIT = 2.0**-23


class Disagreement(AssertionError):
    """A contender's answer is not that of float64."""


def error(value: Tensor, exact: Tensor) -> float:
    """The largest deviation, in relation to the largest exact value; at least 1 is divided by."""
    exact = exact.double()
    if value.shape != exact.shape:
        raise Disagreement(f"shape {tuple(value.shape)}, must be {tuple(exact.shape)}")
    deviation = (value.double() - exact).abs().max()
    return float(deviation / exact.abs().max().clamp(min=1.0))


def check(
    contender: str,
    values: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    steps: int,
) -> dict[str, float]:
    """Refuses a contender that is not as right as plain PyTorch, within the margin.

    Arguments:
        contender: its name, for the message.
        values: its results by name.
        plain: the same of plain PyTorch in float32.
        exact: the same in float64.
        steps: length of the chain.

    Returns:
        the error of every result.

    Raises:
        Disagreement: a result is missing, not finite, of another shape, or too far off.
    """
    if values.keys() != exact.keys():
        raise Disagreement(f"{contender}: returned {sorted(values)}, must be {sorted(exact)}")
    errors = {}
    rows = max(len(tensor) for tensor in exact.values())
    for name, reference in exact.items():
        try:
            errors[name] = error(values[name], reference)
        except Disagreement as wrong:
            raise Disagreement(f"{contender}: {name} has {wrong}") from None
        units = UNITS_PER_STEP * steps + (rows**0.5 if len(reference) < rows else 0)
        bar = max(MARGIN * error(plain[name], reference), units * UNIT)
        if not (torch.isfinite(values[name]).all() and errors[name] <= bar):
            raise Disagreement(
                f"{contender}: {name} is off by {errors[name]:.3g} of its largest value, "
                f"at most {bar:.3g} is allowed: no time is reported for a wrong answer"
            )
    return errors
