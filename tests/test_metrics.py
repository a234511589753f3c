"""Figures against the golden file and by hand."""

import numpy as np
import pytest
from conftest import GOLDEN

from equipoise.metrics import accuracy, shot_group


def test_shot_accuracy_golden():
    case = GOLDEN["shot_accuracy"]
    result = accuracy(np.array(case["predictions"]), np.array(case["labels"]), case["train_counts"])
    assert (result.many, result.medium, result.few) == pytest.approx((case["many"], case["medium"], case["few"]))
    assert list(result.per_class) == pytest.approx(case["per_class"])
    assert result.mean_per_class == pytest.approx(np.mean(case["per_class"]))
    assert result.top1 == pytest.approx(np.mean(np.array(case["predictions"]) == np.array(case["labels"])))


@pytest.mark.parametrize(("count", "group"), [(101, "many"), (100, "medium"), (20, "medium"), (19, "few"), (1, "few")])
def test_shot_group_limits(count, group):
    assert shot_group(count) == group


def test_absent_is_not_zero():
    """No class is 'many' or 'medium', and class 1 has no test images."""
    result = accuracy(np.array([0, 1, 2]), np.array([0, 0, 2]), [19, 5, 2])
    assert result.many is None
    assert result.medium is None
    assert result.per_class == (0.5, None, 1.0)
    assert result.few == result.mean_per_class == 0.75
    assert result.as_dict()["per_class"] == [0.5, None, 1.0]


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no images to score"):
        accuracy(np.array([], dtype=np.int64), np.array([], dtype=np.int64), [1, 2])
    with pytest.raises(ValueError, match="labels must be 0 to 1"):
        accuracy(np.array([0]), np.array([2]), [1, 2])
