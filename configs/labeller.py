# SPDX-License-Identifier: Apache-2.0
"""MS-ILLM's labeller at full size: a VQ-VAE with cross-covariance attention.

semlic train --config configs/labeller.py --workdir runs/labeller \
    --config.data.train='("tfds:imagenet2012/train",)' --distributed=auto

It has 18.1 million parameters and 1024 codes, and is trained on crops of 256 pixels.
The reference's recipe is not published; this one is ours. It uses feature weights
(SEMLIC_FEATURES or --config.features; else the packaged ones). Expected: about a day on
8 GPUs of 80 GB or on a v4-8.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """One stage; everything else at its default."""
    config = base_config()
    config.model = "hific"
    config.dtype = "bfloat16"
    config.data.update(batch=64, crop=256)
    config.stages = ("labeller",)
    config.labeller = stage_config(
        "labeller",
        steps=200_000,
        optimizer=dict(
            lr=3e-4,
            warmup_steps=2_000,
            decay_steps=100_000,
            final_rate=0.01,
            beta2=0.99,
            ema=0.9995,
        ),
        weights=dict(charbonnier=1.0, perceptual=0.05),
    )
    config.checkpoint_steps = 5_000
    config.image_steps = 5_000
    config.log_steps = 100
    return config
