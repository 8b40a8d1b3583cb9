# SPDX-License-Identifier: Apache-2.0
"""Distils the packaged feature network from the taps of SqueezeNet 1.0.

    python -m semlic_jax.training.distil --data PHOTOS... --features DIR --out DIR

1. Pairs: tiles of photographs and distorted versions of them (`distortions.py`), one
   file for each tile in `OUT/pairs`.
2. Projections: for each tap of the teacher, the leading directions of its unit-length
   features and of their differences, as many as the student's tap has channels.
3. Training: the student's unit-length taps learn to match the teacher's, projected onto
   those directions, cell by cell. The differences of the features within each pair are
   matched too, each relative to its own size, however small, so that the gradient of
   the distance points where the teacher's does; so are the distances. One version of
   each photograph in a batch is moved along the student's own gradient, the direction
   in which a network that only ranks images is fooled first.
4. `OUT/compact.npz`: the weights in float16, for `load_features`.

Running the same command again goes on where it stopped. `--evaluate REPORT.json`
measures a finished network against its teacher instead (`distil_report.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from semlic_jax.codec import load
from semlic_jax.images import check_outputs, write_file
from semlic_jax.objectives.features import (
    PACKAGED,
    FeatureNetwork,
    feature_distance,
    load_features,
    normalise_channels,
)
from semlic_jax.objectives.trunks import COMPACT_STAGES, CompactTrunk
from semlic_jax.option_kinds import positive_int
from semlic_jax.training.checkpoints import Checkpoints
from semlic_jax.training.data import Photographs
from semlic_jax.training.distil_report import markdown, report
from semlic_jax.training.distortions import OWN_CODEC, all_distortions
from semlic_jax.training.sources import open_sources

Array = jax.Array
Tree = Any

TEACHER = "squeezenet1_0"
# The distorted versions of each tile.
_DISTORTED = ("jpeg", "jpeg", "webp", "avif", "avif", "blur", "noise", "colour")
_DISTORTED += ("resample", OWN_CODEC, OWN_CODEC)
# Weights of the terms of the loss.
WEIGHTS = {"value": 1.0, "difference": 1.0, "cell": 1.0, "distance": 0.5}
_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
_LOG_EPS = 1e-4  # added to distances, which are about 1e-2 for the slightest distortion
_PREFETCH_BATCHES = 3
_LEAST_CROP = 7  # pixels, of both networks
_PROJECTION_BATCHES = 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The recipe of a distillation.

    Attributes:
        tiles: number of tiles, from photographs drawn with replacement.
        tile: side of a tile in pixels.
        steps: number of optimiser steps.
        photographs: photographs in a batch.
        versions: distorted versions of each photograph in a batch.
        crop: side of the crops in pixels.
        lr: peak learning rate of Adam, after a warm-up of up to 100 steps and before a
            cosine decay.
        seed: seed of everything random.
    """

    tiles: int = 2000
    tile: int = 192
    steps: int = 10_000
    photographs: int = 2
    versions: int = 3
    crop: int = 96
    lr: float = 1.5e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a value is out of its range.
        """
        for name in ("tiles", "steps", "photographs", "versions"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, found {getattr(self, name)}"
                )
        if self.versions > len(_DISTORTED):
            raise ValueError(
                f"versions must be at most {len(_DISTORTED)}, found {self.versions}"
            )
        if not _LEAST_CROP <= self.crop <= self.tile:
            raise ValueError(
                f"crop must be from {_LEAST_CROP} to {self.tile}, the side of a tile, "
                f"found {self.crop}"
            )
        if not 0 < self.lr < np.inf:
            raise ValueError(f"lr must be finite and above 0, found {self.lr}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, found {self.seed}")

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step; it falls to a hundredth of `lr`."""
        warmup = min(100, self.steps // 10)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        done = (step - warmup) / max(self.steps - warmup, 1)
        return self.lr * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * done)))


