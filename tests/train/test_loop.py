"""The loop of one stage: its steps against steps written by hand, what reaches the loader, what is saved and when."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from parkdet.runtime.errors import DataError, Interrupted
from parkdet.runtime.evaluation import ClassAP, Evaluation
from parkdet.runtime.model_spec import ModelSpec
from parkdet.train import loop
from parkdet.train.checkpoint import load_checkpoint
from parkdet.train.config import TrainSettings, ValSettings
from parkdet.train.data.loader import TrainingBatch, TrainingLoader, TrainingSet
from parkdet.train.data.samples import Sample
from parkdet.train.loop import StageJob, StageTrainer
from parkdet.train.model.loss import DetectionLoss
from parkdet.train.model.network import Yolov5, build_network
from parkdet.train.precision import Precision, repeatable
from parkdet.train.schedule import Schedule
from parkdet.train.validate import Validation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Eight images; the third and the sixth have no boxes, class 1 is rare."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number in range(8):
        rng = np.random.default_rng(number)
        path = folder / f"차 {number}.png"
        small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path.write_bytes(cv2.imencode(".png", cv2.resize(small, (64, 48)))[1].tobytes())
        xyxy = np.array([[4, 5, 30, 25], [20, 20, 60, 44]], np.float32)[: 0 if number in (2, 5) else 2]
        class_ids = np.array([0, int(number == 7)], np.int32)[: len(xyxy)]
        made.append(Sample(100 + number, path, (48, 64), class_ids, xyxy))
    return made


def network(seed: int = 0) -> Yolov5:
    torch.manual_seed(seed)
    return build_network("yolov5n", ["car", "bus"], 64)


def settings(**changes: Any) -> TrainSettings:
    values = {
        "epochs": 2,
        "imgsz": 64,
        "batch_size": 2,
        "nominal_batch": 4,
        "precision": "fp32",
        "warmup_bias_lr": 0.02,
    }
    return TrainSettings(**{**values, **changes})


def trainer(
    folder: Path, samples: Sequence[Sample], wanted: TrainSettings, val: Sequence[Sample] = (), **metric: float
) -> StageTrainer:
    job = StageJob(
        settings=wanted, val=ValSettings(metric=metric or {"map50": 0.1, "map75": 0.9}), network=network(),  # type: ignore[arg-type]
        train_samples=samples, val_samples=val, folder=folder, device=CPU, workers=0, plots=False,
        provenance={"run": str(folder)},
    )  # fmt: skip
    return StageTrainer(job, lambda _line: None)


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def trained_by_hand(samples: Sequence[Sample], s: TrainSettings) -> tuple[Yolov5, Yolov5, list[int]]:
    """SGD with Nesterov momentum, clipping, accumulation and EMA, written out; the batches at which it stepped."""
    live = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(live)
    loader = TrainingLoader(TrainingSet(samples, s.imgsz, s, s.seed), batch_size=s.batch_size, workers=0)
    loss = DetectionLoss(
        live.spec, box=s.box, cls=s.cls * 2 / 80, obj=s.obj * (64 / 640) ** 2, cls_pw=s.cls_pw, obj_pw=s.obj_pw,
        anchor_t=s.anchor_t,
    )  # fmt: skip
    batches = math.ceil(len(samples) / s.batch_size)
    schedule = Schedule(s, batches)  # its numbers are checked against closed forms in test_schedule.py
    momenta: dict[str, torch.Tensor] = {}
    stepped, last, updates = [], -1, 0
    for epoch in range(s.epochs):
        live.train()
        for place, batch in enumerate(loader.epoch(epoch)):
            number = epoch * batches + place
            plan = schedule.plan(number)
            images = batch.images.contiguous(memory_format=torch.channels_last).float() / 255
            torch.autograd.backward(loss(live(images), batch.targets)[0])
            if number - last < plan.accumulate:
                continue
            last = number
            stepped.append(number)
            parameters = dict(live.named_parameters())
            torch.nn.utils.clip_grad_norm_(parameters.values(), s.grad_clip)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    assert parameter.grad is not None
                    is_bias, is_norm = name.endswith(".bias"), ".bn." in name
                    gradient = parameter.grad
                    if not (is_bias or is_norm):
                        gradient = gradient.add(parameter, alpha=schedule.weight_decay)
                    if name in momenta:
                        momenta[name].mul_(plan.momentum).add_(gradient)
                    else:
                        momenta[name] = gradient.clone()
                    gradient = gradient.add(momenta[name], alpha=plan.momentum)
                    parameter.add_(gradient, alpha=-(plan.bias_lr if is_bias else plan.lr))
                    parameter.grad = None
                updates += 1
                decay = 0.9999 * (1 - math.exp(-updates / 2000))
                now = live.state_dict()
                for name, averaged in average.state_dict().items():
                    if averaged.is_floating_point():
                        averaged.mul_(decay).add_(now[name], alpha=1 - decay)
                    else:
                        averaged.copy_(now[name])
    return live, average, stepped


def test_its_steps_are_those_written_by_hand_to_the_bit(samples: list[Sample], tmp_path: Path) -> None:
    # Accumulation ramps from 1 to 50 batches in warm-up: steps at 0 and 1, then gaps that cross the epochs' border.
    wanted = settings(nominal_batch=100, epochs=2)
    live, average, stepped = trained_by_hand(samples, wanted)
    assert stepped[:2] == [0, 1]
    assert 2 < len(stepped) < 8
    found = trainer(tmp_path, samples, wanted)
    assert found.run() is None
    assert_same(found.learner.network.state_dict(), live.state_dict())
    assert_same(found.learner.average.network.state_dict(), average.state_dict())
    assert found.learner.average.updates == len(stepped)
    assert not torch.equal(live.first_conv.weight, network().first_conv.weight)
    # Nothing to validate on: the last weights are the best, and what is saved is the average.
    stored = load_checkpoint(tmp_path / "weights" / "best.pt").model.state_dict()
    assert_same(stored, load_checkpoint(tmp_path / "weights" / "last.pt").model.state_dict())
    for name, tensor in average.state_dict().items():
        kept = tensor.half().float() if tensor.dim() == 4 else tensor
        assert torch.equal(stored[name], kept), name


def test_gradients_are_clipped_unless_told_otherwise(samples: list[Sample], tmp_path: Path) -> None:
    weights = []
    for clip in (0.0, 1e-3, 1e9):
        found = trainer(tmp_path / str(clip), samples, settings(grad_clip=clip, epochs=1))
        found.run()
        weights.append(found.learner.network.first_conv.weight.detach())
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_a_loss_that_is_not_finite_names_the_images_and_keeps_last_pt(samples: list[Sample], tmp_path: Path) -> None:
    found = trainer(tmp_path, samples, settings(mosaic=0.0))
    with torch.no_grad():
        found.learner.network.first_conv.weight.fill_(math.inf)
    with pytest.raises(DataError, match="nothing was saved") as caught:
        found.run()
    assert not (tmp_path / "weights").exists()
    first = next(found.loader.epoch(0))
    for files in first.paths:
        assert Path(files[0]).name in str(caught.value)
    assert "epoch 0, batch 0" in str(caught.value)

    again = trainer(tmp_path, samples, settings(mosaic=0.0))
    again._save_last()
    before = (tmp_path / "weights" / "last.pt").read_bytes()
    with torch.no_grad():
        again.learner.network.first_conv.weight.fill_(math.nan)
    with pytest.raises(DataError, match=r"last\.pt is from before"):
        again.run()
    assert (tmp_path / "weights" / "last.pt").read_bytes() == before


def seen_images(found: StageTrainer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Ids of the images that the steps will have been made of."""
    seen: list[int] = []
    open_epoch = found.loader.epoch

    def opening(number: int, **options: Any) -> Iterator[TrainingBatch]:
        for batch in open_epoch(number, **options):
            seen.extend(batch.image_ids)
            yield batch

    monkeypatch.setattr(found.loader, "epoch", opening)
    return seen


