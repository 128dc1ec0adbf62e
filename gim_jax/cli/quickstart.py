"""`gim-jax quickstart`: label, pack, train, evaluate, report, on the CPU, with nothing downloaded.

Every step leaves files in the output folder and is skipped or continued where they are there, so a run that was
interrupted at any moment goes on when it is started again.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gim_jax.cli.progress import Progress
from gim_jax.config import config_hash, load_config
from gim_jax.data.json_file import read_json, write_json
from gim_jax.data.tfrecord import write_atomic

TRAIN_TOWNS = (1, 2, 3)  # seeds of the rendered videos
TRAIN_SECONDS = 14.0  # length of each
TEST_TOWNS = 100  # seed of the rendered test pairs; no video shows these towns
NUM_TEST_PAIRS = 60
FRAME_LONG_SIDE = 640  # larger videos are made smaller: full HD frames cost ten times as much
VIDEO_SECONDS = 60.0  # this much of the given videos is labelled, shared among them
MODEL = "loftr_tiny"
TRAINING = "configs/loftr.py:tiny"
SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="video files; without any, towns are rendered")
    parser.add_argument(
        "--out", default="quickstart", metavar="DIR", help="folder of all results (default: quickstart)"
    )
    parser.add_argument("--pairs", metavar="FILE", help="evaluate on this list of pairs with known poses instead")
    parser.add_argument("--steps", type=int, default=0, help="training steps (default: of configs/loftr.py:tiny)")


def run(args: argparse.Namespace) -> int:
    # One XLA device per core: the batch is split over them, which uses the cores better than one program does.
    # Has to be said before JAX starts.
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={min(os.cpu_count() or 1, 8)}")
    out = Path(args.out)
    claim(out, {"videos": [str(Path(v).resolve()) for v in args.videos], "pairs": args.pairs, "steps": args.steps})
    clock = Clock(out)
    print(f"gim-jax quickstart: results in {out.resolve()}", flush=True)

    videos = list(args.videos)
    if not videos:
        with clock.step("render", f"1/6 rendering {len(TRAIN_TOWNS)} walks through procedural towns"):
            videos = [str(render_town(out, seed)) for seed in TRAIN_TOWNS]
    with clock.step("label", f"2/6 labelling {len(videos)} videos"):
        rows = label(videos, out / "labels", shorten=bool(args.videos))
    if not sum(row["pairs"] for row in rows):
        return finish(out, clock, "no pair of frames could be labelled; the report says why")
    with clock.step("pack", "3/6 packing the labelled pairs into records"):
        from gim_jax.cli.pack import pack

        packed = pack(out / "labels", out / "records")
        print(f"  {packed['num_records']} pairs in {packed['num_shards']} files")

    pairs = args.pairs
    if pairs is None:
        with clock.step("test pairs", f"4/6 rendering {NUM_TEST_PAIRS} test pairs in towns never trained on"):
            pairs = str(render_test_pairs(out) / "pairs_with_gt.txt")
    with clock.step("evaluate before", "4/6 evaluating RootSIFT and the untrained network"):
        evaluate(out, "rootsift", pairs, lambda: None)
        evaluate(out, "untrained", pairs, untrained_variables)
    with clock.step("train", f"5/6 training {MODEL}"):
        train(out, args.steps)
    with clock.step("evaluate after", "6/6 evaluating the trained network"):
        evaluate(out, "trained", pairs, lambda: out / "train" / "weights.safetensors")
        draw_test_matches(out, pairs)
    if not args.videos:
        with clock.step("judge", "6/6 comparing the labels of one video with the rendered truth"):
            judge_labels(out, TRAIN_TOWNS[0])
    before, after = (read_json(out / "eval" / f"{name}.json") for name in ("untrained", "trained"))
    print(
        f"AUC@5 on {after['num_pairs']} unseen pairs: {100 * before['auc']['5']:.1f} before training, "
        f"{100 * after['auc']['5']:.1f} after"
    )
    return finish(out, clock)


def claim(out: Path, settings: dict) -> None:
    """Make the folder, or check that it holds a run with the same settings."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "quickstart.json"
    found = read_json(path)
    if found is None:
        if any(out.iterdir()):
            raise ValueError(f"--out {out}: the folder holds something else, expected an empty or a new one")
        write_json(path, {"settings": settings, "seconds": {}})
    elif found["settings"] != settings:
        raise ValueError(f"--out {out}: holds a run with other settings ({found['settings']}); choose another folder")


class Clock:
    """Prints what each step does and keeps its seconds in `quickstart.json`, summed over interrupted runs."""

    def __init__(self, out: Path):
        self.path, self.name, self.started = out / "quickstart.json", "", 0.0

    def step(self, name: str, text: str) -> Clock:
        print(text, flush=True)
        self.name = name
        return self

    def __enter__(self) -> None:
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        state = read_json(self.path)
        spent = time.monotonic() - self.started
        state["seconds"][self.name] = state["seconds"].get(self.name, 0.0) + spent
        write_json(self.path, state)
        print(f"  {spent:.1f} s", flush=True)


def finish(out: Path, clock: Clock, problem: str = "") -> int:
    from gim_jax.report import write_report

    path = write_report(out).resolve()
    seconds = sum(read_json(clock.path)["seconds"].values())
    if problem:
        print(f"gim-jax quickstart: {problem}")
    print(f"report after {seconds / 60:.1f} minutes: {path}")
    return 1 if problem else 0


