# SPDX-License-Identifier: Apache-2.0
"""What README, changelog and citation say can be done and found."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import semlic_jax
from semlic_jax import cli

_ROOT = Path(__file__).parents[1]
_DOCUMENTS = [_ROOT / name for name in ("README.md", "CHANGELOG.md")]


def _blocks(language: str) -> list[str]:
    text = (_ROOT / "README.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in blocks if name == language]


def _commands() -> list[list[str]]:
    lines = "".join(_blocks("")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_python_examples_are_python():
    blocks = _blocks("python")
    assert len(blocks) > 3
    for block in blocks:
        ast.parse(block)


def test_commands_have_options_that_exist():
    commands = [words[1:] for words in _commands() if words[:1] == ["semlic"]]
    assert len(commands) > 10
    for words in commands:
        options, rest = cli._parser().parse_known_args(words)
        # Programs read the rest themselves; others have none.
        assert "program" in options or not rest, words


def test_modules_that_are_run_exist():
    modules = [words[2] for words in _commands() if words[:2] == ["python", "-m"]]
    assert modules
    for module in modules:
        assert importlib.util.find_spec(module), module


def test_make_targets_exist():
    makefile = (_ROOT / "Makefile").read_text()
    targets = {words[1] for words in _commands() if words[:1] == ["make"]}
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("path", _DOCUMENTS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_one_version():
    citation = (_ROOT / "CITATION.cff").read_text()
    found = re.search(r"^version: (\S+)$", citation, re.MULTILINE)
    assert found and found[1] == semlic_jax.__version__
    changes = (_ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert newest and newest[1] == semlic_jax.__version__
