"""The driver of the small-scale experiment: what is done is kept, what failed is done again, one run at a time."""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_prep.matchers import check_settings
from gim_jax.config import load_config

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "small_scale"
MODULES = ("run", "steps", "data", "report")


@pytest.fixture
def experiment(monkeypatch):
    """The modules of the experiment, which are scripts that import each other, by name."""
    monkeypatch.syspath_prepend(FOLDER)
    yield lambda name: importlib.import_module(name)
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def driver(experiment, tmp_path):
    """A driver with three steps that note in `trace` what they do; the second succeeds where `go` exists."""
    Step, driver = experiment("steps").Step, experiment("run").Driver(tmp_path / "out", "smoke", None)

    def step(name, *commands, **settings):
        return Step(name, tuple(("sh", "-c", command) for command in commands), lambda: {"value": name}, **settings)

    trace, go = tmp_path / "trace", tmp_path / "go"
    driver.steps = {
        "c": step("c", f"echo c >> {trace}", needs=("b",)),
        "b": step("b", f"echo b1 >> {trace}", f"test -f {go}", f"echo b2 >> {trace}", needs=("a",)),
        "a": step("a", f"echo a >> {trace}"),
        "d": step("d", f"echo d >> {trace}", option="real"),
        "e": step("e", f"echo e >> {trace}", needs=("d",)),
    }
    driver.trace, driver.go = trace, go
    return driver


def test_needs_come_first_and_only_what_is_missing_is_run(driver, capsys):
    """Steps run after what they need; a failure stops its dependents alone; the next run does the rest."""
    assert driver.run([]) == ["b", "c"]
    assert driver.trace.read_text().split() == ["a", "b1"]
    said = capsys.readouterr().out
    assert "d: skipped: no --real" in said and "e: skipped: needs d" in said and "c: left out, b failed" in said
    driver.go.touch()
    assert driver.run(["c"]) == []
    assert driver.trace.read_text().split() == ["a", "b1", "b1", "b2", "c"]
    assert json.loads(driver.result("b").read_text())["value"] == "b"
    assert driver.run([]) == [] and driver.trace.read_text().split()[-1] == "c"


def test_known_results_count_unless_their_files_are_needed(driver, tmp_path, capsys):
    known = tmp_path / "known"
    known.mkdir()
    for name in ("a", "c", "unknown"):
        (known / f"{name}.json").write_text(json.dumps({"step": name, "scale": "smoke"}))
    assert driver.run(["c"], known) == [] and not driver.trace.exists()
    assert capsys.readouterr().out == "known: c\n"
    assert driver.run(["a"]) == [] and driver.trace.read_text().split() == ["a"]
    (known / "e.json").write_text(json.dumps({"step": "e", "scale": "full"}))
    with pytest.raises(ValueError, match="scale: found 'full', expected 'smoke'"):
        driver.run([], known)


def test_a_command_that_outlives_the_driver_keeps_the_folder(driver):
    """What a killed driver left at work would write into the same files as a second run."""
    Step = type(driver.steps["a"])
    driver.steps = {"slow": Step("slow", (("sh", "-c", "sleep 0.6 &"),), dict)}
    assert driver.run([]) == []
    with pytest.raises(ValueError, match="a run is at work here"):
        driver.run([])
    time.sleep(0.8)
    assert driver.run([]) == []


def test_another_scale_or_an_unknown_step_is_refused(driver):
    driver.claim()
    driver.scale = "full"
    with pytest.raises(ValueError, match="holds an experiment with"):
        driver.run([])
    with pytest.raises(ValueError, match="nothing is none"):
        driver.plan(["nothing"])


def test_every_row_learns_from_what_it_says(experiment, tmp_path):
    """No step needs an unknown one, and the records that a row is trained on are those of the labels it needs."""
    steps = experiment("steps")
    table = steps.Table(tmp_path, steps.SCALES["full"], tmp_path / "real").steps
    for step in table.values():
        assert set(step.needs) <= set(table)
    for network, kind in (("loftr", "no_propagation"), ("lightglue", "no_propagation"), ("dkm", "full")):
        row = "gim" if kind == "full" else kind
        (records,) = (w for w in table[f"{network}-{row}-0"].commands[0] if w.startswith("--config.data.records="))
        assert records.endswith(f"{tmp_path}/towns/records,{tmp_path}/labels-{network}-{kind}/records")
        label = table[f"labels-{network}-{kind}"].commands[0]
        assert ("--config.link_radius_px=0.0" in label) == (kind == "no_propagation")
    for step in (one for name, one in table.items() if name.startswith("labels-")):
        settings = [word for word in step.commands[0] if word.startswith("--config.")]
        if settings:  # the others take a part of labels that are there
            check_settings(load_config("configs/label.py", [s for s in settings if "networks." not in s]))
    assert "plain" in " ".join(table["loftr-in_domain-0"].commands[0])


def test_auc_of_poses_and_planes(experiment):
    """Poses count up to 5 degrees, planes up to 3 px; the curve of n pairs rises in a straight line to each error."""
    sets = ({"stone": [0.0, None], "viewpoint": [1.5, None]}, {"stone": [2.5, 2.5], "viewpoint": [None, 4.0]})
    runs = [{"sets": {name: {"errors": errors} for name, errors in one.items()}} for one in sets]
    # 1.5 of 3 px at half: a triangle of 1.5 x 0.5 / 2 and 1.5 x 0.5; 2.5 of 5 degrees: 2.5 x 0.5 / 2 and 2.5 x 1
    expected = [[50, 100 * (0.375 + 0.75) / 3], [100 * (0.625 + 2.5) / 5, 0]]
    np.testing.assert_allclose(experiment("report").aucs(runs, ["stone", "viewpoint"]), expected)


def test_rendered_pairs_by_overlap(experiment, tmp_path):
    """A pair counts by its own overlap, whatever set it is of; runs are averaged."""
    errors = ({"stone": [0.0, None], "brick": [5.0, 0.0]}, {"stone": [None, None], "brick": [0.0, 0.0]})
    found = {"overlaps": {"overlaps": {"brick": [0.3, 0.7], "stone": [0.25, 0.5]}}}
    for seed, sets in enumerate(errors):
        found[f"loftr-gim-{seed}"] = {"sets": {name: {"errors": values} for name, values in sets.items()}}
    for name, content in found.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    report = experiment("report")
    results = report.Results(tmp_path)
    # 0.2 to 0.4: errors (5, 0) then (0, inf); 0.4 to 0.6: inf, inf; 0.6 to 0.8: 0, 0
    first = np.mean([report.metrics.pose_auc(np.array(pair), [5.0])[0] for pair in ([5.0, 0.0], [0.0, np.inf])])
    table = report.overlap_table(results, {"gim": results.seeds("loftr", "gim")})
    assert table.splitlines()[-1] == f"| gim | {100 * first:.1f} | 0.0 | 100.0 |"
