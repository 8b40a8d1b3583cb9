# SPDX-License-Identifier: Apache-2.0
"""The training program: `semlic train --config configs/small.py --workdir DIR`.

The stages of a config run one after the other, each from the averaged parameters of
the one before. Each keeps its checkpoints in `DIR/<stage>`; the same command goes on
where a killed run stopped.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.model.compression import CompressionModel
from semlic_jax.objectives.feature_weights import load_lpips_heads
from semlic_jax.objectives.features import load_features
from semlic_jax.training import checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.klt import block_covariance, start_from_klt
from semlic_jax.training.loop import run_program
from semlic_jax.training.programs import (
    codec_program,
    labeller_program,
    make_run,
)
from semlic_jax.training.settings import (
    LABELLER_STAGE,
    LPIPS_NAMES,
    Settings,
    read_settings,
)
from semlic_jax.training.sharding import local_examples, make_mesh, start_processes
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import LabellerStage
from semlic_jax.training.steps import Trunk
from semlic_jax.training.writers import Writer

Tree = Any

_KLT_IMAGES = 1000


def initial_params(settings: Settings, photographs: Photographs) -> Tree:
    """The codec's first parameters: of `init_from`, or fresh; NumPy arrays.

    Fresh ones start at the KLT of the photographs where the model has a linear skip.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    config = settings.model_config
    model = CompressionModel(config)
    x = jnp.zeros((1, 64, 64, 3))
    key = jax.random.key(settings.seed)
    if settings.init_from:
        folder = Path(settings.init_from)
        params = checkpoints.read_params(folder)
        wanted = jax.eval_shape(model.init, key, x, jnp.zeros(1), key)["params"]
        checkpoints.check_fits(params, wanted, folder)
        return params
    params = jax.jit(model.init)(key, x, jnp.zeros(1), key)["params"]
    if config.linear_skip:
        covariance = block_covariance(photographs.sample(_KLT_IMAGES))
        params = start_from_klt(params, config, covariance)
    return jax.tree.map(np.asarray, params)


def _trunk(settings: Settings) -> Trunk | None:
    """The feature network, if a term of any stage needs it."""
    weights = [stage.weights for stage in settings.records]
    if not any(w.perceptual or w.style or w.local_style for w in weights):
        return None
    path = settings.features or os.environ.get("SEMLIC_FEATURES")
    dtype = None if settings.dtype == "float32" else jnp.dtype(settings.dtype)
    heads = None
    try:
        network = load_features(path, settings.trunk, dtype=dtype)
        if settings.learnt_heads:
            found = load_lpips_heads(str(path), LPIPS_NAMES[settings.trunk])
            heads = tuple(map(jnp.asarray, found))
    except ValueError as error:
        raise ValueError(f"config.features: {error}") from error
    return Trunk(network, heads)


def train(config: Any, workdir: Path) -> dict[str, Tree]:
    """Runs all stages of an `ml_collections` config.

    Everything that can be wrong with the config, the data, the weights and the devices
    is refused before anything is compiled.

    Returns:
        Averaged parameters of what was trained: `codec`, `labeller`.

    Raises:
        ValueError: in one sentence, what is wrong.
    """
    settings = read_settings(config)
    mesh = make_mesh(settings.mesh.data, settings.mesh.model)
    local_examples(mesh, settings.data.batch)
    data = settings.data
    photographs = Photographs(
        open_sources(data.train),
        crop=data.crop,
        small_images=data.small_images,
        largest_scale=data.largest_scale,
        cache_bytes=data.cache_mb * 2**20,
    )
    run = make_run(settings, mesh, _trunk(settings))
    logging.info(
        "%d photographs; %d devices, mesh %s",
        len(photographs),
        mesh.size,
        dict(mesh.shape),
    )
    writer = Writer(
        workdir, active=jax.process_index() == 0, tensorboard=settings.tensorboard
    )
    writer.config(config.to_json_best_effort(indent=2))
    trained: dict[str, Tree] = {}
    if settings.labeller_from:
        trained["labeller"] = checkpoints.read_params(Path(settings.labeller_from))
    try:
        for stage in settings.records:
            if isinstance(stage, LabellerStage):
                program = labeller_program(run, stage)
                name = LABELLER_STAGE
            else:
                if "codec" not in trained:
                    trained["codec"] = initial_params(settings, photographs)
                labeller = None
                if stage.weights.adversarial and not stage.adversary.binary:
                    labeller = trained["labeller"]
                program = codec_program(run, stage, trained["codec"], labeller)
                name = "codec"
            trained[name] = run_program(
                run, stage, program, photographs, writer, workdir
            )
    finally:
        writer.close()
    return trained


def main(argv: Sequence[str]) -> None:
    """Entry point; `argv` as in `--config FILE --workdir DIR --config.key=value`.

    `--distributed=auto` joins the processes of a TPU pod or a SLURM job,
    `--distributed=explicit --coordinator=HOST:PORT --processes=N --process=I` any.
    """
    from absl import app, flags
    from ml_collections import config_flags

    config_flag = config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    flags.DEFINE_string("distributed", "none", "none, auto or explicit.")
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0.")
    flags.DEFINE_integer("processes", 0, "How many there are.")
    flags.DEFINE_integer("process", -1, "Which one this is.")
    flags.mark_flags_as_required(["config", "workdir"])

    def run(_: Sequence[str]) -> None:
        values = flags.FLAGS
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(message)s", force=True
        )
        for name in ("orbax", "absl", "jax"):
            logging.getLogger(name).setLevel(logging.WARNING)
        start_processes(
            values.distributed, values.coordinator, values.processes, values.process
        )
        train(config_flag.value, Path(values.workdir))

    app.run(run, argv=["semlic train", *argv])


if __name__ == "__main__":
    main(sys.argv[1:])
