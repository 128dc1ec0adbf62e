"""Tables and figures from the results of the small-scale experiment.

python experiments/small_scale/report.py RESULTS --out DIR
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from steps import HELPERS, IN_DOMAIN, LONG, PARTS, ROWS, SCALES, TIMES, WORLDS

from gim_jax.data.json_file import read_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.eval import metrics, statistics

PLANES = ("viewpoint", "illumination")
THRESHOLDS = {False: (5.0, 10.0, 20.0), True: (3.0, 5.0, 10.0)}  # of poses in degrees, of planes in px
INTERVAL = (2.5, 97.5)
PAPER = {  # table 1, mean AUC@5 relative to the in-domain model, in percent; table 2, points from the whole method
    "loftr": 18.1, "lightglue": 9.9, "dkm": 8.4,
    "half": -1.1, "quarter": -2.0, "rootsift_labels": -0.1, "no_augmentation": -0.2, "no_propagation": -2.3,
    "no_video": -3.2,
}  # fmt: skip
OVERLAPS = (0.4, 0.6)  # the rendered pairs in three parts
TARGET = 0.9  # of the best AUC that a batch size reached: what the others have to reach


class Results:
    """What is in a folder of results."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        self.found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}

    def seeds(self, network: str, row: str) -> list[dict]:
        """The results of a row, by seed."""
        names = [network] if network == "rootsift" else [f"{network}-{row}-{seed}" for seed in range(100)]
        return [self.found[name] for name in names if name in self.found]

    def paired(self, network: str, row: str, other: str) -> tuple[list[dict], list[dict]]:
        """The results of two rows, of the seeds that both have."""
        pairs = ((f"{network}-{row}-{seed}", f"{network}-{other}-{seed}") for seed in range(100))
        both = [pair for pair in pairs if set(pair) <= set(self.found)]
        return [self.found[one] for one, _ in both], [self.found[one] for _, one in both]

    @property
    def networks(self) -> list[str]:
        return [name for name in HELPERS if self.seeds(name, "in_domain")]

    @property
    def sets(self) -> list[str]:
        """All sets, that of the training domain first."""
        return list(next(iter(self.seeds("rootsift", "")), {}).get("sets", {}))

    @property
    def zero_shot(self) -> list[str]:
        return [name for name in self.sets if name != IN_DOMAIN]


def errors_of(result: dict, name: str) -> np.ndarray:
    return np.array([np.inf if error is None else error for error in result["sets"][name]["errors"]])


def aucs(runs: Sequence[dict], names: Sequence[str], level: int = 0) -> np.ndarray:
    """[runs, sets] AUC in percent at the first, second or third threshold."""
    rows = [
        [metrics.pose_auc(errors_of(run, name), [THRESHOLDS[name in PLANES][level]])[0] for name in names]
        for run in runs
    ]
    return 100 * np.array(rows)


def draws(runs: Sequence[dict], names: Sequence[str]) -> np.ndarray:
    """[num] bootstrap draws of the mean AUC over sets and runs: of two methods they are paired."""
    total = 0.0
    for run in runs:
        for index, name in enumerate(names):
            threshold = THRESHOLDS[name in PLANES][0]
            total += statistics.bootstrap_auc([errors_of(run, name)], threshold, seed=index)[:, 0]
    return 100 * total / (len(runs) * len(names))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def methods(results: Results, networks: Sequence[str], rows: Sequence[str]) -> dict[str, list[dict]]:
    """Name the rows that are there: RootSIFT, then every network's."""
    found = {"RootSIFT": results.seeds("rootsift", "")}
    found |= {f"{network}, {row}": results.seeds(network, row) for network in networks for row in rows}
    return {name: runs for name, runs in found.items() if runs}


