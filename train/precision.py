"""The arithmetic of a training: which number format the forward pass uses, and what makes equal runs equal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Precision:
    """The number format of the forward pass, and the loss scaler that float16 needs."""

    def __init__(self, name: str, device: torch.device):
        if name in ("auto", "fast"):
            if device.type == "cuda":
                # From Ampere on; torch also counts older GPUs (a T4), which emulate it slowly.
                name = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
            else:
                # Without instructions for it, bf16 is slower than fp32.
                has_bf16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
                name = "bf16" if name == "fast" and has_bf16 else "fp32"
        self.name = name
        self.device = device
        self.dtype: torch.dtype | None = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype is torch.float16)

    def context(self) -> AbstractContextManager[Any]:
        """Within it, the network computes in this precision."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype is not None else nullcontext()


@contextmanager
def repeatable(device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """On a CPU, let equal runs give equal bits: scattered gradients are summed in one order, not by whichever thread.

    On a GPU only where `deterministic` asks for it: it costs time there. What CUDA has no such kernel for then
    runs all the same, and torch warns of it once.
    """
    if device.type != "cpu" and not deterministic:
        yield
        return
    if device.type == "cuda":
        # cuBLAS reads this when it is first used; without it, its sums depend on the stream's workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    memory: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling fresh memory finds reads of it, which is for debugging, and costs time.
    memory.fill_uninitialized_memory = False
    cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory, cudnn.benchmark = before[1:]
