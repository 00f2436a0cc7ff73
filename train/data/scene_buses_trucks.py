"""Bus, school bus and truck as solid shapes, each with what a person tells it apart by.

Lengths are metres, x forward. A builder takes a random generator for colours and sizes, and whether the lights
are on.
"""

from __future__ import annotations

import numpy as np

from parkdet.train.data.scene_shapes import Colour, Material, Shape, ShapeBuilder
from parkdet.train.data.scene_vehicle_parts import (
    AMBER,
    BLACK,
    GLASS,
    PLATE,
    TAIL_LIGHT,
    add_lights,
    add_wheels,
    darker,
    panel_sides,
    patch_end,
    patch_sides,
    pick,
)

_BUS_LIVERIES: tuple[tuple[Colour, Colour], ...] = (
    ((168, 92, 28), (232, 232, 230)),
    ((88, 140, 40), (235, 235, 233)),
    ((42, 40, 176), (232, 232, 230)),
    ((236, 236, 234), (150, 84, 36)),
    ((226, 226, 224), (84, 128, 48)),
)
_SCHOOL_YELLOW: Colour = (18, 196, 252)
_CAB_COLOURS: tuple[Colour, ...] = ((236, 236, 234), (176, 104, 40), (150, 84, 36), (225, 226, 226), (96, 98, 100))
_CARGO_COLOURS: tuple[Colour, ...] = ((206, 206, 202), (178, 182, 186), (88, 122, 70), (142, 96, 56), (120, 160, 190))


def _coach(
    *,
    length: float,
    width: float,
    height: float,
    colour: Colour,
    band: Colour,
    windows: int,
    lit: bool,
) -> ShapeBuilder:
    """A long box with a row of windows, a large windscreen and doors."""
    half, nose, tail = width / 2, length / 2, -length / 2
    floor, sill, top = 0.32, height * 0.47, height - 0.42
    shape = ShapeBuilder()
    add_wheels(shape, (nose - 0.2 * length, tail + 0.22 * length), half - 0.01, 0.15 * height, 0.26)
    with shape.solid(1):
        shape.extrude(
            [
                (tail, floor),
                (nose - 0.04, floor),
                (nose, floor + 0.3),
                (nose - 0.06, sill),
                (nose - 0.22, height - 0.12),
                (nose - 0.4, height),
                (tail + 0.2, height),
                (tail, height - 0.15),
            ],
            half,
            colour,
            edge_colours={0: BLACK, 5: darker(colour, 0.97)},
        )
        panel_sides(shape, (tail, nose - 0.06), (floor + 0.18, sill - 0.22), half, band)
        pitch = (length - 1.0) / windows
        for index in range(windows):
            x = tail + 0.45 + index * pitch
            panel_sides(shape, (x, x + pitch - 0.12), (sill, top), half, GLASS, Material.GLASS)
        panel_sides(shape, (nose - 1.2, nose - 0.4), (floor + 0.08, top), half, (52, 46, 42), Material.GLASS)
        panel_sides(shape, (nose - 0.83, nose - 0.78), (floor + 0.08, top), half, colour)
        patch_end(
            shape,
            True,
            (-half * 0.9, half * 0.9),
            (nose - 0.05, sill - 0.3),
            (nose - 0.19, top + 0.05),
            GLASS,
            Material.GLASS,
        )
        patch_end(
            shape,
            True,
            (-half * 0.6, half * 0.6),
            (nose - 0.19, top + 0.1),
            (nose - 0.21, height - 0.13),
            (60, 170, 235),
            Material.LAMP,
        )
        patch_end(shape, False, (-half * 0.8, half * 0.8), (tail, sill + 0.15), (tail, top), GLASS, Material.GLASS)
        patch_end(shape, False, (-half * 0.6, half * 0.6), (tail, floor + 0.12), (tail, floor + 0.5), BLACK)
        patch_end(shape, True, (-0.26, 0.26), (nose, floor + 0.1), (nose, floor + 0.22), PLATE)
        add_lights(shape, nose - 0.01, tail, half, (floor + 0.32, floor + 0.54), lit)
    return shape


