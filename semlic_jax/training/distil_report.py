# SPDX-License-Identifier: Apache-2.0
"""How well a distilled feature network replaces its teacher, on held-out photographs.

In: the distances of both networks between photographs and their distortions, the rank
correlations of those distances, the directions of their gradients, what descending one
distance does to the other, and the speed of both. Out: the distillation and the command
for both (`distil.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import spearmanr

from semlic_jax.codec import load
from semlic_jax.objectives.features import FeatureNetwork, feature_distance
from semlic_jax.objectives.similarity import ms_ssim
from semlic_jax.training.distortions import OWN_CODEC, all_distortions
from semlic_jax.training.sources import open_sources

Array = jax.Array

_SIDE = 256  # of the central square of each photograph that is used
_STRENGTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_CODECS = ("jpeg", "webp", "avif", OWN_CODEC)
_GRADIENT_IMAGES, _GRADIENT_SIDE, _GRADIENT_STRENGTH = 8, 128, 0.6
_GRADIENT_KINDS = ("jpeg", "avif", "blur", OWN_CODEC)
_DESCENT_KINDS = ("jpeg", OWN_CODEC)
_DESCENT_STEPS, _DESCENT_LEVELS = 60, 0.5
_SPEED_SHAPE, _SPEED_RUNS = (1, 512, 768, 3), 5


@jax.jit
def _distances(network: FeatureNetwork, original: Array, versions: Array) -> Array:
    """Distances of uint8 versions [V, H, W, 3] to their original, float32 [V]."""
    x, x_hat = (a.astype(jnp.float32) / 255 for a in (original[None], versions))
    taps = [jnp.repeat(tap, len(versions), axis=0) for tap in network.apply(x)]
    return feature_distance(taps, network.apply(x_hat))


@jax.jit
def _paired_distances(network: FeatureNetwork, x: Array, x_hat: Array) -> Array:
    """Distance of each pair of float images [B, H, W, 3], float32 [B]."""
    return feature_distance(network.apply(x), network.apply(x_hat))


@jax.jit
def gradients(network: FeatureNetwork, x: Array, x_hat: Array) -> Array:
    """Gradient of each pair's distance with respect to x_hat, float32 [B, H, W, 3]."""
    taps = network.apply(x)
    return jax.grad(
        lambda moved: jnp.sum(feature_distance(taps, network.apply(moved)))
    )(x_hat)


def _descend(network: FeatureNetwork, x: Array, x_hat: Array) -> Array:
    """Pixels x_hat after descending a network's distance to x with Adam."""
    optimizer = optax.adam(_DESCENT_LEVELS / 255)
    state = optimizer.init(x_hat)
    for _ in range(_DESCENT_STEPS):
        updates, state = optimizer.update(gradients(network, x, x_hat), state)
        x_hat = jnp.clip(optax.apply_updates(x_hat, updates), 0, 1)
    return x_hat


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(np.ravel(a), np.ravel(b)).statistic)


def rank_correlations(
    measured: Mapping[str, np.ndarray], kinds: Sequence[str]
) -> dict[str, Any]:
    """Spearman's rank correlations of measured values.

    Args:
        measured: "teacher", "student" and "ms_ssim", each [images, kinds, strengths].
        kinds: names along the second axis.

    Returns:
        Correlations of the student with the teacher over all pairs (`pooled`), within
        each image (`within_image_mean`, `within_image_least`), within each kind of
        distortion (`kinds`) and among codecs alone (`codecs_pooled`,
        `codecs_within_image_mean`); and of each of the two with MS-SSIM over all pairs.
    """
    student, teacher = measured["student"], measured["teacher"]

    def within(columns: Sequence[int]) -> list[float]:
        return [
            _rank_correlation(a[list(columns)], b[list(columns)])
            for a, b in zip(student, teacher, strict=True)
        ]

    everything = within(range(len(kinds)))
    codecs = [kinds.index(name) for name in _CODECS if name in kinds]
    return {
        "pooled": _rank_correlation(student, teacher),
        "within_image_mean": float(np.mean(everything)),
        "within_image_least": float(np.min(everything)),
        "kinds": {
            name: _rank_correlation(student[:, column], teacher[:, column])
            for column, name in enumerate(kinds)
        },
        "codecs_pooled": _rank_correlation(student[:, codecs], teacher[:, codecs]),
        "codecs_within_image_mean": float(np.mean(within(codecs))),
        "student_with_ms_ssim": _rank_correlation(student, measured["ms_ssim"]),
        "teacher_with_ms_ssim": _rank_correlation(teacher, measured["ms_ssim"]),
    }


