"""What people do with matches: registration, reconstruction, localization, and the formats of other tools.

Libraries that only one task needs are extras of the package, loaded by `load_extra` when that task runs.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def load_extra(module: str, extra: str) -> ModuleType:
    """Import a library of an extra; a ValueError names the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is not installed ({error}): pip install 'gim-jax[{extra}]'") from error
