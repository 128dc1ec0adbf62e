"""Augmentation: points follow the pixels, masks follow the image, randomness is the generator's alone."""

import cv2
import numpy as np
import pytest

from gim_jax.data.augment import (
    Augment,
    Geometry,
    TooFewMatchesError,
    darken,
    decode_jpeg,
    draw_geometry,
    make_sample,
)
from gim_jax.data.records import MAX_IMAGE_PIXELS
from tests.pairs import make_record

BOX = (160, 128)
PLAIN = Augment(enabled=False)
WILD = Augment(rescale_prob=0.9, dark_prob=0.0, perspective_prob=0.9)


def blobs(size, kpts, sigma=2.0):
    """Draw Gaussian blobs at sub-pixel positions, uint8 [h, w, 3]: the pixel (x, y) samples the plane at (x, y)."""
    y, x = np.mgrid[: size[1], : size[0]]
    image = sum(np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sigma**2)) for u, v in kpts)
    return np.repeat((np.clip(image, 0, 1) * 250).astype(np.uint8)[..., None], 3, axis=2)


def centroid(gray, near, radius=9):
    """Measure the centre of brightness around a point."""
    y, x = np.mgrid[: gray.shape[0], : gray.shape[1]]
    weight = gray.astype(float) * (np.hypot(x - near[0], y - near[1]) <= radius)
    return np.array([(x * weight).sum(), (y * weight).sum()]) / weight.sum()


