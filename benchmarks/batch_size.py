"""How many pairs fit a TPU chip in a training step, LoFTR at 840x840 and DKM at 672x896, beside straightforward forms.

The straightforward form is the official code's: nothing is recomputed; LoFTR's coarse loss keeps the matrix of all
confidences, DKM's correlation the sampled windows, its depthwise convolutions are the library's. It is kept here only.
Each form is compiled for one chip at batch sizes until the largest that fits is known; HBM is the compiler's figure.

    pip install -e ".[tpu-compile]"
    python benchmarks/batch_size.py [loftr|dkm ...] [--chip v5e] [--json FILE] [--plot FILE]
"""

import argparse
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # the TPU compiler is asked by name; no TPU is looked for
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor its metadata server
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling claims no chip

import jax
import numpy as np
from jax import numpy as jnp

from gim_jax import losses
from gim_jax.cli.models import format_table
from gim_jax.config import load_config
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.models import dkm_network
from gim_jax.ops import assignment
from gim_jax.ops.sampling import grid_sample
from gim_jax.train import objectives, sharding
from gim_jax.train.compiled import measure
from gim_jax.train.plan import slice_of, trace_step

EXPERIMENTS = {"loftr": "configs/loftr.py:outdoor", "dkm": "configs/dkm.py:gim"}
FORMS = {  # name: is it the straightforward one, dtype
    "straightforward, float32": (True, "float32"),
    "straightforward, bfloat16": (True, "bfloat16"),
    "ours, bfloat16": (False, "bfloat16"),
}
MAX_BATCH = 256


def coarse_loss(a, b, match1, mask0=None, mask1=None, *, negatives=True, **_):
    """`losses.coarse_loss` with the matrix of all confidences: focal loss of the dual softmax, alpha 0.25, gamma 2."""
    logits = jnp.einsum("blc,bsc->bls", a, b)
    if mask0 is not None:
        logits = jnp.where(mask0[:, :, None] & mask1[:, None], logits, -1e9)
    conf = jnp.clip(jax.nn.softmax(logits, 1) * jax.nn.softmax(logits, 2), 1e-6, 1 - 1e-6)
    true = match1[..., None] == jnp.arange(b.shape[1])
    positive = jnp.where(true, -0.25 * (1 - conf) ** 2 * jnp.log(conf), 0).sum() / jnp.maximum(true.sum(), 1)
    if not negatives:
        return positive, jnp.zeros(())
    return positive, jnp.where(true, 0, -0.25 * conf**2 * jnp.log(1 - conf)).sum() / jnp.maximum((~true).sum(), 1)


def row_logsumexp(a, b, mask=None, chunk=0):
    """`assignment.row_logsumexp` with the matrix of all logits."""
    logits = jnp.einsum("bmc,bnc->bmn", a, b)
    return jax.nn.logsumexp(logits if mask is None else jnp.where(mask[:, None], logits, -1e9), axis=-1)


def depthwise_conv(x, kernel):
    """`ops.depthwise.depthwise_conv` by the library."""
    numbers, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    kernel = kernel.astype(x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


def local_correlation(feat0, feat1, flow, radius):
    """`ops.correlation.local_correlation` with all sampled windows."""
    steps = np.arange(-radius, radius + 1)
    offsets = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 2) * np.divide(2, feat1.shape[2:0:-1])
    windows = grid_sample(feat1, flow[..., None, :] + offsets.astype(np.float32), align_corners=False)
    return jnp.einsum("bhwc,bhwkc->bhwk", feat0, windows).astype(jnp.float32) / feat0.shape[-1] ** 0.5


def refine(module, variables, features, cells0, cells1):
    """`objectives.refine` with all windows at once."""
    return module.apply(variables, features, cells0, cells1, method="refine")


STRAIGHTFORWARD = (
    (losses, coarse_loss),
    (objectives, refine),
    (assignment, row_logsumexp),
    (dkm_network, depthwise_conv),
    (dkm_network, local_correlation),
)


