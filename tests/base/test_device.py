"""Words to devices and precisions."""

import pytest
import torch

from equipoise import UserError
from equipoise.base import device
from equipoise.base.device import choose_device, choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:0", "cuda:x", "cuda:", "mps:1"])
def test_what_is_no_device(name):
    with pytest.raises(UserError, match=f"a device is one of .*; not '{name}'"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match=r"this machine has no cuda device .*; try --device auto"):
        choose_device("cuda")


@pytest.mark.parametrize(("flags", "precision"), [("fpu avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_precision_follows_the_processor(flags, precision, monkeypatch):
    monkeypatch.setattr(device, "_cpu_field", lambda name: flags)
    assert choose_precision("auto", CPU) == precision
    assert [choose_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
