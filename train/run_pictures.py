"""Everything that a run leaves to look at. None of it may stop a training, or slow it by more than a few percent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from parkdet.runtime.confusion import confusion_matrix
from parkdet.runtime.detections import Detections
from parkdet.runtime.geometry import ImageArray, xyxy_to_cxcywh
from parkdet.runtime.model_spec import ModelSpec
from parkdet.runtime.shards import write_atomically
from parkdet.train.data.loader import TrainingBatch
from parkdet.train.data.samples import Sample
from parkdet.train.lettering import Lettering
from parkdet.train.picture_grid import TILES, batch_picture, found_picture, truth_picture
from parkdet.train.plots import confusion_figure, correlogram_figure, curve_figures, labels_figure, results_figure
from parkdet.train.run_log import EventsFile, jpeg
from parkdet.train.validate import Validation

BATCH_PICTURES = 3
"""train_batch0.jpg to train_batch2.jpg, and as many of validation."""
EVENTS_SIDE = 1280
"""Longest side in pixels of what goes into TensorBoard's events again and again."""
SHARE_OF_TIME = 0.01
"""What is drawn again and again waits until it has cost no more than this share of the time since it was drawn."""


class RunPictures:
    """Draws into a run folder and, where there is one, into its TensorBoard events.

    What cannot be drawn is named once through `say`, and the run goes on.
    """

    def __init__(self, folder: Path, spec: ModelSpec, say: Callable[[str], None], wanted: bool = True):
        self.folder, self.spec, self._say, self._wanted = folder, spec, say, wanted
        self.events: EventsFile | None = None
        self._lettering: Lettering | None = None
        self._failed: set[str] = set()
        self._not_before: dict[str, float] = {}

    @property
    def lettering(self) -> Lettering:
        """Found at first use: it imports matplotlib."""
        if self._lettering is None:
            self._lettering = Lettering.of(self.spec.class_names)
            if self._lettering.note:
                self._say(f"note: {self._lettering.note}")
        return self._lettering

    def labels(self, samples: Sequence[Sample]) -> None:
        """labels.jpg and labels_correlogram.jpg of the training set."""
        self._draw("labels.jpg", lambda: self._labels(samples))

    def training_batch(self, epoch: int, number: int, batch: TrainingBatch) -> None:
        """train_batch0.jpg and so on: the first batches of the first epoch."""
        if epoch == 0 and number < BATCH_PICTURES:
            name = f"train_batch{number}.jpg"
            self._draw(name, lambda: self._keep(name, batch_picture(batch, self.lettering), 0))

    def epoch_ended(self, epoch: int, validation: Validation | None) -> None:
        """The first validation images in TensorBoard, as the network sees them by now; results.png anew."""
        if self.events is not None and validation is not None and validation.found:
            self._draw("val_batch0_pred", lambda: self._progress(epoch, validation), sparing=True)
        self.results(sparing=True)

    def results(self, *, sparing: bool = False) -> None:
        """results.png of results.csv."""
        table = self.folder / "results.csv"
        if table.exists():
            draw = lambda: write_atomically(self.folder / "results.png", results_figure(table))  # noqa: E731
            self._draw("results.png", draw, sparing=sparing)

    def validation(self, validation: Validation) -> None:
        """The curves, the confusion matrix, and val_batch0_labels.jpg, val_batch0_pred.jpg and so on."""
        self._draw("PR_curve.png", lambda: self._curves(validation))
        self._draw("confusion_matrix.png", lambda: self._confusion(validation))
        for number in range(BATCH_PICTURES):
            found = validation.found[number * TILES : (number + 1) * TILES]
            if found:
                self._draw(f"val_batch{number}_pred.jpg", partial(self._validation_batch, number, found))

    def _labels(self, samples: Sequence[Sample]) -> None:
        class_ids = np.concatenate([sample.class_ids for sample in samples])
        sides = [np.array([*sample.image_hw[::-1]] * 2, np.float32) for sample in samples]
        shares = np.concatenate([xyxy_to_cxcywh(s.xyxy) / side for s, side in zip(samples, sides, strict=True)])
        write_atomically(self.folder / "labels.jpg", labels_figure(class_ids, shares, self.lettering))
        write_atomically(self.folder / "labels_correlogram.jpg", correlogram_figure(shares))

    def _progress(self, epoch: int, validation: Validation) -> None:
        assert self.events is not None
        picture = found_picture(validation.found, self.lettering, EVENTS_SIDE)
        self.events.add_picture("val_batch0_pred", picture, epoch)

    def _curves(self, validation: Validation) -> None:
        for name, content in curve_figures(validation.evaluation, self.lettering).items():
            write_atomically(self.folder / name, content)

    def _confusion(self, validation: Validation) -> None:
        pairs = ((detections, sample.xyxy, sample.class_ids) for sample, detections in validation.found)
        counts = confusion_matrix(pairs, self.spec.num_classes)
        write_atomically(self.folder / "confusion_matrix.png", confusion_figure(counts, self.lettering))

    def _validation_batch(self, number: int, found: Sequence[tuple[Sample, Detections]]) -> None:
        truth = truth_picture([sample for sample, _ in found], self.lettering)
        self._keep(f"val_batch{number}_labels.jpg", truth)
        self._keep(f"val_batch{number}_pred.jpg", found_picture(found, self.lettering))

    def _keep(self, name: str, picture: ImageArray, epoch: int | None = None) -> None:
        """As a file, and in the events where it belongs to an epoch."""
        write_atomically(self.folder / name, jpeg(picture))
        if epoch is not None and self.events is not None:
            self.events.add_picture(name.removesuffix(".jpg"), picture, epoch)

    def _draw(self, what: str, draw: Callable[[], None], *, sparing: bool = False) -> None:
        """Draw, or say why not; `sparing`: unless it was drawn so shortly ago that it would slow the training."""
        started = time.monotonic()
        if not self._wanted or (sparing and started < self._not_before.get(what, 0)):
            return
        try:
            draw()
        except Exception as error:  # whatever is wrong with a picture, the training is worth more
            if what not in self._failed:
                self._failed.add(what)
                reason = str(error) or type(error).__name__
                self._say(f"warning: {self.folder / what} could not be drawn ({reason}); everything else goes on")
        took = time.monotonic() - started
        self._not_before[what] = started + took / SHARE_OF_TIME
