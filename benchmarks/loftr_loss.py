"""LoFTR's coarse loss at training size, streamed, against the matrix of confidences that the official code keeps.

The peer is written in PyTorch as the official code has it: dual softmax, clipped confidences, focal loss over the true
pairs and, with dense supervision, over all others. Each form runs with its gradient in a process of its own; at 840x840
px (105 x 105 cells, the official training size) the peer with all pairs needs 7 GB.

Run: python benchmarks/loftr_loss.py [--repetitions 3]
"""

from __future__ import annotations

import argparse
import os
import statistics

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


def setup_streamed(side: int, negatives: bool):
    """Make our form ready to run; see `side_by_side.compare`."""
    import jax

    def value(a, b, match1):
        return streamed(a, b, match1, negatives)

    args = jax.device_put(labelled_tokens(side))
    program = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(*args).compile()
    planned_mb = program.memory_analysis().temp_size_in_bytes / MB

    def outputs(out):
        loss, (grad_a, grad_b) = jax.tree.map(np.asarray, out)
        return {"value": loss, "gradient of image 0": grad_a, "gradient of image 1": grad_b}

    return lambda: jax.block_until_ready(program(*args)), outputs, {"about": f"jax {jax.__version__}", "mb": planned_mb}


def setup_official(side: int, negatives: bool):
    """Make the official form ready to run (loftr_loss.py: focal loss of the dual softmax, alpha 0.25, gamma 2)."""
    import torch

    torch.set_num_threads(THREADS)
    a, b, match1 = (torch.from_numpy(x) for x in labelled_tokens(side))
    a.requires_grad_()
    b.requires_grad_()
    rows = torch.nonzero(match1[0] >= 0)[:, 0]
    truth = torch.zeros((1, a.shape[1], b.shape[1]), dtype=torch.bool)
    truth[0, rows, match1[0, rows].long()] = True

    def run():
        a.grad = b.grad = None
        scores = torch.einsum("blc,bsc->bls", a, b)
        conf = (scores.softmax(1) * scores.softmax(2)).clamp(1e-6, 1 - 1e-6)
        right = conf[truth]
        loss = (-0.25 * (1 - right) ** 2 * right.log()).mean()
        if negatives:
            wrong = conf[~truth]
            loss = loss + (-0.25 * wrong**2 * (1 - wrong).log()).mean()
        loss.backward()
        return loss.detach()

    def outputs(loss):
        return {"value": loss.numpy(), "gradient of image 0": a.grad.numpy(), "gradient of image 1": b.grad.numpy()}

    return run, outputs, {"about": f"torch {torch.__version__}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    print("| size, pairs | form | median s (CPU s) | resident MB above start |")
    print("|---|---|---|---|")
    for side, negatives in CASES:
        forms = {"streamed": (setup_streamed, (side, negatives)), "official": (setup_official, (side, negatives))}
        found = compare(forms, args.repetitions)
        what = f"{side}x{side}, {'all' if negatives else 'true'} pairs"
        for name, r in found.items():
            took = f"{statistics.median(r.wall_s):.2f} ({statistics.median(r.cpu_s):.2f})"
            print(f"| {what} | {name} | {took} | {r.run_peak_mb - r.start_mb:.0f} |")
        summary(what, *found.values(), (side // COARSE) ** 2)


def summary(what: str, ours, theirs, cells: int):
    """Print the ratios of one case and how far values and gradients are apart."""
    grown = [r.run_peak_mb - r.start_mb for r in (ours, theirs)]
    text = [
        f"resident {grown[0] / grown[1]:.3f} of the official form's",
        f"planned by the compiler {ours.info['mb']:.0f} MB, {ours.info['mb'] * MB / cells**2 / 4:.2f} of one matrix",
        f"time {statistics.median(a / b for a, b in zip(ours.wall_s, theirs.wall_s)):.2f}",
        f"CPU {statistics.median(a / b for a, b in zip(ours.cpu_s, theirs.cpu_s)):.2f}",
    ]
    for name, value in ours.outputs.items():
        other = theirs.outputs[name]
        text.append(f"{name} differs by {np.abs(value - other).max():.1e} of {np.abs(other).max():.1e}")
    about = f"{ours.info['about']}, {theirs.info['about']}, {THREADS} threads each, load {os.getloadavg()[0]:.1f}"
    print(f"<!-- {what}: {'; '.join(text)}; {about} -->", flush=True)


if __name__ == "__main__":
    main()
