"""What is installed beside this package: bounds, and what `make audit` says of the answers it gets."""

import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.audit import verdict

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_dependency_has_both_bounds():
    extras = PROJECT["project"]["optional-dependencies"].values()
    lines = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"], *chain(*extras)]
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        if requirement.name != "equipoise":
            assert {bound.operator for bound in requirement.specifier} == {">=", "<"}, requirement


def test_what_is_said_of_an_audit():
    hole = {"id": "CVE-1", "fix_versions": ["2.1"]}
    packages = [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "version": "2", "vulns": [hole]}]
    assert verdict({"pypi": (packages[:1], "")}) == (["1 packages audited by pypi: no known vulnerability"], 0)
    lines, code = verdict({"pypi": ([], "it knows none"), "osv": (packages, "")})
    assert lines == ["b 2: CVE-1, mended in 2.1", "2 packages audited by osv: 1 known vulnerability"]
    assert code == 1
    lines, code = verdict({"pypi": ([], "it knows none of the 2 packages here"), "osv": ([], "no answer")})
    assert lines[-1] == "NOT AUDITED: no service of known vulnerabilities could be asked from here"
    assert (lines[:-1], code) == (["pypi: it knows none of the 2 packages here", "osv: no answer"], 0)