def table_one(results: Results, found: dict[str, list[dict]]) -> str:
    """Rank, mean with interval, mean at the wider thresholds, and every set, as the paper's table 1."""
    names = results.zero_shot
    table = {method: dict(zip(names, aucs(runs, names).mean(0))) for method, runs in found.items()}
    ranks = statistics.mean_ranks(table, names)
    head = ("method", "runs", "mean rank", "zero-shot AUC@5", "95 %", "@10", "@20", *names, f"{IN_DOMAIN} (in-domain)")
    rows = [head]
    for method, runs in found.items():
        low, high = np.percentile(draws(runs, names), INTERVAL)
        means = [aucs(runs, names, level).mean() for level in range(3)]
        inside = aucs(runs, [IN_DOMAIN]).mean()
        cells = [f"{table[method][name]:.1f}" for name in names]
        rows.append(
            (method, str(len(runs)), f"{ranks[method]:.2f}", f"{means[0]:.1f}", f"{low:.1f} to {high:.1f}",
             f"{means[1]:.1f}", f"{means[2]:.1f}", *cells, f"{inside:.1f}")
        )  # fmt: skip
    return markdown(rows)


def table_two(results: Results, network: str, suffix: str = "") -> str:
    """Compare every row with the whole method on the seeds that both have, as the paper's table 2.

    Rows whose names end with `suffix` are compared with each other.
    """
    names = results.zero_shot
    worlds = [name for name in names if name in WORLDS]
    head = ("row", "runs", "zero-shot AUC@5", "points from gim", "95 %", "by seed", "rendered", "real", "paper")
    rows = [head]
    for row in ROWS:
        runs, whole = results.paired(network, f"{row}{suffix}", f"gim{suffix}")
        if not runs:
            continue
        mine, theirs = aucs(runs, names), aucs(whole, names)
        low, high = np.percentile(draws(runs, names) - draws(whole, names), INTERVAL)
        parts = []
        for chosen in (worlds, [name for name in names if name not in worlds]):
            columns = [names.index(name) for name in chosen]
            parts.append(f"{(mine - theirs)[:, columns].mean():+.1f}" if columns else "")
        by_seed = ", ".join(f"{value:+.1f}" for value in (mine - theirs).mean(1))
        paper = f"{PAPER[row]:+.1f}" if row in PAPER else ""
        if row == "gim":
            ours, inside = (aucs(runs, names) for runs in results.paired(network, f"gim{suffix}", f"in_domain{suffix}"))
            learned = len(inside) and inside.mean() > 0
            gain = f"{100 * (ours.mean() / inside.mean() - 1):+.1f} % of in-domain" if learned else ""
            paper, by_seed, parts = f"{PAPER[network]:+.1f} % of in-domain", gain, ["", ""]
        rows.append(
            (row, str(len(runs)), f"{mine.mean():.1f}", f"{(mine - theirs).mean():+.1f}", f"{low:+.1f} to {high:+.1f}",
             by_seed, *parts, paper)
        )  # fmt: skip
    return markdown(rows)


def overlap_table(results: Results, found: dict[str, list[dict]]) -> str:
    """AUC@5 of pairs of all rendered sets by how much of a view the other one shows."""
    overlaps = results.found.get("overlaps", {}).get("overlaps", {})
    if not overlaps:
        return ""
    part = np.digitize(np.concatenate([*overlaps.values()]), OVERLAPS)
    bounds = [0.2, *OVERLAPS, 0.8]  # what render_pairs chooses
    spans = [*enumerate(itertools.pairwise(bounds))]
    rows = [("method", *(f"{low} to {high}: {(part == k).sum()} pairs" for k, (low, high) in spans))]
    for method, runs in found.items():
        errors = np.array([np.concatenate([errors_of(run, name) for name in overlaps]) for run in runs])
        shares = (np.mean([metrics.pose_auc(one[part == k], [5.0])[0] for one in errors]) for k, _ in spans)
        rows.append((method, *(f"{100 * share:.1f}" for share in shares)))
    return markdown(rows)


