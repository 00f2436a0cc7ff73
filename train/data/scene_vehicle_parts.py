"""What all vehicles have: wheels, lights, and patches of colour or glass on their sides and ends.

Lengths are metres, x forward, y to the left, z up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from parkdet.train.data.scene_shapes import Colour, Material, ShapeBuilder

GLASS: Colour = (58, 48, 40)
TYRE: Colour = (28, 28, 28)
RIM: Colour = (150, 150, 150)
BLACK: Colour = (34, 33, 32)
HEADLIGHT: Colour = (235, 240, 240)
TAIL_LIGHT: Colour = (30, 25, 190)
PLATE: Colour = (225, 228, 228)
AMBER: Colour = (40, 150, 250)
LIFT = 0.012  # decals stand off the surface below by this much, so that their own facing is computed apart


def pick(rng: np.random.Generator, choices: Sequence[Colour]) -> Colour:
    return choices[int(rng.integers(len(choices)))]


def darker(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def add_wheels(shape: ShapeBuilder, axles: Sequence[float], track: float, radius: float, width: float = 0.2) -> None:
    """Tyres under the body first, then, above all else, the outer discs that cover the body's lower edge."""
    angles = np.arange(12) * (2 * np.pi / 12)
    for x in axles:
        rim = np.column_stack([x + radius * np.cos(angles), radius + radius * np.sin(angles)])
        for side in (-1.0, 1.0):
            with shape.solid(0):
                shape.extrude(
                    [(float(a), float(b)) for a, b in rim],
                    width / 2,
                    TYRE,
                    Material.MATTE,
                    middle=side * (track - width / 2),
                )
            with shape.solid(4):
                for size, colour in ((1.18, BLACK), (1.0, TYRE), (0.62, RIM), (0.2, (70, 70, 70))):
                    turn = angles if size <= 1 else angles[:7]  # the arch lies on the body: half a disc
                    y = np.full(len(turn), side * (track + LIFT))
                    disc = np.column_stack([x + size * radius * np.cos(turn), y, radius + size * radius * np.sin(turn)])
                    shape.face(disc if side < 0 else disc[::-1], colour, Material.MATTE)


def patch_sides(
    shape: ShapeBuilder,
    corners_xz: Sequence[tuple[float, float]],
    half_width: tuple[float, float, float, float],
    colour: Colour,
    material: Material = Material.MATTE,
) -> None:
    """A patch on both sides. `half_width` is (z low, half width there, z high, half width there)."""
    low, half_low, high, half_high = half_width
    outline = np.asarray(corners_xz, np.float64)
    half = half_low + (outline[:, 1] - low) / max(high - low, 1e-6) * (half_high - half_low) + LIFT
    shape.face(np.column_stack([outline[:, 0], -half, outline[:, 1]]), colour, material)
    shape.face(np.column_stack([outline[:, 0], half, outline[:, 1]])[::-1], colour, material)


def panel_sides(
    shape: ShapeBuilder,
    x: tuple[float, float],
    z: tuple[float, float],
    half: float,
    colour: Colour,
    material: Material = Material.MATTE,
) -> None:
    """A rectangle on both upright sides."""
    patch_sides(shape, [(x[0], z[0]), (x[1], z[0]), (x[1], z[1]), (x[0], z[1])], (0, half, 1, half), colour, material)


def patch_end(
    shape: ShapeBuilder,
    ahead: bool,
    y: tuple[float, float],
    low: tuple[float, float],
    high: tuple[float, float],
    colour: Colour,
    material: Material = Material.MATTE,
    taper: float = 1.0,
) -> None:
    """A patch on the front or back: `low` and `high` are (x, z) of its edges, `taper` narrows the upper one."""
    lift = LIFT if ahead else -LIFT
    quad = np.array(
        [
            (low[0] + lift, y[0], low[1]),
            (low[0] + lift, y[1], low[1]),
            (high[0] + lift, y[1] * taper, high[1]),
            (high[0] + lift, y[0] * taper, high[1]),
        ]
    )
    shape.face(quad if ahead else quad[::-1], colour, material)


def add_lights(shape: ShapeBuilder, front: float, back: float, half: float, z: tuple[float, float], lit: bool) -> None:
    """Head and tail lights at both corners; `lit` ones shine at night."""
    for side in (-1, 1):
        y = sorted((side * half * 0.97, side * half * 0.62))
        patch_end(shape, True, (y[0], y[1]), (front, z[0]), (front - 0.02, z[1]), HEADLIGHT, Material.LAMP)
        patch_end(shape, False, (y[0], y[1]), (back, z[0]), (back + 0.02, z[1]), TAIL_LIGHT, Material.LAMP)
        if lit:
            middle = (z[0] + z[1]) / 2
            shape.lamp((front + 0.05, side * half * 0.8, middle), (210, 245, 255), 0.8)
            shape.lamp((back - 0.05, side * half * 0.8, middle), (30, 30, 200), 0.4)
