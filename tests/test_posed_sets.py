"""MegaDepth, ScanNet and homography folders, in miniature and in exactly the published layout, become records."""

import pickle
import shutil

import cv2
import h5py
import numpy as np
import pytest

from data_prep import homography, megadepth, posed, scannet
from gim_jax.data import records
from gim_jax.data.depth import decode_depth
from gim_jax.data.pipeline import Batches
from gim_jax.data.tfrecord import TFRecordSource
from tests.pairs import data_config, texture
from tests.posed import DISTANCE, look_at_plane

SIZE = (96, 64)
K_CORNER = np.array([(80.0, 0, 48), (0, 80.0, 32), (0, 0, 1)])  # COLMAP's: the image's centre is (48, 32)


def view(number, K, size=SIZE):
    """Image, depth and world-to-camera pose of camera `number` before the plane."""
    T = np.eye(4)
    T[:3, 3] = (0.15 * number, -0.05 * number, 0)
    image, depth, _ = look_at_plane(K, T, size, texture(1, *size))
    return image, depth, T


@pytest.fixture(scope="module")
def mega(tmp_path_factory):
    """Two scenes of four images; scene 0015 is a test scene."""
    root = tmp_path_factory.mktemp("mega")
    for scene in ("0001", "0015"):
        images, depths = f"Undistorted_SfM/{scene}/images", f"phoenix/S6/zl548/MegaDepth_v1/{scene}/dense0/depths"
        (root / images).mkdir(parents=True)
        (root / depths).mkdir(parents=True)
        poses, names = [], [f"{n}_o.jpg" for n in range(4)]
        for n, name in enumerate(names):
            image, depth, pose = view(n, K_CORNER - [(0, 0, 0.5), (0, 0, 0.5), (0, 0, 0)])
            cv2.imwrite(str(root / images / name), image)
            with h5py.File(root / depths / f"{n}_o.h5", "w") as file:
                file["depth"] = depth
            poses.append(pose)
        overlap = np.array([(1, 0.6, 0.3, 0.005), (0.6, 1, 0.5, 0.2), (0.3, 0.5, 1, 0.9), (0.005, 0.2, 0.9, 1)])
        content = {
            "image_paths": np.array([f"{images}/{name}" for name in names], object),
            "depth_paths": np.array([f"{depths}/{n}_o.h5" for n in range(4)], object),
            "intrinsics": np.array([K_CORNER] * 4, object),
            "poses": np.array(poses, object),
        }
        lists = np.array([(np.array([0, 1]), 0.6, np.zeros((2, 4))), (np.array([1, 3]), 0.2, np.zeros((2, 4)))], object)
        for folder, extra in (("d2net", {"overlap_matrix": overlap}), ("loftr", {"pair_infos": lists})):
            (root / folder).mkdir(exist_ok=True)
            np.savez(root / folder / f"{scene}.npz", **content, **extra)
    return root


def read_all(folder):
    return [records.decode(p) for p in TFRecordSource(records.dataset_paths(folder))]


@pytest.mark.parametrize("index, overlaps", [("d2net", {0.6, 0.3, 0.5, 0.2}), ("loftr", {0.6, 0.2})])
def test_megadepth_of_either_index_becomes_records(mega, tmp_path, capsys, index, overlaps):
    argv = [str(mega), f"--index={mega / index}", f"--out={tmp_path}", "--num-shards=2"]
    assert megadepth.main(argv) == 0
    found = read_all(tmp_path / "records")
    assert {round(r.overlap, 3) for r in found} == overlaps and {r.scene for r in found} == {"0001"}
    record = next(r for r in found if abs(r.overlap - 0.6) < 1e-6)
    assert record.size0 == SIZE and record.depth_complete == 1
    assert record.image0 == (mega / "Undistorted_SfM/0001/images/0_o.jpg").read_bytes()  # not coded again
    np.testing.assert_allclose(record.T_0to1[:3, 3], (0.15, -0.05, 0))
    np.testing.assert_allclose(record.K0[:2, 2], (47.5, 31.5))
    np.testing.assert_allclose(decode_depth(record.depth0, *record.depth_ranges[0]), DISTANCE, rtol=1e-4)
    before = (tmp_path / "scenes/0001.tfrecord").stat().st_mtime_ns
    assert megadepth.main(argv) == 0 and "up to date" not in capsys.readouterr().err
    assert (tmp_path / "scenes/0001.tfrecord").stat().st_mtime_ns == before  # finished scenes are kept


def test_smaller_images_keep_their_geometry(mega, tmp_path):
    argv = [str(mega), f"--index={mega / 'loftr'}", f"--out={tmp_path}", "--long-side=48", "--num-shards=1"]
    assert megadepth.main(argv) == 0
    record = read_all(tmp_path / "records")[0]
    assert record.size0 == (48, 32)
    np.testing.assert_allclose(record.K0, [(40, 0, 23.5), (0, 40, 15.5), (0, 0, 1)])  # half, centre in the centre


def test_training_draws_by_scene_and_overlap(mega, tmp_path):
    argv = [str(mega), f"--index={mega / 'd2net'}", f"--out={tmp_path}", "--test-scenes", "--num-shards=2"]
    assert megadepth.main(argv) == 0
    sampling = {"per_scene": 3, "min_overlap": 0.25, "max_overlap": 0.7}
    data = data_config(tmp_path / "records", sampling=sampling, depth=True, augment={"enabled": False}, max_matches=64)
    batches = Batches(data, 0, 6)
    for _ in range(2):
        batch = next(batches)  # an epoch: three of each of the two scenes
        assert batch["posed"].all() and batch["match_mask"].sum(1).min() > 8
        assert (batch["depth0"].reshape(6, -1).max(1) > 0).all()
    with pytest.raises(ValueError, match=r"data\.sampling: no record has an overlap of 0\.7 to 0\.8"):
        Batches(data_config(tmp_path / "records", sampling={"min_overlap": 0.7, "max_overlap": 0.8}), 0, 2)
    with pytest.raises(ValueError, match="is not packed"):
        Batches(data_config(tmp_path / "scenes", sampling=sampling), 0, 2)