def make_pairs(folder: Path, patterns: Sequence[str], recipe: Recipe) -> list[Path]:
    """Write the tiles that are missing; return the files of all, in order.

    Each file is an array uint8 [1 + D, side, side, 3], with the original first.

    Raises:
        ValueError: there are no photographs, or the folder has tiles of other
            photographs or with another side or seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_of = {"data": list(patterns), "tile": recipe.tile, "seed": recipe.seed}
    note = folder / "made_of.json"
    if note.exists():
        found = json.loads(note.read_text())
        if found != made_of:
            raise ValueError(f"expected tiles of {made_of} in {folder}, found {found}")
    else:
        write_file(note, json.dumps(made_of).encode())
    paths = [folder / f"{tile:05d}.npy" for tile in range(recipe.tiles)]
    missing = [(tile, path) for tile, path in enumerate(paths) if not path.exists()]
    if not missing:
        return paths
    photographs = Photographs(open_sources(patterns), crop=recipe.tile)
    distortions = all_distortions(load("small"))
    for done, (tile, path) in enumerate(missing, 1):
        original = photographs.example(tile, 0, seed=recipe.seed)
        original = np.rint(original * 255).astype(np.uint8)
        rng = np.random.default_rng((recipe.seed, tile))
        versions = [original]
        for name in _DISTORTED:
            image = distortions[name](original, float(rng.random()), rng)
            if rng.random() < 0.2:  # two distortions, one after the other
                second = str(rng.choice(_DISTORTED))
                image = distortions[second](image, float(rng.random()), rng)
            versions.append(image)
        buffer = io.BytesIO()
        np.save(buffer, np.stack(versions))
        write_file(path, buffer.getvalue(), force=True)
        if done % 100 == 0 or done == len(missing):
            logging.info("pairs: %d of %d tiles", done, len(missing))
    return paths


def example(paths: Sequence[Path], recipe: Recipe, step: int, index: int) -> np.ndarray:
    """A tile's crops, uint8 [1 + versions, crop, crop, 3], by (seed, step, index)."""
    rng = np.random.default_rng((recipe.seed, 1, step, index))
    tile = np.load(paths[rng.integers(len(paths))], mmap_mode="r")
    chosen = rng.permutation(len(tile) - 1)[: recipe.versions] + 1
    top, left = rng.integers(tile.shape[1] - recipe.crop + 1, size=2)
    area = (slice(top, top + recipe.crop), slice(left, left + recipe.crop))
    images = np.stack([tile[version][area] for version in (0, *chosen)])
    return images[:, :, ::-1] if rng.random() < 0.5 else images


def batches(
    paths: Sequence[Path], recipe: Recipe, start: int, stop: int
) -> Iterator[np.ndarray]:
    """Yield each step's batch, uint8 [photographs, 1 + versions, crop, crop, 3]."""
    with ThreadPoolExecutor(1) as pool:

        def submit(step: int) -> list:
            return [
                pool.submit(example, paths, recipe, step, index)
                for index in range(recipe.photographs)
            ]

        ahead = min(start + _PREFETCH_BATCHES, stop)
        waiting = [submit(step) for step in range(start, ahead)]
        for step in range(start, stop):
            if step + _PREFETCH_BATCHES < stop:
                waiting.append(submit(step + _PREFETCH_BATCHES))
            yield np.stack([future.result() for future in waiting.pop(0)])


def _unit_taps(network: FeatureNetwork, images: Array) -> list[Array]:
    """Unit-length features of images [B, V, H, W, 3], per tap [B, V, h, w, C]."""
    flat = images.reshape(-1, *images.shape[2:])
    taps = [normalise_channels(tap) for tap in network.apply(flat)]
    return [tap.reshape(*images.shape[:2], *tap.shape[1:]) for tap in taps]


def _pair_distances(taps: Array) -> tuple[Array, Array]:
    """Differences of the versions from the original, and their mean square.

    Args:
        taps: [B, 1 + V, h, w, C].

    Returns:
        The differences [B, V, h, w, C], and over cells the mean of their squared
        lengths [B, V].
    """
    difference = taps[:, 1:] - taps[:, :1]
    square = jnp.sum(jnp.square(difference), axis=-1)
    return difference, jnp.mean(square, axis=(-2, -1))


