"""Who stands where: the random decisions of one scene, made before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from parkdet.train.data import scene_buses_trucks as heavy
from parkdet.train.data import scene_cars as cars
from parkdet.train.data import scene_people as people
from parkdet.train.data import scene_small_things as small
from parkdet.train.data import scene_surroundings as around
from parkdet.train.data.scene_camera import NEAR_M, Camera, Points
from parkdet.train.data.scene_lot import Lot, plan_lot
from parkdet.train.data.scene_shapes import Pose, Shape
from parkdet.train.data.scene_weather import Conditions, plan_conditions

SEDAN, SUV, VAN, BUS, SCHOOL_BUS, TRUCK, TAXI, ADULT, CHILD, MOTORCYCLE, KICKBOARD, BICYCLE, STROLLER, CART = range(14)
VEHICLES = range(7)

_SHARES = np.array([11.0, 9.0, 8.5, 6.5, 6.5, 8.0, 7.5, 7.5, 7.5, 6.5, 7.0, 7.0, 7.5, 6.5])
"""How often each class is drawn."""
_LEAST_HEIGHT = 38 / 960
"""A person or small thing stands near enough to be this high, as a share of the image's width."""
_TRIES = 40
_LEAST_COUNT = 9
_VARIANTS = 48
_WITH_CHOICE: dict[int, Callable[[np.random.Generator, bool], Shape]] = {
    SEDAN: cars.sedan,
    SUV: cars.suv,
    VAN: cars.van,
    BUS: heavy.bus,
    SCHOOL_BUS: heavy.school_bus,
    TRUCK: heavy.truck,
    TAXI: cars.taxi,
    ADULT: people.adult,
    MOTORCYCLE: small.motorcycle,
}
_PLAIN: dict[int, Callable[[np.random.Generator], Shape]] = {
    CHILD: people.child,
    KICKBOARD: small.kickboard,
    BICYCLE: small.bicycle,
    STROLLER: small.stroller,
    CART: small.cart,
}


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A shape that stands in the scene; `class_id` is -1 for what the contest does not ask for."""

    shape: Shape
    pose: Pose
    class_id: int

    def footprint(self, margin: float = 0.0) -> Points:
        """(4, 2) corners on the ground of the rectangle around the shape, anticlockwise."""
        low, high = self.shape.extent[0] - margin, self.shape.extent[1] + margin
        corners = np.array([(low[0], low[1], 0), (high[0], low[1], 0), (high[0], high[1], 0), (low[0], high[1], 0)])
        return self.pose.to_world(corners)[:, :2]


@dataclass(frozen=True, slots=True, eq=False)
class ScenePlan:
    camera: Camera
    lot: Lot
    conditions: Conditions
    backdrop: Shape | None
    placed: tuple[Placed, ...]
    """In painting order: what may cover another comes after it."""
    texture_seed: int
    """For the grain of ground, rain and sensor, which nothing else depends on."""


def plan_scene(rng: np.random.Generator, size_hw: tuple[int, int], *, empty: bool = False) -> ScenePlan:
    """Decide a scene. `empty` leaves out everything that would be labelled."""
    along = rng.random() < 0.3
    camera, span = _plan_camera(rng, size_hw, along)
    lot = plan_lot(rng, span)
    conditions = plan_conditions(rng)
    crowd = _Crowd(rng, camera, lot, conditions.headlights)
    if not empty:
        crowd.fill(int(rng.integers(11, 21)))
    crowd.add_street_furniture()
    backdrop = around.surroundings(rng, camera, lot, conditions.dark)
    placed = tuple(crowd.placed[index] for index in painting_order(crowd.footprints(), camera.position[:2]))
    return ScenePlan(camera, lot, conditions, backdrop, placed, int(rng.integers(2**32)))


def _plan_camera(rng: np.random.Generator, size_hw: tuple[int, int], along: bool) -> tuple[Camera, tuple[float, float]]:
    """A camera across the rows, or looking down the aisle; and how far the lot goes left and right."""
    height = float(rng.uniform(4.8, 7.6))
    if along:
        position = (-13.0, float(rng.uniform(6.5, 10.5)), height)
        aim_m, yaw, span = float(rng.uniform(12.0, 15.0)), -90 + float(rng.uniform(-13, 13)), (-30.0, 22.0)
    else:
        position = (0.0, float(rng.uniform(-4.5, -1.5)), height)
        aim_m, yaw, span = float(rng.uniform(12.5, 15.0)), float(rng.uniform(-30, 30)), (-26.0, 26.0)
    pitch = float(np.clip(np.rad2deg(np.arctan2(height, aim_m)) + rng.uniform(-1.0, 2.0), 20, 38))
    camera = Camera.elevated(
        size_hw,
        position=position,
        yaw_deg=yaw,
        pitch_deg=pitch,
        roll_deg=float(rng.normal(0, 0.7)),
        focal_ratio=float(rng.uniform(0.64, 0.78)) * min(1.0, size_hw[0] / size_hw[1] * 16 / 9),
    )
    return camera, span


def painting_order(footprints: Points, camera_xy: Points) -> list[int]:
    """Order of N disjoint footprints (N, 4, 2), corners anticlockwise, so that no later one is behind an earlier.

    Of two disjoint convex polygons an edge of one has the other wholly on its outer side: the one on the camera's
    side of that edge's line may cover the other. Rings of mutual cover, rare, are cut at the farthest.
    """
    count = len(footprints)
    if not count:
        return []
    edge = np.roll(footprints, -1, axis=1) - footprints
    normal = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)  # outward
    offset = (normal * footprints).sum(-1)
    others = np.einsum("aed,bcd->aebc", normal, footprints) - offset[:, :, None, None]
    separates = (others > -1e-9).all(-1)  # (a, edge, b): b is outside that edge of a
    outside = (normal @ camera_xy - offset > 0)[:, :, None]
    covered_by = (separates & outside).any(1)  # (a, b): b stands between the camera and that edge of a
    covers = (separates & ~outside).any(1)  # (a, b): a is on the camera's side of its own edge
    # b after a when b is on the camera's side; either polygon's edge may tell, and they do not contradict.
    after = covered_by | covers.T
    after &= ~(after & after.T)
    distance = np.linalg.norm(footprints.mean(1) - camera_xy, axis=1)
    waiting, order = set(range(count)), []
    while waiting:
        free = [a for a in waiting if not any(after[b, a] for b in waiting if b != a)]
        chosen = max(free or waiting, key=lambda a: (distance[a], -a))
        order.append(chosen)
        waiting.remove(chosen)
    return order


def overlaps(one: Points, others: Points) -> NDArray[np.bool_]:
    """Whether a convex polygon (4, 2) meets each of (N, 4, 2), all anticlockwise: (N,)."""
    return np.asarray(~(_outside(one[None], others)[0] | _outside(others, one[None])[:, 0]))


def _outside(polygons: Points, others: Points) -> NDArray[np.bool_]:
    """(A, B): an edge of polygon a has all of b on its outer side."""
    edge = np.roll(polygons, -1, axis=1) - polygons
    normal = np.stack([edge[..., 1], -edge[..., 0]], axis=-1)
    offset = (normal * polygons).sum(-1)
    beyond = np.einsum("aed,bcd->aebc", normal, others) - offset[:, :, None, None]
    return np.asarray((beyond > 0).all(-1).any(1))


@cache
def _variant(class_id: int, number: int, special: bool) -> Shape:
    """One of the things of a class. `special`: lights on, or hands forward for an adult who pushes.

    Kept, as building one takes as long as painting it several times.
    """
    rng = np.random.Generator(np.random.PCG64([class_id, number]))
    if class_id in _WITH_CHOICE:
        return _WITH_CHOICE[class_id](rng, special)
    return _PLAIN[class_id](rng)


class _Crowd:
    """Places things one after another where there is room and the camera sees them."""

    def __init__(self, rng: np.random.Generator, camera: Camera, lot: Lot, headlights: bool) -> None:
        self._rng, self._camera, self._lot, self._headlights = rng, camera, lot, headlights
        self.placed: list[Placed] = []
        self._taken: list[Points] = []
        self._bays = self._free_bays()

    def footprints(self) -> Points:
        return np.array([thing.footprint() for thing in self.placed]).reshape(-1, 4, 2)

    def fill(self, count: int) -> None:
        """Place about `count` things, large ones first."""
        drawn = self._rng.choice(len(_SHARES), size=count, p=_SHARES / _SHARES.sum())
        wanted = np.bincount(drawn, minlength=len(_SHARES)).tolist()
        wanted[BUS], wanted[SCHOOL_BUS] = min(wanted[BUS], 1), min(wanted[SCHOOL_BUS], 2)
        for class_id in (BUS, SCHOOL_BUS, TRUCK, VAN, SUV, SEDAN, TAXI):
            for _ in range(wanted[class_id]):
                if class_id in (BUS, SCHOOL_BUS):
                    self._place_long(class_id)
                else:
                    self._place_vehicle(class_id)
        adults = wanted[ADULT]
        for class_id in (STROLLER, CART, MOTORCYCLE, BICYCLE, KICKBOARD, CHILD):
            accompanied = {STROLLER: 0.5, CART: 0.5, CHILD: 0.6}.get(class_id, 0.0)
            for _ in range(wanted[class_id]):
                if adults and self._rng.random() < accompanied:
                    adults -= self._place_pair(class_id)
                else:
                    self._place_small(class_id)
        for _ in range(adults):
            self._place_small(ADULT)
        for _ in range(_TRIES):  # a view of few bays: more people and things
            if len(self.placed) >= _LEAST_COUNT:
                break
            self._place_small(int(self._rng.integers(ADULT, len(_SHARES))))

    def add_street_furniture(self) -> None:
        """Lamp posts where rows meet and along the far edge, and a few traffic cones."""
        lot, rng = self._lot, self._rng
        high = float(rng.uniform(5.5, 7.5))
        for y, facing in ((lot.far + 0.6, -np.pi / 2), (lot.rows[1].head + 0.05, -np.pi / 2)):
            start = float(rng.uniform(lot.x[0], lot.x[0] + 9))
            for x in np.arange(start, lot.x[1], 11.0):
                self._try(Placed(around.lamp_post(high), Pose(float(x), y, facing), -1), 0.0, least_inside=0.2)
        for _ in range(int(rng.integers(0, 3))):
            self._scatter(around.cone, -1, 0.7)

    def _free_bays(self) -> list[tuple[int, int]]:
        """(row, bay) whose middle is in the image and where one may park, in random order."""
        edges = self._lot.bay_edges()
        height, width = self._camera.size_hw
        free = []
        for number, row in enumerate(self._lot.rows):
            for bay in range(len(edges) - 1):
                middle = np.array([[edges[bay] + self._lot.bay_width / 2, (row.low + row.high) / 2, 0.7]])
                pixel, depth = self._camera.project(middle)
                seen = 0.02 * width < pixel[0, 0] < 0.98 * width and 0 < pixel[0, 1] < 1.02 * height
                if depth[0] > 5 and seen and (number, bay) not in self._lot.closed_bays:
                    free.append((number, bay))
        self._rng.shuffle(free)
        return free

    def _try(self, thing: Placed, margin: float, *, least_inside: float) -> bool:
        """Place a thing if it is in sight and touches nothing."""
        footprint = thing.footprint(margin)
        if self._taken and overlaps(footprint, np.array(self._taken)).any():
            return False
        if share_inside(self._camera, thing) < least_inside:
            return False
        self.placed.append(thing)
        self._taken.append(footprint)
        return True

    def _vehicle(self, class_id: int) -> Shape:
        lit = self._headlights and self._rng.random() < 0.4
        return _variant(class_id, int(self._rng.integers(_VARIANTS)), bool(lit))

    def _place_vehicle(self, class_id: int) -> bool:
        rng = self._rng
        shape = self._vehicle(class_id)
        if rng.random() < 0.16 and self._drive(shape, class_id):
            return True
        edges = self._lot.bay_edges()
        tall = class_id in (VAN, TRUCK)
        for number, (row_number, bay) in enumerate(self._bays):
            if tall and row_number == 0 and rng.random() < 0.7:
                continue  # a tall one in the nearest row hides the scene
            row = self._lot.rows[row_number]
            into = np.pi / 2 if row.head > row.low else -np.pi / 2
            heading = into + (np.pi if rng.random() < 0.4 else 0) + rng.normal(0, 0.03)
            middle = (row.low + row.high) / 2 - np.sign(into) * 0.1 + rng.normal(0, 0.12)
            x = edges[bay] + self._lot.bay_width / 2 + rng.normal(0, 0.08)
            thing = Placed(shape, Pose(float(x), float(middle), float(heading)), class_id)
            if self._try(thing, 0.0, least_inside=0.45):
                del self._bays[number]
                return True
        return self._drive(shape, class_id)

    def _drive(self, shape: Shape, class_id: int) -> bool:
        """Put a vehicle into an aisle, in its lane."""
        rng, lot = self._rng, self._lot
        for _ in range(12):
            low, high = lot.aisles[int(rng.integers(len(lot.aisles)))]
            keeps_right = rng.random() < 0.5
            y = low + (high - low) * (0.28 if keeps_right else 0.72) + rng.normal(0, 0.1)
            heading = (0.0 if keeps_right else np.pi) + rng.normal(0, 0.05)
            x = rng.uniform(lot.x[0] + 3, lot.x[1] - 3)
            thing = Placed(shape, Pose(float(x), float(y), float(heading)), class_id)
            if self._try(thing, 0.25, least_inside=0.7):
                return True
        return False

    def _place_long(self, class_id: int) -> bool:
        """A bus stands in the lane at the far edge, or drives."""
        rng, lot = self._rng, self._lot
        shape = self._vehicle(class_id)
        if rng.random() < 0.3 and self._drive(shape, class_id):
            return True
        for _ in range(_TRIES):
            y = sum(lot.bus_lane) / 2 + rng.normal(0, 0.1)
            heading = (0.0 if rng.random() < 0.5 else np.pi) + rng.normal(0, 0.015)
            thing = Placed(shape, Pose(float(rng.uniform(*lot.x)), float(y), float(heading)), class_id)
            if self._try(thing, 0.1, least_inside=0.6):
                return True
        return self._drive(shape, class_id)

    def _small(self, class_id: int, *, pushing: bool = False) -> Shape:
        special = pushing or (class_id == MOTORCYCLE and self._headlights and self._rng.random() < 0.3)
        return _variant(class_id, int(self._rng.integers(_VARIANTS)), bool(special))

    def _place_small(self, class_id: int) -> bool:
        return self._scatter(lambda: self._small(class_id), class_id, 0.92)

    def _scatter(self, build: Callable[[], Shape], class_id: int, least_inside: float) -> bool:
        """Try spots that are even over the image: the sizes in the image then vary as the depth does."""
        shape = build()
        for _ in range(_TRIES):
            pose = self._spot(float(shape.extent[1, 2]))
            if pose and self._try(Placed(shape, pose, class_id), 0.12, least_inside=least_inside):
                return True
        return False

    def _place_pair(self, class_id: int) -> bool:
        """An adult behind a stroller or cart, or beside a child. False when only the other found room, or none."""
        rng = self._rng
        other = self._small(class_id)
        for _ in range(_TRIES):
            pose = self._spot(float(other.extent[1, 2]))
            if pose is None:
                continue
            pushing = class_id != CHILD
            back, aside = (-0.85, 0.0) if pushing else (rng.normal(0, 0.1), float(rng.choice([-0.62, 0.62])))
            cos, sin = np.cos(pose.heading), np.sin(pose.heading)
            beside = Pose(pose.x + back * cos - aside * sin, pose.y + back * sin + aside * cos, pose.heading)
            one, two = Placed(other, pose, class_id), Placed(self._small(ADULT, pushing=pushing), beside, ADULT)
            if self._try(one, 0.0, least_inside=0.92):
                return self._try(two, 0.0, least_inside=0.92)
        return False

    def _spot(self, tall: float) -> Pose | None:
        """A pose on the lot where something of this height is large enough in the image."""
        rng, camera, lot = self._rng, self._camera, self._lot
        height, width = camera.size_hw
        pixel = np.array([[rng.uniform(0.04, 0.96) * width, rng.uniform(0.2, 0.99) * height]])
        x, y = camera.ground_at(pixel)[0]
        if not (lot.x[0] < x < lot.x[1] and 0.2 < y < lot.far - 0.3):
            return None
        if any(low < y < high for low, high in ((row.low, row.high) for row in lot.rows)) and rng.random() < 0.5:
            return None  # most of them are in the aisles
        depth = float(camera.view(np.array([[x, y, tall / 2]]))[0, 2])
        level = float(np.hypot(camera.axes[2, 0], camera.axes[2, 1]))
        if depth < 3.0 or tall * level * camera.focal_px / depth < _LEAST_HEIGHT * width:
            return None
        return Pose(float(x), float(y), float(rng.uniform(0, 2 * np.pi)))


def share_inside(camera: Camera, thing: Placed) -> float:
    """Share of the convex outline of a thing that lies in the image; 0 when it reaches behind the camera."""
    import cv2

    pixels, depth = camera.project(thing.pose.to_world(thing.shape.points))
    if depth.min() < NEAR_M:
        return 0.0
    height, width = camera.size_hw
    hull = cv2.convexHull(pixels.astype(np.float32))
    frame = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    whole = cv2.contourArea(hull)
    part = cv2.intersectConvexConvex(hull, frame)[0]
    return float(part / whole) if whole > 0 else 0.0