def test_missing_and_damaged_files_are_left_out_and_named(mega, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(mega, root)
    (root / "phoenix/S6/zl548/MegaDepth_v1/0001/dense0/depths/0_o.h5").write_bytes(b"junk")
    (root / "Undistorted_SfM/0001/images/3_o.jpg").unlink()
    argv = [str(root), f"--index={root / 'd2net'}", f"--out={tmp_path / 'out'}", "--num-shards=1"]
    assert megadepth.main(argv) == 0
    printed = capsys.readouterr().out
    assert "0_o.h5: not a depth map" in printed and "3_o.jpg: no such file" in printed
    assert len(read_all(tmp_path / "out/records")) == 1  # of four pairs, that of images 1 and 2


def test_hostile_index_and_depth_are_refused(mega, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    index = tmp_path / "index"
    index.mkdir()
    (index / "0001.npy").write_bytes(pickle.dumps({"image_paths": Attack()}))
    argv = [str(mega), f"--index={index}", f"--out={tmp_path / 'out'}"]
    assert megadepth.main(argv) == 2 and not (tmp_path / "owned").exists()
    assert "data_prep.megadepth: " in capsys.readouterr().err
    for infos in (np.array([1, 2, 3]), np.array([("a", "b")], object)):
        with pytest.raises(ValueError, match=r"s\.npz: pair_infos: "):
            megadepth.pairs_of({"pair_infos": infos}, tmp_path / "s.npz", 0.0, 1.0)
    with pytest.raises(ValueError, match="expected a file inside of the folder"):
        posed.inside(mega, "../secret.jpg")
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["depth"] = h5py.ExternalLink(str(mega / "other.h5"), "depth")
    with pytest.raises(ValueError, match="no data set 'depth' of its own"):
        megadepth.read_depth(tmp_path / "link.h5")


def test_scannet_becomes_records(tmp_path):
    root, index = tmp_path / "train", tmp_path / "index"
    K = np.array([(577.6, 0, 318.9), (0, 578.7, 242.7), (0, 0, 1)])
    folder = root / "scene0003_01"
    for kind in ("color", "depth", "pose"):
        (folder / kind).mkdir(parents=True)
    for number, frame in enumerate((0, 10, 20)):
        image, depth, pose = view(number, K, scannet.SIZE)
        cv2.imwrite(str(folder / f"color/{frame}.jpg"), cv2.resize(image, (1296, 968)))
        cv2.imwrite(str(folder / f"depth/{frame}.png"), np.rint(depth * 1000).astype(np.uint16))
        lost = frame == 20  # the scanner writes -inf where it lost track
        text = np.full((4, 4), -np.inf) if lost else np.linalg.inv(pose)
        np.savetxt(folder / f"pose/{frame}.txt", text)
    (index / "npz").mkdir(parents=True)
    np.savez(index / "intrinsics.npz", scene0003_01=K.ravel())
    names = np.array([(3, 1, 0, 10), (3, 1, 0, 20), (3, 1, 0, 15), (3, 1, 10, 20)], np.uint16)
    np.savez(index / "npz/scene0003_01.npz", name=names, score=np.array([0.5, 0.6, 0.5, 0.1]))
    assert scannet.main([str(root), f"--index={index}", f"--out={tmp_path / 'out'}", "--num-shards=1"]) == 0
    (record,) = read_all(tmp_path / "out/records")  # lost track, frame 15 and little overlap are left out
    assert record.scene == "scene0003_01" and record.size0 == (640, 480) and record.depth_complete == 0
    np.testing.assert_allclose(record.T_0to1[:3, 3], (0.15, -0.05, 0), atol=1e-9)
    np.testing.assert_allclose(decode_depth(record.depth0, *record.depth_ranges[0]), DISTANCE, rtol=1e-3)


def test_any_folder_of_images_trains_homographies(tmp_path, capsys):
    (tmp_path / "in/sub").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "in/a.png"), texture(1, 128, 96))
    cv2.imwrite(str(tmp_path / "in/sub/b.jpg"), texture(2, 96, 128))
    (tmp_path / "in/broken.jpg").write_bytes(b"junk")
    assert homography.main([str(tmp_path / "in"), f"--out={tmp_path / 'out'}", "--num-shards=1"]) == 0
    assert "broken.jpg" in capsys.readouterr().out
    assert homography.main([str(tmp_path / "in"), f"--out={tmp_path / 'none'}", "--long-side=0"]) == 2
    assert "--long-side: found 0" in capsys.readouterr().err and not (tmp_path / "none").exists()
    augment = {"perspective_prob": 1.0, "dark_prob": 0.0, "rotation_deg": 30.0}
    data = data_config(tmp_path / "out/records", depth=True, augment=augment, max_matches=64)
    batch = next(Batches(data, 0, 4))
    for i in range(4):
        count = batch["match_mask"][i].sum()
        fitted, _ = cv2.findHomography(batch["kpts0"][i, :count], batch["kpts1"][i, :count])
        # crops differ by a scale and an offset, which the cameras hold; then the homography of the augmentation
        expected = batch["Hq_aug"][i] @ batch["K1"][i] @ np.linalg.inv(batch["K0"][i])
        np.testing.assert_allclose(fitted / fitted[2, 2], expected / expected[2, 2], atol=0.05)