@jax.jit
def _second_moments(teacher: FeatureNetwork, images: Array) -> list[Array]:
    """Second moments [C, C] of each tap: of features plus those of differences.

    The differences of each pair are scaled to a mean square of 1.
    """
    moments = []
    for tap in _unit_taps(teacher, images.astype(jnp.float32) / 255):
        difference, distance = _pair_distances(tap)
        difference *= jax.lax.rsqrt(distance + _LOG_EPS)[..., None, None, None]
        flat, moved = (x.reshape(-1, x.shape[-1]) for x in (tap, difference))
        moments.append(flat.T @ flat / len(flat) + moved.T @ moved / len(moved))
    return moments


def make_projections(
    teacher: FeatureNetwork, batch_source: Iterator[np.ndarray]
) -> list[np.ndarray]:
    """Leading directions of each tap: orthonormal columns [C, student's channels]."""
    rows = [_second_moments(teacher, images) for images in batch_source]
    projections = []
    for moments, (channels, _) in zip(
        zip(*rows, strict=True), COMPACT_STAGES.values(), strict=True
    ):
        _, vectors = np.linalg.eigh(np.mean(jax.device_get(moments), axis=0))
        projections.append(vectors[:, ::-1][:, :channels].astype(np.float32))
    return projections


def _blend(images: Array, rng: Array) -> Array:
    """Weaken or exaggerate half of the versions: x + a (x_hat - x), a in 0.2 ... 1.3.

    Args:
        images: float [B, 1 + V, H, W, 3].
    """
    draw, amount = jax.random.split(rng)
    shape = (*images.shape[:2], 1, 1, 1)
    amounts = jax.random.uniform(amount, shape, minval=0.2, maxval=1.3)
    amounts = jnp.where(jax.random.bernoulli(draw, 0.5, shape), amounts, 1.0)
    original = images[:, :1]
    return jnp.clip(original + amounts * (images - original), 0, 1)


def _along_gradient(student: FeatureNetwork, images: Array, rng: Array) -> Array:
    """Move the last version of each photograph along the student's own gradient.

    The root mean square of the move is 0.2 to 4 grey levels, up or down the gradient.
    """
    original, moved = images[:, 0], images[:, -1]

    def distance(x_hat: Array) -> Array:
        return jnp.sum(feature_distance(student.apply(original), student.apply(x_hat)))

    gradient = jax.grad(distance)(moved)
    square = jnp.mean(jnp.square(gradient), axis=(1, 2, 3), keepdims=True)
    size, sign = jax.random.split(rng)
    shape = (len(moved), 1, 1, 1)
    levels = jnp.exp(
        jax.random.uniform(size, shape, minval=jnp.log(0.2), maxval=jnp.log(4.0))
    )
    levels *= jax.random.rademacher(sign, shape)
    moved = moved + levels / 255 * gradient * jax.lax.rsqrt(square + 1e-20)
    moved = jax.lax.stop_gradient(jnp.clip(moved, 0, 1))
    return jnp.concatenate([images[:, :-1], moved[:, None]], axis=1)


