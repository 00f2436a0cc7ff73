"""File sizes as a user types and reads them."""

from __future__ import annotations

import re
from fractions import Fraction

from parkdet.runtime.errors import UsageError

DEFAULT_LIMIT = "20MB"

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmg", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of `20MB` (20,000,000), `20 MB`, `1.5mb`, `20MiB` (20,971,520) or `20000000`."""
    match = _SIZE.fullmatch(text.strip().lower())
    if match is None or match[2] not in _UNITS:
        ambiguous = match is not None and f"{match[2]}b" in _UNITS
        raise UsageError(
            f"{text!r} is {'ambiguous' if ambiguous else 'not a size'}: write bytes (20000000), kB, MB or GB "
            "for powers of 1000 (20MB), or KiB, MiB or GiB for powers of 1024 (20MiB)"
        )
    size = Fraction(match[1]) * _UNITS[match[2]]
    if size.denominator != 1:
        raise UsageError(f"{text!r} is not a whole number of bytes ({float(size)})")
    return int(size)
