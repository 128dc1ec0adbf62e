"""gim-jax: learn one image matcher that works on any scene from internet videos (GIM, ICLR 2024), in JAX."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gim_jax.api import enable_compilation_cache, list_models, load_matcher, match
    from gim_jax.types import Features, Matches, Warp

_API = {
    "match": "api",
    "load_matcher": "api",
    "list_models": "api",
    "enable_compilation_cache": "api",
    "Features": "types",
    "Matches": "types",
    "Warp": "types",
}
__all__ = ["Features", "Matches", "Warp", "enable_compilation_cache", "list_models", "load_matcher", "match"]


def __getattr__(name: str):
    """Load the public names on first use, so that `import gim_jax` costs nothing."""
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_API[name]}"), name)
