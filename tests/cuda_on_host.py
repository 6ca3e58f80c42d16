"""Runs the CUDA kernels on the CPU: compiles them against cuda_shim/ and calls them."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tests" / "cuda_shim"
# bounds, alignment: an index outside a local array or a misplaced 16-byte access traps
FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-ffp-contract=fast", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=bounds,alignment", "-fsanitize-undefined-trap-on-error"),
    *(f"-I{SHIM}", f"-I{ROOT / 'csrc'}"),
]
ARGUMENTS = "in w u b out ladj a d_out dladj d_in dw du db workspace".split()


class Sizes(ctypes.Structure):
    """The struct of the same name in cuda_shim/planar_flow.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "features", "steps")),
        *((f, ctypes.c_bool) for f in ("shared", "centred", "inverse", "param_grads", "is_double")),
    ]


def compiler() -> str | None:
    return shutil.which("g++")


def compile_kernels(folder: Path, csrc: Path = ROOT / "csrc") -> ctypes.CDLL:
    """The kernels of csrc and what executes them, as one shared library in a folder."""
    sources = sorted([*csrc.glob("*/*.cu"), *SHIM.glob("*.cpp")])

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [compiler(), *FLAGS, f"-I{csrc}", "-x", "c++", "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "cuda_on_host.so"
    subprocess.run([compiler(), "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.cuda_shim_allocate.restype = ctypes.c_void_p
    loaded.cuda_shim_allocate.argtypes = [ctypes.c_size_t]
    loaded.cuda_shim_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.planar_flow.restype = ctypes.c_char_p
    loaded.planar_flow_workspace.restype = ctypes.c_size_t
    loaded.autoregressive.restype = ctypes.c_char_p
    loaded.autoregressive_workspace.restype = ctypes.c_size_t
    loaded.autoregressive_saved.restype = ctypes.c_int64
    return loaded


class KernelError(Exception):
    """What a launch reported."""


class Kernels:
    """planar_flow's CUDA kernels, with the reference's argument conventions."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.shift = 0  # bytes between the end of a tensor and of its memory

    def forward(
        self, z: Tensor, w: Tensor, u: Tensor, b: Tensor, centred: bool, inverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(out, ladj, a) of a chain, in either direction."""
        outputs = {"out": z.shape, "ladj": z.shape[:1], "a": (*z.shape[:1], w.shape[-2])}
        given = {"in": z, "w": w, "u": u, "b": b}
        return self._run(given, outputs, False, centred, inverse, False)

    def backward(
        self,
        d_out: Tensor,
        dladj: Tensor,
        z: Tensor,
        out: Tensor,
        w: Tensor,
        u: Tensor,
        a: Tensor,
        centred: bool,
        inverse: bool,
        param_grads: bool = True,
    ) -> tuple[Tensor, ...]:
        """(d_in, dw, du, db), or d_in alone."""
        given = {"in": z, "w": w, "u": u, "out": out, "a": a, "d_out": d_out, "dladj": dladj}
        outputs = {"d_in": z.shape}
        if param_grads:
            outputs |= {"dw": w.shape, "du": u.shape, "db": w.shape[:-1]}
        return self._run(given, outputs, True, centred, inverse, param_grads)

    def _run(
        self,
        given: dict[str, Tensor],
        outputs: dict[str, tuple[int, ...]],
        backward: bool,
        centred: bool,
        inverse: bool,
        param_grads: bool,
    ) -> tuple[Tensor, ...]:
        """One call, in opposite orders of threads and blocks, which must agree to the last bit."""
        z, w = given["in"], given["w"]
        double = z.dtype == torch.float64
        sizes = Sizes(*z.shape, w.shape[-2], w.dim() == 2, centred, inverse, param_grads, double)
        results = []
        for order in (0, 1):
            self.library.cuda_shim_set_order(order)
            bytes_of = {name: tensor.nbytes for name, tensor in given.items()}
            for name, shape in outputs.items():
                bytes_of[name] = torch.Size(shape).numel() * z.element_size()
            buffers = {name: self._buffer(size + self.shift) for name, size in bytes_of.items()}
            pointers = (ctypes.c_void_p * len(ARGUMENTS))()
            for i, name in enumerate(ARGUMENTS[:-1]):
                pointers[i] = buffers[name][0] if name in buffers else None
            need = self.library.planar_flow_workspace(ctypes.byref(sizes), pointers, backward)
            if need:
                buffers["workspace"] = self._buffer(need)
                pointers[len(ARGUMENTS) - 1] = buffers["workspace"][0]
            for name, tensor in given.items():
                ctypes.memmove(buffers[name][0], tensor.contiguous().data_ptr(), tensor.nbytes)
            error = self.library.planar_flow(ctypes.byref(sizes), pointers, backward)
            if error:
                raise KernelError(error.decode())
            result = {name: torch.empty(shape, dtype=z.dtype) for name, shape in outputs.items()}
            for name, tensor in result.items():
                ctypes.memmove(tensor.data_ptr(), buffers[name][0], tensor.nbytes)
            for name, tensor in given.items():
                after = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                ctypes.memmove(after.data_ptr(), buffers[name][0], tensor.nbytes)
                if not torch.equal(after.nan_to_num(), tensor.nan_to_num()):
                    raise KernelError(f"the input {name} was overwritten")
            for address, size in buffers.values():
                self.library.cuda_shim_free(address, size)
            results.append(result)
        for name in outputs:
            first, second = (result[name].view(torch.uint8) for result in results)
            if not torch.equal(first, second):
                raise KernelError(f"{name} depends on the order of threads and blocks")
        return tuple(results[0].values())

    def _buffer(self, size: int) -> tuple[int, int]:
        address = self.library.cuda_shim_allocate(size)
        assert address, "no memory"
        return address, size
