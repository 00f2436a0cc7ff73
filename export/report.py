"""The gate's report: a line on the terminal, JSON and a readable text beside the artifact."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parkdet.export.agreement import Agreement
from parkdet.export.parity import DECODE_ERROR, LIMITS, ParityReport
from parkdet.runtime.shards import write_atomically


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """All that the gate has to say of one artifact."""

    artifact: str
    checkpoint: str
    source: str
    """What the images are."""
    reports: tuple[ParityReport, ...]
    findings: tuple[str, ...]
    """What refuses the artifact; empty: it passed."""
    warnings: tuple[str, ...] = ()
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else was measured: seconds, bytes, milliseconds an image."""

    @property
    def passed(self) -> bool:
        return not self.findings


def line(report: ParityReport) -> str:
    """One contender on the terminal."""
    figures = [
        (report.iou_p1, f"IoU p1 {report.iou_p1:.5f}"),
        (report.score_p99, f"score difference p99 {report.score_p99:.6f}"),
        (report.agreement.ap75, f"AP@.75 {report.agreement.ap75:.4f}"),
        (report.head_max, f"largest output difference {report.head_max:.2g}"),
    ]
    told = "".join(f", {text}" for value, text in figures if not math.isnan(value))
    return (
        f"{report.name}: {report.detections} detections, {report.unmatched} unmatched, "
        f"{report.reordered} reordered by NMS{told}"
    )


def paths(artifact: Path) -> tuple[Path, Path]:
    """Where an artifact's report is: `ARTIFACT.parity.json` and `ARTIFACT.parity.txt`."""
    return artifact.with_name(f"{artifact.name}.parity.json"), artifact.with_name(f"{artifact.name}.parity.txt")


def write(artifact: Path, result: GateResult) -> None:
    """Both files of a report."""
    json_path, text_path = paths(artifact)
    content = {
        "artifact": result.artifact,
        "checkpoint": result.checkpoint,
        "passed": result.passed,
        "images": result.source,
        "findings": list(result.findings),
        "warnings": list(result.warnings),
        "figures": result.figures,
        "compared": [as_dict(report) for report in result.reports],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(json_path, text.encode())
    write_atomically(text_path, as_text(result).encode())


def as_dict(report: ParityReport) -> dict[str, Any]:
    """For JSON: NaN, where there was nothing to measure, and infinity become null; the limits stand beside."""
    values = dataclasses.asdict(report)
    values["map_lost"] = report.map_lost
    values["findings"] = report.findings()
    values["limits"] = dataclasses.asdict(LIMITS[report.precision])
    plain = _without_nan(values)
    assert isinstance(plain, dict)
    return plain


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(result: GateResult) -> str:
    """The report for a reader."""
    lines = [
        f"{result.artifact} against {result.checkpoint} (torch, float32): {'passed' if result.passed else 'REFUSED'}",
        f"on {result.source}",
        *(f"  refused: {finding}" for finding in result.findings),
        *(f"  warning: {warning}" for warning in result.warnings),
        *(f"  {key}: {value}" for key, value in result.figures.items()),
    ]
    for report in result.reports:
        lines += ["", *_section(report)]
    return "\n".join(lines) + "\n"


def _section(report: ParityReport) -> Sequence[str]:
    limits = LIMITS[report.precision]
    share = report.unmatched / max(report.detections, 1)
    rows = [
        ("unmatched", f"{share:.3%}", _limit(limits.unmatched), f"{report.unmatched} of {report.detections}"),
        ("IoU p1", _number(report.iou_p1, 5), _limit(limits.iou_p1, "at least"),
         f"median {_number(report.iou_median, 5)}, worst {_number(report.iou_min, 5)}"),
        ("score difference p99", _number(report.score_p99, 6), _limit(limits.score_p99),
         f"median {_number(report.score_median, 6)}, worst {_number(report.score_max, 6)}"),
        ("AP@.75", _number(report.agreement.ap75, 4), _limit(limits.ap75, "at least"),
         f"the other way round {_number(report.reverse.ap75, 4)}"),
        ("mAP@[.5:.95] lost", _number(report.map_lost, 5), _limit(limits.map_lost),
         f"checkpoint {_number(report.map_checkpoint, 4)}, artifact {_number(report.map_artifact, 4)}"),
        ("largest output difference", f"{report.head_max:.3g}", "", ""),
        ("decoding, px", _number(report.decode_error, 5), _limit(DECODE_ERROR), ""),
    ]  # fmt: skip
    found = [f"{report.name} ({report.precision}), {report.images} images"]
    if report.note:
        found.append(f"  {report.note}")
    found += [f"  {name:<26}{value:>12}   {limit:<18} {more}".rstrip() for name, value, limit, more in rows]
    found += _agreement("artifact against checkpoint", report.agreement)
    found += _agreement("checkpoint against artifact", report.reverse)
    outside = report.findings()
    found += [f"  outside its limits: {finding}" for finding in outside] or ["  within its limits"]
    return found


def _number(value: float, places: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{places}f}"


def _limit(value: float, words: str = "at most") -> str:
    none = math.inf if words == "at most" else 0
    return "no limit" if value == none else f"{value:g} {words}"


def _agreement(title: str, agreement: Agreement) -> list[str]:
    def number(value: float) -> str:
        return _number(value, 4)

    lines = [
        f"  {title}: AP@[.5:.95] {number(agreement.ap)}, AP@.5 {number(agreement.ap50)}, "
        f"AP@.75 {number(agreement.ap75)}; small {number(agreement.ap_small)}, medium {number(agreement.ap_medium)}, "
        f"large {number(agreement.ap_large)}"
    ]
    width = max(map(len, agreement.per_class), default=0)
    lines += [f"    {name:<{width}}  {number(ap)}" for name, ap in agreement.per_class.items()]
    return lines
