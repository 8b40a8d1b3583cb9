# SPDX-License-Identifier: Apache-2.0
"""Take the mean of the decoders of several model files.

    python -m semlic_jax.training.average MEAN.npz LATE.npz LAST.npz BEFORE.npz \
        --weights 0.4,0.4,0.2

The models must be identical but for g_s: `training.export --decoder-for` makes such
models from the checkpoints of one stage. Each of them, and their mean, reads the files
of the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from semlic_jax.images import check_outputs, write_file
from semlic_jax.option_kinds import numbers
from semlic_jax.training.model_files import mean_decoder
from semlic_jax.weights import ModelFile, load_model, model_bytes


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.average",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("output", type=Path, help="model file to write")
    parser.add_argument(
        "models", nargs="+", metavar="model", help="names or paths of models"
    )
    parser.add_argument(
        "--weights",
        type=numbers,
        help="weight of each model, separated by commas; default: equal weights",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing OUTPUT"
    )
    options = parser.parse_args(argv)
    try:
        check_outputs([options.output], force=options.force)
        models = []
        for name in options.models:
            model = load_model(name)
            if not isinstance(model, ModelFile):
                raise ValueError(
                    f"{name} is a converted model, which cannot be averaged"
                )
            models.append(model)
        data = model_bytes(mean_decoder(models, options.weights))
        write_file(options.output, data, force=options.force)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
