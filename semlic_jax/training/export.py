# SPDX-License-Identifier: Apache-2.0
"""Turn a training checkpoint into a model file.

    python -m semlic_jax.training.export RUN/STAGE MODEL.npz --fit-tables photos/train

STAGE is the last stage that was trained: `integer`, or the one after it. The
architecture is that of RUN/config.json, or the size that `--size` names. Without
photographs the tables of y are those of the model's Gaussians, and files are about two
percent larger. `--decoder-for small.npz`, in place of photographs, takes only g_s from
a stage that started from that model: each of the two models reads the other's files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from etils import epath

from semlic_jax.images import check_outputs, write_file
from semlic_jax.model.compression import SIZES, CompressionModel, ModelConfig
from semlic_jax.training.checkpoints import check_fits, read_params
from semlic_jax.training.fit_tables import report, with_fitted_tables
from semlic_jax.training.model_files import with_decoder
from semlic_jax.training.sources import open_sources
from semlic_jax.weights import ModelFile, export_model, load_model, model_bytes


def trained_config(stage: epath.Path) -> ModelConfig:
    """The architecture of a run, from the configuration that it saved.

    Args:
        stage: folder of a stage's checkpoints; `config.json` is beside it.

    Raises:
        ValueError: there is no such file, or no architecture can be read from it.
    """
    path = stage.parent / "config.json"
    try:
        record = json.loads(path.read_text())
        changed = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in record["architecture"].items()
        }
        return dataclasses.replace(SIZES[record["model"]], **changed)
    except FileNotFoundError as error:
        raise ValueError(
            f"the run's configuration {path} does not exist: give --size"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"cannot read the model's architecture from {path}: {error!r}; give --size"
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.export",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument(
        "stage", type=epath.Path, help="folder of a stage's checkpoints"
    )
    parser.add_argument("model", type=Path, help="model file to write")
    parser.add_argument(
        "--size",
        choices=sorted(SIZES),
        help="architecture; default: that of the run's configuration",
    )
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint; default: the last one"
    )
    parser.add_argument(
        "--fit-tables",
        nargs="+",
        metavar="PHOTOGRAPHS",
        help="fit the coder's tables of y to photographs: folders, globs, array_record "
        "files or data sets, as for training; never images used for evaluation",
    )
    parser.add_argument(
        "--decoder-for",
        metavar="MODEL",
        help="put the decoder (g_s) into this model and keep the rest of it",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing MODEL"
    )
    options = parser.parse_args(argv)
    if options.fit_tables and options.decoder_for:
        parser.error("--fit-tables and --decoder-for cannot be combined")
    try:
        check_outputs([options.model], force=options.force)  # before the work
        data = model_bytes(_model(options))
        write_file(options.model, data, force=options.force)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _model(options: argparse.Namespace) -> ModelFile:
    source = open_sources(options.fit_tables) if options.fit_tables else None
    params = read_params(options.stage, options.step)
    config = SIZES[options.size] if options.size else trained_config(options.stage)
    if options.decoder_for:
        kept = load_model(options.decoder_for)
        if not isinstance(kept, ModelFile):
            raise ValueError(
                f"{options.decoder_for} is a converted model, whose decoder cannot be "
                "replaced"
            )
        return with_decoder(kept, config, params)
    init = CompressionModel(config).init
    x, key = jnp.zeros((1, 64, 64, 3)), jax.random.key(0)
    wanted = jax.eval_shape(init, key, x, jnp.zeros(1), key)["params"]
    check_fits(params, wanted, options.stage, exactly=True)
    model = export_model(config, params)
    if source is not None:
        model, found, saved_percent = with_fitted_tables(model, source)
        print(report(found, saved_percent))
    return model


if __name__ == "__main__":
    main()
