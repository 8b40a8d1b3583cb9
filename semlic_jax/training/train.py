# SPDX-License-Identifier: Apache-2.0
"""The training program: `semlic train --config configs/small.py --workdir DIR`.

The stages of a config run one after the other, each from the averaged parameters of
the one before. Each keeps its checkpoints in `DIR/<stage>`; running the same command
again goes on where a killed run stopped. If one of several processes is lost, the
others stop with exit status 75: start all of them again. If one gets SIGTERM, all save
a checkpoint and stop, with the same status, as does a process by itself.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from semlic_jax.model.compression import CompressionModel
from semlic_jax.objectives.feature_weights import load_lpips_heads
from semlic_jax.objectives.features import load_features
from semlic_jax.training import checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.feature_codes import kept_codes
from semlic_jax.training.klt import block_covariance, start_from_klt
from semlic_jax.training.loop import run_program
from semlic_jax.training.model_files import training_params
from semlic_jax.training.programs import (
    Run,
    codec_program,
    codec_shapes,
    initial_labeller,
    labeller_program,
    make_run,
)
from semlic_jax.training.resuming import check_resumed
from semlic_jax.training.settings import (
    LABELLER_STAGE,
    LPIPS_NAMES,
    Settings,
    read_settings,
)
from semlic_jax.training.sharding import (
    local_examples,
    make_mesh,
    start_processes,
    stops_at_sigterm,
    stops_with_the_others,
)
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import LabellerStage, Stage
from semlic_jax.training.steps import Trunk
from semlic_jax.training.writers import Writer
from semlic_jax.weights import ModelFile, load_model, pretrained_models

Tree = Any

_KLT_IMAGES = 1000


def initial_params(settings: Settings, photographs: Photographs) -> Tree:
    """The codec's initial parameters, from `init_from` or fresh, as NumPy arrays.

    Fresh parameters start at the KLT of the photographs if the model has a linear skip.
    Texture layers that `init_from` lacks are fresh, which changes no picture yet, and
    those that this model lacks are left out. All processes get those of the first one.

    Raises:
        ValueError: the checkpoint or the model file is of another model.
    """
    config = settings.model_config
    model = CompressionModel(config)
    x = jnp.zeros((1, 64, 64, 3))
    key = jax.random.key(settings.seed)
    if settings.init_from:
        place = settings.init_from
        if place not in pretrained_models() and epath.Path(place).is_dir():
            params = checkpoints.read_params(place)
        else:
            params = _model_params(place)
        g_s = {k: v for k, v in params["g_s"].items() if not _is_texture(k)}
        if config.texture_channels:
            y = jnp.zeros((1, 4, 4, config.latent_channels))
            init = jax.jit(partial(model.init, method="synthesis"))
            fresh = init(key, y, jnp.zeros(1))["params"]["g_s"]
            texture = {k: v for k, v in fresh.items() if _is_texture(k)}
            g_s = {**jax.tree.map(np.asarray, texture), **params["g_s"]}
        params = {**params, "g_s": g_s}
        # Extra parameters are refused too, as they are in a model file.
        checkpoints.check_fits(params, codec_shapes(model), place, exactly=True)
        return _of_the_first(params)
    covariance = None
    if config.linear_skip:  # before what takes long: it may find no use for any
        covariance = block_covariance(photographs.sample(_KLT_IMAGES))
    params = jax.jit(model.init)(key, x, jnp.zeros(1), key)["params"]
    if covariance is not None:
        params = start_from_klt(params, config, covariance)
    return _of_the_first(jax.tree.map(np.asarray, params))


def _of_the_first(params: Tree) -> Tree:
    """The parameters of process 0, for all processes.

    Each may have its own share of the photographs, and eigenvectors differ between
    processors. Nothing would ever make such parameters equal again: only gradients are
    exchanged.
    """
    if jax.process_count() == 1:
        return params
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(params))


def _is_texture(name: str) -> bool:
    return name.startswith("texture_")


def _model_params(path: str) -> Tree:
    model = load_model(path)
    if not isinstance(model, ModelFile):
        raise ValueError(
            f"config.init_from: {path} is a converted model, which cannot be trained"
        )
    return training_params(model)


def _trunk(settings: Settings) -> Trunk | None:
    """The feature network, if a term of any stage needs it."""
    weights = [stage.weights for stage in settings.records]
    seen = settings.discriminator.feature_channels or any(
        isinstance(stage, Stage) and stage.adversary.codes == "features"
        for stage in settings.records
    )
    adversarial = seen and any(w.adversarial for w in weights)
    if not adversarial and not any(w.sees_features for w in weights):
        return None
    path = settings.features or os.environ.get("SEMLIC_FEATURES")
    dtype = None if settings.dtype == "float32" else jnp.dtype(settings.dtype)
    heads = None
    try:
        network = load_features(path or None, settings.trunk or None, dtype=dtype)
        logging.info("feature network: %s", network.name)
        if settings.learnt_heads:
            found = load_lpips_heads(str(path), LPIPS_NAMES[settings.trunk])
            heads = tuple(map(jnp.asarray, found))
    except ValueError as error:
        raise ValueError(f"config.features: {error}") from error
    for stage in settings.records:
        if not _takes_codes(stage):
            continue
        if stage.adversary.code_tap >= len(network.taps):
            raise ValueError(
                f"config.{stage.name}.adversary.code_tap must be below "
                f"{len(network.taps)}, the number of taps of {network.name}, found "
                f"{stage.adversary.code_tap}"
            )
    return Trunk(network, heads)


def _takes_codes(stage: Stage | LabellerStage) -> TypeGuard[Stage]:
    """Whether the stage has an adversary whose classes are codes of features."""
    if isinstance(stage, LabellerStage) or not stage.weights.adversarial:
        return False
    return not stage.adversary.binary and stage.adversary.codes == "features"


def _codes(
    run: Run, stage: Stage, photographs: Photographs, workdir: epath.Path
) -> Tree:
    """The codes of an adversary that takes them from features; None otherwise.

    They are as much a part of a stage's state as its discriminator, and k-means gives
    other codes for features that differ in their last bits, so they are made only once.
    """
    if not _takes_codes(stage):
        return None
    assert run.trunk is not None  # `_trunk` made sure of it
    codes = kept_codes(
        workdir / stage.name / "codes.npy",
        run.trunk.network,
        stage.adversary.code_tap,
        photographs,
        stage.adversary.code_count,
        seed=run.settings.seed,
    )
    return {"codes": codes}


def _labeller_of(run: Run, folder: str) -> Tree:
    """The labeller's parameters, from the folder of its stage's checkpoints.

    Raises:
        ValueError: they are those of another labeller.
    """
    params = checkpoints.read_params(folder)
    wanted = jax.eval_shape(partial(initial_labeller, run))
    checkpoints.check_fits(params, wanted, folder, exactly=True)
    return params


def train(config: Any, workdir: epath.PathLike) -> dict[str, Tree]:
    """Run all stages of an `ml_collections` config.

    Whatever is wrong with the config, the data, the weights or the devices is refused
    before anything is compiled.

    Args:
        config: see `settings`.
        workdir: folder of the run; may be in a bucket (`gs://...`).

    Returns:
        The averaged parameters of the networks that were trained, as `codec` and
        `labeller`; a labeller that was only read is also among them.

    Raises:
        ValueError: something is wrong; the message says what in one sentence.
    """
    workdir = epath.Path(workdir)
    settings = read_settings(config)
    record = config.to_json_best_effort(indent=2)
    check_resumed(workdir, settings, record)
    mesh = make_mesh(settings.mesh.data, settings.mesh.model)
    local_examples(mesh, settings.data.batch)
    data = settings.data
    photographs = Photographs(
        open_sources(data.train),
        crop=data.crop,
        small_images=data.small_images,
        smallest_scale=data.smallest_scale,
        largest_scale=data.largest_scale,
        cache_bytes=data.cache_mb * 2**20,
    )
    run = make_run(settings, mesh, _trunk(settings))
    trained: dict[str, Tree] = {}
    if settings.labeller_from:
        trained["labeller"] = _labeller_of(run, settings.labeller_from)
    logging.info(
        "%d photographs; %d devices, mesh %s",
        len(photographs),
        mesh.size,
        dict(mesh.shape),
    )
    # Making fresh ones takes a minute, and a stage that resumes does not need them.
    params = functools.cache(partial(initial_params, settings, photographs))
    if settings.init_from:
        params()  # to refuse now what does not fit
    writer = Writer(
        workdir, active=jax.process_index() == 0, tensorboard=settings.tensorboard
    )
    try:
        for stage in settings.records:
            if isinstance(stage, LabellerStage):
                program = labeller_program(run, stage)
                name = LABELLER_STAGE
            else:
                labeller = None
                if stage.weights.adversarial and not stage.adversary.binary:
                    labeller = _codes(run, stage, photographs, workdir)
                    labeller = labeller or trained["labeller"]
                name = "codec"
                begin = partial(trained.get, name) if name in trained else params
                program = codec_program(run, stage, begin, labeller)
            trained[name] = run_program(
                run, stage, program, photographs, writer, workdir, record
            )
    finally:
        writer.close()
    return trained


def load_config(path: str, overrides: Sequence[str]) -> Any:
    """The locked ConfigDict of a config file, with `--config.key=value` applied.

    Raises:
        ValueError: there is no such file, it makes no config, a key is unknown (the
            message names a near one) or a value is wrong.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    if not Path(path.partition(":")[0]).is_file():
        raise ValueError(f"--config: the file {path.partition(':')[0]} does not exist")
    values = flags.FlagValues()
    argv = ["semlic train", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file(
        "config", lock_config=True, flag_values=values, sys_argv=argv
    )
    try:
        left = values(argv)[1:]
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(_one_sentence(str(error), overrides)) from error
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"the config file cannot be loaded: {error}") from error
    if left:
        raise ValueError(f"expected options as --config.key=value, found {left[0]!r}")
    if not isinstance(values.config, ConfigDict):
        raise ValueError(
            "expected a ConfigDict from get_config of the config file, found "
            f"{type(values.config).__name__}"
        )
    return values.config


