"""ZEB as released: identifiers, padding in both modes, subsets, tasks, kills, the cache, and OpenCV alone."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import pytest

from benchmarks.evaluation import arrange, auc5, opencv_errors
from gim_jax import load_matcher
from gim_jax.cli import main
from gim_jax.eval import benchmarks, measure, released, run, zeb
from gim_jax.eval.measure import Pair, Protocol
from gim_jax.types import Matches

NAMES = {  # set: (file of a pair, its first two tokens, identifier, images), spec 3.2
    "GL3": ("0a0a_01_02.txt", "01.jpg 02.jpg", "0a0a#01#02", "0a0a_01.png 0a0a_02.png"),
    "WEA": ("2014-06-26_1_2.txt", "1 2", "2014-06-26#1#2", "2014-06-26_1.png 2014-06-26_2.png"),
    "KIT": ("d_sync-01-02.txt", "01.png 02.png", "d_sync#01.png#02.png", "d_sync-01.png d_sync-02.png"),
    "ETI": ("pipes-A_1-A_2.txt", "A_1.JPG A_2.JPG", "pipes#A_1.JPG#A_2.JPG", "pipes-A_1.png pipes-A_2.png"),
    "ICL": ("room1-00-33.txt", "00 33", "room1#00.jpg#33.jpg", "room1-00.png room1-33.png"),
    "MUL": ("urban-i1-i2.txt", "i1 i2", "urban#img/i1.png#img/i2.png", "urban-i1.png urban-i2.png"),
    "GTA": ("2019_1-im_0-im_3.txt", "im_0 im_3", "2019_1#im_0#im_3", "2019_1-im_0.png 2019_1-im_3.png"),
}  # fmt: skip
K = np.array([[100.0, 0, 60], [0, 100, 40], [0, 0, 1]])


def wall(seed, width=140, height=80):
    """A random texture that SIFT finds much in."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (height // 2, width // 2), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def line(names, overlap=0.3, K0=K, K1=K, T=None):
    T = np.eye(4) if T is None else T
    T[0, 3] = T[0, 3] or 0.2
    numbers = [overlap, overlap, *K0.ravel(), *K1.ravel(), *T.ravel()]
    return f"{names} {' '.join(repr(float(v)) for v in numbers)}\n"


def write_set(root, name, num=3, size=(120, 80)):
    """A set of walls, each seen twice, the second time shifted by (8, 0) px."""
    s = zeb.SETS[name]
    folder = root / s.folder
    folder.mkdir(parents=True)
    extension = {"GL3": ".jpg", "KIT": ".png", "ETI": ".JPG"}.get(name, "")
    for i in range(num):
        image = wall(i, size[0] + 20, size[1])
        for j in (0, 1):
            cv2.imwrite(str(folder / f"s{i}{s.sep}{j}.png"), image[:, 8 * (1 - j) :][:, : size[0]])
        text = line(f"0{extension} 1{extension}", overlap=0.05 + 0.1 * i)
        (folder / f"s{i}{s.sep}0{s.sep}1.txt").write_text(text)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_names_of_images_and_identifiers(tmp_path, name):
    file, tokens, identifier, images = NAMES[name]
    folder = tmp_path / zeb.SETS[name].folder
    folder.mkdir()
    for image in images.split():
        cv2.imwrite(str(folder / image), wall(0))
    (folder / file).write_text(line(tokens, 1e-05, K0=K * [1.1, 1, 1]) + "rest is ignored\n")
    (pair,) = zeb.read_set(tmp_path, name)
    assert (pair.identifier, pair.set, pair.overlap, pair.K0[0, 0]) == (identifier, name, 1e-05, K[0, 0] * 1.1)
    assert [pair.path0.name, pair.path1.name] == images.split()


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "found 0 tokens, expected 38"),
        ("0 1 0.3", "found 3 tokens"),
        (line("0 ../1"), "found 0 ../1, expected names without a folder"),
        (line("0 9"), "s0_9.png: no such file"),
        (line("0 1", overlap=float("nan")), "token 3: found nan"),
        (line("0 1", overlap=1.2), "found 1.2 1.2, expected overlaps"),
        (line("0 1", K0=K * [[0], [1], [1]]), "K0: found focal lengths 0 100"),
        (line("0 1", K1=K / [[3], [3], [1]]), "K1: found principal point"),
        (line("0 1", T=np.diag([1, 1, 0.9, 1])), "T_0to1: found a matrix that is no rotation"),
    ],
)
def test_faults_name_file_and_line(tmp_path, text, message):
    folder = write_set(tmp_path, "WEA", 1)
    bad = folder / "s0_1_0.txt"
    bad.write_text(text)
    with pytest.raises(ValueError) as error:
        zeb.read_set(tmp_path, "WEA")
    assert str(error.value).startswith(f"{bad}:1: ") and message in str(error.value)


