"""ZEB built anew: overlaps in closed form, pairs per bin as released, and each source on a miniature of its layout."""

import struct

import cv2
import numpy as np
import pytest

from data_prep import zeb, zeb_sources
from data_prep.zeb import Frame
from gim_jax.eval import zeb as released
from gim_jax.eval.pairs import read_pairs

D = 4.0  # depth of the wall z = D, in metres


def at(x, z=0.0):
    """World to camera of a camera at (x, 0, z) that looks along z."""
    T = np.eye(4)
    T[:3, 3] = [-x, 0, -z]
    return T


def wall_frames(xs, size=(320, 240), f=160.0, depth=D):
    K = np.array([[f, 0, (size[0] - 1) / 2], [0, f, (size[1] - 1) / 2], [0, 0, 1]])
    image = lambda: np.full((size[1], size[0], 3), 128, np.uint8)  # noqa: E731
    return [
        Frame(f"f{i}", image, K, at(x), lambda: np.full((60, 80), depth, np.float32), size) for i, x in enumerate(xs)
    ]


def test_overlap_of_a_wall_is_the_shift_in_closed_form():
    """A camera that moves by x sees a wall at depth D shifted by x f / D of its width."""
    frames = wall_frames([0, 0.4, 2.0, 9.0])
    pairs = np.array([[0, 1], [0, 2], [1, 2], [0, 3]])
    want = [1 - x * 160 / D / 320 for x in (0.4, 2.0, 1.6)]
    np.testing.assert_allclose(zeb.scene_overlaps(frames, pairs), [*want, 0], atol=0.008)  # one column is 0.006


def test_overlap_counts_neither_hidden_points_nor_those_behind():
    near, far = wall_frames([0, 0]), wall_frames([0, 0], depth=D / 2)
    np.testing.assert_allclose(zeb.scene_overlaps([near[0], far[1]], np.array([[0, 1]])), [0])
    turned = np.diag([-1.0, 1, -1, 1])
    behind = Frame("b", near[0].image, near[0].K, turned, near[0].depth, near[0].size)
    np.testing.assert_allclose(zeb.scene_overlaps([near[0], behind], np.array([[0, 1]])), [0])


def test_overlap_is_the_smaller_share():
    zoomed = wall_frames([0], f=320.0)[0]  # sees a quarter of what the other one does
    both = zeb.scene_overlaps([wall_frames([0])[0], zoomed], np.array([[0, 1], [1, 0]]))
    np.testing.assert_allclose(both, [0.25, 0.25], atol=0.01)


def test_sparse_depth_counts_what_arrives_where_nothing_is_known():
    def lines(offset):
        depth = np.zeros((120, 160), np.float32)
        depth[offset::10] = D
        return lambda: depth

    frames = [Frame("a", f.image, f.K, f.T, lines(i), f.size) for i, f in enumerate(wall_frames([0, 1.0]))]
    pairs = np.array([[0, 1]])
    assert zeb.scene_overlaps(frames, pairs)[0] == 0
    np.testing.assert_allclose(zeb.scene_overlaps(frames, pairs, sparse=True), [1 - 160 / D / 320], atol=0.008)


def test_one_program_serves_any_number_of_pairs():
    frames = wall_frames([0, 1])
    before = zeb.overlap_ratios._cache_size()
    for num in (1, 5, 60):
        zeb.scene_overlaps(frames, np.zeros((num, 2), np.int32))
    assert zeb.overlap_ratios._cache_size() <= before + 1


@pytest.mark.parametrize(
    "name, want",
    [("SCE", [3] * 10), ("ICL", [125] * 10), ("KIT", [69] * 5 + [68] * 5), ("GL3", [2] * 3 + [1] * 7)],
)
def test_pairs_per_bin_are_those_of_the_released_sets(name, want):
    """Spec 3.6 and 7.4."""
    overlaps = np.linspace(1e-4, 1, 20_000)
    chosen = zeb.sample_pairs(overlaps, zeb.CAPS[name])
    got = [int(((overlaps[chosen] > k / 10) & (overlaps[chosen] <= (k + 1) / 10)).sum()) for k in range(10)]
    assert got == want and len(np.unique(chosen)) == len(chosen) == zeb.CAPS[name]


