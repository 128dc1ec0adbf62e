"""What is said of a table of results: ranks, figures by overlap, confidence intervals. NumPy, float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from gim_jax.eval import metrics

OVERLAP_BINS = ((0.0, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.4), (0.4, 0.5), (0.5, 0.7), (0.7, 1.0))  # (low, high]
MIN_BIN_PAIRS = 20  # a set with no more pairs in a bin has no say in the bin's mean
NUM_RESAMPLES = 1000


def ranks(values: Sequence[float], ties: str = "mean") -> np.ndarray:
    """Rank values, the highest 1.

    Args:
      values: any order.
      ties: "mean": equal values share the mean of their places; "min": the best of them (Excel's RANK).
    """
    if ties not in ("mean", "min"):
        raise ValueError(f"ties: found {ties!r}, expected mean or min")
    column = np.asarray(values, np.float64)
    better = (column[:, None] < column).sum(1)
    equal = (column[:, None] == column).sum(1)
    return better + (1.0 if ties == "min" else (equal + 1) / 2)


def mean_ranks(table: Mapping[str, Mapping[str, float]], sets: Sequence[str], ties: str = "mean") -> dict[str, float]:
    """Rank the methods (rows) in each set by its unrounded values and average the ranks over the sets."""
    per_set = [ranks([row[name] for row in table.values()], ties) for name in sets]
    return dict(zip(table, np.mean(per_set, 0).tolist()))


def overlap_auc(errors, overlaps, bins=OVERLAP_BINS, threshold: float = 5.0) -> list[list]:
    """Return [pairs, AUC in [0, 1] or None without pairs] of each bin (low, high] of the overlap; errors in degrees."""
    errors, overlaps = np.asarray(errors, np.float64), np.asarray(overlaps, np.float64)
    found = []
    for low, high in bins:
        inside = errors[(overlaps > low) & (overlaps <= high)]
        auc = float(metrics.pose_auc(inside, [threshold])[0]) if len(inside) else None
        found.append([len(inside), auc])
    return found


def mean_overlap_auc(sets: Sequence[list[list]]) -> list[float | None]:
    """Average results of `overlap_auc` over sets, bin by bin, over those with more than 20 pairs in the bin."""
    means = []
    for column in zip(*sets):
        kept = [auc for count, auc in column if auc is not None and count > MIN_BIN_PAIRS]
        means.append(float(np.mean(kept)) if kept else None)
    return means


def bootstrap_auc(
    sets: Sequence[np.ndarray], threshold: float = 5.0, num: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Resample the pairs of each set with replacement.

    Args:
      sets: errors in degrees of each set, inf where there is no pose.
      threshold: of the AUC.

    Returns:
      [num, sets] AUCs in [0, 1]. For a confidence interval take percentiles of a column, or of the mean of columns.
      The same seed draws the same pairs of sets of the same size, so differences of two methods are paired.
    """
    columns = []
    for index, errors in enumerate(sets):
        errors = np.asarray(errors, np.float64)
        rng = np.random.default_rng([seed, index])
        inside = errors < threshold  # NaN and inf are not
        # the trapezoids of `pose_auc`, summed: each hit holds from its error to the threshold, and the curve's
        # corners before the steps add half of the last hit's error
        gain, last = np.where(inside, threshold - errors, 0.0), np.where(inside, errors, 0.0)
        draws = rng.integers(0, len(errors), (num, len(errors)))
        columns.append((gain[draws].sum(1) + last[draws].max(1) / 2) / (len(errors) * threshold))
    return np.stack(columns, 1)
