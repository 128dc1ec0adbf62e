"""Other tools accept what we give them."""

import sys
from types import ModuleType

import numpy as np
import pytest

from gim_jax.tasks import inloc, interop
from gim_jax.types import Matches
from tests import oracles


def picture() -> np.ndarray:
    coarse = np.random.default_rng(0).random((3, 30, 40))
    return coarse.repeat(6, 1).repeat(6, 2).astype(np.float32)


class Tensor:
    """What the class uses of a tensor."""

    def __init__(self, array):
        self.array = array

    def cpu(self):
        return self.array


def test_vismatch_class_returns_the_seven_values_of_the_contract(monkeypatch):
    package, base = ModuleType("vismatch"), ModuleType("vismatch.base_matcher")

    class BaseMatcher:
        def __init__(self, device="cpu", **kwargs):
            self.kwargs = kwargs

    base.BaseMatcher = BaseMatcher
    monkeypatch.setitem(sys.modules, "vismatch", package)
    monkeypatch.setitem(sys.modules, "vismatch.base_matcher", base)
    matcher = interop.vismatch_matcher("rootsift", max_keypoints=500, ransac_iters=7)
    image = picture()
    kpts0, kpts1, *features, conf = matcher._forward(Tensor(image), Tensor(image[:, 12:, 18:]))
    assert features == [None] * 4 and len(kpts0) == len(kpts1) == len(conf) > 20
    np.testing.assert_allclose(np.median(kpts0 - kpts1, axis=0), [18, 12], atol=0.1)
    assert matcher.kwargs == {"ransac_iters": 7} and matcher.matcher.settings.max_keypoints == 500


def test_vismatch_itself_accepts_the_class():
    oracles.torch()  # with the operators that vismatch's torchvision looks for
    pytest.importorskip("vismatch.base_matcher")  # the reason names the package that is missing
    image = picture()
    result = interop.vismatch_matcher("rootsift")(image, np.ascontiguousarray(image[:, 12:, 18:]))
    np.testing.assert_allclose(result["H"], [[1, 0, -18], [0, 1, -12], [0, 0, 1]], atol=0.05)
    assert result["num_inliers"] > 20 and len(result["matched_confidences"]) == len(result["matched_kpts0"])


def test_missing_vismatch_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "vismatch.base_matcher", None)
    with pytest.raises(ValueError, match=r"^vismatch is not installed: pip install vismatch$"):
        interop.vismatch_matcher()


def test_table_has_a_row_per_match():
    pytest.importorskip("pandas", reason="pandas is not installed")
    kpts = np.array([[1.0, 2], [3, 4]], np.float32)
    inliers = np.array([True, False])
    matches = Matches(kpts, kpts + 10, np.array([0.5, 0.25], np.float32), (9, 9), (9, 9), inliers=inliers)
    table = interop.to_pandas(matches)
    assert list(table.columns) == ["x0", "y0", "x1", "y1", "conf", "inlier"]
    assert table.iloc[1].tolist() == [3, 4, 13, 14, 0.25, False]


def test_scan_is_read_between_pixels_and_nearest_at_gaps():
    y, x = np.mgrid[:4, :5]
    scan = np.stack([x * 2.0, y * 3.0, x + y], -1)
    scan[0, 0] = np.nan
    points, valid = inloc.interpolate_scan(scan, np.array([[2.5, 1.25], [0.6, 0.6], [0.2, 0.2], [4, 3], [4.2, 1]]))
    np.testing.assert_allclose(points[[0, 1, 3]], [[5, 3.75, 3.75], [2, 3, 2], [8, 9, 7]])
    np.testing.assert_array_equal(valid, [True, True, False, True, False])


def test_inloc_finds_a_camera_among_scans(tmp_path):
    pytest.importorskip("pycolmap", reason="pycolmap is not installed: pip install 'gim-jax[sfm]'")
    from types import SimpleNamespace

    from scipy.io import savemat

    from gim_jax.image import encode_jpeg

    query, name = "query/iphone7/q.JPG", "database/cutouts/DUC1/024/DUC_cutout_024_0_0.jpg"
    for path, size in ((query, (3024, 4032)), (name, (120, 160))):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(encode_jpeg(np.zeros((*size, 3), np.uint8), 50))
    y, x = np.mgrid[:120, :160]
    scan = np.stack([x / 40, y / 40, 5 + np.sin(x / 9) + np.cos(y / 7)], -1)
    savemat(tmp_path / f"{name}.mat", {"XYZcut": scan})
    folder = tmp_path / "database/alignments/DUC1/transformations"
    folder.mkdir(parents=True)
    shift = np.array([10.0, 20, 30])
    rows = [" ".join(map(str, [*np.eye(3)[i], shift[i]])) for i in range(3)] + ["0 0 0 1"]
    (folder / "DUC_trans_024.txt").write_text("\n".join(["-"] * 7 + rows))

    class Oracle:
        info = SimpleNamespace(family="dkm")

        def describe(self):
            return {}

        def match_pairs(self, sources):
            rng = np.random.default_rng(0)
            kpts1 = rng.uniform([1, 1], [158, 118], (200, 2)).round()
            world = scan[kpts1[:, 1].astype(int), kpts1[:, 0].astype(int)] + shift
            seen = world - shift - [2.0, 1.5, 0]  # the camera looks along z from (12, 21.5, 30)
            kpts0 = inloc.FOCAL_PX * seen[:, :2] / seen[:, 2:] + [2016, 1512]
            yield Matches(kpts0.astype(np.float32), kpts1.astype(np.float32), np.ones(200), (1, 1), (1, 1))

    found = inloc.localize(tmp_path, {query: [name]}, Oracle())[query]
    assert found.num_inliers == 200
    np.testing.assert_allclose(found.cam_from_world[:3, :3], np.eye(3), atol=1e-4)
    np.testing.assert_allclose(found.cam_from_world[:3, 3], [-12, -21.5, -30], atol=1e-3)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "text"])
def test_a_damaged_scan_is_named(tmp_path, damage):
    from scipy.io import savemat

    name = "database/cutouts/DUC1/024/DUC_cutout_024_0_0.jpg"
    path = tmp_path / f"{name}.mat"
    path.parent.mkdir(parents=True)
    savemat(path, {"XYZcut": np.random.default_rng(0).normal(size=(20, 30, 3))}, do_compression=True)
    data = path.read_bytes()
    changed = data[:160] + bytes(100) + data[260:]
    path.write_bytes({"empty": b"", "cut": data[:200], "changed": changed, "text": b"404: Not Found" * 20}[damage])
    with pytest.raises(ValueError, match=r"024_0_0\.jpg\.mat: found no scan XYZcut: .+"):
        inloc.scan_points(tmp_path, name, np.ones((1, 2)))
