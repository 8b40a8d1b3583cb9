# SPDX-License-Identifier: Apache-2.0
"""What pyproject.toml asks for and packs, against what the code needs."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_ROOT = Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())
# Where a package is not imported by its own name.
_PACKAGES = {"PIL": "pillow", "orbax": "orbax-checkpoint"}
# Come with those that are named: absl with ml-collections, etils with orbax-checkpoint.
_BROUGHT = {"absl", "etils"}


def _required(extra: str) -> list[Requirement]:
    return [*map(Requirement, _PROJECT["project"]["optional-dependencies"][extra])]


def _imported(folder: Path) -> set[str]:
    """Packages of others that the modules of a folder import anywhere."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - {"semlic_jax", *sys.stdlib_module_names}


def test_training_has_what_it_imports_and_no_more():
    ours = {Requirement(text).name for text in _PROJECT["project"]["dependencies"]}
    named = {package.name for package in _required("train")}
    imported = {
        _PACKAGES.get(name, name.replace("_", "-"))
        for name in _imported(_ROOT / "semlic_jax" / "training")
    }
    imported -= {"torch", *_BROUGHT}  # torch: for the twin of a test in PyTorch
    # One of the core's is named again where training needs a later version of it.
    named -= ours | {"tensorflow", "tensorflow-cpu", "tensorboard"}
    assert imported - ours == named


@pytest.mark.parametrize("extra", ["", "train", "eval", "dev"])
def test_every_dependency_has_a_lower_bound(extra):
    """But for tools, and for what clu should have named."""
    free = {"tensorflow", "tensorflow-cpu", "tensorboard", "semlic_jax"}
    free |= {"hypothesis", "mypy", "nbformat", "pytest", "ruff"}
    core = [*map(Requirement, _PROJECT["project"]["dependencies"])]
    for package in _required(extra) if extra else core:
        bounds = {each.operator for each in package.specifier}
        assert ">=" in bounds or package.name in free, package


@pytest.mark.parametrize("extra", ["train", "notebooks", "dev"])
def test_kmeans_has_a_scipy_that_takes_its_generator(extra):
    (scipy,) = (each for each in _required(extra) if each.name == "scipy")
    assert scipy.specifier.contains("1.15.0") and not scipy.specifier.contains("1.14.1")


@pytest.mark.parametrize(
    "machine, package",
    [
        ("x86_64", "tensorflow-cpu"),
        ("AMD64", "tensorflow-cpu"),
        ("arm64", "tensorflow"),
        ("aarch64", "tensorflow"),
    ],
)
def test_every_machine_gets_a_tensorflow_that_has_wheels_for_it(machine, package):
    names = {
        each.name
        for each in _required("train")
        if not each.marker or each.marker.evaluate({"platform_machine": machine})
    }
    assert {n for n in names if n.startswith("tensorflow")} == {
        package,
        "tensorflow-datasets",
    }


def test_the_build_takes_a_list_of_license_files():
    (hatchling,) = map(Requirement, _PROJECT["build-system"]["requires"])
    assert isinstance(_PROJECT["project"]["license-files"], list)
    assert not hatchling.specifier.contains("1.25.0")  # which fails on it
    assert hatchling.specifier.contains("1.27.0")


def test_the_source_distribution_has_what_its_tests_read():
    packed = set(_PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    packed |= {"/README.md", "/LICENSE", "/pyproject.toml"}  # in any case
    read = set()
    for path in (_ROOT / "tests").glob("*.py"):
        pattern = r'(?:ROOT|REPOSITORY|__file__\)\.parents\[1\]\)?) / "([^./"][^/"]*)"'
        read |= set(re.findall(pattern, path.read_text()))
    assert {"Makefile", "pyproject.toml", "semlic_jax"} <= read
    assert {f"/{name}" for name in read} <= packed


def test_tests_of_packing_photographs_run_in_continuous_integration():
    pins = (_ROOT / "requirements" / "ci.txt").read_text()
    assert "array-record" in {package.name for package in _required("dev")}
    assert re.search(r"^array_record==", pins, re.MULTILINE)
