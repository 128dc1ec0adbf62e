"""Mapping and localization by COLMAP from a matcher without keypoints, where the cameras are known."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from gim_jax import cli, geometry
from gim_jax.image import encode_jpeg
from gim_jax.tasks import hloc, image_pairs, localize, sfm, tracks
from gim_jax.types import Matches

pytest.importorskip("pycolmap", reason="pycolmap is not installed: pip install 'gim-jax[sfm]'")
SIZE, NUM = (640, 480), 6
K = np.array([[600.0, 0, 319.5], [0, 600, 239.5], [0, 0, 1]])
POINTS = np.random.default_rng(0).uniform([-3, -2, 6], [3, 2, 10], (400, 3))


def true_poses() -> dict[str, np.ndarray]:
    """Cameras on an arc that look at the points."""
    poses = {}
    for index in range(NUM):
        angle = np.radians(8 * (index - NUM / 2))
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, -np.sin(angle)], [0, 1, 0], [np.sin(angle), 0, np.cos(angle)]]
        pose[:3, 3] = [0, 0, 8] - pose[:3, :3] @ [0, 0, 8] + [0, 0.2 * index, 0]
        poses[f"{index}.jpg"] = pose
    return poses


class Oracle:
    """A matcher that knows the world: the points of every pair with noise of its own, and a fifth of wrong ones."""

    info = SimpleNamespace(family="dkm")

    def __init__(self, noise_px: float = 0.2):
        self.rng, self.noise_px, self.num_pairs = np.random.default_rng(1), noise_px, 0

    def describe(self):
        return {"name": "oracle"}

    def match_pairs(self, sources):
        for pair in sources:
            self.num_pairs += 1
            kpts = []
            for path in pair:
                pose = true_poses()[path.name]
                p = geometry.from_homogeneous((POINTS @ pose[:3, :3].T + pose[:3, 3]) @ K.T)
                p = p + self.rng.normal(0, self.noise_px, p.shape)
                p[-80:] = self.rng.uniform(0, SIZE, (80, 2))
                kpts.append(p.astype(np.float32))
            yield Matches(kpts[0], kpts[1], np.ones(400, np.float32), SIZE, SIZE)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images (plain ones, COLMAP wants files), and a model made of all of them."""
    folder = tmp_path_factory.mktemp("sfm")
    (folder / "images").mkdir()
    for name in true_poses():
        (folder / "images" / name).write_bytes(encode_jpeg(np.full((480, 640, 3), 90, np.uint8), 90))
    pairs = image_pairs.exhaustive(sorted(true_poses()))
    found = sfm.match_all(folder / "images", pairs, Oracle(), folder / "cache")
    keypoints, matched = tracks.build_tracks(pairs, found, 1.0)
    sfm.write_database(folder / "a.db", folder / "images", keypoints, pairs, [index for index, _ in matched])
    (folder / "sparse/1").mkdir(parents=True)  # the second model of an earlier run
    models = sfm.map_images(folder / "a.db", folder / "images", folder / "sparse")
    return folder, pairs, keypoints, matched, models


def test_all_cameras_are_where_they_should_be(world):
    folder, _, _, _, models = world
    errors = sfm.pose_errors(sfm.poses_of(models[0]), true_poses())
    assert len(errors) == NUM
    assert max(angle for angle, _ in errors.values()) < 0.3 and max(d for _, d in errors.values()) < 0.05
    assert models[0].compute_mean_track_length() > 3  # tracks run through several pairs
    assert (folder / "sparse/0/images.bin").is_file() and os.listdir(folder / "sparse") == ["0"]


def test_cached_pairs_are_not_matched_again(world):
    folder, pairs, *_ = world
    oracle = Oracle()
    again = sfm.match_all(folder / "images", pairs, oracle, folder / "cache")
    assert oracle.num_pairs == 0 and len(again) == len(pairs) and len(again[0][0]) == 400


