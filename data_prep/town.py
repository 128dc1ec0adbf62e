"""The procedural town: what stands where, and how a tourist walks through it.

World axes: x and y along the ground, z up, metres. A surface is a quad: origin (top left corner seen from outside),
edge to the right, edge down; it is seen only from its outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep import textures

TILE_M = 8.0  # side of a ground square
RING_M = 9.0  # depth of the buildings that close the town off


@dataclass(frozen=True)
class Look:
    """What the towns of one family have in common. Colours are HSV in 0..1, lengths metres."""

    hues: tuple[float, ...]
    saturation: tuple[float, float]
    value: tuple[float, float]
    materials: tuple[str, ...]
    street_m: tuple[float, float]
    height_m: tuple[float, float]
    ground: str
    ground_hue: float
    ground_value: float
    sky: tuple[tuple[int, int, int], tuple[int, int, int]]  # RGB at the zenith and at the horizon
    ambient: float
    shutters: float
    tilt_deg: float  # deviation of a building's heading from the street's


LOOKS = {
    "brick": Look(
        (0.02, 0.04, 0.06), (0.25, 0.6), (0.4, 0.7), ("brick", "brick", "stone"), (9, 12), (9, 15),
        "flags", 0.1, 0.55, ((110, 150, 215), (205, 215, 225)), 0.70, 0.2, 1.0,
    ),
    "plaster": Look(
        (0.05, 0.09, 0.12, 0.02, 0.55), (0.15, 0.5), (0.6, 0.92), ("plaster", "plaster", "stone"), (7, 10), (8, 14),
        "cobbles", 0.08, 0.5, ((90, 140, 220), (215, 222, 228)), 0.65, 0.85, 3.0,
    ),
    "stone": Look(
        (0.09, 0.11, 0.13), (0.05, 0.25), (0.5, 0.8), ("stone", "plaster"), (6.5, 9), (7, 12),
        "cobbles", 0.6, 0.42, ((175, 182, 190), (215, 216, 218)), 0.85, 0.5, 4.0,
    ),
    "modern": Look(
        (0.55, 0.6, 0.1, 0.3), (0.0, 0.3), (0.45, 0.9), ("panel", "tile", "brick"), (12, 16), (13, 24),
        "asphalt", 0.6, 0.4, ((120, 165, 225), (220, 228, 235)), 0.70, 0.0, 0.0,
    ),
    "harbour": Look(
        (0.0, 0.12, 0.35, 0.55, 0.6, 0.95), (0.4, 0.8), (0.45, 0.85), ("siding", "siding", "brick"), (9, 13), (6, 10),
        "asphalt", 0.08, 0.5, ((140, 160, 185), (225, 220, 215)), 0.75, 0.4, 2.0,
    ),
    "market": Look(
        (0.08, 0.95, 0.15, 0.45), (0.2, 0.6), (0.35, 0.75), ("tile", "plaster", "panel"), (8, 11), (7, 16),
        "flags", 0.05, 0.45, ((200, 170, 150), (240, 220, 190)), 0.80, 0.3, 2.0,
    ),
}  # fmt: skip


@dataclass
class Town:
    """Surfaces and streets. `quads` float64 [Q, 3, 3]: origin, right edge, down edge; `kinds`: their painters."""

    look_name: str
    look: Look
    seed: tuple[int, ...]
    quads: np.ndarray
    kinds: list[str]
    streets_x: np.ndarray  # x of the streets that run along y
    streets_y: np.ndarray
    lane_m: float  # half width of the strip that stays free for walking
    sun: np.ndarray  # unit vector towards the light


class Builder:
    """Collects quads."""

    def __init__(self):
        self.quads: list[np.ndarray] = []
        self.kinds: list[str] = []

    def quad(self, origin, right, down, kind: str):
        self.quads.append(np.array([origin, right, down], np.float64))
        self.kinds.append(kind)

    def block(self, centre, size, heading: float, base: float, kinds, roof: str | None = None):
        """Add an upright box: `size` (along, across, high), `kinds` of its front, right, back, left sides."""
        along = np.array([np.cos(heading), np.sin(heading), 0.0])
        across = np.array([-along[1], along[0], 0.0])
        middle = np.array([centre[0], centre[1], base + size[2]])
        down = np.array([0.0, 0.0, -size[2]])
        # The front looks along -across. Seen from outside its right is +along.
        sides = (
            (along, across, 0, 1),
            (across, -along, 1, 0),
            (-along, -across, 0, 1),
            (-across, along, 1, 0),
        )
        for (right, inward, a, b), kind in zip(sides, kinds):
            corner = middle - right * size[a] / 2 - inward * size[b] / 2
            self.quad(corner, right * size[a], down, kind)
        if roof:
            corner = middle - along * size[0] / 2 + across * size[1] / 2
            self.quad(corner, along * size[0], -across * size[1], roof)


def build_town(seed: tuple[int, ...], look_name: str | None = None) -> Town:
    """Build a town: a grid of streets closed by a ring of houses. `look_name` None picks one by the seed."""
    rng = np.random.default_rng([*seed, 1])
    picked = list(LOOKS)[rng.integers(len(LOOKS))]
    look_name = look_name or picked
    if look_name not in LOOKS:
        raise ValueError(f"look: {look_name!r} is unknown; known: {', '.join(LOOKS)}")
    look = LOOKS[look_name]
    widths = rng.uniform(*look.street_m, (2, 4))
    streets = np.cumsum(rng.uniform(34, 56, (2, 4)), axis=1)
    builder = Builder()
    starts = [streets[k] + widths[k] / 2 for k in (0, 1)]  # where the blocks after each street begin
    ends = [streets[k] - widths[k] / 2 for k in (0, 1)]
    lows = [np.concatenate([[ends[k][0] - RING_M], starts[k]]) for k in (0, 1)]
    highs = [np.concatenate([ends[k], [starts[k][-1] + RING_M]]) for k in (0, 1)]
    for x0, x1 in zip(lows[0], highs[0]):
        for y0, y1 in zip(lows[1], highs[1]):
            add_block(rng, builder, look, x0, y0, x1, y1)
    for k in (0, 1):  # houses across the ends of the streets
        across = np.eye(2)[k]
        for street, width in zip(streets[k], widths[k]):
            for end, heading in ((lows[1 - k][0], (np.pi, np.pi / 2)[k]), (highs[1 - k][-1], (0.0, -np.pi / 2)[k])):
                inward = np.eye(2)[1 - k] * (RING_M / 2 if end == lows[1 - k][0] else -RING_M / 2)
                centre = across * street + np.eye(2)[1 - k] * end + inward
                size = (width + 1, RING_M, rng.uniform(*look.height_m))
                builder.block(centre, size, heading, 0.0, ("facade", "wall", "wall", "wall"))
    lane = widths.min() / 2 - 2.4
    for k in (0, 1):  # banners across the streets
        for street, width in zip(streets[k], widths[k]):
            for position in rng.uniform(streets[1 - k][0], streets[1 - k][-1], 3):
                add_banner(rng, builder, k, street, position, width)
    low, high = [lows[k][0] for k in (0, 1)], [highs[k][-1] for k in (0, 1)]
    for x in np.arange(low[0], high[0], TILE_M):
        for y in np.arange(low[1], high[1], TILE_M):
            builder.quad((x, y + TILE_M, 0), (TILE_M, 0, 0), (0, -TILE_M, 0), "ground")
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 1.1)
    sun = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    quads = np.stack(builder.quads)
    return Town(look_name, look, seed, quads, builder.kinds, streets[0], streets[1], lane, sun)


def add_banner(rng, builder: Builder, axis: int, street: float, position: float, width: float):
    across, size = np.eye(3)[axis], rng.uniform(0.6, 1.4)
    half = 0.45 * width
    centre = np.zeros(3)
    centre[axis], centre[1 - axis], centre[2] = street, position, rng.uniform(4.5, 7)
    for right in (across, -across):
        builder.quad(centre - right * half, 2 * half * right, (0, 0, -size), "sign")


def add_block(rng, builder: Builder, look: Look, x0: float, y0: float, x1: float, y1: float):
    """Line a rectangle with houses, and put things on the pavement before them."""
    depth = min(RING_M, (x1 - x0) / 2, (y1 - y0) / 2)
    sides = (  # corner, direction along the side (the street on its right hand), length
        (np.array([x0, y0]), 0.0, x1 - x0),
        (np.array([x1, y0 + depth]), np.pi / 2, y1 - y0 - 2 * depth),
        (np.array([x1, y1]), np.pi, x1 - x0),
        (np.array([x0, y1 - depth]), -np.pi / 2, y1 - y0 - 2 * depth),
    )
    for corner, heading, length in sides:
        along = np.array([np.cos(heading), np.sin(heading)])
        outward = np.array([along[1], -along[0]])
        start = 0.0
        while length - start > 1e-6:
            width = min(rng.uniform(6, 12), length - start)
            if length - start - width < 4:
                width = length - start
            height = rng.uniform(*look.height_m)
            setback = rng.uniform(0, 0.7)
            turn = heading + np.deg2rad(look.tilt_deg) * rng.uniform(-1, 1)
            centre = corner + along * (start + width / 2) - outward * (depth / 2 + setback)
            builder.block(centre, (width, depth, height), turn, 0.0, ("facade", "facade", "wall", "facade"))
            front = corner + along * start - outward * setback
            dress(rng, builder, front, along, outward, width, height)
            start += width
        for start in np.arange(0.5, length - 1, 2.6):
            if rng.random() < 0.6:
                stand(rng, builder, corner + along * (start + rng.uniform(0, 0.8)), along, outward, heading)


def dress(rng, builder: Builder, front, along, outward, width: float, height: float):
    """Hang awnings, signs, balconies and bays on a house whose front starts at `front`."""
    heading = np.arctan2(along[1], along[0])

    def at(position: float, out: float, z: float):
        return np.array([*(front + along * position + outward * out), z])

    if rng.random() < 0.55:  # awning: cloth falling away from the wall
        w, out = rng.uniform(2, max(width - 1, 2.1)), rng.uniform(0.8, 1.4)
        position = rng.uniform(0, width - w) if width > w else 0.0
        top, bottom = at(position, 0, 3.5), at(position, out, rng.uniform(2.5, 2.9))
        builder.quad(top, np.array([*along, 0]) * w, bottom - top, "awning")
        builder.quad(bottom, np.array([*along, 0]) * w, (0, 0, -0.3), "awning")
        builder.quad(top + np.array([*along, 0]) * w, -np.array([*along, 0]) * w, bottom - top, "awning")  # from below
    for _ in range(rng.integers(0, 3)):  # blade sign, seen from both ways along the street
        w, h = rng.uniform(0.6, 1.1), rng.uniform(0.6, 2.2)
        centre = at(rng.uniform(0.3, width - 0.3), 0.15 + w / 2, 0)
        builder.block(centre[:2], (w, 0.12, h), heading - np.pi / 2, rng.uniform(2.9, 4.2), ("sign",) * 4)
    for _ in range(rng.integers(0, 3)):  # balcony or bay
        w, out = rng.uniform(1.4, 2.6), rng.uniform(0.5, 1.0)
        if width < w + 0.4 or height < 7:
            continue
        high = rng.choice((0.9, 2.4))
        base = rng.uniform(3.8, max(height - 3, 3.9))
        centre = at(rng.uniform(w / 2, width - w / 2), out / 2, 0)
        builder.block(centre[:2], (w, out, high), heading, base, ("crate" if high < 1 else "wall",) * 4)
        under = at(0, 0, base)
        under[:2] = centre[:2] - along * w / 2 + outward * out / 2
        builder.quad(under, np.array([*along, 0]) * w, np.array([*-outward, 0]) * out, "crate")
    if rng.random() < 0.5:  # pilaster
        centre = at(rng.uniform(0.2, width - 0.2), 0.15, 0)
        builder.block(centre[:2], (0.45, 0.4, min(height, rng.uniform(4, 12))), heading, 0.0, ("wall",) * 4)


def stand(rng, builder: Builder, place, along, outward, heading: float):
    """Put one thing on the pavement at `place` on the edge of the block."""
    kind = rng.choice(5, p=(0.35, 0.2, 0.15, 0.15, 0.15))
    turn = heading + rng.normal(0, 0.25)
    if kind == 0:  # crates, perhaps stacked
        size = rng.uniform(0.45, 0.95)
        centre = place + outward * rng.uniform(0.5, 0.9)
        builder.block(centre, (size, size * rng.uniform(0.7, 1.2), size), turn, 0.0, ("crate",) * 4, "crate")
        if rng.random() < 0.6:
            top = rng.uniform(0.3, 0.8) * size
            builder.block(centre, (top, top, top), turn + 0.4, size, ("crate",) * 4, "crate")
    elif kind == 1:  # poster pillar or kiosk
        size = rng.uniform(0.6, 1.2)
        centre = place + outward * (0.4 + size / 2)
        builder.block(centre, (size, size, rng.uniform(1.6, 2.6)), turn, 0.0, ("sign",) * 4, "crate")
    elif kind == 2:  # pole with a plate
        centre = place + outward * rng.uniform(1.0, 1.6)
        builder.block(centre, (0.12, 0.12, 3.4), turn, 0.0, ("crate",) * 4)
        builder.block(centre + 0.12 * outward, (0.7, 0.06, 0.7), turn + rng.choice((0, np.pi / 2)), 2.3, ("sign",) * 4)
    elif kind == 3:  # planter
        centre = place + outward * rng.uniform(0.5, 1.0)
        builder.block(centre, (1.5, 0.5, rng.uniform(0.5, 1.1)), heading, 0.0, ("crate",) * 4, "ground")
    else:  # parked car
        centre = place + outward * 1.15
        builder.block(centre, (3.6, 1.5, 0.85), heading, 0.1, ("car",) * 4, "car")
        builder.block(centre, (1.9, 1.35, 0.55), heading, 0.95, ("glass",) * 4, "car")


def walk(town: Town, rng, num_frames: int, fps: float, speed: float) -> tuple[np.ndarray, np.ndarray]:
    """Walk through the streets, turning at crossings: camera poses and the route.

    Returns:
      T_world_to_camera float64 [num_frames, 4, 4] (OpenCV axes) and the smoothed route [S, 2], one point every 0.1 m;
      the camera of frame k is at arc length k * speed / fps + ROUTE_LEAD_M.
    """
    step = 0.1
    distance = num_frames * speed / fps
    corners = crossings(town, rng, distance + 120)
    first = np.linalg.norm(corners[1] - corners[0])
    # A short video meets a crossing in most cases; it starts that far before one.
    start = max(first - rng.uniform(0.35, 1.5) * min(distance, 0.7 * first), 2.0)
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(corners, axis=0), axis=1))])
    arc = np.arange(start - ROUTE_LEAD_M - 12, lengths[-1], step)
    route = np.stack([np.interp(arc, lengths, corners[:, k]) for k in (0, 1)], 1)
    behind = arc < 0
    route[behind] = corners[0] + arc[behind, None] * (corners[1] - corners[0]) / first
    route = smooth(route, 1.4 / step)
    side = np.stack([-np.gradient(route[:, 1]), np.gradient(route[:, 0])], 1)
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    route = route + side * (min(town.lane_m, 1.2) * smooth_noise(rng, len(route), 12 / step))[:, None]
    heading = np.unwrap(np.arctan2(*np.gradient(smooth(route, 1.2 / step), axis=0).T[::-1]))
    heading = smooth(heading[:, None], 1.3 / step)[:, 0]
    route, heading = route[int(12 / step) :], heading[int(12 / step) :]
    at = (np.arange(num_frames) * speed / fps + ROUTE_LEAD_M) / step
    grid = np.arange(len(route))
    time = np.arange(num_frames) / fps
    phase, pace = rng.uniform(0, 2 * np.pi), 1.8 * speed / 1.3  # steps per second
    position = np.stack([np.interp(at, grid, route[:, 0]), np.interp(at, grid, route[:, 1]), np.zeros(num_frames)], 1)
    position[:, 2] = rng.uniform(1.55, 1.75) + 0.02 * np.sin(2 * np.pi * pace * time + phase)
    sway = 0.025 * np.sin(np.pi * pace * time + phase)
    yaw = np.interp(at, grid, heading)
    position[:, 0] += -np.sin(yaw) * sway
    position[:, 1] += np.cos(yaw) * sway
    yaw = yaw + np.deg2rad(9) * smooth_noise(rng, num_frames, 3.5 * fps) + 0.004 * np.sin(np.pi * pace * time)
    pitch = np.deg2rad(4) + np.deg2rad(2.5) * smooth_noise(rng, num_frames, 3 * fps)
    pitch = pitch + 0.004 * np.sin(2 * np.pi * pace * time + 1)
    roll = np.deg2rad(1.0) * smooth_noise(rng, num_frames, 2 * fps)
    return look_at(position, yaw, pitch, roll), route


ROUTE_LEAD_M = 6.0  # route kept behind the first frame, for walkers who come from there


def crossings(town: Town, rng, length: float) -> np.ndarray:
    """Choose a way over crossings, at least `length` metres; where it may, it turns in two of three cases."""
    xs, ys = town.streets_x, town.streets_y
    cell = rng.integers(1, 3, 2)
    move = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])[rng.integers(4)]
    corners, total = [np.array([xs[cell[0]], ys[cell[1]]])], 0.0
    while total < length:
        cell = cell + move
        corners.append(np.array([xs[cell[0]], ys[cell[1]]]))
        total += np.linalg.norm(corners[-1] - corners[-2])
        turns = [np.array([-move[1], move[0]]), np.array([move[1], -move[0]]), move]
        allowed = [m for m in turns if 0 <= cell[0] + m[0] < len(xs) and 0 <= cell[1] + m[1] < len(ys)]
        move = allowed[rng.integers(len(allowed))]
    return np.array(corners)


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """Smooth along the first axis with a Gaussian, the ends continued on a straight line."""
    radius = int(4 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    ramp = np.arange(1, radius + 1)[:, None]
    before = values[0] - ramp[::-1] * (values[1] - values[0])
    after = values[-1] + ramp * (values[-1] - values[-2])
    padded = np.concatenate([before, values, after])
    return np.stack([np.convolve(column, kernel, "valid") for column in padded.T], 1)


def smooth_noise(rng, length: int, period: float) -> np.ndarray:
    """Draw a smooth random function of unit size, [length], that changes over about `period` samples."""
    at = np.arange(length)
    total = np.zeros(length)
    for frequency in rng.uniform(0.3, 1.0, 4) / period:
        total += np.sin(2 * np.pi * (frequency * at + rng.random()))
    return total / 2.2


def look_at(position: np.ndarray, yaw, pitch, roll) -> np.ndarray:
    """Build T_world_to_camera [N, 4, 4] (OpenCV axes) at `position` [N, 3]; yaw 0 looks along +x, pitch up."""
    forward = np.stack([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)], -1)
    right = np.stack([np.sin(yaw), -np.cos(yaw), np.zeros_like(yaw)], -1)
    down = np.cross(forward, right)
    c, s = np.cos(roll)[:, None], np.sin(roll)[:, None]
    R = np.stack([c * right + s * down, c * down - s * right, forward], 1)
    T = np.tile(np.eye(4), (len(position), 1, 1))
    T[:, :3, :3] = R
    T[:, :3, 3] = -np.einsum("nij,nj->ni", R, position)
    return T


def walkers(rng, route: np.ndarray, num: int, num_frames: int, fps: float, speed: float) -> np.ndarray:
    """Let `num` people walk along the route, either way: foot points [num_frames, num, 3]."""
    time = np.arange(num_frames)[:, None] / fps
    pace = rng.uniform(0.7, 1.6, num) * rng.choice((-1, 1), num)
    ahead = rng.uniform(2, 40, num) + (pace - speed) * time
    ahead = np.mod(ahead + ROUTE_LEAD_M - 1, 44) - ROUTE_LEAD_M + 1  # who falls behind comes back far ahead
    at = (ahead + ROUTE_LEAD_M + time * speed) / 0.1
    offset = rng.uniform(1.0, 2.6, num) * rng.choice((-1, 1), num)
    slope = np.gradient(route, axis=0)
    side = np.stack([-slope[:, 1], slope[:, 0]], 1) / np.linalg.norm(slope, axis=1, keepdims=True)
    grid = np.arange(len(route))
    foot = [np.interp(at, grid, route[:, k]) + offset * np.interp(at, grid, side[:, k]) for k in (0, 1)]
    return np.stack([*foot, np.zeros_like(foot[0])], -1)


def paint(town: Town, index: int, ppm: float) -> np.ndarray:
    """Paint surface `index` at `ppm` texels per metre, shaded by the direction of the light: RGB uint8."""
    _, right, down = town.quads[index]
    kind = town.kinds[index]
    rng = np.random.default_rng([*town.seed, 2, index])
    image = textures.PAINTERS[kind](rng, float(np.linalg.norm(right)), float(np.linalg.norm(down)), ppm, town.look)
    normal = np.cross(down, right)
    light = max(0.0, float(normal @ town.sun) / float(np.linalg.norm(normal)))
    shade = town.look.ambient + (1.25 - town.look.ambient) * light
    return np.clip(image * np.float32(shade), 0, 255).astype(np.uint8)
