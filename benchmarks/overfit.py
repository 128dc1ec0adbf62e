"""Each network learns four pairs by heart: the first question to ask of a loss and its gradient.

The tiny configurations train with the command's own loop on four pairs of pictures and their homographies, without
augmentation; then the network is asked for the very points it was taught. Prints, of them, the share that it puts
within 1 and 3 px of the label, and the median error: SuperGlue and LightGlue match the labelled points with each other,
LoFTR its cells, which the labels lie on, and DKM says where every point goes.

    python benchmarks/overfit.py [loftr dkm superglue lightglue] [--steps 200] [--json FILE] [--plot FILE]
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import cv2
import jax
import numpy as np

from gim_jax import api, losses_dense
from gim_jax.cli.models import format_table
from gim_jax.config import load_config
from gim_jax.data import records
from gim_jax.data.json_file import write_json
from gim_jax.data.pipeline import Batches
from gim_jax.data.tfrecord import write_atomic
from gim_jax.models import dkm
from gim_jax.models.loftr import COARSE
from gim_jax.models.sparse import valid_size
from gim_jax.train import loop
from gim_jax.train.objectives import to_float
from gim_jax.train.writers import read_metrics
from gim_jax.weights import store

NUM_PAIRS, NUM_LABELS = 4, 112
BORDER = 2 * COARSE  # px: LoFTR matches no cells nearer to the border
SHIFT_PX = 3  # of each corner, beside whole cells of all: what lies between two cells of LoFTR is matched to either
LEARNING_RATE = {"loftr": 3e-3, "dkm": 1e-3, "superglue": 1e-3, "lightglue": 1e-3}


def make_record(seed: int, size: tuple[int, int]) -> bytes:
    """A picture of blobs of many sizes and its image under a homography, labelled on cells of 8 px of image 0."""
    rng = np.random.default_rng(seed)
    width, height = size
    layers = [rng.uniform(0, 255, (height // n + 1, width // n + 1, 3)).astype(np.float32) for n in (2, 5, 13, 40)]
    image = np.mean([cv2.resize(layer, size, interpolation=cv2.INTER_CUBIC) for layer in layers], 0)
    image = np.clip(2 * (image - 127.5) + 127.5, 0, 255).astype(np.uint8)
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    shift = COARSE * rng.integers(-2, 3, (1, 2)) + rng.uniform(-SHIFT_PX, SHIFT_PX, (4, 2))
    H = cv2.getPerspectiveTransform(corners, (corners + shift).astype(np.float32))
    warped = cv2.warpPerspective(image, H, size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    x, y = np.meshgrid(np.arange(BORDER, width - BORDER, COARSE), np.arange(BORDER, height - BORDER, COARSE))
    kpts0 = np.stack([x.ravel(), y.ravel()], 1).astype(np.float32)
    kpts1 = cv2.perspectiveTransform(kpts0[None], H)[0]
    inside = ((kpts1 >= BORDER) & (kpts1 < np.subtract(size, BORDER))).all(1)
    rows = np.concatenate([kpts0, kpts1], 1)[inside]
    rows = rows[rng.permutation(len(rows))[:NUM_LABELS]]
    jpegs = [cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes() for picture in (image, warped)]
    ones = np.ones(len(rows), np.float32)
    record = records.PairRecord(
        *jpegs, size, size, rows, ones, np.zeros(len(rows), np.int32), ("homography",), ones.astype(np.int32),
        np.zeros((3, 3)), 0, 1, 0.0, 1.0, 1, f"{seed}", "", "", "",
    )  # fmt: skip
    return records.encode(record)


def errors(family: str, module, variables, batch) -> np.ndarray:
    """Ask for the labelled points: how far from the label each answer lies, px, infinite where there is none."""
    images, kpts = [batch["image0"], batch["image1"]], [batch["kpts0"], batch["kpts1"]]
    mask = np.asarray(batch["match_mask"])
    if family == "dkm":
        prepared = [dkm.prepare(module.config, to_float(image), None, image.shape[2:0:-1]) for image in images]
        error = losses_dense.sparse_loss(module.apply(variables, *prepared), *kpts, mask, False)[2]
    elif family == "loftr":
        found = {k: np.asarray(v) for k, v in module.apply(variables, *map(to_float, images)).items()}
        error = np.full(mask.shape, np.inf)
        for b, (points0, points1) in enumerate(zip(*map(np.asarray, kpts))):
            answers = {tuple(p): q for p, q, ok in zip(found["kpts0"][b], found["kpts1"][b], found["mask"][b]) if ok}
            for m, (point0, point1) in enumerate(zip(points0, points1)):
                if tuple(point0) in answers:
                    error[b, m] = np.linalg.norm(answers[tuple(point0)] - point1)
    else:
        sizes = [valid_size(images[i], batch[f"mask{i}"]) for i in range(2)]
        out = module.apply(variables, *map(to_float, images), *kpts, *sizes, method="match_at")
        answer, points = np.asarray(out["matches0"]), np.asarray(kpts[1])
        given = np.take_along_axis(points, np.maximum(answer, 0)[..., None], 1)
        error = np.where(answer >= 0, np.linalg.norm(given - points, axis=-1), np.inf)
    return np.asarray(error)[mask]


def overfit(family: str, steps: int, folder: Path) -> dict:
    """Train a family on four pairs and judge it on them."""
    config = load_config(f"configs/{family}.py:tiny")
    size = tuple(config.data.size)
    payloads = [make_record(seed, size) for seed in range(NUM_PAIRS)]
    records.write_dataset(folder / "pairs", "pairs", "train", 1, payloads)
    config.update(num_steps=steps, batch_size=NUM_PAIRS, log_every=1, checkpoint_every=steps)
    config.data.update(records=str(folder / "pairs"), max_matches=NUM_LABELS)
    config.data.augment.enabled = False
    config.optim.lr = LEARNING_RATE[family]
    module, _, _ = loop.build(config)

    def progress(step: int, of: int, values: dict) -> None:
        if step % 50 == 0:
            print(f"{family}: step {step} of {of}, loss {values['loss']:.3f}", flush=True)

    loop.train(config, folder / "run", progress)
    variables, _ = store.load(folder / "run" / loop.WEIGHTS)
    error = errors(family, module, variables, next(Batches(config.data, 0, NUM_PAIRS)))
    return {
        "family": family,
        "labels": len(error),
        "answered": float(np.isfinite(error).mean()),
        "within": {px: float((error < px).mean()) for px in (1, 3)},
        "median_px": float(np.median(error)),
        "losses": [line["loss"] for line in read_metrics(folder / "run")],
    }


def plot(rows: list[dict], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.semilogy(np.arange(1, len(row["losses"]) + 1), row["losses"], label=row["family"])
    axes.set(xlabel="step", ylabel="loss", title=f"{NUM_PAIRS} pairs, again and again")
    axes.legend()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(LEARNING_RATE)}; default: all")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    args = parser.parse_args()
    if unknown := set(args.families) - set(LEARNING_RATE):
        parser.error(f"FAMILY: found {unknown.pop()!r}, expected of {', '.join(LEARNING_RATE)}")
    api.enable_compilation_cache()
    rows = []
    for family in args.families or LEARNING_RATE:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(overfit(family, args.steps, Path(folder)))
    table = [("family", "labels", "loss, first", "last", "answered", "within 1 px", "3 px", "median error, px")]
    for row in rows:
        shares = [f"{100 * share:.1f} %" for share in (row["answered"], *row["within"].values())]
        ends = [f"{row['losses'][i]:.3f}" for i in (0, -1)]
        table.append((row["family"], str(row["labels"]), *ends, *shares, f"{row['median_px']:.2f}"))
    print(f"\n{args.steps} steps of {NUM_PAIRS} pairs, jax {jax.__version__}\n{format_table(table)}")
    if args.json:
        write_json(args.json, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
