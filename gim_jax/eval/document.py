"""The one form in which results are kept, of all benchmarks: JSON.

    {"format", "benchmark", "versions", "results": [{"method", "row", "settings", "model", "seconds", "notes",
      "sets": [{"set", "num_pairs", "num_failures", "num_lost", "auc": {"5": ...}, "auc_by_overlap", "pairs": {...}}],
      "mean": {"auc", "num_sets", "num_lost", "num_missing", "complete"}, "percent", "residuals"}]}

AUCs are in [0, 1] by threshold, in degrees or, of homographies, px; `percent` and `residuals` are AUC@5 in percent by
set, as the tables print them. `pairs` are columns: identifier, overlap, R_error_deg, t_error_deg, error (None = none).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import numpy as np

from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval import metrics, published, released, statistics

FORMAT = "gim-jax evaluation 1"
MAX_BYTES = 1 << 29


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    packages = ("gim-jax", "jax", "jaxlib", "flax", "numpy", "opencv-python")
    return {"python": python_version(), **{name: version(name) for name in packages}}


def plain(values) -> list:
    """Turn an array of numbers into a list for JSON, None where they are not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def auc_by_threshold(errors, thresholds: Sequence[float] = metrics.AUC_THRESHOLDS_DEG) -> dict[str, float]:
    """Return the AUC in [0, 1] by threshold, as `5`."""
    return {f"{t:g}": float(auc) for t, auc in zip(thresholds, metrics.pose_auc(errors, thresholds))}


def errors_of(record: Mapping[str, Any]) -> np.ndarray:
    """Return the errors [N] of a set's pairs, inf where there is none."""
    return np.array([np.inf if error is None else error for error in record["pairs"]["error"]], np.float64)


