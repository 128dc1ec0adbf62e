"""Painted textures of the procedural town: facades, walls, ground, signs, crates, people.

Every painter draws one surface of `width_m` x `height_m` metres at `ppm` texels per metre and returns RGB uint8
[round(height_m*ppm), round(width_m*ppm), 3]; what it draws depends on its random generator alone, so no two
surfaces look alike.
"""

from __future__ import annotations

import colorsys
import string

import cv2
import numpy as np

Rng = np.random.Generator
FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)


def hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    """Turn hue, saturation, value (each 0..1, hue cyclic) into RGB 0..255."""
    r, g, b = colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))
    return 255 * r, 255 * g, 255 * b


def pick_colour(rng: Rng, saturation=(0.1, 0.9), value=(0.15, 0.95)) -> tuple[float, float, float]:
    return hsv(rng.random(), rng.uniform(*saturation), rng.uniform(*value))


def shade(colour, factor: float) -> tuple[float, float, float]:
    """Darken or brighten a colour."""
    return factor * float(colour[0]), factor * float(colour[1]), factor * float(colour[2])


def fractal(rng: Rng, height: int, width: int, ppm: float, coarsest_m: float = 3.0, slope: float = 0.6):
    """Sum octaves of smooth noise from `coarsest_m` to two texels: float32 [height, width], deviation 1."""
    octaves = max(int(np.log2(max(coarsest_m * ppm, 4.0))), 1)
    rows, cols = (-(-n // 2**octaves) + 2 for n in (height, width))
    total = rng.standard_normal((rows, cols), np.float32)
    for k in range(
        1, octaves + 1
    ):  # each octave starts from the last one, enlarged: the whole costs little more than one
        total = cv2.resize(total, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        if k < octaves:
            total += np.float32(slope**k) * rng.standard_normal(total.shape, np.float32)
    y, x = rng.integers(total.shape[0] - height + 1), rng.integers(total.shape[1] - width + 1)
    total = total[y : y + height, x : x + width]
    return total * np.float32(1 / (cv2.meanStdDev(total)[1][0, 0] + 1e-6))


def masonry(rng: Rng, height, width, ppm, row_m, col_m, colour, spread=0.2, joint=0.7, hue_spread=0.06):
    """Lay courses of stones, bricks, planks or panels, each of its own tint; `joint` is the brightness of the
    gaps.
    """
    rows = np.cumsum(row_m * rng.uniform(0.8, 1.25, int(height / ppm / row_m * 1.3) + 4))
    row = np.searchsorted(rows, np.arange(height) / ppm)
    offset, scale = rng.uniform(0, 1, len(rows) + 1), col_m * rng.uniform(0.8, 1.25, len(rows) + 1)
    number = int(width / ppm / (0.8 * col_m)) + 3
    tint = 1 + spread * rng.standard_normal((len(rows) + 1, number, 1)).clip(-2, 2)
    hue = 1 + hue_spread * rng.standard_normal((len(rows) + 1, number, 3)).clip(-2, 2)
    table = (np.asarray(colour) * tint * hue).astype(np.float32)
    gap = max(0.012, 0.6 / ppm)
    x = np.arange(width) / ppm
    image = np.empty((height, width, 3), np.float32)
    for r in np.unique(row):
        here = x / scale[r] + offset[r]
        col = here.astype(np.int32)
        line = table[r, col]
        line[(here - col) * scale[r] < gap] *= joint
        image[row == r] = line
    image[np.flatnonzero(np.diff(row, prepend=row[0]))] *= joint
    return image


def material(rng: Rng, height: int, width: int, ppm: float, name: str, colour):
    """Paint a bare wall of a named material (brick, stone, siding, panel, tile, plaster): float32 RGB."""
    if name == "plaster":
        image = np.broadcast_to(np.asarray(colour, np.float32), (height, width, 3)).copy()
        image *= 1 + 0.10 * fractal(rng, height, width, ppm, 2.5, 0.8)[..., None]
        patches = fractal(rng, height, width, ppm, 1.5) > 1.3  # where the plaster has fallen off
        bare = masonry(rng, height, width, ppm, 0.12, 0.3, np.asarray(colour) * (0.75, 0.62, 0.55), 0.2)
        image[patches] = bare[patches]
    else:
        row_m, col_m, spread = {  # metres, metres, deviation of the tint
            "brick": (0.11, 0.32, 0.17),
            "stone": (0.38, 0.65, 0.13),
            "siding": (0.19, 3.0, 0.10),
            "panel": (1.1, 1.5, 0.12),
            "tile": (0.24, 0.24, 0.22),
        }[name]
        size = rng.uniform(0.8, 1.3)
        image = masonry(rng, height, width, ppm, row_m * size, col_m * size, colour, spread, rng.uniform(0.55, 1.3))
    grain = fractal(rng, height, width, ppm, 0.3, 0.9)
    return image * (1 + 0.09 * grain[..., None])


def write(rng: Rng, image, x: float, y: float, text: str, size_px: float, colour, thick=None):
    """Write text with its lower left corner at (x, y), about `size_px` tall."""
    thickness = max(1, int(round(thick or size_px * rng.uniform(0.06, 0.16))))
    font = FONTS[rng.integers(len(FONTS))]
    cv2.putText(image, text, (int(x), int(y)), font, size_px / 22, colour, thickness, cv2.LINE_AA)


def words(rng: Rng, low: int = 2, high: int = 9) -> str:
    letters = string.ascii_uppercase + "AEIOU" + string.ascii_lowercase + "aeiouaeiou" + string.digits
    return "".join(letters[i] for i in rng.integers(len(letters), size=rng.integers(low, high)))


def clutter(rng: Rng, height: int, width: int, ppm: float, density: float = 14.0, saturation=(0.0, 0.65)):
    """Fill a picture with shapes and letters of many sizes (goods in a shop window, posters): uint8 RGB."""
    image = np.empty((height, width, 3), np.uint8)
    palette = [pick_colour(rng, saturation) for _ in range(4)]
    image[:] = palette[0]
    number = int(np.clip(density * height * width / ppm**2, 12, 900))
    sizes = np.sort(np.exp(rng.uniform(np.log(0.04), np.log(0.7), number)))[::-1] * ppm
    for size in sizes:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        colour = palette[rng.integers(len(palette))] if rng.random() < 0.7 else pick_colour(rng, saturation)
        shape = rng.integers(5)
        a, b = size * rng.uniform(0.3, 1.0), size * rng.uniform(0.3, 1.0)
        if shape == 0:
            cv2.ellipse(image, ((x, y), (a, b), rng.uniform(0, 180)), colour, -1, cv2.LINE_AA)
        elif shape == 1:
            write(rng, image, x - size, y, words(rng, 1, 7), max(size * 0.6, 4), colour)
        elif shape == 2:
            points = (rng.uniform(-0.6, 0.6, (3, 2)) * size + (x, y)).astype(np.int32)
            cv2.fillConvexPoly(image, points, colour, cv2.LINE_AA)
        else:
            cv2.rectangle(image, (int(x), int(y)), (int(x + a), int(y + b)), colour, -1)
    return image


def paste(image, patch, x: float, y: float, gain: float = 1.0):
    """Put a patch with its top left corner at (x, y), cut at the borders."""
    x, y = int(round(x)), int(round(y))
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + patch.shape[1], image.shape[1]), min(y + patch.shape[0], image.shape[0])
    if x1 > x0 and y1 > y0:
        image[y0:y1, x0:x1] = np.clip(patch[y0 - y : y1 - y, x0 - x : x1 - x] * gain, 0, 255)


def box(image, x: float, y: float, w: float, h: float, colour, thickness: int = -1):
    cv2.rectangle(image, (int(x), int(y)), (int(x + w) - 1, int(y + h) - 1), colour, thickness)


def window(rng: Rng, image, x: float, y: float, w: float, h: float, ppm: float, style, goods):
    """Draw a window with frame, panes, what is seen behind them, a sill and perhaps shutters; all in texels."""
    frame, trim, shutter = style
    edge = max(1.0, 0.07 * ppm)
    box(image, x - edge, y - edge, w + 2 * edge, h + 2 * edge, frame)
    gw, gh = min(max(int(w), 2), goods.shape[1]), min(max(int(h), 2), goods.shape[0])
    gx, gy = rng.integers(goods.shape[1] - gw + 1), rng.integers(goods.shape[0] - gh + 1)
    sky = np.linspace(rng.uniform(0.3, 1.0), rng.uniform(0.1, 0.5), gh)[:, None, None] * np.array(
        [150, 175, 200], np.float32
    )
    share = rng.uniform(0.25, 0.8)
    paste(image, goods[gy : gy + gh, gx : gx + gw] * share + sky * (1 - share), x, y, rng.uniform(0.45, 0.95))
    if rng.random() < 0.4:  # curtain or blind
        drop = h * rng.uniform(0.2, 0.9)
        cloth = pick_colour(rng, (0, 0.4), (0.5, 0.95))
        box(image, x, y, w, drop, cloth)
        for k in range(int(w / max(0.08 * ppm, 2))):
            tone = np.asarray(cloth) * rng.uniform(0.75, 1.0)
            box(image, x + k * 0.08 * ppm, y, max(0.04 * ppm, 1), drop, tone)
    for k in range(1, rng.integers(2, 4)):
        box(image, x + w * k / 3 if k > 1 else x + w / 2, y, max(0.04 * ppm, 1), h, frame)
    for k in range(1, rng.integers(1, 4)):
        box(image, x, y + h * k / 3.5, w, max(0.04 * ppm, 1), frame)
    box(image, x - 2 * edge, y + h + edge, w + 4 * edge, max(0.1 * ppm, 1), trim)
    box(
        image,
        x - 2 * edge,
        y + h + edge + 0.1 * ppm,
        w + 4 * edge,
        max(0.04 * ppm, 1),
        np.asarray(trim) * 0.4,
    )
    if rng.random() < 0.6:
        box(
            image,
            x - edge,
            y - edge - 0.16 * ppm,
            w + 2 * edge,
            0.16 * ppm,
            np.asarray(trim) * rng.uniform(0.7, 1),
        )
    if shutter is not None and rng.random() < 0.8:
        for side in (x - edge - w / 2, x + w + edge):
            box(image, side, y - edge, w / 2, h + 2 * edge, shutter)
            for k in range(int(h / max(0.09 * ppm, 2))):
                tone = np.asarray(shutter) * rng.uniform(0.6, 0.9)
                box(image, side + 0.05 * ppm, y + k * 0.09 * ppm, w / 2 - 0.1 * ppm, max(0.03 * ppm, 1), tone)
    if rng.random() < 0.25:  # flowers
        for _ in range(14):
            centre = (int(x + rng.uniform(0, w)), int(y + h + rng.uniform(-0.25, 0.05) * ppm))
            leaf, bloom = hsv(0.3, 0.7, rng.uniform(0.2, 0.6)), pick_colour(rng, (0.6, 1), (0.4, 0.9))
            colour = bloom if rng.random() < 0.5 else leaf
            cv2.circle(image, centre, max(1, int(rng.uniform(0.03, 0.1) * ppm)), colour, -1, cv2.LINE_AA)


def shop(rng: Rng, image, x: float, y: float, w: float, h: float, ppm: float):
    """Draw one ground-floor unit: a shop front with a sign, a door, posters or a roller shutter."""
    kind = rng.choice(4, p=(0.45, 0.2, 0.25, 0.1))
    colour = pick_colour(rng, (0.2, 0.8), (0.15, 0.7))
    if kind == 0:
        box(image, x, y, w, h, colour)
        sign_h = rng.uniform(0.45, 0.8) * ppm
        back = pick_colour(rng, (0.3, 0.95), (0.1, 0.9))
        front = tuple(255 - c if abs(c - 128) > 40 else (c + 128) % 256 for c in back)
        box(image, x, y, w, sign_h, back)
        text = words(rng, 4, 10)
        write(rng, image, x + 0.1 * w, y + 0.75 * sign_h, text, min(0.6 * sign_h, 1.3 * w / len(text)), front)
        for _ in range(rng.integers(1, 4)):
            at = (x + w * rng.uniform(0, 0.8), y + sign_h * rng.uniform(0.3, 1))
            write(rng, image, *at, words(rng), 0.14 * ppm, front)
        glass_y, glass_h = y + sign_h + 0.15 * ppm, h - sign_h - rng.uniform(0.4, 0.8) * ppm
        parts = rng.integers(2, 5)
        for k in range(parts):
            gw, gh = int(w / parts - 0.12 * ppm), int(glass_h)
            if gw > 3 and gh > 3:
                goods = clutter(rng, gh, gw, ppm, 25)
                shade = np.linspace(rng.uniform(0.5, 0.9), rng.uniform(0.6, 1.1), gh)[:, None, None]
                paste(image, goods * shade, x + k * w / parts + 0.06 * ppm, glass_y, rng.uniform(0.6, 1))
    elif kind == 1:  # door
        dw, dh = min(rng.uniform(1.0, 1.6) * ppm, 0.8 * w), min(rng.uniform(2.1, 2.6) * ppm, h)
        dx, dy = x + (w - dw) * rng.uniform(0.2, 0.8), y + h - dh
        box(
            image,
            dx - 0.12 * ppm,
            dy - 0.12 * ppm,
            dw + 0.24 * ppm,
            dh + 0.12 * ppm,
            np.asarray(colour) * 0.5,
        )
        box(image, dx, dy, dw, dh, colour)
        for r in range(3):
            for c in range(2):
                panel = (dx + dw * (0.08 + 0.46 * c), dy + dh * (0.05 + 0.32 * r), dw * 0.38, dh * 0.26)
                box(image, *panel, np.asarray(colour) * rng.uniform(0.5, 1.4))
        box(image, dx + 0.85 * dw, dy + dh / 2, 0.05 * ppm + 1, 0.15 * ppm + 1, (220, 190, 90))
        write(rng, image, dx + dw * 1.1, dy + 0.3 * dh, str(rng.integers(1, 200)), 0.2 * ppm, (240, 240, 240))
    elif kind == 2:  # posters on the bare wall
        for _ in range(rng.integers(2, 9)):
            pw, ph = rng.uniform(0.35, 1.1) * ppm, rng.uniform(0.4, 1.4) * ppm
            poster = clutter(rng, max(int(ph), 2), max(int(pw), 2), ppm * 1.8, 30)
            paste(image, poster, x + rng.uniform(0, max(w - pw, 1)), y + rng.uniform(0.2, 0.8) * max(h - ph, 1))
        graffiti(rng, image, x, y, w, h, ppm)
    else:  # roller shutter, sprayed
        box(image, x + 0.1 * w, y + 0.15 * h, 0.8 * w, 0.85 * h, colour)
        for k in range(int(0.85 * h / max(0.1 * ppm, 2))):
            tone = np.asarray(colour) * rng.uniform(0.6, 0.9)
            box(image, x + 0.1 * w, y + 0.15 * h + k * 0.1 * ppm, 0.8 * w, max(0.03 * ppm, 1), tone)
        graffiti(rng, image, x, y, w, h, ppm)


def graffiti(rng: Rng, image, x: float, y: float, w: float, h: float, ppm: float):
    """Spray a few curves and letters."""
    for _ in range(rng.integers(1, 4)):
        colour = pick_colour(rng, (0.3, 1), (0.05, 0.95))
        steps = np.cumsum(rng.normal(0, 0.22 * ppm, (rng.integers(5, 16), 2)), 0)
        points = steps + (x + rng.uniform(0.1, 0.9) * w, y + rng.uniform(0.4, 0.9) * h)
        cv2.polylines(
            image, [points.astype(np.int32)], False, colour, max(1, int(rng.uniform(0.02, 0.07) * ppm)), cv2.LINE_AA
        )
        write(
            rng,
            image,
            x + rng.uniform(0, 0.6) * w,
            y + rng.uniform(0.5, 0.9) * h,
            words(rng),
            0.5 * ppm,
            colour,
        )


def weather(rng: Rng, image, ppm: float):
    """Stain, streak and darken a wall towards the ground; float32 in, uint8 out."""
    height, width = image.shape[:2]
    stains = 1 + 0.10 * fractal(rng, height, width, ppm, 4.0, 0.75)
    streaks = cv2.GaussianBlur(rng.standard_normal((1, width)).astype(np.float32), (0, 0), max(0.06 * ppm, 0.5))
    fade = np.linspace(0, 1, height, dtype=np.float32)[:, None] ** rng.uniform(0.5, 2)
    stains += rng.uniform(0.05, 0.25) * streaks * fade
    foot = np.clip((height - np.arange(height, dtype=np.float32)) / (0.9 * ppm), 0, 1)[:, None]
    stains *= 0.72 + 0.28 * foot
    return np.clip(image * stains[..., None], 0, 255).astype(np.uint8)


def texels(width_m: float, height_m: float, ppm: float) -> tuple[int, int]:
    return max(int(round(height_m * ppm)), 2), max(int(round(width_m * ppm)), 2)


def facade(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint the street side of a building: material, floors of windows, shops and doors at the ground."""
    height, width = texels(width_m, height_m, ppm)
    colour = hsv(rng.choice(look.hues) + rng.normal(0, 0.02), rng.uniform(*look.saturation), rng.uniform(*look.value))
    image = np.clip(material(rng, height, width, ppm, rng.choice(look.materials), colour), 0, 255).astype(np.uint8)
    trim = tuple(np.clip(np.asarray(colour) * rng.uniform(0.5, 1.6) + rng.uniform(0, 40), 0, 255))
    shutter = pick_colour(rng, (0.2, 0.7), (0.2, 0.6)) if rng.random() < look.shutters else None
    style = (pick_colour(rng, (0, 0.3), (0.1, 0.95)), trim, shutter)
    goods = clutter(rng, max(int(3 * ppm), 4), max(int(3 * ppm), 4), ppm, 20, (0, 0.5))
    ground_m, floor_m = rng.uniform(3.2, 4.2), rng.uniform(2.7, 3.4)
    pitch = rng.uniform(1.9, 3.2)
    ww, wh = pitch * rng.uniform(0.32, 0.5), floor_m * rng.uniform(0.42, 0.62)
    columns = max(int(width_m / pitch), 1)
    top = height_m - ground_m
    for floor in range(int(top / floor_m)):
        y = (top - (floor + 1) * floor_m + 0.25 * (floor_m - wh)) * ppm
        if rng.random() < 0.6:
            box(image, 0, y + (wh + 0.6) * ppm, width, rng.uniform(0.08, 0.25) * ppm + 1, trim)
        for column in range(columns):
            if rng.random() < 0.93:
                x = (width_m * (column + 0.5) / columns - ww / 2 + rng.normal(0, 0.03)) * ppm
                window(rng, image, x, y, ww * ppm, wh * ppm, ppm, style, goods)
    box(image, 0, 0, width, rng.uniform(0.3, 0.7) * ppm, trim)  # cornice
    for k in range(int(width_m / 0.4)):
        box(image, k * 0.4 * ppm, 0.1 * ppm, 0.2 * ppm, 0.25 * ppm, np.asarray(trim) * rng.uniform(0.5, 0.8))
    x = 0.0
    while x < width_m - 0.5:
        unit = min(rng.uniform(2.2, 5.0), width_m - x)
        shop(rng, image, x * ppm, top * ppm + 0.35 * ppm, unit * ppm, (ground_m - 0.35) * ppm, ppm)
        x += unit
    if rng.random() < 0.6:  # drain pipe
        box(image, rng.uniform(0, width), 0, 0.1 * ppm + 1, height, np.asarray(trim) * rng.uniform(0.3, 0.8))
    for _ in range(rng.integers(0, 3)):  # cables
        y = np.sort(rng.uniform(0.2, 0.8, 2)) * height
        points = np.linspace(0, 1, 12)[:, None] * (width, y[1] - y[0]) + (0, y[0])
        points[:, 1] += 0.3 * ppm * np.sin(np.linspace(0, np.pi, 12))
        cv2.polylines(image, [points.astype(np.int32)], False, (25, 25, 25), max(1, int(0.03 * ppm)), cv2.LINE_AA)
    return weather(rng, image.astype(np.float32), ppm)


def wall(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint the side or the back of a building: few windows, an old advertisement, graffiti."""
    height, width = texels(width_m, height_m, ppm)
    colour = hsv(rng.choice(look.hues), rng.uniform(*look.saturation), rng.uniform(*look.value))
    image = np.clip(material(rng, height, width, ppm, rng.choice(look.materials), colour), 0, 255).astype(np.uint8)
    goods = clutter(rng, max(int(2 * ppm), 4), max(int(2 * ppm), 4), ppm, 20, (0, 0.5))
    for _ in range(rng.integers(1, 6)):
        x, y = rng.uniform(0.05, 0.8) * width, rng.uniform(0.05, 0.6) * height
        window(rng, image, x, y, 0.8 * ppm, 1.2 * ppm, ppm, (colour, colour, None), goods)
    if rng.random() < 0.5:
        advert = clutter(rng, max(int(0.3 * height), 2), max(int(0.6 * width), 2), ppm, 8).astype(np.float32)
        y, x = int(0.3 * height), int(0.2 * width)
        patch = image[y : y + advert.shape[0], x : x + advert.shape[1]]
        patch[:] = 0.5 * patch + 0.5 * advert[: patch.shape[0], : patch.shape[1]]
    graffiti(rng, image, 0, height - 3 * ppm, width, 3 * ppm, ppm)
    return weather(rng, image.astype(np.float32), ppm)


def ground(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint a square of street: asphalt, cobbles or flags, with patches, cracks, covers, leaves and litter."""
    height, width = texels(width_m, height_m, ppm)
    colour = np.asarray(hsv(look.ground_hue, 0.12, look.ground_value))
    if look.ground == "asphalt":
        image = np.broadcast_to(np.asarray(colour, np.float32), (height, width, 3)).copy()
        image *= 1 + 0.12 * fractal(rng, height, width, ppm, 0.25, 1.1)[..., None]
    else:
        row_m, col_m = (0.14, 0.16) if look.ground == "cobbles" else (0.5, 0.7)
        image = masonry(rng, height, width, ppm, row_m, col_m, colour, 0.13, 0.55, 0.015)
        image *= 1 + 0.08 * fractal(rng, height, width, ppm, 0.2, 1.0)[..., None]
    for _ in range(rng.integers(1, 5)):  # mended places
        w, h = rng.uniform(0.4, 2.5, 2) * ppm
        x, y = rng.uniform(0, 1, 2) * (width, height)
        patch = image[int(y) : int(y + h), int(x) : int(x + w)]
        patch[:] = colour * rng.uniform(0.5, 1.3) * (0.75 + 0.25 * patch.mean(2, keepdims=True) / max(colour.mean(), 1))
    for _ in range(rng.integers(3, 9)):  # cracks
        steps = np.cumsum(rng.normal(0, 0.25 * ppm, (12, 2)) + rng.normal(0, 0.2 * ppm, 2), 0)
        points = (steps + rng.uniform(0, 1, 2) * (width, height)).astype(np.int32)
        cv2.polylines(
            image, [points], False, shade(colour, rng.uniform(0.3, 0.6)), max(1, int(0.02 * ppm)), cv2.LINE_AA
        )
    if rng.random() < 0.35:  # manhole cover
        centre = (int(rng.uniform(0.2, 0.8) * width), int(rng.uniform(0.2, 0.8) * height))
        radius, line = rng.uniform(0.25, 0.4) * ppm, max(1, int(0.03 * ppm))
        cv2.circle(image, centre, int(radius) + 1, shade(colour, 0.45), -1, cv2.LINE_AA)
        for ring in np.linspace(0.2, 0.9, 4):
            cv2.circle(image, centre, int(ring * radius), shade(colour, 0.8), line, cv2.LINE_AA)
    for _ in range(int(rng.uniform(1, 6) * width_m * height_m)):  # leaves, gum, litter
        centre = (rng.uniform(0, width), rng.uniform(0, height))
        a, b = np.exp(rng.uniform(np.log(0.015), np.log(0.12), 2)) * ppm + 1
        tone = pick_colour(rng, (0.0, 0.5), (0.1, 0.85))
        cv2.ellipse(image, (centre, (float(a), float(b)), rng.uniform(0, 180)), tone, -1, cv2.LINE_AA)
    image *= 1 + 0.05 * fractal(rng, height, width, ppm, 0.8, 0.7)[..., None]
    return np.clip(image, 0, 255).astype(np.uint8)


def sign(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint a shop sign, a banner or a poster wall."""
    height, width = texels(width_m, height_m, ppm)
    image = clutter(rng, height, width, ppm, 22)
    text = words(rng, 3, 8)
    size = min(0.5 * height, 1.2 * width / len(text))
    front = pick_colour(rng, (0, 1), (0.7, 1))
    box(image, 0, 0.28 * height, width, 0.44 * height, tuple(255 - c for c in front))
    write(rng, image, 0.05 * width, 0.62 * height, text, size, front)
    return weather(rng, image.astype(np.float32), ppm)


def awning(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint striped cloth with a word on it."""
    height, width = texels(width_m, height_m, ppm)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = pick_colour(rng, (0, 0.9), (0.4, 0.95))
    stripe = rng.uniform(0.12, 0.4) * ppm
    other = pick_colour(rng, (0, 0.9), (0.2, 0.95))
    for k in range(0, int(width / stripe) + 1, 2):
        box(image, k * stripe, 0, stripe, height, np.asarray(other) * rng.uniform(0.75, 1.1))
    write(
        rng,
        image,
        0.2 * width,
        0.8 * height,
        words(rng, 4, 9),
        0.4 * height,
        pick_colour(rng, (0, 0.5), (0, 1)),
    )
    return weather(rng, image.astype(np.float32), ppm)


def crate(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint one side of a box: planks, posters or painted sheet metal with labels."""
    height, width = texels(width_m, height_m, ppm)
    if rng.random() < 0.4:
        return weather(rng, clutter(rng, height, width, ppm * 1.3, 25).astype(np.float32), ppm)
    image = masonry(rng, height, width, ppm, 0.16, 1.2, pick_colour(rng, (0.1, 0.7), (0.3, 0.8)), 0.15, 0.5)
    image *= 1 + 0.12 * fractal(rng, height, width, ppm, 0.3, 0.9)[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(1, 5)):
        label = clutter(rng, max(int(0.3 * ppm), 2), max(int(0.4 * ppm), 2), ppm * 2, 30)
        paste(image, label, rng.uniform(0, 0.8) * width, rng.uniform(0, 0.8) * height)
    return weather(rng, image.astype(np.float32), ppm)


def car(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint the side of a parked car: sheet metal, trims, stickers."""
    height, width = texels(width_m, height_m, ppm)
    colour = pick_colour(rng, (0, 0.9), (0.2, 0.9))
    image = np.broadcast_to(np.asarray(colour, np.float32), (height, width, 3)).copy()
    image *= np.linspace(1.15, 0.6, height, dtype=np.float32)[:, None, None]
    image *= 1 + 0.06 * fractal(rng, height, width, ppm, 1.0, 0.8)[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for x in (0.2, 0.8):
        centre = (int(x * width), height)
        cv2.circle(image, centre, int(0.33 * ppm), (20, 20, 20), -1, cv2.LINE_AA)
        cv2.circle(image, centre, int(0.2 * ppm), (150, 150, 150), -1, cv2.LINE_AA)
    for x in (0.35, 0.62):
        box(image, x * width, 0, max(0.02 * ppm, 1), 0.85 * height, (30, 30, 30))
        box(image, (x + 0.05) * width, 0.25 * height, 0.18 * ppm, 0.05 * ppm + 1, (30, 30, 30))
    box(image, 0, 0.6 * height, width, 0.06 * ppm + 1, (40, 40, 40))
    for x in (0.01, 0.95):
        box(image, x * width, 0.3 * height, 0.05 * width, 0.2 * height, pick_colour(rng, (0.3, 1), (0.7, 1)))
    write(rng, image, 0.4 * width, 0.5 * height, words(rng), 0.2 * ppm, pick_colour(rng))
    return image


def glass(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint the cabin of a car: dark panes with reflections."""
    height, width = texels(width_m, height_m, ppm)
    image = 45 + 22 * fractal(rng, height, width, ppm, 0.8, 0.7)[..., None] * np.array([0.8, 1.0, 1.1], np.float32)
    image = np.clip(image, 0, 255).astype(np.uint8)
    for x in (0.0, 0.48, 0.97):
        box(image, x * width, 0, 0.06 * ppm + 1, height, (150, 150, 150))
    return image


def person(rng: Rng, width_m: float, height_m: float, ppm: float, look):
    """Paint a walker: RGBA, alpha 255 on the body, 0 around it."""
    height, width = texels(width_m, height_m, ppm)
    image, alpha = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8)
    shirt = clutter(rng, height, width, ppm, 20)
    trousers = pick_colour(rng, (0, 0.6), (0.1, 0.6))
    skin = hsv(0.07, rng.uniform(0.25, 0.6), rng.uniform(0.35, 0.9))
    stride = rng.uniform(0.06, 0.2)
    for side in (-1, 1):
        hip, foot = (
            (int(width * (0.5 + 0.1 * side)), int(0.5 * height)),
            (int(width * (0.5 + side * stride)), height - 2),
        )
        cv2.line(image, hip, foot, trousers, max(1, int(0.17 * ppm)))
        cv2.line(alpha, hip, foot, 255, max(1, int(0.17 * ppm)))
    body = np.zeros_like(alpha)
    cv2.ellipse(body, ((width / 2, 0.36 * height), (0.72 * width, 0.44 * height), 0), 255, -1)
    image[body > 0] = shirt[body > 0]
    cv2.circle(image, (width // 2, int(0.085 * height)), int(0.075 * height), skin, -1)
    cv2.ellipse(
        image,
        (width // 2, int(0.07 * height)),
        (int(0.08 * height), int(0.065 * height)),
        0,
        180,
        360,
        pick_colour(rng),
        -1,
    )
    cv2.circle(body, (width // 2, int(0.085 * height)), int(0.075 * height), 255, -1)
    return np.dstack([image, alpha | body])


PAINTERS = {
    "facade": facade,
    "wall": wall,
    "ground": ground,
    "sign": sign,
    "awning": awning,
    "crate": crate,
    "car": car,
    "glass": glass,
}
