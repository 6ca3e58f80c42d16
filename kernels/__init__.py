"""Triton kernels, and whether they can run. Importing this package imports neither them nor Triton.

The kernels of an op are in files that begin with its name; `math` is what all of them share.
"""

from __future__ import annotations

import importlib.util
import os
import re
from functools import cache

OLDEST_TRITON = (3, 6)  # what torch 2.11 brings
TRITON_FOR_NUMPY_2_4 = (3, 7)  # older interpreters use arrays as scalars, NumPy 2.4 refuses


def interpreting() -> bool:
    """Whether Triton runs kernels in NumPy, on the CPU: TRITON_INTERPRET=1 before its import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "on", "true", "yes", "y")


@cache
def probe() -> str | None:
    """None if the kernels of this package can run here, else the reason in one line."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    if _release(triton.__version__) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {_dotted(OLDEST_TRITON)}"
    if interpreting():
        import numpy

        if _release(numpy.__version__) >= (2, 4) and (
            _release(triton.__version__) < TRITON_FOR_NUMPY_2_4
        ):
            return f"the interpreter of triton {triton.__version__} needs numpy < 2.4"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
