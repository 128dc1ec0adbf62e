"""RootSIFT at ZEB's settings on real pairs: the table against OpenCV alone, pairs per second, the share of each stage.

The pairs of a folder ($GIM_JAX_SHARED/data) are arranged as sets of ZEB. The peer is the released loop,
OpenCV and NumPy alone, one pair after the other, in the same run; its errors have to equal ours.

    python benchmarks/evaluation.py [--pairs 8] [--sets KIT ICL GL3 ETO] [--json FILE]
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from gim_jax import rootsift
from gim_jax.cli.models import format_table
from gim_jax.eval import benchmarks, zeb
from gim_jax.eval.document import versions
from gim_jax.eval.measure import Protocol, measure_pose
from gim_jax.image import read_image, to_gray

SHARED = Path(os.environ.get("GIM_JAX_SHARED", Path(__file__).resolve().parents[2] / "shared"))
SOURCES = {  # set: folder of real pairs that takes its place
    "GL3": "nerf_fox",
    "ETI": "gtsfm_lund_door",
    "ETO": "strecha_fountain-p11",
    "KIT": "kitti_vslampy_seq1",
    "ICL": "hololens_dvmvs",
}
CANVAS = {"KIT": (1240, 384), "ETI": (1600, 1072), "ETO": (1600, 1072)}  # (width, height), see ZEB's padding
MAPPINGS = ("corrected", "released")


def arrange(source: Path, root: Path, name: str, num: int) -> Path:
    """Arrange up to `num` pairs of a folder of real pairs as a set of ZEB: PNG images, one text file a pair."""
    s = zeb.SETS[name]
    folder = root / s.folder
    folder.mkdir(parents=True)
    lines = [text.split() for text in (source / "pairs_with_gt.txt").read_text().splitlines()]
    lines = [tokens for tokens in lines if tokens[2:4] == ["0", "0"]]
    for tokens in lines[:: max(len(lines) // num, 1)][:num]:
        stems = []
        for token in tokens[:2]:
            stem = token.rpartition("/")[2].rpartition(".")[0].replace("_", "").replace("-", "")
            image = cv2.imread(str(source / token), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
            cv2.imwrite(str(folder / f"real{s.sep}{stem}.png"), image)
            stems.append(stem)
        names = [stem + (".png" if name == "KIT" else ".JPG") for stem in stems]
        text = " ".join([*names, "0.5 0.5", *tokens[4:]])
        (folder / f"real{s.sep}{s.sep.join(stems)}.txt").write_text(text)
    return folder


def opencv_errors(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """The published recipe for RootSIFT with OpenCV and NumPy alone: file -> mapping -> error in degrees."""
    sep, canvas = zeb.SETS[name].sep, CANVAS.get(name)
    errors = {}
    for path in sorted(folder.glob("*.txt")):
        tokens = path.read_text().splitlines()[0].split()
        points, descriptors = [], []
        for token in tokens[:2]:
            image = cv2.imread(str(folder / f"{path.stem.split(sep)[0]}{sep}{token.rpartition('.')[0]}.png"))
            height, width = image.shape[:2]
            scale = min(canvas[0] / max(width, height), 1) if canvas else 1
            size = (round(width * scale), round(height * scale)) if canvas else (width // 8 * 8, height // 8 * 8)
            image = cv2.resize(image, size)
            if canvas:
                right, below = canvas[0] - size[0], canvas[1] - size[1]
                image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT)
            sift = cv2.SIFT_create(nfeatures=image.shape[0] * image.shape[1] // 64, contrastThreshold=1e-5)
            keypoints, found = sift.detectAndCompute(image, None)
            xy = np.array([k.pt for k in keypoints])
            ratio = np.array([width / size[0], height / size[1]])
            points.append({"released": xy * ratio, "corrected": (xy + 0.5) * ratio - 0.5})
            descriptors.append(np.sqrt(found / found.sum(1, keepdims=True)))
        idx0, idx1 = mutual_neighbours(*descriptors)
        K0, K1 = (np.array(tokens[a : a + 9], float).reshape(3, 3) for a in (4, 13))
        T = np.array(tokens[22:], float).reshape(4, 4)
        errors[path.stem] = {m: pose_error(points[0][m][idx0], points[1][m][idx1], K0, K1, T) for m in MAPPINGS}
    return errors


def mutual_neighbours(desc0: np.ndarray, desc1: np.ndarray, ratio: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Mutual nearest neighbours that pass the ratio test, 2000 rows of the similarity matrix at a time."""
    best, first, back, owner = [], [], np.full(len(desc1), -np.inf), np.zeros(len(desc1), int)
    for start in range(0, len(desc0), 2000):
        similarity = desc0[start : start + 2000] @ desc1.T
        best.append(np.sort(np.partition(similarity, -2, axis=1)[:, -2:], 1)[:, ::-1])
        first.append(similarity.argmax(1))
        column = similarity.max(0)
        owner = np.where(column > back, start + similarity.argmax(0), owner)
        back = np.maximum(back, column)
    distance, nearest = np.sqrt(np.maximum(2 - 2 * np.concatenate(best), 0)), np.concatenate(first)
    mutual = owner[nearest] == np.arange(len(nearest))
    good = np.flatnonzero(mutual & (distance[:, 0] < ratio * distance[:, 1]))
    return good, nearest[good]


