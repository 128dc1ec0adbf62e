"""What a traced program costs on chips that are not there: their own compiler is asked, and FLOPs are counted.

Memory, bytes and the compiler's own time are what it says of the program that every chip would run. It counts one turn
of a loop: FLOPs are counted in the traced program, bytes and time are raised by what the other turns move.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax

GIB = 2**30
CHIPS = {  # generation: HBM GiB, bfloat16 TFLOP/s, HBM GB/s, per chip (cloud.google.com/tpu/docs/system-architecture);
    # GHz: those TFLOP/s over two operations of 8, 4, 8 multiplier arrays of 128x128 and 4 of 256x256
    "v4": (32, 275, 1228, 1.05),
    "v5e": (16, 197, 819, 1.5),
    "v5p": (95, 459, 2765, 1.75),
    "v6e": (32, 918, 1640, 1.75),
}
PEAKS = {  # `device_kind`: bfloat16 TFLOP/s of what JAX calls a device (NVIDIA: data sheets, dense)
    "TPU v4": CHIPS["v4"][1],
    **dict.fromkeys(("TPU v5 lite", "TPU v5e"), CHIPS["v5e"][1]),
    **dict.fromkeys(("TPU v5", "TPU v5p"), CHIPS["v5p"][1]),
    **dict.fromkeys(("TPU v6 lite", "TPU v6e"), CHIPS["v6e"][1]),
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}
UNKNOWN_CYCLES = 2**62  # the compiler writes the largest integer of 64 bits
OUT_OF_MEMORY = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMG])(?: of|\) exceeds)")


def measure(traced: Any, chips: int, topology: str, effort: float = -1.0) -> dict[str, Any]:
    """Compile a traced program for the chips it is laid out for and read the compiler's figures.

    Args:
      traced: what `jax.jit(...).trace` gives.
      chips: how many run it. topology: theirs, such as "v5e:4x4".
      effort: of the compiler, -1 to 1; 0 is what `jax.jit` does and takes several times as long, with smaller
        temporaries.

    Returns: per chip hbm_gib (needed), hbm_there_gib, fits, arguments_gib, temporaries_gib, output_gib, tflop, gbyte
      (the compiler's times `loop_factor`), collectives {name: count}, num_collectives and collective_gbyte,
      compute_ms (FLOPs at the peak), memory_ms (bytes at the peak), compiler_ms (`estimated_cycles`, None without),
      step_ms (the largest), bound; compile_s. Where the compiler runs out of memory, only what is known then.
    """
    hbm_there, peak_tflops, peak_gbytes, ghz = CHIPS[topology.partition(":")[0]]
    tflop = count_flops(traced.jaxpr.jaxpr) / chips / 1e12
    row: dict[str, Any] = {"hbm_there_gib": hbm_there, "fits": False, "tflop": tflop}
    row["compute_ms"] = tflop / peak_tflops * 1e3
    start = time.monotonic()
    try:
        options = {"exec_time_optimization_effort": effort, "memory_fitting_effort": effort}
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        used = OUT_OF_MEMORY.search(str(error))
        if not used:
            raise
        row["hbm_gib"] = float(used[1]) * {"K": 2**-20, "M": 2**-10, "G": 1}[used[2]]
        return row | {"compile_s": time.monotonic() - start}
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes  # donated arguments become outputs
    needed = (arguments + temporaries + output + memory.generated_code_size_in_bytes) / GIB
    counts, moved = collectives(text)
    moved_bytes = loop_factor(text) * cost["bytes accessed"]
    row |= {
        "hbm_gib": needed,
        "fits": needed <= hbm_there,
        "arguments_gib": arguments / GIB,
        "temporaries_gib": temporaries / GIB,
        "output_gib": output / GIB,
        "gbyte": moved_bytes / 1e9,
        "memory_ms": moved_bytes / 1e6 / peak_gbytes,
        "compiler_ms": estimated_cycles(text) / ghz / 1e6 or None,
        "collectives": counts,
        "num_collectives": sum(counts.values()),
        "collective_gbyte": moved / 1e9,
    }
    times = {"compute": row["compute_ms"], "memory": row["memory_ms"], "compiler": row["compiler_ms"] or 0.0}
    row["step_ms"], row["bound"] = max(times.values()), max(("compute", "memory"), key=times.__getitem__)
    return row | {"compile_s": time.monotonic() - start}


def count_flops(jaxpr: Any) -> int:
    """Count the multiplications and additions of all matrix products and convolutions of a traced program.

    A scan counts times its length, a branch as its most expensive case, a loop of unknown length once.
    """
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += (
                2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            )
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            features_out = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // features_out
        elif name == "cond":
            total += max(count_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(count_flops(getattr(j, "jaxpr", j)) for j in _jaxprs(params))
            total += inner * (params["length"] if name == "scan" else 1)
    return total


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


@dataclass(frozen=True)
class Computation:
    """A block of a compiled program's text: its header and lines, and which blocks each line runs how many times."""

    text: str
    runs: tuple[tuple[str, int], ...]


def computations(text: str) -> dict[str, Computation]:
    """Split the text of a compiled program into its computations, by name; what runs another comes after it.

    A loop runs its body as often as the largest whole number in its condition says, which is how scans are compiled.
    """
    headers = list(re.finditer(r"^(?:ENTRY )?%(\S+) \(.*\{$", text, re.MULTILINE))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    named = {header[1]: text[header.start() : end] for header, end in zip(headers, ends)}

    def runs(block: str) -> Iterator[tuple[str, int]]:
        for condition, body in re.findall(r" while\(.*?condition=%([\w.-]+), body=%([\w.-]+)", block):
            yield body, max(map(int, re.findall(r"= s32\[\]\S* constant\((\d+)\)", named[condition])), default=1)
        for names in re.findall(r"(?:calls|to_apply|branch_computations)=(%[\w.-]+|\{[^}]*\})", block):
            yield from ((name, 1) for name in re.findall(r"%([\w.-]+)", names))

    return {name: Computation(block, tuple(runs(block))) for name, block in named.items()}


def times_run(program: dict[str, Computation]) -> dict[str, int]:
    """Say how often each computation runs, the last one once."""
    times = dict.fromkeys(program, 0)
    times[list(program)[-1]] = 1
    for name, computation in reversed(program.items()):
        for inner, count in computation.runs:
            times[inner] += times[name] * count
    return times


def loop_factor(text: str) -> float:
    """Say how many times the bytes of a compiled program that counts one turn of every loop all turns move.

    XLA's count (`HloCostAnalysis`) with each loop's body as the whole program says what a turn moves. It is that of the
    CPU, without a TPU's padding; hence a factor.
    """
    from jaxlib import _hlo, _jax

    program = computations(re.sub(r', metadata=\{(?:[^{}"]|"[^"]*")*\}', "", text))
    times, client = times_run(program), jax.devices("cpu")[0].client

    def moved(name: str) -> float:
        used = {name}
        for other, computation in reversed(program.items()):
            if other in used:
                used |= set(re.findall(r"(?:=\{?|, )%([\w.-]+)", computation.text))
        parts = [block.text.removeprefix("ENTRY ") for other, block in program.items() if other in used]
        module = "\n".join(["HloModule part\n", *parts[:-1], "ENTRY " + parts[-1]])
        return _jax.hlo_module_cost_analysis(client, _hlo.hlo_module_from_text(module))["bytes accessed"]

    once = moved(list(program)[-1])
    extra = sum(
        times[name] * (count - 1) * moved(body)
        for name, computation in program.items()
        for body, count in computation.runs
        if count > 1
    )
    return 1 + extra / once


def estimated_cycles(text: str) -> int:
    """Sum the cycles that the TPU compiler expects of the operations of a program, but for collectives and its own
    kernels, of which it says none or UNKNOWN_CYCLES."""
    program = computations(text)
    said = {name: map(int, re.findall(r'"estimated_cycles":"(\d+)"', c.text)) for name, c in program.items()}
    cycles = {name: sum(number for number in numbers if number < UNKNOWN_CYCLES) for name, numbers in said.items()}
    return sum(count * cycles[name] for name, count in times_run(program).items())


def collectives(text: str) -> tuple[dict[str, int], int]:
    """Find the collectives of a compiled program: {name: how many run}, and the bytes of their results on one chip."""
    counts: dict[str, int] = {}
    total = 0
    program = computations(text)
    for name, times in times_run(program).items():
        for shapes, kind, start in re.findall(rf"= (\S.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", program[name].text):
            sizes = [
                BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
                for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
            ]
            counts[kind] = counts.get(kind, 0) + times
            total += times * sum(sizes) // (2 if start else 1)  # what is under way lists its argument, too
    return counts, total
