"""Maps the repository's root to the package ``fuseline``; everything else is in ``pyproject.toml``."""

from pathlib import Path

from setuptools import find_packages, setup

PARTS = ("runtime", "kernels", "collectives", "workers", "cluster", "proto")
SUBPACKAGES = find_packages(include=[pattern for part in PARTS for pattern in (part, f"{part}.*")])

# A folder of data counts as a package to setuptools, which warns of one that is not declared.
# The sources of native kernels are data: they are compiled where they run.
SOURCES = {path.parent for path in Path("kernels/csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu")}
DATA = ("workers.models.demo", *sorted(".".join(folder.parts) for folder in SOURCES))

setup(
    script_name="setup.py",  # so that the build leaves this very file out of the package
    packages=["fuseline", *(f"fuseline.{name}" for name in (*SUBPACKAGES, *DATA))],
)
