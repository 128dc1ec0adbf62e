"""Point clouds registered by their views from above, against the truth; and ICP alone beside it.

    python benchmarks/registration.py FOLDER ... [--turns N]

A folder has `source.npy`, `target.npy` ([N, 3]) and `T_target_source.txt`. Besides as it is, every source is turned
about the vertical, evenly over a circle, and moved by up to 10 m, so that the answer is known and far from the
identity. ICP (small_gicp) alone starts from the identity.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from gim_jax import api
from gim_jax.tasks import bev, load_extra
from gim_jax.tasks.clouds import Cloud, read_cloud


def errors(T: np.ndarray | None, truth: np.ndarray) -> tuple[float, float]:
    """Rotation in degrees, translation in the units of the clouds; infinite without a pose."""
    if T is None:
        return np.inf, np.inf
    delta = T @ np.linalg.inv(truth)
    angle = np.degrees(2 * np.arcsin(min(np.linalg.norm(delta[:3, :3] - np.eye(3)) / np.sqrt(8), 1)))
    return float(angle), float(np.linalg.norm(T[:3, 3] - truth[:3, 3]))


def icp_alone(source: Cloud, target: Cloud) -> np.ndarray:
    small_gicp = load_extra("small_gicp", "clouds")
    result = small_gicp.align(
        target.points, source.points, np.eye(4), downsampling_resolution=0.1, max_correspondence_distance=1.0
    )
    return np.asarray(result.T_target_source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=8, help="motions of each source besides none")
    args = parser.parse_args()
    matcher, rng = api.load_matcher("rootsift"), np.random.default_rng(0)
    methods = {
        "gim-jax, RootSIFT": lambda a, b: bev.register(a, b, matcher).T_0to1,
        "gim-jax, RootSIFT, --icp": lambda a, b: bev.register(a, b, matcher, icp=True).T_0to1,
        "ICP alone": icp_alone,
    }
    print("| set | motion | method | registered within 2 deg and 0.5 m | rotation error, deg | translation, m | s |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.folders:
        source, target = (read_cloud(folder / f"{name}.npy") for name in ("source", "target"))
        truth = np.loadtxt(folder / "T_target_source.txt").reshape(4, 4)
        moves = [np.eye(4)]
        for turn in np.arange(args.turns) * 2 * np.pi / max(args.turns, 1):
            move, c, s = np.eye(4), np.cos(turn), np.sin(turn)
            move[:2, :2], move[:2, 3] = [[c, -s], [s, c]], rng.uniform(-10, 10, 2)
            moves.append(move)
        for label, method in methods.items():
            for motion, chosen in (("as it is", moves[:1]), (f"{args.turns} turned", moves[1:])):
                started, found = time.monotonic(), []
                for move in chosen:
                    moved = Cloud((source.points @ move[:3, :3].T + move[:3, 3]), source.colors)
                    found.append(errors(method(moved, target), truth @ np.linalg.inv(move)))
                if not found:
                    continue
                angle, distance = np.array(found).T
                good = (angle < 2) & (distance < 0.5)
                print(
                    f"| {folder.name} | {motion} | {label} | {good.sum()} of {len(found)} | median "
                    f"{np.median(angle):.2f}, max {angle.max():.2f} | median {np.median(distance):.3f}, max "
                    f"{distance.max():.3f} | {time.monotonic() - started:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
