# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from monai.data import load_decathlon_datalist

from monai_patchqueue.data.synthetic import make_synthetic_dataset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("docs") / "data"
    make_synthetic_dataset(folder, num_volumes=4, shape=(100, 96, 98), progress=False)
    return load_decathlon_datalist(str(folder / "dataset.json"))


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_the_code_on_a_page_runs_from_top_to_bottom(page: Path, files: list[dict[str, str]]) -> None:
    names: dict[str, Any] = {"files": files}
    for block in python_blocks(page):
        exec(compile(block, str(page), "exec"), names)
    loader = names["loader"]
    batch = next(iter(loader))
    assert batch["image"].shape == batch["label"].shape
    assert len(batch["image"]) == 4
    loader.close()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_links_to_files_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_tests_that_guarantees_name_are_there() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (ROOT / "docs/guarantees.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    assert [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()] == []


@pytest.mark.parametrize("marker", ["run-command", "test-command"])
def test_the_readme_marks_the_commands_that_are_run_from_it(marker: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^<!-- {marker} -->\n```bash\npip install -c constraints\.txt -e ", text, re.MULTILINE)
