# SPDX-License-Identifier: Apache-2.0
"""A batch under refinement: its settings, its chunks of steps, what it keeps."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from small_trunk import load_small_trunk

from semlic_jax import refinement
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.objective import Weights
from semlic_jax.refinement.steps import Latents

SIZE = (50, 60)
WEIGHTS = dict(
    alpha=0.01,
    gamma=0.5,
    style=0.3,
    mean_style=2.0,
    structure=4.0,
    lattice=7.0,
    mesh=5.0,
)
SETTINGS = refinement.preset(
    5,
    method="sga",
    chunk_steps=2,
    beta=2.5,
    integral=0.07,
    proportional=0.9,
    dtype="bfloat16",
    features=load_small_trunk(),
    **WEIGHTS,
)

pytestmark = pytest.mark.usefixtures("quick_to_compile")


@pytest.fixture(scope="module")
def image(photograph):
    return photograph(*SIZE, seed=3)


@pytest.fixture
def batch(image, fresh):
    return fresh()


@pytest.fixture(scope="module")
def fresh(mini_codec, image):
    """Function () -> the batch as it is before its first step."""
    data = mini_codec.compress(image, quality=0.5)
    made = Batch(mini_codec, SETTINGS, [image], [len(data)], [None], [None], [data])
    before = dict(vars(made))

    def restored():
        vars(made).clear()
        vars(made).update(before, history=[])
        return made

    return restored


def test_settings_are_those_of_the_steps(batch):
    assert batch.weights == Weights(**{k: np.float32(v) for k, v in WEIGHTS.items()})
    static = batch.frozen.static
    assert static.perceptual and static.style and static.mean_style and static.padded
    assert (static.method, static.dtype) == ("sga", "bfloat16")
    assert batch.images.structure and batch.images.lattice and batch.images.mesh
    np.testing.assert_allclose(np.exp(batch.log_beta), 2.5, rtol=1e-6)
    assert batch.target.integral == np.float32(0.07)
    assert batch.target.proportional == np.float32(0.9)


def test_images_are_padded_by_their_edges(batch, image):
    """As the codec does, whose latents are of the padded image too."""
    x = np.asarray(batch.images.x[0])
    whole = np.pad(image, ((0, 14), (0, 4), (0, 0)), mode="edge")
    np.testing.assert_array_equal(x, whole.astype(np.float32) / 255)


class Stepper:
    """Makes the latents that it is told to, and notes what it is asked for."""

    def __init__(self, latents: list[Latents], log_beta, ratios):
        self.latents, self.log_beta, self.ratios = latents, log_beta, ratios
        self.asked = []

    def __call__(self, count, target):
        self.state = SimpleNamespace(
            latents=self.latents[len(self.asked)], log_beta=self.log_beta
        )
        self.asked.append((count, float(target.bpp[0])))
        return self.ratios[len(self.asked) - 1] * self.bpp


def run(batch, latents, ratios=(1.0, 1.0, 1.0), progress=None):
    """Run a batch with these latents as the result of each chunk of steps."""
    stepper = Stepper(latents, batch.log_beta, ratios)
    stepper.bpp = batch.best_terms.bpp
    batch.stepper = lambda: stepper
    return batch.run(progress), stepper.asked


def test_the_last_chunk_has_what_steps_are_left(batch):
    seen = []
    done, asked = run(batch, [batch.start] * 3, progress=seen.append)
    assert done == 5 and [count for count, _ in asked] == [2, 2, 1]
    assert [now.step for now in seen] == [2, 4, 5]
    assert [int(row["step"][0]) for row in batch.history] == [2, 4, 5]


def test_relaxed_rates_are_aimed_beyond_what_rounding_adds(batch):
    """Latents that took a fifth more before they were rounded may do so again."""
    _, asked = run(batch, [batch.start] * 3, ratios=(1.2, 5.0, 1.0))
    aims = np.array([aim for _, aim in asked]) / float(batch.target.bpp[0])
    np.testing.assert_allclose(aims, [1.0, 1.2, 1.4], rtol=1e-5)


def test_the_best_of_relaxed_latents_is_kept(batch):
    """Not those that come later and are only better than the first ones."""
    y, z = batch.start
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(y.shape).astype(np.float32)
    worse, bad = ((y + factor * noise, z) for factor in (1.0, 8.0))
    batch.best = bad
    batch.best_terms = batch.score(bad, batch.images, batch.best_rounding)
    run(batch, [worse, batch.start, worse])
    for kept, expected in zip(batch.best, batch.start, strict=True):
        np.testing.assert_array_equal(kept, expected)
    first, second, third = (row["value"][0] for row in batch.history)
    assert first == third > second == batch.best_terms.value[0]


def test_bits_above_the_target_count_twice(batch):
    target = float(batch.target.bpp[0])
    terms = batch.best_terms
    found = [
        float(
            batch._lagrangian(
                terms._replace(
                    value=jnp.full(1, 3.0), bpp=jnp.full(1, target + excess)
                ),
                np.full(1, 10.0),
            )[0]
        )
        for excess in (-0.2, 0.0, 0.2)
    ]
    assert found == pytest.approx([1.0, 3.0, 7.0], abs=1e-5)