def method_result(
    method: str,
    row: str | None,
    sets: list[dict[str, Any]],
    expected: Mapping[str, int] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Complete what is known of the sets of one method: means, percent, residuals, and notes on what is missing.

    Args:
      method: how the method calls itself.
      row: its name in the published tables, None without one.
      sets: see the head of this file.
      expected: pairs of each set that make the benchmark; None where what is there is all.
      **about: settings, model, seconds and the like, kept as they are.
    """
    expected = {record["set"]: record["num_pairs"] for record in sets} if expected is None else expected
    there = {record["set"]: record["num_pairs"] for record in sets}
    notes = []
    absent = [name for name in expected if name not in there]
    if absent:
        notes.append(f"{len(there)} of {len(expected)} sets: without {', '.join(absent)}")
    for name, count in there.items():
        if count != expected.get(name, count):
            notes.append(f"{name}: {count} pairs, the released set has {expected[name]}")
    for record in sets:
        if record.get("num_duplicates"):
            notes.append(f"{record['set']}: {record['num_duplicates']} repeated lines left out, the first counts")
        if record.get("num_lost"):
            notes.append(f"{record['set']}: {record['num_lost']} pairs were lost and count as failures")
    aucs = {name: float(np.mean([record["auc"][name] for record in sets])) for name in sets[0]["auc"]}
    first = next(iter(aucs))
    percent = {record["set"]: 100 * record["auc"][first] for record in sets} | {"mean": 100 * aucs[first]}
    residuals = {}
    for source, table in published.ZEB.items():
        if row in table and set(there) <= set(table[row]):
            names = [*there, *(["mean"] if not absent else [])]
            residuals[source] = {name: percent[name] - table[row][name] for name in names}
    bins = [record["auc_by_overlap"] for record in sets if record.get("auc_by_overlap")]
    missing = sum(max(count - there.get(name, 0), 0) for name, count in expected.items())
    return {
        "method": method,
        "row": row,
        **about,
        "notes": notes,
        "mean": {
            "auc": aucs,
            "auc_by_overlap": statistics.mean_overlap_auc(bins) if bins else None,
            "num_sets": len(sets),
            "num_pairs": sum(there.values()),
            "num_missing": missing,
            "num_lost": sum(record.get("num_lost", 0) for record in sets),
            "complete": not missing and not absent and not any(record.get("num_lost") for record in sets),
        },
        "percent": percent,
        "residuals": residuals,
        "sets": sets,
    }


def from_released(folder: str | Path) -> tuple[dict[str, Any], list[str]]:
    """Aggregate the released per-pair result files of a folder.

    Returns:
      The document; and the files of the folder that were left out, with reasons.

    Raises:
      ValueError: see `released.find` and `released.read`.
    """
    methods, skipped = released.find(folder)
    results = []
    for (model, release), files in methods.items():
        sets = []
        for column, path in files.items():
            columns = released.read(path)
            errors = released.errors_deg(columns)
            overlaps = columns.get("covisible0")
            sets.append(
                {
                    "set": column,
                    "file": path.name,
                    "sha256": columns["sha256"],
                    "num_pairs": len(errors),
                    "num_duplicates": columns["num_duplicates"],
                    "num_failures": int(np.isinf(errors).sum()),
                    "num_lost": 0,
                    "auc": auc_by_threshold(errors),
                    "auc_by_overlap": None if overlaps is None else statistics.overlap_auc(errors, overlaps),
                    "pairs": {
                        "identifier": columns["identifiers"],
                        "overlap": None if overlaps is None else plain(overlaps),
                        "R_error_deg": plain(columns["R_errs"]),
                        "t_error_deg": plain(columns["t_errs"]),
                        "error": plain(errors),
                    },
                }
            )
        row = published.DUMPS.get((model, release))
        results.append(method_result(f"{model} {release}", row, sets, published.PAIRS, source="result files"))
    return document("zeb", results), skipped


def document(benchmark: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the results of methods together with what they depend on."""
    return {"format": FORMAT, "benchmark": benchmark, "versions": versions(), "results": results}


def save(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a document atomically: figures indented, the columns of pairs on a line each."""
    kept: list[str] = []

    def fold(node):
        if isinstance(node, Mapping):
            return {k: _keep(v, kept) if k in ("pairs", "rows") else fold(v) for k, v in node.items()}
        return [fold(item) for item in node] if isinstance(node, list) else node

    text = json.dumps(fold(content), indent=1, allow_nan=False)
    for index, columns in enumerate(kept):
        text = text.replace(f'"\\u0000{index}"', columns, 1)
    write_atomic(path, lambda file: file.write(text.encode()))


def _keep(columns, kept: list[str]) -> str:
    if isinstance(columns, Mapping):
        lines = (f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in columns.items())
        kept.append("{\n" + ",\n".join(lines) + "\n}")
    else:
        kept.append("[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in columns) + "\n]")
    return f"\0{len(kept) - 1}"


def load(path: str | Path) -> dict[str, Any]:
    """Read a document.

    Raises:
      ValueError: no such file, not JSON, not of this format, without what the tables of `compare` print.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}, expected results in JSON")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMAT:
        raise ValueError(f"{path}: found format {found!r}, expected {FORMAT!r}")
    try:
        _ = str(content["benchmark"])
        for result in content["results"]:
            mean, percent = result["mean"], _numbers(result["percent"])
            _ = str(result["method"]), result["row"], list(result["notes"]), mean["complete"], percent["mean"]
            _ = [int(mean[name]) for name in ("num_sets", "num_pairs", "num_lost")], _numbers(mean["auc"])
            _ = [_numbers(row) for row in result["residuals"].values()]
            if not result["sets"]:
                raise KeyError("sets")
            for record in result["sets"]:
                _ = str(record["set"]), _numbers(record["auc"])
                _ = [int(record[name]) for name in ("num_failures", "num_lost")]
                num = int(record["num_pairs"]) * record.get("num_repeats", 1)
                for name, found in (("error", errors_of(record)), ("identifier", record["pairs"]["identifier"])):
                    if len(found) != num:
                        raise ValueError(f"{record['set']}: pairs.{name}: found {len(found)}, expected {num}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not whole: {error!r}") from error
    return content


def _numbers(node: Mapping[str, Any]) -> dict[str, float]:
    """Return figures by name, at least one."""
    if not node:
        raise ValueError("found no figures")
    return {name: float(value) for name, value in node.items()}
