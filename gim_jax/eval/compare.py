"""Results beside the published ones: the paper's table 1 with ranks, AUC by overlap, bootstrap intervals, a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gim_jax.eval import document, metrics, published, statistics

TITLE = {"zeb": "ZEB, AUC@5 in %", "hpatches": "HPatches, AUC of the corner error in %"}
INTERVAL = (2.5, 97.5)  # percentiles
PUBLISHED = {  # benchmark: rows of the paper with the columns of its AUCs, in the order of thresholds
    "megadepth1500": (published.IN_DOMAIN, tuple(f"MegaDepth-1500 {t}" for t in (5, 10, 20))),
    "scannet1500": (published.IN_DOMAIN, tuple(f"ScanNet-1500 {t}" for t in (5, 10, 20))),
    "hpatches": (published.HPATCHES, ("3", "5", "10")),
}


def one_benchmark(documents: Sequence[Mapping[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """Join the results of documents of one benchmark; methods of the same name are numbered."""
    names = sorted({content["benchmark"] for content in documents})
    if len(names) > 1:
        raise ValueError(f"benchmark: found {' and '.join(names)}, expected results of one benchmark")
    results, seen = [], {}
    for result in (result for content in documents for result in content["results"]):
        seen[result["method"]] = seen.get(result["method"], 0) + 1
        number = seen[result["method"]]
        results.append({**result, "method": result["method"] + (f" #{number}" if number > 1 else "")})
    if not results:
        raise ValueError("results: found none")
    return names[0], results


def table_one(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the rows of the paper's table 1, published ones first, then the given ones.

    Published values are the README's, which lack the paper's misprints; their ranks are recomputed, in brackets stands
    the one that was printed.
    """
    ranks = published_ranks()
    rows: list[tuple[str, ...]] = [("method", "mean rank", "mean", *published.SETS)]
    for name in published.RANKED:
        row = published.ZEB["README"][name]
        rank = f"{ranks[name]:.2f} ({published.ZEB['paper'][name]['rank']:.1f})"
        rows.append((name, rank, *(f"{row[c]:.1f}" for c in ("mean", *published.SETS))))
    for result in results:
        star = "" if result["mean"]["complete"] else "*"
        cells = (f"{result['percent'][c]:.2f}" if c in result["percent"] else "-" for c in published.SETS)
        rank, mean = rank_among_published(result), result["percent"]["mean"]
        rank = "-" if rank is None else f"{rank:.2f}{star}"
        rows.append((f"> {result['method']}", rank, f"{mean:.2f}{star}", *cells))
    return rows


def _published_rows() -> dict[str, dict[str, float]]:
    """Return the ten ranked rows; of two values that are only printed alike the higher one is a little more."""
    table = {name: dict(published.ZEB["README"][name]) for name in published.RANKED}
    for column, (higher, _) in published.TRUE_ORDER.items():
        table[higher][column] += 1e-3
    return table


def published_ranks() -> dict[str, float]:
    """Return the mean ranks of the paper's ten rows."""
    return statistics.mean_ranks(_published_rows(), published.SETS)


def rank_among_published(result: Mapping[str, Any]) -> float | None:
    """Return the mean rank of a result among the paper's ten rows, in place of its own row if that is one of them;
    over the sets that it has, ties share the mean of their places; None without a set of ZEB."""
    sets = [name for name in published.SETS if name in result["percent"]]
    table = {name: row for name, row in _published_rows().items() if name != result["row"]}
    return statistics.mean_ranks({**table, "": result["percent"]}, sets)[""] if sets else None


def residual_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the differences of results from the published row of the same method, by source; heading alone if none."""
    rows: list[tuple[str, ...]] = [("difference from", "of", "mean", *published.SETS)]
    for result in results:
        for source, row in result["residuals"].items():
            cells = (f"{row[name]:+.3f}" if name in row else "-" for name in ("mean", *published.SETS))
            rows.append((source, result["method"], *cells))
    return rows


def threshold_means(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return the mean AUC at every threshold, and how many pairs have no pose."""
    rows: list[tuple[str, ...]] = [
        ("mean over sets", "sets", "pairs", "no pose", *(f"AUC@{t}" for t in results[0]["mean"]["auc"]))
    ]
    for result in results:
        mean, star = result["mean"], "" if result["mean"]["complete"] else "*"
        failures = sum(record["num_failures"] for record in result["sets"])
        counts = (str(n) for n in (mean["num_sets"], mean["num_pairs"], failures))
        rows.append((result["method"], *counts, *(f"{100 * auc:.2f}{star}" for auc in mean["auc"].values())))
    return rows