def render_town(out: Path, seed: int) -> Path:
    from data_prep.world import WorldConfig, render

    with Progress(f"town {seed}", unit="frames") as progress:
        folder = render(
            out / "worlds" / f"town{seed}", WorldConfig(seed=seed, seconds=TRAIN_SECONDS), progress=progress
        )
    link = out / "worlds" / f"town{seed}.mp4"  # a name that tells the videos apart in the report
    if not link.exists():
        link.symlink_to(Path(folder.name) / "video.mp4")
    return link


def render_test_pairs(out: Path) -> Path:
    from data_prep.pairs import render_pairs

    with Progress("test pairs", unit="images") as progress:
        return render_pairs(out / "test_pairs", seed=TEST_TOWNS, num_pairs=NUM_TEST_PAIRS, progress=progress)


def label(videos: list[str], out: Path, shorten: bool) -> list[dict]:
    """Label the videos; of given ones the first minute in all, at most `FRAME_LONG_SIDE` pixels wide."""
    from gim_jax.cli.label import label_all

    config = load_config("configs/label.py")
    config.licence = "given by the user" if shorten else "Apache-2.0 (rendered)"
    if shorten:
        config.long_side = FRAME_LONG_SIDE
        config.max_seconds = max(VIDEO_SECONDS / len(videos), 10.0)
    return label_all(videos, config, out)[0]


def untrained_variables():
    """The network as training begins with it."""
    import jax

    from gim_jax.models import get_model

    info = get_model(MODEL)
    shape = np.zeros((1, 64, 64, info.config.in_channels), np.float32)
    return jax.jit(info.network(info.config).init)(jax.random.key(SEED), shape, shape)


def evaluate(out: Path, name: str, pairs: str, weights: Callable) -> None:
    """Relative pose AUC of one matcher, kept in `eval/<name>.json`."""
    from gim_jax import api
    from gim_jax.eval.pairs import evaluate_pairs

    path = out / "eval" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    if read_json(path) is None:
        api.enable_compilation_cache()
        matcher = api.load_matcher("rootsift" if name == "rootsift" else MODEL, weights())
        with Progress(name, unit="pairs") as progress:
            write_json(path, evaluate_pairs(pairs, matcher, progress=progress))
    result = read_json(path)
    auc = " ".join(f"@{t} {100 * value:.1f}" for t, value in result["auc"].items())
    print(f"  {name}: AUC {auc}, {result['mean_matches']:.0f} matches a pair", flush=True)


def train(out: Path, steps: int) -> None:
    from gim_jax import api
    from gim_jax.cli.train import Line
    from gim_jax.train import loop

    api.enable_compilation_cache()
    overrides = [f"--config.data.records={out / 'records'}", f"--config.seed={SEED}"]
    if steps:
        overrides += [f"--config.num_steps={steps}", f"--config.optim.warmup_steps={min(30, steps // 10)}"]
    with Line(every_s=10.0) as line:
        result = loop.train(load_config(TRAINING, overrides), out / "train", line)
    state = read_json(out / "quickstart.json")
    state["train"] = (
        f"{MODEL}, {result['num_params']:,} parameters, {result['step']} steps in {result['elapsed_s']:.0f} s, "
        f"configuration {config_hash(load_config(TRAINING, overrides))}"
    )
    write_json(out / "quickstart.json", state)


def draw_test_matches(out: Path, pairs: str, num: int = 3) -> None:
    """Pictures of the trained network's matches, coloured by their distance from the true epipolar line."""
    from gim_jax import api, geometry, image, viz
    from gim_jax.eval.pairs import read_pairs

    rows = [row for row in read_pairs(pairs) if not (row.turns0 or row.turns1)]
    matcher = api.load_matcher(MODEL, out / "train" / "weights.safetensors")
    for k, row in enumerate(rows[:: max(len(rows) // num, 1)][:num]):
        images = image.read_image(row.path0, exif=False), image.read_image(row.path1, exif=False)
        found = matcher(*images)
        F = geometry.fundamental_from_pose(row.T_0to1, row.K0, row.K1)
        error = np.sqrt(geometry.sampson_distance(found.kpts0, found.kpts1, F))
        drawn = viz.draw_matches(*images, found.kpts0, found.kpts1, error=error, error_limit=4.0)
        data = image.encode_jpeg(drawn, 88)
        write_atomic(out / "eval" / f"matches{k}.jpg", lambda file, data=data: file.write(data))


def judge_labels(out: Path, seed: int) -> None:
    """Accuracy of direct and propagated labels, kept in `accuracy.json`."""
    from data_prep.accuracy import label_accuracy
    from data_prep.label import label_in_memory
    from data_prep.truth import Truth

    if read_json(out / "accuracy.json") is None:
        folder = out / "worlds" / f"town{seed}"
        labels = label_in_memory(folder / "video.mp4", load_config("configs/label.py"))
        rows = label_accuracy(labels, Truth.load(folder))
        note = (
            f"Share of the labels on static surfaces of {folder.name} that lie within 1, 2 and 3 px of the true point."
        )
        write_json(out / "accuracy.json", {"rows": rows, "note": note})
    far = read_json(out / "accuracy.json")["rows"][-1]
    print(f"  {100 * far['within'][1]:.1f} % of {far['labels']} labels {far['frames_apart']} frames apart within 2 px")