def test_duplicates_empty_and_missing_sets(tmp_path):
    folder = write_set(tmp_path, "KIT", 1)
    (folder / "s0-copy.txt").write_text((folder / "s0-0-1.txt").read_text())
    with pytest.raises(ValueError, match=r"s0#0.png#1.png: the pair stands in s0-.*txt too"):
        zeb.read_set(tmp_path, "KIT")
    (tmp_path / "kitti" / "s0-copy.txt").unlink()
    (tmp_path / "gl3d").mkdir()
    with pytest.raises(ValueError, match="gl3d: found no pair"):
        zeb.read_set(tmp_path, "GL3")
    with pytest.raises(ValueError, match="no such folder, expected the set NIG"):
        zeb.read_set(tmp_path, "NIG")
    with pytest.raises(ValueError, match="sets: found FOO, expected some of GL3"):
        benchmarks.zeb_plan(tmp_path, "rootsift", ["FOO"])


def test_padding_of_kitti_and_eth3d():
    """Spec 3.3: 1226x370 lies in 1240x384, factors 0.9887 and 0.9635; ETH3D 6048x4032 in 1600x1072."""
    image, sizes = zeb.SETS["KIT"].feed(np.full((370, 1226, 3), 7, np.uint8))
    assert sizes == [(1226, 370), (1226, 370), (1240, 384)]
    assert image[:370, :1226].min() == 7 and image[370:].max() == 0 and image[:, 1226:].max() == 0
    corner = np.array([[1239.5, 383.5]], np.float32)  # of the canvas
    sizes = np.array(sizes)
    np.testing.assert_allclose(measure.to_stored(corner, sizes, "corrected", True), corner, atol=1e-3)
    wrong = measure.to_stored(corner, sizes, "released", True)[0] / [1240, 384]
    np.testing.assert_allclose(wrong, [0.9887, 0.9635], atol=5e-5)
    np.testing.assert_allclose(measure.to_stored(corner, sizes, "released", False), corner)
    _, sizes = zeb.SETS["ETO"].feed(np.zeros((4032, 6048, 3), np.uint8))
    assert sizes == [(6048, 4032), (1600, 1067), (1600, 1072)]
    np.testing.assert_allclose(
        measure.to_stored(np.zeros((1, 2), np.float32), np.array(sizes), "corrected", False),
        [[0.5 * 3.78 - 0.5, 0.5 * 4032 / 1067 - 0.5]],
    )


def test_other_sets_are_floored_to_eights_and_not_padded():
    _, sizes = zeb.SETS["GL3"].feed(np.zeros((67, 101, 3), np.uint8))
    assert sizes == [(101, 67), (96, 64), (96, 64)]


def test_subsets_by_overlap_and_by_hash(tmp_path):
    write_set(tmp_path, "WEA", 5)
    pairs = zeb.read_set(tmp_path, "WEA")
    assert [p.identifier for p in zeb.subset(pairs, (0.2, 0.4))] == ["s2#0#1", "s3#0#1"]
    half = {p.identifier for p in zeb.subset(pairs, fraction=0.5)}
    assert half == {p.identifier for p in zeb.subset(pairs[::-1], fraction=0.5)}
    assert half <= {p.identifier for p in zeb.subset(pairs, fraction=0.8)}
    with pytest.raises(ValueError, match="found no pair with overlap in"):
        zeb.subset(pairs, (0.9, 1.0))


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("zeb")
    write_set(root, "KIT", 2)
    write_set(root, "NIG", 7)
    return root


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(run, "CHUNK", 2)


def evaluate(root, folder, **kwargs):
    plan = benchmarks.zeb_plan(root, "rootsift")
    content, done = benchmarks.evaluate(plan, "rootsift", folder=folder, num_workers=0, **kwargs)
    for result in content["results"] if content else ():
        result.pop("seconds")
    return content, done


