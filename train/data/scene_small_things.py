"""What people push, ride and park: stroller, shopping cart, kickboard, bicycle and motorcycle as solid shapes.

Lengths are metres; all of them move along +x.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from parkdet.train.data.scene_camera import Points
from parkdet.train.data.scene_shapes import Colour, Material, Shape, ShapeBuilder
from parkdet.train.data.scene_vehicle_parts import pick

_METAL: Colour = (190, 190, 190)
_RUBBER: Colour = (26, 26, 26)
_DARK: Colour = (44, 43, 42)
_PAINTS: tuple[Colour, ...] = (
    (40, 40, 205),
    (190, 90, 30),
    (60, 160, 60),
    (30, 30, 30),
    (225, 225, 225),
    (30, 120, 220),
)


_GOODS: tuple[Colour, ...] = ((30, 200, 250), (60, 60, 235), (235, 160, 40), (80, 205, 90), (210, 215, 220))


def stroller(rng: np.random.Generator) -> Shape:
    """A seat under a round hood, four small wheels, a handle behind."""
    cloth = pick(rng, [(60, 50, 170), (150, 84, 50), (70, 70, 72), (150, 120, 200), (90, 150, 80)])
    hood = (cloth[0] * 1.2 + 15, cloth[1] * 1.2 + 15, cloth[2] * 1.2 + 15)
    shape = ShapeBuilder()
    for x in (-0.3, 0.36):
        for y in (-0.25, 0.25):
            _wheel(shape, x, y, 0.11, 0.035, hub=True, stage=0)
    for y in (-0.24, 0.24):
        shape.rod([(0.36, y, 0.12), (-0.12, y, 0.55), (-0.5, y, 1.02)], 0.02, _METAL, stage=0)
        shape.rod([(-0.3, y, 0.12), (0.1, y, 0.58)], 0.02, _METAL, stage=0)
    with shape.solid(1):
        shape.extrude([(-0.2, 0.36), (0.34, 0.36), (0.42, 0.56), (-0.26, 0.5)], 0.22, cloth, Material.MATTE)
        shape.extrude([(-0.22, 0.45), (-0.08, 0.45), (-0.22, 0.9), (-0.34, 0.9)], 0.22, cloth, Material.MATTE)
    angles = np.linspace(np.deg2rad(55), np.deg2rad(190), 6)
    arc = [(-0.12 + 0.36 * float(np.cos(a)), 0.72 + 0.34 * float(np.sin(a))) for a in angles]
    with shape.solid(2):
        for index, (start, end) in enumerate(pairwise(arc)):
            tone = 1.0 if index % 2 else 0.82
            shape.face(
                [
                    (start[0], -0.25, start[1]),
                    (start[0], 0.25, start[1]),
                    (end[0], 0.25, end[1]),
                    (end[0], -0.25, end[1]),
                ],
                (hood[0] * tone, hood[1] * tone, hood[2] * tone),
                Material.MATTE,
                both_sides=True,
            )
        for y in (-0.25, 0.25):
            shape.face([(x, y, z) for x, z in arc], hood, Material.MATTE, both_sides=True)
    shape.rod([(-0.5, -0.24, 1.02), (-0.5, 0.24, 1.02)], 0.028, _RUBBER, stage=3)
    return shape.build()


def cart(rng: np.random.Generator) -> Shape:
    """A shopping cart: a basket of wires, wider above and in front, on a low frame with castors."""
    handle = pick(rng, [(40, 40, 215), (200, 110, 30), (50, 170, 60), (30, 140, 240)])
    wire: Colour = (205, 206, 206)
    shape = ShapeBuilder()
    for x, y in ((-0.36, -0.24), (-0.36, 0.24), (0.38, -0.18), (0.38, 0.18)):
        shape.ball((x, y, 0.065), 0.065, _RUBBER)
    for y in (-1, 1):
        shape.rod([(0.38, y * 0.18, 0.14), (-0.38, y * 0.24, 0.17), (-0.34, y * 0.25, 0.52)], 0.022, _METAL)
        shape.rod([(-0.34, y * 0.25, 0.52), (-0.48, y * 0.27, 1.0)], 0.024, _METAL, stage=2)
    low = np.array([(-0.34, -0.19, 0.5), (0.4, -0.17, 0.54), (0.4, 0.17, 0.54), (-0.34, 0.19, 0.5)])
    high = np.array([(-0.44, -0.28, 0.98), (0.52, -0.24, 0.9), (0.52, 0.24, 0.9), (-0.44, 0.28, 0.98)])
    with shape.solid(1):
        shape.face(low, (120, 122, 124), Material.MATTE, both_sides=True)
        if rng.random() < 0.5:
            for x in (-0.2, 0.1):
                tone = pick(rng, _GOODS)
                shape.box((x, x + 0.24), (-0.13, 0.13), (0.55, 0.55 + rng.uniform(0.15, 0.4)), tone, Material.MATTE)
    for side in range(4):
        ends = (low[side], low[(side + 1) % 4], high[(side + 1) % 4], high[side])
        bars = 8 if side % 2 == 0 else 5
        with shape.solid(2):
            for share in np.linspace(0, 1, bars):
                foot, top = ends[0] + share * (ends[1] - ends[0]), ends[3] + share * (ends[2] - ends[3])
                shape.rod(np.stack([foot, top]), 0.009, wire)
            for share in (0.0, 0.35, 0.7, 1.0):
                left, right = ends[0] + share * (ends[3] - ends[0]), ends[1] + share * (ends[2] - ends[1])
                shape.rod(np.stack([left, right]), 0.011 if share < 1 else 0.02, wire)
    shape.rod([(-0.49, -0.28, 1.02), (-0.49, 0.28, 1.02)], 0.032, handle, stage=3)
    return shape.build()


def kickboard(rng: np.random.Generator) -> Shape:
    """An electric standing scooter: a deck near the ground, a tall stem with a bar, small wheels."""
    tone = pick(rng, [(60, 230, 130), (225, 225, 225), (40, 120, 250), (200, 190, 40), (150, 60, 200)])
    shape = ShapeBuilder()
    for x in (-0.48, 0.5):
        _wheel(shape, x, 0.0, 0.12, 0.05, hub=True, stage=0)
    with shape.solid(1):
        shape.box((-0.46, 0.36), (-0.1, 0.1), (0.13, 0.22), tone)
        shape.face(
            [(-0.4, -0.075, 0.226), (0.3, -0.075, 0.226), (0.3, 0.075, 0.226), (-0.4, 0.075, 0.226)],
            _DARK,
            Material.MATTE,
        )
    shape.rod([(-0.6, 0, 0.28), (-0.36, 0, 0.2)], 0.05, tone, stage=1)
    shape.rod([(0.34, 0, 0.2), (0.47, 0, 0.32)], 0.05, tone, stage=2)
    shape.rod([(0.52, 0, 0.14), (0.46, 0, 0.34), (0.34, 0, 1.15)], 0.045, tone, stage=2)
    shape.rod([(0.33, -0.27, 1.17), (0.33, 0.27, 1.17)], 0.03, _RUBBER, stage=3)
    shape.ball((0.39, 0, 1.06), 0.055, (235, 240, 240), Material.LAMP, stage=3)
    return shape.build()


def bicycle(rng: np.random.Generator) -> Shape:
    """Two large thin wheels, a frame of thin bars, a saddle and a handlebar."""
    tone = pick(rng, _PAINTS)
    shape = ShapeBuilder()
    axle_back, axle_front, crank = (-0.52, 0.0, 0.34), (0.53, 0.0, 0.34), (-0.05, 0.0, 0.3)
    saddle, head, fork = (-0.22, 0.0, 0.86), (0.34, 0.0, 0.86), (0.37, 0.0, 0.74)
    for axle in (axle_back, axle_front):
        _spoked_wheel(shape, axle[0], 0.34)
    for ends in ([axle_back, crank, fork], [axle_back, (-0.19, 0, 0.72), fork], [crank, saddle]):
        shape.rod(ends, 0.026, tone, stage=1)
    shape.rod([axle_front, fork, head], 0.024, tone, stage=1)
    shape.rod([head, (0.3, 0, 1.0)], 0.02, _METAL, stage=1)
    shape.rod(
        [(0.18, -0.28, 1.02), (0.32, -0.16, 1.03), (0.32, 0.16, 1.03), (0.18, 0.28, 1.02)], 0.022, _RUBBER, stage=2
    )
    shape.rod([(-0.36, 0, 0.92), (-0.12, 0, 0.91)], 0.055, _RUBBER, stage=2)
    shape.rod([(-0.05, -0.1, 0.16), (-0.05, 0.1, 0.44)], 0.018, _DARK, stage=1)
    if rng.random() < 0.5:
        with shape.solid(2):
            shape.box((0.4, 0.68), (-0.17, 0.17), (0.72, 0.95), (90, 120, 150), Material.MATTE)
    return shape.build()


def motorcycle(rng: np.random.Generator, lit: bool) -> Shape:
    """Two thick wheels, an engine, a tank and a long seat; some carry a delivery box."""
    tone = pick(rng, [(40, 38, 190), (36, 34, 34), (170, 80, 30), (215, 215, 215), (40, 110, 220)])
    shape = ShapeBuilder()
    for x in (-0.66, 0.7):
        _wheel(shape, x, 0.0, 0.32, 0.15, hub=True, stage=0)
    with shape.solid(1):
        shape.extrude([(-0.3, 0.24), (0.32, 0.24), (0.4, 0.5), (-0.34, 0.52)], 0.2, (70, 70, 72), Material.PAINT)
        shape.extrude(
            [(-0.85, 0.6), (-0.3, 0.48), (0.36, 0.52), (0.46, 0.82), (0.3, 0.98), (-0.05, 0.84), (-0.9, 0.8)],
            [0.14, 0.2, 0.2, 0.2, 0.16, 0.17, 0.13],
            tone,
        )
        shape.extrude([(-0.85, 0.8), (-0.08, 0.8), (-0.02, 0.9), (-0.88, 0.92)], 0.16, _DARK, Material.MATTE)
    shape.rod([(-0.9, 0.24, 0.36), (-0.2, 0.22, 0.32)], 0.055, _METAL, stage=2)
    for y in (-0.09, 0.09):
        shape.rod([(0.7, y, 0.34), (0.44, y, 0.94)], 0.035, _METAL, stage=1)
    shape.rod([(0.5, 0, 0.66), (0.95, 0, 0.64)], 0.09, tone, stage=1)
    shape.rod([(0.28, -0.4, 1.06), (0.42, -0.2, 1.04), (0.42, 0.2, 1.04), (0.28, 0.4, 1.06)], 0.03, _RUBBER, stage=2)
    for y in (-0.34, 0.34):
        shape.rod([(0.4, y * 0.8, 1.05), (0.44, y, 1.24)], 0.014, _DARK, stage=2)
        shape.ball((0.44, y, 1.26), 0.06, _DARK, stage=2)
    shape.ball((0.56, 0, 0.9), 0.11, (235, 240, 240), Material.LAMP, stage=2)
    shape.ball((-0.92, 0, 0.78), 0.06, (40, 35, 205), Material.LAMP, stage=2)
    if lit:
        shape.lamp((0.66, 0, 0.9), (210, 245, 255), 0.7)
    if rng.random() < 0.4:
        with shape.solid(3):
            shape.box(
                (-0.98, -0.5), (-0.24, 0.24), (0.92, 1.36), pick(rng, [(40, 40, 210), (200, 200, 198), (190, 160, 40)])
            )
    return shape.build()


def _wheel(shape: ShapeBuilder, x: float, y: float, radius: float, width: float, *, hub: bool, stage: int) -> None:
    """A thick tyre standing at (x, y), turned along x."""
    angles = np.arange(14) * (2 * np.pi / 14)
    rim = np.column_stack([x + radius * np.cos(angles), radius + radius * np.sin(angles)])
    with shape.solid(stage):
        shape.extrude([(float(a), float(b)) for a, b in rim], width / 2, _RUBBER, Material.MATTE, middle=y)
        for side in (-1, 1) if hub else ():
            half = np.full(len(angles), y + side * (width / 2 + 0.005))
            disc = np.column_stack([x + 0.55 * (rim[:, 0] - x), half, radius + 0.55 * (rim[:, 1] - radius)])
            shape.face(disc if side < 0 else disc[::-1], (150, 150, 150), Material.MATTE)


def _spoked_wheel(shape: ShapeBuilder, x: float, radius: float) -> None:
    angles = np.linspace(0, 2 * np.pi, 19)
    rim = np.column_stack([x + radius * np.cos(angles), np.zeros(19), radius + radius * np.sin(angles)])
    with shape.solid(0):
        for index in range(0, 9, 2):
            shape.rod(np.stack([rim[index], rim[index + 9]]), 0.004, (120, 120, 120))
        shape.rod(rim, 0.024, _RUBBER)
        shape.rod(_inner_ring(rim, x, radius), 0.008, _METAL)


def _inner_ring(rim: Points, x: float, radius: float) -> Points:
    """The metal ring inside a tyre."""
    return np.asarray((rim - (x, 0, radius)) * 0.9 + (x, 0, radius))
