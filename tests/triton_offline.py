"""Compiles the Triton kernels for GPUs that are not there, and inspects what came out.

    python tests/triton_offline.py [--all] [--every N]

Run without TRITON_INTERPRET. Every kernel is compiled with options that its launcher picks, for
some usual numbers of features or for all blocks (--all), on every device or on a sample of the
whole (every Nth). Checked: no register spills to local memory, shared memory
within the device's, no hidden TF32, no 32-bit product in an address. Prints a table, exits with 1
if anything is wrong.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastflow.kernels import (
    affine,
    masked_layers,
    masked_network,
    masked_sweep,
    masked_weights,
    planar_flow,
    planar_flow_shared,
)

# bytes of shared memory that a block can get, by compute capability
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
WIDE_ROW = 32 * 1024  # bytes; `row_options` documents that registers may spill from here
USUAL_FEATURES = [3, 64, 1001, 2048]
ALL_FEATURES = [1, 3, *(2**i for i in range(1, 14)), 1001]


@dataclass
class Case:
    """A kernel as its launcher would specialise it."""

    kernel: triton.JITFunction
    dtype: torch.dtype
    constants: dict
    options: dict
    absent: tuple[str, ...] = ()  # pointers that are None
    may_spill: bool = False
    label: str = ""
    divisible: tuple[str, ...] = ()  # numbers that are multiples of 16
    tuples: dict[str, tuple[bool, ...]] = field(default_factory=dict)  # which pointers are there

    @property
    def name(self) -> str:
        """The sizes and numbers that it was compiled for."""
        numbers = {
            key: self.constants.get(key) for key in ("D", "ACTIVATION", "SCALE", "PRECISION")
        }
        shown = [f"{key}={value}" for key, value in numbers.items() if value is not None]
        return " ".join([*shown, *filter(None, [self.label])])


@dataclass
class Report:
    """What the compiler made of a case."""

    registers: int
    local: int  # bytes a thread
    shared: int  # bytes a block
    faults: list[str]


def planar_flow_cases(features: list[int]) -> Iterator[Case]:
    for D in features:
        for dtype in (torch.float32, torch.float64):
            options = planar_flow.row_options(D, dtype)
            wide = options["BLOCK_D"] * dtype.itemsize >= WIDE_ROW
            for flags in range(8):
                flags = {
                    "SHARED": bool(flags & 1),
                    "INVERSE": bool(flags & 2),
                    "CENTRED": bool(flags & 4),
                }
                constants = {"D": D, **flags}
                yield Case(
                    planar_flow.planar_flow_forward_kernel,
                    dtype,
                    constants,
                    options,
                    may_spill=wide,
                )
                for_shared, for_amortised = ("u_hat_ptr", "pn_ptr"), ("dw_ptr", "du_ptr")
                for param_grads in (True, False):
                    absent = for_amortised if flags["SHARED"] else for_shared
                    if not param_grads:
                        absent = (*for_shared, *for_amortised, "gamma_ptr")
                    yield Case(
                        planar_flow.planar_flow_backward_kernel,
                        dtype,
                        constants | {"PARAM_GRADS": param_grads},
                        options,
                        absent,
                        may_spill=wide,
                    )
            for K in (1, 7, 64):
                for inverse in (False, True):
                    flags = {"D": D, "CENTRED": K == 7, "INVERSE": inverse}
                    yield Case(
                        planar_flow_shared.planar_flow_products_kernel,
                        dtype,
                        flags,
                        planar_flow_shared.product_options(D, K),
                        label=f"K={K}",
                    )
                    yield Case(
                        planar_flow_shared.planar_flow_parameters_kernel,
                        dtype,
                        flags,
                        planar_flow_shared.parameter_options(D, K, dtype),
                        may_spill=wide,
                        label=f"K={K}",
                    )


ACTIVATIONS = range(7)
STEPS = {0: (-6.9, 0.0), 1: (0.5, 1e-3), 2: (2.0, 1e-3), 3: (-5.0, 3.0), 4: (1.5, 0.0)}
# features, hidden widths .., outputs
SMALL_NETWORKS = [(3, 50, 50, 6), (16, 16, 16, 16, 32), (5, 10), (64, 128, 128, 128)]
LAYERS = [(512, 512), (1024, 1024), (300, 7), (14, 300)]  # N, K


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    return ("ieee", "tf32") if dtype == torch.float32 else ("ieee",)


def masked_layer_cases(everything: bool) -> Iterator[Case]:
    """What networks with a wide layer are made of."""
    for dtype in (torch.float32, torch.float64):
        for N, K in LAYERS:
            divisible = tuple(name for name, n in (("N", N), ("K", K)) if n % 16 == 0)
            common = {"label": f"{N}x{K}", "divisible": divisible}
            options = masked_layers.layer_options(N, K, dtype)
            weights = masked_weights.weight_options(dtype)
            for precision in precisions(dtype):
                given = {"PRECISION": precision}
                kernel = masked_weights.layer_weights_kernel
                yield Case(kernel, dtype, given, weights, **common)
                for number in ACTIVATIONS if everything or N == K == 512 else [0, 4]:
                    given = {"PRECISION": precision, "ACTIVATION": number}
                    kernel = masked_layers.layer_product_kernel
                    yield Case(kernel, dtype, given, options, **common)
                    absent = ("term_ptr", "skip_ptr", "p_ptr")
                    yield Case(kernel, dtype, given, options, absent, **common)
                    kernel = masked_layers.layer_pullback_kernel
                    yield Case(kernel, dtype, given, options, **common)
                    absent = ("skip_ptr", "a_ptr")
                    yield Case(kernel, dtype, given, options, absent, **common)
        for D in (1, 7, 512):
            for scale, constants in STEPS.items():
                given = dict(zip(("SCALE", "C0", "C1"), (scale, *constants)))
                options = affine.affine_options(D, dtype)
                divisible = ("D",) if D % 16 == 0 else ()
                for kernel in (affine.affine_kernel, affine.affine_grad_kernel):
                    yield Case(kernel, dtype, given, options, label=f"D={D}", divisible=divisible)


def masked_network_cases(everything: bool) -> Iterator[Case]:
    """Small networks, all layers in one launch."""
    steps = {-1: (0.0, 0.0)} | STEPS
    for dtype in (torch.float32, torch.float64):
        for widths in SMALL_NETWORKS:
            layers, residual = len(widths) - 1, len(widths) % 2 == 1
            options = masked_network.network_options(widths)
            common = {"label": "-".join(map(str, widths))}
            for precision in precisions(dtype):
                net = {"WIDTHS": widths, "PRECISION": precision}
                yield Case(
                    masked_weights.network_weights_kernel,
                    dtype,
                    net,
                    masked_weights.weight_options(dtype),
                    **common,
                )
                net = net | {"HIDDEN_UNITS": sum(widths[1:-1]), "RESIDUAL": residual}
                for number in ACTIVATIONS if everything or widths[0] == 3 else [0, 4]:
                    scale = number - 1 if widths[-1] == 2 * widths[0] and number < 6 else -1
                    step = dict(zip(("SCALE", "C0", "C1"), (scale, *steps[scale])))
                    given = net | step | {"ACTIVATION": number}
                    first, every = (True,) + (False,) * (layers - 1), (True,) * layers
                    yield Case(
                        masked_network.network_forward_kernel,
                        dtype,
                        given,
                        options,
                        () if residual or number % 2 else ("p_ptr",),
                        tuples={"weights": every, "biases": every, "terms": first},
                        **common,
                    )
                    if scale >= 0:
                        yield from masked_sweep_cases(dtype, given, common)
                    for grads in (True, False):
                        yield Case(
                            masked_network.network_backward_kernel,
                            dtype,
                            given | {"PARAM_GRADS": grads},
                            options,
                            () if grads else ("a_ptr",),
                            tuples={"weights": every},
                            # tiles of float64 fill the 255 registers of a thread: 48 bytes spill
                            may_spill=dtype == torch.float64,
                            **common,
                        )


def masked_sweep_cases(dtype: torch.dtype, given: dict, common: dict) -> Iterator[Case]:
    every, options = (True,) * (len(given["WIDTHS"]) - 1), masked_sweep.sweep_options()
    tuples = {"weights": every, "biases": every, "terms": every}
    yield Case(masked_sweep.sweep_kernel, dtype, given, options, tuples=tuples, **common)
    tuples = {"weights": every}
    yield Case(masked_sweep.sweep_back_kernel, dtype, given, options, tuples=tuples, **common)


def compile_case(case: Case, capability: int) -> Report:
    names = case.kernel.arg_names
    constants = case.constants | dict.fromkeys(case.absent)
    constants |= {name: value for name, value in case.options.items() if name in names}
    options = {name: value for name, value in case.options.items() if name not in names}
    pointer = {torch.float32: "*fp32", torch.float64: "*fp64"}[case.dtype]
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in case.tuples:
            there = case.tuples[name]
            signature[name] = tuple(pointer if one else "constexpr" for one in there)
            for at, one in enumerate(there):
                if one:
                    attributes[i, at] = [["tt.divisibility", 16]]
                else:
                    constants[i, at] = None
        elif name.endswith("_ptr"):
            signature[name] = "*i32" if name == "stairs_ptr" else pointer
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in case.divisible:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return inspect(case, capability, triton.compile(source, target=target, options=options))


def inspect(case: Case, capability: int, compiled: triton.compiler.CompiledKernel) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    shared = compiled.metadata.shared
    faults = []
    if stack and not case.may_spill:
        faults.append(f"{stack} bytes of local memory")
    if shared > SHARED_MEMORY[capability]:
        faults.append(f"{shared} bytes of shared memory, there are {SHARED_MEMORY[capability]}")
    wanted = case.constants.get("PRECISION") == "tf32"
    if ("tf32" in compiled.asm["ptx"]) != wanted:
        faults.append("no TF32 arithmetic" if wanted else "TF32 arithmetic")
    faults += narrow_products(compiled.asm["ttir"])
    return Report(registers, stack, shared, faults)


def narrow_products(ttir: str) -> list[str]:
    """Products of 32-bit integers: offsets overflow there, and nothing else here needs one."""
    pattern = r"arith\.muli .* : (?:tensor<[\dx]*x)?i32>?.*"
    return [f"32-bit product: {line}" for line in re.findall(pattern, ttir)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="all blocks, not only the usual ones")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth case")
    args = parser.parse_args()
    cases = chain(
        planar_flow_cases(ALL_FEATURES if args.all else USUAL_FEATURES),
        masked_layer_cases(args.all),
        masked_network_cases(args.all),
    )
    jobs = [(case, device) for case in cases for device in SHARED_MEMORY][:: args.every]
    bad = 0
    for case, device in jobs:
        report = compile_case(case, device)
        flags = [name.lower() for name, value in case.constants.items() if value is True]
        print(
            f"sm_{device:<3} {case.kernel.__name__:30} {str(case.dtype)[6:]}",
            f"{case.name:14} registers {report.registers:3}",
            f"local {report.local:3} shared {report.shared:6}",
            *flags,
            *(f"\n  FAULT: {fault}" for fault in report.faults),
            flush=True,
        )
        bad += bool(report.faults)
    print(f"{len(jobs)} compiled, {bad} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
