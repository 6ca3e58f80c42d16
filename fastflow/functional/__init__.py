"""The ops as functions: the one way in."""

from fastflow.functional.autoregressive import autoregressive, autoregressive_inverse
from fastflow.functional.made import made, masked_linear
from fastflow.functional.planar_flow import planar_flow, planar_flow_inverse

__all__ = [
    "autoregressive",
    "autoregressive_inverse",
    "made",
    "masked_linear",
    "planar_flow",
    "planar_flow_inverse",
]
