"""The whole chain on a short clip: complete, interrupted and continued, and honest where there is nothing to learn."""

import json
import re

import numpy as np
import pytest

from data_prep import label
from data_prep.pairs import render_pairs
from gim_jax import cli
from gim_jax.cli import quickstart
from tests.test_label import pan
from tests.test_video import write_video

STEPS = 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_video(folder / "pan.mp4", pan(100, 2, 0, size=(320, 240)), options={"crf": "8"})
    render_pairs(folder / "pairs", seed=7, num_pairs=2, size=(160, 128))
    return folder


def run(clip, out) -> int:
    pairs = str(clip / "pairs" / "pairs_with_gt.txt")
    return cli.main(["quickstart", str(clip / "pan.mp4"), "--out", str(out), "--pairs", pairs, "--steps", str(STEPS)])


@pytest.mark.slow
def test_chain_is_whole_and_continues_after_an_interruption(clip, tmp_path, monkeypatch, capsys):
    """Stopped after the labels and again in the middle of the evaluation, it ends like a run that was left alone."""
    assert run(clip, tmp_path / "whole") == 0

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    for name in ("train", "draw_test_matches"):
        with monkeypatch.context() as patch:
            patch.setattr(quickstart, name, stop)
            assert run(clip, tmp_path / "stopped") == 130
    labelled = next((tmp_path / "stopped" / "labels").glob("*.tfrecord")).stat().st_mtime_ns
    assert run(clip, tmp_path / "stopped") == 0
    assert next((tmp_path / "stopped" / "labels").glob("*.tfrecord")).stat().st_mtime_ns == labelled

    losses, results = [], []
    for name in ("whole", "stopped"):
        lines = (tmp_path / name / "train" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        results.append(json.loads((tmp_path / name / "eval" / "trained.json").read_text())["rows"])
    assert len(losses[0]) == STEPS and losses[0] == losses[1], "bit for bit"
    assert [r["num_matches"] for r in results[0]] == [r["num_matches"] for r in results[1]]

    page = (tmp_path / "stopped" / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from outside"
    for text in ("AUC@5", "Reach of the propagation", "pan.mp4", "Training"):
        assert text in page
    assert str((tmp_path / "stopped" / "report.html").resolve()) in capsys.readouterr().out


def test_a_video_that_teaches_nothing_is_reported(tmp_path, capsys):
    write_video(tmp_path / "black.mp4", [np.zeros((120, 160, 3), np.uint8)] * 50)
    assert cli.main(["quickstart", str(tmp_path / "black.mp4"), "--out", str(tmp_path / "out")]) == 1
    assert "no pair of frames could be labelled" in capsys.readouterr().out
    assert "no texture" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert cli.main(["quickstart", "--out", str(tmp_path)]) == 2
    assert "something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_settings_need_another_folder(tmp_path, capsys):
    write_video(tmp_path / "black.mp4", [np.zeros((120, 160, 3), np.uint8)] * 50)
    arguments = ["quickstart", str(tmp_path / "black.mp4"), "--out", str(tmp_path / "out")]
    cli.main(arguments)
    assert cli.main([*arguments, "--steps", "5"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_names_in_the_report_are_text_not_markup(tmp_path):
    from gim_jax.report import write_report

    name = "<script>alert(1)</script>.mp4"
    write_video(tmp_path / "v.mp4", pan(30, 2, 0), options={"crf": "8"})
    (tmp_path / "v.mp4").rename(tmp_path / name.replace("/", ""))
    from gim_jax.config import load_config

    label.label_video(tmp_path / name.replace("/", ""), load_config("configs/label.py"), tmp_path / "labels")
    assert "<script>" not in write_report(tmp_path / "labels").read_text()