def bus(rng: np.random.Generator, lit: bool) -> Shape:
    """Long and high, with a row of windows, a band along the side and an air conditioner on the roof."""
    colour, band = _BUS_LIVERIES[int(rng.integers(len(_BUS_LIVERIES)))]
    length = rng.uniform(8.6, 10.4)
    shape = _coach(length=length, width=2.45, height=3.0, colour=colour, band=band, windows=7, lit=lit)
    with shape.solid(2):
        shape.box((-1.3, 1.1), (-0.75, 0.75), (2.98, 3.2), (205, 205, 203))
    with shape.solid(2):
        shape.box((-3.2, -2.5), (-0.4, 0.4), (2.98, 3.08), (150, 150, 150))
    return shape.build()


def school_bus(rng: np.random.Generator, lit: bool) -> Shape:
    """A yellow small bus with black stripes, a red stop sign on each side and warning lights on the roof."""
    length, half, height = rng.uniform(6.4, 7.0), 1.05, 2.55
    shape = _coach(
        length=length,
        width=2 * half,
        height=height,
        colour=_SCHOOL_YELLOW,
        band=_SCHOOL_YELLOW,
        windows=5,
        lit=lit,
    )
    angles = np.arange(8) * (np.pi / 4) + np.pi / 8
    with shape.solid(3):
        for z in (0.66, 0.9):
            panel_sides(shape, (-length / 2, length / 2 - 1.3), (z, z + 0.09), half, (25, 25, 25))
            patch_end(shape, False, (-half, half), (-length / 2, z), (-length / 2, z + 0.09), (25, 25, 25))
        for size, sign_colour in ((0.3, (235, 235, 235)), (0.25, (35, 30, 205))):
            octagon = [(0.4 + size * float(np.cos(a)), 0.84 + size * float(np.sin(a))) for a in angles]
            patch_sides(shape, octagon, (0, half, 1, half), sign_colour)
    for x in (length / 2 - 0.5, -length / 2 + 0.25):
        for side, colour in ((-1, (30, 30, 230)), (1, AMBER)):
            with shape.solid(3):
                y = side * half * 0.72
                shape.box((x - 0.1, x + 0.1), (y - 0.16, y + 0.16), (height, height + 0.16), colour, Material.LAMP)
    return shape.build()


def truck(rng: np.random.Generator, lit: bool) -> Shape:
    """A cab with a gap behind it and a cargo box or an open bed of another colour."""
    boxed = bool(rng.random() < 0.55)
    cab = pick(rng, _CAB_COLOURS)
    cargo = pick(rng, _CARGO_COLOURS)
    length = rng.uniform(5.8, 6.6) if boxed else rng.uniform(5.1, 5.7)
    half, nose, tail = (1.08 if boxed else 0.92), length / 2, -length / 2
    height, back = (2.15 if boxed else 1.98), length / 2 - 1.55
    shape = ShapeBuilder()
    add_wheels(shape, (nose - 0.75, tail + 1.2), half - 0.03, 0.4, 0.26)
    with shape.solid(1):
        shape.box((tail + 0.1, nose - 0.3), (-half * 0.6, half * 0.6), (0.42, 0.72), BLACK, Material.MATTE)
    with shape.solid(2):
        shape.extrude(
            [
                (back, 0.42),
                (nose - 0.02, 0.38),
                (nose, 0.95),
                (nose - 0.1, 1.15),
                (nose - 0.38, height),
                (back, height),
            ],
            [half, half, half, half, half * 0.9, half * 0.9],
            cab,
        )
        upper = (1.15, half, height, half * 0.9)
        patch_sides(
            shape,
            [(back + 0.45, 1.2), (nose - 0.2, 1.2), (nose - 0.46, height - 0.18), (back + 0.45, height - 0.18)],
            upper,
            GLASS,
            Material.GLASS,
        )
        panel_sides(shape, (back + 0.36, back + 0.39), (0.5, 1.15), half, darker(cab, 0.5))
        patch_end(
            shape,
            True,
            (-half * 0.9, half * 0.9),
            (nose - 0.12, 1.2),
            (nose - 0.34, height - 0.12),
            GLASS,
            Material.GLASS,
            taper=0.94,
        )
        patch_end(shape, True, (-half, half), (nose, 0.4), (nose, 0.6), (70, 70, 70))
        patch_end(shape, True, (-0.26, 0.26), (nose + 0.01, 0.43), (nose + 0.01, 0.56), PLATE)
        add_lights(shape, nose, back, half, (0.64, 0.84), False)
        if lit:
            for side in (-1, 1):
                shape.lamp((nose + 0.05, side * half * 0.8, 0.74), (210, 245, 255), 0.8)
    bed = (tail, back - 0.14)
    if boxed:
        top = rng.uniform(2.75, 3.0)
        with shape.solid(2):
            shape.box(bed, (-half, half), (0.78, top), cargo)
            for x in np.arange(bed[0] + 0.5, bed[1] - 0.2, 0.6):
                panel_sides(shape, (x, x + 0.03), (0.85, top - 0.06), half, darker(cargo, 0.82))
            panel_sides(shape, bed, (0.78, 0.88), half, darker(cargo, 0.5))
            patch_end(shape, False, (-0.02, 0.02), (tail, 0.82), (tail, top - 0.06), darker(cargo, 0.5))
            _tail_lamps(shape, tail, half, 0.8)
    else:
        _open_bed(shape, rng, bed, half, darker(cab, 0.92) if rng.random() < 0.4 else cargo)
    return shape.build()