def test_bins_are_closed_above_and_short_bins_give_what_they_have():
    overlaps = np.array([0.0, 0.1, 0.1, 0.10001, 1.0, 0.3])
    np.testing.assert_array_equal(zeb.sample_pairs(overlaps, 10), np.sort(zeb.sample_pairs(overlaps, 10)))
    chosen = zeb.sample_pairs(overlaps, 20)
    assert chosen.tolist() == [1, 2, 3, 4, 5]  # no overlap is in no bin
    assert len(set(zeb.sample_pairs(overlaps, 10)) & {1, 2}) == 1


def test_candidates_are_all_pairs_or_a_fixed_choice():
    assert zeb.candidates(4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    few = zeb.candidates(100, 3, 50)
    assert len(few) == 50 and (few[:, 0] < few[:, 1]).all()
    np.testing.assert_array_equal(few, zeb.candidates(100, 3, 50))


def test_what_is_built_is_read_as_released(tmp_path):
    frames = wall_frames([0, 0.5, 2.0])
    count = zeb.build([("s1", frames), ("s2", frames[:2])], tmp_path / "kitti", cap=10, suffix=".png")
    pairs = released.read_set(tmp_path, "KIT")
    assert count == len(pairs) == 4
    assert pairs[0].identifier == "s1#f0.png#f1.png"
    assert pairs[0].overlap == pytest.approx(1 - 0.5 * 160 / D / 320, abs=0.008)
    np.testing.assert_allclose(pairs[1].T_0to1, at(2.0))
    np.testing.assert_array_equal(pairs[0].K1, frames[1].K)
    again = read_pairs(tmp_path / "kitti" / "pairs.list")
    assert [p.overlap for p in again] == [p.overlap for p in pairs]
    for name in ("a/b", "..", "x-y"):
        with pytest.raises(ValueError, match="found the name"):
            zeb.build([(name, frames)], tmp_path / "none", cap=10)
    with pytest.raises(ValueError, match="no pair of frames that overlap"):
        zeb.build([("s", wall_frames([0, 99]))], tmp_path / "none", cap=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kitti"], "nothing half-written"


def test_a_set_is_built_once_and_never_mixed_with_another(tmp_path):
    frames = wall_frames(np.arange(6) * 0.3)
    out, settings = tmp_path / "kitti", {"source": "here"}
    assert zeb.build([("s", frames)], out, cap=10, settings=settings) == 2, "one of each bin: overlaps of 0.81 to 0.96"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert zeb.build([], out, cap=10, settings=settings) == 2, "done: the source is not even read"
    for other in ({"cap": 5, "settings": settings}, {"cap": 10, "seed": 1, "settings": settings}, {"cap": 10}):
        with pytest.raises(ValueError, match="kitti: "):
            zeb.build([("s", frames)], out, **other)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "s-a-b.txt").write_text("a b")
    with pytest.raises(ValueError, match="was not written by this program"):
        zeb.build([("s", frames)], tmp_path / "released", cap=10, settings=settings)


# ------------------------------------------------------------------------------------------------- the sources


def image(path, size, bayer=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0]) if bayer else (size[1], size[0], 3), 128, np.uint8))


def pfm(path, depth):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"Pf\n{depth.shape[1]} {depth.shape[0]}\n-1.0\n".encode() + depth[::-1].astype("<f4").tobytes())


def png16(path, depth, scale):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.round(depth * scale).astype(np.uint16))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def row(*arrays):
    return " ".join(repr(float(v)) for a in arrays for v in np.ravel(a))


