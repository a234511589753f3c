"""Trackers: TensorBoard's and wandb's own files, and a real MLflow server, where there is one."""

import json
import os
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from equipoise import UserError, load_recipe, train
from equipoise.runs.folder import RunLog
from equipoise.training.plan import prepare

# One that has the whole of MLflow: its client alone, which the tests install, cannot serve.
WHOLE = find_spec("sqlalchemy") and find_spec("alembic") and find_spec("mlflow.server")
SERVER = os.environ.get("MLFLOW_PYTHON") or (sys.executable if WHOLE else "")
SMALL = {"epochs": 1, "method": "ce", "arch": "resnet8", "precision": "fp32", "log_every": 2, "workers": 0}


def trained(track, folder, epochs=1):
    """A run of digits, and one that goes on with it; what it has logged of training."""
    if folder.exists():
        run = train(load_recipe(folder, epochs=epochs), resume=folder, progress=False)
    else:
        run = train(load_recipe("digits-lt", **SMALL | {"track": track, "epochs": epochs}), folder, progress=False)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    return run, [(line["step"], line["loss"]) for line in lines]


def test_tensorboard_has_one_point_a_step_where_a_run_goes_on(tmp_path):
    """A killed run has points of steps that no checkpoint knows: they are done again."""
    trained("tensorboard", tmp_path / "run")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run" / "tensorboard")) as killed:
        for step in (7, 8):
            killed.add_scalar("train/loss", 99.0, step)
    run, logged = trained("tensorboard", tmp_path / "run", epochs=2)
    curves = EventAccumulator(str(run.path / "tensorboard"))
    curves.Reload()
    points = curves.Scalars("train/loss")
    assert [point.step for point in points] == [step for step, _ in logged] == [2, 4, 6, 8, 10, 12]
    assert [point.value for point in points] == pytest.approx([loss for _, loss in logged])
    assert curves.Scalars("final/top1")[-1].value == pytest.approx(run.metrics["test"]["top1"])
    settings = str(curves.Tensors("settings/text_summary"))
    assert "method = ce" in settings
    assert "data.path" not in settings, "paths are private"
    assert "data.train_list" not in settings
    assert "model.weights" not in settings


def whole_records(file):
    """The same, once it is whole: a process of wandb's writes it, still after the run."""
    while not (found := list(records(file)))[-1:] or not found[-1].HasField("exit"):
        time.sleep(0.1)
    return found