def terms(
    student: FeatureNetwork,
    teacher_taps: Sequence[Array],
    projections: Sequence[Array],
    images: Array,
) -> dict[str, Array]:
    """Terms of the loss, weighted by WEIGHTS and summed over taps; float32 scalars.

    Let s be the student's unit-length taps, t the teacher's, p the projection of t, d
    the difference of a version from its original, and D the mean of the teacher's
    |d t|^2 over a pair's cells:

        value       mean |s - p / |p||^2
        difference  mean |d s - d p|^2 / D
        cell        mean (|d s| - |d t|)^2 / D
        distance    (log D_s - log D)^2, for each tap and for their sum
    """
    student_taps = _unit_taps(student, images)
    totals = {name: jnp.float32(0) for name in ("value", "difference", "cell")}
    logs = []
    sums = [jnp.float32(0), jnp.float32(0)]
    for s, t, projection in zip(student_taps, teacher_taps, projections, strict=True):
        p = t @ projection
        dt, distance = _pair_distances(t)
        ds, own_distance = _pair_distances(s)
        dp = p[:, 1:] - p[:, :1]
        scale = 1 / (distance[..., None, None] + _LOG_EPS)
        square = jnp.sum(jnp.square(s - normalise_channels(p)), axis=-1)
        totals["value"] += jnp.mean(square)
        square = jnp.sum(jnp.square(ds - dp), axis=-1)
        totals["difference"] += jnp.mean(square * scale)
        own_length, length = (
            jnp.sqrt(jnp.sum(jnp.square(d), axis=-1) + _LOG_EPS) for d in (ds, dt)
        )
        totals["cell"] += jnp.mean(jnp.square(own_length - length) * scale)
        sums = [sums[0] + own_distance, sums[1] + distance]
        logs.append(jnp.log(own_distance + _LOG_EPS) - jnp.log(distance + _LOG_EPS))
    logs.append(jnp.log(sums[0] + _LOG_EPS) - jnp.log(sums[1] + _LOG_EPS))
    totals["distance"] = sum(jnp.mean(jnp.square(log)) for log in logs)
    return {name: WEIGHTS[name] * total for name, total in totals.items()}


def initial_state(seed: int) -> Tree:
    """Random parameters and a fresh optimiser."""
    images = jnp.zeros((1, 64, 64, 3))
    params = CompactTrunk().init(jax.random.key(seed), images)["params"]
    return {"params": params, "optimizer": _OPTIMIZER.init(params)}


def step_key(recipe: Recipe, step: int) -> Array:
    """Random key of a step; the packaged weights were made with those of seed 0."""
    return jax.random.fold_in(jax.random.key(recipe.seed + 7), step)


@partial(jax.jit, donate_argnums=2)
def update(
    teacher: FeatureNetwork,
    projections: Sequence[Array],
    state: Tree,
    images: Array,
    rng: Array,
    learning_rate: Array,
) -> tuple[Tree, dict[str, Array]]:
    """Take a step on uint8 images [B, 1 + V, H, W, 3]; return new state and terms."""
    blend, move = jax.random.split(rng)
    module = CompactTrunk()
    images = _blend(images.astype(jnp.float32) / 255, blend)
    images = _along_gradient(FeatureNetwork(state["params"], module), images, move)
    teacher_taps = _unit_taps(teacher, images)

    def loss(params: Tree) -> tuple[Array, dict[str, Array]]:
        student = FeatureNetwork(params, module)
        found = terms(student, teacher_taps, projections, images)
        return sum(found.values(), jnp.float32(0)), found

    gradient, found = jax.grad(loss, has_aux=True)(state["params"])
    updates, optimizer = _OPTIMIZER.update(gradient, state["optimizer"])
    updates = jax.tree.map(lambda update: -learning_rate * update, updates)
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "optimizer": optimizer}, found


