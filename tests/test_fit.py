# SPDX-License-Identifier: Apache-2.0
"""How the files of a refinement are judged before one of them is chosen."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from small_trunk import load_small_trunk

from semlic_jax import refinement
from semlic_jax.objectives.similarity import ms_ssim
from semlic_jax.refinement.batch import Batch
from semlic_jax.refinement.fit import decoded_values
from semlic_jax.refinement.objective import image_terms, structure_distance

SIZE = (170, 164)  # of a bucket that it does not fill
SETTINGS = refinement.preset(
    1, alpha=1e-4, gamma=0.5, structure=40.0, features=load_small_trunk()
)


@pytest.fixture(scope="module")
def judged(mini_codec, photograph):
    """Function (region, size) -> values of two files, and what they are made of.

    Those are the terms without structure, 1 - MS-SSIM, and the sum of squares for it:
    float [2] each.
    """

    def judge(region=None, size=SIZE):
        image = photograph(*size, seed=3)
        files = [mini_codec.compress(image, quality=q) for q in (0.2, 0.6)]
        budget = len(files[0])
        made = Batch(
            mini_codec, SETTINGS, [image], [budget], [region], [None], files[:1]
        )
        known = made.frozen, made.images
        (found,) = decoded_values(mini_codec, *known, made.weights, [files])

        plain = made.weights._replace(structure=0 * made.weights.structure)
        terms = jax.jit(image_terms)
        parts = []
        for data in files:
            decoded = mini_codec.decompress(data)
            x_hat = np.array(made.images.x)
            x_hat[0, : size[0], : size[1]] = decoded / np.float32(255)
            similarity = (
                float(ms_ssim(image[None], decoded[None])[0])
                if min(size) >= 161
                else np.nan
            )
            parts.append(
                (
                    float(terms(*known, plain, np.zeros(1), x_hat).value[0]),
                    1 - similarity,
                    float(structure_distance(made.images, x_hat)[0]),
                )
            )
        return np.array(found), *np.array(parts).T

    return judge


def test_files_are_judged_by_ms_ssim_itself(judged):
    values, plain, distance, squares = judged()
    weight = SETTINGS.gamma * SETTINGS.structure
    np.testing.assert_allclose(values, plain + weight * distance, rtol=1e-4)
    assert (abs(squares / distance - 1) > 0.01).all()  # so it makes a difference


@pytest.mark.parametrize("case", ["region", "small"])
def test_where_there_is_no_ms_ssim_it_is_the_sum_of_squares(judged, case):
    if case == "region":
        mask = np.zeros(SIZE, np.float32)
        mask[:, :80] = 1
        values, plain, _, squares = judged(refinement.Region(mask, 0.9, 0.1))
    else:
        values, plain, _, squares = judged(size=(160, 170))
    weight = SETTINGS.gamma * SETTINGS.structure
    np.testing.assert_allclose(values, plain + weight * squares, rtol=1e-4)
    assert (squares > 1e-3).all()


def test_images_of_a_batch_are_judged_as_alone(judged, mini_codec, photograph):
    """One by MS-SSIM, the other, with a region, by the sum of squares."""
    mask = np.zeros(SIZE, np.float32)
    mask[:, :80] = 1
    region = refinement.Region(mask, 0.9, 0.1)
    image = photograph(*SIZE, seed=3)
    files = [mini_codec.compress(image, quality=q) for q in (0.2, 0.6)]
    budgets, unrefined = [len(files[0])] * 2, [files[0]] * 2
    made = Batch(
        mini_codec,
        SETTINGS,
        [image, image],
        budgets,
        [None, region],
        [None, None],
        unrefined,
    )
    found = decoded_values(
        mini_codec,
        made.frozen,
        made.images,
        made.weights,
        [files, files[::-1][:1]],
    )
    expected = judged()[0], judged(region)[0][1:]
    for own, alone in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, alone, rtol=1e-4)


def test_for_psnr_files_are_judged_by_the_squared_error(mini_codec, photograph):
    image = photograph(*SIZE, seed=3)
    data = mini_codec.compress(image, quality=0.4)
    settings = dataclasses.replace(SETTINGS, gamma=0.0)
    made = Batch(mini_codec, settings, [image], [len(data)], [None], [None], [data])
    ((value,),) = decoded_values(
        mini_codec, made.frozen, made.images, made.weights, [[data]]
    )
    mse = np.mean((mini_codec.decompress(data).astype(float) - image) ** 2)
    assert value == pytest.approx(settings.alpha * mse, rel=1e-4)
