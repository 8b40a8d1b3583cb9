# SPDX-License-Identifier: Apache-2.0
"""Which part of the package may import which, and what importing it must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "semlic_jax"

# What each part may import of the package besides itself. A part that is missing here
# fails the test: give it a place when you add it.
ALLOWED = {
    "": {"codec", "coding", "weights"},  # the lazy names of __init__.py
    "arrays_file": set(),
    "images": {"image_modes", "other_formats"},
    "image_modes": set(),
    "other_formats": set(),
    "option_kinds": set(),
    "terminal": set(),
    "compilation": set(),
    "level_search": set(),
    "memory": set(),
    "model": set(),
    "coding": {"compilation", "model"},
    "objectives": {"arrays_file", "model"},
    "refinement": {"compilation", "images", "memory", "model", "objectives"},
    "weights": {"arrays_file", "model", "coding", "images", "objectives"},
    "codec": {
        "",
        "coding",
        "compilation",
        "level_search",
        "memory",
        "model",
        "objectives",
        "refinement",
        "weights",
    },
    "packaged": {"codec", "coding", "weights"},
    "pillow_plugin": {"", "codec", "coding", "image_modes", "images", "packaged"},
    "training": {
        "",
        "codec",
        "coding",
        "images",
        "model",
        "objectives",
        "option_kinds",
        "other_formats",
        "refinement",
        "terminal",
        "weights",
    },
    "evaluation": {
        "",
        "codec",
        "coding",
        "images",
        "level_search",
        "model",
        "objectives",
        "option_kinds",
        "other_formats",
        "refinement",
        "terminal",
        "training",
        "weights",
    },
}
ALLOWED["converters"] = {"coding", "images", "model", "objectives", "weights"}
ALLOWED["cli"] = set(ALLOWED) - {"cli"}
ALLOWED["__main__"] = {"cli"}

HEAVY = (
    "array_record clu constriction flax grain jax matplotlib orbax scipy tensorboard "
    "tensorflow tensorflow_datasets torch"
).split()


def part_of(module: str) -> str:
    """`semlic_jax.model.layers` -> `model`; `semlic_jax` -> ``."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path) -> set[str]:
    """The package's modules that a file imports anywhere, also inside functions.

    But for those that it names to type checkers alone: they load nothing.
    """
    package = ("semlic_jax", *path.relative_to(PACKAGE).parts[:-1])
    found = set()
    for node in nodes_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            prefix = ".".join(base)
            # `from semlic_jax import images` imports a module, not a name of it.
            modules = {f"{prefix}.{alias.name}" for alias in node.names}
            modules = {name for name in modules if is_module(name)}
            found |= modules
            if len(modules) < len(node.names):
                found.add(prefix)
    return {name for name in found if name.split(".")[0] == "semlic_jax"}


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without the bodies of `if TYPE_CHECKING:`."""
    children: Iterable[ast.AST] = ast.iter_child_nodes(tree)
    if isinstance(tree, ast.If) and ast.unparse(tree.test) == "TYPE_CHECKING":
        children = tree.orelse
    for node in children:
        yield node
        yield from nodes_that_run(node)


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    part = relative.parts[0].removesuffix(".py").replace("__init__", "")
    assert part in ALLOWED, f"{part} has no place in the order of imports"
    for module in imported_modules(path):
        target = part_of(module)
        assert target == part or target in ALLOWED[part], (
            f"{relative} imports {module}: {part} may not know {target}"
        )


def test_the_walker_sees_every_kind_of_import(tmp_path, monkeypatch):
    source = tmp_path / "semlic_jax" / "model" / "example.py"
    source.parent.mkdir(parents=True)
    (tmp_path / "semlic_jax" / "cli.py").touch()
    source.with_name("layers.py").touch()
    source.write_text(
        "import semlic_jax.codec\n"
        "from semlic_jax import cli, __version__\n"
        "from . import layers\n"
        "from ..training import loop\n"
        "def f():\n    from semlic_jax.evaluation.demo import table\n"
        "if TYPE_CHECKING:\n    from semlic_jax.weights import ModelFile\n"
        "else:\n    from semlic_jax.memory import require_memory\n"
        "if not TYPE_CHECKING:\n    import semlic_jax.terminal\n"
        "import numpy\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "semlic_jax")
    assert imported_modules(source) == {
        "semlic_jax",  # for __version__
        "semlic_jax.codec",
        "semlic_jax.cli",
        "semlic_jax.model.layers",
        "semlic_jax.training",  # for a name of it
        "semlic_jax.evaluation.demo",
        "semlic_jax.memory",
        "semlic_jax.terminal",
    }


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a new interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import semlic_jax; semlic_jax.__version__, dir(semlic_jax)",
        "import semlic_jax.cli; semlic_jax.cli._parser()",
        "import semlic_jax.images",
    ],
)
def test_the_front_door_is_light(statement):
    assert not loaded_by(statement) & set(HEAVY)


def test_the_codec_loads_nothing_of_training_and_evaluation():
    loaded = loaded_by("import semlic_jax; semlic_jax.Codec")
    assert "jax" in loaded
    assert not loaded & (set(HEAVY) - {"constriction", "flax", "jax", "scipy"})


def test_public_names():
    import semlic_jax

    for name in semlic_jax.__all__:
        assert getattr(semlic_jax, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = semlic_jax.no_such_name
