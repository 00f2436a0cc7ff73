"""What the kernels have to do, from the shapes: `python -m parkdet.runtime.cuda.work` prints it as a table.

A calculation, not a measurement. A kernel takes as long as the longest of three: its bytes at the card's memory
bandwidth, its instructions at the rate of the multiprocessors that have a block of it, its steps that wait for one
another at STEP_SECONDS each; and LAUNCH_SECONDS come on top. Instructions were counted in the sources, by hand and
generously; bytes are what lies in memory, as if no cache held any of it between two kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import click

from parkdet.runtime.cuda.kernels import HeadGeometry, OutputLayout, head_geometries, workspace_bytes
from parkdet.runtime.geometry import Letterbox
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import MAX_CANDIDATES

STEP_SECONDS = 1e-6
"""Two barriers of 1024 threads with a load between them: some 700 cycles, rounded up to twice that."""
LAUNCH_SECONDS = 3e-6
"""From the end of one kernel to the start of the next in a stream; less in a replayed graph."""
TILE, SORT_STAGES = 2048, 66
"""Keys of a tile, and the compare-exchange stages of its bitonic sort."""
X6_FLOPS_PER_PIXEL = 508_200
"""YOLOv5x6 with 14 classes, a multiply-add counted as two; a test counts it in the model."""


@dataclass(frozen=True, slots=True)
class Card:
    """What the calculation takes of a GPU. Source: the vendor's data sheets."""

    name: str
    bytes_per_second: float
    multiprocessors: int
    instructions_per_second: float
    """Of one multiprocessor, all lanes."""
    tensor_flops: float
    """Dense FP16 at its peak: no engine gets there, so its share of an engine's time is overstated."""


CARDS = (
    Card("T4", 320e9, 40, 64 * 1.59e9, 65e12),
    Card("H100", 3.35e12, 132, 128 * 1.755e9, 989e12),
)


@dataclass(frozen=True, slots=True)
class Work:
    """One kernel's, all its launches together, for a whole batch."""

    kernel: str
    launches: int
    bytes: float
    instructions: float
    blocks: float
    """Of one launch: on so many multiprocessors it runs at most."""
    steps: float = 0
    """That wait for one another."""

    def seconds(self, card: Card) -> float:
        """On paper, on this card."""
        rate = min(self.blocks, card.multiprocessors) * card.instructions_per_second
        longest = max(self.bytes / card.bytes_per_second, self.instructions / rate, self.steps * STEP_SECONDS)
        return longest + self.launches * LAUNCH_SECONDS


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What is in the images of a batch."""

    name: str
    batch: int
    passing: int
    """Anchors of an image whose objectness passes."""
    candidates: int
    looked_at: int
    """Candidates of an image that the greedy pass gets to."""
    max_det: int = 50


def contest_spec() -> ModelSpec:
    """The contest's detector as far as shapes go: P6, 14 classes, three views."""
    return ModelSpec(
        class_names=tuple(f"class {index}" for index in range(14)),
        strides=(8, 16, 32, 64),
        anchors=(((1.0, 1.0),) * 3,) * 4,
        imgsz=1536,
        tta=True,
    )


