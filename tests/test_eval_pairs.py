"""Pairs files are read strictly; RootSIFT's table on real pairs equals OpenCV called straight."""

import json

import cv2
import numpy as np
import pytest

from gim_jax import load_matcher
from gim_jax.cli import main
from gim_jax.eval import pairs
from gim_jax.eval.compare import threshold_rows
from gim_jax.eval.document import method_result

K = "100 0 48 0 100 32 0 0 1"
POSE = "1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1"
LINE = f"a.png b.png 0 0 {K} {K} {POSE}"


@pytest.fixture
def folder(tmp_path):
    """Two images of 96x64 of one random wall, shifted by (8, 0) px, and a third one that is another wall."""
    rng = np.random.default_rng(0)
    wall = cv2.resize(rng.integers(0, 255, (40, 80), dtype=np.uint8), (160, 80), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path / "a.png"), wall[:64, 8:104])
    cv2.imwrite(str(tmp_path / "b.png"), wall[:64, :96])
    cv2.imwrite(str(tmp_path / "c.png"), rng.integers(0, 255, (64, 96), dtype=np.uint8))
    return tmp_path


def write(folder, *lines):
    (folder / "pairs.txt").write_text("\n".join(lines) + "\n")
    return folder / "pairs.txt"


def test_reads_every_field(folder):
    T = "0 -1 0 2 1 0 0 3 0 0 1 4 0 0 0 1"
    pair = pairs.read_pairs(write(folder, f"a.png b.png 1 3 110 .5 47 0 120 33 0 0 1 {K} {T}"))[0]
    assert (pair.name0, pair.path1, pair.turns0, pair.turns1, pair.overlap) == ("a.png", folder / "b.png", 1, 3, None)
    np.testing.assert_array_equal(pair.K0, [[110, 0.5, 47], [0, 120, 33], [0, 0, 1]])
    np.testing.assert_array_equal(pair.K1, [[100, 0, 48], [0, 100, 32], [0, 0, 1]])
    np.testing.assert_array_equal(pair.T_0to1, [[0, -1, 0, 2], [1, 0, 0, 3], [0, 0, 1, 4], [0, 0, 0, 1]])


def test_decimal_fractions_in_the_third_column_are_overlaps(folder):
    pair = pairs.read_pairs(write(folder, LINE.replace(" 0 0 100", " 0.25 0.25 100", 1)))[0]
    assert (pair.overlap, pair.turns0, pair.turns1) == (0.25, 0, 0)


def field(index, value):
    tokens = LINE.split()
    tokens[index] = value
    return " ".join(tokens)


@pytest.mark.parametrize(
    "line, message",
    [
        (LINE + " 7", "found 39 tokens, expected 38"),
        ("a.png b.png", "found 2 tokens, expected 38"),
        (field(7, "x"), "token 8: found 'x', expected a number"),
        (field(9, "nan"), "token 10: found nan, expected a finite number"),
        (field(25, "inf"), "token 26: found inf, expected a finite number"),
        (field(2, "4"), "rot0 rot1: found 4 0, expected quarter turns from 0 to 3"),
        (field(2, "1.5"), "found 1.5 0, expected overlaps from 0 to 1"),
        (field(0, "missing.png"), "missing.png: no such file"),
        (field(1, "pairs.txt"), "pairs.txt: not an image"),
        (field(4, "0"), "K0: found focal lengths 0 100, expected positive"),
        (field(17, "-100"), "K1: found focal lengths 100 -100, expected positive"),
        (field(12, "2"), "K0: found .*, expected fx s cx 0 fy cy 0 0 1"),
        (field(6, "130"), "K0: found principal point 130 32 in an image of 96x64"),
        (LINE.replace(f" {K} {POSE}", f" 50 0 24 0 50 16 0 0 1 {POSE}"), "K1: found principal point 24 16"),
        (field(22, "0.9"), "T_0to1: found a matrix that is no rotation"),
        (LINE.replace(POSE, "-1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1"), "no rotation .determinant -1"),
        (field(37, "2"), r"T_0to1: found last row \[0.0, 0.0, 0.0, 2.0\]"),
        (LINE, "the pair stands in line 1 too"),
    ],
)
def test_faults_name_file_and_line(folder, line, message):
    with pytest.raises(ValueError, match=message) as error:
        pairs.read_pairs(write(folder, LINE, "", line))
    assert str(error.value).startswith(f"{folder / 'pairs.txt'}:3: ")


def test_empty_missing_folder_and_binary(folder):
    with pytest.raises(ValueError, match=r"pairs\.txt: found no pair"):
        pairs.read_pairs(write(folder, "", " "))
    with pytest.raises(ValueError, match="no such file"):
        pairs.read_pairs(folder / "none.txt")
    with pytest.raises(ValueError, match="a folder"):
        pairs.read_pairs(folder)
    with pytest.raises(ValueError, match="not a text file"):
        pairs.read_pairs(folder / "a.png")


