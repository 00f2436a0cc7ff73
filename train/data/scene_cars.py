"""Sedan, taxi, SUV and van as solid shapes, each with what a person tells it apart by.

Lengths are metres, x forward. A builder takes a random generator for colours and sizes, and whether the lights
are on.
"""

from __future__ import annotations

import numpy as np

from parkdet.train.data.scene_shapes import Colour, Material, Shape, ShapeBuilder
from parkdet.train.data.scene_vehicle_parts import (
    BLACK,
    GLASS,
    PLATE,
    add_lights,
    add_wheels,
    darker,
    panel_sides,
    patch_end,
    patch_sides,
    pick,
)

_CAR_COLOURS: tuple[Colour, ...] = (
    (238, 238, 236),
    (232, 233, 233),
    (186, 186, 184),
    (128, 126, 124),
    (78, 76, 74),
    (44, 42, 40),
    (40, 38, 36),
    (92, 52, 34),
    (40, 34, 150),
    (150, 92, 42),
    (66, 84, 56),
    (120, 152, 170),
)
"""No orange and no yellow: those are the liveries of the taxi and the school bus."""
_VAN_COLOURS: tuple[Colour, ...] = ((238, 238, 236), (232, 233, 233), (190, 190, 188), (62, 60, 58), (98, 62, 40))
_TAXI_ORANGE: Colour = (22, 112, 242)


def _car(
    colour: Colour,
    *,
    length: float,
    width: float,
    height: float,
    hood: tuple[float, float, float],
    deck: tuple[float, float, float],
    roof: tuple[float, float],
    lit: bool,
    clearance: float = 0.22,
    wheel: float = 0.33,
    dark_skirt: bool = False,
) -> ShapeBuilder:
    """A passenger car: a lower body and a cabin of glass on it.

    `hood` is (height at the nose, height at the windscreen, x of the windscreen's foot), `deck` the same behind,
    `roof` x of the roof's back and front edges.
    """
    shape = ShapeBuilder()
    half, nose, tail = width / 2, length / 2, -length / 2
    add_wheels(shape, (nose - 0.9, tail + 0.85), half - 0.01, wheel)
    belt = max(hood[1], deck[1])
    with shape.solid(1):
        shape.extrude(
            [
                (tail + 0.1, clearance),
                (nose - 0.1, clearance),
                (nose, clearance + 0.2),
                (nose - 0.03, hood[0] - 0.1),
                (nose - 0.18, hood[0]),
                (hood[2], hood[1]),
                (deck[2], deck[1]),
                (tail + 0.12, deck[0]),
                (tail, deck[0] - 0.12),
                (tail + 0.02, clearance + 0.2),
            ],
            half,
            colour,
            edge_colours={0: BLACK, 1: darker(colour, 0.8), 9: darker(colour, 0.8)},
        )
        skirt = clearance + (0.17 if dark_skirt else 0.07)
        panel_sides(shape, (tail + 0.15, nose - 0.15), (clearance, skirt), half, BLACK)
        for x in (hood[2] - 0.15, (hood[2] + deck[2]) / 2 - 0.1, deck[2] + 0.45):
            panel_sides(shape, (x - 0.012, x + 0.012), (clearance + 0.1, belt - 0.03), half, darker(colour, 0.55))
        grille = (clearance + 0.2, hood[0] - 0.14)
        patch_end(shape, True, (-half * 0.55, half * 0.55), (nose, grille[0]), (nose - 0.02, grille[1]), BLACK)
        patch_end(shape, True, (-0.25, 0.25), (nose, grille[0] + 0.02), (nose, grille[0] + 0.13), PLATE)
        patch_end(shape, False, (-0.26, 0.26), (tail, deck[0] - 0.32), (tail, deck[0] - 0.18), PLATE)
        patch_end(shape, False, (-half * 0.9, half * 0.9), (tail, clearance), (tail, clearance + 0.14), BLACK)
        add_lights(shape, nose - 0.02, tail, half, (hood[0] - 0.24, hood[0] - 0.08), lit)
    foot, rear = hood[2] + 0.02, deck[2] - 0.02
    half_roof = half * 0.76
    base = belt - 0.06
    profile = [(rear, base), (foot, base), (roof[1], height), (roof[0], height)]
    with shape.solid(2):
        shape.extrude(profile, [half * 0.95, half * 0.95, half_roof, half_roof], colour)
        slope = (base, half * 0.95, height, half_roof)

        def along(edge: tuple[float, float], share: float) -> float:
            return edge[0] + (edge[1] - edge[0]) * share

        low, high = 0.13, 0.86
        z_low, z_high = along((base, height), low), along((base, height), high)
        back = (along((rear, roof[0]), low) + 0.1, along((rear, roof[0]), high) + 0.1)
        front = (along((foot, roof[1]), low) - 0.12, along((foot, roof[1]), high) - 0.1)
        pillar = (roof[0] + roof[1]) / 2
        for left, right in (((pillar + 0.05, pillar + 0.05), front), (back, (pillar - 0.05, pillar - 0.05))):
            patch_sides(
                shape,
                [(left[0], z_low), (right[0], z_low), (right[1], z_high), (left[1], z_high)],
                slope,
                GLASS,
                Material.GLASS,
            )
        for ahead, edge in ((True, (foot, roof[1])), (False, (rear, roof[0]))):
            patch_end(
                shape,
                ahead,
                (-half * 0.84, half * 0.84),
                (along(edge, 0.1), along((base, height), 0.1)),
                (along(edge, 0.92), along((base, height), 0.92)),
                GLASS,
                Material.GLASS,
                taper=0.82,
            )
    for side in (-1, 1):
        with shape.solid(3):
            x, y = hood[2] - 0.3, side * (half + 0.07)
            shape.box((x - 0.08, x + 0.08), (y - 0.09, y + 0.09), (belt - 0.02, belt + 0.13), colour)
    return shape


