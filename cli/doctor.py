"""`parkdet doctor`: this machine and this installation, and the known problems that they have."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from parkdet.runtime.errors import EXIT_DONE, EXIT_FAILED

GIB = 2**30
LEAST_FREE_BYTES = 2 * GIB
"""A checkpoint, its exports and the predictions of one contest run take less than this."""

OLDEST_TENSORRT = (10, 16)
OLDEST_DRIVER = (580,)
OLDEST_GPU = (7, 5)
"""Compute capability of Turing: CUDA 13 compiles for nothing older."""

_CPU_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "bf16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is known to fail later, and what to do about it."""

    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What this process may use, which in a container is less than the hardware has."""

    platform: str
    cpu: str
    cpu_set: int
    """CPUs this process may run on."""
    cpu_quota: float | None
    """CPUs' worth of time that the container grants; None without a limit."""
    cpu_flags: tuple[str, ...]
    """The instruction sets that decide about precision and speed, as the kernel names them."""
    memory_bytes: int | None
    """The machine's memory or the container's limit, whichever is less."""
    free_disk_bytes: Mapping[str, int]
    """By folder: the current one and the temporary one."""
    gpus: tuple[str, ...]
    """`name, driver, memory, compute capability` of each, as the NVIDIA driver tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """Which Python runs which parkdet with which libraries."""

    python: str
    executable: str
    parkdet: str
    source: str
    """`checkout` for an editable installation, `wheel` otherwise."""
    folder: str
    libraries: Mapping[str, Mapping[str, str | None]]
    """Extra (`base` for what everybody needs) -> library -> version, None where it is not installed."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(as_json: bool) -> int:
    """Look at this machine and installation for known problems.

    Exits with 1 when it finds one. Nothing is changed.
    """
    installed = installed_versions()
    installation = examine_installation(installed)
    machine, problems = examine_machine()
    problems = [*library_problems(installed), *base_problems(installation), *problems]
    if as_json:
        report = {
            "ok": not problems,
            "problems": [asdict(problem) for problem in problems],
            "installation": asdict(installation),
            "machine": asdict(machine),
        }
        click.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        click.echo("\n".join(_lines(installation, machine, problems)))
    return EXIT_FAILED if problems else EXIT_DONE


def installed_versions() -> dict[str, str]:
    """Every distribution that this Python finds: normalised name -> version."""
    return {
        _normalised(found.metadata["Name"]): found.version
        for found in importlib.metadata.distributions()
        if found.metadata["Name"]  # a damaged installation leaves folders without one
    }


def library_problems(installed: Mapping[str, str]) -> list[Problem]:
    """Libraries that disturb one another, by what is installed: normalised name -> version."""
    problems = []
    if {"onnxruntime", "onnxruntime-gpu"} <= installed.keys():
        problems.append(
            Problem(
                problem="onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
                remedy="pip uninstall -y onnxruntime onnxruntime-gpu, then install the one that you need",
            )
        )
    opencvs = sorted(name for name in installed if re.fullmatch(r"opencv(-contrib)?-python(-headless)?", name))
    if len(opencvs) > 1:
        others = " ".join(name for name in opencvs if name != "opencv-python-headless")
        problems.append(
            Problem(
                problem=f"{' and '.join(opencvs)} are installed together; all of them write the folder cv2",
                remedy=f"pip uninstall -y {others}, then "
                "pip install --force-reinstall --no-deps 'opencv-python-headless>=4.14,<5'",
            )
        )
    for name, version in sorted(installed.items()):
        if re.fullmatch(r"tensorrt(-cu\d+)?", name) and _numbers(version) < OLDEST_TENSORRT:
            oldest = ".".join(map(str, OLDEST_TENSORRT))
            problems.append(
                Problem(
                    problem=f"{name} {version} is older than {oldest}, the oldest that engines are built and run with",
                    remedy=f"pip install '{name}>={oldest}', then build the engines again",
                )
            )
    torch, torchvision = installed.get("torch"), installed.get("torchvision")
    if torch and torchvision and torch.partition("+")[2] != torchvision.partition("+")[2]:
        problems.append(
            Problem(
                problem=f"torchvision {torchvision} is another build than torch {torch}; importing it fails",
                remedy="pip uninstall -y torchvision (parkdet does not use it)",
            )
        )
    return problems


def base_problems(installation: Installation) -> list[Problem]:
    """Libraries that every command may need and that are absent."""
    absent = [name for name, version in installation.libraries.get("base", {}).items() if version is None]
    if not absent:
        return []
    return [Problem(problem=f"not installed: {', '.join(absent)}", remedy=f"pip install {' '.join(absent)}")]


def examine_installation(installed: Mapping[str, str]) -> Installation:
    """Read the metadata of parkdet; no library is imported."""
    distribution = importlib.metadata.distribution("parkdet")
    libraries: dict[str, dict[str, str | None]] = {}
    for requirement in distribution.requires or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        if name is not None:
            known = libraries.setdefault(extra[1] if extra else "base", {})
            known[name[0]] = installed.get(_normalised(name[0]))
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = bool(origin.get("dir_info", {}).get("editable"))
    return Installation(
        python=platform.python_version(),
        executable=sys.executable,
        parkdet=distribution.version,
        source="checkout" if editable else "wheel",
        folder=str(Path(__file__).resolve().parents[1]),
        libraries=libraries,
    )