def one_chip(chip: str):
    """Return the mesh of the smallest slice's first chip; ValueError without the TPU compiler."""
    slice_ = slice_of(f"{chip}:2x2" if chip in ("v5e", "v6e") else f"{chip}:2x2x1", 1)
    return sharding.make_mesh(1, slice_.devices[0])


def hbm(model: str, form: str, batch: int, chip: str) -> dict:
    """Compile one form at one batch size, for one chip."""
    plain, dtype = FORMS[form]
    remat = "none" if plain else "all"
    config = load_config(EXPERIMENTS[model], [f"--config.model.dtype={dtype}", f"--config.model.remat={remat}"])
    config.optim.accumulate = 1
    mesh = one_chip(chip)
    before = [(module, function.__name__, getattr(module, function.__name__)) for module, function in STRAIGHTFORWARD]
    try:
        for module, function in STRAIGHTFORWARD if plain else ():
            setattr(module, function.__name__, function)
        traced = trace_step(config, mesh, batch)
    finally:
        for module, name, function in before:
            setattr(module, name, function)
    row = measure(traced, mesh.size, f"{chip}:1")
    return {"model": model, "form": form, "chip": chip, "batch": batch} | row


def search(model: str, form: str, chip: str, rows: list[dict], keep) -> int:
    """Find the largest batch that fits: the line through the two largest sizes tried says which to try next."""

    def mine() -> dict[int, dict]:
        return {r["batch"]: r for r in rows if (r["model"], r["form"], r["chip"]) == (model, form, chip)}

    def compiled(batch: int) -> dict:
        if batch not in mine():
            rows.append(row := hbm(model, form, batch, chip))
            keep()
            took = f"compiled in {row['compile_s']:.0f} s"
            print(f"{model}, {form}, {batch} pairs: {row['hbm_gib']:.2f} GiB, {took}", flush=True)
        return mine()[batch]

    one, two = compiled(1), compiled(2)
    low, high = sum(row["fits"] for row in (one, two)), MAX_BATCH if two["fits"] else 2
    while high - low > 1:
        (a, gib), (b, more) = sorted((batch, row["hbm_gib"]) for batch, row in mine().items())[-2:]
        guess = int(a + (one["hbm_there_gib"] - gib) * (b - a) / max(more - gib, 1e-3))
        guess = min(max(guess, low + 1), high - 1, 2 * max(low, 1))  # the line may fall
        low, high = (guess, high) if compiled(guess)["fits"] else (low, guess)
    return low


def plot(rows: list[dict], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(EXPERIMENTS), figsize=(10, 4), layout="constrained")
    for ax, model in zip(axes, EXPERIMENTS):
        for form in FORMS:
            points = sorted((r["batch"], r["hbm_gib"]) for r in rows if (r["model"], r["form"]) == (model, form))
            if points:
                ax.plot(*zip(*points), "o-", label=form)
        there = [r["hbm_there_gib"] for r in rows if r["model"] == model]
        if there:
            ax.axhline(there[0], color="black", linestyle=":")
        ax.set(xlabel="pairs per chip", ylabel="HBM, GiB (dotted: there)", title=EXPERIMENTS[model])
        ax.set(xscale="log", ylim=(0, 2.5 * max(there, default=1)))
        ax.legend()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", choices=[*EXPERIMENTS, []], help="default: both")
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--json", metavar="FILE", help="rows, written as they come; those in it are not compiled again")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    rows: list[dict] = []
    if args.json and Path(args.json).exists():
        rows = json.loads(Path(args.json).read_text())

    def keep():
        if args.json:
            write_json(args.json, rows)

    try:
        one_chip(args.chip)
    except ValueError as error:
        print(f"skipped: {error}")
        return
    table = [("model", "form", "largest batch", "of straightforward float32")]
    for model in args.models or EXPERIMENTS:
        found = {form: search(model, form, args.chip, rows, keep) for form in FORMS}
        for form, largest in found.items():
            first = found["straightforward, float32"]
            table.append((model, form, str(largest), f"{largest / first:.1f}" if first else "-"))
    print(f"\none {args.chip} chip, jax {jax.__version__}\n{format_table(table)}")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
