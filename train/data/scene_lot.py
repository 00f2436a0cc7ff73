"""The parking lot of a drawn scene: where its rows, aisles and edges are, and what is painted on its ground.

World frame as in scene_camera: the rows run along x, the camera's side is y = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import ImageArray
from parkdet.train.data.scene_camera import NEAR_M, Camera, Points
from parkdet.train.data.scene_shapes import Colour

_TEXELS_PER_M = 24
_TEXTURE_M = (64, 56)
"""Width and height of the ground that the texture covers; mirrored beyond."""
_TEXTURE_ORIGIN = (-32.0, -12.0)
_SPARE_TEXELS = 256
LINE_WIDTH_M = 0.13


@dataclass(frozen=True, slots=True)
class BayRow:
    """A row of bays between y = low and y = high; the kerb or the row behind is at `head`."""

    low: float
    high: float
    head: float


@dataclass(frozen=True, slots=True)
class GroundPaint:
    """One painted polygon on the ground, metres."""

    corners: tuple[tuple[float, float], ...]
    colour: Colour


@dataclass(frozen=True, slots=True)
class Lot:
    x: tuple[float, float]
    """Edges at the left and right."""
    far: float
    """Edge at the far side; the near edge is y = 0."""
    rows: tuple[BayRow, ...]
    aisles: tuple[tuple[float, float], ...]
    bus_lane: tuple[float, float]
    """A strip along the far edge without bays."""
    bay_width: float
    line_colour: Colour
    closed_bays: tuple[tuple[int, int], ...]
    """(row, bay) that are hatched: nobody parks there."""
    marked_bays: tuple[tuple[int, int], ...]
    """(row, bay) painted blue: for disabled drivers."""

    def bay_edges(self) -> NDArray[np.float64]:
        """x of the lines between bays."""
        return np.arange(self.x[0] + 2.5, self.x[1] - 2.5 + 1e-6, self.bay_width)


def plan_lot(rng: np.random.Generator, x: tuple[float, float]) -> Lot:
    """A lot with one row at the near side and one or two more across the aisle."""
    depth, aisle = rng.uniform(4.9, 5.2), rng.uniform(6.2, 7.4)
    second = depth + aisle
    rows = [BayRow(0.0, depth, 0.0), BayRow(second, second + depth, second + depth)]
    aisles = [(depth, second)]
    end = second + depth
    if rng.random() < 0.35:
        rows.append(BayRow(end, end + depth, end))
        end += depth
        aisles.append((end, end + 6.0))
        end += 6.0
        lane = (end - 3.4, end)
    else:
        lane = (end + 0.4, end + 3.8)
        end += 4.0
    bay_width = rng.uniform(2.45, 2.65)
    bays = int((x[1] - x[0] - 5) / bay_width)
    picks = [(int(rng.integers(len(rows))), int(rng.integers(bays))) for _ in range(5)]
    yellow = rng.random() < 0.2
    return Lot(
        x,
        end,
        tuple(rows),
        tuple(aisles),
        lane,
        float(bay_width),
        (70, 190, 225) if yellow else (222, 224, 224),
        tuple(picks[:3]) if rng.random() < 0.7 else (),
        tuple(picks[3:]) if rng.random() < 0.7 else (),
    )


def markings(lot: Lot) -> list[GroundPaint]:
    """Everything painted on the asphalt: bay lines, arrows, hatched and blue bays, a crossing."""
    white: Colour = (222, 224, 224)
    edges = lot.bay_edges()
    paint: list[GroundPaint] = []
    for number, row in enumerate(lot.rows):
        for bay in range(len(edges) - 1):
            if (number, bay) in lot.marked_bays and (number, bay) not in lot.closed_bays:
                paint.append(_rectangle(edges[bay], edges[bay + 1], row.low, row.high, (150, 96, 44)))
                paint.extend(_wheelchair(edges[bay] + lot.bay_width / 2, (row.low + row.high) / 2, white))
            elif (number, bay) in lot.closed_bays:
                paint.extend(_hatching(edges[bay], edges[bay + 1], row.low, row.high))
        half = LINE_WIDTH_M / 2
        paint.extend(_rectangle(x - half, x + half, row.low, row.high, lot.line_colour) for x in edges)
        paint.append(_rectangle(edges[0], edges[-1], row.head - half, row.head + half, lot.line_colour))
    for number, (low, high) in enumerate(lot.aisles):
        quarter = (high - low) / 4
        for x in np.arange(lot.x[0] + 4.0 + 3 * number, lot.x[1] - 4, 9.0):
            paint.extend(_arrow(float(x), low + quarter, 1.0, white))
            paint.extend(_arrow(float(x) + 4.0, high - quarter, -1.0, white))
    crossing = lot.x[1] - 9.0
    low, high = lot.aisles[0]
    for y in np.arange(low + 0.3, high - 0.5, 0.9):
        paint.append(_rectangle(crossing, crossing + 3.0, float(y), float(y) + 0.45, white))
    start, end = lot.bus_lane
    for x in np.arange(lot.x[0] + 1, lot.x[1] - 2, 1.6):
        paint.append(_rectangle(float(x), float(x) + 0.8, start + 0.05, start + 0.15, (60, 190, 235)))
    paint.append(_rectangle(lot.x[0] + 1, lot.x[1] - 1, end - 0.15, end - 0.05, (60, 190, 235)))
    return paint


def _rectangle(x0: float, x1: float, y0: float, y1: float, colour: Colour) -> GroundPaint:
    return GroundPaint(((x0, y0), (x1, y0), (x1, y1), (x0, y1)), colour)


def _hatching(x0: float, x1: float, y0: float, y1: float) -> list[GroundPaint]:
    yellow: Colour = (60, 190, 235)
    stripes = []
    for y in np.arange(y0 + 0.2, y1 - 1.5, 0.9):
        stripes.append(
            GroundPaint(((x0 + 0.2, y), (x1 - 0.2, y + 1.2), (x1 - 0.2, y + 1.45), (x0 + 0.2, y + 0.25)), yellow)
        )
    return stripes


def _arrow(x: float, y: float, direction: float, colour: Colour) -> list[GroundPaint]:
    d = direction
    shaft = GroundPaint(((x, y - 0.1), (x + d * 1.5, y - 0.1), (x + d * 1.5, y + 0.1), (x, y + 0.1)), colour)
    head = GroundPaint(((x + d * 1.4, y - 0.42), (x + d * 2.5, y), (x + d * 1.4, y + 0.42)), colour)
    return [shaft, head]


def _wheelchair(x: float, y: float, colour: Colour) -> list[GroundPaint]:
    """The sign of the wheelchair, simplified: a ring, a back, a seat and a head."""
    angles = np.linspace(np.deg2rad(150), np.deg2rad(400), 12)
    outer = [(x + 0.55 * float(np.cos(a)), y - 0.35 + 0.55 * float(np.sin(a))) for a in angles]
    inner = [(x + 0.38 * float(np.cos(a)), y - 0.35 + 0.38 * float(np.sin(a))) for a in angles[::-1]]
    turn = np.linspace(0, 2 * np.pi, 9)[:-1]
    head = tuple((x - 0.15 + 0.2 * float(np.cos(a)), y + 1.0 + 0.2 * float(np.sin(a))) for a in turn)
    return [
        GroundPaint((*outer, *inner), colour),
        _rectangle(x - 0.25, x - 0.05, y - 0.2, y + 0.75, colour),
        _rectangle(x - 0.25, x + 0.45, y - 0.25, y - 0.05, colour),
        GroundPaint(head, colour),
    ]


@lru_cache(maxsize=1)
def _asphalt() -> ImageArray:
    """Grey levels of a large piece of asphalt, the same in every process: fine grain on broad patches."""
    import cv2

    rng = np.random.Generator(np.random.PCG64(20201102))
    width = _TEXTURE_M[0] * _TEXELS_PER_M + _SPARE_TEXELS
    height = _TEXTURE_M[1] * _TEXELS_PER_M + _SPARE_TEXELS
    tone = np.full((height, width), 112, np.float32)
    for cells, weight in ((6, 7.0), (24, 6.0), (96, 5.0), (400, 5.0)):
        coarse = rng.standard_normal((cells, cells)).astype(np.float32)
        tone += weight * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    tone += 7.0 * rng.standard_normal((height, width), dtype=np.float32)
    return np.clip(tone, 0, 255).astype(np.uint8)


def _ground_tones(rng: np.random.Generator, lot: Lot) -> ImageArray:
    """A top view of the ground's grey levels, with what years of parking left on it."""
    import cv2

    width, height = (side * _TEXELS_PER_M for side in _TEXTURE_M)
    left, top = (int(value) for value in rng.integers(0, _SPARE_TEXELS, 2))
    tones = np.ascontiguousarray(_asphalt()[top : top + height, left : left + width])

    def texel(x: float, y: float) -> tuple[int, int]:
        return (
            round((x - _TEXTURE_ORIGIN[0]) * _TEXELS_PER_M),
            round((y - _TEXTURE_ORIGIN[1]) * _TEXELS_PER_M),
        )

    for _ in range(int(rng.integers(1, 5))):  # patches of newer or older asphalt
        x, y = rng.uniform(lot.x[0], lot.x[1]), rng.uniform(1, lot.far)
        w, h = rng.uniform(1.5, 7.0), rng.uniform(1.0, 3.0)
        (x0, y0), (x1, y1) = texel(x, y), texel(x + w, y + h)
        piece = tones[max(y0, 0) : y1, max(x0, 0) : x1]
        if piece.size:
            cv2.convertScaleAbs(piece, piece, 1.0, float(rng.uniform(-16, 10)))
    low, high = lot.aisles[0]
    for y in (low + 1.0, low + 2.4, high - 2.4, high - 1.0):  # where tyres run
        y0, y1 = texel(0, y)[1], texel(0, y + 0.4)[1]
        cv2.convertScaleAbs(tones[y0:y1], tones[y0:y1], 1.0, -7.0)
    for _ in range(int(rng.integers(8, 26))):  # oil below engines
        row = lot.rows[int(rng.integers(len(lot.rows)))]
        centre = texel(rng.uniform(*lot.x), rng.uniform(row.low + 1, row.high - 0.5))
        axes = (int(rng.integers(4, 16)), int(rng.integers(3, 12)))
        level = int(rng.integers(60, 92))
        cv2.ellipse(tones, centre, axes, float(rng.uniform(0, 180)), 0, 360, level, -1, cv2.LINE_AA)
    for _ in range(int(rng.integers(3, 9))):  # cracks, some of them sealed with tar
        point = np.array([rng.uniform(*lot.x), rng.uniform(1, lot.far - 1)])
        turn = rng.uniform(0, 2 * np.pi)
        track = [texel(*point)]
        for _ in range(int(rng.integers(6, 22))):
            turn += rng.normal(0, 0.45)
            point = point + rng.uniform(0.2, 0.6) * np.array([np.cos(turn), np.sin(turn)])
            track.append(texel(*point))
        cv2.polylines(
            tones, [np.array(track, np.int32)], False, int(rng.integers(42, 74)), int(rng.integers(1, 4)), cv2.LINE_AA
        )
    return tones