def curve(results: Results, out: Path) -> str:
    """Zero-shot AUC against hours of video, figure 1 (a) of the paper."""
    names = results.zero_shot
    rows = [("hours of video", "videos", "labelled pairs", "zero-shot AUC@5", "95 %", "in-domain AUC@5")]
    points = []
    whole = results.found.get("labels-loftr-full")
    if not whole:
        return ""
    for row in ("no_video", *reversed(PARTS), "gim"):
        runs = results.seeds("loftr", row)
        labels = results.found.get(f"labels-loftr-{'full' if row == 'gim' else row}", {})
        if not runs or not (labels or row == "no_video"):
            continue
        videos = labels.get("videos", 0)
        hours = whole["hours"] * videos / whole["videos"]
        value, (low, high) = aucs(runs, names).mean(), np.percentile(draws(runs, names), INTERVAL)
        points.append((hours, value, low, high))
        inside = f"{aucs(runs, [IN_DOMAIN]).mean():.1f}"
        rows.append((f"{hours:.3f}", str(videos), str(labels.get("records", 0)), f"{value:.1f}",
                     f"{low:.1f} to {high:.1f}", inside))  # fmt: skip
    if points:
        hours, value, low, high = np.array(points).T
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.errorbar(60 * hours, value, (value - low, high - value), fmt="o-", capsize=3)
        axes.set(xlabel="minutes of video", ylabel="zero-shot AUC@5, %", title="small LoFTR")
        save(figure, out / "curve.png")
    return markdown(rows)


def labels_table(results: Results) -> str:
    """How many pairs each kind of labels has, how far apart, how right, and how much of one frame the other shows."""
    rows = [("labels", "videos", "pairs", "of a pair", "pairs by samples apart", "overlap", "1 px", "2 px", "3 px")]
    for name, found in results.found.items():
        if name.startswith("labels-") and found["pairs_by_step"]:
            steps = ", ".join(f"{step}: {count}" for step, count in found["pairs_by_step"].items())
            mean = found["correspondences"] / max(sum(found["pairs_by_step"].values()), 1)
            kind = name.removeprefix("labels-")
            judged = list(results.found.get(f"judged-{kind}", {}).get("steps", {}).values())
            overlap, shares = "", [""] * 3
            if judged:
                total = {key: sum(step[key] for step in judged) for key in judged[0]}
                overlap = f"{total['overlap'] / total['pairs']:.2f}"
                shares = [f"{100 * total[f'within_{px}px'] / total['judged']:.1f} %" for px in (1, 2, 3)]
            rows.append((kind, str(found["videos"]), str(found["records"]), f"{mean:.0f}", steps, overlap, *shares))
    return markdown(rows)


def accuracy(results: Results, out: Path) -> str:
    """Share of right labels against the interval, by link rule."""
    rows = [("labellers", "labels", "frames apart", "pairs", "a pair", "1 px", "2 px", "3 px")]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    found = {name: entry for name, entry in results.found.items() if name.startswith("accuracy-")}
    if not found:
        return ""
    axes = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axis, (name, entry) in zip(axes, found.items()):
        merged: dict[tuple[str, int], list[dict]] = {}
        for town in entry["towns"]:
            for row in town["rows"]:
                merged.setdefault((row["labels"], row["frames_apart"]), []).append(row)
        lines: dict[str, list] = {}
        for (kind, apart), members in merged.items():
            judged = np.array([row["judged"] for row in members])
            if not judged.sum():
                continue
            within = np.array([row["within"] if row["judged"] else (0, 0, 0) for row in members])
            shares = (within * judged[:, None]).sum(0) / judged.sum()
            pairs, count = (sum(row[key] for row in members) for key in ("pairs", "correspondences"))
            texts = (f"{100 * share:.1f} %" for share in shares)
            about = name.removeprefix("accuracy-"), kind, str(apart), str(pairs)
            rows.append((*about, f"{count / max(pairs, 1):.0f}", *texts))
            lines.setdefault(kind, []).append((apart, 100 * shares[1]))
        for kind, points in lines.items():
            axis.plot(*np.array(points).T, "o-", label=kind)
        axis.set(xscale="log", xlabel="frames apart", title=name.removeprefix("accuracy-"))
        intervals = sorted({apart for points in lines.values() for apart, _ in points})
        axis.set_xticks(intervals, [str(apart) for apart in intervals])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    axes[0].set_ylabel("within 2 px of the truth, %")
    save(figure, out / "accuracy.png")
    return markdown(rows)


