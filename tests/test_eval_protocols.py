"""MegaDepth-1500, ScanNet-1500 and HPatches: published layouts, and each family's protocol, computed by hand."""

import pickle
from dataclasses import replace

import cv2
import numpy as np
import pytest

from gim_jax.cli import main
from gim_jax.eval import benchmarks, hpatches, in_domain, measure, published
from gim_jax.image import target_size
from gim_jax.matchers import Preset
from gim_jax.models import MODELS
from gim_jax.types import Matches

K0 = np.array([[500.0, 0, 400], [0, 900, 300], [0, 0, 1]])  # so uneven that every mean is another one
K1 = np.array([[900.0, 0, 310], [0, 500, 415], [0, 0, 1]])
SIZES = ((800, 600), (620, 830))


def pose(angle, t):
    T = np.eye(4)
    T[:3, :3] = cv2.Rodrigues(np.array([0.1, 1, 0.05]) * np.radians(angle))[0]
    T[:3, 3] = t
    return T


T = pose(8, [0.5, 0.1, 0.2])


def points(rng, num=400, noise=0.5):
    """Pixels of the stored images, noisy, a fifth of them wrong."""
    X0 = rng.uniform([-2, -1.5, 5], [2, 1.5, 9], (num, 3))
    X1 = X0 @ T[:3, :3].T + T[:3, 3]
    p0, p1 = (X0 @ K0.T)[:, :2] / X0[:, 2:], (X1 @ K1.T)[:, :2] / X1[:, 2:]
    p1 = p1 + noise * rng.normal(size=p1.shape)
    p1[: num // 5] = rng.uniform(0, 600, (num // 5, 2))
    return p0, p1


def angles(p0, p1, K0, K1, threshold):
    """Errors (R, t) in degrees and the number of inliers by OpenCV straight, p in the pixels of K."""
    rays = [(p - K[:2, 2]) / [K[0, 0], K[1, 1]] for p, K in ((p0, K0), (p1, K1))]
    E, mask = cv2.findEssentialMat(*rays, np.eye(3), cv2.RANSAC, 0.99999, threshold)
    num = int(mask.sum())
    _, R, t, _ = cv2.recoverPose(E, *rays, np.eye(3), 1e9, mask=mask)
    R_error = np.degrees(np.arccos(np.clip((np.trace(R.T @ T[:3, :3]) - 1) / 2, -1, 1)))
    cosine = abs(t[:, 0] @ T[:3, 3]) / np.linalg.norm(T[:3, 3])
    return R_error, np.degrees(np.arccos(min(cosine, 1))), num


def check(got, want, atol=1e-5):
    """The first repeat of the first pair has these errors and as many inliers."""
    R_error, t_error, num = want
    np.testing.assert_allclose([got["R_error_deg"][0, 0], got["t_error_deg"][0, 0]], [R_error, t_error], atol=atol)
    assert abs(got["num_inliers"][0, 0] - num) <= 2  # a point on the threshold may fall either way


def pair(**kwargs):
    return measure.Pair("a", "b", "a", "b", 0, 0, None, K0, K1, T, 1, **kwargs)


def measured(protocol, fed, sizes, dense, one=None):
    """Run a chunk of one pair through files, as a worker does."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "m.npz", Path(folder) / "o.npz"
        conf = np.linspace(1, 0, len(fed[0]), dtype=np.float32)
        arrays = {"kpts0": fed[0].astype(np.float32), "kpts1": fed[1].astype(np.float32), "conf": conf}
        arrays |= {"num_matches": np.array([len(conf)]), "lost": np.array([False]), "sizes": np.array([sizes])}
        measure.write_chunk(path, arrays)
        measure.measure_chunk(str(path), [one or pair()], protocol, dense, str(out))
        return measure.read_chunk(out)


def fed_by(feed, p, size):
    """The points as the matcher returns them on the fed image, and the sizes."""
    _, sizes = feed(np.zeros((size[1], size[0], 3), np.uint8))
    return (p + 0.5) * np.divide(sizes[1], size) - 0.5, sizes


def fed_points(table, name, seed=0):
    feed, _, protocol = table[name]
    p = points(np.random.default_rng(seed))
    fed = [fed_by(feed, q, size) for q, size in zip(p, SIZES)]
    return [f for f, _ in fed], [s for _, s in fed], protocol


def test_megadepth_by_loftr():
    """Long side 840, floored to eights, points multiplied back, original K, 0.5 px over mean(fx0, fy1)."""
    fed, sizes, protocol = fed_points(in_domain.MEGADEPTH, "loftr")
    assert sizes[0][1] == (840, 624) and sizes[1][1] == (624, 840)
    got = measured(protocol, fed, sizes, dense=False)
    p = [f.astype(np.float32) * np.divide(size, s[1]) for f, size, s in zip(fed, SIZES, sizes)]
    want = angles(*p, K0, K1, 0.5 / np.mean([500, 500]))
    check(got, want)
    assert got["error"].shape == (1, 1) and got["error"][0, 0] == pytest.approx(max(want[:2]), abs=1e-5)


def test_megadepth_by_dkm():
    """K and corner coordinates scaled to a long side of 1200, threshold over the mean of all focal lengths, five
    shuffles."""
    fed, sizes, protocol = fed_points(in_domain.MEGADEPTH, "dkm")
    got = measured(protocol, fed, sizes, dense=True)
    assert got["error"].shape == (1, 5) and len(np.unique(got["error"])) > 1
    scales = [1200 / max(size) for size in SIZES]
    scaled = [np.diag([s, s, 1]) @ K for s, K in zip(scales, (K0, K1))]
    p = [(f.astype(np.float32).astype(float) + 0.5) * s for f, s in zip(fed, scales)]
    mean = [np.abs(K[:2, :2]).mean() for K in scaled]  # over four entries, two of them zero
    order = np.random.default_rng([0, len(p[0])]).permutation(len(p[0]))
    want = angles(p[0][order], p[1][order], *scaled, 0.5 / sum(mean))
    check(got, want)


def test_megadepth_by_superglue():
    """Long side 1600, 0.5 px of the resized images; K scaled plainly."""
    fed, sizes, protocol = fed_points(in_domain.MEGADEPTH, "superglue")
    got = measured(protocol, fed, sizes, dense=False)
    ratio = [np.divide(s[1], size) for size, s in zip(SIZES, sizes)]
    scaled = [np.diag([*r, 1]) @ K for r, K in zip(ratio, (K0, K1))]
    want = angles(
        *[f.astype(np.float32).astype(float) for f in fed], *scaled, 0.5 / np.mean([scaled[0][0, 0], scaled[1][1, 1]])
    )
    check(got, want, 2e-3)


@pytest.mark.parametrize("name, px", [("loftr", 0.5), ("superglue", 1.0)])
def test_scannet_at_640x480(name, px):
    fed, sizes, protocol = fed_points(in_domain.SCANNET, name)
    assert sizes[0][1] == sizes[1][1] == (640, 480)
    got = measured(protocol, fed, sizes, dense=False)
    scaled = [np.diag([640 / w, 480 / h, 1]) @ K for (w, h), K in zip(SIZES, (K0, K1))]
    threshold = px / np.mean([scaled[0][0, 0], scaled[1][1, 1]])
    want = angles(*[f.astype(np.float32).astype(float) for f in fed], *scaled, threshold)
    check(got, want)


def test_scannet_by_dkm():
    """Short side 480, half a pixel off the corner coordinates there."""
    fed, sizes, protocol = fed_points(in_domain.SCANNET, "dkm")
    got = measured(protocol, fed, sizes, dense=True)
    scales = [480 / min(size) for size in SIZES]
    scaled = [np.diag([s, s, 1]) @ K for s, K in zip(scales, (K0, K1))]
    p = [(f.astype(np.float32).astype(float) + 0.5) * s - 0.5 for f, s in zip(fed, scales)]
    order = np.random.default_rng([0, len(p[0])]).permutation(len(p[0]))
    focal = sum(np.abs(K[:2, :2]).mean() for K in scaled)
    want = angles(p[0][order], p[1][order], *scaled, 0.5 / focal)
    check(got, want)


H = np.array([[1.1, 0.05, 12], [-0.04, 0.95, 7], [1e-5, 2e-5, 1]])


def homography_points(noise):
    rng = np.random.default_rng(1)
    p0 = rng.uniform(0, 580, (1500, 2)).astype(np.float32)
    p1 = cv2.perspectiveTransform(p0[None], H)[0] + noise * rng.normal(size=p0.shape)
    p1[1024:] = rng.uniform(0, 600, (476, 2))  # the least confident are all wrong
    return p0, p1.astype(np.float32)


def corner_error(found, true, size):
    w, h = size[0] - 1, size[1] - 1
    corners = np.array([[[0, 0], [0, h], [w, h], [w, 0]]], float)
    moved = [cv2.perspectiveTransform(corners, M)[0] for M in (found, true)]
    return np.linalg.norm(moved[0] - moved[1], axis=1).mean()


def test_homography_by_dkm():
    p = homography_points(1.0)
    protocol = hpatches.HPATCHES["dkm"][2]
    got = measured(protocol, p, [[s, s, s] for s in SIZES], True, pair(H=H))
    unit = 620 / 480
    found, mask = cv2.findHomography(*[q.astype(float) for q in p], cv2.RANSAC, 3 * unit, confidence=0.99999)
    assert got["error"][0, 0] == pytest.approx(corner_error(found, H, SIZES[0]) / unit, rel=1e-9)
    assert got["num_inliers"][0, 0] == mask.sum()


def test_homography_by_loftr():
    """Short side 480, at most 1024 matches, 3 px and the errors there, OpenCV's default confidence."""
    feed, _, protocol = hpatches.HPATCHES["loftr"]
    p = homography_points(1.0)
    fed = [fed_by(feed, q, size) for q, size in zip(p, SIZES)]
    assert [s[1] for _, s in fed] == [(640, 480), (480, 643)]
    got = measured(protocol, [f for f, _ in fed], [s for _, s in fed], False, pair(H=H))
    q = [f.astype(np.float32)[:1024].astype(float) for f, _ in fed]
    found, _ = cv2.findHomography(*q, cv2.RANSAC, 3, confidence=0.995)
    resize = []
    for _, (stored, resized, _) in fed:
        (a, b) = np.divide(resized, stored)
        resize.append(np.array([[a, 0, (a - 1) / 2], [0, b, (b - 1) / 2], [0, 0, 1]]))
    true = resize[1] @ H @ np.linalg.inv(resize[0])
    assert got["error"][0, 0] == pytest.approx(corner_error(found, true, (640, 480)), abs=1e-4)
    assert got["num_matches"][0, 0] == 1024


def test_no_homography_sends_every_corner_to_the_origin():
    none = np.zeros((0, 2), np.float32)
    got = measured(hpatches.HPATCHES["dkm"][2], (none, none), [[s, s, s] for s in SIZES], True, pair(H=np.eye(3)))
    corners = np.array([[0, 0], [0, 599], [799, 0], [799, 599]])
    assert got["error"][0, 0] == pytest.approx(np.linalg.norm(corners, axis=1).mean() / (620 / 480))


def write_megadepth(root, num=2):
    """The published layout: five pickled dictionaries, images below Undistorted_SfM."""
    folder = root / "megadepth_test_1500_scene_info"
    folder.mkdir(parents=True)
    for name in in_domain.MEGADEPTH_FILES:
        images = root / "Undistorted_SfM" / name[:4] / "images"
        images.mkdir(parents=True, exist_ok=True)
        paths, Ks, poses = (np.empty(num + 2, object) for _ in range(3))
        for i in range(num + 1):
            stem = f"{name[:-4]}_{i}.jpg"
            cv2.imwrite(str(images / stem), np.full((60, 80, 3), 128, np.uint8))
            paths[i] = f"Undistorted_SfM/{name[:4]}/images/{stem}"
            Ks[i] = np.array([[70.0, 0, 40], [0, 70, 30], [0, 0, 1]])
            poses[i] = pose(10 * i, [i, 0, 0.5])
        infos = [([i, i + 1], 0.1 * (i + 1), np.zeros((4, 2))) for i in range(num)]
        content = {"image_paths": paths, "depth_paths": paths, "intrinsics": Ks, "poses": poses, "pair_infos": infos}
        (folder / name).write_bytes(pickle.dumps(content, 4))
    return folder


def test_reads_megadepth(tmp_path):
    folder = write_megadepth(tmp_path)
    found = in_domain.read_megadepth(tmp_path)
    assert len(found) == 10 and found[3].overlap == pytest.approx(0.2)
    assert found[0].identifier == "0015#0015_0.1_0.3_0.jpg#0015_0.1_0.3_1.jpg"
    np.testing.assert_allclose(
        found[1].T_0to1, pose(20, [2, 0, 0.5]) @ np.linalg.inv(pose(10, [1, 0, 0.5])), atol=1e-12
    )
    path = folder / in_domain.MEGADEPTH_FILES[1]
    content = pickle.loads(path.read_bytes())
    for change, message in (
        ({"poses": None}, "without|pair 0: "),
        ({"pair_infos": [([0, 99], 0.1, None)]}, "pair 0: .*out of bounds"),
        ({"pair_infos": [([0, 3], 0.1, None)]}, "pair 0: "),
        ({"pair_infos": content["pair_infos"] * 2}, r"pair 2: .* stands in .*pair 0 too"),
    ):
        path.write_bytes(pickle.dumps({**content, **change}, 4))
        with pytest.raises(ValueError, match=message) as error:
            in_domain.read_megadepth(tmp_path)
        assert str(error.value).startswith(str(path))
    content["image_paths"][0] = "../../etc/passwd"
    path.write_bytes(pickle.dumps(content, 4))
    with pytest.raises(ValueError, match="expected a path below"):
        in_domain.read_megadepth(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"found no 0015_0\.3_0\.5\.npz"):
        in_domain.read_megadepth(tmp_path)


@pytest.mark.parametrize("place", in_domain.SCANNET_IMAGES)
def test_reads_scannet(tmp_path, place):
    frames = [15, 300, 585]
    for frame in frames:
        path = tmp_path / place.format(scene="scene0707_00", frame=frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((968, 1296, 3), 128, np.uint8))
    name = np.array([[707, 0, 15, 585], [707, 0, 300, 585]], np.uint16)
    np.savez(tmp_path / "test.npz", name=name, rel_pose=np.stack([T[:3].ravel()] * 2).astype(np.float32))
    K = np.array([[577.0, 0, 318.9], [0, 578.7, 242.7], [0, 0, 1]])
    np.savez(tmp_path / "intrinsics.npz", scene0707_00=K)
    found = in_domain.read_scannet(tmp_path)
    assert [p.identifier for p in found] == ["scene0707_00#15#585", "scene0707_00#300#585"]
    np.testing.assert_allclose(found[0].K0, np.diag([1296 / 640, 968 / 480, 1]) @ K)
    np.testing.assert_allclose(found[0].T_0to1, T, atol=1e-6)
    name[1] = name[0]
    np.savez(tmp_path / "test.npz", name=name, rel_pose=np.zeros((2, 12), np.float32))
    with pytest.raises(ValueError, match=r"test\.npz: pair 0: T_0to1: found a matrix that is no rotation"):
        in_domain.read_scannet(tmp_path)
    np.savez(tmp_path / "test.npz", name=name + 1, rel_pose=np.zeros((2, 12), np.float32))
    with pytest.raises(ValueError, match=r"pair 0: intrinsics\.npz has no scene0708_01"):
        in_domain.read_scannet(tmp_path)


def write_hpatches(root, names, H=None):
    image = cv2.imencode(".ppm", np.full((30, 40, 3), 99, np.uint8))[1]
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(1, 7):
            (root / name / f"{k}.ppm").write_bytes(image.tobytes())
            np.savetxt(root / name / f"H_1_{k}", np.eye(3) if H is None else H)


def test_hpatches_has_540_pairs_without_the_eight(tmp_path):
    i_names = [name for name in hpatches.LEFT_OUT if name[0] == "i"] + [f"i_{k}" for k in range(52)]
    v_names = [name for name in hpatches.LEFT_OUT if name[0] == "v"] + [f"v_{k}" for k in range(56)]
    write_hpatches(tmp_path / "hpatches-sequences-release", i_names + v_names)
    found = hpatches.read_hpatches(tmp_path)
    assert len(found) == hpatches.NUM_PAIRS and len(i_names + v_names) == 116
    assert not {p.identifier.split("#")[0] for p in found} & set(hpatches.LEFT_OUT)
    bad = tmp_path / "hpatches-sequences-release" / "v_3" / "H_1_4"
    for text in ("1 2 3", "1 0 0 0 1 0 0 0 nan", "x", "1 0 0 0 1 0 0 0 0"):
        bad.write_text(text)
        with pytest.raises(ValueError) as error:
            hpatches.read_hpatches(tmp_path)
        assert str(error.value).startswith(str(bad))


class Oracle:
    """Matches by the true homography."""

    batch_size = 1

    def match_batch(self, images):
        p0 = np.stack(np.meshgrid(np.arange(0, 40.0, 3), np.arange(0, 30.0, 3)), -1).reshape(-1, 2)
        p1 = cv2.perspectiveTransform(p0[None], np.diag([0.9, 0.8, 1.0]))[0]
        one = np.ones(len(p0), np.float32)
        return [Matches(p0.astype(np.float32), p1.astype(np.float32), one, (40, 30), (40, 30)) for _ in images]

    def describe(self):
        return {"name": "rootsift"}


def test_hpatches_end_to_end(tmp_path, monkeypatch, capsys):
    write_hpatches(tmp_path / "data", ["i_a"], np.diag([0.9, 0.8, 1.0]))
    monkeypatch.setattr(benchmarks, "matchers", lambda *_: [Oracle])
    plan = benchmarks.preset_plan("hpatches", tmp_path / "data", "rootsift", "dkm")
    plan = replace(plan, feeds={})
    content, _ = benchmarks.evaluate(plan, "rootsift", folder=tmp_path / "run", num_workers=0)
    (result,) = content["results"]
    assert result["sets"][0]["num_pairs"] == 5 and result["sets"][0]["auc"]["3"] > 0.999
    assert result["notes"] == ["HPatches: 5 pairs, the released set has 540"]
    monkeypatch.undo()
    arguments = ["eval", "--benchmark=hpatches", "--data", str(tmp_path / "data"), "--workers=0"]
    assert main([*arguments, "--protocol=foo"]) == 2
    assert "protocol: found 'foo', expected one of dkm, loftr" in capsys.readouterr().err
    assert main(arguments) == 1  # gray images: no matches
    printed = capsys.readouterr().out
    assert f"{published.HPATCHES['GIM_DKM']['5']:.1f}" in printed and "0.00*" in printed


def test_superglue_list_of_scannet(shared, tmp_path):
    source = shared / "data" / "scannet_superglue"
    (tmp_path / "images").symlink_to(source / "images")
    (tmp_path / in_domain.SUPERGLUE_LIST).write_text((source / "pairs_with_gt.txt").read_text())
    plan = benchmarks.preset_plan("scannet1500", tmp_path, "superglue_indoor")
    assert {p.set for p in plan.pairs} == {"ScanNet-1500"} and plan.protocols[0].threshold_px == 1.0
    assert plan.feeds["ScanNet-1500"].resize == (("exact", (640, 480)),)


def test_dkm_runs_at_the_sizes_of_each_protocol(tmp_path):
    write_hpatches(tmp_path, ["i_a"])
    plan = benchmarks.preset_plan("hpatches", tmp_path, "dkm_outdoor")
    assert plan.matcher["size"] == (720, 540) and plan.matcher["upsample_size"] is None
    assert in_domain.MEGADEPTH["dkm"][1] == {"size": (880, 660), "upsample_size": (1536, 1152)}
    assert in_domain.SCANNET["dkm"][1] == {"size": (640, 480), "upsample_size": None}


@pytest.mark.parametrize(
    "model",
    ["gim_lightglue", "gim_superglue", "superglue_open", "superglue_rootsift", "superglue_outdoor"]
    + ["lightglue_superpoint", "lightglue_disk"],
)
def test_networks_work_at_the_size_of_the_protocol(monkeypatch, model):
    """Long side 1600, enlarged as well: 1024x683 px become 1600x1067, whatever the model's own rule says."""
    _, *rest = benchmarks.PRESETS["megadepth1500"]
    monkeypatch.setitem(benchmarks.PRESETS, "megadepth1500", (lambda root: [], *rest))
    plan = benchmarks.preset_plan("megadepth1500", "data", model)
    info = MODELS[model]
    fields = {**vars(Preset(**info.resize)), **plan.matcher}
    assert target_size((1024, 683), **Preset(**fields).resize) == (1600, 1067)
    _, sizes = plan.feeds["MegaDepth-1500"](np.zeros((683, 1024, 3), np.uint8))
    assert sizes[1] == (1600, 1067)
