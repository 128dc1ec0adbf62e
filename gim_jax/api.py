"""Match two images: `gim_jax.match(...)`, or `gim_jax.load_matcher(...)` for many pairs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from gim_jax.matchers import Matcher, Network, RootSIFT, SparseNetwork
from gim_jax.models import FAMILIES, MODELS, get_model
from gim_jax.types import Matches

__all__ = ["enable_compilation_cache", "list_models", "load_matcher", "match"]
KEPT = 4  # matchers of `match`
_matchers: dict[str, Matcher] = {}  # the latest used last


def match(image0: Any, image1: Any, model: str = "rootsift", weights: str | Path | None = None, **settings) -> Matches:
    """Match two images.

    Args:
      image0, image1: a path, a PIL image or an [H, W, 3] uint8 RGB array, see `gim_jax.image.read_image`.
      model: one of `list_models()`.
      weights: the model's `.safetensors` file; `rootsift` needs none.
      **settings: see `load_matcher`.

    Returns:
      `Matches` in pixels of the original images; possibly empty.
    """
    stat = os.stat(weights) if isinstance(weights, str | os.PathLike) and os.path.isfile(weights) else None
    key = repr((model, weights, stat and (stat.st_mtime_ns, stat.st_size), sorted(settings.items())))
    matcher = _matchers.pop(key, None) or load_matcher(model, weights, **settings)
    if isinstance(weights, str | os.PathLike | None):
        _matchers[key] = matcher
    while len(_matchers) > KEPT:
        del _matchers[next(iter(_matchers))]
    return matcher(image0, image1)


def list_models() -> list[str]:
    """Return the names of all matchers."""
    return list(MODELS)


def load_matcher(name: str, weights: Any = None, batch_size: int = 1, **settings) -> Matcher:
    """Load a matcher: call it with two images, or `match_pairs` with a list of pairs.

    Args:
      name: one of `list_models()`.
      weights: a `.safetensors` file of `gim-jax convert` or `gim-jax train`, or the variables themselves.
      batch_size: pairs that `match_pairs` passes through a network at once, where their sizes agree.
      **settings: change the preset of the model, see `matchers.Preset`, or any field of the network's configuration,
        such as `thr`, `dtype`, `extractor={"max_keypoints": 4096}`, or DKM's `size`, `upsample_size`, `symmetric`,
        `gp_solve`; `max_keypoints` where OpenCV detects; for `rootsift` `max_keypoints`, `contrast_threshold`,
        `ratio` and `long_side`.

    Raises:
      ValueError: an unknown model or setting, a value that cannot be, weights that are missing or belong to another
        model.
    """
    info = get_model(name)
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, expected at least 1")
    if info.family == "rootsift":
        if weights is not None:
            raise ValueError(f"weights: found {weights}, but rootsift has none")
        return RootSIFT(info, batch_size, settings)
    sparse = FAMILIES[info.family][2]
    return (SparseNetwork if sparse else Network)(info, weights, batch_size, settings)


def enable_compilation_cache(folder: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that a second process starts at once.

    By default in `$JAX_COMPILATION_CACHE_DIR`, such as a folder that all hosts of a pod share, or, where that is not
    set, in `$XDG_CACHE_HOME/gim-jax/xla`.
    """
    import jax

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = str(folder or os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache / "gim-jax" / "xla")  # may be gs://
    jax.config.update("jax_compilation_cache_dir", path)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return Path(path)