def check(scenes, name, K, xs=(0.0, 0.5), names=None, depth=D):
    """One scene of a camera that moves along x before the wall."""
    ((found, frames),) = scenes
    assert found == name and [f.name for f in frames] == list(names)
    for frame, x in zip(frames, xs):
        np.testing.assert_allclose(frame.K, K, atol=1e-6)
        np.testing.assert_allclose(frame.T @ np.linalg.inv(frames[0].T), at(x) @ np.linalg.inv(at(xs[0])), atol=1e-5)
        got = frame.depth()
        np.testing.assert_allclose(got[got > 0], depth, rtol=2e-3)
        assert (got > 0).any() and frame.image().shape == (frame.size[1], frame.size[0], 3)
    want = 1 - (xs[1] - xs[0]) * K[0][0] / depth / frames[0].size[0]
    assert zeb.scene_overlaps(frames, np.array([[0, 1]]))[0] == pytest.approx(want, abs=0.02)


def test_gl3d(tmp_path):
    folder, lines = tmp_path / "data" / "57f8d9bbe73f6760f10e916a", []
    for i, x in enumerate((0.0, 0.5)):
        image(folder / "undist_images" / f"{i:08d}.jpg", (100, 100))
        pfm(folder / "depths" / f"{i:08d}.pfm", np.full((50, 50), D))
        lines.append(row([i, 400, 300, 200, 150, 0, -x, 0, 0], np.eye(3), [0, 0, 0], [400, 300]))
    write(folder / "geolabel" / "cameras.txt", "\n".join(lines))
    K = [[100, 0, 200.5 / 4 - 0.5], [0, 100, 150.5 / 3 - 0.5], [0, 0, 1]]  # of 400x300, for 100x100
    check(zeb_sources.gl3d(tmp_path), folder.name, K, names=["00000000", "00000001"])
    write(folder / "geolabel" / "cameras.txt", lines[0] + " 7")
    with pytest.raises(ValueError, match="found 24 numbers in a line, expected 23"):
        list(zeb_sources.gl3d(tmp_path))


def test_blendedmvs(tmp_path):
    K = np.array([[50, 0, 39.5], [0, 50, 29.5], [0, 0, 1]])
    for i, x in enumerate((0.0, 0.5)):
        image(tmp_path / "abc" / "blended_images" / f"{i:08d}.jpg", (80, 60))
        image(tmp_path / "abc" / "blended_images" / f"{i:08d}_masked.jpg", (80, 60))
        pfm(tmp_path / "abc" / "rendered_depth_maps" / f"{i:08d}.pfm", np.full((60, 80), D))
        text = "extrinsic\n" + "\n".join(row(r) for r in at(x)) + "\n\nintrinsic\n" + "\n".join(row(r) for r in K)
        write(tmp_path / "abc" / "cams" / f"{i:08d}_cam.txt", text + "\n\n0.5 0.1 128 9.0\n")
    check(zeb_sources.blendedmvs(tmp_path), "abc", K, names=["00000000", "00000001"])


def test_pfm_rows_come_from_the_bottom(tmp_path):
    depth = np.arange(6, dtype=np.float32).reshape(2, 3)
    pfm(tmp_path / "a.pfm", depth)
    np.testing.assert_array_equal(zeb_sources.read_pfm(tmp_path / "a.pfm"), depth)
    (tmp_path / "a.pfm").write_bytes((tmp_path / "a.pfm").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"a\.pfm: not a whole gray PFM"):
        zeb_sources.read_pfm(tmp_path / "a.pfm")


