"""The CUDA kernels of made and autoregressive on the CPU (cuda_on_host.py), called like the ops."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import cuda_on_host
import torch
from torch import Tensor

PASSES = ["forward", "backward", "inverse", "inverse_backward"]
TENSORS = "x y ladj saved d_out d_ladj d_in workspace".split()
PARAMETERS = "weight bias term dweight dbias dterm".split()


class Shape(ctypes.Structure):
    """The struct of the same name in cuda_shim/autoregressive.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in ("pass_", "batch", "features", "layer_count", "activation", "scale")
        ),
        *((name, ctypes.c_double) for name in ("c0", "c1")),
        *((name, ctypes.c_int64) for name in ("shared_limit", "processors")),
        *((name, ctypes.c_bool) for name in ("residual", "affine", "is_double")),
    ]


@dataclass
class MaskedKernels:
    """The six ops with the arguments and results that the reference has; `saved` differs."""

    library: ctypes.CDLL
    shared_limit: int = 0  # bytes a block may have, 0: as many as any GPU gives
    processors: int = 0
    orders: Sequence[int] = (0, 1)  # of threads and blocks

    def made_forward(
        self, x, terms, weights, biases, stairs, activation, residual, save
    ) -> tuple[Tensor, ...]:
        shape = self._shape("forward", x, weights, activation, residual)
        given, wanted = {"x": x}, {"y": (len(x), len(weights[-1]))}
        y, saved, *_ = self._forward(shape, given, wanted, terms, weights, biases, stairs, save)
        return y, saved

    def autoregressive_forward(
        self, x, terms, weights, biases, stairs, activation, residual, scale, c0, c1, save
    ) -> tuple[Tensor, ...]:
        shape = self._shape("forward", x, weights, activation, residual, (scale, c0, c1))
        wanted = {"y": x.shape, "ladj": x.shape[:1]}
        y, ladj, saved = self._forward(
            shape, {"x": x}, wanted, terms, weights, biases, stairs, save
        )
        return y, ladj, saved

    def autoregressive_inverse(
        self, y, terms, weights, biases, stairs, activation, residual, scale, c0, c1, save
    ) -> tuple[Tensor, ...]:
        shape = self._shape("inverse", y, weights, activation, residual, (scale, c0, c1))
        wanted = {"x": y.shape, "ladj": y.shape[:1]}
        return self._forward(shape, {"y": y}, wanted, terms, weights, biases, stairs, save)

    def made_backward(
        self, dy, x, saved, weights, stairs, activation, residual, *flags
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        shape = self._shape("backward", x, weights, activation, residual)
        return self._backward(shape, {"d_out": dy, "x": x, "saved": saved}, weights, stairs, *flags)

    def autoregressive_backward(
        self, dy, dladj, x, saved, weights, stairs, activation, residual, scale, c0, c1, *flags
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        shape = self._shape("backward", x, weights, activation, residual, (scale, c0, c1))
        given = {"d_out": dy, "d_ladj": dladj, "x": x, "saved": saved}
        return self._backward(shape, given, weights, stairs, *flags)

    def autoregressive_inverse_backward(
        self, dx, dladj, x, saved, weights, stairs, activation, residual, scale, c0, c1, *flags
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        shape = self._shape("inverse_backward", x, weights, activation, residual, (scale, c0, c1))
        given = {"d_out": dx, "d_ladj": dladj, "x": x, "saved": saved}
        return self._backward(shape, given, weights, stairs, *flags)

    def _shape(self, pass_, x, weights, activation, residual, scale=None) -> Shape:
        return Shape(
            *(PASSES.index(pass_), *x.shape, len(weights), activation, *(scale or (0, 0.0, 0.0))),
            *(self.shared_limit, self.processors, residual, scale is not None),
            x.dtype == torch.float64,
        )

    def _forward(self, shape, given, wanted, terms, weights, biases, stairs, save) -> tuple:
        if save:
            wanted["saved"] = None
        for layer, weight in enumerate(weights):
            given[f"weight{layer}"] = weight
            given[f"bias{layer}"] = biases[layer]
            if terms:
                given[f"term{layer}"] = terms[layer]
        found = self._run(shape, given, wanted, weights, stairs)
        saved = found.pop("saved", weights[0].new_empty(0))
        return (*found.values(), saved)

    def _backward(
        self, shape, given, weights, stairs, terms_grad, biases_given, x_grad, param_grads
    ) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
        wanted = {"d_in": given["x"].shape} if x_grad else {}
        for layer, weight in enumerate(weights):
            given[f"weight{layer}"] = weight
            if param_grads:
                wanted[f"dweight{layer}"] = weight.shape
                if biases_given >> layer & 1:
                    wanted[f"dbias{layer}"] = weight.shape[:1]
            if terms_grad >> layer & 1:
                wanted[f"dterm{layer}"] = (len(given["x"]), len(weight))
        found = self._run(shape, given, wanted, weights, stairs)
        none = weights[0].new_empty(0)

        def lists(name: str) -> list[Tensor]:
            return [found.get(f"{name}{layer}", none) for layer in range(len(weights))]

        return found.get("d_in", none), lists("dterm"), lists("dweight"), lists("dbias")

    def _run(self, shape: Shape, given: dict, wanted: dict, weights, stairs) -> dict[str, Tensor]:
        """One call in several orders of threads and blocks, which must agree to the last bit."""
        results = [
            self._run_once(order, shape, given, wanted, weights, stairs) for order in self.orders
        ]
        for name in wanted:
            first = results[0][name].view(torch.uint8)
            if not all(torch.equal(first, result[name].view(torch.uint8)) for result in results):
                raise cuda_on_host.KernelError(f"{name} depends on the order of threads and blocks")
        return results[0]

    def _run_once(self, order, shape, given, wanted, weights, stairs) -> dict[str, Tensor]:
        library, dtype = self.library, weights[0].dtype
        library.cuda_shim_set_order(order)
        buffers: dict[str, tuple[int, int]] = {}
        widths = [shape.features, *map(len, weights)]

        def buffer(name: str, size: int) -> int:
            address = library.cuda_shim_allocate(size)
            assert address, "no memory"
            buffers[name] = address, size
            return address

        def call(function: str) -> int | bytes | None:
            at = {name: address for name, (address, _) in buffers.items()}
            tensors = [at.get(name) for name in TENSORS]
            names = [f"{name}{layer}" for layer in range(len(weights)) for name in PARAMETERS]
            levels, start = [], at["stairs"]
            for width in [widths[0], *(width for width in widths[1:] for _ in range(2))]:
                levels.append(start)
                start += 4 * width
            arrays = [tensors, levels, [at.get(name) for name in names]]
            pointers = [(ctypes.c_void_p * len(array))(*array) for array in arrays]
            sizes = (ctypes.c_int64 * len(widths))(*widths)
            return getattr(library, function)(
                ctypes.byref(shape), pointers[0], sizes, pointers[1], pointers[2]
            )

        inputs = {**given, "stairs": stairs}
        for name, tensor in inputs.items():
            if tensor.shape != (0,):
                address = buffer(name, tensor.nbytes)
                ctypes.memmove(address, tensor.contiguous().data_ptr(), tensor.nbytes)
        wanted = {
            name: (call("autoregressive_saved"),) if name == "saved" else tuple(size)
            for name, size in wanted.items()
        }
        for name, size in wanted.items():
            buffer(name, torch.Size(size).numel() * weights[0].element_size())
        if need := call("autoregressive_workspace"):
            buffer("workspace", need)
        if error := call("autoregressive"):
            raise cuda_on_host.KernelError(error.decode())
        result = {name: torch.empty(size, dtype=dtype) for name, size in wanted.items()}
        for name, tensor in result.items():
            ctypes.memmove(tensor.data_ptr(), buffers[name][0], tensor.nbytes)
        for name, tensor in inputs.items():
            after = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            if name in buffers:
                ctypes.memmove(after.data_ptr(), buffers[name][0], tensor.nbytes)
                if not torch.equal(after.nan_to_num(), tensor.nan_to_num()):
                    raise cuda_on_host.KernelError(f"the input {name} was overwritten")
        for address, size in buffers.values():
            library.cuda_shim_free(address, size)
        return result
