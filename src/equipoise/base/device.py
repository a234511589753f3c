"""Names become a device and a precision; the machine becomes a description."""

import ctypes
import os
import platform
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from equipoise.base.errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """'auto' takes cuda, mps, cpu. 'cuda' without a number is each process's own, and becomes the current one, to which
    pinned memory, streams and events belong. Raises UserError for a device that does not exist, here or at all."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise UserError(f"a device is one of auto, cpu, cuda, cuda:N, mps; not '{name}'")
    kind, _, number = name.partition(":")
    if not available[kind]:
        raise UserError(f"this machine has no {kind} device that torch {torch.__version__} can use; try --device auto")
    if kind != "cuda":
        return torch.device(kind)
    index, count = int(number or local_rank), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"this machine has {count} CUDA devices, numbered from 0, and so no cuda:{index}")
    torch.cuda.set_device(index)
    return torch.device(f"cuda:{index}" if number or local_rank else "cuda")


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, where the C library is glibc. By default every large tensor takes new
    pages from the system, and touching them takes a third of a training step (docs/performance.md)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library, Windows
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large piece
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def start_reading(*tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to copy tensors to the host. The function returned waits for these copies alone and gives them, so that a
    GPU goes on with what is queued."""
    if tensors[0].device.type != "cuda":
        return lambda: tuple(tensor.cpu() for tensor in tensors)
    on_host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(on_host, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tensors[0].device))

    def read() -> tuple[Tensor, ...]:
        arrived.synchronize()
        return on_host

    return read


@contextmanager
def exact_float32() -> Generator[None]:
    """In this context a GPU's convolutions compute in float32, and not in TF32, which torch allows them elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 and later tell once of a newer name, which earlier ones have not
        before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def deterministic(wanted: bool) -> Generator[None]:
    """In this context, if `wanted`, a GPU computes the same bits every time."""
    before = torch.get_deterministic_debug_mode()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def choose_precision(name: str, device: torch.device) -> str:
    """'auto' takes bf16 where the device has instructions for it; elsewhere it is emulated, and slower than fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    flags = _cpu_field("flags").split() if device.type == "cpu" else []
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """The machine as it is quoted beside measurements."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _cpu_field("model name") or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def _cpu_field(name: str) -> str:
    """A field of the first processor, as Linux describes it; '' elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
