"""Write a folder whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from gim_jax.data.json_file import read_json


def write_folder(out: str | Path, settings: dict, write: Callable[[Path], None]) -> Path:
    """Let `write(temporary)` fill a folder, add `settings` as `config.json`, and name it `out` when it is whole.

    An `out` that already holds these settings is left as it is: the same settings make the same files.

    Args:
      out: a folder that does not exist, is empty, or was written with the same settings; otherwise a ValueError.
      settings: what JSON can hold. write: fills the folder it is given.
    """
    out = Path(out)
    if is_done(out, settings):
        return out
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed run with the same number
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        (temporary / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def is_done(out: Path, settings: dict) -> bool:
    """True if `out` holds exactly this; False if it can be written; ValueError if something else is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = read_json(out / "config.json") if out.is_dir() else None
    if isinstance(found, dict):
        if found == settings:
            return True
        keys = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
        raise ValueError(f"{out}: was written with another {', '.join(keys)}; choose another folder or remove it")
    raise ValueError(f"{out}: is not empty and was not written by this program; choose another folder")


def publish(temporary: Path, out: Path):
    """Flush every file of `temporary` to the disk and give the folder its name."""
    for path in temporary.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if out.is_dir():
        out.rmdir()
    os.replace(temporary, out)