def examine_machine() -> tuple[Machine, list[Problem]]:
    """Ask the operating system, and the NVIDIA driver where there is one."""
    cpu, flags = _cpu()
    gpus, problems = _gpus()
    free = {str(folder): shutil.disk_usage(folder).free for folder in {Path.cwd(), Path(tempfile.gettempdir())}}
    for folder, size in free.items():
        if size < LEAST_FREE_BYTES:
            problems.append(
                Problem(
                    problem=f"{folder}: {size / GIB:.1f} GiB are free",
                    remedy=f"free {LEAST_FREE_BYTES / GIB:.0f} GiB, or --project and TMPDIR elsewhere",
                )
            )
    machine = Machine(
        platform=platform.platform(),
        cpu=cpu,
        cpu_set=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_quota=_cpu_quota(),
        cpu_flags=flags,
        memory_bytes=_memory_bytes(),
        free_disk_bytes=free,
        gpus=gpus,
    )
    return machine, problems


def _cpu() -> tuple[str, tuple[str, ...]]:
    """The CPU's name, and which of the flags that matter here it has; from Linux, else the name alone."""
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    fallback = platform.processor() or platform.machine()
    return name[1] if name else fallback, tuple(flag for flag in _CPU_FLAGS if flag in has)


def _cpu_quota() -> float | None:
    """CPUs' worth of time of the strictest control group around this process (version 2, else 1)."""
    shares = []
    for group in _control_groups():
        quota, _, period = _read(group / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            shares.append(int(quota) / int(period))
    quota, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    if quota.isdigit() and period.isdigit():  # -1 means no limit
        shares.append(int(quota) / int(period))
    return min(shares, default=None)


def _memory_bytes() -> int | None:
    total = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    limits = [int(total[1]) * 1024] if total else []
    files = [group / "memory.max" for group in _control_groups()]
    for file in [*files, Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]:
        text = _read(file).strip()
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def _control_groups() -> list[Path]:
    """Folders of this process's version 2 control groups, from its own up to the root."""
    own = re.search(r"^0::/(.*)$", _read("/proc/self/cgroup"), re.MULTILINE)
    folder = Path("/sys/fs/cgroup") / (own[1] if own else "")
    return [group for group in (folder, *folder.parents) if group.is_relative_to("/sys/fs/cgroup")]


def _gpus() -> tuple[tuple[str, ...], list[Problem]]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return (), []
    query = "--query-gpu=name,driver_version,memory.total,compute_cap"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=False
        )
        failure = (answer.stderr or answer.stdout).strip() if answer.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), [_driver_problem(str(error))]
    if answer.returncode:
        return (), [_driver_problem(failure or f"exit code {answer.returncode}")]
    gpus = tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())
    return gpus, [problem for gpu in gpus for problem in _gpu_problems(gpu)]


def _gpu_problems(gpu: str) -> list[Problem]:
    """What of a GPU's line does not fit the kernels and TensorRT for CUDA 13. Words such as [N/A] say nothing."""
    fields = gpu.rsplit(", ", 3)
    if len(fields) != 4:
        return []
    name, driver, _, capability = fields
    problems = []
    if (0,) < _numbers(driver) < OLDEST_DRIVER:
        problems.append(
            Problem(
                problem=f"{name}: its driver {driver} is for a CUDA before 13, which kernels and TensorRT need",
                remedy=f"update the NVIDIA driver to {OLDEST_DRIVER[0]} or newer",
            )
        )
    if (0,) < _numbers(capability) < OLDEST_GPU:
        problems.append(
            Problem(
                problem=f"{name}: compute capability {capability}; engines and kernels want "
                f"{'.'.join(map(str, OLDEST_GPU))} (Turing) or newer",
                remedy="run the ONNX file on the CPU (--device cpu), or use another GPU",
            )
        )
    return problems


def _driver_problem(detail: str) -> Problem:
    return Problem(
        problem=f"nvidia-smi does not answer: {' '.join(detail.split())}",
        remedy="load or reinstall the NVIDIA driver (after an upgrade, restart the machine)",
    )


def _lines(installation: Installation, machine: Machine, problems: list[Problem]) -> list[str]:
    quota = "" if machine.cpu_quota is None else f", time for {machine.cpu_quota:g}"
    memory = "unknown" if machine.memory_bytes is None else f"{machine.memory_bytes / GIB:.1f} GiB"
    rows = [
        ("parkdet", f"{installation.parkdet} ({installation.source}: {installation.folder})"),
        ("python", f"{installation.python} ({installation.executable})"),
        ("platform", machine.platform),
        ("cpu", f"{machine.cpu}; {machine.cpu_set} usable{quota}"),
        ("instructions", " ".join(machine.cpu_flags) or "unknown"),
        ("memory", memory),
        *(("free disk", f"{size / GIB:.1f} GiB in {folder}") for folder, size in machine.free_disk_bytes.items()),
        *(("gpu", gpu) for gpu in machine.gpus or ("none that an NVIDIA driver reports",)),
    ]
    for extra, versions in installation.libraries.items():
        shown = ", ".join(f"{name} {version or '(absent)'}" for name, version in versions.items())
        rows.append((extra if extra == "base" else f"[{extra}]", shown))
    lines = [f"{name:<13} {value}" for name, value in rows]
    if not problems:
        return [*lines, "", "no problem found"]
    found = [f"problem: {item.problem}\n remedy: {item.remedy}" for item in problems]
    return [*lines, "", *found]


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _read(path: str | Path) -> str:
    """A file's text, or nothing where the system has no such file or does not show it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