def test_pose_errors_are_those_that_were_made():
    truth = true_poses()
    moved, turn = {}, np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    for name, pose in truth.items():  # another world: turned, shifted, three times as large
        new = np.eye(4)
        new[:3, :3] = pose[:3, :3] @ turn.T
        new[:3, 3] = 3 * pose[:3, 3] - new[:3, :3] @ [5.0, 6.0, 7.0]
        moved[name] = new
    errors = sfm.pose_errors(moved, truth)
    assert max(max(pair) for pair in errors.values()) < 1e-6
    for name, degrees in (("1.jpg", 2.0), ("4.jpg", 5.0)):
        angle = np.radians(degrees)
        tilt = np.eye(4)
        tilt[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        moved[name] = tilt @ moved[name]  # the centre turns about the origin of the camera: it stays
    errors = sfm.pose_errors(moved, truth)
    np.testing.assert_allclose([errors[f"{i}.jpg"][0] for i in range(NUM)], [0, 2, 0, 0, 5, 0], atol=1e-5)
    assert max(distance for _, distance in errors.values()) < 1e-6


def test_rotations_are_right_although_the_centres_of_a_row_of_cameras_are_not():
    truth = {f"{i}.jpg": np.eye(4) for i in range(5)}
    for index, pose in enumerate(truth.values()):
        pose[0, 3] = -index
    moved = {name: pose.copy() for name, pose in truth.items()}
    for index, pose in enumerate(moved.values()):  # centres up to 1 cm off the line
        pose[1:3, 3] = 0.01 * np.array([index == 2, index % 2])
    errors = sfm.pose_errors(moved, truth)
    assert max(angle for angle, _ in errors.values()) < 1e-6
    assert 0 < max(distance for _, distance in errors.values()) < 0.011


@pytest.mark.parametrize("side", [-1, 1])
def test_queries_are_drawn_in_green_where_they_are(side):
    points = np.random.default_rng(0).uniform([-3, -2, 6], [3, 2, 10], (500, 3))
    query = np.eye(4)
    query[0, 3] = -2.0 * side  # two units to the side of the camera
    picture = sfm.draw_model(points, np.full((500, 3), 200, np.uint8), {"a": np.eye(4)}, {"q": query})[:, :800]
    green, red = ((picture == color).all(2).nonzero() for color in ((60, 255, 60), (255, 40, 40)))
    assert len(red[0]) > 50 and len(green[0]) > 50
    assert side * (green[1].mean() - red[1].mean()) > 100 and abs(green[0].mean() - red[0].mean()) < 3


def test_exif_orientation_is_undone(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # upright after a quarter turn clockwise
    Image.new("RGB", (640, 480)).save(tmp_path / "0.jpg", exif=exif)
    (tmp_path / "1.jpg").write_bytes(encode_jpeg(np.zeros((480, 640, 3), np.uint8), 90))

    class Fixed(Oracle):
        def match_pairs(self, sources):
            kpts = np.array([[470.0, 20.0]], np.float32)  # of the upright image, 480 x 640
            yield Matches(kpts, kpts, np.ones(1, np.float32), (480, 640), SIZE)

    [(kpts0, kpts1, _)] = sfm.match_all(tmp_path, [("0.jpg", "1.jpg")], Fixed())
    np.testing.assert_allclose(kpts0, [[20, 9]])  # upright (x, y) was stored (y, 479 - x)
    np.testing.assert_allclose(kpts1, [[470, 20]])


@pytest.mark.parametrize("orientation, turns", [(0, 0), (9, 0), (3, 2), (8, 1)])
def test_undefined_exif_orientations_are_upright(tmp_path, orientation, turns):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / "0.jpg", exif=exif)
    assert sfm.stored_turns(tmp_path / "0.jpg") == (turns, (64, 48))


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "xmp.jpg"])
def test_matches_lie_in_the_image_as_colmap_reads_it(tmp_path, name):
    """The brightest pixel as a matcher sees it, turned back, is the brightest one of COLMAP's."""
    import pycolmap
    from PIL import Image

    from gim_jax.image import read_image

    image = np.zeros((48, 64, 3), np.uint8)
    image[8:16, 40:48] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    packet = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    about = {"xmp": packet} if name == "xmp.jpg" else {"exif": exif}
    Image.fromarray(image).save(tmp_path / name, **about)
    y, x = (places.mean() for places in np.nonzero(read_image(tmp_path / name)[..., 0] > 128))

    class Fixed(Oracle):
        def match_pairs(self, sources):
            kpts = np.array([[x, y]], np.float32)
            yield Matches(kpts, kpts, np.ones(1, np.float32), SIZE, SIZE)

    [(kpts0, _, _)] = sfm.match_all(tmp_path, [(name, name)], Fixed())
    theirs = pycolmap.Bitmap.read(str(tmp_path / name), True).to_array()
    want = [places.mean() for places in np.nonzero(theirs[..., 0] > 128)[::-1]]
    np.testing.assert_allclose(kpts0[0], want, atol=1)


