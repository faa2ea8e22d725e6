# SPDX-License-Identifier: Apache-2.0
"""The tables for those who come from other packages name all that these have."""

from __future__ import annotations

import builtins
import inspect
import re
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

import monai_patchqueue

PAGES = Path(__file__).parents[1] / "docs" / "coming_from"
MODULES = {
    "monai": ["monai.data", "monai.data.thread_buffer", "monai.transforms", "monai.inferers"],
    "torchio": ["torchio", "torchio.data.sampler"],
    "torchvtk": ["torchvtk.datasets"],
}
# What all transforms of MONAI's have.
OF_ALL = {"backend", "requires_current_data"}


def sections(page: str) -> dict[str, list[tuple[str, str]]]:
    """Each section's rows, theirs and ours, under the name in the section's heading."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    found = re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(found) == len(dict(found))
    return {name: re.findall(r"^\| (`.*?) \| (.*?) \|", body, re.MULTILINE) for name, body in found}


def documented(rows: list[tuple[str, str]]) -> dict[str, list[str] | None]:
    """Names, with the parameters of those that are called."""
    names: dict[str, list[str] | None] = {}
    for called in re.findall(r"`([^`]+)`", " ".join(theirs for theirs, _ in rows)):
        name, parenthesis, parameters = called.lstrip("*").partition("(")
        assert name not in names, f"{name} has two rows"
        names[name] = [part.strip("* ") for part in parameters.rstrip(")").split(",") if part] if parenthesis else None
    return names


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def public_members(cls: type) -> dict[str, Any]:
    """What a class itself defines and shows."""
    return {name: getattr(cls, name) for name in vars(cls) if not name.startswith("_") and name not in OF_ALL}


def resolve(package: str, name: str) -> Any:
    modules = [import_module(module) for module in MODULES[package]]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def ours(name: str) -> Any:
    """A class or function of this package's, or one of MONAI's that serves here."""
    for module in map(import_module, ("monai_patchqueue", "monai.data", "monai.transforms")):
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"there is no {name}")


def skip_unless_it_is_the_version_on_the_page(package: str) -> None:
    text = (PAGES / f"{package}.md").read_text(encoding="utf-8")
    found = re.search(r"Names are those of \w+ (\d+(?:\.\d+)+)\.", text)
    assert found
    try:
        installed = version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    if installed != found[1]:
        pytest.skip(f"the page is about {package} {found[1]}; {installed} is installed")


CASES = [(package, name) for package in MODULES for name in sections(package)]


@pytest.mark.parametrize(("package", "name"), CASES, ids=[name for _, name in CASES])
def test_every_public_name_and_parameter_of_theirs_has_a_row(package: str, name: str) -> None:
    skip_unless_it_is_the_version_on_the_page(package)
    rows = documented(sections(package)[name])
    theirs = resolve(package, name)
    required = {name, *parameters(theirs)}
    allowed = set(required)
    if inspect.isclass(theirs):
        members = public_members(theirs)
        required |= members.keys()
        bases = {parameter for base in theirs.__mro__ for parameter in parameters(base.__init__)}
        allowed |= required | bases | set(dir(theirs)) | set(re.findall(r"self\.(\w+) *=", inspect.getsource(theirs)))
        if name == "DataLoader":
            required |= set(parameters(DataLoader))
        for member in rows.keys() & members.keys():
            if inspect.isroutine(members[member]):
                assert rows[member] == [p for p in parameters(members[member]) if p != "cls"], member
            else:
                assert rows[member] is None, f"{member} is not called"
    assert required - rows.keys() == set()
    assert rows.keys() - allowed == set()


@pytest.mark.parametrize(("package", "name"), CASES, ids=[name for _, name in CASES])
def test_what_a_row_leads_to_is_there(package: str, name: str) -> None:
    spans = re.findall(r"`([^`]+)`", " ".join(here for _, here in sections(package)[name]))
    classes = {found[1] for span in spans if (found := re.match(r"(?:monai\.\w+\.)?([A-Z]\w+)", span))}
    serving = [ours(each) for each in [*classes, *monai_patchqueue.__all__]]
    known = {*dir(builtins), *monai_patchqueue.__all__}
    known |= {part for each in serving if callable(each) for part in [*parameters(each), *dir(each)]}
    names = {found[1] for span in spans if (found := re.fullmatch(r"([a-z_]\w+)(?:\(.*\)|=.*)?", span))}
    assert names - known == set()


def test_each_page_has_the_packages_loaders() -> None:
    assert len(sections("monai")) >= 20
    assert len(sections("torchio")) >= 10
    assert len(sections("torchvtk")) >= 3


@pytest.mark.parametrize("package", MODULES)
def test_what_is_not_offered_is_said_to_be_so_with_the_reason(package: str) -> None:
    text = (PAGES / f"{package}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.*?` \| (.*?) \| (.*?) ?\|$", text, re.MULTILINE)
    assert len(rows) > 20
    for here, difference in rows:
        assert here != "–" or re.search(r"not offered, (because|as) |the same", difference), (here, difference)
