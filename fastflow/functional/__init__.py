"""The ops as functions: the one way in."""

from fastflow.functional.planar_flow import planar_flow, planar_flow_inverse

__all__ = ["planar_flow", "planar_flow_inverse"]
