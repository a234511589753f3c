"""Several processes train what one trains. Whole runs: test_launches.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import largest_relative_error, torchrun

from equipoise import UserError
from equipoise.base.world import ALONE, World, join

HERE = Path(__file__).resolve().parents[1]
BCL = {"method": "bcl", "micro_batch": 0, "batch_norm": "frozen", "images": 83}
CASES = {
    "bcl": BCL,
    "three-left": BCL | {"images": 67},  # in the last batch: of four ranks, three have none
    "supcon": BCL | {"method": "supcon+la"},
    "ldam": BCL | {"method": "ldam-drw"},
    "proco": BCL | {"method": "proco"},
    "gpaco": BCL | {"method": "gpaco"},
    "tsc": BCL | {"method": "tsc"},
    "paco": BCL | {"method": "paco", "micro_batch": 3},
    "paco-synchronised": BCL | {"method": "paco", "batch_norm": "synchronised"},
    "gml": BCL | {"method": "gml", "images": 67},
    "ce": BCL | {"method": "ce", "images": 67},
    "micro": BCL | {"micro_batch": 3},
    "synchronised": BCL | {"batch_norm": "synchronised"},
    "held": BCL | {"anchor": 6.0, "sampler": "square-root"},
    "progressive": BCL | {"sampler": "progressive"},
    "mixed": BCL | {"method": "concutmix", "mix": "cmo", "images": 67},
    "sharp": BCL | {"method": "proco", "micro_batch": 3, "sam": 0.05},
    "mixed-weights": BCL | {"method": "ldam-drw", "mix": "mixup"},
    "per-rank": BCL | {"batch_norm": "per-rank"},
}


# ---- gradients


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """What every case came to on 1, 2 and 4 processes."""
    results: dict[int, dict[str, Any]] = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp("ranks")
        done = torchrun(processes, str(HERE / "ranks.py"), str(folder), json.dumps(CASES))
        assert done.returncode == 0, done.stderr
        results[processes] = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in CASES}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", [name for name in CASES if name != "per-rank"])
def test_many_processes_train_what_one_trains(trained, case, processes):
    one, many = trained[1][case], trained[processes][case]
    assert one["gradients"].keys() == many["gradients"].keys() == {32, CASES[case]["images"] % 32}
    for rows, gradients in one["gradients"].items():
        assert largest_relative_error(many["gradients"][rows], gradients) < 1e-9, f"after a batch of {rows}"
        for name, gradient in one["own"].items():
            assert many["own"][name] == pytest.approx(gradient, rel=1e-6)  # it is float32
        if case == "micro":
            assert largest_relative_error(trained[1]["bcl"]["gradients"][rows], gradients) < 1e-9
    assert largest_relative_error(many["state"], one["state"]) < 1e-6
    assert len(one["terms"]) >= 20
    for ours, expected in zip(many["terms"], one["terms"], strict=True):
        assert ours == pytest.approx(expected, rel=1e-9)
        assert expected["loss"] > 0


@pytest.mark.slow
def test_some_ranks_lack_images_and_classes_and_statistics_of_each_rank_are_another_thing(trained):
    """BatchNorm over a quarter of the batch differs from BatchNorm over all of it, which 'synchronised' computes."""
    assert trained[4]["three-left"]["rows"][2] == [(0, 3), (3, 3), (3, 3), (3, 3)]
    assert any(set(own) != set(range(5)) for ranks in trained[4]["bcl"]["classes"] for own in ranks)

    one, four = trained[1]["per-rank"]["gradients"][32], trained[4]["per-rank"]["gradients"][32]
    assert largest_relative_error(four, one) > 0.05
    assert largest_relative_error(trained[1]["synchronised"]["gradients"][32], one) == 0


# ---- shares


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 31, 256])
def test_shares_are_the_batch(size, rows):
    shares = [World(rank, size).share(rows) for rank in range(size)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    assert all(count != 1 for count in sizes), "BatchNorm cannot normalise one image"
    given = [count for count in sizes if count]
    assert max(given) - min(given) <= 1


# ---- one process


def test_alone_nothing_is_exchanged():
    with join() as world:
        assert world == ALONE
    x = torch.ones(3, 2, requires_grad=True)
    assert world.gather_rows(x, 3) is x
    assert world.sum(x) is x
    assert world.gather_objects("x") == ["x"]
    assert world.first_makes(lambda: 7) == world.each_makes(lambda: 7) == 7


def test_a_world_that_cannot_be_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=r"could not join the others \(.*RANK expected, but not set\); start all with"):
        join().__enter__()