def test_images_of_one_size_and_focal_length_share_a_camera(tmp_path):
    import pycolmap
    from PIL import Image

    exif = Image.Exif()
    exif[0x8769] = {0xA405: 28}  # mm on 36 mm film
    sizes = {"a.jpg": (64, 48), "b.jpg": (80, 48), "c.jpg": (64, 48), "d.jpg": (64, 48), "e.jpg": (64, 48)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name, **({"exif": exif} if name in "b.jpg d.jpg e.jpg" else {}))
    sfm.write_database(tmp_path / "a.db", tmp_path, dict.fromkeys(sizes, np.zeros((1, 2))), [], [], verify=False)
    with pycolmap.Database.open(str(tmp_path / "a.db")) as database:
        cameras = {image.name[0]: image.camera_id for image in database.read_all_images()}
    groups = {frozenset(name for name in cameras if cameras[name] == camera) for camera in cameras.values()}
    assert groups == {frozenset("ac"), frozenset("b"), frozenset("de")}


def test_held_back_images_are_localized(world, tmp_path):
    import pycolmap

    folder, *_ = world
    names = sorted(true_poses())
    database = [name for name in names if name not in ("1.jpg", "4.jpg")]
    pairs = image_pairs.exhaustive(database)
    found = sfm.match_all(folder / "images", pairs, Oracle(), tmp_path / "cache")
    keypoints, matched = tracks.build_tracks(pairs, found, 1.0)
    sfm.write_database(
        tmp_path / "a.db", folder / "images", keypoints, pairs, [index for index, _ in matched],
        camera_model="PINHOLE", camera_params=[600, 600, 320, 240],
    )  # fmt: skip
    model = sfm.map_images(tmp_path / "a.db", folder / "images", tmp_path / "sparse", fixed_cameras=True)[0]
    camera = pycolmap.Camera(model="PINHOLE", width=640, height=480, params=[600, 600, 320, 240])
    camera.has_prior_focal_length = True
    guess = pycolmap.Camera(
        model="SIMPLE_PINHOLE", width=640, height=480, params=[768, 320, 240]
    )  # found with the pose
    cameras = {"1.jpg": camera, "4.jpg": guess}
    retrieved = {name: database for name in cameras}
    results = localize.localize(
        localize.read_model(tmp_path / "sparse/0"), folder / "images", folder / "images", cameras, retrieved, Oracle()
    )
    poses = sfm.poses_of(model) | {name: r.cam_from_world for name, r in results.items()}
    errors = sfm.pose_errors(poses, true_poses())
    assert all(not r.fallback and r.num_inliers > 250 for r in results.values())
    assert max(errors[name][0] for name in cameras) < 0.3 and max(errors[name][1] for name in cameras) < 0.1
    # a query that sees nothing of the model takes the first retrieved pose, and says so
    lost = localize.localize(
        model, folder / "images", folder / "images", {"1.jpg": camera}, {"1.jpg": ["0.jpg"]}, Oracle(noise_px=300)
    )["1.jpg"]
    assert lost.fallback == "0.jpg" and "agree with a pose" in lost.reason
    np.testing.assert_allclose(lost.cam_from_world, sfm.poses_of(model)["0.jpg"])


def test_points_are_triangulated_anew_with_the_poses_kept(world, tmp_path):
    folder, *_, models = world
    before = sfm.poses_of(models[0])
    model = localize.triangulate(localize.read_model(folder / "sparse/0"), folder / "images", Oracle(), tmp_path)
    for name, pose in sfm.poses_of(model).items():
        np.testing.assert_allclose(pose, before[name], atol=1e-9)
    assert model.num_points3D() > 250 and (tmp_path / "model/points3D.bin").is_file()


