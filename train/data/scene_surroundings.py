"""What stands around a lot and is no object of the contest: kerbs, hedges, walls, houses, trees, lamp posts."""

from __future__ import annotations

import numpy as np

from parkdet.train.data.scene_camera import Camera, Points
from parkdet.train.data.scene_lot import Lot
from parkdet.train.data.scene_shapes import Colour, Material, Shape, ShapeBuilder

_CONCRETE: Colour = (168, 170, 172)
_WALLS: tuple[Colour, ...] = ((150, 164, 176), (170, 174, 178), (120, 134, 164), (196, 200, 202), (142, 128, 118))
_LIT_WINDOW: Colour = (120, 200, 240)


def surroundings(rng: np.random.Generator, camera: Camera, lot: Lot, night: bool) -> Shape | None:
    """One shape of all that stands along the far, left and right edge and in sight; None if nothing is."""
    shape = ShapeBuilder()
    count = 0
    kind = int(rng.integers(3))
    green = float(rng.uniform(0.75, 1.15))
    edges = [
        ((lot.x[0], lot.far), (1.0, 0.0), (0.0, 1.0), lot.x[1] - lot.x[0]),
        ((lot.x[1], 0.0), (0.0, 1.0), (1.0, 0.0), lot.far),
        ((lot.x[0], 0.0), (0.0, 1.0), (-1.0, 0.0), lot.far),
    ]
    if camera.position[1] > 2:  # else the camera itself stands there
        edges.append(((lot.x[0], 0.0), (1.0, 0.0), (0.0, -1.0), lot.x[1] - lot.x[0]))
    for origin, along, outward, length in edges:
        frame = _Edge(np.array(origin), np.array(along), np.array(outward))
        for start in np.arange(0, length, 3.0):
            end = min(start + 3.0, length)
            if _in_sight(camera, frame.at((start + end) / 2, 1.0)):
                _edge_piece(rng, shape, frame, (float(start), float(end)), kind, green)
                count += 1
        start = float(rng.uniform(-10, 0))
        while start < length + 6:
            breadth = float(rng.uniform(8, 16))
            if rng.random() < 0.85 and _in_sight(camera, frame.at(start + breadth / 2, 10.0), 25):
                _house(rng, shape, frame, (start, start + breadth), night)
                count += 1
            start += breadth + float(rng.uniform(1.0, 6.0))
        for offset in np.arange(2.0, length, 6.5):
            spot = frame.at(offset + float(rng.uniform(-1.5, 1.5)), float(rng.uniform(2.6, 4.2)))
            if rng.random() < 0.6 and _in_sight(camera, spot):
                _tree(rng, shape, spot, green)
                count += 1
    for row in lot.rows:
        for x in lot.bay_edges()[:-1] + lot.bay_width / 2:
            y = row.head + np.sign((row.low + row.high) / 2 - row.head) * 0.75
            if _in_sight(camera, np.array([x, y])):
                _wheel_stop(shape, float(x), float(y))
                count += 1
    return shape.build() if count else None


def _in_sight(camera: Camera, spot: Points, margin: float = 5.0) -> bool:
    """Whether a thing of `margin` metres about a ground point may be drawn: all of it before the camera."""
    along, right = camera.forward_xy.tolist(), camera.axes[0, :2].tolist()
    x, y = spot[0] - camera.position[0], spot[1] - camera.position[1]
    ahead, aside = x * along[0] + y * along[1], x * right[0] + y * right[1]
    reach = camera.size_hw[1] / 2 / camera.focal_px * ahead
    return bool(ahead > 3.0 + 0.5 * margin and abs(aside) < reach + margin)