def test_eth3d(tmp_path):
    folder = tmp_path / "pipes"
    rows, raws = ["# comment"], ["# comment"]
    for i, x in enumerate((0.0, 0.5)):
        image(folder / "images" / "dslr_images_undistorted" / f"DSC_{i}.JPG", (120, 80))
        raw = np.full((90, 130), D, np.float32)
        raw[:, 70:72] = np.inf
        path = folder / "ground_truth_depth" / "dslr_images" / f"DSC_{i}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        raw.tofile(path)
        rows += [f"{i + 1} 1 0 0 0 {-x} 0 0 7 dslr_images_undistorted/DSC_{i}.JPG", "1 2 3"]
        raws += [f"{i + 1} 1 0 0 0 {-x} 0 0 3 dslr_images/DSC_{i}.JPG", "1 2 3"]
    write(folder / "dslr_calibration_undistorted" / "cameras.txt", "7 PINHOLE 120 80 90 91 60.5 40.5\n")
    write(folder / "dslr_calibration_undistorted" / "images.txt", "\n".join(rows))
    write(folder / "dslr_calibration_jpg" / "cameras.txt", "3 THIN_PRISM_FISHEYE 130 90 80 80 65 45 0 0 0 0 0 0 0 0\n")
    write(folder / "dslr_calibration_jpg" / "images.txt", "\n".join(raws))
    K = [[90, 0, 60], [0, 91, 40], [0, 0, 1]]  # the corner convention, undone
    check(zeb_sources.eth3d(tmp_path), "pipes", K, names=["DSC_0", "DSC_1"])


def test_thin_prism_fisheye_is_opencvs_fisheye_and_its_prism():
    rays = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    K, k = np.array([[700.0, 0, 320], [0, 710, 240], [0, 0, 1]]), np.array([0.1, -0.05, 0.02, -0.01])
    X = np.concatenate([rays, np.ones((50, 1))], 1)[None]
    want = cv2.fisheye.projectPoints(X, np.zeros(3), np.zeros(3), K, k)[0][0]
    plain = [700, 710, 320, 240, k[0], k[1], 0, 0, k[2], k[3], 0, 0]
    np.testing.assert_allclose(zeb_sources.thin_prism_fisheye(rays, plain), want, atol=1e-9)
    one = np.array([[np.tan(0.3), 0.0]])  # its equidistant point is (0.3, 0)
    moved = zeb_sources.thin_prism_fisheye(one, [1, 1, 0, 0, 0, 0, 0.1, 0.2, 0, 0, 0.5, 0.25])
    np.testing.assert_allclose(moved, [[0.3 + 0.2 * 3 * 0.09 + 0.5 * 0.09, 0.1 * 0.09 + 0.25 * 0.09]], atol=1e-12)


def test_kitti(tmp_path):
    sequence, drive = tmp_path / "sequences" / "08", "2011_09_30_drive_0028_sync"
    poses = []
    for i, x in enumerate((9.0, 0.0, 0.5)):
        image(sequence / "image_2" / f"{i:06d}.png", (124, 37))
        if i:  # the first frame has no depth
            folder = tmp_path / "train" / drive / "proj_depth" / "groundtruth" / "image_02"
            png16(folder / f"{1100 + i:010d}.png", np.full((37, 124), D), 256)
        poses.append(row(np.linalg.inv(at(x))[:3]))
    write(tmp_path / "poses" / "08.txt", "\n".join(poses))
    K = np.array([[70, 0, 61], [0, 70, 18], [0, 0, 1.0]])
    P2 = np.concatenate([K, K @ [[0.06], [0], [0]]], 1)
    write(sequence / "calib.txt", f"P0: {row(K, np.zeros(3))}\nP2: {row(P2)}\n")
    check(zeb_sources.kitti(tmp_path), drive, K, names=["000001", "000002"])
    ((_, frames),) = zeb_sources.kitti(tmp_path, [drive])
    np.testing.assert_allclose(frames[0].T[:3, 3], [0.06, 0, 0], atol=1e-12)  # the colour camera stands 6 cm aside
    assert list(zeb_sources.kitti(tmp_path, ["other"])) == []


def test_multifov(tmp_path):
    lines = ["# comment"]
    for i, x in enumerate((0.0, 0.5), 1):
        image(tmp_path / "data" / "img" / f"img{i:04d}_0.png", (640, 480))
        write(tmp_path / "data" / "depth" / f"img{i:04d}_0.depth", f"{D} " * (640 * 480))
        lines.append(f"{i} {x} 0 0 0 0 0 1")
    write(tmp_path / "info" / "groundtruth.txt", "\n".join(lines))
    K = [[329.115520046, 0, 320], [0, 329.115520046, 240], [0, 0, 1]]
    check(zeb_sources.multifov(tmp_path), "urban", K, names=["img0001_0", "img0002_0"])


