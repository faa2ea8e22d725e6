# SPDX-License-Identifier: Apache-2.0
"""MONAI's bundle parser finds components by short names in all modules whose name starts with "monai"."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
from monai.bundle import ComponentLocator, ConfigParser

import monai_patchqueue


def components(package: str) -> set[str]:
    """Names of classes and functions that a config could mean."""
    locator = ComponentLocator()
    locator.get_component_module_name("Compose")  # it looks around when it is first asked
    table = locator._components_table or {}
    return {name for name, where in table.items() if any(module.startswith(package) for module in where)}


@pytest.mark.parametrize("name", monai_patchqueue.__all__)
def test_every_public_name_can_be_imported_and_is_documented(name: str) -> None:
    component = getattr(monai_patchqueue, name)
    assert not name.startswith("_")
    assert inspect.getdoc(component)


def test_no_name_of_ours_means_something_else_in_monai() -> None:
    for info in pkgutil.walk_packages(monai_patchqueue.__path__, "monai_patchqueue."):
        importlib.import_module(info.name)
    ours, theirs = components("monai_patchqueue."), components("monai.")
    assert len(ours) > 40
    assert ours & theirs == set()


def test_short_names_are_resolved_in_configs() -> None:
    parser = ConfigParser({"crop": {"_target_": "RandUniformPatchd", "keys": "image", "spatial_size": 8}})
    assert isinstance(parser.get_parsed_content("crop"), monai_patchqueue.RandUniformPatchd)
