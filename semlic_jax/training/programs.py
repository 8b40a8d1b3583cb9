# SPDX-License-Identifier: Apache-2.0
"""A stage as a program: its first state, its update, and pictures of what it does.

The state of a program is a dict of trees: `params`, `average` and `optimizer` of the
network that the stage trains (a `Learner`), and whatever else the stage changes. It is
what a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from semlic_jax.model.compression import CompressionModel
from semlic_jax.training.labeller_steps import labeller_update
from semlic_jax.training.settings import Settings
from semlic_jax.training.sharding import (
    batch_sharding,
    place,
    replicated,
    state_sharding,
)
from semlic_jax.training.stages import LabellerStage, Stage
from semlic_jax.training.steps import (
    Learner,
    Metrics,
    Networks,
    Trunk,
    codec_update,
    discriminator_update,
    new_learner,
    seen_taps,
)

Array = jax.Array
Tree = Any
State = dict[str, Tree]

# Qualities that the pictures show.
SHOWN_QUALITIES = (0.0, 0.5, 1.0)


class Program(NamedTuple):
    """One stage, ready to run.

    Attributes:
        shapes: shapes of the state's leaves, with the sharding of each.
        start: () -> state at step 0.
        update: (state, step, images) -> (state, metrics). The old state is donated.
        show: (state, images) -> reconstructions under the averaged parameters, each
            [B, H, W, 3] and on every device: one for each of several qualities of the
            codec, a single one of the labeller.
    """

    shapes: State
    start: Callable[[], State]
    update: Callable[[State, int, Array], tuple[State, Metrics]]
    show: Callable[[State, Array], list[Array]]


class Run(NamedTuple):
    """What all stages share.

    Attributes:
        settings: the configuration.
        mesh: the devices.
        networks: the modules.
        trunk: the feature network, on the devices; None if no term needs it.
    """

    settings: Settings
    mesh: Mesh
    networks: Networks
    trunk: Trunk | None


def make_run(settings: Settings, mesh: Mesh, trunk: Trunk | None) -> Run:
    """Make the modules of a configuration, and put the trunk on the devices."""
    dtype = jnp.dtype(settings.dtype)
    labeller = settings.labeller.clone(dtype=dtype)
    networks = Networks(
        model=CompressionModel(
            settings.model_config, dtype=dtype, remat=settings.remat
        ),
        discriminator=settings.discriminator.clone(
            dtype=dtype, classes=labeller.code_count + 1
        ),
        labeller=labeller,
    )
    if trunk is not None:
        trunk = place(trunk, replicated(mesh))
    return Run(settings, mesh, networks, trunk)


def codec_program(
    run: Run, stage: Stage, params: Callable[[], Tree], labeller: Tree
) -> Program:
    """The program of a codec stage, with its discriminator if it has an adversary.

    Args:
        run: what all stages share.
        stage: the stage's record.
        params: () -> parameters of the codec to start from; not called if the stage
            goes on from a checkpoint.
        labeller: the labeller's parameters, or `{"codes": ...}` of `feature_codes`, if
            the adversary needs them; else None.
    """
    classes = {"features": stage.adversary.code_count + 1}.get(stage.adversary.codes)
    classes = 2 if stage.adversary.binary else classes
    if classes:
        discriminator = run.networks.discriminator.clone(classes=classes)
        run = run._replace(
            networks=dataclasses.replace(run.networks, discriminator=discriminator)
        )
    networks, trunk = run.networks, run.trunk
    seed = run.settings.stage_seed(stage.name)
    adversarial = bool(stage.weights.adversarial)
    on_all = replicated(run.mesh)
    if labeller is not None:
        labeller = jax.device_put(labeller, on_all)

    def start(params: Tree) -> State:
        learner = new_learner(params, stage.optimizer, stage.steps, stage.trained)
        state: State = learner._asdict()
        if adversarial:
            fresh = initial_discriminator(run)
            optimizer = stage.adversary.optimizer
            state["discriminator"] = new_learner(
                fresh, optimizer, stage.steps
            )._asdict()
        return state

    shapes = _shapes(run, start, codec_shapes(networks.model))
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    other_places = places.pop("discriminator", None)
    codec_places = Learner(**places)
    update_codec = jax.jit(
        codec_update(networks, stage, seed),
        donate_argnums=0,
        out_shardings=(
            codec_places,
            on_all,
            batch_sharding(run.mesh) if adversarial else None,
        ),
    )
    if adversarial:
        update_discriminator = jax.jit(
            discriminator_update(networks, stage),
            donate_argnums=0,
            out_shardings=(Learner(**other_places), on_all),
        )

    def update(state: State, step: int, images: Array) -> tuple[State, Metrics]:
        state = dict(state)
        other = Learner(**state.pop("discriminator")) if adversarial else None
        learner, metrics, fakes = update_codec(
            Learner(**state),
            np.int32(step),
            images,
            trunk,
            other.params if other else None,
            labeller,
        )
        state = learner._asdict()
        if other:
            other, more = update_discriminator(other, fakes, trunk)
            state["discriminator"] = other._asdict()
            metrics |= more
        return state, metrics

    @partial(jax.jit, out_shardings=on_all)
    def reconstruct(params: Tree, images: Array, quality: Array) -> Array:
        model = networks.model.clone(arithmetic=stage.arithmetic)
        quality = jnp.full(images.shape[0], quality)
        # The key only draws the noise of the rate, which is not used here.
        key = jax.random.key(0)
        return model.apply({"params": params}, images, quality, key).x_hat

    def show(state: State, images: Array) -> list[Array]:
        return [
            reconstruct(state["average"], images, np.float32(quality))
            for quality in SHOWN_QUALITIES
        ]

    return Program(shapes, _starter(start, params, shapes), update, show)


def labeller_program(run: Run, stage: LabellerStage) -> Program:
    """The program of the VQ-VAE labeller's stage."""
    networks, trunk = run.networks, run.trunk
    on_all = replicated(run.mesh)

    def start(params: Tree) -> State:
        # Nothing is in use yet: the first update moves every code onto an embedding.
        usage = jnp.zeros(networks.labeller.code_count)
        learner = new_learner(params, stage.optimizer, stage.steps)
        return {**learner._asdict(), "usage": usage}

    params = jax.tree.map(np.asarray, initial_labeller(run))
    shapes = _shapes(run, start, params)
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    usage_place = places.pop("usage")
    update_labeller = jax.jit(
        labeller_update(networks, stage, run.settings.stage_seed(stage.name)),
        donate_argnums=(0, 1),
        out_shardings=(Learner(**places), usage_place, on_all),
    )

    def update(state: State, step: int, images: Array) -> tuple[State, Metrics]:
        state = dict(state)
        usage = state.pop("usage")
        learner, usage, metrics = update_labeller(
            Learner(**state), usage, np.int32(step), images, trunk
        )
        return {**learner._asdict(), "usage": usage}, metrics

    @partial(jax.jit, out_shardings=on_all)
    def reconstruct(params: Tree, images: Array) -> Array:
        return networks.labeller.apply({"params": params}, images).x_hat

    def show(state: State, images: Array) -> list[Array]:
        return [reconstruct(state["average"], images)]

    return Program(shapes, _starter(start, lambda: params, shapes), update, show)


