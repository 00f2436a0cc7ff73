"""Solid shapes of faces, rods and balls, and how one is painted: shaded by a light, far parts first.

A shape's own frame: metres, x forward, y to its left, z up, the origin on the ground below its middle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.geometry import ImageArray
from parkdet.train.data.scene_camera import NEAR_M, Camera, Points

Colour = tuple[float, float, float]
"""Blue, green, red from 0 to 255, as lit by white light."""

OVERSAMPLING = 2
"""The scene is painted at this multiple of the image's size and averaged down: clean edges."""
_SUBPIXEL_BITS = 4
_RIM = 12


class Material(IntEnum):
    PAINT = 0
    """Shines a little."""
    MATTE = 1
    GLASS = 2
    """Mirrors the sky the more it faces up."""
    LAMP = 3
    """Not shaded."""


class _Kind(IntEnum):
    FACE = 0
    ROD = 1
    BALL = 2


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """A finished shape: the points of all its parts in one array, and one row a part."""

    points: Points
    """(M, 3) in the shape's own frame."""
    starts: NDArray[np.intp]
    """(P + 1,) part p has the points from starts[p] to starts[p + 1]."""
    kinds: NDArray[np.int8]
    colours: Points
    """(P, 3)."""
    materials: NDArray[np.int8]
    radii: Points
    """(P,) metres, of rods and balls."""
    open_faces: NDArray[np.bool_]
    """(P,) faces that are seen from both sides."""
    stages: NDArray[np.int64]
    """(P,) what is painted later whatever the view: a cabin after the body it stands on."""
    groups: NDArray[np.intp]
    """(P,) the solid that a part belongs to; within a stage the farther solid is painted first."""
    group_boxes: Points
    """(G, 4) least x, least y, greatest x, greatest y of each solid's footprint."""
    extent: Points
    """(2, 3) least and greatest x, y, z."""
    lamps: Points
    """(L, 7) what shines at night: position (3,), colour (3,), radius of the glow in metres."""


class ShapeBuilder:
    """Collects the parts of one shape. Faces are listed anticlockwise seen from outside."""

    def __init__(self) -> None:
        self._points: list[Points] = []
        self._rows: list[tuple[int, Colour, int, float, bool, int, int]] = []
        self._lamps: list[tuple[float, ...]] = []
        self._stage = 0
        self._group = -1
        self._in_solid = False

    @contextmanager
    def solid(self, stage: int) -> Iterator[None]:
        """All parts added inside are one solid: painted together, in the order they are added."""
        self._stage, self._in_solid = stage, True
        self._group += 1
        try:
            yield
        finally:
            self._in_solid = False

    def _add(
        self, kind: _Kind, points: Points, colour: Colour, material: int, radius: float, both: bool, stage: int
    ) -> None:
        if not self._in_solid:
            self._group += 1
        self._points.append(points)
        self._rows.append((kind, colour, material, radius, both, self._stage if self._in_solid else stage, self._group))

    def face(
        self,
        corners: Sequence[tuple[float, float, float]] | Points,
        colour: Colour,
        material: Material = Material.PAINT,
        *,
        both_sides: bool = False,
        stage: int = 0,
    ) -> None:
        self._add(_Kind.FACE, np.asarray(corners, np.float64), colour, material, 0.0, both_sides, stage)

    def rod(
        self,
        ends: Sequence[tuple[float, float, float]] | Points,
        radius: float,
        colour: Colour,
        material: Material = Material.MATTE,
        *,
        stage: int = 0,
    ) -> None:
        """A bent round bar through two or more points."""
        self._add(_Kind.ROD, np.asarray(ends, np.float64), colour, material, radius, True, stage)

    def ball(
        self,
        centre: tuple[float, float, float],
        radius: float,
        colour: Colour,
        material: Material = Material.MATTE,
        *,
        stage: int = 0,
    ) -> None:
        self._add(_Kind.BALL, np.array([centre], np.float64), colour, material, radius, True, stage)

    def lamp(self, centre: tuple[float, float, float], colour: Colour, glow: float) -> None:
        """Something that shines at night from `centre`; not drawn itself."""
        self._lamps.append((*centre, *colour, glow))

    def extrude(
        self,
        profile: Sequence[tuple[float, float]],
        half_width: float | Sequence[float],
        colour: Colour,
        material: Material = Material.PAINT,
        *,
        middle: float = 0.0,
        edge_colours: dict[int, Colour] | None = None,
    ) -> None:
        """A side profile (k, 2) of x, z, anticlockwise with x to the right, given a width about y = `middle`.

        `half_width` may differ from vertex to vertex. Edge i runs from vertex i to vertex i + 1.
        """
        outline = np.asarray(profile, np.float64)
        half = np.broadcast_to(np.asarray(half_width, np.float64), len(outline))
        right = np.column_stack([outline[:, 0], middle - half, outline[:, 1]])
        left = np.column_stack([outline[:, 0], middle + half, outline[:, 1]])
        following = np.r_[1 : len(outline), 0]
        quads = np.stack([right, left, left[following], right[following]], axis=1)
        for index, quad in enumerate(quads):
            self.face(quad, (edge_colours or {}).get(index, colour), material)
        self.face(right, colour, material)
        self.face(left[::-1], colour, material)

    def box(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        z: tuple[float, float],
        colour: Colour,
        material: Material = Material.PAINT,
    ) -> None:
        self.extrude(
            [(x[0], z[0]), (x[1], z[0]), (x[1], z[1]), (x[0], z[1])],
            (y[1] - y[0]) / 2,
            colour,
            material,
            middle=(y[0] + y[1]) / 2,
        )

    def build(self) -> Shape:
        kinds, colours, materials, radii, both, stages, groups = zip(*self._rows, strict=True)
        group_of_part = np.array(groups, np.intp)
        lengths = np.array([len(points) for points in self._points])
        points = np.concatenate(self._points)
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.intp)
        # The parts of a solid follow one another, so that each solid is one run of points.
        first_of_group = starts[np.searchsorted(group_of_part, np.arange(self._group + 1))]
        boxes = np.column_stack(
            [
                np.minimum.reduceat(points[:, :2], first_of_group),
                np.maximum.reduceat(points[:, :2], first_of_group),
            ]
        )
        return Shape(
            points,
            starts,
            np.array(kinds, np.int8),
            np.array(colours, np.float64),
            np.array(materials, np.int8),
            np.array(radii, np.float64),
            np.array(both, np.bool_),
            np.array(stages, np.int64),
            group_of_part,
            boxes,
            np.stack([points.min(0), points.max(0)]),
            np.array(self._lamps, np.float64).reshape(-1, 7),
        )


