"""A benchmark from its data to its document: what is matched, how it is fed, how it is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gim_jax import __version__, api
from gim_jax.eval import document, metrics, pairs, published, run, zeb
from gim_jax.eval.hpatches import HPATCHES, NUM_PAIRS, THRESHOLDS_PX, read_hpatches
from gim_jax.eval.in_domain import MEGADEPTH, PRESET_OF, SCANNET, preset, read_megadepth, read_scannet
from gim_jax.eval.measure import Pair, Protocol
from gim_jax.models import get_model


@dataclass(frozen=True)
class Plan:
    """What a benchmark wants of a matcher.

    Attributes:
      benchmark: its name.
      pairs: in a fixed order.
      protocols: how matches are measured; the first one is the benchmark's, others stand beside it.
      matcher: settings of `api.load_matcher`.
      feeds: by set, see `run.Feed`.
      thresholds: of the AUC: degrees, px of homographies.
      expected: pairs of each set that make the benchmark, None: those that are there.
    """

    benchmark: str
    pairs: Sequence[Pair]
    protocols: Sequence[Protocol] = (Protocol(),)
    matcher: Mapping[str, Any] = field(default_factory=dict)
    feeds: Mapping[str, run.Feed] = field(default_factory=dict)
    thresholds: Sequence[float] = metrics.AUC_THRESHOLDS_DEG
    expected: Mapping[str, int] | None = None


def zeb_plan(
    root: str | Path,
    model: str,
    sets: Sequence[str] = (),
    overlap: tuple[float, float] | None = None,
    fraction: float = 1.0,
    mapping: str = "corrected",
) -> Plan:
    """Plan ZEB, or the sets of it that are named, or that are there.

    Args:
      root: folder of the sets' folders.
      mapping: "corrected", or "released", which reproduces the published figures; both are measured, this one first.
      overlap, fraction: see `zeb.subset`.
    """
    there = [name for name, s in zeb.SETS.items() if (Path(root) / s.folder).is_dir()]
    unknown = sorted(set(sets) - set(zeb.SETS))
    if unknown:
        raise ValueError(f"sets: found {', '.join(unknown)}, expected some of {', '.join(zeb.SETS)}")
    if not there and not sets:
        folders = ", ".join(s.folder for s in zeb.SETS.values())
        raise ValueError(f"{root}: found no set of ZEB, expected folders named {folders}")
    chosen = [pair for name in (sets or there) for pair in zeb.read_set(root, name)]
    info = get_model(model)
    family = info.family
    settings = {"long_side": None} if family == "rootsift" else {**zeb.MATCHER, **zeb.FAMILY_SETTINGS.get(family, {})}
    modes = ("corrected", "released") if mapping == "corrected" else ("released", "corrected")
    return Plan(
        "zeb",
        zeb.subset(chosen, overlap, fraction),
        [Protocol(mapping=mode) for mode in modes],
        settings,
        zeb.feeds(family, gray=info.channels == 1 and family != "rootsift"),
        expected=published.PAIRS,
    )


def pairs_plan(files: Sequence[str | Path], settings: Mapping[str, Any]) -> Plan:
    """Plan lists of pairs, one set each, named by their folders."""
    chosen = []
    names: dict[str, Path] = {}
    for file in files:
        name = Path(file).resolve().parent.name
        if name in names:
            name = str(file)
        names[name] = Path(file)
        chosen += [replace(pair, set=name) for pair in pairs.read_pairs(file)]
    return Plan("pairs", chosen, matcher=settings)


PRESETS = {  # benchmark: (how its pairs are read, presets, set and number of pairs, thresholds)
    "megadepth1500": (read_megadepth, MEGADEPTH, {"MegaDepth-1500": 1500}, metrics.AUC_THRESHOLDS_DEG),
    "scannet1500": (read_scannet, SCANNET, {"ScanNet-1500": 1500}, metrics.AUC_THRESHOLDS_DEG),
    "hpatches": (read_hpatches, HPATCHES, {"HPatches": NUM_PAIRS}, THRESHOLDS_PX),
}


def preset_plan(benchmark: str, root: str | Path, model: str, protocol: str | None = None) -> Plan:
    """Plan a benchmark of `PRESETS` by a family's protocol.

    Args:
      root: folder of its data, see the readers.
      protocol: "dkm", "loftr" or "superglue"; None: that of the model's family.
    """
    read, table, expected, thresholds = PRESETS[benchmark]
    family = get_model(model).family
    feed, settings, how = preset(table, protocol or _preset_name(table, family), family)
    if family == "rootsift":
        settings = {"long_side": None}
    elif "short_side" in dict(feed.resize):
        feed, settings = replace(feed, gray=get_model(model).channels == 1), zeb.MATCHER
    else:  # the network resizes by the protocol's rule, in its own way; of the model's own rule nothing is left
        feed = replace(feed, inside=True)
        rule = {**zeb.MATCHER, "upscale": True, "floor": False, **dict(feed.resize)}
        settings = {**rule, **(settings if family in zeb.DENSE_FAMILIES else {})}
    (name,) = expected
    return Plan(benchmark, read(root), [how], settings, {name: feed}, thresholds, expected)


def _preset_name(table: Mapping[str, Any], family: str) -> str:
    """The family's own preset where the benchmark has it, else LoFTR's."""
    return PRESET_OF[family] if PRESET_OF[family] in table else "loftr"


class OnDevice:
    """A matcher that lives on one device, for the thread that uses it."""

    def __init__(self, device: Any, make: Callable[[], Any]):
        import jax

        self._context = lambda: jax.default_device(device)
        with self._context():
            self._matcher = make()
        self.batch_size, self.describe = self._matcher.batch_size, self._matcher.describe

    def match_batch(self, images):
        """See `api.Network.match_batch`."""
        with self._context():
            return self._matcher.match_batch(images)


def matchers(model: str, weights: Any, batch_size: int, settings: Mapping[str, Any], num_devices: int | None) -> list:
    """Return functions that make a matcher each: one per accelerator, one on a CPU unless more are asked for."""
    make = lambda: api.load_matcher(model, weights, batch_size=batch_size, **settings)  # noqa: E731
    if get_model(model).family == "rootsift":
        return [make] * (num_devices or 1)
    import jax

    devices = jax.local_devices()
    if num_devices is None:
        num_devices = 1 if devices[0].platform == "cpu" else len(devices)
    if not 0 < num_devices <= len(devices):
        raise ValueError(f"devices: found {num_devices}, expected 1 to {len(devices)}")
    return [lambda device=device: OnDevice(device, make) for device in devices[:num_devices]]


def evaluate(
    plan: Plan,
    model: str,
    weights: Any = None,
    *,
    folder: str | Path,
    batch_size: int = 1,
    num_devices: int | None = None,
    num_workers: int | None = None,
    task: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any] | None, run.Done]:
    """Match and measure what a plan says.

    Args:
      folder: of the run: the cache of predictions, and where it goes on.
      task: (index, count) of tasks that share the folder.
      the rest: see `run.run` and `matchers`.

    Returns:
      The document, None while other tasks are at work; and what the run did.
    """
    if get_model(model).features == "given":
        raise ValueError(f"model: {model} detects no keypoints, so it cannot match images alone")
    make = matchers(model, weights, batch_size, plan.matcher, num_devices)
    first = make[0]()  # it also says what it is
    make[0] = lambda: first
    described = first.describe()
    sha256 = (described.pop("weights", None) or {}).get("sha256")
    settings = {
        "gim_jax": __version__,
        "benchmark": plan.benchmark,
        "data_sha256": zeb.data_hash(plan.pairs),
        "num_pairs": len(plan.pairs),
        "model": described,
        "weights_sha256": sha256,
        "batch_size": batch_size,
        "feeds": {name: repr(plan.feeds[name]) for name in sorted({pair.set for pair in plan.pairs} & set(plan.feeds))},
    }
    family = get_model(model).family
    done = run.run(
        plan.pairs,
        plan.feeds,
        make,
        folder,
        settings,
        plan.protocols,
        num_workers=num_workers,
        task=task,
        dense=family in zeb.DENSE_FAMILIES,
        progress=progress,
    )
    if done.tables is None:
        return None, done
    shown = range(len(plan.protocols))
    if plan.benchmark == "zeb" and not zeb.differs(plan.pairs, done):
        shown = range(1)
    results = []
    for index in shown:
        protocol = plan.protocols[index]
        sets = run.records(plan.pairs, done, protocol, index, plan.thresholds)
        if plan.benchmark == "zeb":
            zeb.add_baselines(sets)
        results.append(
            document.method_result(
                f"{model}, released mapping" if index and protocol.mapping == "released" else model,
                published.MODELS.get(model),
                sets,
                plan.expected,
                model=described,
                settings={**settings, "protocol": {**vars(protocol), "frame": dict(protocol.frame)}},
                seconds={"match": round(done.match_s, 3), "measure": round(done.measure_s, 3)},
            )
        )
    return document.document(plan.benchmark, results), done
