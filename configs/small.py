# SPDX-License-Identifier: Apache-2.0
"""The packaged default model.

semlic train --config configs/small.py --workdir runs/small \
    --config.data.train='("photos/train", "photos/more")'

Needs the SqueezeNet 1.0 feature weights (SEMLIC_FEATURES or --config.features).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Two stages; a duration ends in `_steps`."""
    rate_distortion = dict(
        name="rate_distortion",
        steps=12000,
        arithmetic="float",
        learning_rate=5e-4,
        warmup_steps=200,
        decay_steps=0,
        final_rate=1.0,
        # Chosen so that one model covers about 0.05 to 0.65 bpp.
        lmbda_low=1.2,
        lmbda_high=0.025,
        k_charbonnier=1.0,
        k_perceptual=0.02,
        ema=0.998,
        clip_norm=1.0,
    )
    integer = rate_distortion | dict(
        name="integer",
        steps=3000,
        arithmetic="fake",
        decay_steps=2800,
        final_rate=0.01,
    )
    return ConfigDict(
        dict(
            model="small",
            seed=0,
            features="",
            checkpoint_steps=500,
            log_steps=50,
            data=dict(train=("data/train",), batch=8, crop=128),
            stages=(ConfigDict(rate_distortion), ConfigDict(integer)),
        )
    )