def distil(
    out: Path,
    patterns: Sequence[str],
    features: Path,
    recipe: Recipe,
    *,
    start_from: Path | None = None,
    log_steps: int = 50,
    checkpoint_steps: int = 250,
) -> Path:
    """Run a distillation to its end; return the path of the weights.

    Args:
        out: folder of the run.
        patterns: folders or globs of photographs.
        features: the teacher's weights.
        recipe: see `Recipe`.
        start_from: weights to start from; None: random ones.
        log_steps, checkpoint_steps: steps between log rows and between checkpoints.

    Raises:
        ValueError: there are no photographs or no teacher's weights, or a term of the
            loss is not finite.
    """
    teacher = load_features(features, TEACHER)
    paths = make_pairs(out / "pairs", patterns, recipe)
    table = out / "projections.npz"
    if not table.exists():
        source = batches(
            paths, recipe, recipe.steps, recipe.steps + _PROJECTION_BATCHES
        )
        buffer = io.BytesIO()
        np.savez(buffer, *make_projections(teacher, source))
        write_file(table, buffer.getvalue(), force=True)
    with np.load(table) as arrays:
        projections = [jnp.asarray(arrays[key]) for key in arrays.files]
    first = initial_state(recipe.seed)
    if start_from is not None:
        first["params"] = dict(load_features(start_from, PACKAGED).params)
    shapes = jax.eval_shape(lambda: first)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes
    )
    with Checkpoints(out / "checkpoints", 2) as checkpoints:
        restored = checkpoints.restore(shapes)
        state, start = restored or (first, 0)
        begun, rows = time.monotonic(), []
        for step, images in enumerate(
            batches(paths, recipe, start, recipe.steps), start
        ):
            rate = jnp.float32(recipe.learning_rate(step))
            state, found = update(
                teacher, projections, state, images, step_key(recipe, step), rate
            )
            rows.append(found)
            done = step + 1
            if done % log_steps == 0 or done == recipe.steps:
                _log(out, done, start, recipe, begun, jax.device_get(rows))
                rows = []
            if done % checkpoint_steps == 0 or done == recipe.steps:
                checkpoints.save(done, state)
    path = out / "compact.npz"
    write_file(path, packed(jax.device_get(state["params"])), force=True)
    return path


def _log(
    out: Path, done: int, start: int, recipe: Recipe, begun: float, rows: list[dict]
) -> None:
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for name, value in means.items():
        if not np.isfinite(value):
            raise ValueError(f"{name} is {value} before step {done}")
    seconds = (time.monotonic() - begun) / (done - start)
    means |= {"step": done, "seconds_per_step": seconds}
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(means) + "\n")
    logging.info(
        "%d/%d: %s, %.0f min left",
        done,
        recipe.steps,
        " ".join(f"{name} {value:.4g}" for name, value in means.items()),
        (recipe.steps - done) * seconds / 60,
    )


def packed(params: Tree) -> bytes:
    """Bytes of a weight file as `objectives.feature_weights` reads it, in float16."""
    arrays: dict[str, np.ndarray] = {
        "network": np.asarray(PACKAGED),
        "preprocessing": np.asarray(CompactTrunk().preprocessing),
    }
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        arrays["/".join(key.key for key in keys)] = np.asarray(leaf, np.float16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.distil",
        description="Distil the packaged feature network, or evaluate it.",
    )
    parser.add_argument(
        "--data", required=True, nargs="+", help="photographs: folders or globs"
    )
    parser.add_argument(
        "--features", type=Path, help="the teacher's weights; default: SEMLIC_FEATURES"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder of the distillation"
    )
    parser.add_argument(
        "--start-from", type=Path, metavar="FILE", help="weights to start from"
    )
    parser.add_argument(
        "--evaluate",
        type=Path,
        metavar="REPORT.json",
        help="evaluate the network and write this report",
    )
    parser.add_argument(
        "--trunk",
        type=Path,
        metavar="FILE",
        help="weights to evaluate; default: the packaged network",
    )
    parser.add_argument(
        "--images", type=positive_int, help="evaluate on at most this many photographs"
    )
    parser.add_argument("--force", action="store_true", help="replace an old report")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default)
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in ("orbax", "absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if options.evaluate is None and options.out is None:
        parser.error("expected --out to distil or --evaluate, found neither")
    try:
        _run(options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _run(options: argparse.Namespace) -> None:
    fields = (field.name for field in dataclasses.fields(Recipe))
    recipe = Recipe(**{name: getattr(options, name) for name in fields})
    if options.evaluate is not None:
        check_outputs([options.evaluate], force=options.force)
        student = load_features(options.trunk, PACKAGED)
        teacher = load_features(options.features, TEACHER)
        found = report(teacher, student, options.data, limit=options.images)
        text = json.dumps(found, indent=2) + "\n"
        print(markdown(found))
        write_file(options.evaluate, text.encode(), force=options.force)
    else:
        first = options.start_from
        path = distil(
            options.out, options.data, options.features, recipe, start_from=first
        )
        print(path)


if __name__ == "__main__":
    main()
