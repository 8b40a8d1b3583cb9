# SPDX-License-Identifier: Apache-2.0
"""Train the finest level of a model's decoder further, without an accelerator.

    python -m semlic_jax.training.finest base OUTPUT.npz --data photos/train

The layers of the finest level are a small part of a decoder's weights, and decide what
its texture is made of. What comes before them is computed once for each photograph and
stays as it is. The loss is that of the decoder's stage without the adversary, with the
terms of `objectives/spectrum.py` and with one that holds the picture near that of
before, which an adversary has formed. OUTPUT reads and writes the same files as the
model. With `--checkpoints`, a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from semlic_jax.codec import Codec
from semlic_jax.images import check_outputs, write_file
from semlic_jax.model.compression import (
    QUALITY_LEVELS,
    STRIDE,
    CompressionModel,
    ModelConfig,
)
from semlic_jax.objectives.features import PACKAGED, load_features
from semlic_jax.objectives.losses import LossWeights, charbonnier, weighted_sum
from semlic_jax.option_kinds import positive_float, positive_int, seed_int
from semlic_jax.terminal import progress_line
from semlic_jax.training.checkpoints import Checkpoints
from semlic_jax.training.model_files import with_decoder
from semlic_jax.training.sources import Source, UnusableImage, open_sources
from semlic_jax.training.stages import Optimizer
from semlic_jax.training.steps import (
    Learner,
    Trunk,
    apply_gradients,
    new_learner,
    reconstruction_terms,
)
from semlic_jax.weights import ModelFile, load_model, model_bytes

Array = jax.Array
Tree = Any

_TRUNK = "squeezenet1_0"
WEIGHTS = LossWeights(
    charbonnier=0.6,
    structural=0.7,
    perceptual=0.3,
    mean_style=1.0,
    lattice=6.0,
    spectrum=0.3,
    spectral_power=0.1,
)
CLOSENESS = 0.3  # weight of the distance to the picture before
_SIDE = 320  # of what is used of a photograph, in pixels
_LEAST_LATENTS = 4  # of a crop, for the lattice term
_LEAST_SCALING = 0.9  # photographs are not scaled by less, which would only blur them
_LEVELS = (20, 180)  # qualities: about 0.05 to 0.6 bpp
_HELD_OUT = 20  # each so many photographs, one is kept for the report
_LOGGED_STEPS = 50
_SAVED_STEPS = 100


class Inputs(NamedTuple):
    """What a finest level is trained with, N examples.

    Attributes:
        x: originals, uint8 [N, 320, 320, 3].
        h: input of the finest level, float16 [N, 80, 80, C].
        y_hat: scaled latents, float32 [N, 20, 20, M].
        quality: float32 [N] in [0, 1].
    """

    x: np.ndarray
    h: np.ndarray
    y_hat: np.ndarray
    quality: np.ndarray

    def rows(self, chosen: np.ndarray) -> Inputs:
        """Some of the examples."""
        return Inputs(*(values[chosen] for values in self))


class Batch(NamedTuple):
    """Crops: `Inputs` in float32, originals in [0, 1], and the crops' first latents."""

    x: Any
    h: Any
    y_hat: Any
    quality: Any
    origin: Any


def synthesis(
    config: ModelConfig,
    params: Tree,
    y_hat: Array,
    quality: Array,
    *,
    h: Array | None = None,
    origin: Array | None = None,
) -> tuple[Array, Array]:
    """g_s, with another input of its finest level if `h` is given.

    Under `jit`, what the result does not need is not computed: with `h` the coarser
    levels, and their gradients are 0.

    Args:
        config: the architecture.
        params: those of `CompressionModel`; `g_s` and `log_gain` are used.
        y_hat: scaled latents, float32 [B, h, w, M].
        quality: float32 [B] in [0, 1].
        h: float [B, 4h, 4w, C], for models with blocks of two pixels.
        origin: first latent in the image, int32 [B, 2]; None: (0, 0).

    Returns:
        x_hat [B, 16h, 16w, 3], not clipped, and the input of the finest level.
    """
    last = f"ConvTranspose_{len(config.widths) - 2}"
    seen: list[Array] = []

    def enter(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: Any
    ) -> Array:
        if context.module.name != last or context.method_name != "__call__":
            return call(*args, **kwargs)
        seen.append(args[0])
        return call(args[0] if h is None else h)

    with nn.intercept_methods(enter):
        x_hat: Any = CompressionModel(config).apply(
            {"params": params}, y_hat, quality, origin, method="synthesis"
        )
    return x_hat, seen[0]


