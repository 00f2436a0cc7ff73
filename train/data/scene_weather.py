"""Time of day and weather of a drawn scene: what they do to the light, and to the finished picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.train.data.scene_camera import Camera, Points
from parkdet.train.data.scene_lot import GroundLook
from parkdet.train.data.scene_shapes import Colour, Light

_GRAIN_SIDE = 1280
_GRAIN_SPARE = 256
_UNIT = 200.0
"""Full light in the one-byte map of lights."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    time: str
    """day, dusk or night."""
    weather: str
    """clear, cloudy or rain."""
    light: Light
    look: GroundLook
    shadow: float
    """How dark the shadow is that the sun or the lamps cast, 0 to 1."""
    ambient: Colour
    """Factors on the whole picture away from lamps."""
    noise: float
    """Standard deviation of the sensor's noise, grey levels."""
    blur: float
    """Of the lens, pixels of an image 960 wide."""
    jpeg_quality: int
    """The picture went through JPEG of this quality; 0 for none."""
    stamp: str
    """Text in a corner, as recorders write it; may be empty."""

    @property
    def dark(self) -> bool:
        return self.time == "night"

    @property
    def headlights(self) -> bool:
        return self.time != "day"

    @property
    def wet(self) -> bool:
        return self.weather == "rain"


def plan_conditions(rng: np.random.Generator) -> Conditions:
    """Day more often than dusk and night, dry more often than rain."""
    time = ("day", "dusk", "night")[int(rng.choice(3, p=(0.6, 0.15, 0.25)))]
    weather = ("clear", "cloudy", "rain")[int(rng.choice(3, p=(0.45, 0.32, 0.23)))]
    turn, rise = rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(32, 62))
    if time == "dusk":
        rise = np.deg2rad(rng.uniform(18, 26))
    if time == "night" or weather != "clear":
        rise = np.deg2rad(80)
    towards = np.array([np.cos(turn) * np.cos(rise), np.sin(turn) * np.cos(rise), np.sin(rise)])
    sunny = weather == "clear" and time != "night"
    ambient, direct = (0.58, 0.55) if sunny else (0.78, 0.26)
    tint: Colour = (1.0, 1.0, 1.0)
    sky: Colour = (225, 205, 185) if weather == "clear" else (205, 203, 200)
    top, low = ((222, 176, 122), (238, 222, 204)) if weather == "clear" else ((196, 194, 190), (214, 213, 211))
    overall: Colour = (1.0, 1.0, 1.0)
    if weather == "rain":
        overall = (0.86, 0.84, 0.82)
    if time == "dusk":
        tint, sky = (0.84, 0.94, 1.06), (150, 160, 200)
        top, low = (150, 112, 96), (120, 158, 224)
        overall = (0.74, 0.70, 0.74)
    if time == "night":
        sky, top, low = (70, 62, 56), (42, 32, 26), (66, 56, 52)
        level = float(rng.uniform(0.34, 0.46))
        overall = (level * 1.1, level, level * 0.9)
    tone = float(rng.uniform(0.95, 1.3)) * (0.7 if weather == "rain" else 1.0)
    cast = float(rng.uniform(0.97, 1.03))
    asphalt: Colour = (tone * 1.02, tone, tone / 1.01 * cast)
    grass = rng.random() < 0.6
    verge: Colour = (0.42 * tone, 0.78 * tone, 0.52 * tone) if grass else (1.32 * tone, 1.36 * tone, 1.4 * tone)
    stamp = ""
    if rng.random() < 0.5:
        date = f"2020-{rng.integers(9, 13):02d}-{rng.integers(1, 29):02d}"
        hour = rng.integers(*{"day": (8, 17), "dusk": (17, 19), "night": (19, 24)}[time])
        stamp = f"{date} {hour:02d}:{rng.integers(60):02d}:{rng.integers(60):02d}  CAM {rng.integers(1, 17):02d}"
    return Conditions(
        time,
        weather,
        Light(np.asarray(towards, np.float64), ambient, direct, sky, tint),
        GroundLook(asphalt, verge, top, low, float(rng.uniform(0.1, 0.6))),
        0.5 if sunny else 0.22,
        overall,
        float(rng.uniform(4.0, 8.0) if time == "night" else rng.uniform(1.0, 4.0)),
        float(rng.uniform(0.0, 0.8)),
        int(rng.integers(55, 90)) if rng.random() < 0.35 else 0,
        stamp,
    )


@dataclass(frozen=True, slots=True)
class Glow:
    """A source of light in the image: pixels, and the radius of its halo."""

    x: float
    y: float
    radius: float
    colour: Colour