def codec_shapes(model: CompressionModel) -> Tree:
    """Shapes of the codec's parameters, without computing them."""
    key = jax.random.key(0)
    x, quality = jnp.zeros((1, 64, 64, 3)), jnp.zeros(1)
    return jax.eval_shape(model.init, key, x, quality, key)["params"]


def _shapes(run: Run, start: Callable[[Tree], State], params: Tree) -> State:
    """Shapes and shardings of the state's leaves, without computing them."""
    shapes = jax.eval_shape(start, params)
    places = state_sharding(run.mesh, shapes, shard_from=run.settings.mesh.shard_from)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=place
        ),
        shapes,
        places,
    )


def _starter(
    start: Callable[[Tree], State], params: Callable[[], Tree], shapes: State
) -> Callable[[], State]:
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    return lambda: jax.jit(start, out_shardings=places)(params())


def initial_discriminator(run: Run) -> Tree:
    """Fresh parameters of the discriminator."""
    module, settings = run.networks.discriminator, run.settings
    side = max(module.multiple, 64)
    channels = settings.model_config.latent_channels
    images = jnp.zeros((1, side, side, 3))
    y_hat = jnp.zeros((1, side // 16, side // 16, channels))
    key = jax.random.fold_in(jax.random.key(settings.seed), 1)
    taps = seen_taps(module, run.trunk, images)
    return module.init(key, images, y_hat, taps)["params"]


def initial_labeller(run: Run) -> Tree:
    """Fresh parameters of the labeller."""
    key = jax.random.fold_in(jax.random.key(run.settings.seed), 2)
    images = jnp.zeros((1, 64, 64, 3))
    return jax.jit(run.networks.labeller.init)(key, images)["params"]