def threshold_rows(benchmark: str, results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return AUCs by threshold: of the paper's rows, then one's own sets and their mean."""
    first = results[0]["mean"]["auc"]
    rows: list[tuple[str, ...]] = [("method", "set", "pairs", "no result", "lost", *(f"AUC@{t}" for t in first))]
    paper, columns = PUBLISHED.get(benchmark, ({}, ()))
    for name, row in paper.items():
        rows.append((name, "paper", "", "", "", *(f"{row[c]:.1f}" for c in columns)))
    for result in results:
        star = "" if result["mean"]["complete"] else "*"
        for record in result["sets"]:
            counts = (str(record[key]) for key in ("num_pairs", "num_failures", "num_lost"))
            alone = star if len(result["sets"]) == 1 else ""
            cells = (f"{100 * auc:.2f}{alone}" for auc in record["auc"].values())
            rows.append((f"> {result['method']}", record["set"], *counts, *cells))
        if len(result["sets"]) > 1:
            cells = (f"{100 * auc:.2f}{star}" for auc in result["mean"]["auc"].values())
            counts = str(result["mean"]["num_pairs"]), "", str(result["mean"]["num_lost"])
            rows.append((f"> {result['method']}", "mean of sets", *counts, *cells))
    return rows


def overlap_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return AUC@5 by overlap, mean over the sets with more than 20 pairs in a bin; the heading alone if unknown."""
    rows: list[tuple[str, ...]] = [
        ("AUC@5 at overlap", *(f"({low:g}, {high:g}]" for low, high in statistics.OVERLAP_BINS))
    ]
    for result in results:
        means = result["mean"].get("auc_by_overlap")
        if means and any(value is not None for value in means):
            rows.append((result["method"], *("-" if v is None else f"{100 * v:.1f}" for v in means)))
    return rows


def baseline_rows(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Return AUC@5 of the metric sets without the pairs that have no baseline to speak of; the heading alone if
    unknown."""
    rows: list[tuple[str, ...]] = [("AUC@5 without pairs < 5 cm apart", *published.SETS)]
    for result in results:
        known = {r["set"]: r for r in result["sets"] if r.get("auc_with_baseline") and r.get("num_without_baseline")}
        cells = {n: f"{100 * next(iter(r['auc_with_baseline'].values())):.2f}" for n, r in known.items()}
        if cells:
            rows.append((result["method"], *(cells.get(name, "-") for name in published.SETS)))
    return rows


def intervals(result: Mapping[str, Any], num: int = statistics.NUM_RESAMPLES) -> np.ndarray:
    """Return [sets + 1, 2] percent: the 95 % bootstrap interval of each set's AUC at the first threshold, the last
    row that of their mean."""
    threshold = float(next(iter(result["mean"]["auc"])))
    draws = statistics.bootstrap_auc([document.errors_of(r) for r in result["sets"]], threshold, num)
    draws = np.concatenate([draws, draws.mean(1, keepdims=True)], 1)
    return 100 * np.percentile(draws, INTERVAL, axis=0).T


def interval_rows(results: Sequence[Mapping[str, Any]], num: int = statistics.NUM_RESAMPLES) -> list[tuple[str, ...]]:
    """Return the 95 % bootstrap intervals of every set and of the mean."""
    names = list(dict.fromkeys(record["set"] for result in results for record in result["sets"]))
    rows: list[tuple[str, ...]] = [("95 % interval", "mean", *names)]
    for result in results:
        limits = intervals(result, num)
        by_set = dict(zip([record["set"] for record in result["sets"]], limits))
        cells = (f"{by_set[n][0]:.1f}-{by_set[n][1]:.1f}" if n in by_set else "-" for n in names)
        rows.append((result["method"], f"{limits[-1][0]:.2f}-{limits[-1][1]:.2f}", *cells))
    return rows


def difference_rows(results: Sequence[Mapping[str, Any]], num: int = statistics.NUM_RESAMPLES) -> list[tuple[str, ...]]:
    """Return the difference of each result's mean from the first one's, with the interval of a paired bootstrap.

    Only sets whose pairs are the same in both count; without any there is no row.
    """
    rows: list[tuple[str, ...]] = [("difference of the mean", "sets", "points", "95 % interval")]
    first = {record["set"]: record for record in results[0]["sets"]}
    threshold = float(next(iter(results[0]["mean"]["auc"])))
    for other in results[1:]:
        ours, theirs = [], []
        for record in other["sets"]:
            base = first.get(record["set"])
            if base is None or sorted(base["pairs"]["identifier"]) != sorted(record["pairs"]["identifier"]):
                continue
            for kept, one in ((ours, record), (theirs, base)):
                kept.append(document.errors_of(one)[np.argsort(one["pairs"]["identifier"], kind="stable")])
        if not ours:
            continue
        draws = [statistics.bootstrap_auc(sets, threshold, num).mean(1) for sets in (ours, theirs)]
        points = [np.mean([metrics.pose_auc(errors, [threshold]) for errors in sets]) for sets in (ours, theirs)]
        low, high = 100 * np.percentile(draws[0] - draws[1], INTERVAL)
        name = f"{other['method']} - {results[0]['method']}"
        rows.append((name, str(len(ours)), f"{100 * (points[0] - points[1]):+.2f}", f"{low:+.2f} to {high:+.2f}"))
    return rows


def draw(benchmark: str, results: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw the sets' AUCs with their intervals and the published rows, and the AUC by overlap: PNG bytes."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys(record["set"] for result in results for record in result["sets"]))
    if benchmark == "zeb":
        columns = [name for name in published.SETS if name in columns]
    curves = [result for result in results if result["mean"].get("auc_by_overlap")]
    figure = Figure(figsize=(6 + 0.6 * len(columns), 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if curves else 1, squeeze=False, width_ratios=[2, 1] if curves else [1])[0]
    width = 0.8 / len(results)
    for index, result in enumerate(results):
        limits = dict(zip([*(record["set"] for record in result["sets"]), "mean"], intervals(result)))
        names = [name for name in [*columns, "mean"] if name in result["percent"] and name in limits]
        x = np.array([[*columns, "mean"].index(name) for name in names]) + (index - (len(results) - 1) / 2) * width
        y = np.array([result["percent"][name] for name in names])
        spread = np.abs(np.array([limits[name] for name in names]).T - y)
        star = "" if result["mean"]["complete"] else " (incomplete)"
        axes[0].bar(x, y, width, yerr=spread, capsize=2, label=result["method"] + star)
    if benchmark == "zeb":
        for name, marker in (("RootSIFT", "v"), ("LoFTR (OUT)", "s"), ("DKM (OUT)", "D"), ("GIM_DKM (100h)", "*")):
            row = published.ZEB["README"][name]
            values = [row[c] for c in [*columns, "mean"]]
            axes[0].plot(range(len(values)), values, marker, color="0.3", ms=5, mfc="none", label=f"{name}, published")
    axes[0].set_xticks(
        range(len(columns) + 1), [*columns, "mean"], rotation=90 if len(max(columns, key=len)) > 4 else 0
    )
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel(TITLE.get(benchmark, f"{benchmark}, AUC@5 in %"))
    axes[0].legend(fontsize=7)
    for result in curves:
        middles = [(low + high) / 2 for low, high in statistics.OVERLAP_BINS]
        values = [np.nan if v is None else 100 * v for v in result["mean"]["auc_by_overlap"]]
        axes[1].plot(middles, values, "o-", label=result["method"])
    if curves:
        axes[1].set(xlabel="overlap", xlim=(0, 1), ylim=(0, 100))
        axes[1].legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
