"""Many videos, workers that die: what is written is whole, and the same whoever wrote it."""

import errno
import hashlib
import json
import multiprocessing
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data_prep import fleet, label
from gim_jax import cli
from gim_jax.cli.pack import pack
from gim_jax.config import load_config
from gim_jax.data import records
from tests import killer
from tests.pairs import make_record
from tests.test_label import pan
from tests.test_video import write_video

OVERRIDES = ["--config.every_frames=2", "--config.min_matches=2000", "--config.workers=1"]


def make_config(*more):
    return load_config("configs/label.py", [*OVERRIDES, *more])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"" for p in folder.iterdir() if ".time." not in p.name}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("fleet") / "pan.mp4"
    write_video(path, pan(40, 2, 0), options={"crf": "6"})
    return path


@pytest.fixture(scope="module")
def undisturbed(video, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    label.label_video(video, make_config(), out)
    return contents(out)


@pytest.mark.slow
def test_killed_at_any_write_it_ends_with_the_same_files(video, undisturbed, tmp_path):
    """Killed before a block, the records or the seconds get their name, and started again each time."""
    assert len(undisturbed) == 4
    for number in (2, 3, 4):
        done = subprocess.run([sys.executable, "-m", "tests.killer", video, tmp_path, str(number)], check=False)
        assert done.returncode == -9
        assert not (tmp_path / "failed.json").exists()
    label.label_video(video, make_config(), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_two_workers_at_one_video_do_no_harm(video, undisturbed, tmp_path):
    with ThreadPoolExecutor(3) as pool:
        rows = list(pool.map(lambda _: label.label_video(video, make_config(), tmp_path), range(3)))
    assert rows[0] == rows[1] == rows[2]
    assert contents(tmp_path) == undisturbed


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_its_video_alone(video, undisturbed, tmp_path, capsys):
    write_video(tmp_path / "black.mp4", [np.zeros((150, 200, 3), np.uint8)] * 6)
    (tmp_path / "list.csv").write_text(f"video,licence\nblack.mp4,CC0-1.0\n{video},CC-BY-4.0\n")
    arguments = ["label", str(tmp_path / "list.csv"), "--out", str(tmp_path / "out"), "--processes", "2"]
    assert cli.main([*arguments, *OVERRIDES, "--config.mask_provider=tests.killer:black_frames"]) == 1
    assert "black.mp4: its worker was killed by SIGKILL" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "failed.json").read_text())) == 1
    (row,) = [json.loads(p.read_text()) for p in (tmp_path / "out").glob("*.json") if len(p.stem) == 16]
    assert row["licence"] == "CC-BY-4.0" and row["pairs"] == 19


def test_an_interrupt_ends_the_workers_and_starts_none(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "_work", killer.linger)
    jobs = [types.SimpleNamespace(video=name) for name in ("short", "long", "longer")]
    results = fleet.label_in_workers(jobs, make_config(), tmp_path, 2)
    assert next(results) == (jobs[0], "done")
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt())
    assert not multiprocessing.active_children() and not list(tmp_path.iterdir())


def test_a_full_disk_fails_the_video_that_met_it_alone(video, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "other.mp4", pan(12, 2, 1), options={"crf": "6"})
    write, calls = records.write_tfrecord, []

    def full(path, payloads):
        calls.append(path)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, payloads)

    monkeypatch.setattr(records, "write_tfrecord", full)
    assert cli.main(["label", str(video), str(tmp_path / "other.mp4"), "--out", str(tmp_path / "out"), *OVERRIDES]) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob(".*")), "room for the next video"
    assert len([p for p in (tmp_path / "out").glob("*.json") if len(p.stem) == 16]) == 1


def test_records_of_other_settings_are_not_left_to_be_packed(video, tmp_path, monkeypatch):
    """A second run is stopped at once: what the first one wrote is of no run any more."""
    stem = tmp_path / hashlib.sha256(video.read_bytes()).hexdigest()[:16]
    stem.with_suffix(".json").write_text(json.dumps({"label_config_hash": "of other settings"}))
    for suffix in (".tfrecord", ".examples"):
        records.write_tfrecord(stem.with_suffix(suffix), [records.encode(make_record())])

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(label, "_label", stop)
    with pytest.raises(KeyboardInterrupt):
        label.label_video(video, make_config(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_records_is_of_one_split_and_whole(tmp_path):
    (tmp_path / "labels").mkdir()
    records.write_tfrecord(tmp_path / "labels" / "a.tfrecord", [records.encode(make_record(k)) for k in range(3)])
    out = tmp_path / "packed"
    pack(tmp_path / "labels", out, num_shards=2)
    before = contents(out)
    with pytest.raises(ValueError, match="packed: holds pairs-train, expected another folder for pairs-val"):
        pack(tmp_path / "labels", out, split="val", num_shards=2)
    assert contents(out) == before
    for shard in out.glob("*.tfrecord-*"):
        shard.unlink()
    assert not pack(tmp_path / "labels", out, num_shards=2)["up_to_date"] and contents(out) == before
    for text in ("{}", '{"key": ', "[1]"):
        (out / "packed.json").write_text(text)
        with pytest.raises(ValueError, match=r"packed\.json: "):
            pack(tmp_path / "labels", out, num_shards=2)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_tasks_share_the_videos(count):
    jobs = [fleet.Job(f"{k}.mp4") for k in range(7)]
    shares = [fleet.share(jobs, index, count) for index in range(count)]
    assert sorted(job.video for part in shares for job in part) == [job.video for job in jobs]
    with pytest.raises(ValueError, match="task-index"):
        fleet.share(jobs, count, count)


def test_failures_of_tasks_do_not_overwrite_each_other(tmp_path, capsys):
    for index in range(2):
        assert cli.main(["label", "a.mp4", "b.mp4", "--out", str(tmp_path), "--task_index", str(index),
                         "--task_count", "2"]) == 1  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["failed-00000-of-00002.json", "failed-00001-of-00002.json"]


def test_a_repaired_video_is_no_failure_any_more(tmp_path, capsys):
    write_video(tmp_path / "good.mp4", [np.zeros((60, 80, 3), np.uint8)] * 4)
    (tmp_path / "a.mp4").write_text("nothing")
    (tmp_path / "b.mp4").write_text("nothing")
    videos, out = [str(tmp_path / name) for name in ("a.mp4", "x.mp4", "b.mp4")], tmp_path / "out"
    assert cli.main(["label", *videos, "--out", str(out), "--task-index=0", "--task-count=2"]) == 1
    (tmp_path / "a.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    assert cli.main(["label", videos[0], "--out", str(out)]) == 0
    (line,) = json.loads((out / "failed-00000-of-00002.json").read_text())
    assert "b.mp4" in line
    (tmp_path / "b.mp4").write_bytes((tmp_path / "good.mp4").read_bytes())
    assert cli.main(["label", *videos, "--out", str(out)]) == 1
    assert [path.name for path in out.glob("failed*")] == ["failed.json"]


@pytest.mark.slow
def test_a_local_ray_cluster_gives_the_same_files(video, undisturbed, tmp_path):
    pytest.importorskip("ray", reason="extra ray is not installed")
    assert cli.main(["label", str(video), str(tmp_path / "no.mp4"), "--out", str(tmp_path), "--ray", *OVERRIDES]) == 1
    found = contents(tmp_path)
    assert "no.mp4" in found.pop("failed.json").decode() and found == undisturbed
