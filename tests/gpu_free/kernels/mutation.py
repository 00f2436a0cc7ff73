"""Small changes that make a kernel wrong, by listed operators, at every place where each applies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILES = ("nms.cuh", "letterbox.cuh")
"""All device code."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change to one place of one file."""

    file: str
    operator: str
    start: int
    """Offset in the file's text."""
    end: int
    replacement: str

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]

    def line_number(self, text: str) -> int:
        return text.count("\n", 0, self.start) + 1

    def before(self, text: str) -> str:
        """The line as it is, without indentation: with `after`, what a survivor is known by."""
        begin, end = text.rfind("\n", 0, self.start) + 1, text.find("\n", self.end)
        return text[begin:end].strip()

    def after(self, text: str) -> str:
        """The line as it becomes."""
        begin, end = text.rfind("\n", 0, self.start) + 1, text.find("\n", self.end)
        return (text[begin : self.start] + self.replacement + text[self.end : end]).strip()


def _swap(*pairs: tuple[str, str]) -> Callable[[re.Match[str]], list[str]]:
    table: dict[str, list[str]] = {}
    for original, replacement in pairs:
        table.setdefault(original, []).append(replacement)
    return lambda match: table.get(match[0], [])


def _off_by_one(match: re.Match[str]) -> list[str]:
    return [f"({match[0]} + 1)", f"({match[0]} - 1)"]


_Rule = tuple[str, str, Callable[[re.Match[str]], list[str]]]

OPERATORS: tuple[_Rule, ...] = (
    ("barrier removed", r"__syncthreads\(\);", lambda _: [";"]),
    ("atomic made plain", r"atomicAdd\(", lambda _: ["plain_add("]),
    (
        "comparison moved",
        r"(?<= )(?:<=|>=|<|>)(?= )",
        _swap(("<", "<="), ("<=", "<"), (">", ">="), (">=", ">")),
    ),
    (
        "comparison turned",
        r"(?<= )(?:<=|>=|<|>|==|!=)(?= )",
        _swap(("<", ">="), ("<=", ">"), (">", "<="), (">=", "<"), ("==", "!="), ("!=", "==")),
    ),
    (
        "arithmetic changed",
        r"(?<= )[-+*/%](?= )",
        _swap(("+", "-"), ("-", "+"), ("*", "/"), ("/", "*"), ("%", "/")),
    ),
    (
        "assignment changed",
        r"(?<= )(?:\+=|\*=|/=|&=)(?= )",
        _swap(("+=", "-="), ("+=", "="), ("*=", "="), ("/=", "*="), ("&=", "|=")),
    ),
    ("sign dropped", r"(?<=[(= ])-(?=[\w(])(?!- )", lambda _: [""]),
    ("constant off by one", r"(?<![\w.])\d+u?(?![\w.])", _off_by_one),
    ("constant off by a thousandth", r"(?<![\w.])\d+\.\d*(?:e-\d+)?f", lambda m: [f"({m[0]} * 1.001f + 1e-9f)"]),
    ("named constant off by one", r"\bk[A-Z]\w+(?= [-+*/%]|[;,)\]]| [<>])", _off_by_one),
    ("shape off by one", r"\bblockDim\.x", _off_by_one),
    ("limit off by one", r"\bp\.(?:max_candidates|max_det|num_classes|num_anchors|num_heads)\b", _off_by_one),
    ("limit off by one", r"\bp\.(?:\w+_height|\w+_width)\b", _off_by_one),
    ("and, or", r"&&|\|\|", _swap(("&&", "||"), ("||", "&&"))),
    ("negation dropped", r"!(?=[\w(])", lambda _: [""]),
    ("condition held", r"(?<=\bif \()(?=\S)", lambda _: ["true || ", "false && "]),
    ("condition held", r"(?<= && )(?=[^ ])", lambda _: ["true || "]),
    ("bits changed", r"(?<= )(?:<<|>>|&|\|)(?= )", _swap(
        ("<<", ">>"), (">>", "<<"), ("&", "|"), ("|", "&"), ("|", "+ 1 +"),
    )),
    ("axes exchanged", r"\b(?:threadIdx|blockIdx)\.[xy]", _swap(
        ("threadIdx.x", "blockIdx.x"), ("blockIdx.x", "blockIdx.y"), ("blockIdx.y", "blockIdx.x"), ("blockIdx.x", "0"),
    )),
    ("function exchanged", r"\b(?:fminf|fmaxf|rintf|floorf)\b", _swap(
        ("fminf", "fmaxf"), ("fmaxf", "fminf"), ("rintf", "floorf"), ("floorf", "rintf"), ("rintf", "ceilf"),
    )),
    ("branches exchanged", r"(?<= \? )([^?:;]+) : ([^?:;,()]+)", lambda match: [f"{match[2]} : {match[1]}"]),
    ("truth exchanged", r"\b(?:true|false)\b", _swap(("true", "false"), ("false", "true"))),
    ("jump changed", r"\b(?:break|continue);", _swap(("break;", ";"), ("continue;", ";"), ("continue;", "break;"))),
    ("jump changed", r"(?<=\) )return;", lambda _: [";"]),
    ("step removed", r"(?:\+\+\w+|\w+ &= [^;)]+)(?=[;)])", lambda _: ["(void)0"]),
    ("statement removed", r"(?<=\n) *(?! |const|return|int|float|for|if|else|Key|Box|Span|using|break|continue|\}|__)"
                          r"[^;{}\n]+;(?=\n)", lambda _: [" ;"]),
    ("statement removed", r"(?<=\) )\w[\w\[\].]* = [^;\n]+;(?=\n)", lambda _: [";"]),
)  # fmt: skip
"""(name, where it applies, what it puts there). They know the sources' format: operators stand between spaces."""


def blanked(text: str) -> str:
    """The source with comments, preprocessor lines and attributes of kernels blanked: nothing moves."""
    return re.sub(
        r"//[^\n]*|^#[^\n]*|__launch_bounds__\([^\n]*\)(?=[ \n])|constexpr [^;\n]*;|\boperator\b",
        lambda match: " " * len(match[0]),
        text,
        flags=re.MULTILINE,
    )


def mutants(folder: Path) -> Iterator[Mutant]:
    """Every mutant of the kernels in a folder, none twice."""
    seen = set()
    for file in FILES:
        text = (folder / file).read_text()
        code = blanked(text)
        for operator, pattern, replace in OPERATORS:
            for match in re.finditer(pattern, code):
                for replacement in replace(match):
                    mutant = Mutant(file, operator, match.start(), match.end(), replacement)
                    result = (file, mutant.apply(text))
                    if result not in seen:
                        seen.add(result)
                        yield mutant