def _tail_lamps(shape: ShapeBuilder, tail: float, half: float, z: float) -> None:
    for side in (-1, 1):
        y = sorted((side * half * 0.95, side * half * 0.7))
        patch_end(shape, False, (y[0], y[1]), (tail, z), (tail, z + 0.12), TAIL_LIGHT, Material.LAMP)


def _open_bed(
    shape: ShapeBuilder, rng: np.random.Generator, bed: tuple[float, float], half: float, colour: Colour
) -> None:
    """Low walls about a floor, and sometimes boxes on it."""
    floor, rim = 0.8, 1.22
    with shape.solid(2):
        shape.face(
            [(bed[0], -half, floor), (bed[1], -half, floor), (bed[1], half, floor), (bed[0], half, floor)],
            (70, 74, 78),
            Material.MATTE,
        )
        # The inner sides first: the outer ones and the load cover them.
        inner = darker(colour, 0.7)
        for y in (-half, half):
            wall = [(bed[0], y, floor), (bed[1], y, floor), (bed[1], y, rim), (bed[0], y, rim)]
            shape.face(wall if y > 0 else wall[::-1], inner, Material.MATTE)
        for x in bed:
            wall = [(x, -half, floor), (x, half, floor), (x, half, rim), (x, -half, rim)]
            shape.face(wall if x == bed[0] else wall[::-1], inner, Material.MATTE)
        if rng.random() < 0.7:
            for x in np.arange(bed[0] + 0.25, bed[1] - 0.9, 0.95):
                if rng.random() < 0.7:
                    tone = rng.uniform(0.75, 1.1)
                    crate = (90 * tone, 140 * tone, 175 * tone)
                    shape.box((x, x + 0.8), (-0.6, 0.6), (floor, floor + rng.uniform(0.3, 0.75)), crate)
        for y in (-half, half):
            wall = [(bed[0], y, floor - 0.1), (bed[1], y, floor - 0.1), (bed[1], y, rim), (bed[0], y, rim)]
            shape.face(wall if y < 0 else wall[::-1], colour)
        tail = bed[0]
        shape.face(
            [(tail, half, floor - 0.1), (tail, -half, floor - 0.1), (tail, -half, rim), (tail, half, rim)], colour
        )
        for x in np.arange(bed[0] + 0.5, bed[1], 0.7):
            panel_sides(shape, (x, x + 0.05), (floor - 0.1, rim), half, darker(colour, 0.65))
        _tail_lamps(shape, tail, half, floor - 0.08)
