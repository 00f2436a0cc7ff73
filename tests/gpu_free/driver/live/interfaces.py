"""C++ from TensorRT's own headers: each of its interfaces with every method there, answering that it is not simulated.

The layout of the interfaces is the headers', so the real Python bindings of that version call what they expect to.
`library.cpp` overrides the methods that the project uses.
"""

from __future__ import annotations

import re
from pathlib import Path

_INTERFACES = {
    "nvinfer1::apiv": (
        "NvInferImpl.h",
        ("VHostMemory", "VRuntime", "VOptimizationProfile", "VCudaEngine", "VExecutionContext", "VTensor",
         "VTimingCache", "VBuilderConfig", "VNetworkDefinition", "VBuilder"),
    ),
    "nvinfer1": ("NvInferRuntime*.h", ("IPluginRegistry",)),
    "nvonnxparser": ("NvOnnxParser.h", ("IParser", "IParserError")),
}  # fmt: skip
"""Namespace -> the headers that declare its interfaces, and their names."""


def unsimulated(headers: Path) -> str:
    """A header with a class `Unsimulated<Interface>` for each interface."""
    parts = ["#pragma once", "#pragma GCC system_header", "#include <NvInfer.h>", "#include <NvOnnxParser.h>"]
    parts.append("[[noreturn]] void not_simulated(char const* method);")
    for namespace, (pattern, names) in _INTERFACES.items():
        text = "\n".join(_code(path) for path in sorted(headers.glob(pattern)))
        opening = " ".join(f"namespace {part} {{" for part in namespace.split("::"))
        parts += [opening, *(_class(text, name) for name in names), "}" * (namespace.count("::") + 1)]
    return "\n".join(parts) + "\n"


def _code(path: Path) -> str:
    return re.sub(r"//.*|/\*(?s:.*?)\*/", "", path.read_text())


def _class(text: str, name: str) -> str:
    (body,) = re.findall(rf"^class {name}\b[^;{{]*\{{(.*?)^\}};", text, re.MULTILINE | re.DOTALL)
    methods = []
    for declaration in re.findall(r"virtual\s+([^;{}]*?)\s*=\s*0\s*;", body):
        signature = " ".join(declaration.split())
        if not signature.startswith("~"):
            called = re.search(r"(\w+)\s*\(", signature)
            assert called is not None, signature
            methods.append(f'    {signature} override {{ not_simulated("{name}::{called[1]}"); }}')
    return "\n".join([f"class Unsimulated{name} : public {name}", "{", "public:", *methods, "};"])
