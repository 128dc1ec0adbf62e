"""Posed pairs: records, what augmentation makes of depth and cameras, and what every objective learns from them."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from gim_jax import losses_dense, supervision
from gim_jax.data import records
from gim_jax.data.augment import Augment, make_sample, project
from gim_jax.data.depth import decode_depth, depth_matches, encode_depth
from gim_jax.models.dkm_network import position_grid
from gim_jax.train import kinds
from gim_jax.train.objectives import dkm_losses
from tests.pairs import make_record
from tests.posed import posed_record

SIZE = (96, 64)
losses_of = jax.jit(dkm_losses, static_argnums=2)
label_by_depth = jax.jit(supervision.label_by_depth)


def sample(seed=0, augment=None, **changes):
    record, H = posed_record(seed, **changes)
    settings = augment or Augment(dark_prob=0.0, rotation_deg=30.0)
    return make_sample(record, np.random.default_rng(seed), SIZE, 1, 64, 8, settings, depth=True), H


def batch_of(*samples):
    return {name: jnp.asarray(np.stack([s[name] for s in samples])) for name in samples[0]}


# ---- records ----


def coded(depth):
    data, (near, far) = encode_depth(np.asarray(depth, np.float32))
    return decode_depth(data, near, far)


def test_depth_survives_encoding_to_a_hundredth_of_a_percent():
    depth = np.random.default_rng(0).uniform(0.1, 100, (20, 30)).astype(np.float32)
    depth[3:5], depth[7, 7], depth[8, 8] = 0, np.nan, -1
    back = coded(depth)
    known = np.isfinite(depth) & (depth > 0)
    assert (back[~known] == 0).all()
    np.testing.assert_allclose(back[known], depth[known], rtol=6e-5)
    np.testing.assert_array_equal(coded(np.full((4, 4), 2.5)), 2.5)
    assert not coded(np.zeros((4, 4))).any()


def test_posed_record_survives_encoding():
    record, _ = posed_record()
    back = records.decode(records.encode(record))
    for name in ("T_0to1", "K0", "K1", "depth_ranges"):
        np.testing.assert_array_equal(getattr(back, name), getattr(record, name))
    assert (back.depth0, back.depth1, back.scene, back.overlap) == (record.depth0, record.depth1, "plane0", 0.5)
    assert back.posed and back.depth_complete == 1 and not records.decode(records.encode(make_record())).posed


def test_records_of_version_1_are_still_read():
    # Version 1 had none of the fields of poses.
    example = records.tf_example.Example.FromString(records.encode(make_record(schema_version=1)))
    for name in records._SINCE_2:
        del example.features.feature[name]
    record = records.decode(example.SerializeToString())
    assert not record.posed and record.overlap == -1 and record.scene == ""
    np.testing.assert_array_equal(record.correspondences, make_record().correspondences)


@pytest.mark.parametrize(
    "field, value",
    [
        ("T_0to1", np.diag([2.0, 2, 2, 1])),
        ("T_0to1", np.diag([1.0, 1, -1, 1])),
        ("K1", np.diag([-5.0, 5, 1])),
        ("K0", np.zeros((3, 3))),
        ("depth0", b""),
        ("depth1", b"\x89PNG\r\n\x1a\n"),
        ("depth_ranges", np.array([(1.0, 2), (3, 2)])),
        ("overlap", 1.5),
    ],
)
def test_posed_record_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        records.encode(posed_record(**{field: value})[0])
    with pytest.raises(ValueError, match=r"^T_0to1: found zeros beside depth"):
        records.encode(posed_record(T_0to1=np.zeros((4, 4)))[0])


def test_pair_id_depends_on_the_pose():
    ids = {records.make_pair_id(posed_record(shift=(x, 0, 0))[0]) for x in (0.1, 0.2)}
    assert len(ids) == 2


# ---- augmentation ----


def test_matches_through_the_depth_obey_the_homography_of_the_plane():
    record, H = posed_record()
    depths = [decode_depth(d, *r) for d, r in zip((record.depth0, record.depth1), record.depth_ranges)]
    rows = depth_matches(np.random.default_rng(0), depths, (record.K0, record.K1), record.T_0to1, 200)
    assert len(rows) > 50
    np.testing.assert_allclose(project(H, rows[:, :2]), rows[:, 2:], atol=0.02)


def test_hidden_points_are_no_matches():
    record, _ = posed_record()
    depths = [decode_depth(d, *r) for d, r in zip((record.depth0, record.depth1), record.depth_ranges)]
    depths[1][:] = 1.0  # a wall in front of everything
    assert len(depth_matches(np.random.default_rng(0), depths, (record.K0, record.K1), record.T_0to1, 200)) == 0


@pytest.mark.parametrize("seed", range(4))
def test_depth_and_cameras_follow_the_pixels(seed):
    # Through the crop's depth and cameras, then the warp, every match lands where the homography puts it.
    s, _ = sample(seed)
    count = s["match_mask"].sum()
    kpts0, kpts1 = s["kpts0"][:count], s["kpts1"][:count]
    z = s["depth0"][tuple(np.rint(kpts0).astype(int).T[::-1])]
    assert (z > 0).all()
    rays = np.concatenate([kpts0, np.ones((count, 1))], 1) @ np.linalg.inv(s["K0"]).T * z[:, None]
    moved = (rays @ s["T_0to1"][:3, :3].T + s["T_0to1"][:3, 3]) @ s["K1"].T
    found = project(s["Hq_aug"].astype(float), moved[:, :2] / moved[:, 2:])
    np.testing.assert_allclose(found, kpts1, atol=0.1)


def test_video_pairs_have_neutral_fields_beside_posed_ones():
    video = make_sample(make_record(), np.random.default_rng(0), SIZE, 1, 64, 8, Augment(), depth=True)
    posed, _ = sample()
    assert {k: (v.shape, v.dtype) for k, v in video.items()} == {k: (v.shape, v.dtype) for k, v in posed.items()}
    assert not video["posed"] and not video["depth0"].any() and posed["posed"]
    without = make_sample(make_record(), np.random.default_rng(0), SIZE, 1, 64, 8, Augment())
    assert all((video[name] == without[name]).all() for name in without)  # the same draws


def test_released_switches_keep_the_leftmost_labels_and_never_zoom_in():
    record = make_record(num_matches=200)
    released = Augment(dark_prob=0.0, perspective_prob=0.0, rescale_prob=1.0, zoom_in=False, subset="leftmost")
    s = make_sample(record, np.random.default_rng(1), (64, 48), 1, 32, 8, released)
    x = s["kpts0"][:, 0]
    assert (np.diff(x) >= 0).all()
    free = make_sample(record, np.random.default_rng(1), (64, 48), 1, 200, 8, released)
    count = free["match_mask"].sum()
    np.testing.assert_allclose(x, np.sort(free["kpts0"][:count, 0])[:32])
    assert (free["kpts1"][:count] <= (63, 47)).all() and count > 32
    with pytest.raises(ValueError, match=r"^subset: found 'first'"):
        Augment(subset="first")


# ---- supervision ----


def test_sparse_supervision_by_depth_agrees_with_the_plane():
    s, _ = sample(3)
    batch = batch_of(s)
    given = kinds.corner_convention(kinds.supervision_of(batch))
    ones = jnp.ones((1, 64), bool)
    matches0, matches1 = label_by_depth(given, batch["kpts0"], batch["kpts1"], ones, ones)
    count = int(s["match_mask"].sum())
    assert (np.asarray(matches0[0, :count]) == np.arange(count)).mean() > 0.9
    assert (np.asarray(matches1[0, :count]) == np.arange(count)).mean() > 0.9


def test_coarse_supervision_agrees_with_the_plane():
    s, _ = sample(1)
    given = kinds.supervision_of(batch_of(s))
    targets = supervision.coarse_targets(given, (8, 12), (8, 12))
    match1 = np.asarray(targets["match1"][0])
    cells0 = np.flatnonzero(match1 >= 0)
    assert len(cells0) > 10
    fine = supervision.fine_targets(given, targets, np.zeros(len(cells0), int), cells0, match1[cells0])
    count = int(s["match_mask"].sum())
    known = [(s[f"kpts{i}"][:count]) for i in "01"]
    H = np.asarray(jax.device_get(_fit(*known)))
    at0 = np.stack([cells0 % 12, cells0 // 12], -1) * 8.0
    at1 = np.stack([match1[cells0] % 12, match1[cells0] // 12], -1) * 8.0
    np.testing.assert_allclose(np.asarray(fine) * 4, project(H, at0) - at1, atol=0.3)


def _fit(kpts0, kpts1):
    import cv2

    return cv2.findHomography(kpts0.astype(np.float64), kpts1.astype(np.float64))[0]


def true_warp(H, shape=(64, 96)):
    """Predictions of DKM that are the homography at every stride."""
    out = {}
    for stride in (4, 1):
        h, w = -(-shape[0] // stride), -(-shape[1] // stride)
        px = (np.asarray(position_grid(h, w)).reshape(-1, 2) + 1) * (shape[1] / 2, shape[0] / 2) - 0.5
        flow = (2 * project(H, px) + 1) / (shape[1], shape[0]) - 1
        out[stride] = {
            "flow": jnp.asarray(flow.reshape(1, h, w, 2), jnp.float32),
            "certainty": jnp.zeros((1, h, w)),
        }
    return out


def test_dense_loss_of_a_posed_pair_is_zero_for_the_true_warp_and_not_for_the_released_targets():
    s, _ = sample(2)
    batch = batch_of(s)
    count = int(s["match_mask"].sum())
    predictions = true_warp(_fit(s["kpts0"][:count], s["kpts1"][:count]))
    _, parts, _ = losses_of(predictions, batch, kinds.DEFAULT)
    assert float(parts["distance_1_posed"]) * 48 < 0.2  # px; the depth is that of the nearest pixel
    _, released, _ = losses_of(predictions, batch, kinds.Settings(released=True))
    assert float(released["distance_1_posed"]) > 2 * float(parts["distance_1_posed"])


def test_mixed_batch_weighs_each_pair_alike():
    posed, _ = sample(2)
    video = make_sample(make_record(), np.random.default_rng(0), SIZE, 1, 64, 8, Augment(), depth=True)
    predictions = jax.tree.map(lambda x: jnp.concatenate([x, x]), true_warp(np.eye(3)))
    mixed, both_posed, both_video = (
        float(losses_of(predictions, batch_of(*pair), kinds.DEFAULT)[0])
        for pair in ((posed, video), (posed, posed), (video, video))
    )
    assert both_posed > 0 and both_video > 0
    np.testing.assert_allclose(mixed, (both_posed + both_video) / 2, rtol=1e-5)


def test_certainty_of_video_pairs_is_trained_unless_released():
    video = make_sample(make_record(), np.random.default_rng(0), SIZE, 1, 64, 8, Augment())
    batch = batch_of(video)
    predictions = true_warp(np.eye(3))

    def certainty_gradient(settings):
        grad = jax.jit(jax.grad(lambda p: dkm_losses(p, batch, settings)[0]))(predictions)
        return float(jnp.abs(grad[1]["certainty"]).sum())

    assert certainty_gradient(kinds.DEFAULT) > 0 and certainty_gradient(kinds.Settings(released=True)) == 0
    assert losses_dense.CERTAINTY_WEIGHT == kinds.DEFAULT.certainty_weight