@dataclass(frozen=True, slots=True)
class GroundLook:
    asphalt: Colour
    """Factors a channel on the grey level."""
    verge: Colour
    """The same outside the lot: grass or paving."""
    sky_top: Colour
    sky_low: Colour
    wear: float
    """Share of the paint that is worn off, 0 to 1."""


def draw_ground(rng: np.random.Generator, camera: Camera, lot: Lot, look: GroundLook, shade: ImageArray) -> ImageArray:
    """The ground and the sky, (H, W, 3): asphalt, paint, verge. `shade` (H, W) darkens: 255 is full light."""
    import cv2

    height, width = camera.size_hw
    tones = _ground_tones(rng, lot)
    scale = 1 / _TEXELS_PER_M
    to_metres = np.array(
        [
            [scale, 0, _TEXTURE_ORIGIN[0] + scale / 2],
            [0, scale, _TEXTURE_ORIGIN[1] + scale / 2],
            [0, 0, 1],
        ]
    )
    to_pixel = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]]) @ camera.ground_to_image() @ to_metres
    seen = np.asarray(
        cv2.warpPerspective(tones, to_pixel, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT),
        np.uint8,
    )
    ground = _tinted(seen, look.asphalt)

    paint_colours = np.empty((height, width, 3), np.uint8)
    paint_colours[:] = np.array(lot.line_colour).astype(np.uint8)
    coverage = np.zeros((height, width), np.uint8)
    for painted in _in_view(camera, markings(lot)):
        outline = camera.outline(np.array([(x, y, 0.0) for x, y in painted.corners]))
        if not len(outline):
            continue
        fixed = np.rint((outline - 0.5) * 16).astype(np.int32)
        cv2.fillPoly(coverage, [fixed], 255, cv2.LINE_AA, 4)
        if painted.colour != lot.line_colour:
            cv2.fillPoly(paint_colours, [fixed], painted.colour, cv2.LINE_8, 4)
            cv2.polylines(paint_colours, [fixed], True, painted.colour, 2, cv2.LINE_8, 4)
    # Paint goes first where the asphalt is coarse, that is dark.
    worn = cv2.LUT(seen, _wear_table(look.wear))
    opacity = cv2.multiply(coverage, worn, scale=1 / 255, dtype=cv2.CV_8U).astype(np.float32) / 255
    painted_ground = cv2.blendLinear(ground, paint_colours, 1 - opacity, opacity)

    inside = np.zeros((height, width), np.uint8)
    edge = [(lot.x[0], 0.0, 0.0), (lot.x[1], 0.0, 0.0), (lot.x[1], lot.far, 0.0), (lot.x[0], lot.far, 0.0)]
    outline = camera.outline(np.array(edge))
    if len(outline):
        cv2.fillPoly(inside, [np.rint((outline - 0.5) * 16).astype(np.int32)], 255, cv2.LINE_8, 4)
    whole = cv2.copyTo(painted_ground, inside, _tinted(seen, look.verge))
    lit = cv2.multiply(whole, cv2.merge([shade, shade, shade]), scale=1 / 255)
    return _with_sky(np.asarray(lit, np.uint8), camera, look)