@dataclass(frozen=True, slots=True)
class Pose:
    """Where a shape stands on the ground: metres, and radians anticlockwise from +x."""

    x: float
    y: float
    heading: float

    def to_world(self, points: Points) -> Points:
        """Shape frame (N, 3) to world (N, 3)."""
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
        return np.asarray(points @ turn + (self.x, self.y, 0.0))

    def to_shape(self, point_xy: Points) -> Points:
        """World (2,) to the shape's frame (2,)."""
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        dx, dy = point_xy[0] - self.x, point_xy[1] - self.y
        return np.array([dx * cos + dy * sin, dy * cos - dx * sin])


@dataclass(frozen=True, slots=True, eq=False)
class Light:
    """What shades a face: light from everywhere and from one direction."""

    towards: Points
    """(3,) unit vector from the ground to the sun (or the lamps overhead)."""
    ambient: float
    direct: float
    sky: Colour
    """What glass mirrors."""
    tint: Colour = (1.0, 1.0, 1.0)
    """Colour of the light, a factor a channel."""


def paint(canvas: ImageArray, shape: Shape, pose: Pose, camera: Camera, light: Light, object_id: int) -> None:
    """Paint a shape over what is there.

    `canvas` (H * OVERSAMPLING, W * OVERSAMPLING, 4) is changed: blue, green, red, and the id of the object that
    each pixel shows. A shape that reaches behind the camera is left out.
    """
    import cv2

    world = pose.to_world(shape.points)
    viewed = camera.view(world)
    if viewed[:, 2].min() < NEAR_M:
        return
    pixels = camera.image_of(viewed) * OVERSAMPLING - 0.5
    fixed = np.rint(pixels * (1 << _SUBPIXEL_BITS)).astype(np.int32)
    scale = camera.focal_px * OVERSAMPLING / viewed[:, 2]
    radii = shape.radii * np.add.reduceat(scale, shape.starts[:-1]) / np.diff(shape.starts)
    shades, visible = _shade(shape, world, camera, light)
    order = _painting_order(shape, pose.to_shape(camera.position[:2]))
    starts, kinds = shape.starts.tolist(), shape.kinds.tolist()
    colours = np.clip(shades, 0, 255).round().tolist()
    for part in order[visible[order]].tolist():
        first, last = starts[part], starts[part + 1]
        colour = (*colours[part], object_id)
        if kinds[part] == _Kind.FACE:
            cv2.fillPoly(canvas, [fixed[first:last]], colour, cv2.LINE_8, _SUBPIXEL_BITS)
            continue
        radius = float(radii[part])
        lit = tuple(min(channel * 1.18 + 8, 255) for channel in colours[part])
        if kinds[part] == _Kind.ROD:
            width = max(round(2 * radius), 1)
            cv2.polylines(canvas, [fixed[first:last]], False, colour, width, cv2.LINE_8, _SUBPIXEL_BITS)
            if width >= _RIM // 2:
                # The upper side of a thick bar is lit: it looks round.
                lifted = fixed[first:last] - np.array([0, round(radius * 0.3 * (1 << _SUBPIXEL_BITS))], np.int32)
                cv2.polylines(
                    canvas, [lifted], False, (*lit, object_id), max(width // 3, 1), cv2.LINE_8, _SUBPIXEL_BITS
                )
        else:
            x, y = fixed[first].tolist()
            units = 1 << _SUBPIXEL_BITS
            cv2.circle(canvas, (x, y), max(round(radius * units), 8), colour, -1, cv2.LINE_8, _SUBPIXEL_BITS)
            if radius >= _RIM / 3:
                centre = (x, y - round(radius * 0.3 * units))
                cv2.circle(
                    canvas,
                    centre,
                    round(radius * 0.55 * units),
                    (*lit, object_id),
                    -1,
                    cv2.LINE_8,
                    _SUBPIXEL_BITS,
                )


def _shade(shape: Shape, world: Points, camera: Camera, light: Light) -> tuple[Points, NDArray[np.bool_]]:
    """Colour (P, 3) of every part under the light, and whether it is seen from the camera (P,)."""
    first = shape.starts[:-1]
    is_face = shape.kinds == _Kind.FACE
    second = np.where(is_face, first + 1, first)
    third = np.where(is_face, first + 2, first)
    corner = world[first]
    normal = np.cross(world[second] - corner, world[third] - corner)
    length = np.linalg.norm(normal, axis=1)
    normal /= np.maximum(length, 1e-12)[:, None]
    gaze = camera.position - corner
    gaze /= np.linalg.norm(gaze, axis=1)[:, None]
    facing = (normal * gaze).sum(axis=1)
    away = shape.open_faces & (facing < 0)
    normal[away] *= -1
    visible = ~is_face | shape.open_faces | (facing > 0)

    # A rod or ball has all normals; it gets the light of a surface half turned to it.
    lambert = np.where(is_face, np.maximum(normal @ light.towards, 0), 0.6)
    skylight = np.where(is_face, 0.75 + 0.25 * normal[:, 2], 0.9)
    amount = light.ambient * skylight + light.direct * lambert
    colours = shape.colours * amount[:, None]
    half = gaze + light.towards
    half /= np.maximum(np.linalg.norm(half, axis=1), 1e-9)[:, None]
    shine = np.maximum((normal * half).sum(axis=1), 0) ** 12 * 45 * light.direct
    colours += (shine * (is_face & (shape.materials == Material.PAINT)))[:, None]
    glass = shape.materials == Material.GLASS
    mirror = np.clip(0.12 + 0.5 * np.maximum(normal[:, 2], 0), 0, 1) * (glass & is_face)
    colours += mirror[:, None] * np.array(light.sky)
    lamps = shape.materials == Material.LAMP
    return np.where(lamps[:, None], shape.colours, colours * np.array(light.tint)), visible


def _painting_order(shape: Shape, camera_xy: Points) -> NDArray[np.intp]:
    """Parts by stage, then the farther solid first, then as they were added."""
    boxes = shape.group_boxes
    beyond = np.maximum(np.maximum(boxes[:, :2] - camera_xy, camera_xy - boxes[:, 2:]), 0)
    distance = np.hypot(beyond[:, 0], beyond[:, 1])
    return np.lexsort((np.arange(len(shape.kinds)), -distance[shape.groups], shape.stages))