def scenes(anchors: int, classes: int, batch: int) -> tuple[Scene, Scene, Scene]:
    """An ordinary batch; one where every image is over the cap; and the worst there is, which no trained model gives:
    every output passes, and nothing lets the greedy pass stop early.
    """
    everything = anchors * classes
    return (
        Scene(name="ordinary", batch=batch, passing=anchors // 50, candidates=5_000, looked_at=1_024),
        Scene(name="over the cap", batch=batch, passing=anchors // 10, candidates=100_000, looked_at=4_096),
        Scene(
            name="worst", batch=batch, passing=anchors, candidates=everything, looked_at=min(everything, MAX_CANDIDATES)
        ),
    )


def work(heads: list[HeadGeometry], classes: int, letterbox: Letterbox, scene: Scene) -> Iterator[Work]:
    """Every kernel's work for one batch of full canvases of FP16 heads."""
    batch, anchors = scene.batch, sum(head.num_anchors for head in heads)
    sorted_keys = min(scene.candidates, MAX_CANDIDATES)
    over = scene.candidates > MAX_CANDIDATES
    blocks, tiles = math.ceil(anchors / 1024) * batch, math.ceil(sorted_keys / TILE)
    (height, width), (resized_h, resized_w), canvas = letterbox.image_hw, letterbox.resized_hw, letterbox.canvas_hw
    taps = math.ceil(height / resized_h + 1) * math.ceil(width / resized_w + 1)
    pixels = canvas[0] * canvas[1]
    yield Work(
        "letterbox", batch, batch * 3 * (height * width + pixels), batch * pixels * (80 + 9 * taps), pixels / 256
    )
    state = workspace_bytes(batch, 1)
    yield Work("reset", 1, state, batch * 256 * 20, batch)
    scan_bytes = batch * anchors * 2 * (5 + classes)
    class_lanes = scene.passing * 32 * math.ceil(classes / 32)
    scan = batch * (60 * anchors + class_lanes * 70)
    rescan = batch * (60 * anchors + class_lanes * 25)  # once the highest digit is known, hardly a sigmoid of a class
    keys_bytes = batch * sorted_keys * 8
    yield Work("collect", 2, (scan_bytes + keys_bytes) * (1 + over), scan + rescan * over, blocks)
    yield Work("select", 8, 8 * scan_bytes * over, (scan + 7 * rescan) * over, blocks)
    yield Work("sort", 1, batch * sorted_keys * 16, batch * tiles * SORT_STAGES * TILE / 2 * 25, batch * tiles, 20)
    comparisons = sorted_keys * (tiles - 1) * 11
    rank = batch * (comparisons * 10 + sorted_keys * 300)
    yield Work("rank", 1, batch * sorted_keys * (8 * tiles + 64 + 24), rank, batch * tiles, tiles)
    suppress = batch * (scene.looked_at * scene.max_det * 30 + scene.max_det * 1024 * 60)
    kept_bytes = OutputLayout(batch, scene.max_det).nbytes
    rounds = scene.max_det + scene.looked_at / 1024
    yield Work("suppress", 1, batch * scene.looked_at * 24 + kept_bytes, suppress, batch, rounds)


def engine_seconds(spec: ModelSpec, canvas_hw: tuple[int, int], card: Card) -> float:
    """An image's time in YOLOv5x6 at the tensor cores' peak."""
    from parkdet.runtime.views import FULL_VIEW, TTA_VIEWS

    views = TTA_VIEWS if spec.tta else (FULL_VIEW,)
    pixels = sum(
        math.prod(view.padded(side, spec.stride_max) if spec.tta else side for side in canvas_hw) for view in views
    )
    return pixels * X6_FLOPS_PER_PIXEL / card.tensor_flops


@click.command()
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
def main(batch: int) -> None:
    """Print the work of the contest's post-processing: 1920 x 1080 at 1536, three views, 14 classes."""
    spec = contest_spec()
    letterbox = Letterbox.fit((1080, 1920), spec.imgsz, spec.stride_max)
    heads = head_geometries(spec, letterbox.canvas_hw)
    anchors = sum(head.num_anchors for head in heads)
    click.echo(f"{anchors:,} anchors, {spec.num_classes} classes, {batch} images; times in microseconds a batch\n")
    for scene in scenes(anchors, spec.num_classes, batch):
        click.echo(f"| {scene.name} | MB | M instructions | {' | '.join(card.name for card in CARDS)} |")
        click.echo("|---|---|---|" + "---|" * len(CARDS))
        rows = list(work(heads, spec.num_classes, letterbox, scene))
        for row in rows:
            times = " | ".join(f"{1e6 * row.seconds(card):,.0f}" for card in CARDS)
            click.echo(f"| {row.kernel} | {row.bytes / 1e6:,.1f} | {row.instructions / 1e6:,.0f} | {times} |")
        totals, shares = [], []
        for card in CARDS:
            total = sum(row.seconds(card) for row in rows)
            engine = batch * engine_seconds(spec, letterbox.canvas_hw, card)
            totals.append(f"{1e6 * total:,.0f}")
            shares.append(f"{1e6 * engine:,.0f}, {total / engine:.2%}")
        click.echo(f"| all | | | {' | '.join(totals)} |")
        click.echo(f"| the engine at its peak, and the share | | | {' | '.join(shares)} |\n")


if __name__ == "__main__":
    main()