def _in_view(camera: Camera, painted: list[GroundPaint]) -> list[GroundPaint]:
    """Leave out what lies behind the camera or beside the picture, all at once: most of a lot does."""
    corners = np.array([(x, y, 0.0) for one in painted for x, y in one.corners])
    starts = np.cumsum([0] + [len(one.corners) for one in painted])[:-1]
    viewed = camera.view(corners)
    reach = camera.size_hw[1] / 2 / camera.focal_px * viewed[:, 2]
    beside = np.maximum.reduceat(viewed[:, 0] + reach, starts) < 0
    beside |= np.minimum.reduceat(viewed[:, 0] - reach, starts) > 0
    behind = np.maximum.reduceat(viewed[:, 2], starts) < NEAR_M
    return [one for one, hidden in zip(painted, beside | behind, strict=True) if not hidden]


def _with_sky(ground: ImageArray, camera: Camera, look: GroundLook) -> ImageArray:
    rows = int(np.clip(np.ceil(camera.horizon_row() + 0.02 * camera.size_hw[1]), 0, camera.size_hw[0]))
    if rows:
        share = np.linspace(0, 1, rows)[:, None, None]
        ground[:rows] = (np.array(look.sky_top) * (1 - share) + np.array(look.sky_low) * share).astype(np.uint8)
    return ground


