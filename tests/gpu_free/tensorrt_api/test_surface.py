"""The recorded bindings are the real ones, and what they lack is refused."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_free.tensorrt_api.bindings import VERSIONS, BindingsUnavailableError, fetch
from tests.gpu_free.tensorrt_api.surface import FLAVOURS, Strict, Surface

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("major", VERSIONS)
def test_the_record_is_what_the_real_bindings_say(major: str, repository: Path) -> None:
    try:
        bindings = fetch(major, repository / "build" / "tensorrt_bindings")
    except BindingsUnavailableError as error:
        pytest.skip(str(error))
    told = json.loads(bindings.run(str(HERE / "record.py"), "tensorrt_bindings.tensorrt"))
    assert told == json.loads((HERE / f"tensorrt_{major}.json").read_text())


@pytest.mark.slow
def test_the_record_of_tensorrt_for_rtx_is_what_it_says() -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt_rtx is not installed")
    command = [sys.executable, "-W", "ignore", str(HERE / "record.py"), "tensorrt_rtx"]
    told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert told == json.loads((HERE / "tensorrt_rtx.json").read_text())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_double_has_what_the_bindings_have_and_no_more(flavour: str) -> None:
    surface = Surface(flavour)

    class IExecutionContext(Strict):
        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            return bool(name and shape)

        def set_binding_shape(self, index: int, shape: tuple[int, ...]) -> bool:  # of TensorRT 8
            return bool(index and shape)

    IExecutionContext.surface = surface
    context = IExecutionContext()
    assert context.set_input_shape("images", (1, 2))
    assert context.set_input_shape(name="images", shape=(1, 2))
    assert surface.log[0] == "IExecutionContext.set_input_shape('images', (1, 2))"
    for wrong in ((0, (1, 2)), ("images",), ("images", 3), ("images", (1, 2), 4)):
        with pytest.raises(TypeError, match="the bindings have"):
            context.set_input_shape(*wrong)
    with pytest.raises(AttributeError, match="no method 'set_binding_shape'"):
        context.set_binding_shape(0, (1,))
    with pytest.raises(AttributeError, match="no 'execute_async_v2'"):
        _ = context.execute_async_v2
    with pytest.raises(NotImplementedError, match="the double lacks it"):
        _ = context.execute_async_v3


def test_versions_differ_where_they_do() -> None:
    old, new, rtx = (Surface(flavour) for flavour in FLAVOURS)
    assert "FP16" in old.enumerations["BuilderFlag"].__members__
    assert "FP16" not in new.enumerations["BuilderFlag"].__members__
    assert "is_stream_capturable" in rtx.classes["IExecutionContext"]
    assert "is_stream_capturable" not in new.classes["IExecutionContext"]
    old.check_property("ICudaEngine", "device_memory_size")
    with pytest.raises(AttributeError, match="no property"):
        new.check_property("ICudaEngine", "device_memory_size")
