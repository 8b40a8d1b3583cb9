# SPDX-License-Identifier: Apache-2.0
"""The notebooks as they are kept: clean, valid, and of names that exist.

`make notebooks` runs them from start to end.
"""

from __future__ import annotations

import ast
import importlib
import json
from pathlib import Path

import nbformat
import pytest

_FOLDER = Path(__file__).parents[1] / "colab"
_PATHS = sorted(_FOLDER.glob("*.ipynb"))


@pytest.fixture(params=_PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return json.loads(path.read_text())


def _code(notebook) -> list[str]:
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells]


def test_they_are_all_here():
    names = [path.stem for path in _PATHS]
    assert names == ["compress_your_photo", "refine_on_tpu", "train_a_codec"]


def test_format(path, notebook):
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["colab"]["name"] == path.name
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)


def test_outputs_are_stripped(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
            assert "execution" not in cell["metadata"]


def test_names_of_the_package_exist(notebook):
    """Also those of a branch that running it does not take, such as Colab's."""
    aliases: dict[str, object] = {}
    seen = 0
    for source in _code(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.name.startswith("semlic_jax"):
                        importlib.import_module(name.name)
            elif isinstance(node, ast.ImportFrom) and node.module:
                if not node.module.startswith("semlic_jax"):
                    continue
                for name in node.names:
                    found = _member(importlib.import_module(node.module), name.name)
                    aliases[name.asname or name.name] = found
                    seen += 1
    assert seen > 3
    modules = {k: v for k, v in aliases.items() if type(v).__name__ == "module"}
    for source in _code(notebook):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in modules:
                    _member(modules[node.value.id], node.attr)


def _member(module, name: str):
    """`module.name`, which may be a module that is not imported yet."""
    if not hasattr(module, name):
        return importlib.import_module(f"{module.__name__}.{name}")
    return getattr(module, name)


def test_one_way_to_install():
    first = {_code(json.loads(path.read_text()))[0] for path in _PATHS}
    assert len(first) == 1


def test_colab_fields_are_literals(notebook):
    """Colab replaces the value before `# @param`: it must be all of the line."""
    for source in _code(notebook):
        for line in source.splitlines():
            if "# @param" in line:
                (node,) = ast.parse(line).body
                assert isinstance(node, ast.Assign)
                ast.literal_eval(node.value)
