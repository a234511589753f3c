"""Starts several processes with torchrun, and compares what they made."""

import os
import subprocess
import sys

import torch

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, "--standalone", f"--nproc-per-node={processes}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=ENVIRONMENT)


def messages(stderr: str) -> list[str]:
    return [line.removeprefix("equipoise: ") for line in stderr.splitlines() if line.startswith("equipoise: ")]


def largest_relative_error(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    # Relative to the tensor's own largest entry, or to the largest of all where a tensor is as good as zero.
    return max(
        float((ours[name] - value).abs().max() / max(float(value.abs().max()), 1e-3 * scale))
        for name, value in expected.items()
    )
