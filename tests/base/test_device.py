"""Words to devices and precisions."""

import pytest
import torch

from equipoise import UserError
from equipoise.base import device
from equipoise.base.device import autocast, choose_device, choose_precision, describe_machine

CPU = torch.device("cpu")


def test_devices():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:0", "cuda:x", "cuda:", "mps:1", "meta", "CPU"])
def test_what_is_no_device(name):
    with pytest.raises(UserError) as refused:
        choose_device(name)
    assert str(refused.value) == f"a device is one of auto, cpu, cuda, cuda:N, mps; not '{name}'"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match=r"this machine has no cuda device .*; try --device auto"):
        choose_device("cuda")


@pytest.mark.parametrize(("flags", "precision"), [("fpu avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_precision_follows_the_processor(flags, precision, monkeypatch):
    monkeypatch.setattr(device, "_cpu_field", lambda name: flags)
    assert choose_precision("auto", CPU) == precision
    assert choose_precision("fp32", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_autocast():
    a = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert (a @ a).dtype == torch.float32


def test_machine():
    assert describe_machine(CPU)["threads"] == torch.get_num_threads()
