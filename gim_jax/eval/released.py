"""Per-pair result files of ZEB in the released text form: read, check, write.

One file per method and set, `[T] <model> <set> <version>.txt`; a heading, then one pair a line. The aggregation is the
official `analysis.py`'s: the first line of a pair counts, the error is the larger of R_errs and t_errs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gim_jax.data.tfrecord import write_atomic

COLUMNS = (  # the heading, and what a value may be: (low, high, infinite or NaN allowed?)
    ("identifiers", None),
    ("covisible0", (0.0, 1.0 + 1e-6, False)),
    ("covisible1", (0.0, 1.0 + 1e-6, False)),
    ("R_errs", (0.0, 180.0 + 1e-6, True)),  # degrees
    ("t_errs", (0.0, 180.0 + 1e-6, True)),  # degrees, folded to 90 in the released files
    ("t_errs2", (0.0, math.inf, True)),  # in units of the scene
    ("Bef.Prec", (0.0, 1.0 + 1e-6, True)),  # share of matches within 5e-4 of their epipolar lines
    ("Bef.Num", (0.0, math.inf, False)),  # their number
    ("Aft.Prec", (0.0, 1.0 + 1e-6, True)),  # the same of the inliers
    ("Aft.Num", (0.0, math.inf, False)),
)
NEEDED = ("identifiers", "R_errs", "t_errs")
SET_NAMES = {  # in the names of files: column of the table
    **{"GL3D": "GL3", "BlendedMVS": "BLE", "ETH3DI": "ETI", "ETH3DO": "ETO", "KITTI": "KIT", "RobotcarWeather": "WEA"},
    **{"RobotcarSeason": "SEA", "RobotcarNight": "NIG", "Multi-FoV": "MUL", "SceneNetRGBD": "SCE"},
    **{"ICL-NUIM": "ICL", "GTA-SfM": "GTA"},
}
MAX_BYTES = 1 << 28  # the largest released file has 1 MB
MAX_FAULTS = 5  # damaged lines that one message names


def find(folder: str | Path) -> tuple[dict[tuple[str, str], dict[str, Path]], list[str]]:
    """List the result files of a folder.

    Returns:
      (model, version) -> column of the table -> file; and why each other file of the folder is left out.

    Raises:
      ValueError: no such folder, no result file in it, two files of one method and set.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, expected one of result files '[T] <model> <set> <version>.txt'")
    methods: dict[tuple[str, str], dict[str, Path]] = {}
    skipped = []
    for path in sorted(folder.iterdir()):
        tokens = path.name.removesuffix(".txt").split()
        plain = path.name.isprintable() and path.suffix == ".txt" and path.is_file()
        if len(tokens) != 4 or tokens[0] != "[T]" or not plain:
            skipped.append(f"{ascii(path.name)[1:-1]}: not named '[T] <model> <set> <version>.txt'")
            continue
        _, model, name, version = tokens
        if name not in SET_NAMES:
            skipped.append(f"{path.name}: set {name!r}, expected one of {', '.join(SET_NAMES)}")
            continue
        files = methods.setdefault((model, version), {})
        other = files.setdefault(SET_NAMES[name], path)
        if other != path:
            raise ValueError(f"{path}: a second file of {model} {version} on {name}, besides {other.name}")
    if not methods:
        raise ValueError(f"{folder}: found no result file, expected '[T] <model> <set> <version>.txt'")
    order = list(SET_NAMES.values())
    return {key: {c: files[c] for c in order if c in files} for key, files in methods.items()}, skipped


def read(path: str | Path) -> dict[str, Any]:
    """Read a result file.

    Returns:
      Columns by the names of the heading, in the file's order, each pair once: "identifiers" a list, the others
      [N] float64; "num_duplicates" repeated lines that were left out; "sha256" of the file.

    Raises:
      ValueError: naming file and line: another heading, a wrong number of tokens, something that is no number or out
        of its range, no pairs; not text; too large.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected a result file of at most {MAX_BYTES}")
    data = path.read_bytes()
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not text: {error.reason} at byte {error.start}") from error
    heading = lines[0].split()
    missing = [name for name in NEEDED if name not in heading]
    if missing or heading[0] != "identifiers" or len(set(heading)) != len(heading):
        expected = " ".join(name for name, _ in COLUMNS)
        raise ValueError(f"{path}:1: found the heading {lines[0][:120]!r}, expected {expected}")
    limits = dict(COLUMNS)
    rows: dict[str, list[float]] = {}
    faults, duplicates = [], 0
    for number, line in enumerate(lines[1:], 2):
        tokens = line.split()
        if not tokens:
            continue
        try:
            values = _values(tokens, heading, limits)
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
            continue
        duplicates += tokens[0] in rows
        rows.setdefault(tokens[0], values)
    if faults:
        more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
        raise ValueError("; ".join(faults[:MAX_FAULTS]) + more)
    if not rows:
        raise ValueError(f"{path}: found no pair below the heading")
    table = np.array(list(rows.values()), np.float64)
    columns: dict[str, Any] = {name: table[:, index] for index, name in enumerate(heading[1:])}
    return {
        "identifiers": list(rows),
        **columns,
        "num_duplicates": duplicates,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _values(tokens: list[str], heading: list[str], limits: Mapping[str, Any]) -> list[float]:
    if len(tokens) != len(heading):
        raise ValueError(f"found {len(tokens)} tokens, expected {len(heading)} as in the heading")
    if tokens[0].count("#") != 2 or not tokens[0].isprintable():
        raise ValueError(f"identifiers: found {tokens[0][:80]!r}, expected scene#name0#name1")
    values = []
    for name, token in zip(heading[1:], tokens[1:]):
        try:
            value = float(token)
        except ValueError:
            raise ValueError(f"{name}: found {token[:40]!r}, expected a number") from None
        low, high, infinite = limits.get(name) or (-math.inf, math.inf, True)
        if math.isfinite(value):
            wrong = not low <= value <= high
        else:
            wrong = not infinite or value == -math.inf
        if wrong:
            kind = "or inf" if infinite else "and finite"
            raise ValueError(f"{name}: found {token[:40]}, expected {low:g} to {high:g} {kind}")
        values.append(value)
    return values


def file_name(model: str, column: str, version: str) -> str:
    """Return the released name of a result file; blanks and separators in the names become underscores."""
    name = next(name for name, other in SET_NAMES.items() if other == column)
    model, version = ("".join(c if c.isalnum() or c in "._+-" else "_" for c in text) for text in (model, version))
    return f"[T] {model} {name:>15} {version}.txt"


def write(path: str | Path, columns: Mapping[str, Any]) -> None:
    """Write a result file atomically, sorted by identifier, numbers as Python prints them."""
    names = [name for name, _ in COLUMNS]
    order = sorted(range(len(columns["identifiers"])), key=lambda index: columns["identifiers"][index])
    lines = [" ".join(names)]
    for index in order:
        values = [columns[name][index] for name in names]
        for place in (7, 9):  # numbers of matches
            values[place] = int(values[place])
        lines.append(" ".join(str(v) if isinstance(v, (str, int)) else repr(float(v)) for v in values))
    write_atomic(path, lambda file: file.write(("\n".join(lines) + "\n").encode()))


def errors_deg(columns: Mapping[str, Any]) -> np.ndarray:
    """Return the pose errors [N] in degrees, inf where there is no pose."""
    error = np.maximum(columns["R_errs"], columns["t_errs"])
    return np.where(np.isfinite(error), error, np.inf)
