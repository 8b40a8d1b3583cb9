# SPDX-License-Identifier: Apache-2.0
"""Tables of y that are fitted to photographs at export."""

import numpy as np
import pytest
from PIL import Image

from semlic_jax.codec import Codec
from semlic_jax.coding.symbol_tables import gaussian_tables
from semlic_jax.model.priors import scale_table
from semlic_jax.training import export, fit_tables
from semlic_jax.training.fit_tables import (
    LEVELS,
    RADIUS,
    count_symbols,
    with_fitted_tables,
)
from semlic_jax.training.sources import UnusableImage, open_sources
from semlic_jax.weights import load_model, save_model

WIDTH = 2 * RADIUS + 1


def laplacian(seed, size):
    """Symbols with heavier tails than the Gaussians of their tables, as counts."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((64, WIDTH))
    for row, scale in zip(counts, scale_table(), strict=True):
        symbols = np.rint(rng.laplace(scale=scale / 2**0.5, size=size)).astype(int)
        np.add.at(row, np.clip(symbols, -RADIUS, RADIUS) + RADIUS, 1)
    return counts


def code_length(tables, counts):
    bits, radius = tables.bits_lookup()
    reach = np.clip(np.arange(-RADIUS, RADIUS + 1), -radius, radius) + radius
    return np.sum(counts * bits[:, reach], 1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, photograph):
    folder = tmp_path_factory.mktemp("photographs")
    for seed, size in enumerate([(70, 64), (64, 80)]):
        Image.fromarray(photograph(*size, seed=seed)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def fitted(tiny_file, photographs):
    """Model, histogram and savings."""
    return with_fitted_tables(tiny_file, open_sources([str(photographs)]))


def test_fitted_tables_code_other_symbols_near_their_entropy():
    tables = fit_tables.fit_tables(laplacian(0, 100_000))
    others = laplacian(1, 100_000)
    found = code_length(tables, others)
    share = others / others.sum(1, keepdims=True)
    logarithms = np.log2(share, out=np.zeros_like(share), where=share > 0)
    entropy = -np.sum(others * logarithms, 1)
    # The first table has a non-zero symbol in a few hundred.
    np.testing.assert_array_less(found, 1.01 * entropy + 200)
    gaussian = code_length(gaussian_tables(scale_table()), others)
    np.testing.assert_array_less(found, gaussian)


@pytest.mark.parametrize("size", [0, 20])
def test_few_symbols_leave_the_gaussian(size):
    tables = fit_tables.fit_tables(
        laplacian(0, size) if size else np.zeros((64, WIDTH))
    )
    gaussian = gaussian_tables(scale_table())
    rng = np.random.default_rng(2)
    indexes = np.arange(64).repeat(2000)
    symbols = np.rint(rng.standard_normal(indexes.size) * scale_table()[indexes])
    bits, expected = (
        each.ideal_bits(symbols.astype(int), indexes) for each in (tables, gaussian)
    )
    assert 0.99 < bits / expected < 1.01


def test_tails_are_found_in_few_symbols():
    tables = fit_tables.fit_tables(laplacian(0, 500))
    others = laplacian(1, 20_000)
    gaussian = code_length(gaussian_tables(scale_table()), others).sum()
    # The histograms alone, smoothed by the Gaussians, save 0.6 percent.
    assert code_length(tables, others).sum() < 0.99 * gaussian


def test_symbols_that_never_occurred_stay_affordable():
    counts = np.zeros((64, WIDTH))
    counts[:, RADIUS] = 1e6
    tables = fit_tables.fit_tables(counts)
    for table in (0, 30, 63):
        for symbol in (-40, -3, 2, 17, 500):
            assert tables.ideal_bits([symbol], [table]) < 45
    # A bound of the histogram is one of the table.
    counts[:, [0, -1]] = 1e6
    wide = fit_tables.fit_tables(counts)
    assert wide.offsets.tolist() == [-RADIUS] * 64
    assert wide.bits_lookup()[1] == RADIUS


def test_counts_are_those_of_the_coder(tiny_file, fitted, photographs):
    _, found, _ = fitted
    assert found.photographs == 2 and found.left_out == []
    # Both are cut to 64 x 64.
    assert found.counts.shape == (len(LEVELS), 64, WIDTH)
    symbols = 2 * 16 * tiny_file.config.latent_channels
    assert found.counts.sum((1, 2)).tolist() == [symbols] * len(LEVELS)
    codec = Codec(tiny_file)
    expected = np.zeros_like(found.counts[0])
    for name, rows, columns in (("0", 3, 0), ("1", 0, 8)):
        pixels = np.asarray(Image.open(photographs / f"{name}.png"))
        latents = codec.analyse(pixels[rows : rows + 64, columns : columns + 64])
        y_scaled, z = codec.scaled(latents, LEVELS[3])
        coded = codec.entropy.symbols(y_scaled, z, LEVELS[3], latents.size)
        np.add.at(expected, (coded.indexes, coded.y + RADIUS), 1)
    np.testing.assert_array_equal(found.counts[3], expected)


def test_savings_are_those_of_the_tables(tiny_file, fitted):
    model, found, saved_percent = fitted
    before = [code_length(tiny_file.y_tables, c).sum() for c in found.counts]
    after = [code_length(model.y_tables, c).sum() for c in found.counts]
    np.testing.assert_allclose(found.bits, before, rtol=1e-5)
    expected = 100 * (1 - np.array(after) / np.array(before))
    np.testing.assert_allclose(saved_percent, expected, atol=1e-3)
    assert np.mean(saved_percent) > 0
    # A percent of the bits counts the same at every quality.
    equal = np.tensordot(1 / found.bits, found.counts, 1)
    equal *= found.counts.sum() / equal.sum()
    expected_tables = fit_tables.fit_tables(equal)
    np.testing.assert_allclose(model.y_tables.counts, expected_tables.counts, atol=8)
    text = fit_tables.report(found, saved_percent)
    assert text.startswith("tables of y fitted to 2 photographs\n")
    assert f"{saved_percent[0]:.2f} at 0, " in text


def test_a_model_with_fitted_tables_codes_images(
    tiny_file, fitted, photograph, tmp_path
):
    model, _, _ = fitted
    assert model.fingerprint() != tiny_file.fingerprint()
    save_model(tmp_path / "fitted.npz", model)
    loaded = load_model(tmp_path / "fitted.npz")
    assert loaded.fingerprint() == model.fingerprint()
    codec, gaussian = Codec(loaded), Codec(tiny_file)
    image = photograph(64, 64, seed=5)
    latents = codec.analyse(image)
    for level in (0, 255):
        data = codec.encode(latents, level)
        symbols = codec.entropy.symbols(
            *codec.scaled(latents, level), level, latents.size
        )
        ideal_bytes = codec.entropy.ideal_bits(symbols, latents.size) / 8
        assert 0 < len(data) - ideal_bytes < 40  # header and end of the stream
        # Only the tables differ: both models find the same picture.
        other = gaussian.decompress(gaussian.encode(latents, level))
        np.testing.assert_array_equal(codec.decompress(data), other)
    with pytest.raises(ValueError, match="model"):
        gaussian.decompress(data)


def test_photographs_that_cannot_be_used_are_named(tiny_file, photographs):
    class Source:
        def __init__(self, *images):
            self.images = images

        def __len__(self):
            return len(self.images)

        def __getitem__(self, index):
            if self.images[index] is None:
                raise UnusableImage("broken.png (truncated)")
            return self.images[index]

    small = np.zeros((64, 63, 3), np.uint8)
    good = np.asarray(Image.open(photographs / "0.png"))
    found = count_symbols(Codec(tiny_file), Source(None, good, small))
    assert found.photographs == 1
    assert found.left_out == [
        "broken.png (truncated)",
        "photograph 2 (63 x 64 pixels, a side below 64)",
    ]
    with pytest.raises(ValueError, match=r"none usable among 2: broken"):
        count_symbols(Codec(tiny_file), Source(None, small))


def test_the_command_exports_fitted_tables(
    tiny_file, tiny_params, fitted, photographs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(export, "read_params", lambda stage, step: tiny_params)
    output = tmp_path / "model.npz"
    arguments = ["run/integer", str(output), "--size", "tiny"]
    export.main(arguments)
    assert load_model(output).fingerprint() == tiny_file.fingerprint()
    export.main([*arguments, "--fit-tables", str(photographs), "--force"])
    assert load_model(output).fingerprint() == fitted[0].fingerprint()
    assert "fitted to 2 photographs" in capsys.readouterr().out
    # What the photographs lack is said before anything is read or written.
    monkeypatch.setattr(export, "read_params", None)
    with pytest.raises(SystemExit) as ended:
        nowhere = ["--fit-tables", str(tmp_path / "nowhere")]
        export.main(["run/integer", str(tmp_path / "new.npz"), *nowhere])
    assert ended.value.code == 1
    assert "nowhere, found none" in capsys.readouterr().err
