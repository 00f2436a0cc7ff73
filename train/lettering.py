"""Fonts that can write the class names. Nothing is downloaded: what this machine has, or numbers for names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parkdet.runtime.pictures import class_label

_OWN_FAMILY = "DejaVu Sans"
"""It comes with matplotlib."""


@dataclass(frozen=True, slots=True)
class Lettering:
    """How a run's pictures call its classes."""

    names: tuple[str, ...]
    """As they can be written: a class whose name no font here has is `#` and its class id."""
    families: tuple[str, ...]
    """matplotlib's font families, to be tried in this order for every letter."""
    font: Path | None
    """A font file for names that are not ASCII; None where there are none, or no font for them."""
    note: str
    """What to tell the user; empty where every name can be written."""

    @classmethod
    def of(cls, class_names: Sequence[str]) -> Lettering:
        """Look for fonts only where matplotlib's own cannot write the names."""
        from matplotlib import font_manager

        own = Path(font_manager.findfont(_OWN_FAMILY))
        if _covers(own, class_names):
            font = None if all(name.isascii() for name in class_names) else own
            return cls(tuple(class_names), (_OWN_FAMILY,), font, "")
        for path in sorted(map(Path, font_manager.findSystemFonts()), key=_preference):
            if _covers(path, class_names):
                font_manager.fontManager.addfont(path)
                family = font_manager.get_font(path).family_name
                return cls(tuple(class_names), (_OWN_FAMILY, family), path, "")
        names = tuple(class_label(number, class_names) for number in range(len(class_names)))
        numbered = ", ".join(f"{short} {full}" for short, full in zip(names, class_names, strict=True) if short != full)
        return cls(
            names, (_OWN_FAMILY,), None,
            f"no font on this machine can write all class names; in pictures they are {numbered} "
            "(a font such as Debian's fonts-nanum or fonts-noto-cjk gives them their names)",
        )  # fmt: skip


def _preference(path: Path) -> tuple[bool, str]:
    """Upright, regular faces first; the same one every time."""
    return "regular" not in path.stem.lower(), str(path)


def _covers(path: Path, names: Sequence[str]) -> bool:
    from matplotlib import font_manager

    try:
        known = font_manager.get_font(path).get_charmap()
    except (OSError, RuntimeError, ValueError):  # a damaged file among the system's fonts
        return False
    return all(ord(letter) in known for name in names for letter in name)
