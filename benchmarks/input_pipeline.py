"""The input pipeline: how many 640x480 training pairs per second one core makes, and how many chips that feeds.

Rates count CPU time, so that other load on the machine changes little. Records are textured pairs of 640x480 px with
256 correspondences, or with depth; JPEG quality 90.

    python benchmarks/input_pipeline.py [--pairs 200]
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import cv2
import ml_collections
import numpy as np

from gim_jax.cli.models import format_table
from gim_jax.data import records
from gim_jax.data.augment import Augment, decode_jpeg, make_sample
from gim_jax.data.depth import encode_depth
from gim_jax.data.pipeline import Batches

SIZE = (640, 480)
HOSTS = {
    "v5e (4 chips, 112 cores)": (4, 112),
    "v5p (4 chips, 208 cores)": (4, 208),
    "v6e (4 chips, 180 cores)": (4, 180),
}
# ct5lp-hightpu-4t, ct5p-hightpu-4t, ct6e-standard-4t (cloud.google.com/tpu/docs)


def make_record(seed: int, posed: bool) -> records.PairRecord:
    rng = np.random.default_rng(seed)
    noise = [rng.integers(0, 256, (SIZE[1] // n, SIZE[0] // n, 3), np.uint8) for n in (4, 32)]
    large = [cv2.resize(image, (SIZE[0] + 8, SIZE[1] + 8), interpolation=cv2.INTER_CUBIC) for image in noise]
    image = cv2.addWeighted(large[0], 0.4, large[1], 0.6, 0)
    crops = image[4 : 4 + SIZE[1], 4 : 4 + SIZE[0]], image[2 : 2 + SIZE[1], 1 : 1 + SIZE[0]]
    jpegs = [cv2.imencode(".jpg", crop, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes() for crop in crops]
    num = 0 if posed else 256
    kpts0 = rng.uniform((0, 0), (SIZE[0] - 4, SIZE[1] - 3), (num, 2))
    rows = np.concatenate([kpts0, kpts0 + (3, 2)], 1).astype(np.float32)
    extra = {}
    if posed:
        x, y = np.meshgrid(np.linspace(0, 3, SIZE[0]), np.linspace(0, 2, SIZE[1]))
        depth, span = encode_depth(4 + np.sin(x) * np.cos(y) + 0.01 * rng.standard_normal((SIZE[1], SIZE[0])))
        K = np.array([(500.0, 0, 319.5), (0, 500, 239.5), (0, 0, 1)])
        T = np.eye(4)
        T[:3, 3] = 0.02, 0.015, 0
        extra = dict(T_0to1=T, K0=K, K1=K, depth0=depth, depth1=depth, depth_ranges=np.array([span, span]), overlap=0.5)
    return records.PairRecord(
        *jpegs, SIZE, SIZE, rows, np.ones(num, np.float32), np.zeros(num, np.int32), ("x",), np.ones(num, np.int32),
        np.zeros((3, 3)), 0, 1, 0.0, 1.0, 1, f"{seed}", "", "", "", **extra,
    )  # fmt: skip


def per_core(function, count: int) -> float:
    """Calls per second of CPU time."""
    function(0)
    start = time.process_time()
    for i in range(count):
        function(i)
    return count / (time.process_time() - start)


def measure(posed: bool, count: int) -> dict[str, float]:
    """Rates per core of every stage, for one kind of pairs."""
    made = [make_record(i, posed) for i in range(16)]
    payloads = [records.encode(record) for record in made]

    def decode(i):
        for data in (made[i % 16].image0, made[i % 16].image1):
            decode_jpeg(data, SIZE, 3, SIZE)

    def sample(i, settings):
        make_sample(made[i % 16], np.random.default_rng(i), SIZE, 3, 2048, 64, settings, posed)

    plain, full = Augment(enabled=False), Augment()
    rates = {
        "parse and check the record": per_core(lambda i: records.decode(payloads[i % 16]), count),
        "decode both JPEGs": per_core(decode, count),
        "decode, fit, no augmentation": per_core(lambda i: sample(i, plain), count),
        "decode, augment": per_core(lambda i: sample(i, full), count),
    }
    with tempfile.TemporaryDirectory() as folder:
        records.write_dataset(Path(folder) / "set", "pairs", "train", 2, payloads)
        data = dict(records=f"{folder}/set", weights=(), split="train", size=SIZE, channels=3, depth=posed, augment={})
        data |= dict(max_matches=2048, min_matches=64, num_threads=2, num_prefetch=2, on_damage="raise")
        batches = Batches(ml_collections.ConfigDict(data), 0, 8)
        next(batches)
        start = time.process_time()
        for _ in range(count // 8):
            next(batches)
        # what is made ahead counts as time, not as pairs: a little too low
        rates["the whole pipeline, batches of 8"] = count // 8 * 8 / (time.process_time() - start)
        batches.close()
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=200)
    count = parser.parse_args().pairs
    cv2.setNumThreads(1)
    rows = [("what", "video pairs/s per core", "posed pairs/s per core")]
    table: dict[str, list[float]] = {}
    for posed in (False, True):
        for name, rate in measure(posed, count).items():
            table.setdefault(name, []).append(rate)
    rows += [(name, *(f"{value:.0f}" for value in values)) for name, values in table.items()]
    print(format_table(rows))
    video, posed_rate = table["the whole pipeline, batches of 8"]
    for host, (chips, cores) in HOSTS.items():
        print(f"{host}: {video * cores / chips:.0f} video or {posed_rate * cores / chips:.0f} posed pairs/s per chip")
    print(f"CPU {platform.processor() or platform.machine()}, OpenCV {cv2.__version__}, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