def message(*fields):
    """Encode a protobuf message of (number, value): integers, floats, or bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number << 3]) + varint(value)
        elif isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        else:
            out += bytes([number << 3 | 2]) + varint(len(value)) + value
    return out


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_scenenet(tmp_path):
    views = []
    K = np.array([[160 / np.tan(np.pi / 6), 0, 160], [0, 120 / np.tan(np.pi / 8), 120], [0, 0, 1]])
    u, v = np.meshgrid(np.arange(320), np.arange(240))
    length = np.sqrt(((u - 160) / K[0, 0]) ** 2 + ((v - 120) / K[1, 1]) ** 2 + 1)
    for frame, x in ((0, 0.0), (1325, -0.5)):  # x points to the left in SceneNet's cameras
        image(tmp_path / "val" / "0" / "10" / "photo" / f"{frame}.jpg", (320, 240))
        png16(tmp_path / "val" / "0" / "10" / "depth" / f"{frame}.png", D * length, 1000)
        poses = []
        for d in (-0.25, 0.25):  # the exposure's ends, the middle counts
            camera = message((1, x + d), (2, 1.0), (3, 2.0))
            poses.append(message((1, camera), (2, message((1, x + d), (2, 1.0), (3, 7.0))), (3, 0.5)))
        views.append(message((1, frame), (2, poses[0]), (3, poses[1])))
    other = message((3, views[0]), (4, b"9/99"))  # not unpacked here
    trajectory = message((1, message((1, 4), (2, b"layout"))), *((3, v) for v in views), (4, b"0/10"))
    (tmp_path / "scenenet_rgbd_val.pb").write_bytes(message((1, other), (1, trajectory)))
    check(zeb_sources.scenenet(tmp_path), "10", K, names=["0", "1325"])
    for data, fault in ((b"\x0a\xff", "not a whole protobuf"), (b"\x0b", "wire type 3")):
        (tmp_path / "scenenet_rgbd_val.pb").write_bytes(data)
        with pytest.raises(ValueError, match=rf"scenenet_rgbd_val\.pb: .*{fault}"):
            list(zeb_sources.scenenet(tmp_path))
    escape = message((1, message((3, views[0]), (4, b"../../x"))))
    (tmp_path / "scenenet_rgbd_val.pb").write_bytes(escape)
    with pytest.raises(ValueError, match="expected one below val"):
        list(zeb_sources.scenenet(tmp_path))


def test_iclnuim(tmp_path):
    lines = []
    for i, x in enumerate((0.0, 0.5)):
        image(tmp_path / "livingroom1-color" / f"{i:05d}.jpg", (640, 480))
        png16(tmp_path / "livingroom1-depth-clean" / f"{i:05d}.png", np.full((480, 640), D), 1000)
        lines += [f"{i} {i} {i + 1}", *(row(r) for r in np.linalg.inv(at(x)))]
    write(tmp_path / "livingroom1-traj.txt", "\n".join(lines))
    K = [[525, 0, 319.5], [0, 525, 239.5], [0, 0, 1]]
    check(zeb_sources.iclnuim(tmp_path), "livingroom1", K, names=["00000", "00001"])
    with pytest.raises(ValueError, match="found livingroom1, expected office1"):
        list(zeb_sources.iclnuim(tmp_path, ["office1"]))


@pytest.mark.parametrize("inverse", [False, True])
def test_gtasfm_takes_the_way_of_the_poses_under_which_depths_agree(tmp_path, inverse):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    K = np.array([[80, 0, 79.5], [0, 80, 59.5], [0, 0, 1.0]])
    with h5py.File(tmp_path / "20190127_154841.hdf5", "w") as file:
        for i, z in enumerate((0.0, 1.0)):  # towards the wall: the other way round the wall would be too near
            T = at(0, z)
            file[f"image_{i}"] = cv2.imencode(".jpg", np.full((120, 160, 3), 128, np.uint8))[1].ravel()
            file[f"K_{i}"], file[f"pose_{i}"] = K, np.linalg.inv(T) if inverse else T
            file[f"depth_{i}"] = np.full((120, 160), D - z, np.float32)
    ((name, frames),) = zeb_sources.gtasfm(tmp_path)
    assert name == "20190127_154841" and [f.name for f in frames] == ["image_0", "image_1"]
    np.testing.assert_allclose(frames[1].T, at(0, 1.0), atol=1e-9)
    assert frames[0].image().shape == (120, 160, 3)
    (tmp_path / "20190127_154841.hdf5").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a sequence of GTA-SfM"):
        list(zeb_sources.gtasfm(tmp_path))


def test_robotcar(tmp_path):
    """A car that drives 1 m towards a wall 20 m ahead; a laser that scans it level."""
    size = (128, 96)
    axes = [[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]  # the image's x y z are the car's right down ahead
    write(tmp_path / "models" / "stereo_narrow_left.txt", "\n".join([row([100, 100, 63.5, 47.5]), *map(row, axes)]))
    u, v = np.meshgrid(np.arange(size[0], dtype=float), np.arange(size[1], dtype=float))
    np.stack([u.ravel(), v.ravel()]).tofile(tmp_path / "models" / "stereo_narrow_left_distortion_lut.bin")
    for name in ("stereo", "ins", "lms_front"):
        write(tmp_path / "extrinsics" / f"{name}.txt", "0 0 0 0 0 0\n")
    folder = tmp_path / "2014-06-26-09-31-18"
    start = 1403775196419494
    header = "timestamp,ins_status,lat,lon,alt,northing,easting,down,utm,vn,ve,vd,roll,pitch,yaw"
    rows = [f"{start + i * 500_000},OK,0,0,0,{500 + i * 0.5},7,1,30U,0,0,0,0,0,0" for i in range(4)]
    write(folder / "gps" / "ins.csv", "\n".join([header, *rows]))
    (folder / "lms_front").mkdir(parents=True)
    for i in range(3):
        y = np.linspace(-8, 8, 400)
        scan = np.stack([np.full(400, 20 - i * 0.5), y, np.full(400, 99.0)], 1)
        scan.tofile(folder / "lms_front" / f"{start + i * 500_000}.bin")
    stamps = [start, start + 1_000_000]
    for stamp in stamps:
        image(folder / "stereo" / "centre" / f"{stamp}.png", size, bayer=True)
    write(folder / "stereo.timestamps", "".join(f"{stamp} 1\n" for stamp in [*stamps, start + 5]))
    ((name, frames),) = zeb_sources.robotcar(tmp_path, [folder.name])
    assert name == folder.name and [f.name for f in frames] == [str(s) for s in stamps]
    np.testing.assert_allclose(frames[1].T @ np.linalg.inv(frames[0].T), at(0, 1.0), atol=1e-6)
    for frame, ahead in zip(frames, (20, 19)):
        depth = frame.depth()
        np.testing.assert_allclose(depth[depth > 0], ahead, atol=1e-4)
        assert set(np.nonzero(depth)[0]) <= {59, 60} and (depth > 0).sum() > 60  # a level line
        assert frame.image().shape == (96, 128, 3)
    overlap = zeb.scene_overlaps(frames, np.array([[0, 1]]), sparse=True)
    assert overlap[0] == pytest.approx(19 / 20, abs=0.1)


def test_command_builds_a_set(tmp_path, capsys):
    test_iclnuim(tmp_path / "source")
    command = ["ICL", str(tmp_path / "source"), str(tmp_path / "out")]
    assert zeb.main(command) == 0 and "ICL: 1 pairs" in capsys.readouterr().out
    (pair,) = released.read_set(tmp_path / "out", "ICL")
    assert pair.identifier == "livingroom1#00000.jpg#00001.jpg"
    for wrong, words in (([*command, "--cap", "0"], "--cap: found 0"), (["ICL", "x", command[2]], "another source")):
        assert zeb.main(wrong) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and error.startswith("data_prep.zeb: ")