def test_tasks_share_a_folder_and_end_with_the_same_result(two_sets, tmp_path, small_chunks):
    alone, _ = evaluate(two_sets, tmp_path / "alone")
    for index in (2, 0):
        content, done = evaluate(two_sets, tmp_path / "shared", task=(index, 3))
        assert content is None
    assert (done.num_there, done.num_chunks) == (3, 5)
    content, _ = evaluate(two_sets, tmp_path / "shared", task=(1, 3), num_devices=2)
    assert content == alone and alone["results"][0]["mean"]["num_pairs"] == 9


def test_predictions_are_kept_and_measured_anew(two_sets, tmp_path, small_chunks, monkeypatch):
    first, _ = evaluate(two_sets, tmp_path)
    monkeypatch.setattr(run, "_match_chunk", lambda *_: pytest.fail("matched again"))
    again, _ = evaluate(two_sets, tmp_path)
    assert again == first
    assert main(["eval", "--benchmark=zeb", "--data", str(two_sets), "--out", str(tmp_path), "--threshold=3"]) == 1
    other = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert other["settings"]["protocol"]["threshold_px"] == 3
    assert other["percent"] != first["results"][0]["percent"]


def test_a_cache_made_with_other_settings_is_refused(two_sets, tmp_path, capsys):
    arguments = ["eval", "--benchmark=zeb", "--data", str(two_sets), "--out", str(tmp_path / "run")]
    main([*arguments, "--sets", "NIG"])
    capsys.readouterr()
    assert main([*arguments, "--sets", "KIT"]) == 2
    error = capsys.readouterr().err
    assert "holds matches made with other settings (data_sha256: found" in error and error.count("\n") == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert "the folder holds something else" in capsys.readouterr().err
    (tmp_path / "other" / "run.json").write_text("[]")
    assert main([*arguments[:-1], str(tmp_path / "other")]) == 2
    assert "run.json: found no settings of a run" in capsys.readouterr().err


def test_a_damaged_cache_is_named(two_sets, tmp_path, small_chunks):
    evaluate(two_sets, tmp_path)
    path = tmp_path / "matches" / "00001.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001\.npz: not a whole npz file"):
        evaluate(two_sets, tmp_path)