def _one_sentence(text: str, overrides: Sequence[str]) -> str:
    """An error of ml_collections in one sentence, without tracebacks and quotations."""
    hint = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', text)
    if hint:
        return f"the config has no key {hint[2]!r}; did you mean {hint[1]}?"
    # The traceback of a config file that raises an error ends with its message.
    text = " ".join(text.rsplit("Error: ", 1)[-1].split())
    while text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1:
        text = text[1:-1]
    if "has no attribute 'get_config'" in text:
        return "the config file has no function get_config"
    if text.startswith("get_config() takes"):
        return "the config takes no argument after a colon, or another number of them"
    if not text.isidentifier():
        return text
    own = any(each.startswith(f"--config.architecture.{text}=") for each in overrides)
    hint = f"; give --config.architecture=\"{{'{text}': VALUE}}\"" if own else ""
    return f"the config has no key {text!r}{hint}"


def main(argv: Sequence[str], prog: str = "semlic train") -> None:
    """Entry point; `argv` as in `--config FILE --workdir DIR --config.key=value`."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a model stage by stage; the same command continues where "
        "a killed run stopped.",
        epilog="Every key of the config can be set with --config.key=value, such as "
        "--config.data.train='(\"photos\",)'.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:ARGUMENT]",
        help="config file, such as configs/tiny.py",
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=epath.Path,
        metavar="DIR",
        help="folder for checkpoints and logs, created if missing",
    )
    parser.add_argument(
        "--distributed",
        default="none",
        metavar="MODE",
        help="how several processes find each other: none, auto (TPU pods, SLURM) or "
        "explicit (with the three options below); default none",
    )
    parser.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="address of process 0"
    )
    parser.add_argument(
        "--processes", default=0, type=int, metavar="N", help="number of processes"
    )
    parser.add_argument(
        "--process",
        default=-1,
        type=int,
        metavar="0..N-1",
        help="number of this process",
    )
    options, overrides = parser.parse_known_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    for name in ("orbax", "absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    config = load_config(options.config, overrides)
    start_processes(
        options.distributed, options.coordinator, options.processes, options.process
    )
    with stops_with_the_others(), stops_at_sigterm():
        train(config, options.workdir)


if __name__ == "__main__":
    main(sys.argv[1:], "python -m semlic_jax.training.train")
