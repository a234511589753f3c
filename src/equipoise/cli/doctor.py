"""`equipoise doctor`: what a bug report needs, a line each."""

import argparse
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from itertools import chain
from pathlib import Path

from equipoise import __version__
from equipoise.base.errors import UserError, one_line

_ENCODER = "tf_efficientnet_lite0"  # of the recipes for own pictures


def doctor(_: argparse.Namespace) -> int:
    """1 where something is broken, which is the last line then."""
    try:
        for name, said in chain(_machine(), _training()):
            print(one_line(f"{name:<10}{said}"), flush=True)
    except Exception as error:  # whatever is broken
        print(one_line(f"FAILED    {type(error).__name__}: {error}"))
        return 1
    return 0


def _machine() -> Iterator[tuple[str, str]]:
    """What is there, imported piece by piece, since it may be broken."""
    needed = [
        line for line in metadata.requires("equipoise") or () if not re.search("test|check|docs|fuzz|audit", line)
    ]
    names = {re.split(r"[^\w-]", line)[0].replace("_", "-").lower() for line in needed}
    found = {of.name.replace("_", "-").lower(): of.version for of in metadata.distributions()}
    yield "packages", ", ".join(f"{name} {found[name]}" for name in sorted(names & found.keys()))
    places = {"here": ".", "~": Path.home(), "temporary files": tempfile.gettempdir(), "/dev/shm": "/dev/shm"}
    free = [f"{shutil.disk_usage(at).free / 2**30:.1f} GiB {name}" for name, at in places.items() if os.path.exists(at)]
    yield "disk", f"free: {', '.join(free)}"
    yield "memory", _lines("/proc/meminfo") + _lines("/sys/fs/cgroup/memory.max", "; memory.max: ")  # of a container

    from equipoise.runs.folder import commit

    yield "equipoise", f"{__version__}{commit()}, Python {platform.python_version()}"

    import torch
    from PIL import features

    from equipoise.base.device import choose_device, choose_precision, describe_machine
    from equipoise.data.decode import usable_cores

    yield "codecs", ", ".join(features.get_supported())  # of Pillow; OpenCV, which reads JPEG, has its own
    device = choose_device("auto")
    about, gpus = describe_machine(device), map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    named = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus]
    of_torch = f"CUDA in torch: {torch.version.cuda or torch.version.hip}"
    cores = f"{about['threads']} of torch, {usable_cores()} of {os.cpu_count()} cores usable"
    yield "machine", f"{about['system']}, {about['processor']}"
    yield "devices", ", ".join([*named, of_torch, f"training takes {device} and {choose_precision('auto', device)}"])
    yield "threads", cores + _lines("/sys/fs/cgroup/cpu.max", "; cpu.max: ")


def _lines(file: str, title: str = "") -> str:
    """The first lines of a file of Linux; '' elsewhere."""
    found = Path(file).read_text(encoding="utf-8").splitlines()[:3] if os.path.exists(file) else []
    return title * bool(found) + ", ".join(" ".join(line.split()) for line in found)


def _training() -> Iterator[tuple[str, str]]:
    """The hub, the weights, and what training takes, as `training/sizing.py` measures it, on digits made as large."""
    from equipoise.base.device import choose_device
    from equipoise.config.reading import load_recipe
    from equipoise.method.pretrained import find_pretrained
    from equipoise.training.plan import prepare
    from equipoise.training.sizing import duration, measure

    try:
        found = find_pretrained(_ENCODER)
    except UserError:
        yield "hub", "not reached"
        raise
    yield "hub", "not reached" if found.file else "reached"
    yield "weights", f"{_ENCODER}: {found.said}"
    batch = 8 if choose_device("auto").type == "cpu" else 32  # smaller: soon done
    plan = prepare(load_recipe("finetune", data="digits", batch_size=batch))
    cost = measure(plan, 1, 1.0)  # a second for each of two, beside what they need to get going
    first, epoch = duration(1000 * cost.image), duration(1000 / len(plan.parts.train) * cost.epoch)
    yield "speed", f"1,000 images at 224 pixels: features for --tune frozen {first}, an epoch of --tune full {epoch}"