def lit_picture(
    picture: ImageArray, camera: Camera, conditions: Conditions, pools: Sequence[Points], glows: Sequence[Glow]
) -> ImageArray:
    """The picture under the general light, ground outlines (N, 2) lit by lamps, and halos of the sources."""
    import cv2

    height, width = camera.size_hw
    small_h, small_w = -(-height // 8), -(-width // 8)
    light = np.empty((small_h, small_w, 3), np.float32)
    light[:] = np.array(conditions.ambient, np.float32)
    if pools:
        lamps = np.zeros((small_h, small_w), np.float32)
        for pool in pools:
            piece = np.zeros((small_h, small_w), np.uint8)
            cv2.fillPoly(piece, [np.rint(np.clip(pool / 8, -4000, 4000) * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
            lamps += cv2.GaussianBlur(piece, (0, 0), small_w / 22).astype(np.float32) / 255
        room = np.array((0.82, 0.96, 1.06), np.float32) - light
        light += (1 - np.exp(-1.1 * lamps))[..., None] * np.maximum(room, 0)
    light *= _vignette(small_h, small_w)
    coarse = np.clip(light * _UNIT, 0, 255).astype(np.uint8)
    factors = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
    lit = cv2.multiply(picture, factors, scale=1 / _UNIT)
    if glows:
        lit = cv2.add(lit, _halos(camera.size_hw, glows))
    return np.asarray(lit, np.uint8)


@lru_cache(maxsize=4)
def _vignette(height: int, width: int) -> FloatArray:
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    away = ((x / max(width - 1, 1) - 0.5) ** 2 + (y / max(height - 1, 1) - 0.5) ** 2)[..., None]
    return np.asarray(1 - 0.3 * away, np.float32)


def _halos(size_hw: tuple[int, int], glows: Sequence[Glow]) -> ImageArray:
    import cv2

    height, width = size_hw
    quarter = np.zeros((-(-height // 4), -(-width // 4), 3), np.uint8)
    for glow in glows:
        centre = (round(glow.x / 4 * 16), round(glow.y / 4 * 16))
        if max(abs(centre[0]), abs(centre[1])) > 1 << 16:
            continue
        faint = tuple(0.5 * channel for channel in glow.colour)
        cv2.circle(quarter, centre, max(round(glow.radius / 4 * 16), 16), faint, -1, cv2.LINE_AA, 4)
        cv2.circle(quarter, centre, max(round(glow.radius / 10 * 16), 12), glow.colour, -1, cv2.LINE_AA, 4)
    soft = cv2.GaussianBlur(quarter, (0, 0), width / 350)
    return np.asarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def with_rain(rng: np.random.Generator, picture: ImageArray) -> ImageArray:
    """Streaks that fall aslant, and the veil of the rain."""
    import cv2

    height, width = picture.shape[:2]
    veil = np.zeros((height, width), np.uint8)
    count = int(rng.integers(250, 650))
    slant = float(rng.uniform(-0.25, 0.25))
    starts = rng.uniform((0, -20), (width, height), (count, 2))
    lengths = rng.uniform(0.01, 0.035, count) * width
    ends = starts + np.column_stack([slant * lengths, lengths])
    lines = np.rint(np.stack([starts, ends], axis=1) * 16).astype(np.int32)
    cv2.polylines(veil, list(lines), False, 58, 1, cv2.LINE_AA, 4)
    soft = cv2.blur(veil, (1, 3))
    hazy = cv2.convertScaleAbs(picture, None, 0.9, 14.0)
    return np.asarray(cv2.add(hazy, cv2.merge([soft, soft, soft])), np.uint8)


@lru_cache(maxsize=1)
def _grain() -> FloatArray:
    """Noise of standard deviation 1, slightly smooth as a camera's own noise reduction leaves it."""
    import cv2

    rng = np.random.Generator(np.random.PCG64(1))
    rough = rng.standard_normal((_GRAIN_SIDE, _GRAIN_SIDE), dtype=np.float32)
    smooth = cv2.GaussianBlur(rough, (0, 0), 0.6)
    return np.asarray(smooth / smooth.std(), np.float32)


def as_recorded(rng: np.random.Generator, picture: ImageArray, conditions: Conditions) -> ImageArray:
    """What the lens, the sensor and the recorder make of the picture."""
    import cv2

    height, width = picture.shape[:2]
    recorded = picture
    sigma = conditions.blur * width / 960
    if sigma > 0.25:
        recorded = np.asarray(cv2.GaussianBlur(recorded, (0, 0), sigma), np.uint8)
    noise = _noise(rng, (height, width), conditions.noise)
    recorded = np.asarray(cv2.add(recorded, cv2.merge([noise, noise, noise]), dtype=cv2.CV_8U), np.uint8)
    if conditions.stamp:
        _write_stamp(recorded, conditions.stamp)
    if conditions.jpeg_quality:
        _, coded = cv2.imencode(".jpg", recorded, [cv2.IMWRITE_JPEG_QUALITY, conditions.jpeg_quality])
        recorded = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return recorded


def _noise(rng: np.random.Generator, size_hw: tuple[int, int], sigma: float) -> NDArray[np.int16]:
    grain = _grain()
    top, left = (int(value) for value in rng.integers(0, _GRAIN_SPARE, 2))
    grain = grain[top:, left:] if min(grain.shape) > max(size_hw) + _GRAIN_SPARE else _tiled(grain, size_hw)
    return np.asarray(np.rint(grain[: size_hw[0], : size_hw[1]] * np.float32(sigma)), np.int16)


def _tiled(grain: FloatArray, size_hw: tuple[int, int]) -> FloatArray:
    return np.tile(grain, (-(-size_hw[0] // len(grain)), -(-size_hw[1] // len(grain))))


def _write_stamp(picture: ImageArray, text: str) -> None:
    import cv2

    scale = picture.shape[1] / 960 * 0.55
    spot = (round(picture.shape[1] * 0.012), round(picture.shape[1] * 0.024))
    for colour, width in (((20, 20, 20), 3), ((240, 240, 240), 1)):
        cv2.putText(picture, text, spot, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, width, cv2.LINE_AA)