def batches(results: Results, out: Path) -> str:
    """Steps and pairs to a target AUC against the batch size."""
    found = {name: entry for name, entry in results.found.items() if name.startswith("batch-")}
    curves = {tuple(name.split("-")[1:]): np.array(entry["curve"]) for name, entry in found.items()}
    if not curves:
        return ""
    size = str(SCALES["full"].batch_size)
    if ("sqrt", size) in curves:  # where the two rules are one
        curves["linear", size] = curves["sqrt", size]
    target = TARGET * min(values[:, 2].max() for values in curves.values())
    rows = [("learning rate", "batch", "steps", "best AUC@20", f"steps to {100 * target:.0f}", "pairs to it")]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    reached: dict[str, list] = {}
    for (rule, size), values in sorted(curves.items(), key=lambda item: (item[0][0], int(item[0][1]))):
        steps = int(values[values[:, 2] >= target][0, 0])
        row = rule, size, f"{values[-1, 0]:.0f}", f"{100 * values[:, 2].max():.1f}"
        rows.append((*row, str(steps), str(steps * int(size))))
        reached.setdefault(rule, []).append((int(size), steps))
        style = "--" if rule == "linear" else "-"
        left.plot(values[:, 0] * int(size), 100 * values[:, 2], style, label=f"{size}, {rule}")
    for rule, points in reached.items():
        right.loglog(*np.array(points).T, "o-", label=rule, base=2)
    left.set(xlabel="pairs seen", ylabel=f"AUC@20 on {IN_DOMAIN}, %")
    right.set(xlabel="batch size", ylabel=f"steps to AUC@20 of {100 * target:.0f} %")
    for axis in (left, right):
        axis.legend(fontsize=7)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
    save(figure, out / "batches.png")
    return markdown(rows)


def bars(results: Results, found: dict[str, list[dict]], path: Path) -> None:
    """Draw the mean zero-shot AUC of every method with its interval, and each run."""
    names = results.zero_shot
    figure = Figure(figsize=(8, 0.3 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for y, (method, runs) in enumerate(reversed(found.items())):
        value, (low, high) = aucs(runs, names).mean(), np.percentile(draws(runs, names), INTERVAL)
        axes.barh(y, value, xerr=[[value - low], [high - value]], capsize=3, color="C0" if "," in method else "0.6")
        axes.plot(aucs(runs, names).mean(1), np.full(len(runs), y), "k.", ms=4)
    axes.set_yticks(range(len(found)), [*reversed(found)])
    axes.set_xlabel("zero-shot AUC@5, %")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def write_report(folder: Path, out: Path) -> Path:
    """Write `tables.md` and the figures of what the folder of results has so far."""
    results = Results(folder)
    out.mkdir(parents=True, exist_ok=True)
    parts = []
    if results.sets:
        parts += ["# Zero-shot", table_one(results, methods(results, results.networks, list(ROWS)))]
        found = methods(results, results.networks, [*ROWS, *(f"{row}{LONG}" for row in ROWS)])
        bars(results, found, out / "zero_shot.png")
        parts += ["# By overlap", overlap_table(results, found)]
    for network in results.networks:
        parts += [f"# What each part is worth: {network}", table_two(results, network)]
        if results.seeds(network, f"gim{LONG}"):
            parts += [f"# After {TIMES} times the steps: {network}", table_two(results, network, LONG)]
    parts += ["# Hours of video", curve(results, out), "# Labels", labels_table(results), accuracy(results, out)]
    parts += ["# Batch size", batches(results, out)]
    write_atomic(out / "tables.md", lambda file: file.write("\n".join(parts).encode()))
    return out / "tables.md"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        print(write_report(arguments.results, arguments.out))
    except ValueError as error:
        sys.exit(f"report.py: {error}")
