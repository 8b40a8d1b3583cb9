# SPDX-License-Identifier: Apache-2.0
"""A configuration that compiles and trains in seconds: for tests only."""

from ml_collections import ConfigDict

from semlic_jax.training.settings import base_config, stage_config


def get_config() -> ConfigDict:
    """Every kind of stage, a few steps each; `perceptual` needs no labeller."""
    config = base_config()
    config.model = "tiny"
    config.architecture = ConfigDict(
        dict(
            widths=(8, 8, 8),
            latent_channels=8,
            groups=(2, 6),
            hyper_channels=4,
            psi_channels=8,
            context_channels=8,
            hidden_channels=8,
            context_shifts=(2, 2),
            linear_skip=False,
        )
    )
    config.data.update(train=("synthetic:6",), batch=4, crop=64, threads=2)
    config.networks.labeller.update(
        widths=(8, 8), blocks=1, attention=False, patch=4, code_count=8
    )
    config.networks.discriminator.update(
        widths=(8, 8), up_widths=(8,), context_channels=2, patch=4
    )
    adam = dict(lr=2e-3, warmup_steps=2)
    rate = dict(lmbda_low=1.0, lmbda_high=0.1)
    config.stages = ("perceptual",)
    config.labeller = stage_config("labeller", steps=40, optimizer=adam)
    config.rate_distortion = stage_config(
        "rate_distortion", steps=8, optimizer=adam, **rate
    )
    config.perceptual = stage_config(
        "perceptual",
        steps=24,
        trained=("g_s",),
        optimizer=adam | dict(ema=0.9),
        weights=dict(adversarial=0.01),
        adversary=dict(optimizer=adam, binary=True),
    )
    config.integer = stage_config(
        "integer", steps=8, arithmetic="fake", optimizer=adam, **rate
    )
    config.checkpoint_steps = 3
    config.log_steps = 1
    config.tensorboard = False
    return config
