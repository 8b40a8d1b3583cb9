# SPDX-License-Identifier: Apache-2.0
"""The packaged default model.

semlic train --config configs/small.py --workdir runs/small \
    --config.data.train='("photos/train", "photos/more")'

It needs the SqueezeNet 1.0 feature weights (SEMLIC_FEATURES or --config.features).
Expected: about 5 hours on 2 CPU cores for all stages.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """Three stages, and a labeller for comparisons; all durations are in steps."""
    config = base_config()
    config.model = "small"
    config.trunk = "squeezenet1_0"
    # On crops of 128 pixels (8 x 8 latents), the entropy networks learnt the borders by
    # heart: whole photographs took up to 30 % more bits than their tiles
    # (semlic_jax.evaluation.crop_cost).
    config.data.update(batch=2, crop=256)
    # Small photographs are also scaled up, because large photographs are smoother.
    config.data.smallest_scale = 0.55
    config.stages = ("rate_distortion", "integer", "perceptual")
    # Both networks are convolutional and narrow, so that codes and logits of 8 x 8
    # cells are within a CPU's reach.
    config.networks.labeller.update(
        widths=(48, 96),
        blocks=1,
        attention=False,
        patch=4,
        code_count=256,
    )
    # What the discriminator cannot see for itself, it gets from the feature network,
    # which knows textures: one that started from nothing was fooled or won for good.
    config.networks.discriminator.update(
        widths=(24, 48),
        up_widths=(),
        context_channels=0,
        patch=2,
        feature_channels=32,
        mix_widths=(96, 96),
    )
    config.labeller = stage_config(
        "labeller",
        steps=3000,
        optimizer=dict(lr=1e-3, decay_steps=1000, final_rate=0.02),
        weights=dict(charbonnier=1.0, perceptual=0.02),
    )
    # Chosen so that one model covers about 0.03 to 1 bpp.
    rate = dict(lmbda_low=13.0, lmbda_high=0.028, balance=0.5)
    terms = dict(charbonnier=0.7, structural=1.0, perceptual=0.14, local_style=1500.0)
    config.rate_distortion = stage_config(
        "rate_distortion",
        steps=12000,
        optimizer=dict(lr=8e-4, clip_norm=2.0),
        weights=terms,
        **rate,
    )
    # Without the lattice term, a weave of 16 pixels stays on plain surfaces. The term
    # was added late in the run of the packaged model, and makes the feature distance at
    # low rates worse.
    plain = terms | dict(lattice=4.0)
    config.integer = stage_config(
        "integer",
        steps=11000,
        arithmetic="fake",
        optimizer=dict(
            lr=5e-4,
            warmup_steps=100,
            decay_steps=7000,
            final_rate=0.02,
            ema=0.996,
            clip_norm=2.0,
        ),
        weights=plain | dict(structural=1.3, local_style=3000.0),
        **rate,
    )
    # The adversary's weight is so high that its bound decides (`largest_share`): its
    # pull is twice that of all other terms.
    config.perceptual = stage_config(
        "perceptual",
        steps=5400,
        arithmetic="fake",
        trained=("g_s",),
        # No decay: an average over the last thousand steps measured better.
        optimizer=dict(
            lr=3e-4,
            beta1=0.5,
            beta2=0.95,
            warmup_steps=100,
            ema=0.999,
            clip_norm=2.0,
        ),
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
            optimizer=dict(lr=6e-4, beta1=0.5, beta2=0.95, warmup_steps=100),
            codes="features",
            code_count=32,
            largest_share=2.0,
        ),
        **rate,
    )
    return config
