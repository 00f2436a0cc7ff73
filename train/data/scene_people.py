"""Adults and children as solid shapes. Lengths are metres; a person looks along +x."""

from __future__ import annotations

import numpy as np

from parkdet.train.data.scene_shapes import Colour, Material, Shape, ShapeBuilder
from parkdet.train.data.scene_vehicle_parts import pick

_SKINS: tuple[Colour, ...] = ((150, 180, 225), (130, 165, 212), (100, 135, 185))
_HAIR: tuple[Colour, ...] = ((24, 22, 22), (34, 40, 52), (46, 58, 84), (120, 120, 122))
_TROUSERS: tuple[Colour, ...] = ((44, 40, 38), (78, 54, 40), (90, 84, 80), (96, 104, 112))
_COATS: tuple[Colour, ...] = (
    (48, 46, 44),
    (96, 70, 52),
    (70, 66, 66),
    (200, 200, 198),
    (66, 70, 104),
    (78, 92, 70),
    (150, 150, 150),
    (120, 150, 176),
)
_CHILD_COATS: tuple[Colour, ...] = (
    (30, 200, 250),
    (60, 60, 235),
    (190, 100, 245),
    (235, 160, 40),
    (80, 205, 90),
    (240, 120, 180),
)
_RUBBER: Colour = (26, 26, 26)
_BAGS: tuple[Colour, ...] = (
    (40, 40, 205),
    (190, 90, 30),
    (60, 160, 60),
    (30, 30, 30),
    (225, 225, 225),
    (30, 120, 220),
)


def _person(
    rng: np.random.Generator,
    *,
    height: float,
    head: float,
    coat: Colour,
    trousers: Colour,
    pushing: bool,
) -> ShapeBuilder:
    """Legs in a stride, a trunk, arms and a head of radius `head`; `pushing` puts the hands forward."""
    shape = ShapeBuilder()
    hip, shoulder = 0.47 * height, height - 2 * head - 0.05 * height
    girth = 0.105 * height
    stride = rng.uniform(0.04, 0.2) * height * 0.5
    shade = (coat[0] * 0.85, coat[1] * 0.85, coat[2] * 0.85)
    for side in (-1, 1):
        foot = side * stride
        y = side * 0.058 * height
        knee = (foot * 0.5 + 0.03, y, hip * 0.52)
        shape.rod([(0, y, hip), knee, (foot, y, 0.06)], 0.047 * height, trousers)
        shape.rod([(foot - 0.03, y, 0.04), (foot + 0.14 * height / 1.7, y, 0.04)], 0.045, _RUBBER)
    with shape.solid(1):
        shape.extrude(
            [
                (-0.065 * height, hip - 0.03),
                (0.065 * height, hip - 0.03),
                (0.07 * height, shoulder),
                (-0.07 * height, shoulder),
            ],
            [girth * 0.9, girth * 0.9, girth * 1.2, girth * 1.2],
            coat,
            Material.MATTE,
        )
    shape.rod([(0, -girth * 0.95, shoulder), (0, girth * 0.95, shoulder)], 0.055 * height, coat, stage=1)
    for side in (-1, 1):
        y = side * girth * 1.32
        swing = 0.28 * height if pushing else -side * stride * 0.9
        hand_z = 0.62 * height if pushing else hip - 0.02 * height
        elbow = (swing * 0.35, y * 1.06, (shoulder + hand_z) / 2 - 0.03 * height)
        shape.rod([(0, y, shoulder - 0.01), elbow, (swing, y * 0.95, hand_z)], 0.036 * height, shade, stage=1)
        shape.ball((swing, y * 0.95, hand_z), 0.035 * height, pick(rng, _SKINS), stage=1)
    return shape


def _head(shape: ShapeBuilder, height: float, radius: float, skin: Colour, hair: Colour) -> None:
    centre = height - radius
    shape.rod([(0, 0, centre - radius * 1.5), (0, 0, centre)], radius * 0.5, skin, stage=2)
    shape.ball((0.12 * radius, 0, centre - 0.12 * radius), radius * 0.92, skin, stage=3)
    # Most of a head seen from above and behind is hair; the face shows when it is turned to the camera.
    shape.ball((-0.22 * radius, 0, centre + 0.12 * radius), radius * 0.95, hair, stage=3)
    shape.ball((0.1 * radius, 0, centre + 0.42 * radius), radius * 0.72, hair, stage=4)


def adult(rng: np.random.Generator, pushing: bool) -> Shape:
    """1.6 to 1.86 m, muted clothes, a head of a seventh of the height."""
    height = rng.uniform(1.6, 1.86)
    head = height / 14.5
    coat, trousers = pick(rng, _COATS), pick(rng, _TROUSERS)
    shape = _person(rng, height=height, head=head, coat=coat, trousers=trousers, pushing=pushing)
    _head(shape, height, head, pick(rng, _SKINS), pick(rng, _HAIR))
    if not pushing and rng.random() < 0.3:
        bag = pick(rng, _BAGS)
        with shape.solid(1):
            shape.box((-0.1, 0.16), (0.27, 0.36), (0.55, 0.85), bag, Material.MATTE)
    return shape.build()


def child(rng: np.random.Generator) -> Shape:
    """1.0 to 1.25 m, bright clothes, a large head under a cap, a backpack."""
    height = rng.uniform(1.02, 1.25)
    head = height / 9.6
    coat = pick(rng, _CHILD_COATS)
    bag = pick(rng, [colour for colour in _CHILD_COATS if colour != coat])
    shape = _person(rng, height=height, head=head, coat=coat, trousers=pick(rng, _TROUSERS), pushing=False)
    _head(shape, height, head, pick(rng, _SKINS), bag if rng.random() < 0.65 else pick(rng, _HAIR))
    with shape.solid(1):
        shape.box((-0.26, -0.085), (-0.13, 0.13), (0.5 * height, 0.76 * height), bag, Material.MATTE)
    return shape.build()
