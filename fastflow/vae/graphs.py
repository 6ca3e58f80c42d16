"""A function of tensors as one CUDA graph: its kernels are launched at once, not one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: they load kernels, fill pools, make Adam's moments


class Recorder(Protocol):
    """What records a function; tests have one of their own, for machines without a GPU."""

    def prepare(self, function: Callable[[], None]) -> None:
        """Calls a function as is, in the way that one that is to be recorded must be called."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records a function, which has no effect yet, and returns what repeats it."""
        ...


class CudaRecorder:
    """Records CUDA graphs."""

    def prepare(self, function: Callable[[], None]) -> None:
        """Calls a function on a side stream, as PyTorch wants it before a recording."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records a graph; its tensors stay where they are as long as it lives."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay


class GraphedStep:
    """Calls a function for its effects, by a recording of it from the fourth call on.

    A recording knows addresses, not values: inputs are copied to the same tensors before every
    call. Inputs of other shapes than the first ones, such as the last batch of an epoch, are given
    to the function itself; what it changes, it changes in place, so that the recording sees it.

    Arguments:
        function: of tensors, reads nothing back and changes tensors in place.
        recorder: makes recordings.
    """

    def __init__(self, function: Callable[..., None], recorder: Recorder) -> None:
        self.function = function
        self.recorder = recorder
        self._inputs: tuple[Tensor, ...] = ()
        self._calls = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor) -> None:
        if not self._inputs:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
        if any(own.shape != given.shape for own, given in zip(self._inputs, inputs, strict=True)):
            self.function(*inputs)
            return
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given)
        if self._replay is None and self._calls < WARM_UP:
            self._calls += 1
            self.recorder.prepare(self._call)
            return
        if self._replay is None:
            self._replay = self.recorder.record(self._call)
        self._replay()

    def _call(self) -> None:
        self.function(*self._inputs)
