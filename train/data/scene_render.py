"""A planned scene becomes a picture and its boxes.

Ground and shadows come first, then everything that stands on them, far things first, on a canvas of twice the
picture's size whose fourth channel holds which object each pixel shows. Boxes and visibility are counted there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import FloatArray, ImageArray
from parkdet.train.data.scene_camera import Camera, Points
from parkdet.train.data.scene_lot import draw_ground, shade_of
from parkdet.train.data.scene_plan import Placed, ScenePlan, plan_scene, share_inside
from parkdet.train.data.scene_shapes import OVERSAMPLING, Light, Pose, paint
from parkdet.train.data.scene_weather import Glow, as_recorded, lit_picture, with_rain

LEAST_VISIBLE = 0.25
"""An object of which less is to be seen, behind others or beyond the image's edge, has no box."""
LEAST_SIDE = 6.0 / 960
"""A box whose longer side is less than this share of the image's width is left out."""


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A picture and its truth."""

    image: ImageArray
    """(H, W, 3) BGR."""
    xyxy: FloatArray
    """(N, 4) tight boxes of what is visible, image pixels, whole or half."""
    class_ids: NDArray[np.int32]
    """(N,) from 0, in the contest's order."""
    time: str
    """day, dusk or night."""
    weather: str
    """clear, cloudy or rain."""


def draw_scene(rng: np.random.Generator, size_hw: tuple[int, int] = (540, 960), *, empty: bool = False) -> Scene:
    """Draw one scene; `empty` leaves the lot without anything that would be labelled."""
    return render(plan_scene(rng, size_hw, empty=empty))


def render(plan: ScenePlan) -> Scene:
    """Paint a planned scene and count its boxes. ValueError when it holds more than 254 things."""
    import cv2

    if len(plan.placed) > 254:
        raise ValueError(f"an id of one byte cannot tell {len(plan.placed)} things apart")
    rng = np.random.Generator(np.random.PCG64(plan.texture_seed))
    canvas, painted = _canvas(rng, plan)
    xyxy, class_ids = _boxes(plan, np.ascontiguousarray(canvas[..., 3]), painted)
    height, width = plan.camera.size_hw
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    picture = np.asarray(cv2.cvtColor(small, cv2.COLOR_BGRA2BGR), np.uint8)
    pools, glows = _lamps(plan)
    picture = lit_picture(picture, plan.camera, plan.conditions, pools, glows)
    if plan.conditions.wet:
        picture = with_rain(rng, picture)
    recorded = as_recorded(rng, picture, plan.conditions)
    return Scene(recorded, xyxy, class_ids, plan.conditions.time, plan.conditions.weather)


def _canvas(rng: np.random.Generator, plan: ScenePlan) -> tuple[ImageArray, list[int]]:
    """The painted canvas, and how many of its pixels each thing had before nearer ones covered it."""
    import cv2

    camera, light = plan.camera, plan.conditions.light
    ground = draw_ground(rng, camera, plan.lot, plan.conditions.look, _shadows(plan))
    if plan.conditions.wet:
        ground = _with_reflections(ground, plan)
    height, width = camera.size_hw
    nothing = np.zeros((height, width), np.uint8)
    size_wh = (width * OVERSAMPLING, height * OVERSAMPLING)
    four = cv2.merge([*cv2.split(ground), nothing])
    canvas = np.asarray(cv2.resize(four, size_wh, interpolation=cv2.INTER_NEAREST), np.uint8)
    if plan.backdrop is not None:
        paint(canvas, plan.backdrop, Pose(0, 0, 0), camera, light, 0)
    painted = []
    for number, thing in enumerate(plan.placed, start=1):
        paint(canvas, thing.shape, thing.pose, camera, light, number)
        left, top, right, bottom = _region(camera, thing)
        painted.append(int(cv2.countNonZero(cv2.inRange(canvas[top:bottom, left:right, 3], number, number))))
    return canvas, painted


