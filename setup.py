"""Packages are listed by hand: ajepa_kernels lives in kernels/, a folder that must never be a package itself."""

from setuptools import setup

setup(
    packages=["ajepa", "ajepa_kernels"],
    package_dir={"ajepa": "ajepa", "ajepa_kernels": "kernels/ajepa_kernels"},
)
