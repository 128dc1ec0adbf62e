"""Experiment configurations: `configs/<name>.py[:argument]` plus `--config.key=value`, locked and typed.

A config file holds `get_config(argument="") -> ml_collections.ConfigDict`; its docstring is the experiment's card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

PACKAGED = Path(__file__).parent / "_configs"  # where a wheel carries configs/
CHECKOUT = Path(__file__).parent.parent / "configs"


def config_path(spec: str) -> tuple[Path, str]:
    """Split `file.py[:argument]` and find the file: as given; NAME.py and configs/NAME.py also among those of the
    checkout or of the wheel."""
    name, _, argument = spec.partition(":")
    path = Path(name)
    stock = (CHECKOUT / path.name, PACKAGED / path.name) if path.parent in (Path("."), Path("configs")) else ()
    for candidate in (path, *stock):
        if candidate.is_file():
            return candidate, argument
    known = sorted(p.name for folder in (CHECKOUT, PACKAGED) if folder.is_dir() for p in folder.glob("[a-z]*.py"))
    raise ValueError(f"--config={spec}: no such config file; known: {', '.join(dict.fromkeys(known))}")


def load_config(spec: str, overrides: list[str] | tuple[str, ...] = ()) -> ml_collections.ConfigDict:
    """Load a config file and apply `--config.key=value` overrides.

    Args:
      spec: `configs/loftr.py` or `configs/loftr.py:tiny`.
      overrides: arguments such as `--config.optim.lr=1e-4`; an unknown key or a value of another type is a ValueError.
    """
    path, argument = config_path(spec)
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(argument)
    values = flags.FlagValues()
    argv = ["gim-jax", *overrides]  # not sys.argv: a `--config` in it would keep the overrides from being read
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
        rest = values(argv)
    except (AttributeError, KeyError) as error:
        reason = error.args[0]
        reason = reason.args[0] if isinstance(reason, KeyError) else reason  # ml_collections wraps one in the other
        raise ValueError(f"{path.name}: no such setting: {' '.join(str(reason).split())}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if len(rest) > 1:
        raise ValueError(f"unknown arguments: {' '.join(rest[1:])}")
    return values.config


def config_hash(config) -> str:
    """Hash the values of a configuration (ConfigDict, dict or dataclass fields): 16 hex digits, order independent."""
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    elif hasattr(config, "__dataclass_fields__"):
        config = {name: getattr(config, name) for name in config.__dataclass_fields__}
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def replace(config: Any, values: Mapping[str, Any], name: str) -> Any:
    """Return a dataclass with other values, as JSON or a ConfigDict has them: lists become tuples, dicts dataclasses.

    Args:
      config: frozen dataclass, possibly with dataclasses in it.
      values: field -> value.
      name: what the values come from, for messages.

    Raises:
      ValueError: an unknown field, a value of another type than the field's, a count below one, or what the
        dataclass itself refuses.
    """
    changes = {}
    hints = typing.get_type_hints(type(config))
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{name}: {type(config).__name__} has no {key}")
        old = getattr(config, key)
        if dataclasses.is_dataclass(old) and isinstance(value, Mapping):
            value = replace(old, value, f"{name}.{key}")
        if not _fits(value, hints[key]):
            expected = getattr(hints[key], "__name__", str(hints[key]))
            raise ValueError(f"{name}: {key}: found {value!r}, expected {expected}")
        if key.startswith(("num_", "max_")) and isinstance(value, int) and value < 1:
            raise ValueError(f"{name}: {key}: found {value}, expected at least 1")
        changes[key] = _tuples(value)
    try:
        return dataclasses.replace(config, **changes)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value, as JSON has it, is of an annotated type."""
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if isinstance(value, float) and math.isnan(value):
        return False
    kinds = (int, float) if hint is float else hint
    return isinstance(value, kinds) and (hint is bool or not isinstance(value, bool))


def _tuples(value: Any) -> Any:
    """Turn lists, also nested ones, into tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
