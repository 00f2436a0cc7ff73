"""The surveillance camera of a drawn scene: an elevated pinhole over a ground plane.

World frame: metres, x to the right and y away from the camera at yaw 0, z up, the ground at z = 0. Image frame:
pixels, the top left corner of the image at (0, 0), so pixel i covers [i, i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]

NEAR_M = 0.4
"""Nothing nearer than this in front of the camera is drawn."""


@dataclass(frozen=True, slots=True, eq=False)
class Camera:
    """Where the camera stands, how it looks, and how large it draws."""

    position: Points
    """(3,) metres."""
    axes: Points
    """(3, 3) rows: right, down and forward of the camera in the world."""
    focal_px: float
    size_hw: tuple[int, int]

    @classmethod
    def elevated(
        cls,
        size_hw: tuple[int, int],
        *,
        position: tuple[float, float, float],
        yaw_deg: float,
        pitch_deg: float,
        roll_deg: float,
        focal_ratio: float,
    ) -> Camera:
        """A camera looking along +y turned left by `yaw_deg`, down by `pitch_deg`.

        `focal_ratio` is the focal length over the image's width.
        """
        yaw, pitch, roll = np.deg2rad([yaw_deg, pitch_deg, roll_deg])
        heading = np.array([-np.sin(yaw), np.cos(yaw), 0.0])
        right = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        forward = heading * np.cos(pitch) - np.array([0.0, 0.0, np.sin(pitch)])
        down = np.cross(forward, right)
        tilted_right = right * np.cos(roll) + down * np.sin(roll)
        tilted_down = down * np.cos(roll) - right * np.sin(roll)
        axes = np.stack([tilted_right, tilted_down, forward])
        return cls(np.array(position, np.float64), axes, focal_ratio * size_hw[1], size_hw)

    @property
    def forward_xy(self) -> Points:
        """(2,) unit vector on the ground along the line of sight."""
        heading = self.axes[2, :2]
        return np.asarray(heading / np.linalg.norm(heading))

    def view(self, points: Points) -> Points:
        """World (N, 3) to the camera's frame (N, 3): right, down, forward, metres."""
        return np.asarray((points - self.position) @ self.axes.T)

    def image_of(self, viewed: Points) -> Points:
        """Points (N, 3) in the camera's frame, all in front of it, to image pixels (N, 2)."""
        height, width = self.size_hw
        return np.asarray(viewed[:, :2] * (self.focal_px / viewed[:, 2:3]) + (width / 2, height / 2))

    def project(self, points: Points) -> tuple[Points, Points]:
        """World (N, 3) to image pixels (N, 2) and depths (N,) in metres; meaningless where depth <= 0."""
        viewed = self.view(points)
        depth = viewed[:, 2]
        safe = np.where(np.abs(depth) < 1e-6, 1e-6, depth)
        return self.image_of(np.column_stack([viewed[:, :2], safe])), depth

    def outline(self, polygon: Points) -> Points:
        """Image pixels (M, 2) of the part of a world polygon (N, 3) in front of the camera; (0, 2) if none is."""
        viewed = self.view(polygon)
        inside = viewed[:, 2] > NEAR_M
        if not inside.all():
            viewed = _cut_at_near_plane(viewed, inside)
        return self.image_of(viewed) if len(viewed) > 2 else np.zeros((0, 2))

    def ground_to_image(self) -> Points:
        """Homography (3, 3) from ground metres (x, y, 1) to homogeneous image pixels."""
        height, width = self.size_hw
        intrinsic = np.array([[self.focal_px, 0, width / 2], [0, self.focal_px, height / 2], [0, 0, 1]])
        plane = np.column_stack([self.axes[:, 0], self.axes[:, 1], -self.axes @ self.position])
        return np.asarray(intrinsic @ plane)

    def ground_at(self, pixels: Points) -> Points:
        """Ground metres (N, 2) seen at image pixels (N, 2); NaN at and above the horizon."""
        height, width = self.size_hw
        centred = (pixels - (width / 2, height / 2)) / self.focal_px
        rays = np.column_stack([centred, np.ones(len(centred))]) @ self.axes
        reach = np.where(rays[:, 2] < -1e-6, -self.position[2] / np.minimum(rays[:, 2], -1e-6), np.nan)
        return np.asarray(self.position[:2] + rays[:, :2] * reach[:, None])

    def horizon_row(self) -> float:
        """Image row of the horizon at the image's middle column; negative when it is above the image."""
        forward = self.axes[2]
        return float(self.size_hw[0] / 2 - self.focal_px * -forward[2] / np.hypot(forward[0], forward[1]))


def _cut_at_near_plane(viewed: Points, inside: NDArray[np.bool_]) -> Points:
    kept: list[Any] = []
    for index, point in enumerate(viewed):
        after = (index + 1) % len(viewed)
        if inside[index]:
            kept.append(point)
        if inside[index] != inside[after]:
            share = (NEAR_M - point[2]) / (viewed[after, 2] - point[2])
            kept.append(point + share * (viewed[after] - point))
    return np.array(kept).reshape(-1, 3)
