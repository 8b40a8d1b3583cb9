# SPDX-License-Identifier: Apache-2.0
"""All four stages at the smallest size, on images that the program makes itself.

semlic train --config configs/tiny.py --workdir runs/tiny

It needs no data and no feature weights. Expected: about a minute on 2 CPU cores.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """All four stages, a few steps each."""
    config = base_config()
    config.model = "tiny"
    config.data.update(train=("synthetic:32",), batch=4, crop=64)
    config.stages = ("labeller", "rate_distortion", "perceptual", "integer")
    config.networks.labeller.update(
        widths=(8, 16), blocks=1, attention=False, patch=4, code_count=16
    )
    config.networks.discriminator.update(
        widths=(8, 16, 16),
        up_widths=(16, 16),
        context_channels=4,
        context_log=True,
        patch=4,
        lateral_skips=True,
    )
    # An average over the usual 500 steps would stay at the start of a stage.
    fast = dict(lr=2e-3, warmup_steps=5, ema=0.9)
    config.labeller = stage_config("labeller", steps=40, optimizer=fast)
    rate = dict(lmbda_low=1.2, lmbda_high=0.025)
    config.rate_distortion = stage_config(
        "rate_distortion", steps=80, optimizer=fast, **rate
    )
    config.perceptual = stage_config(
        "perceptual",
        steps=40,
        trained=("g_s",),
        optimizer=fast,
        weights=dict(adversarial=0.002),
        adversary=dict(optimizer=fast),
    )
    config.integer = stage_config(
        "integer", steps=20, arithmetic="fake", optimizer=fast, **rate
    )
    config.checkpoint_steps = 20
    config.log_steps = 10
    return config
