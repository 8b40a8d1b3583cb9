# SPDX-License-Identifier: Apache-2.0
"""Sweeps with codecs that count and fail, for several test files."""

from __future__ import annotations

from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
)
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import Measures
from semlic_jax.evaluation.sweep import run_sweep

RATES = [1.5, 2.0, 3.0]


class Counting(ClassicalEntrant):
    """A codec that counts how often it works."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.fits = self.decodes = 0

    def fitter(self, image):
        fit = super().fitter(image)

        def counted(bpp):
            self.fits += 1
            return fit(bpp)

        return counted

    def decode(self, data):
        self.decodes += 1
        return super().decode(data)


class Failing(ClassicalEntrant):
    """A codec that fails on one image, known by its height, at one step."""

    def __init__(self, key, error, *, height, step="fit"):
        super().__init__(key)
        self.error, self.height, self.step, self.fits = error, height, step, 0

    def fitter(self, image):
        fit = super().fitter(image)

        def failing(bpp):
            self.fits += 1
            if self.step == "fit" and len(image) == self.height:
                raise self.error
            return fit(bpp)

        return failing

    def decode(self, data):
        image = super().decode(data)
        if self.step == "decode" and len(image) == self.height:
            raise self.error
        return image


def sweep(folder, out, codecs, metrics=("psnr_db",), rates=RATES, **options):
    return run_sweep(
        list_images([folder]), codecs, rates, Measures(metrics), out, **options
    )
