# SPDX-License-Identifier: Apache-2.0
"""Converted MS-ILLM checkpoints: the numbers, the files, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from published_hific import (
    REDUCED,
    NumpyOps,
    TorchOps,
    evaluate,
    published_state,
    write_checkpoint,
)

import semlic_jax
from semlic_jax.cli import main
from semlic_jax.coding import float_networks
from semlic_jax.coding.bitstream import (
    BitstreamError,
    IncompatibleMachineError,
    IncompatibleModelError,
    pack,
    unpack,
)
from semlic_jax.converters.neuralcompression import convert_state
from semlic_jax.evaluation import exactness
from semlic_jax.model.mean_scale import HyperSynthesis, MeanScaleModel
from semlic_jax.refinement import Settings, refine


@pytest.fixture(scope="module")
def state():
    return published_state(**REDUCED)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("published")
    return write_checkpoint(folder / "msillm.ckpt", state)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, checkpoint):
    path = tmp_path_factory.mktemp("converted") / "msillm.npz"
    assert main(["convert", "neuralcompression", str(checkpoint), str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def converted(model_path):
    return semlic_jax.load(model_path)


def params_of(model):
    return {**model.transforms, "prior": model.prior, "entropy": model.entropy}


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_agrees_with_the_published_network(state, photograph, library):
    if library == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        ops = TorchOps(torch)
    else:
        ops = NumpyOps()
    image = photograph(64, 128)[None].astype(np.float32) / 255
    y, z, y_likelihood, z_likelihood, x_hat = evaluate(ops, state, image, **REDUCED)
    model = convert_state(state, "msillm", "a.ckpt")
    network = MeanScaleModel(model.config)
    found = jax.jit(network.apply)({"params": params_of(model)}, image)
    assert y.std() > 1 and len(np.unique(np.round(z))) > 3
    np.testing.assert_allclose(found.y, y, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.z, z, rtol=0, atol=1e-4)
    np.testing.assert_allclose(2**-found.y_bits, y_likelihood, rtol=0, atol=1e-4)
    np.testing.assert_allclose(2**-found.z_bits, z_likelihood, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.x_hat, x_hat, rtol=0, atol=1e-4)


def test_names_of_newer_compressai_and_of_a_trainer(state):
    plural = {"_matrix": "matrices.", "_bias": "biases.", "_factor": "factors."}
    renamed = {}
    for key, value in state.items():
        for old, new in plural.items():
            key = key.replace(f"hyper_bottleneck.{old}", f"hyper_bottleneck.{new}")
        renamed[f"model.{key}"] = value
    renamed["discriminator.conv.weight"] = np.zeros((1, 1, 1, 1), np.float32)
    models = [convert_state(tensors, "a", "f") for tensors in (state, renamed)]
    for ours, theirs in zip(
        *(jax.tree.leaves(params_of(m)) for m in models), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert models[0].fingerprint() == models[1].fingerprint()


def test_a_photograph_through_a_file(converted, state, photograph):
    """What a file decodes to is the published network's own reconstruction."""
    image = photograph(64, 128)
    data = converted.compress(image, quality=128 / 255)
    decoded = converted.decompress(data)
    *_, x_hat = evaluate(NumpyOps(), state, image[None] / np.float32(255), **REDUCED)
    expected = np.clip(x_hat[0], 0, 1) * 255
    assert np.abs(decoded - expected).max() <= 0.51
    info = converted.info(data)
    assert info["same_machine_only"] and info["model"] == "msillm"
    assert len(data) < 64 * 128 * 3


