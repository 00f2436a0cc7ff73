"""Writes down what the Python bindings of a TensorRT offer: classes, members, signatures, enumerations.

    python record.py tensorrt_bindings.tensorrt > tensorrt_11.json

It runs in the environment whose bindings are to be described and needs nothing of the project. Without
TensorRT's own libraries the bindings import once stubs stand in for them: `bindings.py` makes those.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from typing import Any

CLASSES = (
    "ILogger", "Logger", "Runtime", "ICudaEngine", "IExecutionContext", "IHostMemory", "Dims",
    "Builder", "IBuilderConfig", "INetworkDefinition", "ITensor", "ILayer", "IOptimizationProfile", "ITimingCache",
    "IProgressMonitor", "OnnxParser", "ParserError", "IPluginRegistry", "IRuntimeConfig", "IRuntimeCache",
    "EngineInspector",
)  # fmt: skip


def describe(module: Any) -> dict[str, Any]:
    """The classes by name, each with its members, and the enumerations with their values' names."""
    described: dict[str, Any] = {}
    for name in CLASSES:
        if hasattr(module, name):
            described[name] = _members(getattr(module, name))
    enumerations = {
        name: sorted(value.__members__) for name, value in vars(module).items() if hasattr(value, "__members__")
    }
    return described | {"enumerations": enumerations}


def _members(kind: type) -> dict[str, Any]:
    """Methods with their signatures, an overload each; properties as `property`; nested values as `value`."""
    members: dict[str, Any] = {"__init__": signatures(kind.__init__)}  # type: ignore[misc]
    for name in dir(kind):
        member = getattr(kind, name)
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            members[name] = "property"
        elif callable(member) and not isinstance(member, type):
            members[name] = signatures(member)
        else:
            members[name] = "value"
    return members


def signatures(function: Any) -> list[str]:
    """`(name: str, index: int) -> str` for each overload, as pybind11 writes them at the head of the text."""
    text = function.__doc__ or ""
    found = re.findall(rf"^(?:\d+\. )?{re.escape(function.__name__)}\((.*)\) -> (.*)$", text, re.MULTILINE)
    plain = [f"({arguments}) -> {result}" for arguments, result in found if not arguments.startswith("*args")]
    prefix = r"tensorrt\w*\.(tensorrt\w*\.)?|typing\.|typing_extensions\.|collections\.abc\."
    return [re.sub(prefix, "", one) for one in plain]


if __name__ == "__main__":
    told = describe(import_module(sys.argv[1]))
    lines = [f"{json.dumps(name)}: {json.dumps(told[name], sort_keys=True)}" for name in sorted(told)]
    print("{\n" + ",\n".join(lines) + "\n}")
