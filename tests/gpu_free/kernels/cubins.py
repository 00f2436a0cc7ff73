"""What a fatbin holds, read without NVIDIA's tools: machine code is ELF, and says of each kernel what it uses."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FATBIN = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of what follows
_FATBIN_MAGIC = 0xBA55ED50
_ENTRY = struct.Struct("<HHIQ12xI")  # kind, version, bytes of this header, bytes of what follows, architecture
_PTX, _ELF = 1, 2
_SECTION = struct.Struct("<IIQQQQIIQQ")
# Attributes of `.nv.info`: pairs of a symbol's index and a value.
_MIN_STACK_SIZE, _REGISTERS = 0x12, 0x2F


@dataclass(frozen=True, slots=True)
class Kernel:
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of local memory for a stack frame; spilled registers lie there too."""
    local: int
    """Bytes of arrays in local memory."""
    shared: int
    """Bytes of static shared memory, of which newer architectures keep 1024 for themselves."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """Machine code for one architecture."""

    architecture: int
    kernels: dict[str, Kernel]


def entries(fatbin: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(kind, architecture, content) of each piece; kind 1 is PTX, perhaps compressed, kind 2 machine code."""
    magic, _, at, size = _FATBIN.unpack_from(fatbin)
    assert magic == _FATBIN_MAGIC and at + size == len(fatbin)
    while at < len(fatbin):
        kind, _, header, content, architecture = _ENTRY.unpack_from(fatbin, at)
        yield kind, architecture, fatbin[at + header : at + header + content]
        at += header + content


def ptx_architectures(fatbin: bytes) -> list[int]:
    """What the fatbin holds PTX for."""
    return [architecture for kind, architecture, _ in entries(fatbin) if kind == _PTX]


def cubins(fatbin: bytes) -> list[Cubin]:
    """Every piece of machine code in the fatbin, in its order."""
    return [Cubin(number, _kernels(elf)) for kind, number, elf in entries(fatbin) if kind == _ELF]


def _kernels(elf: bytes) -> dict[str, Kernel]:
    assert elf.startswith(b"\x7fELF\x02\x01"), "not ELF of 64 bits"
    (table,) = struct.unpack_from("<Q", elf, 40)
    count, names_index = struct.unpack_from("<HH", elf, 60)
    raw = [_SECTION.unpack_from(elf, table + index * _SECTION.size) for index in range(count)]
    strings = _content(elf, raw[names_index])
    sections = {_string(strings, section[0]): section for section in raw}
    symbol_names = _content(elf, sections[".strtab"])
    symbols = [
        _string(symbol_names, struct.unpack_from("<I", _content(elf, sections[".symtab"]), at)[0])
        for at in range(0, sections[".symtab"][5], 24)
    ]
    values: dict[tuple[int, str], int] = {}
    for attribute, payload in _attributes(_content(elf, sections[".nv.info"])):
        if len(payload) == 8:
            symbol, value = struct.unpack("<II", payload)
            values[attribute, symbols[symbol]] = value
    kernels = {}
    for section in sections:
        if section.startswith(".text."):
            name = section.removeprefix(".text.")
            kernels[name] = Kernel(
                registers=values[_REGISTERS, name],
                stack=values[_MIN_STACK_SIZE, name],
                local=sections[f".nv.local.{name}"][5] if f".nv.local.{name}" in sections else 0,
                shared=sections[f".nv.shared.{name}"][5] if f".nv.shared.{name}" in sections else 0,
            )
    return kernels


def _content(elf: bytes, section: tuple[int, ...]) -> bytes:
    return elf[section[4] : section[4] + section[5]]


def _string(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """(attribute, payload) of each entry: a format of 4 has its length in the next two bytes, others none."""
    at = 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        yield attribute, info[at : at + length] if form == 4 else b""
        at += length if form == 4 else 0