def report(
    teacher: FeatureNetwork,
    student: FeatureNetwork,
    patterns: Sequence[str],
    *,
    limit: int | None = None,
) -> dict[str, Any]:
    """Everything that a model card says about a distilled network.

    The student's architecture with random weights is measured too: nearly any network
    ranks distortions, so a rank correlation says little unless it is compared with that
    of random weights.

    Args:
        teacher, student: the networks.
        patterns: folders or globs of photographs that neither was trained on.
        limit: how many of the photographs to use, from the first; None: all.

    Raises:
        ValueError: there are no photographs of at least 256 pixels a side.
    """
    source = open_sources(patterns)
    images = [source[index] for index in range(min(len(source), limit or len(source)))]
    images = [
        _middle(image, _SIDE) for image in images if min(image.shape[:2]) >= _SIDE
    ]
    if not images:
        raise ValueError(
            f"expected photographs of at least {_SIDE} pixels a side, found none"
        )
    distortions = all_distortions(load("small"))
    kinds = list(distortions)
    networks = {
        "teacher": teacher,
        "student": student,
        "untrained": untrained(student.module),
    }
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*networks, "ms_ssim")}
    pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
    for index, image in enumerate(images):
        rng = np.random.default_rng(index)
        versions = np.stack(
            [
                distort(image, strength, rng)
                for distort in distortions.values()
                for strength in _STRENGTHS
            ]
        )
        for name, network in networks.items():
            rows[name].append(np.asarray(_distances(network, image, versions)))
        rows["ms_ssim"].append(
            np.concatenate([ms_ssim(image, version) for version in versions])
        )
        if index < _GRADIENT_IMAGES:
            for name in _GRADIENT_KINDS:
                moved = distortions[name](image, _GRADIENT_STRENGTH, rng)
                pairs.append((name, image, moved))
        logging.info("measured %d of %d photographs", index + 1, len(images))
    shape = (len(images), len(kinds), len(_STRENGTHS))
    measured = {name: np.stack(row).reshape(shape) for name, row in rows.items()}
    ratio = measured["student"] / measured["teacher"]
    return {
        "images": len(images),
        "side": _SIDE,
        "strengths": list(_STRENGTHS),
        "rank_correlation": rank_correlations(measured, kinds),
        "rank_correlation_untrained": rank_correlations(
            measured | {"student": measured["untrained"]}, kinds
        ),
        "ratio_of_distances": dict(
            zip(
                ("5%", "50%", "95%"),
                map(float, np.quantile(ratio, (0.05, 0.5, 0.95))),
                strict=True,
            )
        ),
        "gradients": _compare_gradients(networks, pairs),
        "seconds": _speed(teacher, student),
    }


def untrained(module: Any) -> FeatureNetwork:
    """A network with random weights."""
    images = jnp.zeros((1, 32, 32, 3))
    return FeatureNetwork(module.init(jax.random.key(0), images)["params"], module)