def test_hloc_files_round_trip(world, tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'gim-jax[sfm]'")
    _, pairs, keypoints, matched, _ = world
    inside = {f"sub/{name}": points for name, points in keypoints.items()}
    pairs = [(f"sub/{a}", f"sub/{b}") for a, b in pairs]
    hloc.write_features(tmp_path / "f.h5", inside, dict.fromkeys(inside, SIZE))
    hloc.write_matches(tmp_path / "m.h5", pairs, matched, inside)
    with h5py.File(tmp_path / "f.h5") as file:  # the schema as hloc reads it
        assert file["sub/0.jpg/keypoints"].dtype == np.float32
        np.testing.assert_array_equal(file["sub/0.jpg/image_size"], SIZE)
        assert file["sub/0.jpg/keypoints"].attrs["uncertainty"] == 1.0
    with h5py.File(tmp_path / "m.h5") as file:
        stored = file["sub-0.jpg/sub-1.jpg/matches0"]
        assert stored.dtype.kind == "i" and len(stored) == len(inside["sub/0.jpg"]) and (stored[:] == -1).any()
    read = hloc.read_features(tmp_path / "f.h5", list(inside))
    assert all((read[name] == inside[name]).all() for name in inside)
    flipped = [(b, a) for a, b in pairs]
    for (index, _), again in zip(matched, hloc.read_matches(tmp_path / "m.h5", flipped)):
        assert {tuple(row) for row in again[:, ::-1]} == {tuple(row) for row in index}
    with pytest.raises(ValueError, match=r"f\.h5: x\.jpg: found no keypoints"):
        hloc.read_features(tmp_path / "f.h5", ["x.jpg"])


def test_submission_has_the_basename_and_the_quaternion_first(tmp_path):
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]], [1, 2, 3]  # a quarter turn about z
    localize.write_poses(tmp_path / "p.txt", {"query/day/a.jpg": pose})
    name, *values = (tmp_path / "p.txt").read_text().split()
    assert name == "a.jpg"
    np.testing.assert_allclose([float(v) for v in values], [0.5**0.5, 0, 0, 0.5**0.5, 1, 2, 3])


@pytest.mark.parametrize("line", ["a.jpg PINHOLE 640 480 600", "a.jpg NONE 640 480 1", "a.jpg PINHOLE x 480 1 1 1 1"])
def test_query_lists_name_the_line(tmp_path, line):
    (tmp_path / "q.txt").write_text(f"b.jpg SIMPLE_PINHOLE 640 480 600 320 240\n{line}\n")
    with pytest.raises(ValueError, match=r"q\.txt:2: expected name MODEL width height params"):
        localize.read_queries([tmp_path / "q.txt"])


def test_commands_refuse_bad_input(world, tmp_path, capsys):
    folder = world[0]
    assert cli.main(["reconstruct", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    (tmp_path / "empty").mkdir()
    assert cli.main(["reconstruct", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    for name in "abc":
        (tmp_path / "empty" / f"{name}.WebP").touch()
    assert cli.main(["reconstruct", str(tmp_path / "empty"), "--out", str(tmp_path / "o")]) == 2
    images = str(folder / "images")
    common = ["localize", "--images", images, "--query-images", images, "--out", str(tmp_path / "p.txt")]
    assert cli.main([*common, "--colmap", str(tmp_path)]) == 2
    camera = ["--camera-model", "PINHOLE", "--camera-params", "nan", "1", "1", "1"]
    for words in (["--merge", "-1"], ["--max-keypoints", "0"], camera):
        assert cli.main(["reconstruct", images, "--out", str(tmp_path / "o"), *words]) == 2
    for words in (["--max-error", "-3"], ["--anchor", "nan"], ["--picture", str(tmp_path)]):
        assert cli.main([*common, "--colmap", str(folder / "sparse/0"), *words]) == 2
    error = capsys.readouterr().err
    assert "a.WebP: COLMAP reads no WebP" in error
    assert "none: no such file or folder" in error and "found no image, expected some" in error
    assert "expected the folder of a COLMAP model" in error and "PINHOLE: found nan, 1.0" in error
    for text in ("--merge: found -1", "--max-keypoints: found 0", "--max-error: found -3", "--anchor: found nan"):
        assert text in error
    assert f"{tmp_path}: is a folder" in error
    assert not (tmp_path / "p.txt").exists() and not (tmp_path / "o").exists()


def test_images_without_matches_are_a_result(world, tmp_path):
    folder = world[0]  # plain gray images: RootSIFT finds nothing
    out = tmp_path / "o"
    assert cli.main(["reconstruct", str(folder / "images"), "--out", str(out), "--pairs", "sequential"]) == 1
    assert json.loads((out / "statistics.json").read_text())["models"] == []
    words = ["export", "--to", "hloc", "--model", "rootsift", "--images", str(folder / "images")]
    assert cli.main([*words, "--pairs", "sequential", str(out)]) == 0
    assert (out / "features.h5").is_file() and (out / "matches.h5").is_file()
    assert len((out / "pairs.txt").read_text().splitlines()) == 15  # steps 1, 2, 3, 4 and 5 of six images
