"""Backends: the same numbers from each, and clear words about what cannot be opened."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parkdet.runtime.backends import open_backend
from parkdet.runtime.backends.base import available_cpus
from parkdet.runtime.backends.onnx_file import read_onnx_metadata
from parkdet.runtime.backends.onnxruntime import check_provider
from parkdet.runtime.backends.openvino import MAX_COMPILED, OpenVinoBackend
from parkdet.runtime.errors import ArtifactError, UsageError
from parkdet.runtime.model_spec import SPEC_KEY

Model = Any
ON_THE_CPU = ("openvino", "onnxruntime")


def _canvases(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("file", "device", "remedy"),
    [
        ("m.engine", None, "'parkdet[gpu]', or 'parkdet[rtx]' for engines of TensorRT for RTX alone"),
        ("m.onnx", None, "'parkdet[cpu]'"),
        ("m.onnx", "cuda", "'parkdet[gpu]'"),
    ],
)
def test_what_is_not_installed_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, device: str | None, remedy: str
) -> None:
    (tmp_path / file).touch()
    monkeypatch.setattr("parkdet.runtime.backends.base.find_spec", lambda _: None)
    with pytest.raises(UsageError) as error:
        open_backend(tmp_path / file, device=device)
    assert str(error.value).endswith(f" is not installed: pip install {remedy}")


@pytest.mark.parametrize("name", ON_THE_CPU)
@pytest.mark.parametrize("goal", ["throughput", "latency"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 96, 64), (2, 64, 112)])
def test_heads_equal_plain_numpy(tiny_model: Model, tiny_onnx: Path, name: str, goal: Any, shape: Any) -> None:
    canvases = _canvases(shape)
    with open_backend(tiny_onnx, name, goal=goal, precision="fp32") as backend:
        heads = backend.infer(canvases)
        assert (backend.name, backend.spec, backend.fixed_input) == (name, tiny_model.spec, (None, None, None))
    # float32 sums of 768 products; in bf16 they are off by 0.05.
    for head, expected in zip(heads, tiny_model.heads(canvases), strict=True):
        assert head.dtype == np.float32
        assert head.shape == expected.shape
        np.testing.assert_allclose(head, expected, atol=1e-4)


def test_an_image_gets_the_same_bits_in_any_batch_with_any_threads(tiny_onnx: Path) -> None:
    canvases = _canvases((5, 96, 64))
    with open_backend(tiny_onnx, threads=1) as backend:
        single = [backend.infer(canvases[i : i + 1]) for i in range(5)]
    with open_backend(tiny_onnx, threads=2) as backend:
        together = backend.infer(canvases)
    for level in range(2):
        np.testing.assert_array_equal(np.concatenate([heads[level] for heads in single]), together[level])


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_threads_may_call_at_once_and_results_stay_apart(tiny_model: Model, tiny_onnx: Path, name: str) -> None:
    batches = [_canvases((1, 32 + 16 * (i % 3), 64), seed=i) for i in range(24)]
    with open_backend(tiny_onnx, name, precision="fp32") as backend, ThreadPoolExecutor(6) as pool:
        results = list(pool.map(backend.infer, batches))
    for heads, canvases in zip(results, batches, strict=True):
        np.testing.assert_allclose(heads[1], tiny_model.heads(canvases)[1], atol=1e-4)


def test_compiled_models_are_bounded(tiny_onnx: Path) -> None:
    with open_backend(tiny_onnx, "openvino") as backend:
        assert isinstance(backend, OpenVinoBackend)
        for height in range(16, 16 * (MAX_COMPILED + 4), 16):
            backend.infer(_canvases((1, height, 32)))
        assert len(backend._compiled) == MAX_COMPILED


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_a_graph_of_fixed_size_runs_in_portions_and_refuses_other_canvases(
    tiny_model: Model, tmp_path: Path, name: str
) -> None:
    path = tiny_model.save(tmp_path / "fixed.onnx", fixed=(2, 64, 96))
    canvases = _canvases((5, 64, 96))
    with open_backend(path, name, precision="fp32") as backend:
        assert backend.fixed_input == (2, 64, 96)
        for head, expected in zip(backend.infer(canvases), tiny_model.heads(canvases), strict=True):
            np.testing.assert_allclose(head, expected, atol=1e-4)
        with pytest.raises(ValueError, match="exported for canvases"):
            backend.infer(_canvases((1, 96, 64)))


def test_canvases_that_do_not_fit_are_refused(tiny_onnx: Path) -> None:
    backend = open_backend(tiny_onnx, "onnxruntime")
    for wrong in (_canvases((0, 32, 32)), _canvases((1, 30, 32)), _canvases((1, 32, 32)).astype(np.float32)):
        with pytest.raises(ValueError, match="canvas"):
            backend.infer(wrong)  # type: ignore[arg-type]
    backend.close()
    with pytest.raises(ValueError, match="closed"):
        backend.infer(_canvases((1, 32, 32)))


def test_an_openvino_folder_opens_with_its_spec(tiny_model: Model, tiny_onnx: Path, tmp_path: Path) -> None:
    import openvino as ov

    folder = tmp_path / "tiny_openvino"
    ov.save_model(ov.Core().read_model(tiny_onnx), folder / "tiny.xml", compress_to_fp16=False)
    canvases = _canvases((1, 48, 64))
    for path in (folder, folder / "tiny.xml"):
        with open_backend(path, precision="fp32") as backend:
            assert backend.spec == tiny_model.spec
            np.testing.assert_allclose(backend.infer(canvases)[0], tiny_model.heads(canvases)[0], atol=1e-4)
    with pytest.raises(UsageError, match=r"'onnxruntime' does not read '\.xml'"):
        open_backend(folder, "onnxruntime")
    (folder / "tiny.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"tiny\.bin: has zero bytes"):
        open_backend(folder)
    (folder / "tiny.bin").unlink()
    with pytest.raises(ArtifactError, match=r"tiny\.bin: is missing"):
        open_backend(folder)


def test_what_the_caller_names_wrongly_is_a_usage_error(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.onnx: there is no such file"):
        open_backend(tmp_path / "none.onnx")
    (tmp_path / "best.pt").touch()
    with pytest.raises(UsageError, match="parkdet export --weights"):
        open_backend(tmp_path / "best.pt")
    (tmp_path / "best.h5").touch()
    with pytest.raises(UsageError, match=r"'\.h5'.*\.onnx \(openvino, onnxruntime.*\), \.xml"):
        open_backend(tmp_path / "best.h5")
    with pytest.raises(UsageError, match="'tensorflow' is not one of openvino, onnxruntime"):
        open_backend(tiny_onnx, "tensorflow")
    with pytest.raises(UsageError, match="device 'tpu'"):
        open_backend(tiny_onnx, device="tpu")
    with pytest.raises(UsageError, match=r"openvino does not run on device 'cuda:0'; onnxruntime.* does"):
        open_backend(tiny_onnx, "openvino", device="cuda")
    with pytest.raises(UsageError, match=r"onnxruntime-tensorrt does not run on device 'cpu'"):
        open_backend(tiny_onnx, "onnxruntime-tensorrt", device="cpu")
    with pytest.raises(UsageError, match="fp64"):
        open_backend(tiny_onnx, precision="fp64")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="computes a graph as it is stored"):
        open_backend(tiny_onnx, "onnxruntime", precision="bf16")
    with pytest.raises(UsageError, match="threads"):
        open_backend(tiny_onnx, threads=0)


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_a_damaged_file_is_an_artifact_error_without_noise(
    tiny_onnx: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = tiny_onnx.read_bytes()
    flipped = bytearray(whole)
    flipped[0] = 0xFF
    contents = {
        "empty": (b"", "zero bytes"),
        "text": (b"hello, this is not a graph\n" * 40, "not an ONNX model"),
        "flipped": (bytes(flipped), "not an ONNX model"),
    }
    for size in (1, 2, 100, len(whole) // 2, len(whole) - 1):
        contents[f"cut{size}"] = (whole[:size], "cut off|not an ONNX")
    for stem, (content, reason) in contents.items():
        path = tmp_path / f"{stem}.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=reason) as caught:
            open_backend(path, name)
        assert str(caught.value).startswith(str(path))
        assert "parkdet export" in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_a_graph_that_breaks_the_contract_is_refused(tiny_model: Model, tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"does not describe itself.*parkdet export"):
        open_backend(tiny_model.save(tmp_path / "bare.onnx", spec=False), name)
    with pytest.raises(ArtifactError, match=r"float32.*without --input"):
        open_backend(tiny_model.save(tmp_path / "float.onnx", float_input=True), name)
    import onnx

    other = onnx.load(tiny_model.save(tmp_path / "levels.onnx"))
    del other.graph.output[1]
    onnx.save(other, tmp_path / "levels.onnx")
    with pytest.raises(ArtifactError, match="2 levels, 2 raw heads"):
        open_backend(tmp_path / "levels.onnx", name)


def test_metadata_equals_what_the_onnx_library_reads(tiny_onnx: Path) -> None:
    import onnx

    expected = {entry.key: entry.value for entry in onnx.load(tiny_onnx).metadata_props}
    assert read_onnx_metadata(tiny_onnx) == expected
    assert SPEC_KEY in expected


def test_a_session_on_another_provider_is_refused(tiny_onnx: Path) -> None:
    check_provider(tiny_onnx, ["CPUExecutionProvider"], "CPUExecutionProvider")
    with pytest.raises(ArtifactError, match="CPUExecutionProvider instead of CUDAExecutionProvider"):
        check_provider(tiny_onnx, ["CPUExecutionProvider"], "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("name", "device", "provider"),
    [("onnxruntime", "1", "CUDAExecutionProvider"), ("onnxruntime-tensorrt", None, "TensorrtExecutionProvider")],
)
def test_a_provider_that_falls_back_to_the_cpu_is_refused(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, name: str, device: str | None, provider: str
) -> None:
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        with pytest.raises(UsageError, match=f"has no {provider}"):
            open_backend(tiny_onnx, name, device)
    # A package that lists the provider, on a machine without a GPU: the library opens the session on the CPU.
    real, asked = onnxruntime.InferenceSession, []

    def open_on_the_cpu(path: str, options: Any, providers: list[tuple[str, dict[str, str]]]) -> Any:
        asked.extend(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_on_the_cpu)
    with pytest.raises(ArtifactError, match=f"CPUExecutionProvider instead of {provider}"):
        open_backend(tiny_onnx, name, device)
    assert asked[0] == (provider, {"device_id": device or "0"})


def test_bf16_is_refused_where_the_processor_lacks_it_and_its_heads_are_float32(
    tiny_model: Model, tiny_onnx: Path
) -> None:
    canvases = _canvases((1, 96, 64))
    with open_backend(tiny_onnx) as default:
        has_bf16 = default.precision == "bf16"
    if not has_bf16:
        with pytest.raises(UsageError, match="avx512_bf16"):
            open_backend(tiny_onnx, "openvino", precision="bf16")
        pytest.skip("this processor does not compute in bf16")
    with open_backend(tiny_onnx, precision="bf16") as backend:
        heads = backend.infer(canvases)
    for head, expected in zip(heads, tiny_model.heads(canvases), strict=True):
        np.testing.assert_allclose(head, expected, atol=0.2)  # products of 8 bits, summed over up to 768
        # Rounded to bf16, the lower half of every number would be zeros.
        assert np.mean(head.view(np.uint32) & 0xFFFF != 0) > 0.99


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="CPU sets are Linux's")
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_threads_keep_to_the_cpu_set_of_the_process(tiny_onnx: Path, name: str) -> None:
    program = (
        "import os, sys\n"
        "cpu = min(os.sched_getaffinity(0)); os.sched_setaffinity(0, {cpu})\n"
        "import numpy as np\n"
        "from parkdet.runtime.backends import open_backend\n"
        "from parkdet.runtime.backends.base import available_cpus\n"
        "assert available_cpus() == 1\n"
        "with open_backend(sys.argv[1], sys.argv[2]) as backend:\n"
        "    backend.infer(np.zeros((1, 32, 32, 3), np.uint8))\n"
        "    assert backend.parallel == 1\n"
        "    for task in os.listdir('/proc/self/task'):\n"
        "        assert os.sched_getaffinity(int(task)) == {cpu}, task\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_onnx), name], check=True)
    assert available_cpus() == len(os.sched_getaffinity(0))


def test_a_backend_that_ends_in_another_thread_leaves_signals_working(tiny_onnx: Path) -> None:
    """OpenVINO's plugin took the first thread's signal stack away with it, and the end of a child was the end."""
    program = (
        "import gc, signal, subprocess, sys, threading\n"
        "import numpy as np\n"
        "from parkdet.runtime.backends import open_backend\n"
        "signal.signal(signal.SIGCHLD, lambda *_: None)\n"
        "held = [open_backend(sys.argv[1], 'openvino')]\n"
        "held[0].infer(np.zeros((1, 32, 32, 3), np.uint8))\n"
        "def end():\n"
        "    held.pop().close()\n"
        "    gc.collect()\n"
        "thread = threading.Thread(target=end)\n"
        "thread.start()\n"
        "thread.join()\n"
        "subprocess.run([sys.executable, '-c', ''], check=True)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_onnx)], check=True)


def test_no_backend_is_imported_before_it_is_used(tiny_onnx: Path) -> None:
    program = (
        "import sys\n"
        "import parkdet.runtime.backends, parkdet.runtime.detector, parkdet.runtime.pipeline\n"
        "assert not {'openvino', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)\n"
        "parkdet.runtime.backends.open_backend(sys.argv[1], 'onnxruntime')\n"
        "assert not {'openvino', 'torch', 'onnx'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tiny_onnx)], check=True)
