"""Small changes that make a kernel wrong, by listed operators, at every place where each applies."""

from __future__ import annotations

import itertools
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


_Edit = tuple[int, int, str]
"""Begin, end, and what is put there."""
_Rule = tuple[str, Callable[[str], Iterator[_Edit]]]


def _each(pattern: str, replace: Callable[[re.Match[str]], list[str]]) -> Callable[[str], Iterator[_Edit]]:
    """Replacements of all that a pattern matches."""

    def edits(code: str) -> Iterator[_Edit]:
        for match in re.finditer(pattern, code):
            for replacement in replace(match):
                yield match.start(), match.end(), replacement

    return edits


def _swap(*pairs: tuple[str, str]) -> Callable[[re.Match[str]], list[str]]:
    table: dict[str, list[str]] = {}
    for original, replacement in pairs:
        table.setdefault(original, []).append(replacement)
    return lambda match: table.get(match[0], [])


def _becomes(*replacements: str) -> Callable[[re.Match[str]], list[str]]:
    """Replacements in which {} stands for what was there."""
    return lambda match: [replacement.replace("{}", match[0]) for replacement in replacements]


_off_by_one = _becomes("({} + 1)", "({} - 1)")

_BALANCED = r"(?:[^()\n]|\((?:[^()\n]|\((?:[^()\n]|\([^()\n]*\))*\))*\))*"
"""What stands between a parenthesis and its partner, three deep."""
_OPERAND = rf"-?(?:\w[\w.]*(?:<[^<>\n]*>)?(?:\({_BALANCED}\)|\[[^\[\]\n]*\])*|\({_BALANCED}\))"


def _arguments_exchanged(code: str) -> Iterator[_Edit]:
    """Two neighbours in the parentheses of a call, but where their order means nothing."""
    for match in re.finditer(rf"(?<!fminf)(?<!fmaxf)(?<=[\w>])\((?=({_BALANCED})\))", code):
        cuts, depth = [match.start(1)], 0
        for offset, character in enumerate(match[1], match.start(1)):
            depth += (character in "([{") - (character in ")]}")
            if character == "," and depth == 0:
                cuts.append(offset + 2)
        cuts.append(match.end(1) + 2)
        for begin, middle, end in zip(cuts, cuts[1:], cuts[2:], strict=False):
            yield begin, end - 2, f"{code[middle : end - 2]}, {code[begin : middle - 2]}"


def _barriers_moved(code: str) -> Iterator[_Edit]:
    """A barrier and the line before or after it, unless that computes something for its own thread."""
    lines = [(match.start(), match.end()) for match in re.finditer(r"[^\n]+\n", code)]
    for above, below in itertools.pairwise(lines):
        first, second = code[slice(*above)], code[slice(*below)]
        own = any(line.lstrip().startswith(("const ", "int ", "++")) or not line.strip() for line in (first, second))
        if "__syncthreads" in first + second and not own:
            yield above[0], below[1] - 1, f"{second}{first[:-1]}"


_NEIGHBOURS = {
    "head": "anchor", "image": "anchor", "anchor": "image", "label": "common", "common": "anchor", "source": "lane",
    "lane": "source", "row": "column", "column": "row", "rows": "columns", "columns": "rows", "shape": "row",
    "width_root": "height_root", "height_root": "width_root", "half_width": "half_height", "half_height": "half_width",
    "width": "height", "height": "width", "x": "y", "y": "x", "x1": "x2", "x2": "x1", "y1": "y2", "y2": "y1", "a": "b",
    "b": "a", "a_class": "b_class", "b_class": "a_class", "a_area": "b_area", "b_area": "a_area", "best": "key",
    "key": "best", "first": "begin", "begin": "first", "other": "begin", "count": "length", "length": "count",
    "size": "count", "run": "distance", "distance": "run", "low": "high", "high": "low", "pair": "low", "first_anchor":
    "anchors", "anchors": "rows", "stride": "view_scale", "view_scale": "stride", "kept": "k", "k": "kept", "out":
    "first", "thread": "lane", "warp": "lane", "lanes": "warps", "warps": "lanes", "slot": "base", "base": "lane", "at":
    "first", "shift": "p.round", "digits": "key", "larger": "bin", "bin": "larger", "other_bin": "bin", "num_heads":
    "num_classes", "num_classes": "num_heads", "max_det": "max_candidates", "max_candidates": "max_det", "conf": "iou",
    "iou": "conf", "box": "kept_box", "kept_box": "box", "boxes": "ranked_boxes", "ranked_boxes": "boxes", "keys":
    "ranked_keys", "ranked_keys": "keys", "candidates": "num_dets", "num_dets": "candidates", "at_max_det":
    "candidates", "kept_class": "label", "objectness": "raw", "raw": "objectness", "own_objectness": "objectness",
    "canvas_width": "canvas_height", "canvas_height": "canvas_width", "image_height": "image_width", "image_width":
    "image_height", "resized_height": "resized_width", "resized_width": "resized_height", "top": "left", "left": "top",
    "before": "after", "after": "before", "whole": "after", "upper": "lower", "lower": "upper", "above": "below",
    "below": "above", "right": "low", "middle": "before", "sum": "line_sum", "line_sum": "sum", "resized": "source",
    "half": "exponent", "exponent": "half", "n": "r", "r": "n", "q": "r", "tile": "keys", "own": "rank",
}  # fmt: skip
"""A name -> one that means something near. Where it is not in scope the mutant does not compile."""

