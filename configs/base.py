# SPDX-License-Identifier: Apache-2.0
"""The packaged model `base`: twice the widths of `small`, and blocks at every level.

python -m semlic_jax.training.widen small start.npz --size base
semlic train --config configs/base.py --workdir runs/base \
    --config.init_from=start.npz --config.data.train='("photos/train", "photos/more")'

It starts as the same function as `small`. It needs the SqueezeNet 1.0 feature weights
(SEMLIC_FEATURES or --config.features). Expected: 12 minutes of steps on one H100 (35
and 25 ms a step in the two stages, if the crops are ready in time) and 2 to 5 minutes
of compilation; days without an accelerator. The packaged weights were made with the
same updates in another training loop, and their decoder is a mean of three whose finest
level was trained further (semlic_jax/pretrained/base/card.md); this config has not been
run to its end.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The last two stages of `small` with the same terms, in larger batches."""
    config = runpy.run_path(str(Path(__file__).with_name("small.py")))["get_config"]()
    config.model = "base"
    config.dtype = "bfloat16"
    config.data.batch = 16
    config.stages = ("integer", "perceptual")
    config.integer.steps = 13_200
    config.integer.optimizer.update(warmup_steps=300, decay_steps=8_600, ema=0.999)
    decay = dict(decay_steps=4_500, final_rate=0.04)
    config.perceptual.steps = 10_000
    config.perceptual.optimizer.update(lr=2.5e-4, warmup_steps=400, **decay)
    config.perceptual.adversary.optimizer.update(
        lr=4e-4, warmup_steps=200, clip_norm=2.0, **decay
    )
    config.checkpoint_steps = 1_000
    config.image_steps = 1_000
    config.log_steps = 100
    return config