class _Edge:
    """A straight edge of the lot with its own axes: along it, and away from the lot."""

    def __init__(self, origin: Points, along: Points, outward: Points) -> None:
        self._origin, self._along, self._outward = origin, along, outward

    def at(self, along: float, outward: float) -> Points:
        return np.asarray(self._origin + along * self._along + outward * self._outward)

    def span(
        self, along: tuple[float, float], outward: tuple[float, float]
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        """x and y ranges of a rectangle given in the edge's axes."""
        corners = np.stack([self.at(along[0], outward[0]), self.at(along[1], outward[1])])
        low, high = corners.min(0), corners.max(0)
        return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def _edge_piece(
    rng: np.random.Generator,
    shape: ShapeBuilder,
    edge: _Edge,
    along: tuple[float, float],
    kind: int,
    green: float,
) -> None:
    """Three metres of kerb and, behind it, hedge, wall or fence."""
    x, y = edge.span(along, (0.0, 0.3))
    with shape.solid(0):
        shape.box(x, y, (0.0, 0.16), _CONCRETE, Material.MATTE)
    if kind == 0:
        x, y = edge.span(along, (0.9, 1.8))
        height = float(rng.uniform(1.0, 1.25))
        tone = green * float(rng.uniform(0.85, 1.1))
        with shape.solid(0):
            shape.box(x, y, (0.0, height), (44 * tone, 86 * tone, 52 * tone), Material.MATTE)
            for _ in range(16):
                leaf = float(rng.uniform(0.65, 1.35)) * tone
                spot = (float(rng.uniform(*x)), float(rng.uniform(*y)), float(rng.uniform(0.25, height + 0.06)))
                shape.ball(spot, float(rng.uniform(0.12, 0.28)), (46 * leaf, 92 * leaf, 56 * leaf))
    elif kind == 1:
        x, y = edge.span(along, (1.2, 1.45))
        with shape.solid(0):
            shape.box(x, y, (0.0, 1.9), (150, 158, 166), Material.MATTE)
        x, y = edge.span(along, (1.15, 1.5))
        with shape.solid(1):
            shape.box(x, y, (1.9, 2.02), (128, 132, 136), Material.MATTE)
    else:
        low, high = edge.at(along[0], 1.0), edge.at(along[1], 1.0)
        with shape.solid(0):
            for z in (0.5, 1.2):
                shape.rod([(*low, z), (*high, z)], 0.025, (190, 196, 190))
            for share in np.linspace(0, 1, 7):
                spot = low + share * (high - low)
                shape.rod([(*spot, 0.0), (*spot, 1.3)], 0.02, (170, 190, 170))


def _house(rng: np.random.Generator, shape: ShapeBuilder, edge: _Edge, along: tuple[float, float], night: bool) -> None:
    distance = float(rng.uniform(6.0, 13.0))
    height = float(rng.uniform(4.0, 14.0))
    wall = _WALLS[int(rng.integers(len(_WALLS)))]
    x, y = edge.span(along, (distance, distance + 9.0))
    with shape.solid(0):
        shape.box(x, y, (0.0, height), wall, Material.MATTE)
        facade = np.stack([edge.at(along[0], distance), edge.at(along[1], distance)])
        across = edge.at(0, -0.03) - edge.at(0, 0)
        floors = np.arange(1.0, height - 1.8, 3.0)
        shares = np.arange(0.06, 0.9, 1.9 / (along[1] - along[0]))
        for z in floors:
            for share in shares:
                left = facade[0] + share * (facade[1] - facade[0]) + across
                right = facade[0] + (share + 1.15 / (along[1] - along[0])) * (facade[1] - facade[0]) + across
                lit = night and rng.random() < 0.35
                shape.face(
                    [(*left, z), (*right, z), (*right, z + 1.5), (*left, z + 1.5)],
                    _LIT_WINDOW if lit else (88, 76, 66),
                    Material.LAMP if lit else Material.GLASS,
                    both_sides=True,
                )


def _tree(rng: np.random.Generator, shape: ShapeBuilder, spot: Points, green: float) -> None:
    x, y = float(spot[0]), float(spot[1])
    crown, radius = float(rng.uniform(2.6, 4.2)), float(rng.uniform(0.9, 1.5))
    tone = green * float(rng.uniform(0.8, 1.1))
    with shape.solid(0):
        shape.rod([(x, y, 0.0), (x, y, crown)], 0.11, (52, 66, 84))
        for index in range(26):
            turn, reach = float(rng.uniform(0, 2 * np.pi)), radius * float(rng.uniform(0.2, 0.9))
            rise = float(rng.normal(0, 0.42)) * radius
            leaf = tone * (0.62 + 0.6 * index / 26)  # the last and brightest are nearer the top
            shape.ball(
                (x + reach * np.cos(turn), y + reach * np.sin(turn), crown + rise + 0.02 * index),
                radius * float(rng.uniform(0.24, 0.42)),
                (44 * leaf, 88 * leaf, 54 * leaf),
            )


def _wheel_stop(shape: ShapeBuilder, x: float, y: float) -> None:
    with shape.solid(0):
        shape.box((x - 0.85, x + 0.85), (y - 0.08, y + 0.08), (0.0, 0.12), (70, 72, 74), Material.MATTE)
        for side in (-0.7, -0.35, 0.0, 0.35):
            for face_y, reverse in ((y - 0.085, False), (y + 0.085, True)):
                quad = [
                    (x + side, face_y, 0.02),
                    (x + side + 0.18, face_y, 0.02),
                    (x + side + 0.18, face_y, 0.11),
                    (x + side, face_y, 0.11),
                ]
                shape.face(quad[::-1] if reverse else quad, (50, 190, 235), Material.MATTE)


def lamp_post(height: float) -> Shape:
    """A pole with an arm; its lamp shines at night."""
    shape = ShapeBuilder()
    with shape.solid(0):
        shape.box((-0.22, 0.22), (-0.22, 0.22), (0.0, 0.35), _CONCRETE, Material.MATTE)
    shape.rod([(0, 0, 0.3), (0, 0, height), (1.5, 0, height + 0.15)], 0.07, (120, 122, 124), stage=1)
    with shape.solid(2):
        shape.box((1.2, 1.9), (-0.14, 0.14), (height + 0.08, height + 0.2), (140, 142, 144))
    shape.lamp((1.55, 0, height + 0.05), (190, 225, 255), 2.2)
    return shape.build()


def cone() -> Shape:
    """A traffic cone."""
    shape = ShapeBuilder()
    with shape.solid(0):
        shape.box((-0.2, 0.2), (-0.2, 0.2), (0.0, 0.05), (40, 40, 40), Material.MATTE)
    with shape.solid(1):
        for low, high, colour in (
            (0.05, 0.3, (40, 90, 235)),
            (0.3, 0.48, (225, 225, 225)),
            (0.48, 0.72, (40, 90, 235)),
        ):
            wide, narrow = 0.17 * (1 - low / 0.85), 0.17 * (1 - high / 0.85)
            shape.extrude(
                [(-wide, low), (wide, low), (narrow, high), (-narrow, high)],
                [wide, wide, narrow, narrow],
                colour,
                Material.MATTE,
            )
    return shape.build()
