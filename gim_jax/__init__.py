"""gim-jax: learn one image matcher that works on any scene from internet videos (GIM, ICLR 2024), in JAX."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gim_jax.api import list_models, load_matcher, match
    from gim_jax.types import Matches

_API = {"match": "api", "load_matcher": "api", "list_models": "api", "Matches": "types"}
__all__ = ["Matches", "list_models", "load_matcher", "match"]


def __getattr__(name: str):
    """Load the public names on first use, so that `import gim_jax` costs nothing."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_API[name]}"), name)
