# SPDX-License-Identifier: Apache-2.0
"""What may change between the runs of one work folder.

A resumed run takes the settings that it is given, for the steps that are still to do.
That is meant: a last stage may go on for longer, a folder of photographs may move. What
would leave a run of which no single configuration tells how it was made is refused.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from etils import epath

from semlic_jax.training.checkpoints import last_step
from semlic_jax.training.settings import LABELLER_STAGE, Settings
from semlic_jax.training.stages import LabellerStage, Stage
from semlic_jax.training.writers import clear_errors

_MISSING = "nothing"


def check_resumed(workdir: epath.Path, settings: Settings, record: str) -> None:
    """Log the settings that differ from those that the folder's stages began with.

    Args:
        workdir: folder of the run; `config.json` in it is of the run before.
        settings: the configuration.
        record: the same as JSON.

    Raises:
        ValueError: the folder cannot be read; `seed` or `init_from` differs although
            stages were trained with the other one; or a stage has steps to do that a
            later one was not made from.
    """
    names = [stage.name for stage in settings.records]
    with clear_errors(workdir):
        steps = {name: last_step(workdir / name) for name in names}
    if not any(steps.values()):
        return
    _check_order(workdir, settings, steps)
    path = workdir / "config.json"
    with clear_errors(workdir):
        before = _read(path)
    now = json.loads(record)
    if not before:
        return
    first, first_before = _first_codec_stage(now), _first_codec_stage(before)
    fixed = ["seed"]
    if first is not None and first == first_before and steps[first]:
        fixed.append("init_from")  # no other stage reads it
    for key in fixed:
        new = getattr(settings, key)
        old = before.get(key, new)
        if old != new:
            moved = f", or, if it has only moved, change it in {path} too"
            raise ValueError(
                f"config.{key} is {new!r}, but the checkpoints in {workdir} are of a "
                f"run with {old!r}: choose another --workdir"
                f"{moved if key == 'init_from' else ''}"
            )
    before, now = _flat(before), _flat(now)
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key, _MISSING), now.get(key, _MISSING)
        if old != new:
            logging.warning(
                "config.%s was %s in the run before and is %s now, for the steps that "
                "are still to do",
                *(key, old, new),
            )


def _check_order(
    workdir: epath.Path, settings: Settings, steps: dict[str, int]
) -> None:
    for number, stage in enumerate(settings.records):
        made_from_it = [
            workdir / later.name
            for later in settings.records[number + 1 :]
            if steps[later.name] and _starts_from(later, stage)
        ]
        done = steps[stage.name]
        if made_from_it and done < stage.steps:
            raise ValueError(
                f"the stage {stage.name} has done {done} of {stage.steps} steps, but "
                f"{made_from_it[0].name} has begun after it: choose another --workdir, "
                f"or delete {' and '.join(map(str, made_from_it))}"
            )


def _starts_from(later: Stage | LabellerStage, stage: Stage | LabellerStage) -> bool:
    if isinstance(later, LabellerStage):
        return False  # from nothing
    if isinstance(stage, LabellerStage):
        adversary = later.adversary
        classes = not adversary.binary and adversary.codes == "labeller"
        return bool(later.weights.adversarial) and classes
    return True


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}  # none yet, or a run was killed while it wrote it
    return found if isinstance(found, dict) else {}


def _first_codec_stage(record: dict[str, Any]) -> str | None:
    return next(
        (name for name in record.get("stages", ()) if name != LABELLER_STAGE), None
    )


def _flat(tree: dict[str, Any], start: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{start}{key}.")
        else:
            flat[f"{start}{key}"] = value
    return flat