def _sedan_body(rng: np.random.Generator, colour: Colour, lit: bool) -> ShapeBuilder:
    length = rng.uniform(4.5, 4.95)
    return _car(
        colour,
        length=length,
        width=rng.uniform(1.8, 1.88),
        height=rng.uniform(1.4, 1.47),
        hood=(0.74, 0.93, 0.92),
        deck=(0.93, 0.99, -length / 2 + 0.72),
        roof=(-length / 2 + 1.5, 0.1),
        lit=lit,
    )


def sedan(rng: np.random.Generator, lit: bool) -> Shape:
    """Low, three boxes: hood, cabin, boot."""
    return _sedan_body(rng, pick(rng, _CAR_COLOURS), lit).build()


def taxi(rng: np.random.Generator, lit: bool) -> Shape:
    """An orange sedan with a light on the roof and a chequered band on the doors."""
    shape = _sedan_body(rng, _TAXI_ORANGE, lit)
    with shape.solid(5):
        shape.box((-0.62, -0.32), (-0.42, 0.42), (1.44, 1.66), (90, 225, 255), Material.LAMP)
        shape.box((-0.64, -0.30), (-0.44, 0.44), (1.66, 1.69), (40, 40, 40), Material.MATTE)
    with shape.solid(3):
        for row in (0, 1):
            for index in range(row, 10, 2):
                x, z = -0.95 + index * 0.19, 0.55 + row * 0.13
                panel_sides(shape, (x, x + 0.19), (z, z + 0.13), 0.945, (30, 30, 30))
    if lit:
        shape.lamp((-0.47, 0.0, 1.6), (90, 200, 255), 0.6)
    return shape.build()


def suv(rng: np.random.Generator, lit: bool) -> Shape:
    """Tall, two boxes: the cabin runs to the tail; dark sills, big wheels, rails on the roof."""
    length, height = rng.uniform(4.45, 4.8), rng.uniform(1.72, 1.84)
    shape = _car(
        pick(rng, _CAR_COLOURS),
        length=length,
        width=rng.uniform(1.88, 1.96),
        height=height,
        hood=(1.0, 1.13, 0.98),
        deck=(1.02, 1.13, -length / 2 + 0.1),
        roof=(-length / 2 + 0.4, 0.28),
        lit=lit,
        clearance=0.3,
        wheel=0.38,
        dark_skirt=True,
    )
    for side in (-1, 1):
        ends = [(-length / 2 + 0.55, side * 0.66, height + 0.07), (0.15, side * 0.66, height + 0.07)]
        shape.rod(ends, 0.035, (60, 60, 60), stage=5)
    return shape.build()


def van(rng: np.random.Generator, lit: bool) -> Shape:
    """One long tall box with a short sloping nose, a band of windows and the rail of a sliding door."""
    colour = pick(rng, _VAN_COLOURS)
    length, width, height = rng.uniform(5.1, 5.4), 1.96, rng.uniform(2.0, 2.12)
    half, nose, tail = width / 2, length / 2, -length / 2
    shape = ShapeBuilder()
    add_wheels(shape, (nose - 0.85, tail + 0.95), half - 0.01, 0.35)
    with shape.solid(1):
        shape.extrude(
            [
                (tail + 0.05, 0.25),
                (nose - 0.08, 0.25),
                (nose, 0.5),
                (nose - 0.08, 0.92),
                (nose - 0.62, 1.16),
                (nose - 1.35, height - 0.04),
                (nose - 1.6, height),
                (tail + 0.18, height),
                (tail, height - 0.3),
            ],
            [half, half, half, half, half * 0.97, half * 0.85, half * 0.84, half * 0.84, half * 0.88],
            colour,
            edge_colours={0: BLACK},
        )
        upper = (1.1, half * 0.98, height, half * 0.84)
        z = (1.16, height - 0.2)
        patch_sides(
            shape,
            [(nose - 1.62, z[0]), (nose - 0.85, z[0]), (nose - 1.37, z[1]), (nose - 1.68, z[1])],
            upper,
            GLASS,
            Material.GLASS,
        )
        for back, front in ((nose - 2.95, nose - 1.76), (tail + 0.28, nose - 3.08)):
            pane = [(back, z[0]), (front, z[0]), (front, z[1]), (back, z[1])]
            patch_sides(shape, pane, upper, GLASS, Material.GLASS)
        line = darker(colour, 0.5)
        for x in (nose - 1.69, nose - 3.0):
            panel_sides(shape, (x - 0.015, x + 0.015), (0.4, 1.12), half, line)
        panel_sides(shape, (tail + 0.2, nose - 3.0), (0.98, 1.03), half, line)
        panel_sides(shape, (tail + 0.1, nose - 0.15), (0.25, 0.36), half, BLACK)
        patch_end(
            shape,
            True,
            (-half * 0.86, half * 0.86),
            (nose - 0.7, 1.2),
            (nose - 1.31, height - 0.09),
            GLASS,
            Material.GLASS,
            taper=0.93,
        )
        patch_end(
            shape,
            False,
            (-half * 0.74, half * 0.74),
            (tail, 1.12),
            (tail + 0.02, height - 0.38),
            GLASS,
            Material.GLASS,
        )
        patch_end(shape, True, (-half * 0.5, half * 0.5), (nose, 0.52), (nose - 0.05, 0.72), BLACK)
        patch_end(shape, False, (-0.26, 0.26), (tail, 0.62), (tail, 0.76), PLATE)
        add_lights(shape, nose - 0.04, tail, half * 0.98, (0.7, 0.9), lit)
    return shape.build()
