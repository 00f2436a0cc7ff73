"""What TensorRT's Python bindings offer, as recorded, and stand-ins that allow nothing else.

`Surface("10")`, `("11")` and `("rtx")` know the classes, members, signatures and enumerations of TensorRT 10.16, 11.4
and TensorRT for RTX 1.7. A test's double of a TensorRT object inherits `Strict`: a name that the real class lacks is an
AttributeError, a call whose arguments fit no overload a TypeError, just as the bindings would have it, and every
call is kept in `surface.log`.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
from functools import wraps
from pathlib import Path
from typing import Any, SupportsInt

FLAVOURS = ("10", "11", "rtx")


class Surface:
    """The recorded bindings of one TensorRT."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        path = Path(__file__).with_name(f"tensorrt_{flavour}.json")
        self.classes: dict[str, dict[str, Any]] = json.loads(path.read_text())
        names = self.classes.pop("enumerations")
        self.enumerations: dict[str, Any] = {name: enum.Enum(name, values) for name, values in names.items()}
        self.log: list[str] = []
        """Every call of a double, as a line of Python."""

    def check(self, kind: str, member: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note a call of a method. AttributeError or TypeError where the bindings would raise one."""
        shown = [*(_shown(a) for a in arguments), *(f"{name}={_shown(a)}" for name, a in named.items())]
        self.log.append(f"{kind}.{member}({', '.join(shown)})")
        overloads = self.classes[kind].get(member)
        if not isinstance(overloads, list):
            raise AttributeError(f"TensorRT {self.flavour}: {kind} has no method '{member}'")
        if not any(self._fits(overload, arguments, named) for overload in overloads):
            raise TypeError(f"TensorRT {self.flavour}: {self.log[-1]}: the bindings have {' and '.join(overloads)}")

    def check_property(self, kind: str, member: str) -> None:
        """AttributeError where the class has no such property."""
        if self.classes[kind].get(member) not in ("property", "value"):
            raise AttributeError(f"TensorRT {self.flavour}: {kind} has no property '{member}'")

    def _fits(self, overload: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> bool:
        parameters = _parameters(overload)
        if len(arguments) > len(parameters):
            return False
        given = dict(zip(parameters, arguments, strict=False))
        if named.keys() & given.keys() or named.keys() - parameters.keys():
            return False
        given |= named
        missing = [name for name, (_, optional) in parameters.items() if name not in given and not optional]
        return not missing and all(self._takes(parameters[name][0], value) for name, value in given.items())

    def _takes(self, annotation: str, value: Any) -> bool:
        if annotation in self.enumerations:
            return isinstance(value, self.enumerations[annotation])
        plain = {"str": str, "bool": bool, "tuple": tuple, "list": list, "SupportsInt": SupportsInt}
        if annotation in plain:
            return isinstance(value, plain[annotation]) and not (annotation == "SupportsInt" and isinstance(value, str))
        if "." in annotation:  # an enumeration inside a class
            return isinstance(value, enum.Enum) and type(value).__name__ == annotation.rpartition(".")[2]
        if annotation == "Buffer":
            return isinstance(value, bytes | bytearray | memoryview)
        if annotation in self.classes:
            return any(base.__name__ == annotation for base in type(value).__mro__)
        return False  # nothing that the project passes


def _parameters(overload: str) -> dict[str, tuple[str, bool]]:
    """Name -> annotation and whether there is a default, without self."""
    inside = overload[1 : overload.rindex(") -> ")]
    parts = re.split(r", (?=\w+: )", inside)
    found = {}
    for part in parts:
        name, _, rest = part.partition(": ")
        annotation, _, default = rest.partition(" = ")
        if name != "self":
            found[name] = (annotation, bool(default))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bytes | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, int) and value > 0xFFFF:
        return "<address>"
    return repr(value) if isinstance(value, int | str | tuple | list | bool | None) else f"<{type(value).__name__}>"


class Strict:
    """Base of a double: the class named like one of TensorRT's has that one's members and no others."""

    surface: Surface
    """Set by the module double; one for all its classes."""

    def __init_subclass__(cls) -> None:
        """Check what the double defines, and have every call of it checked."""
        for name, member in list(vars(cls).items()):
            if name.startswith("_") or not inspect.isfunction(member):
                continue
            setattr(cls, name, _checked(name, member))

    def _kind(self) -> str:
        return next(base.__name__ for base in type(self).__mro__ if base.__name__ in self.surface.classes)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = self._kind()
        if name in self.surface.classes[kind]:
            raise NotImplementedError(f"{kind}.{name} is TensorRT's, but the double lacks it")
        raise AttributeError(f"TensorRT {self.surface.flavour}: {kind} has no '{name}'")


def _checked(name: str, method: Any) -> Any:
    @wraps(method)
    def call(self: Strict, *arguments: Any, **named: Any) -> Any:
        self.surface.check(self._kind(), name, arguments, named)
        return method(self, *arguments, **named)

    return call
