"""The notebooks of the site run, and what they assert of their results holds."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs/notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One working folder: the walk that all of them render is rendered once."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, folder, monkeypatch):
    if path.stem == "reconstruct":
        pytest.importorskip("pycolmap", reason="pycolmap is not installed: pip install 'gim-jax[sfm]'")
    monkeypatch.chdir(folder)
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
            assert cell["outputs"] or "print" not in "".join(cell["source"]), "run it before it is kept"