def _region(camera: Camera, thing: Placed) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the part of the canvas that a thing may reach; rods are wider than their points."""
    pixels, depth = camera.project(thing.pose.to_world(thing.shape.points))
    spread = 0.3 * camera.focal_px / max(float(depth.min()), 0.5) + 3
    height, width = camera.size_hw
    low = np.clip((pixels.min(0) - spread) * OVERSAMPLING, 0, (width * OVERSAMPLING, height * OVERSAMPLING))
    high = np.clip((pixels.max(0) + spread) * OVERSAMPLING, 0, (width * OVERSAMPLING, height * OVERSAMPLING))
    return int(low[0]), int(low[1]), int(np.ceil(high[0])), int(np.ceil(high[1]))


def _boxes(plan: ScenePlan, ids: NDArray[np.uint8], painted: list[int]) -> tuple[FloatArray, NDArray[np.int32]]:
    import cv2

    boxes, classes = [], []
    least = LEAST_SIDE * plan.camera.size_hw[1]
    for number, (thing, whole) in enumerate(zip(plan.placed, painted, strict=True), start=1):
        if thing.class_id < 0 or not whole:
            continue
        left, top, right, bottom = _region(plan.camera, thing)
        mask = cv2.inRange(ids[top:bottom, left:right], number, number)
        visible = cv2.countNonZero(mask) / whole * share_inside(plan.camera, thing)
        if visible < LEAST_VISIBLE:
            continue
        x, y, w, h = cv2.boundingRect(mask)
        if max(w, h) < least * OVERSAMPLING:
            continue
        boxes.append((left + x, top + y, left + x + w, top + y + h))
        classes.append(thing.class_id)
    xyxy = np.array(boxes, np.float32).reshape(-1, 4) / np.float32(OVERSAMPLING)
    return xyxy.astype(np.float32), np.array(classes, np.int32)


def _shadows(plan: ScenePlan) -> ImageArray:
    """What the sun leaves dark, and the darkness below everything."""
    import cv2

    towards, strength = plan.conditions.light.towards, plan.conditions.shadow
    cast: list[tuple[Points, float]] = []
    below: list[tuple[Points, float]] = []
    for thing in plan.placed:
        world = thing.pose.to_world(thing.shape.points)
        fallen = world[:, :2] - world[:, 2:] * (towards[:2] / towards[2])
        hull = cv2.convexHull(fallen.astype(np.float32)).reshape(-1, 2).astype(np.float64)
        slim = thing.class_id < 0 or thing.class_id >= 7
        cast.append((hull, strength * (0.6 if slim else 1.0)))
        below.append((thing.footprint(-0.05 if slim else 0.06), 0.25 if slim else 0.62))
    hard = shade_of(plan.camera, sorted(cast, key=lambda item: item[1]), 0.9)
    soft = shade_of(plan.camera, below, 2.6)
    return np.asarray(cv2.multiply(hard, soft, scale=1 / 255), np.uint8)


def _with_reflections(ground: ImageArray, plan: ScenePlan) -> ImageArray:
    """Wet asphalt mirrors what stands on it, blurred and faint."""
    import cv2

    height, width = plan.camera.size_hw
    half = (height // 2, width // 2)
    camera = replace(
        plan.camera, focal_px=plan.camera.focal_px / 2 / OVERSAMPLING, size_hw=(half[0] // 2, half[1] // 2)
    )
    mirror = np.zeros((half[0] // 2 * OVERSAMPLING, half[1] // 2 * OVERSAMPLING, 4), np.uint8)
    light: Light = plan.conditions.light
    for thing in plan.placed:
        below = thing.shape.points * (1, 1, -1)
        turned = replace(thing.shape, points=below, open_faces=np.ones_like(thing.shape.open_faces))
        paint(mirror, turned, thing.pose, camera, light, 255)
    large = cv2.resize(cv2.blur(mirror, (3, 13)), (width, height), interpolation=cv2.INTER_LINEAR)
    share = large[..., 3].astype(np.float32) * (0.38 / 255)
    return np.asarray(cv2.blendLinear(ground, cv2.cvtColor(large, cv2.COLOR_BGRA2BGR), 1 - share, share), np.uint8)


def _lamps(plan: ScenePlan) -> tuple[list[Points], list[Glow]]:
    """Outlines of the ground lit by lamps, and the halos of all that shines, image pixels."""
    if not plan.conditions.headlights:
        return [], []
    camera = plan.camera
    pools, glows = [], []
    turns = np.linspace(0, 2 * np.pi, 17)[:-1]
    for thing in plan.placed:
        for lamp in thing.shape.lamps:
            place = thing.pose.to_world(lamp[None, :3])
            pixel, depth = camera.project(place)
            is_street_lamp = lamp[2] > 4
            ahead = np.array([np.cos(thing.pose.heading), np.sin(thing.pose.heading)])
            if is_street_lamp and plan.conditions.dark:
                ring = place[0, :2] + 6.5 * np.column_stack([np.cos(turns), np.sin(turns)])
                pools.append(_ground_outline(camera, ring))
            elif lamp[0] > 0.4 and plan.conditions.dark:  # a head light shines ahead
                side = np.array([-ahead[1], ahead[0]])
                beam = [place[0, :2] + a * ahead + b * side for a, b in ((0, 0.3), (0, -0.3), (7, -2), (7, 2))]
                pools.append(_ground_outline(camera, np.array(beam)))
            facing = ahead @ (camera.position[:2] - place[0, :2]) * (1 if lamp[0] > 0 else -1)
            if depth[0] > 1 and (facing > 0 or is_street_lamp):
                radius = 0.6 * float(lamp[6] * camera.focal_px / depth[0])
                glows.append(Glow(float(pixel[0, 0]), float(pixel[0, 1]), radius, tuple(lamp[3:6].tolist())))
    # The lot's own floodlight, below the camera.
    if plan.conditions.dark:
        centre = camera.position[:2] + 11.0 * camera.forward_xy
        pools.append(_ground_outline(camera, centre + 6.0 * np.column_stack([np.cos(turns), np.sin(turns)])))
    return [pool for pool in pools if len(pool)], glows


def _ground_outline(camera: Camera, corners: Points) -> Points:
    return camera.outline(np.column_stack([corners, np.zeros(len(corners))]))
