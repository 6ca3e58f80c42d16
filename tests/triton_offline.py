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
from dataclasses import dataclass

import torch
import triton
from fastflow.kernels import planar_flow, planar_flow_shared
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
        elif name.endswith("_ptr"):
            signature[name] = pointer
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
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
    if "tf32" in compiled.asm["ptx"]:
        faults.append("TF32 arithmetic")
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
    cases = planar_flow_cases(ALL_FEATURES if args.all else USUAL_FEATURES)
    jobs = [(case, device) for case in cases for device in SHARED_MEMORY][:: args.every]
    bad = 0
    bad = 0
    for case, device in jobs:
        report = compile_case(case, device)
        flags = [name.lower() for name, value in case.constants.items() if value is True]
        print(
            f"sm_{device:<3} {case.kernel.__name__:30} {str(case.dtype)[6:]}",
            f"D={case.constants['D']:<5} {case.label:5} registers {report.registers:3}",
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