OPERATORS: tuple[_Rule, ...] = (
    ("barrier removed", _each(r"__syncthreads\(\);", _becomes(";"))),
    ("barrier weakened", _each(r"__syncthreads\(\);", _becomes("__syncwarp();"))),
    ("barrier moved", _barriers_moved),
    ("atomic made plain", _each(r"atomicAdd\(", _becomes("plain_add("))),
    (
        "comparison moved",
        _each(
            r"(?<= )(?:<=|>=|<|>)(?= )",
            _swap(("<", "<="), ("<=", "<"), (">", ">="), (">=", ">")),
        ),
    ),
    (
        "comparison turned",
        _each(
            r"(?<= )(?:<=|>=|<|>|==|!=)(?= )",
            _swap(("<", ">="), ("<=", ">"), (">", "<="), (">=", "<"), ("==", "!="), ("!=", "=="), ("<", ">"),
                  (">", "<")),
        ),
    ),
    (
        "arithmetic changed",
        _each(
            r"(?<= )[-+*/%](?= )",
            _swap(("+", "-"), ("-", "+"), ("*", "/"), ("/", "*"), ("%", "/"), ("+", "*"), ("*", "+"), ("%", "*")),
        ),
    ),
    ("operand dropped", _each(rf"(?<=[\w)\]]) (?:[-+*/%&|]|<<|>>) {_OPERAND}", _becomes(""))),
    ("operand dropped", _each(rf"(?<=[ (\[]){_OPERAND} (?:[-+*/%&|]|<<|>>) (?!=)", _becomes(""))),
    (
        "assignment changed",
        _each(
            r"(?<= )(?:\+=|\*=|/=|&=)(?= )",
            _swap(("+=", "-="), ("+=", "="), ("*=", "="), ("/=", "*="), ("&=", "|="), ("*=", "+="), ("/=", "-=")),
        ),
    ),
    ("increment changed", _each(r"\+\+(\w+)", lambda m: [f"{m[1]} += 2", f"--{m[1]}"])),
    ("increment changed", _each(r"--(\w+)", lambda m: [f"{m[1]} -= 2"])),
    ("sign dropped", _each(r"(?<=[(= ])-(?=[\w(])(?!- )", _becomes(""))),
    ("constant off by one", _each(r"(?<![\w.])\d+u?(?![\w.])", _off_by_one)),
    ("constant zeroed", _each(r"(?<![\w.])(?:[2-9]|[1-9]\d)\d*u?(?![\w.])|(?<![\w.])(?!0\.f)\d+\.\d*(?:e-\d+)?f",
                              _becomes("0"))),
    ("constant off by a thousandth", _each(r"(?<![\w.])\d+\.\d*(?:e-\d+)?f", _becomes("({} * 1.001f + 1e-9f)"))),
    ("constant doubled", _each(r"(?<![\w.])\d+\.\d*(?:e-\d+)?f", _becomes("(2 * {} + 1e-3f)"))),
    (
        "named constant changed",
        _each(
            r"\bk[A-Z]\w+(?= [-+*/%]|[;,)\]]| [<>])", _becomes("({} + 1)", "({} - 1)", "({} * 2)", "({} / 2)")
        ),
    ),
    ("shape changed", _each(r"\bblockDim\.x", _becomes("({} + 1)", "({} - 1)", "({} * 2)", "1"))),
    ("limit off by one", _each(r"\bp\.(?:max_candidates|max_det|num_classes|num_anchors|num_heads)\b", _off_by_one)),
    ("limit off by one", _each(r"\bp\.(?:\w+_height|\w+_width)\b", _off_by_one)),
    ("limit off by one", _each(r"\bhead\.(?:anchors|rows|columns|first_anchor)\b", _off_by_one)),
    ("cap ignored", _each(r"(?= \? )", _becomes(" || true", " && false"))),
    ("and, or", _each(r"&&|\|\|", _swap(("&&", "||"), ("||", "&&")))),
    ("negation dropped", _each(r"!(?=[\w(])", _becomes(""))),
    ("condition held", _each(r"(?<=\bif \()(?=\S)", _becomes("true || ", "false && "))),
    ("condition held", _each(r"(?<= && )(?=[^ ])", _becomes("true || "))),
    ("condition held", _each(r"(?<=while \()(?=\S)|(?<=; )(?=[^;{}\n]+; )", _becomes("false && "))),
    ("condition dropped", _each(r"(?<=[ (])[^(;\n]+ && ", _becomes(""))),
    ("condition dropped", _each(r"(?<=[ (])[^(&;\n]+ \|\| ", _becomes(""))),
    (
        "bits changed",
        _each(
            r"(?<= )(?:<<|>>|&|\|)(?= )",
            _swap(("<<", ">>"), (">>", "<<"), ("&", "|"), ("|", "&"), ("|", "+ 1 +"), ("|", "^"), ("&", "^")),
        ),
    ),
    (
        "axes exchanged",
        _each(
            r"\b(?:threadIdx|blockIdx)\.[xy]",
            _swap(
                ("threadIdx.x", "blockIdx.x"), ("blockIdx.x", "blockIdx.y"), ("blockIdx.y", "blockIdx.x"),
                ("blockIdx.x", "0"), ("blockIdx.y", "0"), ("threadIdx.x", "0"), ("blockIdx.x", "threadIdx.x"),
            ),
        ),
    ),
    (
        "function exchanged",
        _each(
            r"\b(?:fminf|fmaxf|rintf|floorf|__popc|__ffs|__shfl_xor_sync|__shfl_sync|__ballot_sync|__int_as_float)\b",
            _swap(
                ("fminf", "fmaxf"), ("fmaxf", "fminf"), ("rintf", "floorf"), ("floorf", "rintf"), ("rintf", "ceilf"),
                ("__popc", "__ffs"), ("__ffs", "__popc"), ("__ffs", "__clz"), ("__shfl_xor_sync", "__shfl_down_sync"),
                ("__shfl_xor_sync", "__shfl_sync"), ("__shfl_sync", "__shfl_xor_sync"),
                ("__ballot_sync", "__any_sync"), ("__int_as_float", "static_cast<float>"),
            ),
        ),
    ),
    ("function dropped", _each(r"\b(?:sigmoid|exponential|rintf|logf|__popc|__ffs|__float_as_int)(?=\()",
                               _becomes(""))),
    ("cast dropped", _each(r"static_cast<[^<>\n]+>(?=\()", _becomes(""))),
    ("type narrowed", _each(r"\bsize_t\b|\bKey\b(?! make_key)", lambda m: ["unsigned", "int"] if m[0] == "size_t"
                            else ["unsigned"])),
    ("branches exchanged", _each(r"(?<= \? )([^?:;]+) : ([^?:;,()]+)", lambda match: [f"{match[2]} : {match[1]}"])),
    ("truth exchanged", _each(r"\b(?:true|false)\b", _swap(("true", "false"), ("false", "true")))),
    (
        "jump changed",
        _each(
            r"\b(?:break|continue);",
            _swap(("break;", ";"), ("continue;", ";"), ("continue;", "break;"), ("break;", "continue;")),
        ),
    ),
    ("jump changed", _each(r"(?<=\) )return;", _becomes(";"))),
    ("early return", _each(r"(?<=\n)( {4,})(?=[^\s}#/][^\n]*;\n)", _becomes("{}return; "))),
    ("value zeroed", _each(r"\breturn ([^;\n]+);", lambda match: [] if match[1] in ("0", "false") else ["return {};"])),
    ("step removed", _each(r"(?:\+\+\w+|\w+ &= [^;)]+)(?=[;)])", _becomes("(void)0"))),
    ("statement removed", _each(r"(?<=\n) *(?! |const|return|int|float|for|if|else|Key|Box|Span|using|break|continue"
                                r"|\}|__)[^;{}\n]+;(?=\n)", _becomes(" ;"))),
    ("statement removed", _each(r"(?<=\) )\w[^\n;()]* = [^;\n]+;(?=\n)", _becomes(";"))),
    ("statement removed", _each(rf"(?<=\) )(?!return)\w+\({_BALANCED}\);(?=\n)", _becomes(";"))),
    ("index changed", _each(r"(?<=[\w\])]\[)(?!k[A-Z])[^\[\]\n]+(?=\])", _becomes("0", "{} + 1", "{} - 1"))),
    ("arguments exchanged", _arguments_exchanged),
    ("name exchanged", _each(r"(?<![\w>])(?:[a-z_]\w*)\b(?!\()",
                             lambda match: [_NEIGHBOURS[match[0]]] if match[0] in _NEIGHBOURS else [])),
)  # fmt: skip
"""(name, the edits it makes). They know the sources' format: operators stand between spaces."""


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
        for operator, edits in OPERATORS:
            for start, end, replacement in edits(code):
                mutant = Mutant(file, operator, start, end, replacement)
                result = (file, mutant.apply(text))
                if result not in seen and result[1] != text:
                    seen.add(result)
                    yield mutant