def test_a_turned_image_gives_the_same_errors(folder):
    """Images stored lying on their side, with the turns that set them upright, are the same pair."""
    turned = "100 0 32 0 100 47 0 0 1"  # of 64x96: cx' = cy, cy' = 95 - cx
    for name in "ab":
        upright = cv2.imread(str(folder / f"{name}.png"))
        cv2.imwrite(str(folder / f"{name}_side.png"), np.rot90(upright, -1))  # one turn to the left sets it upright
    line = LINE.replace("a.png b.png 0 0", "a_side.png b_side.png 1 1").replace(f"{K} {K}", f"{turned} {turned}")
    line = line.replace(POSE, "1 0 0 0 0 1 0 1 0 0 1 0 0 0 0 1")  # x of the upright camera is y of the lying one
    upright = "100 0 48 0 100 32 0 0 1"
    rows = pairs.evaluate_pairs(write(folder, LINE.replace(K, upright), line), load_matcher("rootsift"))["rows"]
    assert rows[0]["num_matches"] == rows[1]["num_matches"] > 30
    assert rows[0]["precision"] > 0.9
    assert rows[1]["precision"] == pytest.approx(rows[0]["precision"], abs=0.02)


def test_lost_pairs_count_as_failures_and_are_said(folder, capsys):
    data = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(data[: len(data) // 2])  # a whole header, half an image
    file = write(folder, LINE, LINE.replace("b.png", "c.png"))
    result = pairs.evaluate_pairs(file, load_matcher("rootsift"))
    assert (result["num_pairs"], result["num_lost"]) == (2, 1)
    assert "c.png" in result["rows"][1]["lost"]
    alone = pairs.evaluate_pairs(write(folder, LINE), load_matcher("rootsift"))
    assert result["auc"]["20"] == pytest.approx(alone["auc"]["20"] / 2, abs=0.03)  # the failed half adds nothing
    write(folder, LINE, LINE.replace("b.png", "c.png"))
    assert main(["eval", "--pairs", str(file)]) == 1
    printed = capsys.readouterr()
    assert "lost a.png c.png" in printed.err and "1 pairs were lost" in printed.out


def test_a_pair_without_matches_is_a_failure_not_a_crash(folder):
    cv2.imwrite(str(folder / "b.png"), np.zeros((64, 96), np.uint8))
    result = pairs.evaluate_pairs(write(folder, LINE), load_matcher("rootsift"))
    assert result["num_failures"] == 1 and result["auc"] == {"5": 0, "10": 0, "20": 0}
    json.dumps(result, allow_nan=False)


def test_command_writes_json_and_prints_percent(folder, capsys):
    file = write(folder, LINE)
    assert main(["eval", "--pairs", str(file), "--json", str(folder / "out.json")]) == 0
    content = json.loads((folder / "out.json").read_text())
    (record,) = content["results"][0]["sets"]
    assert record["pairs"]["identifier"] == ["a.png#b.png"] and content["versions"]["numpy"] == np.__version__
    assert f"{100 * record['auc']['5']:.2f}" in capsys.readouterr().out


def test_configuration_says_what_the_options_say(folder):
    file = write(folder, LINE)
    outputs = [str(folder / name) for name in ("a.json", "b.json")]
    options = ["--pairs", str(file), "--threshold", "0.4", "--long-side", "80", "--set", "ratio=0.7"]
    assert main(["eval", *options, "--json", outputs[0]]) == 0
    settings = [f"--config.pairs=('{file}',)", "--config.threshold=0.4", "--config.long_side=80"]
    settings.append("--config.set=('ratio=0.7',)")
    assert main(["eval", "--config", "configs/eval.py:pairs", *settings, "--json", outputs[1]]) == 0
    one, two = ([{k: v for k, v in result.items() if k != "seconds"} for result in json.load(open(path))["results"]]
                for path in outputs)  # fmt: skip
    assert one == two and one[0]["settings"]["protocol"]["threshold_px"] == 0.4
    assert one[0]["settings"]["model"]["settings"]["ratio"] == 0.7


def test_mean_row_is_the_plain_mean_of_sets():
    one = {"set": "s", "num_pairs": 10, "auc": {"5": 0.2}, "num_failures": 1, "num_lost": 0}
    result = method_result("m", None, [one, {**one, "set": "u", "num_pairs": 90, "auc": {"5": 0.4}}])
    assert threshold_rows("pairs", [result])[-1] == ("> m", "mean of sets", "100", "", "0", "30.00")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--benchmark", "zeb", "--pairs", "x"], "--pairs: is of pairs, found --benchmark=zeb"),
        (["--pairs", "PAIRS", "--sets", "KIT"], "--sets: is of zeb, found --benchmark=pairs"),
        (["--pairs", "PAIRS", "--thresh", "1"], "unknown arguments: --thresh"),
        (["--pairs", "PAIRS", "--set", "ratioo=0.8"], "ratioo"),
        (["--benchmark", "foo"], "foo is unknown"),
        ([], "found no file"),
        (["--pairs", "/none.txt"], "no such file"),
        (["--pairs", "PAIRS", "--model", "nope"], "model: found 'nope', expected one of rootsift"),
        (["--pairs", "PAIRS", "--model", "loftr_tiny"], "weights: loftr_tiny needs some"),
        (["--pairs", "PAIRS", "--method", "lmeds"], "found 'lmeds', expected one of ransac"),
        (["--pairs", "PAIRS", "--json", "/no/such/folder/x.json"], "does not exist"),
        (
            ["--config", "configs/eval.py:pairs", "--pairs", "PAIRS"],
            "--pairs: given beside --config, expected --config.p",
        ),
        (["--config", "configs/eval.py:zeb,rootsift"], "--data: found none, expected the folder of zeb"),
        (["--config", "configs/eval.py", "--config.modle=x"], "modle"),
        (["--pairs", "PAIRS", "--moddel", "x"], "unknown arguments: --moddel"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_two(folder, capsys, arguments, message):
    file = str(write(folder, LINE))
    assert main(["eval", *[file if a == "PAIRS" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def straight_opencv_errors(folder, max_lines):
    """The published recipe, written with OpenCV and NumPy alone."""
    errors = []
    for line in (folder / "pairs_with_gt.txt").read_text().splitlines()[:max_lines]:
        tokens = line.split()
        K0, K1 = (np.array(tokens[a : a + 9], float).reshape(3, 3) for a in (4, 13))
        T = np.array(tokens[22:], float).reshape(4, 4)
        points, descriptors = [], []
        for name in tokens[:2]:
            gray = cv2.cvtColor(cv2.imread(str(folder / name)), cv2.COLOR_BGR2GRAY)
            sift = cv2.SIFT_create(nfeatures=gray.size // 64, contrastThreshold=1e-5)
            keypoints, desc = sift.detectAndCompute(gray, None)
            points.append(np.array([k.pt for k in keypoints]))
            descriptors.append(np.sqrt(desc / desc.sum(1, keepdims=True)))
        matcher = cv2.BFMatcher(cv2.NORM_L2)
        back = {m.queryIdx: m.trainIdx for m in matcher.match(descriptors[1], descriptors[0])}
        good = [
            first
            for first, second in matcher.knnMatch(*descriptors, k=2)
            if first.distance < 0.8 * second.distance and back[first.trainIdx] == first.queryIdx
        ]
        p0 = points[0][[m.queryIdx for m in good]]
        p1 = points[1][[m.trainIdx for m in good]]
        p0 = (p0 - K0[:2, 2]) / [K0[0, 0], K0[1, 1]]
        p1 = (p1 - K1[:2, 2]) / [K1[0, 0], K1[1, 1]]
        threshold = 0.5 / np.mean([K0[0, 0], K1[1, 1], K0[0, 0], K1[1, 1]])
        E, mask = cv2.findEssentialMat(p0, p1, np.eye(3), method=cv2.RANSAC, prob=0.99999, threshold=threshold)
        best = max((cv2.recoverPose(e, p0, p1, np.eye(3), 1e9, mask=mask)[:3] for e in np.vsplit(E, len(E) // 3)),
                   key=lambda result: result[0])  # fmt: skip
        _, R, t = best
        R_error = np.degrees(np.linalg.norm(cv2.Rodrigues(R.T @ T[:3, :3])[0]))
        cosine = t[:, 0] @ T[:3, 3] / np.linalg.norm(T[:3, 3])
        errors.append(max(R_error, np.degrees(np.arccos(min(abs(cosine), 1)))))
    return np.array(errors)


@pytest.mark.parametrize(
    "name, num", [("hololens_dvmvs", 8), pytest.param("kitti_vslampy_seq1", 3, marks=pytest.mark.slow)]
)
def test_rootsift_equals_straight_opencv_on_real_pairs(shared, tmp_path, name, num):
    folder = shared / "data" / name
    lines = (folder / "pairs_with_gt.txt").read_text().splitlines()[:num]
    (tmp_path / "images").symlink_to(folder / "images")
    (tmp_path / "pairs_with_gt.txt").write_text("\n".join(lines))
    result = pairs.evaluate_pairs(tmp_path / "pairs_with_gt.txt", load_matcher("rootsift"))
    want = straight_opencv_errors(folder, num)
    np.testing.assert_allclose([row["error_deg"] for row in result["rows"]], want, atol=1e-3)
    hits = np.sort(want)[np.sort(want) < 5]
    # trapezoids of the recall curve, by hand
    curve = np.concatenate([[0], hits, [5]])
    recall = np.concatenate([np.arange(len(hits) + 1), [len(hits)]]) / num
    assert result["auc"]["5"] == pytest.approx(np.sum(np.diff(curve) * (recall[1:] + recall[:-1]) / 2) / 5, abs=1e-4)
