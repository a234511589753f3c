"""`make audit`: what is installed, as an SBOM, and which of it has known vulnerabilities.

The SBOM (CycloneDX, JSON) is build/sbom.cdx.json. The vulnerabilities are asked for from PyPI's own service and, where
that does not know the packages, from OSV's. Where neither can be reached nothing was audited, and that is said.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SBOM = Path("build") / "sbom.cdx.json"
SERVICES = ("pypi", "osv")


def write_sbom() -> int:
    """The number of components in it."""
    SBOM.parent.mkdir(exist_ok=True)
    words = ["-m", "cyclonedx_py", "environment", "--pyproject", "pyproject.toml", "--output-reproducible"]
    subprocess.run([sys.executable, *words, "--of", "JSON", "-o", str(SBOM), sys.executable], check=True)
    return len(json.loads(SBOM.read_text(encoding="utf-8"))["components"])


def audited(service: str) -> tuple[list[dict[str, Any]], str]:
    """The packages that the service knows, with their vulnerabilities; or none, and why."""
    words = [
        "-m",
        "pip_audit",
        "--local",
        "--progress-spinner=off",
        "--format=json",
        f"--vulnerability-service={service}",
    ]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]
    known = [package for package in packages if "skip_reason" not in package]
    return known, "" if known else f"it knows none of the {len(packages)} packages here"


def verdict(found: dict[str, tuple[list[dict[str, Any]], str]]) -> tuple[list[str], int]:
    """What to say of the answers by service, in lines, and the exit code: 1 for known vulnerabilities."""
    for service, (packages, _) in found.items():
        if packages:
            bad = [(package, hole) for package in packages for hole in package["vulns"]]
            lines = [
                f"{package['name']} {package['version']}: {hole['id']}, mended in "
                f"{', '.join(hole['fix_versions']) or 'no release yet'}"
                for package, hole in bad
            ]
            holes = f"{len(bad) or 'no'} known {'vulnerabilities' if len(bad) > 1 else 'vulnerability'}"
            return [*lines, f"{len(packages)} packages audited by {service}: {holes}"], 1 if bad else 0
    reasons = [f"{service}: {reason}" for service, (_, reason) in found.items()]
    return [*reasons, "NOT AUDITED: no service of known vulnerabilities could be asked from here"], 0


def main() -> int:
    print(f"{SBOM}: {write_sbom()} components")
    found: dict[str, tuple[list[dict[str, Any]], str]] = {}
    for service in SERVICES:
        found[service] = audited(service)
        if found[service][0]:
            break
    lines, code = verdict(found)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
