"""The size that the contest is run with: YOLOv5x6 from a file in the public layout, by the command line, in a laptop's
memory.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from parkdet.runtime import engine_sidecar
from parkdet.train.model.network import build_network
from tests.train.test_checkpoint import write_public

GRAPH_BYTES = 4_000_000_000
GATE_BYTES = 4_300_000_000
"""With what the gate opens beside the checkpoint, and the builder after it: 3.8 GB were measured."""

_GRAPH = """
import sys
from pathlib import Path
from parkdet.export.config import GraphOptions
from parkdet.export.graph import build_graph, serialized
from parkdet.train import load_checkpoint
options = GraphOptions(canvas_hw=(896, 1600), precision="fp16", tta=True)
content = serialized(build_graph(load_checkpoint(sys.argv[1]).model, options).model)
Path(sys.argv[2]).write_bytes(content)
"""
_COMMAND = """
import sys
from parkdet.cli.main import main
code = main(sys.argv[1:])
assert code == 0, code
"""
_PEAK = """
import resource
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak_bytes(script: str, *arguments: object) -> int:
    """Run a script in a process of its own; the most memory that it held."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", script + _PEAK, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def x6(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("x6") / "yolov5x6.pt"
    write_public(path, build_network("yolov5x6", ("a", "b"), imgsz=1536))
    return path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_the_graph_of_three_views_at_the_contests_canvas(x6: Path, tmp_path: Path) -> None:
    import onnx

    assert peak_bytes(_GRAPH, x6, tmp_path / "x6.onnx") < GRAPH_BYTES
    model = onnx.load(tmp_path / "x6.onnx")
    weights = sum(tensor.ByteSize() for tensor in model.graph.initializer)
    assert 275e6 < weights < 285e6  # 140 million in float16, once for all views
    shapes = [[dim.dim_value for dim in output.type.tensor_type.shape.dim][1:] for output in model.graph.output]
    sides = [(896 // s, 1600 // s) for s in (8, 16, 32)] + [(768 // s, 1344 // s) for s in (8, 16, 32, 64)]
    sides += [(640 // s, 1088 // s) for s in (16, 32, 64)]
    assert shapes == [[3, *side, 7] for side in sides]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra 'rtx')"
)
def test_from_a_public_file_to_engines(x6: Path) -> None:
    import tensorrt_rtx

    peak = peak_bytes(
        _COMMAND, "export", "--weights", x6, "--canvas", "128x192", "--engine", "tensorrt-rtx", "--arch", "75,86,120"
    )
    assert peak < GATE_BYTES
    graph = x6.with_name("yolov5x6.fp16.onnx")
    assert json.loads(x6.with_name(f"{graph.name}.parity.json").read_text())["passed"]
    for name, architecture in (("sm75", 75), ("sm86-120", 120)):
        sidecar = engine_sidecar.check(
            x6.with_name(f"yolov5x6.{name}.engine"), flavour="tensorrt-rtx", version=tensorrt_rtx.__version__,
            architecture=architecture, graph=graph,
        )  # fmt: skip
        assert 100e6 < sidecar.engine_bytes < 300e6
        assert [tensor.shape for tensor in sidecar.spec.inputs] == [(-1, 128, 192, 3)]
