"""The names that the packages export."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import pytest

PACKAGES = (
    "compress",
    "compress.one_shot",
    "compress.pretrained",
    "hwsim",
    "hwsim.comparison",
    "sweeps",
    "sweeps.codesign",
    "sweeps.study",
)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_and_stay(package: str) -> None:
    """Importing a module of a package puts it there under its name, in place of a function that has the same."""
    module = import_module(package)
    modules = {found.name for found in iter_modules(module.__path__)}
    exported = set(module.__all__)
    assert not exported & modules
    assert exported <= set(dir(module))
    assert all(hasattr(module, name) for name in exported)
