"""Names of classes: their order, and what is said of two that look alike."""

import pytest

from equipoise.data.names import difference, in_order, look_alikes, normal, unknown_classes


def test_the_order_of_classes():
    assert in_order(["b", "10", "2", " b ", "2"]) == ("10", "2", "b")
    assert in_order(["10", "2", "02", "1"]) == ("1", "02", "2", "10"), "numbers, by their values"
    assert normal(" e\u0301tang ") == "\xe9tang"


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [
        ("cat", "dog", ""),
        ("e\u0301", "\xe9", "Unicode form"),
        ("\ufb01n", "fin", "Unicode form"),
        ("Stra\xdfe", "STRASSE", "capitals"),
        ("red_fox", "Red Fox", "blanks"),
        ("1.5", "15", ""),
    ],
)
def test_how_two_names_differ(one, other, how):
    assert difference(one, other) == difference(other, one) == how


def test_what_is_said():
    assert look_alikes(["ant", "fox", "Fox", "FOX"]) == [
        f"classes 'fox' and '{other}' differ in capitals only: if they are one, give them one name"
        for other in ("Fox", "FOX")
    ]
    assert unknown_classes(["owl"], ["fox"], "model") == "1 class unknown to the model: 'owl'"
    names = list(map(str, range(12)))
    assert unknown_classes(names, ["fox"], "model").endswith(
        ": '0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 2 more"
    )
