"""Hand-made training records for the tests: textured images of known homography, no labelling needed."""

import cv2
import ml_collections
import numpy as np

from gim_jax.data import records


def texture(seed: int, width: int, height: int) -> np.ndarray:
    """Make a smooth random colour image, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 8, 2), max(width // 8, 2), 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def make_record(seed: int = 0, num_matches: int = 64, width: int = 96, height: int = 64, **changes):
    """Make a record whose second image is the first shifted by (3, 2) px, with exact correspondences."""
    rng = np.random.default_rng(seed)
    image = texture(seed, width + 8, height + 8)
    crops = [image[4 : 4 + height, 4 : 4 + width], image[2 : 2 + height, 1 : 1 + width]]
    jpegs = [cv2.imencode(".jpg", crop)[1].tobytes() for crop in crops]
    kpts0 = rng.uniform((0, 0), (width - 4, height - 3), (num_matches, 2))
    correspondences = np.concatenate([kpts0, kpts0 + (3, 2)], axis=1).astype(np.float32)
    values = dict(
        image0=jpegs[0],
        image1=jpegs[1],
        size0=(width, height),
        size1=(width, height),
        correspondences=correspondences,
        confidence=rng.uniform(0.1, 1, num_matches).astype(np.float32),
        teacher=(np.arange(num_matches) % 2).astype(np.int32),
        teachers=("rootsift", "loftr"),
        hops=(1 + np.arange(num_matches) % 3).astype(np.int32),
        F=np.array([[0, 0, 2], [0, 0, -3], [-2, 3, 0]], np.float64),
        frame0=20,
        frame1=60,
        time0_s=3600.03125,
        time1_s=3601.3671875000001,
        interval=40,
        video="a walk.mp4",
        video_sha256="ab" * 32,
        licence="CC-BY-4.0",
        label_config_hash="0123456789abcdef",
    )
    return records.PairRecord(**(values | changes))


def data_config(folder, **changes):
    """Make the `config.data` of a small gray pipeline; `changes` replace its settings."""
    values = dict(
        records=str(folder),
        weights=(),
        split="train",
        size=(64, 48),
        channels=1,
        max_matches=32,
        min_matches=4,
        num_threads=0,
        num_prefetch=2,
        on_damage="skip",
        augment={},
    )
    return ml_collections.ConfigDict(values | changes)
