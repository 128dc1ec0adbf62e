"""HPatches homographies: 108 sequences, 540 pairs, by DKM's and by LoFTR's convention.

Source of the eight that are left out: D2-Net (their images are larger than the others). DKM counts pixels of the
stored images over their short side / 480; LoFTR those of images resized to a short side of 480.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from gim_jax.eval.measure import Pair, Protocol
from gim_jax.eval.run import Feed
from gim_jax.image import image_size

LEFT_OUT = ("i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding") + (
    *("v_artisans", "v_astronautis", "v_talent"),
)
THRESHOLDS_PX = (3.0, 5.0, 10.0)
NUM_PAIRS = 540
SHORT = (("short_side", 480),)
HPATCHES = {  # preset: as in `in_domain`; "corrected": pixel centres are whole numbers in both
    "dkm": (
        Feed(),
        {"size": (720, 540), "upsample_size": None},
        Protocol("homography", threshold_px=3.0, unit_px=480.0),
    ),
    "loftr": (
        Feed(SHORT),
        {},
        Protocol("homography", threshold_px=3.0, confidence=0.995, frame=SHORT, max_matches=1024),
    ),
}


def read_hpatches(root: str | Path) -> list[Pair]:
    """Read the pairs 1 -> 2 to 6 of every sequence folder (`i_*`, `v_*`: `1.ppm` to `6.ppm`, `H_1_2` to `H_1_6`).

    Raises:
      ValueError: no sequence; naming the file: a missing image, a homography that is not nine finite numbers or that
        cannot be inverted.
    """
    root = Path(root)
    root = root / "hpatches-sequences-release" if (root / "hpatches-sequences-release").is_dir() else root
    folders = [f for f in sorted(root.glob("[iv]_*")) if f.is_dir() and f.name not in LEFT_OUT]
    if not folders:
        raise ValueError(f"{root}: found no sequence, expected folders such as i_ajuntament and v_abstract")
    out = []
    eye = np.eye(4)
    for folder in folders:
        for k in range(2, 7):
            H = _read_H(folder / f"H_1_{k}")
            paths = folder / "1.ppm", folder / f"{k}.ppm"
            for path in paths:
                image_size(path)
            names = [f"{folder.name}/{path.name}" for path in paths]
            pair = Pair(names[0], names[1], paths[0], paths[1], 0, 0, None, eye[:3, :3], eye[:3, :3], eye, 1)
            out.append(replace(pair, set="HPatches", identifier=f"{folder.name}#1#{k}", H=H))
    return out


def _read_H(path: Path) -> np.ndarray:
    try:
        text = path.read_bytes()[:4096].decode("ascii")
        H = np.array([float(token) for token in text.split()])
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}, expected nine numbers") from error
    if H.size != 9 or not np.isfinite(H).all():
        raise ValueError(f"{path}: found {H.size} numbers, expected nine finite ones")
    H = H.reshape(3, 3)
    if abs(np.linalg.det(H)) < 1e-12:
        raise ValueError(f"{path}: found a homography that cannot be inverted")
    return H
