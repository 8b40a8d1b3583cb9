# SPDX-License-Identifier: Apache-2.0
"""The paper's widths and schedule: HiFiC's transforms, MS-ILLM's adversary.

semlic train --config configs/hific.py --workdir runs/hific \
    --config.data.train='("photos-*.array_record",)' \
    --config.labeller_from=runs/labeller/labeller --distributed=auto

It needs VGG-16 feature weights with LPIPS heads (SEMLIC_FEATURES or --config.features)
and a labeller (configs/labeller.py). It takes 1,050,000 steps without the adversary and
100,000 with it, on crops of 256 pixels. Expected: about 12 days on 8 GPUs of 80 GB or
on a v4-32, most of it in the first stage; with --config.mesh.model=2 the parameters of
a stage are split over two devices.
"""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """MS-ILLM's schedule, with the semantic ensemble loss in the last stage."""
    config = base_config()
    config.model = "hific"
    config.dtype = "bfloat16"
    config.trunk = "vgg16"
    config.learnt_heads = True
    config.data.update(batch=32, crop=256)
    config.stages = ("rate_distortion", "integer", "perceptual")
    rate = dict(lmbda_low=6.0, lmbda_high=0.009, balance=0.5)
    terms = dict(charbonnier=1.0, perceptual=0.1)
    adam = dict(lr=3e-4, warmup_steps=10_000, weight_decay=5e-5, ema=0.9999)
    config.rate_distortion = stage_config(
        "rate_distortion",
        steps=1_000_000,
        optimizer=adam | dict(beta2=0.999, decay_steps=990_000, final_rate=0.0157),
        weights=terms,
        **rate,
    )
    config.integer = stage_config(
        "integer",
        steps=50_000,
        arithmetic="fake",
        optimizer=adam | dict(lr=5e-5, decay_steps=40_000, final_rate=0.01),
        weights=terms,
        **rate,
    )
    config.perceptual = stage_config(
        "perceptual",
        steps=100_000,
        arithmetic="fake",
        trained=("g_s",),
        optimizer=dict(lr=1e-4, warmup_steps=0, beta1=0.5, beta2=0.9, ema=0.9995),
        weights=terms | dict(style=500.0, local_style=500.0, adversarial=0.002),
        adversary=dict(
            optimizer=dict(lr=4e-4, warmup_steps=0, beta1=0.5, beta2=0.9),
            split_batch=True,
        ),
    )
    config.checkpoint_steps = 5_000
    config.image_steps = 5_000
    config.log_steps = 100
    return config