def _tinted(tones: ImageArray, factors: Colour) -> ImageArray:
    import cv2

    levels = np.arange(256)[:, None] * np.array(factors)
    table = np.clip(levels, 0, 255).round().astype(np.uint8).reshape(256, 1, 3)
    return np.asarray(cv2.LUT(cv2.merge([tones, tones, tones]), table), np.uint8)


def _wear_table(wear: float) -> ImageArray:
    levels = np.arange(256, dtype=np.float64)
    kept = np.clip((levels - 112) / 14 + 2.2 - 3.2 * wear, 0.12, 0.95)
    return (kept * 255).round().astype(np.uint8)


def shade_of(camera: Camera, polygons: list[tuple[Points, float]], softness: float) -> ImageArray:
    """(H, W) uint8: 255 in the light, less under each ground polygon (N, 2) by its strength 0 to 1, blurred."""
    import cv2

    height, width = camera.size_hw
    small = np.full(((height + 1) // 2, (width + 1) // 2), 255, np.uint8)
    for polygon, strength in polygons:
        outline = camera.outline(np.column_stack([polygon, np.zeros(len(polygon))]))
        if len(outline):
            level = round(255 * (1 - strength))
            fixed = np.rint((outline / 2 - 0.5) * 16).astype(np.int32)
            fixed = np.clip(fixed, -(1 << 20), 1 << 20)
            cv2.fillPoly(small, [fixed], level, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(small, (0, 0), max(softness * width / 960, 0.5))
    return np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
