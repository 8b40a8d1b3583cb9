# SPDX-License-Identifier: Apache-2.0
"""Codecs by name, as an evaluation takes them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from semlic_jax.evaluation.codecs import CODECS, Jpeg
from semlic_jax.evaluation.entrants import (
    ClassicalEntrant,
    RefinedEntrant,
    SemlicEntrant,
    TooSmallError,
    entrants,
    refinement_identity,
)
from semlic_jax.objectives.features import FeatureNetwork
from semlic_jax.refinement import preset


@pytest.mark.parametrize(
    "name", ["gif", "semlic2", "semlic:", "semlic+refine:", "semlic+fast", ""]
)
def test_unknown_codecs(name, tiny_model):
    with pytest.raises(ValueError, match="unknown codec"):
        entrants([name], model=str(tiny_model))


def test_codecs_given_twice(tiny_model):
    with pytest.raises(ValueError, match="given twice"):
        entrants(["jpeg", "jpeg"])
    with pytest.raises(ValueError, match="two models have the name semlic:tiny"):
        entrants([f"semlic:{tiny_model}", f"semlic:{tiny_model.parent}/./tiny.npz"])


def test_a_changed_codec_is_another_one(monkeypatch):
    """Its name and the description that it inherits are the same."""

    class Slower(Jpeg):
        def encode(self, image, setting):
            return super().encode(image, setting) + b"!"

    class Parent(Slower):
        pass

    made = type("Made", (Jpeg,), {})  # there is no source of it
    identities = set()
    for kind in (Jpeg, Slower, Parent, made):
        monkeypatch.setitem(CODECS, "jpeg", kind)
        identity = ClassicalEntrant("jpeg").identity
        assert ClassicalEntrant("jpeg").identity == identity
        assert "Pillow" in identity and "Progressive JPEG" in identity
        identities.add(identity)
    assert len(identities) == 4


@pytest.mark.parametrize("kind", [SemlicEntrant, RefinedEntrant])
def test_the_largest_file_counts_for_rates_just_above(kind, codec, photograph):
    refine = [replace(preset(1), gamma=0.0)] if kind is RefinedEntrant else []
    image = photograph(64, 64)
    fit = kind("semlic", codec, *refine).fitter(image)
    most = len(codec.compress(image, quality=1)) * 8 / 64**2
    assert fit(1.01 * most).setting == "255"
    with pytest.raises(TooSmallError, match=r"largest file .* takes 0\.\d{3} bpp"):
        fit(1.1 * most)


def test_refined_files_are_of_their_feature_network_too(codec):
    """Kept files of other weights must not be taken for those of today's."""
    settings = preset("fast")
    identity = refinement_identity(codec, settings)
    assert RefinedEntrant("refined", codec, "fast").identity == identity
    assert refinement_identity(codec, replace(settings, gamma=0.0)) != identity
    trunk = settings.load_features()
    same = replace(settings, features=trunk)
    assert refinement_identity(codec, same) == identity
    other = FeatureNetwork(jax.tree.map(lambda w: w + 1, trunk.params), trunk.module)
    changed = replace(settings, features=other)
    assert refinement_identity(codec, changed) != identity
    fewer = replace(settings, features=trunk.replace(taps=trunk.taps[:2]))
    assert refinement_identity(codec, fewer) != identity


def test_models_by_name_and_path(tiny_model, codec, photograph):
    image = photograph(64, 80)
    plain, named = entrants(["semlic", f"semlic:{tiny_model}"], model=str(tiny_model))
    assert (plain.key, named.key) == ("semlic", "semlic:tiny")
    assert plain.identity == named.identity
    fit = plain.fitter(image)
    low, high = (
        8 * len(codec.compress(image, quality=quality)) / (64 * 80)
        for quality in (0.0, 1.0)
    )
    for part in (0.3, 0.8):
        rate = low + part * (high - low)
        found = fit(rate)
        assert 0.7 * rate * 64 * 80 / 8 < len(found.data) <= rate * 64 * 80 / 8
        assert codec.info(found.data)["quality"] * 255 == pytest.approx(
            int(found.setting)
        )
        np.testing.assert_array_equal(
            plain.decode(found.data), codec.decompress(found.data)
        )
    with pytest.raises(ValueError, match=f"smallest file .* {low:.3f} bpp"):
        fit(low / 2)
    with pytest.raises(ValueError, match=f"largest file .* {high:.3f} bpp"):
        fit(2 * high)


def test_only_the_best_quality_can_be_too_small(monkeypatch):
    """Far below the rate at a lower quality is a step of the qualities, not the end."""
    quality = [0.5]
    codec = SimpleNamespace(
        budget_bytes=lambda bpp, shape: 1000,
        compress=lambda image, **options: bytes(800),
        info=lambda data: dict(quality=quality[0], bpp=0.8, width=80, height=100),
    )
    monkeypatch.setattr(
        "semlic_jax.evaluation.entrants.refinement_identity", lambda *_: ""
    )
    fit = RefinedEntrant("refined", codec, "fast").fitter(np.zeros((100, 80, 3)))
    assert len(fit(1.0).data) == 800
    quality[0] = 1
    with pytest.raises(TooSmallError, match="0.800 bpp"):
        fit(1.0)
