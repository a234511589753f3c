"""Names of classes: their order, and what is said of two that look alike."""

import pytest

from equipoise.data.names import in_order, look_alikes, normal, unknown_classes


def test_the_order_of_classes():
    assert in_order(["b", "10", "2", " b ", "2"]) == ("10", "2", "b")
    assert in_order(["10", "2", "02", "1"]) == ("1", "02", "2", "10"), "numbers, by their values"
    assert normal(" e\u0301tang ") == "\xe9tang"


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("cat", "dog", False),
        ("e\u0301", "\xe9", True),
        ("\ufb01n", "fin", True),
        ("Stra\xdfe", "STRASSE", True),
        ("red_fox", "Red Fox", True),
        ("1.5", "15", False),
    ],
)
def test_which_names_look_alike(one, other, alike):
    assert bool(look_alikes([one, other])) == bool(look_alikes([other, one])) == alike


def test_what_is_said():
    differ = "differ in capitals, blanks or look-alike letters only: if they are one, give them one name"
    said = look_alikes(["ant", "fox", "Fox", "FOX"])
    assert said == [f"classes 'fox' and '{other}' {differ}" for other in ("Fox", "FOX")]
    assert unknown_classes(["owl"], ["fox"], "model") == "1 class unknown to the model: 'owl'"
    names = list(map(str, range(12)))
    assert unknown_classes(names, ["fox"], "model").endswith(
        ": '0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 2 more"
    )