@pytest.mark.parametrize("size", [(1, 1), (50, 70)])
def test_sizes_budgets_and_sizes_of_files(converted, photograph, size):
    image = photograph(*size)
    small, large = (converted.compress(image, quality=q) for q in (0, 1))
    assert converted.decompress(small).shape == image.shape
    if size == (50, 70):
        assert len(small) < len(large)
        budget = (len(small) + len(large)) // 2
        data = converted.compress(image, max_bytes=budget)
        assert 0.9 * budget < len(data) <= budget
        latents = converted.analyse(image)
        symbols = converted.entropy.symbols(
            *converted.scaled(latents, 255), 255, latents.size
        )
        bits = converted.entropy.ideal_bits(symbols, latents.size)
        assert 0 <= len(unpack(large)[1]) * 8 - bits < 64
        _, y_hat = converted.decode_latents(large)
        rows, columns = y_hat.shape[:2]
        expected = (symbols.y + symbols.mean_steps / 16).astype(np.float32)
        np.testing.assert_array_equal(y_hat, expected[:rows, :columns])


def test_padding_does_not_reach_the_image(converted):
    """An image in a larger bucket gets the means of its own grid."""
    rng = np.random.default_rng(0)
    y, z = rng.normal(0, 5, (8, 8, 6)), rng.normal(0, 3, (2, 2, 5))
    size = (70, 120)
    small = converted.entropy.symbols(y, z, 128, size)
    pads = ((0, 8), (0, 4), (0, 0))
    y, z = np.pad(y, pads), np.pad(z, [(a // 4, b // 4) for a, b in pads])
    large = converted.entropy.symbols(y, z, 128, size)
    assert small.mean_steps.std() > 1
    for ours, theirs in zip(small[1:], large[1:], strict=True):
        np.testing.assert_allclose(ours, theirs[:8, :8], rtol=0, atol=1e-3)


def test_another_machine_refuses(
    converted, model_path, photograph, tmp_path, monkeypatch
):
    data = converted.compress(photograph(50, 70), quality=0.5)
    header, payload = unpack(data)
    assert len(header.index_check) == 4
    exact = float_networks._parameters

    def elsewhere(*arguments):
        index, mean_steps = exact(*arguments)
        return index.at[1, 1, 1].add(1), mean_steps

    monkeypatch.setattr(float_networks, "_parameters", elsewhere)
    with pytest.raises(IncompatibleMachineError, match="only on the machine"):
        converted.decompress(data)
    (tmp_path / "a.semlic").write_bytes(data)
    digests = exactness.decode_files(str(model_path), tmp_path)
    assert digests["a.semlic"].startswith("not decoded: ")
    monkeypatch.undo()
    values = {**vars(header), "index_check": b""}
    unmarked = pack(type(header)(**values), payload)
    with pytest.raises(
        BitstreamError, match="expected a checksum of the table indexes"
    ):
        converted.decompress(unmarked)
    assert converted.decompress(data).shape == (50, 70, 3)


def test_other_models_refuse(converted, codec, photograph):
    image = photograph(33, 20)
    with pytest.raises(IncompatibleModelError, match="that made the file, found"):
        codec.decompress(converted.compress(image, quality=0.5))
    with pytest.raises(IncompatibleModelError, match="that made the file, found"):
        converted.decompress(codec.compress(image, quality=0.5))


@pytest.mark.slow
def test_refinement_of_a_converted_model(converted, photograph):
    image = photograph(64, 64)
    start = converted.compress(image, quality=0.6)
    settings = Settings(steps=30, method="sga", gamma=0.0, chunk_steps=10)
    refined = refine(converted, image, quality=0.6, settings=settings)
    values = [row["value"] for row in refined.history]
    assert values[-1] < values[0]  # the gradient reaches the latents
    assert len(refined.data) <= len(start)
    assert refined.value <= refined.unrefined_value
    assert converted.decompress(refined.data).shape == image.shape


def test_the_command_line(model_path, tmp_path, photograph, capsys):
    Image.fromarray(photograph(40, 30)).save(tmp_path / "a.png")
    data, decoded = tmp_path / "a.semlic", tmp_path / "b.png"
    model = ["--model", str(model_path)]
    arguments = [str(tmp_path / "a.png"), str(data), "--quality", "0.5", *model]
    assert main(["compress", *arguments]) == 0
    capsys.readouterr()
    assert main(["info", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["same_machine_only"] is True
    assert main(["decompress", str(data), str(decoded), *model]) == 0
    with Image.open(decoded) as image:
        assert image.size == (30, 40)
    assert main(["decompress", str(data), str(tmp_path / "c.png")]) == 1
    assert "give its model file" in capsys.readouterr().err


def test_a_converted_file_is_read_without_trust(model_path, tmp_path):
    def rewritten(change):
        with np.load(model_path) as file:
            arrays = {key: file[key] for key in file.files}
        change(arrays)
        np.savez(tmp_path / "m.npz", **arrays)
        return tmp_path / "m.npz"

    def misfit(arrays):
        arrays["entropy/mean_1/kernel"] = np.zeros((5, 5, 5, 4), np.float32)

    def endless(arrays):
        arrays["entropy/median"] = np.full(5, np.nan, np.float32)

    def other_family(arrays):
        config = json.loads(arrays["config"].tobytes()) | {"family": "other"}
        arrays["config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)

    for change, message in (
        (misfit, r"entropy/mean_1/kernel of shape \(5, 5, 5, 5\)"),
        (endless, "finite floats as entropy/median"),
        (lambda arrays: arrays.pop("entropy/scale_2/bias"), "scale_2/bias"),
        (other_family, "expected the family mean_scale, found other"),
    ):
        with pytest.raises(ValueError, match=message):
            semlic_jax.load(rewritten(change))


def refusal(capsys, source, output, *options) -> str:
    arguments = [str(source), str(output), *options]
    assert main(["convert", "neuralcompression", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_missing_and_misshapen_tensors_are_named(state, tmp_path, capsys):
    output = tmp_path / "m.npz"

    def refused(changed):
        return refusal(capsys, write_checkpoint(tmp_path / "c.ckpt", changed), output)

    fewer = {k: v for k, v in state.items() if "resid_blocks.0.sequence.3" not in k}
    error = refused(fewer)
    assert "decoder.resid_blocks.0.sequence.3.weight" in error and "c.ckpt" in error
    fewer = {k: v for k, v in state.items() if not k.startswith("hyper_synthesis")}
    assert "hyper_synthesis_mean.0.weight" in refused(fewer)
    assert "and 7 more" in refused(fewer)
    wrong = state | {"decoder.blocks.1.0.weight": np.zeros((10, 7, 3, 3), np.float32)}
    assert "decoder.blocks.1.0.weight" in refused(wrong)
    wrong = state | {"encoder.blocks.2.1.gamma": np.zeros(8, np.float32)}
    assert "4 axes of the tensor encoder.blocks.2.1.gamma" in refused(wrong)
    [median] = [name for name in state if name.endswith("quantiles")]
    wrong = state | {median: state[median][:, :, :0]}
    assert f"none of them empty, found shape ({len(state[median])}, 1, 0)" in refused(
        wrong
    )
    wrong = state | {"encoder.blocks.2.0.bias": np.full(8, np.inf, np.float32)}
    assert "finite floats as encoder.blocks.2.0.bias" in refused(wrong)
    assert not output.exists()


@pytest.mark.parametrize("number", ["9" * 5000, "1000000000", "7"])
def test_numbers_in_names_are_not_counted_up_to(state, number):
    for name, missing in (
        ("decoder.resid_blocks.{}.x", "decoder.resid_blocks.2.sequence.0.weight"),
        ("hyper_bottleneck._matrix{}", "hyper_bottleneck._matrix5"),
    ):
        more = state | {name.format(number): np.zeros(1, np.float32)}
        with pytest.raises(ValueError, match=f"found no {missing}"):
            convert_state(more, "a", "f")


def test_other_kinds_of_files_are_refused(tmp_path, capsys):
    output = tmp_path / "m.npz"
    kernel = np.zeros((1, 1, 1, 1), np.float32)
    for key, kind in (
        ("bottleneck_op.input_conv.weight", "VQ-VAE"),
        ("discriminator.model.weight", "a discriminator"),
        ("features.0.weight", "semlic convert features"),
        ("g_a.0.weight", "CompressAI"),
        ("layer1.weight", "something else"),
    ):
        source = write_checkpoint(tmp_path / "c.ckpt", {key: kernel})
        error = refusal(capsys, source, output)
        assert kind in error and key in error
    (tmp_path / "c.ckpt").write_bytes(b"not a checkpoint")
    assert "not a readable PyTorch file" in refusal(capsys, tmp_path / "c.ckpt", output)
    assert "does not exist" in refusal(capsys, tmp_path / "none.ckpt", output)
    assert f"{tmp_path} is a folder" in refusal(capsys, tmp_path, output)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (print, ("the pickle ran",))

    pickled = io.BytesIO()
    pickle.Pickler(pickled, protocol=2).dump({"state_dict": {}, "x": Attack()})
    with zipfile.ZipFile(tmp_path / "c.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
    error = refusal(capsys, tmp_path / "c.ckpt", tmp_path / "m.npz")
    assert "refused" in error and "print" in error and "the pickle ran" not in error


def test_outputs_are_kept_unless_forced(checkpoint, tmp_path, capsys):
    output = tmp_path / "m.npz"
    output.write_bytes(b"mine")
    assert "--force" in refusal(capsys, checkpoint, output)
    assert output.read_bytes() == b"mine"
    assert ".npz, as output" in refusal(capsys, checkpoint, tmp_path / "m.pth")
    arguments = [str(checkpoint), str(output), "--force"]
    assert main(["convert", "neuralcompression", *arguments]) == 0
    assert "only on the machine" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected exactly one of quality"):
        semlic_jax.load(output).compress(np.zeros((1, 1, 3), np.uint8))


def test_the_index_check_is_that_of_the_format(converted, photograph):
    """Of the table indexes inside the image, by row, then column, then channel."""
    size, level = (50, 70), 128
    image = photograph(*size)
    latents = converted.analyse(image)
    symbols = converted.entropy.symbols(*converted.scaled(latents, level), level, size)
    assert symbols.indexes.shape[:2] == (4, 8)  # with padding
    inside = symbols.indexes[:4, :5].astype(np.uint8).tobytes()
    header, _ = unpack(converted.encode(latents, level))
    assert header.index_check == hashlib.sha256(inside).digest()[:4]


def test_the_gain_of_a_level_is_that_of_every_version(converted):
    """A file holds the latents times it, and the fingerprint does not cover it."""
    quality = np.array([0, 64, 128, 192, 255], np.float32) / 255
    gain = MeanScaleModel(converted.config).apply({}, quality, method="gain")
    wanted = [0.25, 0.5, 1, 2, 2 ** (127 / 64)]
    np.testing.assert_allclose(gain[:, 0, 0, 0], wanted, rtol=1e-6)


def test_tables_and_means_follow_the_gain(converted):
    """At level 192 all is twice as large; a file holds symbols beside these means."""
    config, entropy = converted.config, converted.params["entropy"]
    z = np.random.default_rng(0).integers(-3, 4, (1, 2, 2, config.hyper_channels))
    z, inside = z.astype(np.float32), np.ones((1, 2, 2, 1), np.float32)
    synthesis = HyperSynthesis(config.latent_channels, config.hyper_channels)
    mean, scale = synthesis.apply({"params": entropy}, z, inside)
    index, mean_steps = MeanScaleModel(config).apply(
        {"params": {"entropy": entropy}},
        z,
        np.array([192 / 255], np.float32),
        inside,
        method="parameters",
    )
    np.testing.assert_allclose(mean_steps, 16 * 2 * mean, rtol=1e-5, atol=1e-4)
    place = 63 * np.log(2 * np.asarray(scale) / 0.11) / np.log(64 / 0.11)
    assert np.abs(index - place.clip(0, 63)).max() <= 0.501
    np.testing.assert_array_equal(index, np.rint(index))
