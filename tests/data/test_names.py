"""Names of classes: their order, and what is said of two that look alike."""

import pytest

from equipoise.data.names import in_order, look_alikes, normal, unknown_classes


def test_the_order_of_classes():
    assert in_order(["b", "10", "2", " b ", "2"]) == ("10", "2", "b")
    assert in_order(["10", "2", "02", "1"]) == ("1", "02", "2", "10"), "numbers, by their values"
    assert normal(" e\u0301tang ") == "\xe9tang"


@pytest.mark.parametrize(
    ("one", "other"),
    [("e\u0301", "\xe9"), ("\ufb01n", "fin"), ("Stra\xdfe", "STRASSE"), ("red_fox", "Red Fox"), ("a  b", "a b")],
)
def test_names_that_look_alike(one, other):
    assert len(look_alikes([one, other])) == 1
    assert "they differ only in blanks, capitals or Unicode form" in unknown_classes([other], [one], "model")


@pytest.mark.parametrize(("one", "other"), [("cat", "dog"), ("1.5", "15"), ("fox", "fox")])
def test_names_that_do_not(one, other):
    assert look_alikes([one, other]) == []


def test_what_is_said():
    assert look_alikes(["ant", "fox", "Fox", "FOX"]) == [
        f"classes 'fox' and '{other}' differ only in blanks, capitals or Unicode form: if they are one, "
        "give them one name"
        for other in ("Fox", "FOX")
    ]
    assert unknown_classes(["owl"], ["fox"], "model") == "1 class unknown to the model: 'owl'"
    names = list(map(str, range(12)))
    assert unknown_classes(names, ["fox"], "model").endswith(
        ": '0', '1', '2', '3', '4', '5', '6', '7', '8', '9' and 2 more"
    )