def given_weights(found: StageTrainer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The image weights that the loader will have been given, epoch by epoch."""
    given: list[Any] = []
    open_epoch = found.loader.epoch

    def opening(number: int, **options: Any) -> Any:
        given.append(options["weights"])
        return open_epoch(number, **options)

    monkeypatch.setattr(found.loader, "epoch", opening)
    return given


def test_an_epoch_shows_every_image_once(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trainer(tmp_path, samples, settings(epochs=1, batch_size=3))
    seen = seen_images(found, monkeypatch)
    found.run()
    assert sorted(seen) == [sample.image_id for sample in samples]


def test_a_batch_larger_than_the_set_is_the_set(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trainer(tmp_path, samples[:1], settings(batch_size=64))
    seen = seen_images(found, monkeypatch)
    found.run()
    assert seen == [100, 100]


def test_epoch_parts_reach_the_loader(samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trainer(tmp_path, samples, settings(epoch_parts=3, batch_size=1, epochs=3))
    seen = seen_images(found, monkeypatch)
    assert (found.batches, found.schedule.warmup_steps) == (2, 100)
    found.run()
    assert len(seen) == 6


def test_mosaics_end_before_the_training_does(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trainer(tmp_path, samples, settings(epochs=3, close_mosaic=2))
    open_epoch, asked = found.loader.epoch, []

    def noted(epoch: int, **options: Any) -> Any:
        asked.append((epoch, options["mosaics"]))
        return open_epoch(epoch, **options)

    monkeypatch.setattr(found.loader, "epoch", noted)
    found.run()
    assert asked == [(0, True), (1, False), (2, False)]


def evaluation(ap: Sequence[float], map50: float = math.nan, map75: float = math.nan) -> Evaluation:
    per_class = tuple(
        ClassAP(category_id=i + 1, name=str(i), images=1, truths=1, ap=value, ap50=0, ap75=0, precision=0, recall=0)
        for i, value in enumerate(ap)
    )
    return Evaluation(
        map=0.5, map50=map50, map75=map75, map_small=0, map_medium=0, map_large=0, precision=0, recall=0,
        confidence=0, images=1, truths=1, max_det=50, per_class=per_class,
    )  # fmt: skip


def answers(monkeypatch: pytest.MonkeyPatch, *found: Evaluation | None) -> list[dict[str, Any]]:
    """Let validation find these, one after the other (None: it was stopped); what it is called with."""
    calls: list[dict[str, Any]] = []

    def answer(net: Yolov5, _samples: Sequence[Sample], _settings: ValSettings, **options: Any) -> Validation | None:
        calls.append({"network": net, **options})
        result = found[len(calls) - 1]
        return None if result is None else Validation(evaluation=result, losses=(0, 0, 0), unreadable=())

    monkeypatch.setattr(loop, "validate", answer)
    return calls


def test_image_weights_follow_the_classes_and_their_ap(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, evaluation([1.0, 0.5]), evaluation([0.0, 0.0]))
    found = trainer(tmp_path, samples, settings(image_weights=True), val=samples[:1])
    given = given_weights(found, monkeypatch)
    seen = seen_images(found, monkeypatch)
    found.run()
    # Eleven boxes of class 0 and one of class 1; 1 / 11 and 1 / 1 scaled to sum 1.
    rare, common = 11 / 12, 1 / 12
    plain = [0 if n in (2, 5) else 2 * common for n in range(7)] + [common + rare]
    assert given[0].tolist() == pytest.approx(plain)
    # Class 0 is detected perfectly and class 1 half: only the image with class 1 is drawn any more.
    assert given[1].tolist() == pytest.approx([0] * 7 + [rare * 0.25])
    assert len(seen) == 16
    assert {102, 105}.isdisjoint(seen[:8])
    assert set(seen[8:]) == {107}


def test_without_image_weights_none_reach_the_loader(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trainer(tmp_path, samples, settings(epochs=1))
    given = given_weights(found, monkeypatch)
    found.run()
    assert given == [None]


@pytest.mark.parametrize(
    ("metric", "best"), [({"map50": 1.0}, 0), ({"map75": 1.0}, 1), ({"map50": 0.5, "map75": 0.5}, 2)]
)
def test_best_pt_is_chosen_by_the_metric(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: dict[str, float], best: int
) -> None:
    # The last epoch equals the best one: the earlier stays.
    pairs = [(0.9, 0.1), (0.1, 0.8), (0.7, 0.7), (0.9, 0.5)]
    answers(monkeypatch, *(evaluation([0.0, 0.0], *pair) for pair in pairs))
    found = trainer(tmp_path, samples[:2], settings(epochs=4), val=samples[:1], **metric)
    last = found.run()
    assert last is not None
    assert last.evaluation.map75 == 0.5
    weights = tmp_path / "weights"
    assert load_checkpoint(weights / "best.pt").training["epoch"] == best
    assert load_checkpoint(weights / "last.pt").training["finished"]


def test_without_truth_the_last_weights_are_the_best(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, evaluation([math.nan, math.nan]), evaluation([math.nan, math.nan]))
    found = trainer(tmp_path, samples[:2], settings(image_weights=True), val=samples[:1])
    found.run()
    assert_same(*(load_checkpoint(tmp_path / "weights" / f"{name}.pt").model.state_dict() for name in ("best", "last")))


@pytest.mark.parametrize(("period", "epochs"), [(0, [4]), (2, [1, 3, 4]), (1, [0, 1, 2, 3, 4])])
def test_validation_comes_when_it_is_due_and_looks_at_the_average(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: int, epochs: list[int]
) -> None:
    calls = answers(monkeypatch, *[evaluation([0.1, 0.1], 0.1, 0.1)] * 5)
    found = trainer(tmp_path, samples[:2], settings(epochs=5, val_period=period, save_period=2), val=samples[:1])
    found.run()
    assert all(call["network"] is found.learner.average.network and call["imgsz"] == 64 for call in calls)
    rows = [row.split(",") for row in (tmp_path / "results.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows if row[6]] == epochs
    assert {path.name for path in (tmp_path / "weights").iterdir()} == {"best.pt", "last.pt", "epoch1.pt", "epoch3.pt"}


def interrupted_after(batch: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[StageTrainer], None]:
    def arm(found: StageTrainer) -> None:
        take_in, done = found.learner.take_in, [0]

        def taking_in(*batch_and_plan: Any) -> Any:
            parts = take_in(*batch_and_plan)
            done[0] += 1
            if done[0] == batch:
                os.kill(os.getpid(), signal.SIGINT)
            return parts

        monkeypatch.setattr(found.learner, "take_in", taking_in)

    return arm


@pytest.mark.parametrize("place", ["batch 1", "batch 4", "batch 7", "validation", "last validation"])
def test_a_resumed_training_is_the_undisturbed_one_to_the_bit(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    wanted = settings(
        nominal_batch=100, epochs=3, optimizer="AdamW" if place == "batch 7" else "SGD", image_weights=True
    )
    first, second, third = (evaluation([ap, 0.2], ap, ap) for ap in (0.3, 0.9, 0.5))
    answers(monkeypatch, first, second, third)
    undisturbed = trainer(tmp_path / "a", samples, wanted, val=samples[:1])
    undisturbed.run()

    stopped = trainer(tmp_path / "b", samples, wanted, val=samples[:1])
    stops = {"validation": [first, None], "last validation": [first, second, None]}
    answers(monkeypatch, *stops.get(place, [first, second]))
    if place not in stops:
        interrupted_after(int(place.split()[1]), monkeypatch)(stopped)
    with pytest.raises(Interrupted, match="--resume"):
        stopped.run()
    epoch = stopped.epoch

    training = load_checkpoint(tmp_path / "b" / "weights" / "last.pt").training
    assert not training.get("finished")
    resumed = trainer(tmp_path / "b", samples, wanted, val=samples[:1])
    with torch.no_grad():
        resumed.learner.network.first_conv.weight.zero_()  # whatever the network begins with, the file decides
    resumed.resume_from(training)
    # The last one is for the best weights, which are looked at again where another process found them.
    answers(monkeypatch, *[first, second, third][epoch:], second)
    resumed.run()
    assert_same(resumed.learner.network.state_dict(), undisturbed.learner.network.state_dict())
    assert_same(resumed.learner.average.network.state_dict(), undisturbed.learner.average.network.state_dict())
    assert resumed.learner.average.updates == undisturbed.learner.average.updates
    texts = [(tmp_path / run / "results.csv").read_text() for run in "ab"]
    assert texts[0] == texts[1]
    assert [load_checkpoint(tmp_path / run / "weights" / "best.pt").training["epoch"] for run in "ab"] == [1, 1]


def test_another_data_set_is_not_resumed_with(samples: list[Sample], tmp_path: Path) -> None:
    found = trainer(tmp_path, samples, settings())
    found._save_last()
    training = load_checkpoint(tmp_path / "weights" / "last.pt").training
    with pytest.raises(DataError, match="epochs of 4 batches, now they have 2"):
        trainer(tmp_path, samples[:4], settings()).resume_from(training)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler:UserWarning", "ignore:.*GradScaler:UserWarning")
@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_a_gpu_computes_in_what_it_has_units_for(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
    found = Precision("auto", torch.device("cuda:0"))
    assert found.dtype is dtype
    assert Precision("auto", CPU).dtype is None


def test_equal_steps_give_equal_bits_where_matches_share_their_cells() -> None:
    # Large enough that torch shares the work among threads, which then race for the same cells.
    spec = ModelSpec(
        class_names=("a", "b"),
        strides=(8, 16, 32),
        anchors=tuple(((8.0 * s, 8.0 * s), (6.0 * s, 9.0 * s), (9.0 * s, 6.0 * s)) for s in (1, 2, 4)),
        imgsz=320,
    )
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 3, 320 // stride, 320 // stride, 7) for stride in spec.strides]
    heads = [torch.randn(shape, generator=generator) for shape in shapes]
    targets = torch.rand(3000, 6, generator=generator)
    targets[:, 0] = (targets[:, 0] * 16).long()
    targets[:, 1] = (targets[:, 1] * 2).long()
    targets[:, 4:] = targets[:, 4:] * 0.2 + 0.1
    loss_of = DetectionLoss(spec)

    def gradients() -> list[torch.Tensor]:
        leaves = [head.clone().requires_grad_() for head in heads]
        loss_of(leaves, targets)[0].backward()  # type: ignore[no-untyped-call]
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    with repeatable(torch.device("cpu")):
        first = gradients()
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    assert not torch.are_deterministic_algorithms_enabled()