def blob_record(size, seed):
    """Make a pair of blob images with independent positions, blobs at least 40 px from each other."""
    rng = np.random.default_rng(seed)
    images, kpts = [], []
    for _ in "01":
        grid = np.stack(np.meshgrid(np.arange(30, size[0] - 20, 48), np.arange(30, size[1] - 20, 48)), -1)
        points = grid.reshape(-1, 2) + rng.uniform(-4, 4, (grid.size // 2, 2))
        images.append(cv2.imencode(".jpg", blobs(size, points, 2.5), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes())
        kpts.append(points)
    count = len(kpts[0])
    changes = dict(zip(("image0", "image1"), images))
    return make_record(
        num_matches=count,
        size0=size,
        size1=size,
        correspondences=np.concatenate(kpts, axis=1).astype(np.float32),
        **changes,
    )


@pytest.mark.parametrize(
    "size", [(160, 128), (120, 90), (400, 300), (640, 480), (333, 251)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("channels", [1, 3])
def test_points_follow_the_pixels(size, channels):
    # Half a pixel wrong in a resize by s is 0.5 |1 - s| px; a wrong crop or warp is much more.
    record = blob_record(size, 0)
    errors = []
    for seed in range(12):
        sample = make_sample(record, np.random.default_rng(seed), BOX, channels, 64, 1, WILD)
        for i in "01":
            gray = sample[f"image{i}"].mean(axis=2)
            for point in sample[f"kpts{i}"][sample["match_mask"]]:
                if (point > 12).all() and (point < np.subtract(BOX, 13)).all() and gray.max() > 60:
                    error = np.hypot(*(centroid(gray, point, radius=6) - point))
                    errors.append(error)
    assert len(errors) > 40
    assert np.median(errors) < 0.06
    assert np.quantile(errors, 0.9) < 0.25  # blobs cut by a border or stretched by the perspective


@pytest.mark.parametrize("size", [(320, 256), (640, 512), (1280, 1024), (80, 64), (480, 384)])
def test_resizing_alone_moves_points_by_the_pixel_centre_rule(size):
    point = np.array([[size[0] * 0.6137, size[1] * 0.4211]])
    scale = size[0] / BOX[0]
    data = cv2.imencode(".jpg", blobs(size, point, 3 * scale), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
    geometry = Geometry(BOX, (0, 0), BOX)
    image = geometry.render(decode_jpeg(data, size, 3, BOX), BOX)
    moved, inside = geometry.apply(point, size)
    assert inside.all()
    np.testing.assert_allclose(moved[0], (point[0] + 0.5) / scale - 0.5)
    np.testing.assert_allclose(centroid(image.mean(axis=2), moved[0], 12), moved[0], atol=0.03)


def test_masks_mark_the_cells_that_show_the_image():
    white = np.full((128, 160, 3), 255, np.uint8)
    num_partial = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        geometry = draw_geometry(rng, (160, 128), BOX, np.array([80, 64]), (0.6, 1.4), WILD, warped=True)
        seen = geometry.render(white, BOX)[..., 0].reshape(16, 8, 20, 8)
        mask = geometry.coarse_mask(BOX)
        assert mask.shape == (16, 20) and mask.dtype == bool
        assert not mask[seen.max(axis=(1, 3)) == 0].any()
        assert mask[seen.min(axis=(1, 3)) == 255].all()
        centre = seen[:, 3:5, :, 3:5].mean(axis=(1, 3))
        assert (mask == (centre > 127)).mean() > 0.99
        num_partial += 0 < mask.mean() < 1
    assert num_partial > 20


def test_points_lie_on_valid_cells_and_in_the_frame():
    record = make_record(num_matches=300, width=200, height=150)
    for seed in range(20):
        sample = make_sample(record, np.random.default_rng(seed), BOX, 1, 256, 16, WILD)
        count = sample["match_mask"].sum()
        assert 16 <= count <= 256 and sample["match_mask"][:count].all()
        for i in "01":
            kpts = sample[f"kpts{i}"]
            assert (kpts[:count] >= 0).all() and (kpts[:count] <= np.subtract(BOX, 1)).all()
            cells = ((kpts[:count] + 0.5) // 8).astype(int)
            assert sample[f"mask{i}"][cells[:, 1], cells[:, 0]].all()
            assert (kpts[count:] == 0).all() and (sample["conf"][count:] == 0).all()


def test_validation_fits_the_whole_image_and_changes_nothing_else():
    record = make_record(num_matches=50, width=320, height=160)
    sample = make_sample(record, np.random.default_rng(0), BOX, 3, 50, 1, PLAIN)
    assert sample["mask0"].sum() == 20 * 10 and sample["mask0"][:10].all()  # 160x80 of 160x128
    expected = (record.correspondences + 0.5) / 2 - 0.5
    inside = ((expected >= 0) & (expected <= (159, 79, 159, 79))).all(axis=1)
    got = np.concatenate([sample["kpts0"], sample["kpts1"]], axis=1)[sample["match_mask"]]
    np.testing.assert_allclose(got, expected[inside], atol=1e-4)
    np.testing.assert_allclose(sample["conf"][sample["match_mask"]], record.confidence[inside])
    assert not sample["image0"][80:].any() and not sample["image1"][80:].any()


def test_same_generator_same_sample_and_another_seed_another():
    record = make_record(num_matches=200, width=200, height=150)
    a, b, c = (make_sample(record, np.random.default_rng(s), BOX, 3, 64, 8, Augment()) for s in (1, 1, 2))
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
    assert (a["image1"] != c["image1"]).any()


def test_subset_of_too_many_matches_is_not_biased_to_the_left():
    record = make_record(num_matches=2000, width=160, height=128)
    everything = make_sample(record, np.random.default_rng(0), BOX, 1, 2000, 1, PLAIN)
    subset = make_sample(record, np.random.default_rng(0), BOX, 1, 200, 1, PLAIN)
    assert subset["match_mask"].all()
    whole = everything["kpts0"][everything["match_mask"]][:, 0]
    # Standard error of the mean of 200 draws from a uniform 160 px: 46 / sqrt(200) = 3.3 px.
    assert abs(subset["kpts0"][:, 0].mean() - whole.mean()) < 10


def test_image_1_really_zooms_in_and_the_anchor_stays():
    settings = Augment(rescale_prob=1.0)
    zooms = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        anchor = rng.uniform((0, 0), (639, 479))
        geometry = draw_geometry(rng, (640, 480), (320, 240), anchor, settings.rescale1, settings, warped=False)
        zooms.append(geometry.resized[0] / 320)
        assert geometry.valid[0] <= 320 and geometry.start[0] + geometry.valid[0] <= geometry.resized[0]
        moved = (anchor + 0.5) * np.divide(geometry.resized, (640, 480)) - 0.5 - geometry.start
        assert (moved > -1.5).all() and (moved < np.add(geometry.valid, 0.5)).all()
    assert max(zooms) > 1.3 and min(zooms) >= 0.97


def test_strip_is_never_enlarged_beyond_the_largest_image():
    # Fitted to the box by its width, an image of 8x60000 would have 160x1200000 pixels, at most 1.4 times enlarged.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        geometry = draw_geometry(rng, (8, 60000), BOX, np.array([4, 30000]), (1.0, 1.4), WILD, warped=False)
        assert np.prod(geometry.resized) <= MAX_IMAGE_PIXELS


def test_released_limit_of_the_zoom_turns_its_range_around():
    # A factor drawn from 1.0 "up" to 0.5: the box is half as large as the coordinates of labels in the video.
    settings = Augment(rescale_prob=1.0)
    zooms = []
    for seed in range(50):
        rng = np.random.default_rng(seed)
        zooms.append(draw_geometry(rng, (640, 512), BOX, np.ones(2), (1.0, 1.4), settings, False, 0.5).resized[0])
    assert BOX[0] / 2 - 8 <= min(zooms) < 0.6 * BOX[0] and 0.9 * BOX[0] < max(zooms) <= BOX[0]


def test_duplicate_correspondences_count_once():
    record = make_record(num_matches=40)
    doubled = make_record(num_matches=80, correspondences=np.repeat(record.correspondences, 2, axis=0))
    count = make_sample(record, np.random.default_rng(0), BOX, 1, 100, 1, PLAIN)["match_mask"].sum()
    assert make_sample(doubled, np.random.default_rng(0), BOX, 1, 100, 1, PLAIN)["match_mask"].sum() == count > 30


def test_too_few_survivors_is_an_error_that_counts_them():
    with pytest.raises(TooFewMatchesError, match="found 5 correspondences, expected at least 64"):
        make_sample(make_record(num_matches=5), np.random.default_rng(0), BOX, 1, 64, 64, Augment())
    outside = np.tile(np.float32([500, 500, 500, 500]), (80, 1))
    with pytest.raises(TooFewMatchesError, match="at most 0 correspondences survived, expected at least 64"):
        record = make_record(num_matches=80, correspondences=outside)
        make_sample(record, np.random.default_rng(0), BOX, 1, 64, 64, Augment())


def test_darkening_moves_nothing_and_mostly_darkens():
    image = 100 + blobs((64, 48), [(30.3, 22.7)], 3.0) // 2
    brightness = []
    for seed in range(300):
        for source in (image, image[..., 0].copy()):
            dark = darken(source.copy(), np.random.default_rng(seed))
            assert dark.shape == source.shape and dark.dtype == np.uint8
            gray = dark.astype(float).reshape(48, 64, -1).mean(axis=2)
            brightness.append(gray.mean())
            gray -= gray.min()
            if gray.max() > 25:
                np.testing.assert_allclose(centroid(gray, (30.3, 22.7), 20), (30.3, 22.7), atol=0.35)
    assert np.mean(brightness) < 0.75 * image.mean()


def test_damaged_jpeg_is_refused_by_name():
    record = make_record()
    with pytest.raises(ValueError, match="decoded nothing, expected 96x64 px"):
        decode_jpeg(b"\xff\xd8" + bytes(300), (96, 64), 3, (96, 64))
    with pytest.raises(ValueError, match="decoded 96x64 px, expected 64x96 px"):
        decode_jpeg(record.image0, (64, 96), 3, (64, 96))
