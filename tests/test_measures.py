# SPDX-License-Identifier: Apache-2.0
"""What an evaluation measures, and when it measures again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sweeps import Counting

from semlic_jax.evaluation import measures as measures_module
from semlic_jax.evaluation.image_sets import list_images
from semlic_jax.evaluation.measures import SET_METRICS, Measures
from semlic_jax.evaluation.sweep import run_sweep
from semlic_jax.objectives import metrics


def test_measures_are_of_the_contents_of_their_weights(tmp_path, monkeypatch):
    """Other weights of the same name and size give other values."""
    path = tmp_path / "squeezenet1_0.npz"
    identities = set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        for given in (tmp_path, path):
            measures = Measures([], given)
            identities.add(measures.identity("feature_distance"))
    assert len(identities) == 2
    # They are read once, and where something needs them alone.
    measures = Measures(["psnr_db"], tmp_path)
    assert measures.identity("psnr_db") == Measures(["psnr_db"]).identity("psnr_db")
    identity = measures.identity("feature_distance")
    monkeypatch.delattr(measures_module.hashlib, "file_digest")
    assert measures.identity("feature_distance") == identity
    Measures(["psnr_db"], tmp_path)


def test_measures_are_of_their_own_code(photo_folder, tmp_path, monkeypatch):
    """A metric that was changed is measured again, the others are not."""

    def brighter(reference, image):
        return jnp.atleast_1d(jnp.mean(image / 1.0 - reference))

    def darker(reference, image):
        return -brighter(reference, image)

    class Distance:
        def __call__(self, reference, image):
            return darker(reference, image)

    names = ["psnr_db", "brightness"]
    info = metrics.MetricInfo("brightness", True)
    monkeypatch.setitem(metrics.IMAGE_METRICS, "brightness", info)
    load = metrics.ImageMetrics._load
    found, identities = [], set()
    for function in (brighter, darker, jax.jit(brighter), Distance()):

        def load_own(name, weights, function=function):
            return function if name == "brightness" else load(name, weights)

        monkeypatch.setattr(metrics.ImageMetrics, "_load", staticmethod(load_own))
        measures = Measures(names)
        identities.add(measures.identity("brightness"))
        identities.add(measures.identity("psnr_db"))
        if not isinstance(function, Distance):
            results = run_sweep(
                list_images([photo_folder]),
                [Counting("jpeg")],
                [3.0],
                measures,
                tmp_path,
            )
            found.append([row.values["brightness"] for row in results.rows])
    assert len(identities) == 1 + 3  # jax.jit(brighter) has the code of `brighter`
    assert found[0] == [-value for value in found[1]] == found[2] != found[1]


def test_ssimulacra2_is_of_its_package(monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs its package: pip install ssimulacra2"):
        Measures(["psnr_db", "ssimulacra2"])
    identities = set()
    for version in "1.0", "2.0":
        found = {"ssimulacra2": version}.__getitem__
        monkeypatch.setattr(measures_module.metadata, "version", found)
        identities.add(Measures([]).identity("ssimulacra2"))
    assert len(identities) == 2


def test_unknown_metrics():
    with pytest.raises(ValueError, match="unknown metric 'psnr': expected .*psnr_db"):
        Measures(["psnr"])
    with pytest.raises(ValueError, match="at least 32 pixels"):
        Measures(["psnr_db"], patch_side=8)


def test_psnr_of_equal_images_is_a_gap(photo_folder):
    image = np.asarray(Image.open(next(photo_folder.iterdir())))
    values, gaps, failed = Measures(["psnr_db"]).measure(image, image, ["psnr_db"])
    assert (values, gaps, failed) == ({}, {"psnr_db": "its value is inf"}, {})


def test_layers_are_those_that_the_labels_name():
    trunks = {name: metric.trunk for name, metric in SET_METRICS.items()}
    for kind in ("frechet", "kernel"):
        assert trunks[f"mobilenet_last_{kind}"] == "mobilenet_v2"
        assert trunks[f"mobilenet_{kind}"] == "mobilenet_v2-block_13_expand_relu"