def pose_error(p0, p1, K0, K1, T) -> float:
    """Error of the relative pose in degrees, the larger of rotation and direction; inf without a pose."""
    p0 = (p0 - K0[:2, 2]) / [K0[0, 0], K0[1, 1]]
    p1 = (p1 - K1[:2, 2]) / [K1[0, 0], K1[1, 1]]
    if len(p0) < 5:
        return np.inf
    threshold = 0.5 / np.mean([K0[0, 0], K1[1, 1], K0[0, 0], K1[1, 1]])
    E, mask = cv2.findEssentialMat(p0, p1, np.eye(3), cv2.RANSAC, 0.99999, threshold)
    if E is None:
        return np.inf
    poses = [cv2.recoverPose(e, p0, p1, np.eye(3), 1e9, mask=mask) for e in np.vsplit(E, len(E) // 3)]
    _, R, t = max(poses, key=lambda pose: pose[0])[:3]
    # as released: of a true rotation that was written with few digits the trace says something else than Rodrigues
    angle = np.degrees(np.arccos(np.clip((np.trace(R.T @ T[:3, :3]) - 1) / 2, -1, 1)))
    cosine = abs(t[:, 0] @ T[:3, 3]) / np.linalg.norm(T[:3, 3])
    return max(angle, np.degrees(np.arccos(min(cosine, 1))))


def auc5(errors) -> float:
    """AUC@5 in percent: trapezoids of the recall curve."""
    errors = np.asarray(errors)
    hits = np.sort(errors[errors < 5])
    curve, recall = np.concatenate([[0], hits, [5]]), np.concatenate([np.arange(len(hits) + 1), [len(hits)]])
    return float(100 * np.sum(np.diff(curve) * (recall[1:] + recall[:-1]) / 2) / 5 / len(errors))


def stages(pairs) -> dict[str, float]:
    """Seconds of each stage of our path, one after the other in this process."""
    spent = dict.fromkeys(("decode and feed", "SIFT", "match", "pose"), 0.0)
    for pair in pairs:
        begin = time.perf_counter()
        fed = [zeb.SETS[pair.set].feed(read_image(path, exif=False)) for path in (pair.path0, pair.path1)]
        spent["decode and feed"] += -begin + (begin := time.perf_counter())
        found = [rootsift.extract(to_gray(image)) for image, _ in fed]
        spent["SIFT"] += -begin + (begin := time.perf_counter())
        idx0, idx1, _ = rootsift.match(found[0].desc, found[1].desc)
        spent["match"] += -begin + (begin := time.perf_counter())
        measure_pose([found[0].kpts[idx0], found[1].kpts[idx1]], [sizes[0] for _, sizes in fed], pair, Protocol())
        spent["pose"] += time.perf_counter() - begin
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=8, help="of each set")
    parser.add_argument("--sets", nargs="+", default=["KIT", "ICL", "GL3", "ETO"], choices=list(SOURCES))
    parser.add_argument("--json")
    args = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit(f"no folder of real pairs at {SHARED / 'data'} (set GIM_JAX_SHARED)")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = {n: arrange(SHARED / "data" / SOURCES[n], root / "zeb", n, args.pairs) for n in args.sets}
        begin = time.perf_counter()
        peer = {name: opencv_errors(path, name) for name, path in folders.items()}
        peer_s = time.perf_counter() - begin
        seconds, rows = {}, []
        for devices in (1, os.cpu_count() or 1):
            plan = benchmarks.zeb_plan(root / "zeb", "rootsift", args.sets)
            begin = time.perf_counter()
            content, _ = benchmarks.evaluate(plan, "rootsift", folder=root / f"run{devices}", num_devices=devices)
            seconds[devices] = time.perf_counter() - begin
        results = {m: r for r, m in zip(content["results"], MAPPINGS)}
        results.setdefault("released", results["corrected"])
        for mapping in MAPPINGS:
            for record in results[mapping]["sets"]:
                want = auc5([error[mapping] for error in peer[record["set"]].values()])
                got = 100 * record["auc"]["5"]
                rows.append((mapping, record["set"], record["num_pairs"], got, want, got - want))
        spent = stages(plan.pairs)
    heading = ("mapping", "set", "pairs", "AUC@5", "OpenCV alone", "difference")
    cells = [(m, s, str(n), f"{a:.3f}", f"{b:.3f}", f"{d:+.4f}") for m, s, n, a, b, d in rows]
    print(format_table([heading, *cells]) + "\n")
    num, total = len(plan.pairs), sum(spent.values())
    share = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in spent.items())
    for devices, s in seconds.items():
        print(f"{devices} matching threads: {num / s:.2f} pairs/s, {peer_s / s:.2f} times the peer")
    print(f"peer, OpenCV straight: {num / peer_s:.2f} pairs/s")
    print(f"one stage after the other: {num / total:.2f} pairs/s: {share}")
    print(f"{os.cpu_count()} cores, load before {load:.1f}; " + ", ".join(f"{k} {v}" for k, v in versions().items()))
    if args.json:
        result = {"rows": rows, "seconds": seconds, "peer_s": peer_s, "stages_s": spent, "versions": versions()}
        Path(args.json).write_text(json.dumps(result, indent=1))
    assert max(abs(row[-1]) for row in rows) < 0.01, "the table differs from OpenCV's"


if __name__ == "__main__":
    main()
