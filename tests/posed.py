"""Posed records of a world that is known: a textured plane, so that depth, poses and matches agree exactly."""

import cv2
import numpy as np

from gim_jax.data import records
from gim_jax.data.depth import encode_depth
from tests.pairs import texture

DISTANCE = 4.0  # of the plane z = DISTANCE from camera 0


def look_at_plane(K, T, size, source):
    """Render the plane as camera 1 sees it: the image, its depth, and the homography from image 0."""
    R, t = T[:3, :3], T[:3, 3]
    H = K @ (R + np.outer(t, (0, 0, 1)) / DISTANCE) @ np.linalg.inv(K)  # of points on the plane n X = d, n = (0, 0, 1)
    image = cv2.warpPerspective(source, H, size)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    rays = np.stack([x, y, np.ones_like(x)], -1) @ np.linalg.inv(K).T
    normal = R @ (0, 0, 1)
    depth = (DISTANCE + normal @ t) / (rays @ normal)  # n' (z ray) = d + n' t
    return image, depth.astype(np.float32), H


def posed_record(seed=0, size=(96, 64), angle=0.05, shift=(0.2, -0.1, 0.1), **changes):
    """Make a posed record and the homography from its image 0 to its image 1."""
    rng = np.random.default_rng(seed)
    K = np.array([(80.0, 0, size[0] / 2 - 0.5), (0, 80.0, size[1] / 2 - 0.5), (0, 0, 1)])
    T = np.eye(4)
    T[:3, :3] = cv2.Rodrigues(angle * rng.uniform(-1, 1, 3))[0]
    T[:3, 3] = shift
    image0 = texture(seed, *size)
    image1, depth1, H = look_at_plane(K, T, size, image0)
    depths = (np.full(size[::-1], DISTANCE, np.float32), depth1)
    pngs, ranges = zip(*(encode_depth(depth) for depth in depths))
    jpegs = [cv2.imencode(".jpg", image)[1].tobytes() for image in (image0, image1)]
    values = dict(
        image0=jpegs[0],
        image1=jpegs[1],
        size0=size,
        size1=size,
        correspondences=np.zeros((0, 4), np.float32),
        confidence=np.zeros(0, np.float32),
        teacher=np.zeros(0, np.int32),
        teachers=(),
        hops=np.zeros(0, np.int32),
        F=np.zeros((3, 3)),
        frame0=0,
        frame1=0,
        time0_s=0.0,
        time1_s=0.0,
        interval=0,
        video="",
        video_sha256="",
        licence="test",
        label_config_hash="",
        T_0to1=T,
        K0=K,
        K1=K,
        depth0=pngs[0],
        depth1=pngs[1],
        depth_ranges=np.array(ranges),
        depth_complete=1,
        scene=f"plane{seed}",
        overlap=0.5,
    )
    return records.PairRecord(**(values | changes)), H
