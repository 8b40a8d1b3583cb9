# SPDX-License-Identifier: Apache-2.0
"""Turn a training checkpoint into a model file.

python -m semlic_jax.training.export RUN/STAGE MODEL.npz [--size small] [--step N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from etils import epath

from semlic_jax.model.compression import SIZES
from semlic_jax.training.checkpoints import read_params
from semlic_jax.weights import export_model, save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", type=epath.Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--step", type=int)
    arguments = parser.parse_args()
    params = read_params(arguments.stage, arguments.step)
    save_model(arguments.model, export_model(SIZES[arguments.size], params))


if __name__ == "__main__":
    main()