def records(file):
    """What is in a file of wandb: protocol buffers in blocks of LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, whole = file.read_bytes(), 7, b""
    while at < len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7].ljust(7, b"\xff"))
        if at + 7 + length > len(content):
            return
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    trained("wandb", tmp_path / "run")
    run, logged = trained("wandb", tmp_path / "run", epochs=2)
    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    found = [record for file in files for record in whole_records(file)]
    assert {record.run.run_id for record in found if record.HasField("run")} == {(run.path / "wandb.id").read_text()}
    config = {item.key: item.value_json for record in found for item in record.config.update}
    assert (config["method"], config["epochs"], config["classes"]) == ('"ce"', "2", "10")
    rows = [
        {"/".join(item.nested_key) or item.key: float(item.value_json) for item in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [(row["_step"], row["train/loss"]) for row in rows] == logged
    assert rows[-1]["final/top1"] == run.metrics["test"]["top1"]


def test_a_server_that_is_not_there_stops_nothing(tmp_path, monkeypatch, capsys):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        run, _ = trained("mlflow", tmp_path / "run")
    assert capsys.readouterr().err == "equipoise: mlflow has failed (no answer); the run goes on without it\n"
    assert run.metrics["last"]["epoch"] == 1


@pytest.mark.parametrize("failing", ["log_params", "log_metrics", "end_run"])
def test_what_fails_midway_is_ended_once(failing, tmp_path, monkeypatch, capsys):
    """Else the next run of the process would lie within it."""
    import mlflow

    active, ended, failed = [], [], []

    @contextmanager
    def started():
        try:
            yield SimpleNamespace(info=SimpleNamespace(run_id="1"))
        finally:
            active.pop()

    def start(*_, **__):
        active.append("run")
        return started()

    def end(status):
        ended.append((active.pop(), status))
        act("end_run")

    def act(name, *_):
        if name == failing:
            failed.append(name)
            raise ConnectionError("gone")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setattr(mlflow, "set_experiment", lambda _: None)
    monkeypatch.setattr(mlflow, "start_run", start)
    monkeypatch.setattr(mlflow, "end_run", end)
    for name in ("log_params", "log_metrics"):
        monkeypatch.setattr(mlflow, name, partial(act, name))
    run, _ = trained("mlflow", tmp_path / "run")
    assert capsys.readouterr().err == "equipoise: mlflow has failed (gone); the run goes on without it\n"
    statuses = {"log_params": [], "log_metrics": ["KILLED"], "end_run": ["FINISHED"]}
    assert (active, failed, [status for _, status in ended]) == ([], [failing], statuses[failing])
    assert (run.path / "mlflow.id").exists() == (failing != "log_params")


def test_a_client_of_mlflow_without_a_server_is_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setitem(sys.modules, "alembic", None)
    with pytest.raises(UserError, match=r"^mlflow-skinny keeps no runs itself: set MLFLOW_TRACKING_URI"):
        prepare(load_recipe("digits-lt", track="mlflow"), tmp_path / "run")


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        prepare(load_recipe("digits-lt", track="wandb"), tmp_path / "run")


def test_without_a_tracker_none_is_imported(tmp_path):
    code = (
        "import sys, equipoise\n"
        f"equipoise.train(equipoise.load_recipe('digits-lt', **{SMALL}), {str(tmp_path / 'run')!r}, progress=False)\n"
        "print(sorted({'wandb', 'mlflow', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- with a server


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real MLflow server of this test's own, its process, and how to ask it."""
    if not SERVER:
        pytest.skip("MLflow's server is not here: MLFLOW_PYTHON names a Python that has it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    words = f"-m mlflow server --host 127.0.0.1 --port {port} --workers 1 --backend-store-uri".split()
    off = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **off}
    process = subprocess.Popen(
        [SERVER, *words, f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path / "artifacts")],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path,
    )  # fmt: skip

    def ask(what, **body):
        request = urllib.request.Request(f"{address}/api/2.0/mlflow/{what}", json.dumps(body).encode() or None)
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.loads(answer.read())

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=100).close()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.5)
        yield process, address, ask
    finally:
        stop(process)


def stop(process):
    import signal

    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_a_run_on_a_server_of_mlflow_goes_on_and_outlives_it(server, tmp_path, monkeypatch, capsys):
    process, address, ask = server
    first, _ = trained("mlflow", tmp_path / "run")
    run, logged = trained("mlflow", tmp_path / "run", epochs=2)
    assert first.path == run.path
    with urllib.request.urlopen(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=equipoise") as got:
        experiment = json.loads(got.read())["experiment"]["experiment_id"]
    (found,) = ask("runs/search", experiment_ids=[experiment])["runs"]
    assert found["info"]["run_id"] == (run.path / "mlflow.id").read_text()
    assert (found["info"]["run_name"], found["info"]["status"]) == ("run", "FINISHED")
    settings = {item["key"]: item["value"] for item in found["data"]["params"]}
    assert (settings["method"], settings["optim.lr"], settings["train_images"]) == ("ce", "0.05", "342")
    latest = {item["key"]: item["value"] for item in found["data"]["metrics"]}
    assert latest["final/top1"] == run.metrics["test"]["top1"]
    history = f"{address}/api/2.0/mlflow/metrics/get-history?run_id={found['info']['run_id']}&metric_key=train/loss"
    with urllib.request.urlopen(history) as got:
        points = [(int(point["step"]), point["value"]) for point in json.loads(got.read())["metrics"]]
    assert sorted(points) == logged
    assert "equipoise: " not in capsys.readouterr().err

    write = RunLog.write

    def write_and_stop(self, kind, step, *more):
        if step == 4:
            stop(process)
        write(self, kind, step, *more)

    monkeypatch.setattr(RunLog, "write", write_and_stop)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run, logged = trained("mlflow", tmp_path / "other")
    assert capsys.readouterr().err == "equipoise: mlflow has failed (no answer); the run goes on without it\n"
    assert ([step for step, _ in logged], run.metrics["last"]["epoch"]) == ([2, 4, 6], 1)
