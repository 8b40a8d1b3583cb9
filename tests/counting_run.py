# SPDX-License-Identifier: Apache-2.0
"""A training loop with a state that only counts, for several test files."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from mini_config import get_config

from semlic_jax.training.data import Photographs
from semlic_jax.training.loop import run_program
from semlic_jax.training.programs import Program, make_run
from semlic_jax.training.settings import read_settings
from semlic_jax.training.sharding import make_mesh
from semlic_jax.training.sources import open_sources
from semlic_jax.training.writers import Writer


def counting_program(broken_step: int | None = None) -> Program:
    """A state that counts steps; one of its terms breaks at a step."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = {
        name: {"n": jax.ShapeDtypeStruct((), jnp.float32, sharding=place)}
        for name in ("params", "average", "optimizer")
    }

    def start():
        return {name: {"n": jnp.zeros(())} for name in shapes}

    def update(state, step, images):
        state = jax.tree.map(lambda n: n + 1, state)
        bad = step + 1 == broken_step
        metrics = {
            "loss": jnp.float32(step),
            "style": jnp.float32(np.nan if bad else 1),
        }
        return state, metrics

    return Program(shapes, start, update, lambda state, images: [images])


def read_rows(workdir: Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def run_counting(workdir, program, steps=10, **changes):
    config = get_config()
    config.update_from_flattened_dict({"perceptual.steps": steps, **changes})
    settings = read_settings(config)
    run = make_run(settings, make_mesh(1, 1), None)
    writer = Writer(workdir, active=True, tensorboard=False)
    try:
        return run_program(
            *(
                run,
                settings.records[0],
                program,
                Photographs(open_sources(settings.data.train), crop=64),
            ),
            *(writer, workdir, config.to_json_best_effort()),
        )
    finally:
        writer.close()
