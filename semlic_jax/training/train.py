# SPDX-License-Identifier: Apache-2.0
"""The training program: `semlic train --config configs/small.py --workdir DIR`.

The stages of a config run one after the other. Each keeps its checkpoints in
`DIR/<stage>`; a run that was killed goes on from the last one and ends with the same
parameters as an unbroken run, since batches and noise are functions of the step.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from semlic_jax.model.compression import SIZES, CompressionModel, ModelConfig
from semlic_jax.objectives.features import load_features
from semlic_jax.training.data import Photographs
from semlic_jax.training.klt import block_covariance, start_from_klt
from semlic_jax.training.stages import Stage, State, initial_state, make_step

Tree = Any


def initial_params(config: ModelConfig, photographs: Photographs, seed: int) -> Tree:
    """Fresh parameters, from the KLT of the photographs where the model has it."""
    model = CompressionModel(config)
    x = jnp.zeros((1, 64, 64, 3))
    key = jax.random.key(seed)
    params = jax.jit(model.init)(key, x, jnp.zeros(1), key)["params"]
    if config.linear_skip:
        params = start_from_klt(params, config, block_covariance(photographs.images))
    return params


def _manager(folder: Path, every_steps: int) -> ocp.CheckpointManager:
    policy = ocp.checkpoint_managers
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy.LatestN(2),
        save_decision_policy=policy.FixedIntervalPolicy(every_steps),
    )
    return ocp.CheckpointManager(folder.absolute(), options=options)


def _restore(manager: ocp.CheckpointManager, state: State) -> tuple[State, int]:
    """The last checkpoint, or the given state and step 0."""
    step = manager.latest_step()
    if step is None:
        return state, 0
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    restored = manager.restore(step, args=ocp.args.StandardRestore(shapes))
    return State(**restored), step


def run_stage(
    config: ModelConfig,
    stage: Stage,
    params: Tree,
    photographs: Photographs,
    workdir: Path,
    *,
    batch: int,
    crop: int,
    seed: int,
    features_path: str,
    checkpoint_steps: int,
    log_steps: int,
) -> Tree:
    """Train one stage to its end; returns its averaged parameters.

    Raises:
        FloatingPointError: the loss is not finite; names the step.
    """
    features = load_features(features_path) if stage.k_perceptual else None
    step_fn = make_step(config, stage, features)
    manager = _manager(workdir / stage.name, checkpoint_steps)
    state, start = _restore(manager, initial_state(stage, params))
    key = jax.random.key(seed)
    log = (workdir / "metrics.jsonl").open("a")
    begun, sums, count = time.monotonic(), {}, 0
    batches = photographs.batches(start, stage.steps, seed=seed, batch=batch, crop=crop)
    for step, images in enumerate(batches, start):
        state, metrics = step_fn(state, images, jax.random.fold_in(key, step))
        sums = jax.tree.map(jnp.add, sums, metrics) if sums else metrics
        count += 1
        done = step + 1
        if done % log_steps == 0 or done == stage.steps:
            row = {name: float(value) / count for name, value in sums.items()}
            seconds = (time.monotonic() - begun) / (done - start)
            row |= {"stage": stage.name, "step": done, "seconds_per_step": seconds}
            log.write(json.dumps(row) + "\n")
            log.flush()
            _report(row, (stage.steps - done) * seconds)
            if not np.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss is not finite between steps {done - count} and {done} "
                    f"of stage {stage.name}: {row}"
                )
            sums, count = {}, 0
        manager.save(
            done,
            args=ocp.args.StandardSave(state._asdict()),
            force=done == stage.steps,
        )
    manager.wait_until_finished()
    manager.close()
    log.close()
    return state.average


def _report(row: dict[str, Any], seconds_left: float) -> None:
    terms = " ".join(
        f"{name} {value:.4f}" for name, value in row.items() if isinstance(value, float)
    )
    logging.info(
        "%s %d: %s, %.0f min left", row["stage"], row["step"], terms, seconds_left / 60
    )


def train(config: Any, workdir: Path) -> Tree:
    """Run all stages of an `ml_collections` config; returns the last parameters."""
    workdir.mkdir(parents=True, exist_ok=True)
    model_config = SIZES[config.model]
    photographs = Photographs(config.data.train, smallest_side=config.data.crop)
    logging.info("%d photographs", len(photographs.images))
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2))
    features_path = config.features or os.environ.get("SEMLIC_FEATURES", "")
    params = initial_params(model_config, photographs, config.seed)
    for record in config.stages:
        stage = Stage(**record)
        params = run_stage(
            model_config,
            stage,
            params,
            photographs,
            workdir,
            batch=config.data.batch,
            crop=config.data.crop,
            seed=config.seed,
            features_path=features_path,
            checkpoint_steps=config.checkpoint_steps,
            log_steps=config.log_steps,
        )
    return params


def main(argv: Sequence[str]) -> None:
    """Entry point; `argv` as in `--config FILE --workdir DIR --config.key=value`."""
    from absl import app, flags
    from ml_collections import config_flags

    config_flag = config_flags.DEFINE_config_file("config", lock_config=True)
    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.mark_flags_as_required(["config", "workdir"])

    def run(_: Sequence[str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        logging.getLogger("orbax").setLevel(logging.WARNING)
        logging.getLogger("absl").setLevel(logging.WARNING)
        train(config_flag.value, Path(workdir_flag.value))

    app.run(run, argv=["semlic train", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
