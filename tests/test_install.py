"""What users install: what a wheel holds, its first example, and consoles and systems that this one is not."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import draw_folder, figures_of

import equipoise
from equipoise.base.errors import quoted
from equipoise.cli.main import main

ROOT = Path(__file__).parents[1]
SMALL = ["--arch=resnet8", "--size=16", "--hidden-dim=16", "--feature-dim=8", "--batch-size=6", "--epochs=1"]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with a wheel and an sdist, made from what the repository holds."""
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(ROOT / "tests", root / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    # As pip and build call it, without fetching setuptools once more.
    code = "from setuptools import build_meta as it; it.build_wheel('dist'); it.build_sdist('dist')"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, check=True)
    return root / "dist"


def test_a_wheel_and_an_sdist_hold_the_package_and_no_tests(built):
    source = ROOT / "src" / "equipoise"
    files = {f"equipoise/{path.relative_to(source).as_posix()}" for path in source.rglob("*.*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert {"equipoise/py.typed", "equipoise/config/recipes/frozen.toml", "equipoise/report/page.html.jinja"} <= files
    about = f"equipoise-{equipoise.__version__}"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {*wheel.namelist()}
        metadata = wheel.read(f"{about}.dist-info/METADATA").decode()
    assert {name for name in names if not name.startswith(f"{about}.dist-info/")} == files
    assert f"{about}.dist-info/licenses/LICENSE" in names
    assert f"\nVersion: {equipoise.__version__}\n" in metadata
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.removeprefix(f"{about}/") for name in sdist.getnames()}
    assert {f"src/{name}" for name in files} | {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith("tests")]


def test_the_version_is_in_one_place():
    """And the changelog's newest section is of it."""
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in ("CITATION.cff", "README.md", "Dockerfile"):
        assert equipoise.__version__ not in (ROOT / name).read_text(encoding="utf-8"), name
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[:2] == ["Unreleased", equipoise.__version__]


def test_the_readme_names_every_extra_and_its_packages():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    table = re.findall(
        r"^\| extra .+?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:-1]]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert told == extras.keys() - {"docs", "test", "check", "fuzz", "audit"}
    packages = [name for row in rows for name in row[2].split(", ")]
    assert sorted(packages) == sorted(re.split(r"[>=]", line)[0] for extra in told for line in extras[extra])


FIRST = """\
import torch
from torch.nn.functional import normalize

features_BVD, prototypes_CD = normalize(torch.randn(8, 2, 16), dim=-1), normalize(torch.randn(3, 16), dim=-1)
labels_B, logits_BC, class_counts = torch.arange(8) % 3, torch.randn(8, 3), (10, 5, 2)
"""


@pytest.mark.slow
def test_the_first_example_runs_from_the_wheel(built, tmp_path):
    """In another folder, with the wheel in place of the repository."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"## From Python\n+```python\n(.+?)\nnetwork = ", text, re.DOTALL)[0]
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path / "installed")
    ends = "    print(loss.isfinite(), run.path, equipoise.__file__)\n"
    (tmp_path / "first.py").write_text(FIRST + code.replace("epochs=20", "epochs=1") + ends, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "first.py"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "True) runs/digits-lt-bcl-" in done.stdout
    assert str(tmp_path / "installed" / "equipoise") in done.stdout


# ---- other systems


@pytest.fixture(scope="module")
def named_pictures(tmp_path_factory) -> Path:
    """Classes whose names the old code pages of Western Europe have in part."""
    root = tmp_path_factory.mktemp("named")
    for part, counts in {"train": (12, 6, 4), "val": (6, 3, 3), "test": (4, 4, 4)}.items():
        draw_folder(root / part, dict(zip(("ant", "žába 蜂", "Käfer"), counts, strict=True)))
    return root


@pytest.mark.long
def test_commands_on_a_console_of_code_page_1252(named_pictures, tmp_path, monkeypatch):
    """It has an ä, and neither lines and blocks nor 蜂: what it lacks becomes other characters. Files are UTF-8."""
    monkeypatch.chdir(tmp_path)
    pictures = str(named_pictures)

    def said(*words: str, code: int = 0) -> bytes:
        """What a command writes to standard output and to standard error."""
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            assert main(words) == code, words
        for stream in streams:
            stream.flush()
        return b"".join(stream.detach().getvalue() for stream in streams)

    assert b"BCL" in said("recipes", "--methods")
    assert b"complete" in said("completion", "bash")
    looked = said("data", pictures, "--check", "--report", "data.html", code=1).decode("cp1252")
    assert "Käfer" in looked
    assert "ba \\u8702" in looked
    assert "\\u25" not in looked, "blocks"
    assert "Käfer" in said("train", "pictures", "--data", pictures, "--out", "run", *SMALL).decode("cp1252")
    said("evaluate", "run", "--label-shift")
    said("retune", "run", "--with", "ncm", "--out", "retuned")
    said("report", "run", "retuned", "--out", "report.html")
    said("pack", pictures, "--out", "packed")
    said("export", "run", "--to", "safetensors")
    said("compare", "pictures", "--data", pictures, "--methods=bcl,ce", "--seeds=1", "--out=compared", *SMALL)
    assert "žába 蜂" in said("predict", "run", f"{pictures}/test", "--csv", "-").decode(), "for programs: UTF-8"
    assert "ba \\u8702" in said("predict", "run", f"{pictures}/test").decode("cp1252")
    assert b"no recipe is called" in said("train", "蜂", code=2)
    for page in ("report.html", "data.html"):
        assert "žába 蜂" in Path(page).read_text(encoding="utf-8")


# What Windows lacks of what this package and its libraries might ask for. Python imports it first, also in the
# processes that it starts. A file that is opened as text without an encoding, which would be cp1252, is an error.
WITHOUT = """\
import os, signal, sys, warnings
for name in ("fcntl", "pwd", "grp", "resource", "termios"):
    sys.modules[name] = None
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "alarm"):
    delattr(signal, name)
for name in ("fork", "forkpty", "sched_getaffinity", "getuid", "geteuid", "mkfifo"):
    delattr(os, name)
warnings.filterwarnings("ignore", category=EncodingWarning)  # of torch and cv2, for files in ASCII
warnings.filterwarnings("error", category=EncodingWarning, module="equipoise")
warnings.filterwarnings("ignore", "only soft file lock")  # filelock, which has Windows' own there
"""
# A command with loader processes, as on an NVIDIA GPU, which start as they do on Windows and macOS.
COMMAND = """\
import multiprocessing, sys
import equipoise.views.loader
from equipoise.cli.main import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    equipoise.views.loader.needs_processes = lambda device: True
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.long
def test_training_and_use_without_what_windows_lacks(named_pictures, tmp_path, monkeypatch):
    """With spawned loader processes, the figures are those that threads give."""
    monkeypatch.chdir(tmp_path)
    train = ["train", "pictures", "--data", str(named_pictures), *SMALL, "--device=cpu", "--workers=1"]
    assert main([*train, "--out=run"]) == 0
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(WITHOUT)
    Path("command.py").write_text(COMMAND)
    path = os.pathsep.join(["site", os.environ.get("PYTHONPATH", "")])

    def command(*words: str) -> str:
        started = [sys.executable, "-X", "warn_default_encoding", "command.py", *words]
        done = subprocess.run(started, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), words
        return done.stdout

    assert "overall" in command(*train, "--out=elsewhere")
    assert figures_of(Path("elsewhere")) == figures_of(Path("run"))
    assert json.loads(Path("elsewhere/run.json").read_text(encoding="utf-8"))["machine"]["device"] == "cpu"
    assert "žába 蜂" in command("predict", "elsewhere", str(named_pictures / "test"))
    assert "speed" in command("doctor")


def test_words_of_a_command_are_quoted_as_the_systems_shell_takes_them(monkeypatch):
    assert (quoted("runs/a"), quoted("my runs/a"), quoted("a'b")) == ("runs/a", "'my runs/a'", "'a'\"'\"'b'")
    monkeypatch.setattr(sys, "platform", "win32")
    assert (quoted(r"runs\a"), quoted(r"my runs\a")) == (r"runs\a", r'"my runs\a"')
