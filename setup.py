"""Packaging: the dependency lists live in requirements/, one file per purpose."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
REQUIREMENTS = ROOT / "requirements"


def read_requirements(name: str) -> list[str]:
    """Return the requirement lines of requirements/{name}.txt, following its ``-r`` lines."""
    lines: list[str] = []
    for raw in (REQUIREMENTS / f"{name}.txt").read_text().splitlines():
        line = raw.split("#")[0].strip()
        if line.startswith("-r "):
            lines += read_requirements(line[3:].strip().removesuffix(".txt"))
        elif line:
            lines.append(line)
    return lines


setup(
    packages=find_packages(include=["covft", "covft.*"]),
    package_data={"covft": ["py.typed"]},
    install_requires=read_requirements("runtime"),
    extras_require={
        name: read_requirements(name) for name in ("train", "quickstart", "eval", "tests", "dev")
    },
    entry_points={"lmms_eval.models": ["covft = covft.interop.lmms_eval:manifest"]},
)