def _compare_gradients(
    networks: Mapping[str, FeatureNetwork],
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> dict[str, Any]:
    """Cosines with the teacher's gradients, and what is left after descending each.

    The latter is the share of the teacher's distance that is left; descending the
    teacher itself gives the best value possible.
    """

    def of(kinds: Sequence[str]) -> tuple[Array, Array]:
        chosen = [(a, b) for name, a, b in pairs if name in kinds]
        x, x_hat = (
            jnp.stack([_middle(image, _GRADIENT_SIDE) for image in side]) / 255.0
            for side in zip(*chosen, strict=True)
        )
        return x, x_hat

    found: dict[str, Any] = {}
    for name, network in networks.items():
        cosines = {}
        for kind in _GRADIENT_KINDS:
            g, h = (gradients(n, *of([kind])) for n in (networks["teacher"], network))
            cosine = jnp.sum(g * h, (1, 2, 3)) / jnp.sqrt(
                jnp.sum(g * g, (1, 2, 3)) * jnp.sum(h * h, (1, 2, 3))
            )
            cosines[kind] = float(jnp.mean(cosine))
        x, x_hat = of(_DESCENT_KINDS)
        before, after = (
            _paired_distances(networks["teacher"], x, moved)
            for moved in (x_hat, _descend(network, x, x_hat))
        )
        left = float(jnp.exp(jnp.mean(jnp.log(after / before))))
        found[name] = {"cosine": cosines, "share_of_distance_left": left}
    return found


def _speed(teacher: FeatureNetwork, student: FeatureNetwork) -> dict[str, float]:
    """Median seconds of a distance and of its gradient at 768 x 512."""
    rng = np.random.default_rng(0)
    x, x_hat = (jnp.asarray(rng.random(_SPEED_SHAPE, np.float32)) for _ in range(2))
    programs: dict[str, Callable[..., Array]] = {
        "distance": _paired_distances,
        "gradient": gradients,
    }
    found = {}
    for name, network in (("teacher", teacher), ("student", student)):
        for kind, program in programs.items():
            times = []
            for _ in range(_SPEED_RUNS + 1):
                begun = time.perf_counter()
                program(network, x, x_hat).block_until_ready()
                times.append(time.perf_counter() - begun)
            found[f"{name}_{kind}"] = float(np.median(times[1:]))  # the first compiles
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of a model card, made from a `report`."""
    ranks = [found["rank_correlation"], found["rank_correlation_untrained"]]
    lines = [
        "| rank correlation with the teacher | trained | random weights |",
        "|---|---|---|",
    ]
    rows = [
        ("all pairs", "pooled"),
        ("within an image, mean", "within_image_mean"),
        ("within an image, least", "within_image_least"),
        ("codecs alone, all pairs", "codecs_pooled"),
        ("codecs alone, within an image, mean", "codecs_within_image_mean"),
    ]
    for label, key in rows:
        values = " | ".join(f"{rank[key]:.4f}" for rank in ranks)
        lines.append(f"| {label} | {values} |")
    for kind in ranks[0]["kinds"]:
        values = " | ".join(f"{rank['kinds'][kind]:.4f}" for rank in ranks)
        lines.append(f"| {kind} | {values} |")
    lines += [
        f"| with MS-SSIM (the teacher: {ranks[0]['teacher_with_ms_ssim']:.4f}) | "
        + " | ".join(f"{rank['student_with_ms_ssim']:.4f}" for rank in ranks)
        + " |",
        "",
        "| gradients | teacher | trained | random weights |",
        "|---|---|---|---|",
    ]
    networks = [
        found["gradients"][name] for name in ("teacher", "student", "untrained")
    ]
    for kind in networks[0]["cosine"]:
        values = " | ".join(f"{network['cosine'][kind]:.3f}" for network in networks)
        lines.append(f"| cosine with the teacher's, {kind} | {values} |")
    values = " | ".join(f"{each['share_of_distance_left']:.3f}" for each in networks)
    lines += [
        f"| teacher's distance left after {_DESCENT_STEPS} steps down | {values} |",
        "",
        f"| at {_SPEED_SHAPE[2]} x {_SPEED_SHAPE[1]} | teacher | trained |",
        "|---|---|---|",
    ]
    for kind in ("distance", "gradient"):
        values = " | ".join(
            f"{1000 * found['seconds'][f'{name}_{kind}']:.0f} ms"
            for name in ("teacher", "student")
        )
        lines.append(f"| {kind} | {values} |")
    return "\n".join(lines) + "\n"
