"""Inputs that a wrong kernel gets wrong, with what is right: for the tests, the sanitizers and the mutants.

Each case is small; together they reach every line of the kernels and meet its comparisons at equality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.cuda.kernels import HeadGeometry, head_geometries
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import ImageArray, Letterbox
from parkdet.runtime.heads import RawHead
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsCounts, NmsSettings
from tests.gpu_free.kernels.specification import expected, sigmoid


@dataclass(frozen=True, kw_only=True)
class NmsCase:
    """Raw heads and settings; what comes of them is computed by the numpy specification."""

    name: str
    spec: ModelSpec
    canvas_hw: tuple[int, int]
    heads: Sequence[RawHead]
    settings: NmsSettings
    max_candidates: int = 1000
    schedule: int = 0
    runs: int = 1
    """So many in the same memory, one after the other."""
    images_before: int = 0
    """So many images of the batch, which are not run, lie before those of the heads."""

    @property
    def geometries(self) -> list[HeadGeometry]:
        return head_geometries(self.spec, self.canvas_hw)

    def expected(self) -> list[tuple[Detections, NmsCounts]]:
        return expected(self.heads, self.spec, self.settings, self.max_candidates)


@dataclass(frozen=True, kw_only=True)
class LetterboxCase:
    """An image, whose rows may lie apart; what comes of it is computed by OpenCV."""

    name: str
    image: ImageArray
    letterbox: Letterbox
    schedule: int = 0

    def expected(self) -> ImageArray:
        return self.letterbox.apply(np.ascontiguousarray(self.image))


def model(classes: int, *, levels: int = 2, anchors: int = 3, tta: bool = False) -> ModelSpec:
    """A spec with anchors of uneven sizes."""
    strides = (8, 16, 32, 64)[:levels]
    shapes = [(1.25, 1.625), (3.75, 2.875), (2.0, 4.0), (0.5, 1.0), (6.0, 1.5), (1.0, 7.0), (5.5, 5.0), (0.25, 0.75)]
    return ModelSpec(
        class_names=tuple(f"class {index}" for index in range(classes)),
        strides=strides,
        anchors=tuple(tuple((w * s, h * s) for w, h in shapes[:anchors]) for s in strides),
        imgsz=256,
        tta=tta,
    )


def random_heads(
    spec: ModelSpec,
    canvas_hw: tuple[int, int],
    batch: int,
    *,
    seed: int,
    objectness: float = -1.0,
    spread: float = 2.0,
    dtype: type[np.floating[Any]] = np.float16,
    palette: Sequence[float] = (),
) -> list[RawHead]:
    """Normal logits around 0, the objectness around its own mean; from a palette, so that many are equal, if given."""
    random = np.random.default_rng(seed)
    mean = np.zeros(spec.num_outputs)
    mean[4] = objectness
    heads: list[RawHead] = []
    for geometry in head_geometries(spec, canvas_hw):
        shape = (batch, len(geometry.anchors_wh), *geometry.grid_hw, spec.num_outputs)
        raw = random.choice(np.array(palette), shape) + mean if palette else random.normal(mean, spread, shape)
        heads.append(raw.astype(dtype))
    return heads


def nms_cases() -> Iterator[NmsCase]:
    """All cases of the post-processing."""

    def random(
        name: str,
        spec: ModelSpec,
        canvas_hw: tuple[int, int],
        batch: int,
        settings: NmsSettings,
        *,
        max_candidates: int = 1000,
        schedule: int = 0,
        runs: int = 1,
        **how: Any,
    ) -> NmsCase:
        heads = random_heads(spec, canvas_hw, batch, seed=len(name), **how)
        return NmsCase(
            name=name, spec=spec, canvas_hw=canvas_hw, heads=heads, settings=settings,
            max_candidates=max_candidates, schedule=schedule, runs=runs,
        )  # fmt: skip

    # Cheap ones first: they find most mutants out.
    yield from _hand_made()
    everything = NmsSettings(conf=0.0, iou=0.45, max_det=20)
    yield random("nothing passes", model(3), (32, 48), 2, NmsSettings(conf=0.5), objectness=-40)
    yield random("as in the contest", model(14, levels=3), (64, 96), 2, NmsSettings())
    yield random(
        "float32, best class, agnostic", model(80), (32, 64), 1, LOOKING, dtype=np.float32, objectness=1, runs=2
    )
    yield random("best class of 33, per class", model(33), (32, 32), 2, PER_CLASS, objectness=2, schedule=1)
    yield random("one class, one anchor a cell", model(1, anchors=1), (48, 32), 3, everything, schedule=5)
    yield random("eight anchors a cell", model(2, anchors=8), (32, 32), 1, NmsSettings(max_det=7), objectness=-2)
    yield random("three views", model(3, levels=3, tta=True), (64, 96), 2, NmsSettings(max_det=100), objectness=-1)
    # The second view is padded to 112 columns, the canvas has 128: it is turned back by the latter.
    yield random("three views of a wide canvas", model(2, tta=True), (32, 128), 1, NmsSettings(max_det=60))
    yield random("views of float32", model(2, levels=4, tta=True), (128, 64), 1, PER_CLASS, dtype=np.float32)
    yield random("over the cap", model(14), (48, 64), 2, NmsSettings(max_det=30), objectness=3, max_candidates=100)
    yield random(
        "over the cap in many blocks", model(2), (128, 160), 1, NmsSettings(max_det=3), objectness=2, max_candidates=90
    )
    # The objectness is 1, so that a score is one sigmoid; many lie close to the cap's edge, and all under it stay.
    yield random(
        "the edge of the cap", model(14), (64, 64), 1, NmsSettings(iou=1.0, max_det=200), dtype=np.float32,
        objectness=100, spread=0.2, max_candidates=150, runs=2,
    )  # fmt: skip
    for logit in (5.95, 13.81):  # what comes of the score's own logarithm is larger
        yield random(
            f"the cap among sigmoids of {logit}", model(3), (48, 48), 1, NmsSettings(), dtype=np.float32,
            palette=(logit,), objectness=100, max_candidates=100,
        )  # fmt: skip
    ties = (-2.0, 0.0, 1.0)
    yield random("ties", model(4), (48, 48), 2, NmsSettings(iou=0.5), palette=ties, max_candidates=3000)
    yield random("the cap among ties", model(40), (48, 32), 2, PER_CLASS, palette=ties, max_candidates=77, schedule=3)
    yield random(
        "the cap among ties of all classes", model(40), (48, 32), 2, everything, palette=(0.5, 0.5), objectness=1,
        max_candidates=1001,
    )  # fmt: skip
    yield from _not_numbers()
    yield from _settings_cases()
    yield random("many blocks", model(3), (160, 224), 1, NmsSettings(max_det=300, iou=0.3), objectness=-3)
    yield random(
        "more than one tile of the sort", model(5), (96, 128), 1, NmsSettings(iou=0.2, max_det=400), objectness=3,
        max_candidates=4200, schedule=2,
    )  # fmt: skip
    yield random(
        "two widths of a block, two images", model(5), (64, 96), 2, NmsSettings(iou=0.0, agnostic=True, max_det=2500),
        objectness=3, spread=1.0, max_candidates=2000,
    )  # fmt: skip
    yield random(
        "two widths of a block, two images, by class", model(5), (64, 96), 2, NmsSettings(iou=0.3, max_det=2500),
        objectness=3, spread=1.0, max_candidates=2000,
    )  # fmt: skip
    yield random(
        "over a cap of two tiles", model(14), (64, 96), 1, NmsSettings(iou=0.6, max_det=1500), objectness=3,
        max_candidates=2060, schedule=1,
    )  # fmt: skip
    yield random(
        "three tiles, few boxes", model(7), (96, 128), 1, NmsSettings(iou=0.0, agnostic=True, max_det=100),
        objectness=3, spread=1.0, max_candidates=5000,
    )  # fmt: skip
    yield from _caps_at_equality()
    yield _many_kept()


@dataclass(frozen=True, kw_only=True)
class SigmoidCase:
    """Logits, each by itself."""

    name: str
    raw: NDArray[np.float32]

    def expected(self) -> NDArray[np.float32]:
        return sigmoid(self.raw)


Case = NmsCase | LetterboxCase | SigmoidCase


def sigmoid_case() -> SigmoidCase:
    """Some 40,000 logits; at -88.5 the exponential is finite though its power of two is not."""
    random = np.random.default_rng(10)
    edges = [np.inf, -np.inf, 0.0, -0.0, 88.5, -88.5, -88.03, -88.7, -88.73, -89.0, 40.0, -40.0, 41.0, -126.0]
    raw = np.concatenate([random.normal(0, 5, 30_000), np.linspace(-110, 110, 10_001), edges])
    return SigmoidCase(name="the sigmoid", raw=raw.astype(np.float32))


def far_case() -> NmsCase:
    """The last image that a grid can have, of so many slots that no index into any array fits 32 bits."""
    spec, canvas_hw = model(90), (128, 128)
    return NmsCase(
        name="the last of 65,535 images", spec=spec, canvas_hw=canvas_hw,
        heads=random_heads(spec, canvas_hw, 1, seed=9, objectness=-3),
        settings=NmsSettings(max_det=65_600, multi_label=False), max_candidates=65_600, images_before=65_534,
    )  # fmt: skip


LOOKING = NmsSettings(conf=0.25, iou=0.45, max_det=300, multi_label=False, agnostic=True)
PER_CLASS = NmsSettings(conf=0.1, iou=0.6, max_det=100, multi_label=False)


def _settings_cases() -> Iterator[NmsCase]:
    spec, canvas_hw = model(3), (32, 48)
    heads = random_heads(spec, canvas_hw, 2, seed=1, spread=40.0, dtype=np.float32)
    for settings in (
        NmsSettings(conf=0.0, max_det=1000),  # subnormal scores are candidates
        NmsSettings(conf=1.0),
        NmsSettings(conf=0.999999, max_det=1000),
        NmsSettings(max_det=1),
        NmsSettings(iou=0.0, agnostic=True),
        NmsSettings(iou=1.0, max_det=1000),
    ):
        yield NmsCase(name=f"{settings}", spec=spec, canvas_hw=canvas_hw, heads=heads, settings=settings)


def _caps_at_equality() -> Iterator[NmsCase]:
    """max_candidates and max_det one under, at and one over what there is."""
    spec, canvas_hw = model(3), (32, 32)
    case = NmsCase(
        name="", spec=spec, canvas_hw=canvas_hw, heads=random_heads(spec, canvas_hw, 1, seed=2, objectness=-2),
        settings=NmsSettings(max_det=1000),
    )  # fmt: skip
    ((kept, counts),) = case.expected()
    for difference in (-1, 0, 1):
        yield dataclasses.replace(
            case, name=f"max_candidates at {difference:+} of what passes", max_candidates=counts.candidates + difference
        )
        yield dataclasses.replace(
            case, name=f"max_det at {difference:+} of what stays", settings=NmsSettings(max_det=len(kept) + difference)
        )
    # The same over several blocks' widths: the last ones are held against all that were kept, and no more.
    spec = model(7)
    crowded = NmsCase(
        name="max_det at what stays of three tiles", spec=spec, canvas_hw=(96, 128),
        heads=random_heads(spec, (96, 128), 1, seed=8, objectness=3, spread=1.0),
        settings=NmsSettings(iou=0.0, agnostic=True, max_det=100), max_candidates=5000,
    )  # fmt: skip
    ((kept, _),) = crowded.expected()
    yield dataclasses.replace(crowded, settings=dataclasses.replace(crowded.settings, max_det=len(kept)))
    for classes, cells in ((1, 1), (1024, 1), (1025, 1), (1024, 2), (683, 3)):
        # So many candidates: the widths of a block, of a tile, and one past them.
        wide, hw = model(classes, levels=1, anchors=1), (8, 8 * cells)
        yield NmsCase(
            name=f"{classes * cells} candidates", spec=wide, canvas_hw=hw,
            heads=random_heads(wide, hw, 1, seed=3, objectness=5, spread=1.0),
            settings=NmsSettings(max_det=3000, agnostic=cells > 1, iou=0.1), max_candidates=2049,
        )  # fmt: skip


def _not_numbers() -> Iterator[NmsCase]:
    spec, canvas_hw = model(5), (48, 64)
    for dtype in (np.float16, np.float32):
        heads = random_heads(spec, canvas_hw, 2, seed=4, objectness=1, dtype=dtype)
        random = np.random.default_rng(5)
        for head in heads:
            for value in (np.nan, np.inf, -np.inf):
                head[random.random(head.shape) < 0.04] = value
        for settings in (NmsSettings(conf=0.05, max_det=60), PER_CLASS, NmsSettings(conf=0.0, max_det=60)):
            yield NmsCase(
                name=f"not numbers, {dtype.__name__}, {settings}", spec=spec, canvas_hw=canvas_hw, heads=heads,
                settings=settings,
            )  # fmt: skip
    for channel in range(4):  # each alone makes a box that is no box
        heads = random_heads(spec, canvas_hw, 1, seed=6, objectness=1)
        heads[0][:, :, ::2, :, channel] = np.nan
        yield NmsCase(
            name=f"no number in channel {channel}", spec=spec, canvas_hw=canvas_hw, heads=heads, settings=NmsSettings()
        )


def _hand_made() -> Iterator[NmsCase]:
    """Sigmoids of exactly 0.5 and 1: boxes are the anchors, in a row 8 pixels apart, and thresholds are met exactly."""
    spec = dataclasses.replace(model(2, levels=1, anchors=1), anchors=(((16.0, 16.0),),))
    heads: list[RawHead] = [np.zeros((1, 1, 1, 6, 7), np.float16)]
    heads[0][..., 4] = 100
    heads[0][..., 5:] = np.array([[3, -9], [2, 2], [1, -9], [0, -9], [-1, 1], [-2, -9]])
    for name, settings in (
        ("an IoU of exactly the threshold stays", NmsSettings(iou=1 / 3)),
        ("an IoU over the threshold goes", NmsSettings(iou=float(np.nextafter(np.float32(1 / 3), np.float32(0))))),
        ("a score of exactly conf is none", NmsSettings(conf=0.5)),
        ("agnostic", NmsSettings(iou=0.3, agnostic=True)),
    ):
        yield NmsCase(name=name, spec=spec, canvas_hw=(8, 48), heads=heads, settings=settings)
    yield NmsCase(
        name="a cap of one", spec=spec, canvas_hw=(8, 48), heads=heads, settings=NmsSettings(), max_candidates=1
    )
    # More candidates than a block is wide, all in one another's boxes but the one at the edge, whose box has no area:
    # nothing suppresses it, so it must be looked at once.
    wide = dataclasses.replace(model(1, levels=1, anchors=1), anchors=(((4000.0, 16.0),),))
    in_one = [np.zeros((1, 1, 1, 1030, 6), np.float16)]
    in_one[0][..., 1023, 2] = -np.inf
    yield NmsCase(
        name="no area, at a block's width", spec=wide, canvas_hw=(8, 8240), heads=in_one,
        settings=NmsSettings(iou=0.0, max_det=20), max_candidates=1100,
    )  # fmt: skip
    # The same, the box without an area past the width: max_det is met before, with a candidate left.
    over_all = dataclasses.replace(wide, anchors=(((20_000.0, 16.0),),))
    beyond = [np.zeros((1, 1, 1, 1030, 6), np.float16)]
    beyond[0][..., 1026, 2] = -np.inf
    yield NmsCase(
        name="max_det met in a block's width, one left in the next", spec=over_all, canvas_hw=(8, 8240), heads=beyond,
        settings=NmsSettings(iou=0.0, max_det=1), max_candidates=1100,
    )  # fmt: skip
    yield from _last_places()
    at_half = [heads[0].copy()]
    at_half[0][..., 4] = 0
    at_half[0][..., 5:] = 100
    yield NmsCase(
        name="an objectness of exactly conf is none", spec=spec, canvas_hw=(8, 48), heads=at_half,
        settings=NmsSettings(conf=0.5),
    )  # fmt: skip


def _last_places() -> Iterator[NmsCase]:
    """Two boxes whose IoU is over the threshold by its last place, and is not where it is computed another way."""
    for name, anchors, iou in (
        ("the union is b + a - intersection", ((4.130000114440918, 8.197999954223633),
                                               (8.74899959564209, 4.916999816894531)), 0.35897889733314514),
        ("the IoU is a quotient", ((13.196999549865723, 7.7270002365112305),
                                   (8.755999565124512, 4.75600004196167)), 0.4083772301673889),
    ):  # fmt: skip
        spec = dataclasses.replace(model(1, levels=1, anchors=2), anchors=(anchors,))
        head = np.zeros((1, 2, 1, 1, 6), np.float32)
        head[..., 4], head[0, 0, ..., 5] = 100, 1
        yield NmsCase(name=name, spec=spec, canvas_hw=(8, 8), heads=[head], settings=NmsSettings(iou=iou))


def _many_kept() -> NmsCase:
    """More boxes kept than a block has threads; then each one's twin, which only that one lets go."""
    spec = dataclasses.replace(model(1, levels=1, anchors=2), anchors=(((4.0, 4.0), (4.0, 4.0)),))
    head = np.zeros((1, 2, 1, 1050, 6), np.float16)
    # The twins of the first come last, when more boxes were kept since than a block has threads.
    head[..., 4], head[0, 0, ..., 5], head[0, 1, ..., 5] = 100, 1, np.linspace(-2, 0, 1050)
    return NmsCase(
        name="each twin of 1,050 boxes", spec=spec, canvas_hw=(8, 8400), heads=[head],
        settings=NmsSettings(max_det=1100), max_candidates=2200,
    )  # fmt: skip