def test_released_files_and_columns(two_sets, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["eval", "--benchmark=zeb", "--data", str(two_sets), "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "12 sets: without GL3" in printed and "KIT: 2 pairs, the released set has 5013" in printed
    (result,) = json.loads((out / "results.json").read_text())["results"]  # nothing is padded visibly: one mode
    columns = released.read(out / "[T] rootsift           KITTI corrected.txt")
    assert columns["identifiers"] == [f"s{i}#0.png#1.png" for i in range(2)]
    record = next(r for r in result["sets"] if r["set"] == "KIT")
    np.testing.assert_allclose(released.errors_deg(columns), record["pairs"]["error"])
    np.testing.assert_allclose(columns["covisible0"], [0.05, 0.15])
    again, _ = benchmarks.document.from_released(out)
    percent = again["results"][0]["percent"]
    assert percent["KIT"] == pytest.approx(result["percent"]["KIT"], abs=1e-9)
    with np.load(out / "pairs-corrected.npz") as file:
        assert file["set"].tolist() == ["KIT"] * 2 + ["NIG"] * 7


def test_killed_at_any_moment_it_ends_with_the_same_result(two_sets, tmp_path):
    """SIGKILL after a tenth, two tenths, ... of the time of a whole run, until one ends by itself."""
    code = (
        "import sys; from gim_jax.eval import benchmarks, run; run.CHUNK = 1\n"
        "plan = benchmarks.zeb_plan(sys.argv[1], 'rootsift')\n"
        "benchmarks.evaluate(plan, 'rootsift', folder=sys.argv[2], num_workers=0)"
    )
    command = [sys.executable, "-c", code, str(two_sets), str(tmp_path / "run")]
    environment = {**os.environ, "XLA_FLAGS": ""}
    kills, ended = 0, False
    while not ended:
        process = subprocess.Popen(command, env=environment)
        before = len(list((tmp_path / "run" / "matches").glob("*.npz")))
        while process.poll() is None and not ended:
            there = len(list((tmp_path / "run" / "matches").glob("*.npz")))
            if there >= before + 3 and kills < 2:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        ended = process.wait() == 0
    assert kills == 2
    import unittest.mock

    with unittest.mock.patch.object(run, "CHUNK", 1):
        content, _ = evaluate(two_sets, tmp_path / "run")
        alone, _ = evaluate(two_sets, tmp_path / "alone")
    assert content == alone


def test_worker_processes_give_what_threads_give(two_sets, tmp_path):
    threads, _ = evaluate(two_sets, tmp_path / "threads")
    plan = benchmarks.zeb_plan(two_sets, "rootsift")
    content, _ = benchmarks.evaluate(plan, "rootsift", folder=tmp_path / "processes", num_workers=1)
    assert [r["sets"] for r in content["results"]] == [r["sets"] for r in threads["results"]]


@pytest.mark.parametrize(
    "name, source, num",
    [
        ("GL3", "hololens_dvmvs", 5),
        pytest.param("KIT", "kitti_vslampy_seq1", 2, marks=pytest.mark.slow),
        pytest.param("ETI", "hololens_dvmvs", 2, marks=pytest.mark.slow),
    ],
)
def test_rootsift_equals_opencv_alone_on_real_pairs(shared, tmp_path, name, source, num):
    folder = arrange(shared / "data" / source, tmp_path, name, num)
    errors = opencv_errors(folder, name)
    for mapping in ("corrected", "released"):
        plan = benchmarks.zeb_plan(tmp_path, "rootsift", mapping=mapping)
        content, _ = benchmarks.evaluate(plan, "rootsift", folder=tmp_path / "run", num_workers=0)
        (record,) = content["results"][0]["sets"]
        want = np.array([errors[path.stem][mapping] for path in sorted(folder.glob("*.txt"))])
        got = dict(zip(record["pairs"]["identifier"], record["pairs"]["error"]))
        np.testing.assert_allclose([got[k] for k in sorted(got)], want, atol=1e-3)
        assert 100 * record["auc"]["5"] == pytest.approx(auc5(want), abs=0.01)


def test_networks_are_fed_without_the_padding_and_dkm_with_it():
    assert zeb.feeds("loftr")["KIT"].canvas is None and zeb.feeds("dkm")["KIT"].canvas == (1240, 384)
    assert zeb.feeds("lightglue")["ETI"].resize == zeb.SETS["ETI"].feed.resize


def test_lost_pairs_are_said_and_tried_again(tmp_path, capsys):
    folder = write_set(tmp_path / "data", "NIG", 2)
    image = folder / "s0_1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    arguments = ["eval", "--benchmark=zeb", "--data", str(tmp_path / "data"), "--workers=0"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 1
    printed = capsys.readouterr()
    assert "NIG: lost 0 1: " in printed.err and "NIG: 1 pairs were lost and count as failures" in printed.out
    assert load_matcher("rootsift").describe()["name"] in printed.out


def test_every_device_has_a_matcher_of_its_own(two_sets, tmp_path, small_chunks, monkeypatch):
    import threading

    import jax

    both, used = threading.Barrier(2, timeout=60), set()

    class Matcher(Dense):
        def match_batch(self, images):
            (device,) = jax.numpy.zeros(1).devices()
            if device not in used:
                used.add(device)
                both.wait()  # until the other device is at work, too
            return super().match_batch(images)

    monkeypatch.setattr(benchmarks.api, "load_matcher", lambda *_, **__: Matcher())
    plan = benchmarks.zeb_plan(two_sets, "loftr_tiny")
    content, _ = benchmarks.evaluate(plan, "loftr_tiny", folder=tmp_path / "run", num_workers=0, num_devices=2)
    assert len(used) == 2 and content["results"][0]["mean"]["num_pairs"] == 9
    with pytest.raises(ValueError, match="devices: found 99, expected 1 to"):
        benchmarks.evaluate(plan, "loftr_tiny", folder=tmp_path / "x", num_devices=99)


class Dense:
    """Stands for DKM: matches every pixel of its input with itself."""

    batch_size = 1

    def match_batch(self, images):
        out = []
        for image0, _ in images:
            y, x = np.mgrid[: image0.shape[0] : 40, : image0.shape[1] : 40]
            kpts = np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)
            size = image0.shape[1], image0.shape[0]
            out.append(Matches(kpts, kpts, np.ones(len(kpts), np.float32), size, size))
        return out

    def describe(self):
        return {"name": "dkm_tiny"}


def test_padding_of_dense_matchers_is_undone_or_released_and_both_are_reported(two_sets, tmp_path, monkeypatch):
    """The canvas of 1240x384 holds an image of 120x80: the released mapping shrinks the canvas to the image."""
    monkeypatch.setattr(benchmarks, "matchers", lambda *_: [Dense])
    seen = []
    monkeypatch.setattr(measure, "MEASURES", {"pose": lambda kpts, *_: seen.append(kpts[0].max(0)) or {}})
    monkeypatch.setattr(zeb, "differs", lambda *_: True)
    plan = benchmarks.zeb_plan(two_sets, "dkm_tiny", ["KIT"], fraction=1.0)
    content, _ = benchmarks.evaluate(plan, "dkm_tiny", folder=tmp_path, num_workers=0)
    assert [r["method"] for r in content["results"]] == ["dkm_tiny", "dkm_tiny, released mapping"]
    assert plan.matcher["size"] == (880, 660) and plan.matcher["aspect"] is None
    got = np.unique(seen, axis=0)  # measured in any order
    np.testing.assert_allclose(got, [[1200.5 * 120 / 1240, 360.5 * 80 / 384], [1200, 360]], rtol=1e-6)


def test_pairs_without_a_baseline_are_left_out_beside(tmp_path, capsys):
    folder = write_set(tmp_path / "data", "NIG", 3)
    path = folder / "s0_0_1.txt"
    path.write_text(line("0 1", T=np.array([[1, 0, 0, 0.02], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])))
    plan = benchmarks.zeb_plan(tmp_path / "data", "rootsift")
    content, _ = benchmarks.evaluate(plan, "rootsift", folder=tmp_path / "run", num_workers=0)
    (record,) = content["results"][0]["sets"]
    errors = dict(zip(record["pairs"]["identifier"], record["pairs"]["error"]))
    kept = [np.inf if e is None else e for name, e in errors.items() if name != "s0#0#1"]
    assert record["num_without_baseline"] == 1
    assert record["auc_with_baseline"]["5"] == pytest.approx(auc5(kept) / 100)


class Identity:
    """Matches a few points with themselves, and refuses images that are white."""

    batch_size = 2

    def match_batch(self, images):
        if any(image.min() == 255 for pair in images for image in pair):
            raise ValueError("image: 20000x20000 px for the network")
        kpts = np.random.default_rng(0).uniform(0, 60, (30, 2)).astype(np.float32)
        return [Matches(kpts, kpts + [3, 0], np.ones(30, np.float32), (64, 64), (64, 64)) for _ in images]


@pytest.fixture
def three_pairs(tmp_path):
    """Pairs of gray images, of which the second has a white one."""
    T = np.eye(4)
    T[0, 3] = 1
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path, value in zip(paths, (90, 91, 255, 93)):
        cv2.imwrite(str(path), np.full((64, 64, 3), value, np.uint8))
    return [Pair("a", "b", paths[0], path, 0, 0, None, K, K, T, 1, "s", path.name) for path in paths[1:]]


def test_a_pair_that_the_matcher_refuses_is_lost_alone(three_pairs, tmp_path):
    done = run.run(three_pairs, {}, [Identity], tmp_path / "run", {}, [Protocol()], num_workers=0)
    assert done.tables[0]["lost"].ravel().tolist() == [False, True, False]
    assert done.reasons == {1: "image: 20000x20000 px for the network"}


def test_a_pair_found_again_is_measured_anew_by_every_protocol(three_pairs, tmp_path, monkeypatch):
    pairs, folder, first, second = three_pairs[:1], tmp_path / "run", Protocol(), Protocol(threshold_px=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_read", lambda *_: ValueError("0.png: cannot be read"))
        assert run.run(pairs, {}, [Identity], folder, {}, [first], num_workers=0).tables[0]["lost"].all()
    for protocol in (second, first):
        done = run.run(pairs, {}, [Identity], folder, {}, [protocol], num_workers=0)
        assert not done.tables[0]["lost"].any() and not done.reasons


def test_a_killed_measuring_process_is_said(three_pairs, tmp_path, monkeypatch):
    class Broken(ThreadPoolExecutor):
        def submit(self, *_):
            raise BrokenProcessPool

    monkeypatch.setattr(run, "_executor", lambda num: Broken(1))
    with pytest.raises(ValueError, match="run: a measuring process was killed"):
        run.run(three_pairs[:1], {}, [Identity], tmp_path / "run", {}, [Protocol()])


def test_a_model_without_a_detector_is_refused(two_sets, tmp_path):
    plan = benchmarks.zeb_plan(two_sets, "lightglue_aliked")
    with pytest.raises(ValueError, match="lightglue_aliked detects no keypoints"):
        benchmarks.evaluate(plan, "lightglue_aliked", folder=tmp_path / "run")