def make_inputs(
    codec: Codec,
    source: Source,
    count: int,
    rng: np.random.Generator,
    say: Callable[[str], None] = lambda text: None,
) -> Inputs:
    """Compress photographs, once at a random quality each.

    Args:
        codec: the model.
        source: photographs. None is used twice, so that what is held out is not known.
        count: number of examples at most.
        rng: of the order and the qualities.
        say: is told the progress.

    Raises:
        ValueError: no photograph has sides of 320 pixels.
    """

    examples: list[Inputs] = []
    for number in rng.permutation(len(source)):
        try:
            x = _square(source[int(number)])
        except UnusableImage:
            continue
        level = int(rng.integers(*_LEVELS))
        data = codec.encode(codec.analyse(x), level)
        y_hat = codec.decode_latents(data)[1]
        quality = np.array([level / (QUALITY_LEVELS - 1)], np.float32)
        h = _input_of_finest(codec.config, codec.params, y_hat[None], quality)
        examples.append(Inputs(x, np.asarray(h[0]), y_hat, quality[0]))
        say(f"{len(examples)} of {count} photographs")
        if len(examples) == count:
            break
    if not examples:
        raise ValueError(
            f"expected photographs with sides of at least {_SIDE} pixels, found none "
            f"among {len(source)}"
        )
    return Inputs(*map(np.stack, zip(*examples, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _input_of_finest(
    config: ModelConfig, params: Tree, y_hat: Array, quality: Array
) -> Array:
    return synthesis(config, params, y_hat, quality)[1].astype(jnp.float16)


def _square(pixels: np.ndarray) -> np.ndarray:
    """The middle of a photograph, whose shorter side is scaled down to 320 pixels.

    Raises:
        UnusableImage: it is too small.
    """
    scale = (_SIDE + 1) / min(pixels.shape[:2])
    if scale < _LEAST_SCALING:
        size = [round(side * scale) for side in pixels.shape[1::-1]]
        scaled = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        pixels = np.asarray(scaled)
    if min(pixels.shape[:2]) < _SIDE:
        raise UnusableImage("a side below 320 pixels")
    top, left = ((side - _SIDE) // 2 for side in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + _SIDE, left : left + _SIDE])


def crops(inputs: Inputs, corners: np.ndarray, latents: int) -> Batch:
    """Cut a square of so many latents a side from each example.

    Args:
        inputs: N examples.
        corners: int [N, 2], the first latents.
        latents: side of the crops.
    """

    def cut(values: np.ndarray, pixels_per_latent: int) -> np.ndarray:
        side = latents * pixels_per_latent
        starts = corners * pixels_per_latent
        parts = [
            v[i : i + side, j : j + side]
            for v, (i, j) in zip(values, starts, strict=True)
        ]
        return np.stack(parts).astype(np.float32)

    x = cut(inputs.x, STRIDE) / 255
    h = cut(inputs.h, inputs.h.shape[1] // inputs.y_hat.shape[1])
    return Batch(x, h, cut(inputs.y_hat, 1), inputs.quality, corners.astype(np.int32))


@functools.partial(jax.jit, static_argnums=0)
def measure(
    config: ModelConfig,
    params: Tree,
    before: Tree,
    batch: Batch,
    trunk: Trunk,
    key: Array,
) -> dict[str, Array]:
    """Terms of the loss, float32 [B] each; `before` are the parameters at the start."""
    x_hat, x_before = (
        synthesis(
            config,
            {**before, **each},
            batch.y_hat,
            batch.quality,
            h=batch.h,
            origin=batch.origin,
        )[0]
        for each in (params, before)
    )
    terms = reconstruction_terms(batch.x, x_hat, WEIGHTS, trunk, key)
    return terms | {"closeness": charbonnier(jax.lax.stop_gradient(x_before), x_hat)}


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def update(
    config: ModelConfig,
    optimizer: Optimizer,
    steps: int,
    learner: Learner,
    before: Tree,
    batch: Batch,
    trunk: Trunk,
    key: Array,
) -> tuple[Learner, dict[str, Array]]:
    """One step of `steps`; returns the learner and the means of the terms."""

    def loss(part: Tree) -> tuple[Array, dict[str, Array]]:
        terms = measure(config, part, before, batch, trunk, key)
        weighted = {name: terms[name] for name in terms if name != "closeness"}
        total = weighted_sum(weighted, WEIGHTS) + CLOSENESS * terms["closeness"]
        return jnp.mean(total), {name: jnp.mean(term) for name, term in terms.items()}

    part = {"g_s": learner.params["g_s"]}
    gradients, means = jax.grad(loss, has_aux=True)(part)
    return apply_gradients(learner, gradients, optimizer, steps), means


def train(
    model: ModelFile,
    inputs: Inputs,
    trunk: Trunk,
    *,
    steps: int,
    batch: int,
    latents: int,
    learning_rate: float,
    seed: int = 0,
    folder: Path | None = None,
) -> tuple[ModelFile, dict[str, dict[str, float]]]:
    """Train, and measure the examples that were held out.

    Args:
        model: the model to start from.
        inputs: examples.
        trunk: the feature network.
        steps: number of steps.
        batch: crops in a step.
        latents: side of the crops in latents.
        learning_rate: the highest; it rises over the first tenth and falls to nearly 0.
        seed: of crops and their order.
        folder: of checkpoints, from which a run that was stopped goes on; None: none.

    Returns:
        The model with the average of the last decoders, and means of the terms over
        held-out examples, `before` and `after`.

    Raises:
        ValueError: there are too few examples, a term of the loss is not finite, or the
            checkpoints are of another run or damaged.
    """
    made_of = {
        "model": _digest(model.transforms),
        "examples": _digest(inputs),
        "trunk": _digest(trunk),
        "loss": f"{WEIGHTS}, closeness {CLOSENESS:g}",
        "steps": steps,
        "batch": batch,
        "latents": latents,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    held_out = inputs.rows(np.arange(len(inputs.x)) % _HELD_OUT == 0)
    inputs = inputs.rows(np.arange(len(inputs.x)) % _HELD_OUT != 0)
    if len(inputs.x) < batch:
        raise ValueError(
            f"expected at least {batch} examples beside the {len(held_out.x)} that are "
            f"held out, found {len(inputs.x)}"
        )
    before = {name: model.transforms[name] for name in ("g_s", "log_gain")}
    before = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), before)
    warmup = max(steps // 10, 1)
    optimizer = Optimizer(
        lr=learning_rate,
        warmup_steps=warmup,
        decay_steps=steps - warmup,
        final_rate=0.02,
        ema=0.99,
    )
    learner = new_learner(before, optimizer, steps, ("g_s",))
    # The update gives the learner's arrays away.
    learner = jax.tree.map(jnp.copy, learner)
    key = jax.random.key(seed)
    report = {"before": _means(model.config, before, before, held_out, trunk, latents)}
    with contextlib.ExitStack() as stack:
        checkpoints, start = None, 0
        if folder is not None:
            checkpoints = stack.enter_context(Checkpoints(folder, 2))
            learner, start = _resumed(checkpoints, learner, made_of)
        started_s, rows = time.monotonic(), []
        for step in range(start, steps):
            rng = np.random.default_rng((seed, step))
            chosen = inputs.rows(rng.choice(len(inputs.x), batch, replace=False))
            free = inputs.y_hat.shape[1] - latents + 1
            made = crops(chosen, rng.integers(0, free, (batch, 2)), latents)
            step_key = jax.random.fold_in(key, step)
            learner, means = update(
                model.config, optimizer, steps, learner, before, made, trunk, step_key
            )
            rows.append(means)
            done = step + 1
            if done % _LOGGED_STEPS == 0 or done == steps:
                step_s = (time.monotonic() - started_s) / (done - start)
                _log(done, steps, rows, step_s)
                rows = []
            if checkpoints and (done % _SAVED_STEPS == 0 or done == steps):
                checkpoints.save(done, learner._asdict())
    average = {"g_s": learner.average["g_s"]}
    report["after"] = _means(model.config, average, before, held_out, trunk, latents)
    params = jax.device_get({**before, **average})
    return with_decoder(model, model.config, params), report


def _resumed(
    checkpoints: Checkpoints, learner: Learner, made_of: dict[str, Any]
) -> tuple[Learner, int]:
    """The learner of the last checkpoint and its step, if there is one.

    Raises:
        ValueError: the checkpoints are of another run or damaged.
    """
    record = checkpoints.folder / "run.json"
    found = json.loads(record.read_text()) if record.exists() else made_of
    for name, value in made_of.items():
        if found.get(name) != value:
            raise ValueError(
                f"the checkpoints in {checkpoints.folder} are of a run with other "
                f"settings: {name} was {found.get(name)}, and is {value} now"
            )
    if not record.exists():
        record.write_text(json.dumps(made_of))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        learner._asdict(),
    )
    restored = checkpoints.restore(shapes)
    if restored is None:
        return learner, 0
    state, step = restored
    logging.info("going on from step %d", step)
    return Learner(**state), step


def _digest(tree: Tree) -> str:
    """What tells one set of arrays from another, 16 digits."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf))
    return digest.hexdigest()[:16]


def _log(done: int, steps: int, rows: list[dict[str, Array]], step_s: float) -> None:
    found = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name, value in found.items():
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value} before step {done}")
    logging.info(
        "%d/%d: %s, %.0f min left",
        done,
        steps,
        " ".join(f"{name} {value:.4g}" for name, value in found.items()),
        step_s * (steps - done) / 60,
    )


def _means(
    config: ModelConfig,
    params: Tree,
    before: Tree,
    inputs: Inputs,
    trunk: Trunk,
    latents: int,
) -> dict[str, float]:
    """Means of the terms over the middle of each example."""
    corner = (inputs.y_hat.shape[1] - latents) // 2
    rows = []
    for number in range(len(inputs.x)):
        one = inputs.rows(np.array([number]))
        made = crops(one, np.full((1, 2), corner), latents)
        rows.append(measure(config, params, before, made, trunk, jax.random.key(0)))
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.finest",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("model", help="name or path of the model to start from")
    parser.add_argument("output", type=Path, help="model file to write")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="photographs: folders, globs, .array_record files, tfds:NAME/SPLIT",
    )
    parser.add_argument(
        "--features", help="SqueezeNet's weights; default: SEMLIC_FEATURES"
    )
    parser.add_argument(
        "--trunk",
        choices=(_TRUNK, PACKAGED),
        default=_TRUNK,
        help="feature network of the loss; default: %(default)s",
    )
    for name, kind, value, text in (
        ("examples", positive_int, 800, "photographs to use at most"),
        ("steps", positive_int, 800, "number of steps"),
        ("batch", positive_int, 4, "crops in a step"),
        ("latents", positive_int, 12, "side of the crops in latents of 16 pixels"),
        ("learning-rate", positive_float, 2e-4, "the highest learning rate"),
        ("seed", seed_int, 0, "seed of crops and qualities"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, default=value, help=f"{text}; default: %(default)s"
        )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="folder of checkpoints: the same command again goes on from the last one; "
        "default: none",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an existing OUTPUT"
    )
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        _run(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _run(options: argparse.Namespace) -> None:
    check_outputs([options.output], force=options.force)
    model = load_model(options.model)
    if not isinstance(model, ModelFile):
        raise ValueError(f"{options.model} is a converted model, which is not trained")
    if not _LEAST_LATENTS <= options.latents <= _SIDE // STRIDE:
        raise ValueError(
            f"expected --latents from {_LEAST_LATENTS} to {_SIDE // STRIDE}, found "
            f"{options.latents}"
        )
    packaged = options.trunk == PACKAGED
    network = load_features(None if packaged else options.features, options.trunk)
    source = open_sources(options.data)
    rng = np.random.default_rng(options.seed)
    with progress_line() as say:
        inputs = make_inputs(Codec(model), source, options.examples, rng, say)
    made, report = train(
        model,
        inputs,
        Trunk(network),
        steps=options.steps,
        batch=options.batch,
        latents=options.latents,
        learning_rate=options.learning_rate,
        seed=options.seed,
        folder=options.checkpoints,
    )
    write_file(options.output, model_bytes(made), force=options.force)
    json.dump(report, sys.stdout)
    print()


if __name__ == "__main__":
    main()