def letterbox_cases() -> Iterator[LetterboxCase]:
    """All cases of the letterbox: shrinking, enlarging, neither; sides that divide, odd ones, single pixels."""
    random = np.random.default_rng(7)
    for name, hw, imgsz, stride in (
        ("shrunk by 1.25", (45, 80), 64, 32),
        ("shrunk by 2: OpenCV rounds a half up", (64, 96), 48, 32),
        ("shrunk by 2 across, by more down", (65, 96), 48, 32),
        ("shrunk by 3", (48, 96), 32, 32),
        ("shrunk a little", (61, 97), 96, 32),
        ("shrunk much", (211, 97), 10, 8),
        ("shrunk with slivers", (1003, 31), 1001, 32),
        ("shrunk with slivers of exactly a thousandth", (1001, 31), 1000, 32),
        ("shrunk with slivers over a thousandth of the small pixel only", (47, 5000), 999, 32),
        ("shrunk by a pixel, portrait", (97, 61), 96, 32),
        ("shrunk in one row", (1, 50), 20, 32),
        ("shrunk in one column", (50, 1), 20, 32),
        ("an odd canvas", (29, 43), 37, 1),
        ("not scaled, portrait", (70, 33), 70, 32),
        ("enlarged by 4", (12, 16), 64, 32),
        ("enlarged by a pixel", (41, 60), 61, 32),
        ("enlarged unevenly", (37, 53), 100, 32),
        ("enlarged from a pixel", (1, 1), 9, 8),
        ("enlarged from a row", (1, 7), 40, 8),
        ("enlarged from a column", (7, 1), 40, 8),
        ("shrunk to a row", (3, 90), 20, 8),
    ):
        image = random.integers(0, 256, (*hw, 3), dtype=np.uint8)
        yield LetterboxCase(name=name, image=image, letterbox=Letterbox.fit(hw, imgsz, stride))
    for name, hw, imgsz in (
        ("enlarged far from the corner", (2, 3000), 3100),
        ("shrunk by 2 across, by less down", (101, 10), 51),
    ):
        row = random.integers(0, 256, (1, hw[1], 3), dtype=np.uint8)
        image = np.ascontiguousarray(np.broadcast_to(row, (*hw, 3)))
        yield LetterboxCase(name=name, image=image, letterbox=Letterbox.fit(hw, imgsz, 8))
    for value in (0, 255):
        flat = np.full((30, 50, 3), value, np.uint8)
        yield LetterboxCase(name=f"all {value}, shrunk", image=flat, letterbox=Letterbox.fit((30, 50), 37, 8))
        yield LetterboxCase(name=f"all {value}, enlarged", image=flat, letterbox=Letterbox.fit((30, 50), 77, 8))
    apart = random.integers(0, 256, (40, 100, 3), dtype=np.uint8)[:, :60]
    yield LetterboxCase(name="rows apart, shrunk", image=apart, letterbox=Letterbox.fit((40, 60), 48, 8), schedule=3)
    yield LetterboxCase(name="rows apart, enlarged", image=apart, letterbox=Letterbox.fit((40, 60), 64, 8), schedule=1)


def all_cases() -> list[Case]:
    """What run_cases.cpp is given."""
    return [sigmoid_case(), *nms_cases(), far_case(), *letterbox_cases()]


def short_cases() -> list[Case]:
    """Those that keep few boxes: a round of the suppression each is what costs time under the address sanitizer."""

    def is_short(case: Case) -> bool:
        return not isinstance(case, NmsCase) or sum(len(found.scores) for found, _ in case.expected()) <= 60

    return [case for case in all_cases() if is_short(case)]


def thread_cases() -> Iterator[Case]:
    """Cases for the thread sanitizer, to which each barrier of 1024 threads costs milliseconds: few boxes are kept."""
    chosen = {
        "as in the contest": 4,
        "best class of 33, per class": 4,
        "three tiles, few boxes": 100,
        "over the cap in many blocks": 3,
        "nothing passes": 1100,
    }
    for case in nms_cases():
        if case.name in chosen:
            settings = dataclasses.replace(case.settings, max_det=chosen[case.name])
            yield dataclasses.replace(case, settings=settings)
    yield from list(letterbox_cases())[:2]
