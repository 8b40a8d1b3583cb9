# SPDX-License-Identifier: Apache-2.0
"""A model for accelerators: its decoder takes at most 200 kMAC per pixel.

semlic train --config configs/base.py --workdir runs/base \
    --config.data.train='("photos.array_record",)' \
    --config.labeller_from=runs/labeller/labeller

Needs a labeller (configs/labeller.py) and takes feature weights (SEMLIC_FEATURES or
--config.features; else the packaged ones). Expected: about 3 days on one GPU of 80 GB
for all stages.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """Three stages; the labeller comes from its own run."""
    config = base_config()
    config.model = "base"
    config.dtype = "bfloat16"
    config.data.update(batch=16, crop=256)
    config.stages = ("rate_distortion", "integer", "perceptual")
    # The reference's discriminator; its latents' context needs their span of decades.
    config.networks.discriminator.context_log = True
    rate = dict(lmbda_low=6.0, lmbda_high=0.009, balance=0.5)
    terms = dict(charbonnier=1.0, structural=0.3, perceptual=0.02)
    adam = dict(lr=3e-4, warmup_steps=2_000)
    config.rate_distortion = stage_config(
        "rate_distortion", steps=400_000, optimizer=adam, weights=terms, **rate
    )
    config.integer = stage_config(
        "integer",
        steps=60_000,
        arithmetic="fake",
        optimizer=adam | dict(decay_steps=50_000, final_rate=0.01),
        weights=terms,
        **rate,
    )
    config.perceptual = stage_config(
        "perceptual",
        steps=100_000,
        arithmetic="fake",
        trained=("g_s",),
        optimizer=dict(
            lr=1e-4, beta1=0.5, beta2=0.9, decay_steps=30_000, final_rate=0.05
        ),
        weights=terms | dict(style=500.0, local_style=500.0, adversarial=0.002),
        adversary=dict(
            optimizer=dict(lr=4e-4, warmup_steps=1_000, beta1=0.5, beta2=0.9),
            split_batch=True,
        ),
    )
    config.checkpoint_steps = 5_000
    config.image_steps = 5_000
    config.log_steps = 100
    return config
