# SPDX-License-Identifier: Apache-2.0
"""The packaged model `base`: twice the widths of `small`, and blocks at every level.

python -m semlic_jax.training.widen small start.npz --size base
semlic train --config configs/base.py --workdir runs/base \
    --config.init_from=start.npz --config.data.train='("photos/train", "photos/more")'

Starts as the same function as `small`. Needs the SqueezeNet 1.0 feature weights
(SEMLIC_FEATURES or --config.features). Expected: 12 minutes of steps on one H100 (35
and 25 ms a step with the crops at hand), and 2 to 5 to compile; days without an
accelerator. The packaged weights were made by these updates in another loop, and their
decoder is a mean of three (semlic_jax/pretrained/base/card.md); this config has not
been run to its end.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """All networks, then the decoder with the adversary."""
    config = base_config()
    config.model = "base"
    config.trunk = "squeezenet1_0"
    config.dtype = "bfloat16"
    config.data.update(batch=16, crop=256)
    config.data.smallest_scale = 0.55
    config.stages = ("integer", "perceptual")
    # It sees the feature network, as in configs/small.py.
    config.networks.discriminator.update(
        widths=(24, 48),
        up_widths=(),
        context_channels=0,
        patch=2,
        feature_channels=32,
        mix_widths=(96, 96),
    )
    rate = dict(lmbda_low=13.0, lmbda_high=0.028, balance=0.5)
    config.integer = stage_config(
        "integer",
        steps=13_200,
        arithmetic="fake",
        optimizer=dict(
            lr=5e-4,
            warmup_steps=300,
            decay_steps=8_600,
            final_rate=0.02,
            ema=0.999,
            clip_norm=2.0,
        ),
        weights=dict(
            charbonnier=0.7,
            structural=1.3,
            perceptual=0.14,
            local_style=3000.0,
            lattice=4.0,
        ),
        **rate,
    )
    config.perceptual = stage_config(
        "perceptual",
        steps=10_000,
        arithmetic="fake",
        trained=("g_s",),
        optimizer=dict(
            lr=2.5e-4,
            beta1=0.5,
            beta2=0.95,
            warmup_steps=400,
            decay_steps=4_500,
            final_rate=0.04,
            ema=0.999,
            clip_norm=2.0,
        ),
        # The weight of the adversary is so high that its bound decides.
        weights=dict(
            charbonnier=0.6,
            structural=0.7,
            perceptual=0.14,
            local_style=5000.0,
            mean_style=0.25,
            lattice=6.0,
            adversarial=10.0,
        ),
        adversary=dict(
            optimizer=dict(
                lr=4e-4,
                beta1=0.5,
                beta2=0.95,
                warmup_steps=200,
                decay_steps=4_500,
                final_rate=0.04,
                clip_norm=2.0,
            ),
            codes="features",
            code_count=32,
            largest_share=2.0,
        ),
        **rate,
    )
    config.checkpoint_steps = 1_000
    config.image_steps = 1_000
    config.log_steps = 100
    return config
