"""LoFTR's coarse loss at training size, streamed, against the matrix of confidences that the official code keeps.

The dense form is written as the official code has it: dual softmax, clipped confidences, focal loss over the true
pairs and, with dense supervision, over all others. Each form runs with its gradient in a process of its own. At
840x840 px (105 x 105 cells, the official training size) the dense form with all pairs plans more memory than it may
have here (`--max_gb`): then that plan is printed, beside ours and what one matrix alone takes.

Run: python benchmarks/loftr_loss.py [--repetitions 3] [--max_gb 12]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import numpy as np
from side_by_side import THREADS, compare

CHANNELS = 256
COARSE = 8  # px per cell
CASES = ((480, True), (840, False), (840, True))  # side px, all pairs count (else the true ones only)
MB = 2**20


def labelled_tokens(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [1, L, C] of two images, of which seven in ten have a match, and its column [1, L], -1 for none."""
    rng = np.random.default_rng(0)
    count = (side // COARSE) ** 2
    match1 = np.where(rng.random(count) < 0.7, rng.permutation(count), -1)
    a, b = rng.standard_normal((2, count, CHANNELS), np.float32)
    true = match1 >= 0
    b[match1[true]] += 0.6 * a[true]
    scale = np.float32(1 / (CHANNELS * 0.1))  # by the number of channels and LoFTR's temperature
    return (a * scale)[None], b[None], match1[None].astype(np.int32)


def streamed(a, b, match1, negatives: bool):
    from gim_jax.losses import coarse_loss

    return sum(coarse_loss(a, b, match1, negatives=negatives))


def dense(a, b, match1, negatives: bool):
    from jax import numpy as jnp

    from gim_jax.ops.assignment import dual_softmax

    conf = jnp.clip(dual_softmax(jnp.einsum("blc,bsc->bls", a, b)), 1e-6, 1 - 1e-6)
    true = match1[..., None] == jnp.arange(b.shape[1])  # as a mask: the gradient of an index takes minutes on a CPU
    right = jnp.where(match1 >= 0, jnp.where(true, conf, 0).sum(2), 1)
    loss = jnp.where(match1 >= 0, -0.25 * (1 - right) ** 2 * jnp.log(right), 0).sum() / (match1 >= 0).sum()
    if negatives:
        loss += jnp.where(true, 0, -0.25 * conf**2 * jnp.log(1 - conf)).sum() / (~true).sum()
    return loss


def planned(loss, side: int, negatives: bool):
    """Compile a form with its gradient: the program and its temporaries in MB."""
    import jax

    def value(a, b, match1):
        return loss(a, b, match1, negatives)

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in labelled_tokens(side)]
    program = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(*shapes).compile()
    return program, program.memory_analysis().temp_size_in_bytes / MB


def setup(loss, side: int, negatives: bool, max_mb: float):
    """Make one form ready to run; see `side_by_side.compare`."""
    import jax

    start = time.perf_counter()
    program, temp_mb = planned(loss, side, negatives)
    info = {"temp_mb": temp_mb, "compile_s": time.perf_counter() - start, "version": f"jax {jax.__version__}"}
    args = jax.device_put(labelled_tokens(side))

    def run():
        return jax.block_until_ready(program(*args)) if temp_mb < max_mb else None

    def outputs(out):
        if out is None:
            return {}
        value, (grad_a, grad_b) = jax.tree.map(np.asarray, out)
        return {"value": value, "gradient of image 0": grad_a, "gradient of image 1": grad_b}

    return run, outputs, info


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--max_gb", type=float, default=12.0, help="a program that plans more is not run")
    args = parser.parse_args()
    print("| size, pairs | form | median s (CPU s) | resident MB above start | planned MB | compile s |")
    print("|---|---|---|---|---|---|")
    for side, negatives in CASES:
        arguments = (side, negatives, args.max_gb * 1024)
        forms = {"streamed": (setup, (streamed, *arguments)), "dense (official)": (setup, (dense, *arguments))}
        found = compare(forms, args.repetitions)
        what = f"{side}x{side}, {'all' if negatives else 'true'} pairs"
        for name, r in found.items():
            took, grown = "not run", ""
            if r.outputs:
                took = f"{statistics.median(r.wall_s):.2f} ({statistics.median(r.cpu_s):.2f})"
                grown = f"{r.run_peak_mb - r.start_mb:.0f}"
            print(f"| {what} | {name} | {took} | {grown} | {r.info['temp_mb']:.0f} | {r.info['compile_s']:.1f} |")
        summary(what, *found.values(), (side // COARSE) ** 2)


def summary(what: str, ours, theirs, cells: int):
    """Print the ratios of one case and how far values and gradients are apart."""
    matrix = cells**2 * 4 / MB
    text = [f"planned memory {ours.info['temp_mb'] / theirs.info['temp_mb']:.3f} of the dense form's"]
    text.append(f"{ours.info['temp_mb'] / matrix:.2f} of one matrix of confidences ({matrix:.0f} MB)")
    if theirs.outputs:
        grown = [r.run_peak_mb - r.start_mb for r in (ours, theirs)]
        text.append(f"resident {grown[0] / grown[1]:.3f}")
        text.append(f"time {statistics.median(a / b for a, b in zip(ours.wall_s, theirs.wall_s)):.2f}")
        text.append(f"CPU {statistics.median(a / b for a, b in zip(ours.cpu_s, theirs.cpu_s)):.2f}")
        for name, value in ours.outputs.items():
            other = theirs.outputs[name]
            text.append(f"{name} differs by {np.abs(value - other).max():.1e} of {np.abs(other).max():.1e}")
    load = f"{ours.info['version']}, {THREADS} threads each, load {os.getloadavg()[0]:.1f}"
    print(f"<!-- {what}: {'; '.join(text)}; {load} -->", flush=True)


if __name__ == "__main__":
    main()
