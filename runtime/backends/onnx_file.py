"""What an ONNX file says of itself, read without any ONNX library: metadata and whether the file is whole.

The file is a protobuf message `ModelProto` (onnx.proto3): a sequence of fields, each a key (field number and
wire type), then a number or a length and that many bytes. The graph's bytes are skipped, not read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from parkdet.runtime.errors import ArtifactError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_GRAPH, _METADATA = 7, 14
_KNOWN_FIELDS = frozenset((*range(1, 10), 14, 20, 25, 26))
_EXPORT_AGAIN = "run 'parkdet export' again or copy the file anew"


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """`metadata_props` of the file. ArtifactError when it is empty, cut off or not an ONNX model."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ArtifactError(f"{path}: has zero bytes; {_EXPORT_AGAIN}")
        metadata: dict[str, str] = {}
        has_graph = False
        while file.tell() < size:
            field, wire = divmod(_varint(file, path), 8)
            if field not in _KNOWN_FIELDS or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
                raise ArtifactError(f"{path}: is not an ONNX model, or a damaged one; {_EXPORT_AGAIN}")
            if wire == _VARINT:
                _varint(file, path)
                continue
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire) or _varint(file, path)
            if file.tell() + length > size:
                raise ArtifactError(
                    f"{path}: is cut off: {file.tell() + length - size:,} bytes or more are missing at its end; "
                    f"{_EXPORT_AGAIN}"
                )
            if field == _METADATA and wire == _BYTES:
                key, value = _entry(file.read(length), path)
                metadata[key] = value
            else:
                file.seek(length, os.SEEK_CUR)
            has_graph |= field == _GRAPH
    if not has_graph:
        raise ArtifactError(f"{path}: is cut off, or not an ONNX model: it has no graph; {_EXPORT_AGAIN}")
    return metadata


def _varint(file: BinaryIO, path: Path) -> int:
    value = shift = 0
    while shift < 64:
        byte = file.read(1)
        if not byte:
            raise ArtifactError(f"{path}: is cut off, or not an ONNX model; {_EXPORT_AGAIN}")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
        shift += 7
    raise ArtifactError(f"{path}: is not an ONNX model, or a damaged one; {_EXPORT_AGAIN}")


def _entry(message: bytes, path: Path) -> tuple[str, str]:
    """Key and value of one `StringStringEntryProto`."""
    texts = {1: "", 2: ""}
    at = 0
    while at < len(message):
        key, at = _varint_in(message, at, path)
        length, at = _varint_in(message, at, path)
        if key % 8 != _BYTES or at + length > len(message):
            raise ArtifactError(f"{path}: its metadata is damaged; {_EXPORT_AGAIN}")
        texts[key // 8] = message[at : at + length].decode("utf-8", "replace")
        at += length
    return texts[1], texts[2]


def _varint_in(message: bytes, at: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
    raise ArtifactError(f"{path}: its metadata is damaged; {_EXPORT_AGAIN}")
