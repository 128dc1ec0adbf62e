"""Which images to match: all pairs, neighbours in a sequence, or what a small global descriptor finds similar.

A pair list is hloc's: a text file of `name0 name1`, one pair a line, both orders counting once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.cluster.vq import kmeans2

from gim_jax import rootsift
from gim_jax.image import read_image, resize, size_of, target_size, to_gray

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
NUM_WORDS = 32  # of the visual vocabulary; a descriptor has 32 x 128 numbers
LONG_SIDE = 640  # px, for the global descriptor
MAX_KEYPOINTS = 1000  # per image, for the global descriptor
MAX_SAMPLES = 20_000  # local descriptors that the vocabulary is made of
Pairs = list[tuple[str, str]]


def list_images(folder: str | Path) -> list[str]:
    """Return the names of all images below a folder, relative to it, sorted; ValueError where there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: {'is a file' if folder.exists() else 'no such folder'}, expected images in a folder"
        )
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
    if not names:
        raise ValueError(f"{folder}: found no image, expected some of {', '.join(sorted(SUFFIXES))}")
    blank = next((name for name in names if any(char.isspace() for char in name)), None)
    if blank is not None:
        raise ValueError(f"{folder}: found the name {blank!r}, expected names without blanks: pair lists have none")
    return names


def unique_pairs(pairs: Iterable[tuple[str, str]]) -> Pairs:
    """Drop pairs of an image with itself and what occurs twice, in either order; the first one stays."""
    seen: dict[frozenset[str], tuple[str, str]] = {}
    for name0, name1 in pairs:
        if name0 != name1:
            seen.setdefault(frozenset((name0, name1)), (name0, name1))
    return list(seen.values())


def exhaustive(names: Sequence[str]) -> Pairs:
    """Return all pairs."""
    return [(name0, name1) for index, name0 in enumerate(names) for name1 in names[index + 1 :]]


def sequential(names: Sequence[str], overlap: int = 5) -> Pairs:
    """Pair every image with the next `overlap` ones, and with those 2, 4, 8, ... 2^overlap farther (as COLMAP does)."""
    steps = sorted({*range(1, overlap + 1), *(2**power for power in range(overlap + 1))})
    return [(name, names[i + step]) for i, name in enumerate(names) for step in steps if i + step < len(names)]


def numbered_words(path: str | Path, what: str) -> list[tuple[int, list[str]]]:
    """Read (number from 1, words) of every line of a text file that is not blank; `what` it is stands in errors."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a {what}: {error}") from error
    return [(number, words) for number, line in enumerate(lines, 1) if (words := line.split())]


def read_pair_list(path: str | Path, names: Iterable[str]) -> Pairs:
    """Read a pair list; ValueError with file and line for another number of words or an unknown image."""
    known, pairs = set(names), []
    for number, words in numbered_words(path, "list of pairs"):
        if len(words) != 2:
            raise ValueError(f"{path}:{number}: found {len(words)} words, expected two names")
        missing = [word for word in words if word not in known]
        if missing:
            raise ValueError(f"{path}:{number}: {missing[0]}: no such image")
        pairs.append((words[0], words[1]))
    return unique_pairs(pairs)


class GlobalDescriptor:
    """VLAD (Jegou et al., CVPR 2010) of RootSIFT with a vocabulary made of the images themselves: needs no weights."""

    def __init__(self, folder: str | Path, names: Sequence[str], progress: Callable[[int, int], None] | None = None):
        self.folder = Path(folder)
        local = []
        for index, name in enumerate(names):
            local.append(self._local(self.folder / name))
            if progress:
                progress(index + 1, len(names))
        rng = np.random.default_rng(0)
        pool = np.concatenate(local)
        if len(pool) < 2 * NUM_WORDS:
            raise ValueError(f"{folder}: found {len(pool)} local descriptors in all images, too few to compare images")
        sample = pool[rng.permutation(len(pool))[:MAX_SAMPLES]]
        self.words = kmeans2(sample, NUM_WORDS, minit="++", rng=0)[0]
        self.names, self.table = list(names), np.stack([self._aggregate(desc) for desc in local])

    def _local(self, path: Path) -> np.ndarray:
        image = read_image(path)
        gray = resize(to_gray(image), target_size(size_of(image), long_side=LONG_SIDE, upscale=False))
        return rootsift.extract(gray, MAX_KEYPOINTS).desc

    def _aggregate(self, desc: np.ndarray) -> np.ndarray:
        vlad = np.zeros_like(self.words)
        if len(desc):
            word = np.argmax(desc @ self.words.T - 0.5 * (self.words**2).sum(1), axis=1)
            np.add.at(vlad, word, desc - self.words[word])
        vlad /= np.maximum(np.linalg.norm(vlad, axis=1, keepdims=True), 1e-12)  # All about VLAD, CVPR 2013
        return (vlad / max(np.linalg.norm(vlad), 1e-12)).ravel().astype(np.float32)

    def similar(self, path: str | Path, num: int) -> list[str]:
        """Return the names of the `num` images most similar to an image file, best first."""
        score = self.table @ self._aggregate(self._local(Path(path)))
        return [self.names[index] for index in np.argsort(-score, kind="stable")[:num]]

    def pairs(self, num: int) -> Pairs:
        """Pair every image with the `num` most similar others."""
        score = self.table @ self.table.T
        np.fill_diagonal(score, -np.inf)
        best = np.argsort(-score, axis=1, kind="stable")[:, : min(num, len(self.names) - 1)]
        return unique_pairs((self.names[i], self.names[j]) for i, row in enumerate(best) for j in row)
