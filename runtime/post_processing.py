"""From a batch of raw heads to each image's detections in its own pixels, with what the caps cut off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parkdet.runtime.candidates import ImageCandidates
from parkdet.runtime.detections import Detections
from parkdet.runtime.errors import ArtifactError
from parkdet.runtime.geometry import FloatArray, Letterbox
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.nms import NmsCounts, NmsSettings, RankedCandidates, suppress_ranked
from parkdet.runtime.ranking import rank_heads, suppress_heads
from parkdet.runtime.shards import CapCounts


@dataclass(frozen=True, slots=True, eq=False)
class ProcessedImage:
    """What became of one image's heads."""

    detections: Detections
    """In image pixels."""
    caps: CapCounts
    ranked: RankedCandidates | None = None
    """What entered NMS, in canvas pixels; None where it was not asked for, or the backend suppresses by itself."""

    def kept(
        self, image_id: int, letterbox: Letterbox, nms: NmsSettings, category_ids: NDArray[np.int32]
    ) -> ImageCandidates:
        """What entered NMS, as a run keeps it. `category_ids` in the order of the classes."""
        assert self.ranked is not None, "a backend that finishes by itself was asked for its candidates"
        return ImageCandidates(
            image_id=image_id,
            letterbox=letterbox,
            settings=nms,
            xyxy=self.ranked.xyxy,
            scores=self.ranked.scores,
            category_ids=category_ids[self.ranked.class_ids],
        )


def post_process(
    heads: Sequence[FloatArray],
    spec: ModelSpec,
    nms: NmsSettings,
    letterboxes: Sequence[Letterbox],
    keep_candidates: bool = False,
) -> list[ProcessedImage]:
    """Each image's detections out of a batch of raw heads, what was cut off, and if asked what entered NMS."""
    try:
        if keep_candidates:
            ranked = rank_heads(heads, spec, nms)
            return [
                finish(*suppress_ranked(one, nms), letterbox, one)
                for one, letterbox in zip(ranked, letterboxes, strict=True)
            ]
        found = suppress_heads(heads, spec, nms)
    except ValueError as error:
        raise ArtifactError(
            f"the graph's outputs do not fit its model spec ({error}); run 'parkdet export' again"
        ) from error
    return [finish(*one, letterbox) for one, letterbox in zip(found, letterboxes, strict=True)]


def finish(
    on_canvas: Detections, counts: NmsCounts, letterbox: Letterbox, ranked: RankedCandidates | None = None
) -> ProcessedImage:
    """One image's detections from canvas to image pixels, and what was cut off."""
    in_image, without_area = on_canvas.moved(letterbox.to_image(on_canvas.xyxy))
    caps = CapCounts(
        over_limit=counts.over_limit,
        at_max_det=int(counts.at_max_det),
        without_area=without_area,
        clipped=int(letterbox.reach_out(on_canvas.xyxy).sum()) - without_area,
    )
    return ProcessedImage(in_image, caps, ranked)
