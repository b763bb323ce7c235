"""Maps the repository's root to the package ``fuseline``; everything else is in ``pyproject.toml``."""

from setuptools import find_packages, setup

PARTS = ("runtime", "kernels", "collectives", "workers", "cluster", "proto")
SUBPACKAGES = find_packages(include=[pattern for part in PARTS for pattern in (part, f"{part}.*")])

# A folder of data counts as a package to setuptools, which warns of one that is not declared.
DATA = ("workers.models.demo",)

setup(
    script_name="setup.py",  # so that the build leaves this very file out of the package
    packages=["fuseline", *(f"fuseline.{name}" for name in (*SUBPACKAGES, *DATA))],
)
