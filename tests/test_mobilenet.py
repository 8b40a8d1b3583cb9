# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 against NumPy, TensorFlow.js's files, and what is refused."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from semlic_jax.cli import main
from semlic_jax.evaluation.measures import Measures
from semlic_jax.objectives import metrics, tfjs_files
from semlic_jax.objectives.features import feature_distance, load_features
from semlic_jax.objectives.mobilenet import MobileNetV2
from semlic_jax.objectives.tfjs_files import read_tfjs_file

# Table 2 of arXiv:1801.04381: expansion, channels, repeats, stride of the first.
TABLE = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def keras_layers() -> list[tuple[str, str, int, int, int, int]]:
    """Name, norm, inputs, outputs, kernel side and stride of every convolution."""
    layers = [("Conv1", "bn_Conv1", 3, 32, 3, 2)]
    width, number = 32, 0
    for expansion, channels, repeats, first in TABLE:
        for repeat in range(repeats):
            name = f"block_{number}" if number else "expanded_conv"
            wide = expansion * width
            if expansion > 1:
                expand = f"{name}_expand"
                layers.append((expand, f"{expand}_BN", width, wide, 1, 1))
            stride = first if repeat == 0 else 1
            for part, ins, outs, side in (
                ("depthwise", wide, wide, 3),
                ("project", wide, channels, 1),
            ):
                layer = f"{name}_{part}"
                step = stride if side == 3 else 1
                layers.append((layer, f"{layer}_BN", ins, outs, side, step))
            width, number = channels, number + 1
    return [*layers, ("Conv_1", "Conv_1_bn", width, 1280, 1, 1)]


def keras_weights(classes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    weights: dict[str, np.ndarray] = {}
    for name, norm, ins, outs, side, _ in keras_layers():
        depthwise = name.endswith("_depthwise")
        shape = (side, side, outs, 1) if depthwise else (side, side, ins, outs)
        fan = side * side * (1 if depthwise else ins)
        kind = "depthwise_kernel" if depthwise else "kernel"
        weights[f"{name}/{kind}"] = rng.normal(0, (2 / fan) ** 0.5, shape)
        weights[f"{norm}/moving_mean"] = rng.normal(0, 0.2, outs)
        # Of a size that the epsilon of the norm counts in; small gains, or rounding
        # grows from layer to layer.
        variance = rng.uniform(0.002, 0.02, outs)
        weights[f"{norm}/moving_variance"] = variance
        weights[f"{norm}/gamma"] = rng.uniform(0.3, 0.8, outs) * variance**0.5
        # Wide where a ReLU6 follows, so that both its ends count.
        width = 0.2 if name.endswith("_project") else 4
        weights[f"{norm}/beta"] = rng.normal(0, width, outs)
    weights["dense_3/kernel"] = rng.normal(size=(1280, classes))
    weights["dense_3/bias"] = np.zeros(classes)
    return {key: value.astype(np.float32) for key, value in weights.items()}


def write_model(folder, weights, shards=2, quantise=False):
    """As TensorFlow.js's converter does; the weights as a reader should find them."""
    folder.mkdir()
    manifest, parts, found = [], [], {}
    for name, value in weights.items():
        entry = {"name": name, "shape": list(value.shape), "dtype": "float32"}
        if quantise:
            least, scale = float(value.min()), float(np.ptp(value)) / 255 or 1.0
            levels = np.round((value - least) / scale).astype(np.uint8)
            entry["quantization"] = {"min": least, "scale": scale, "dtype": "uint8"}
            parts.append(levels.tobytes())
            found[name] = (levels.astype(np.float64) * scale + least).astype(np.float32)
        else:
            parts.append(value.astype("<f4").tobytes())
            found[name] = value
        manifest.append(entry)
    data = b"".join(parts)
    step = -(-len(data) // shards)
    paths = [f"group1-shard{i + 1}of{shards}.bin" for i in range(shards)]
    for i, path in enumerate(paths):
        (folder / path).write_bytes(data[i * step : (i + 1) * step])
    model = {"weightsManifest": [{"paths": paths, "weights": manifest}]}
    (folder / "model.json").write_text(json.dumps(model))
    return found


def numpy_taps(weights, images):
    """All outputs of ReLUs by Keras's names, norms as norms, pads as Keras pads."""
    x = images.astype(np.float64)
    taps, before = {}, None
    for name, norm, _, outs, side, stride in keras_layers():
        if name.endswith("_expand") or name == "expanded_conv_depthwise":
            before = x
        depthwise = name.endswith("_depthwise")
        kernel = weights[f"{name}/{'depthwise_' if depthwise else ''}kernel"]
        pads = (0 if stride == 2 else side // 2, side // 2)
        x = np.pad(x, ((0, 0), pads, pads, (0, 0)))
        height, width = ((n - side) // stride + 1 for n in x.shape[1:3])
        y = np.zeros((len(x), height, width, outs))
        for row in range(side):
            for column in range(side):
                rows = slice(row, row + stride * (height - 1) + 1, stride)
                columns = slice(column, column + stride * (width - 1) + 1, stride)
                part, factor = x[:, rows, columns], kernel[row, column]
                y += part * factor[:, 0] if depthwise else part @ factor
        mean, variance, gamma, beta = (
            weights[f"{norm}/{part}"]
            for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        x = (y - mean) / np.sqrt(variance + 1e-3) * gamma + beta
        if name.endswith("_project"):
            x = x + before if before.shape == x.shape else x
        else:
            x = np.clip(x, 0, 6)
            taps["out_relu" if name == "Conv_1" else f"{name}_relu"] = x
    return taps


@pytest.mark.parametrize("classes", [5, 1000])
def test_mobilenet_equals_numpy_through_a_file(tmp_path, classes, capsys):
    weights = write_model(tmp_path / "web", keras_weights(classes), quantise=True)
    source, folder = tmp_path / "web" / "model.json", tmp_path / "weights"
    assert main(["convert", "features", str(source), str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'mobilenet_v2.npz'}\n"
    images = np.random.default_rng(3).random((2, 75, 64, 3), np.float32)
    # nsfwjs, of five classes, is fed with [0, 1], keras.applications with [-1, 1].
    expected = numpy_taps(weights, images if classes == 5 else 2 * images - 1)
    some = ("block_2_expand_relu", "block_16_expand_relu")
    for taps in (None, some):
        network = load_features(folder, "mobilenet_v2", taps=taps)
        found = network.apply(jnp.asarray(images))
        assert len(found) == len(taps or "12345")
        for name, ours in zip(network.taps, found, strict=True):
            theirs = expected[name]
            assert ours.shape == theirs.shape and theirs.max() == 6
            np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_metrics_of_mobilenet_see_the_layers_they_name(tmp_path):
    write_model(tmp_path / "web", keras_weights(5))
    folder = tmp_path / "weights"
    source = str(tmp_path / "web" / "model.json")
    assert main(["convert", "features", source, str(folder)]) == 0
    rng = np.random.default_rng(1)
    original = rng.integers(0, 256, (64, 96, 3), np.uint8)
    decoded = np.clip(original + rng.normal(0, 20, original.shape), 0, 255)
    decoded = decoded.astype(np.uint8)
    network = load_features(folder, "mobilenet_v2")
    taps = [network.apply(jnp.asarray(x[None] / 255.0)) for x in (original, decoded)]
    distance = metrics.ImageMetrics(["mobilenet_distance"], folder)(original, decoded)
    expected = feature_distance(*taps)
    np.testing.assert_allclose(distance["mobilenet_distance"], expected, rtol=1e-3)
    names = [
        f"mobilenet_{layer}{kind}"
        for layer in ("", "last_")
        for kind in ("frechet", "kernel")
    ]
    measures = Measures(names, folder, patch_side=32)
    assert len(measures.trunks) == len(set(measures.trunks.values())) == 2
    middle, last = measures.trunks
    for trunk, tap, channels in ((middle, -2, 576), (last, -1, 1280)):
        features = measures.features(original[:32, :32], trunk)
        assert features.shape == (1, channels)
        whole = network.apply(jnp.asarray(original[None, :32, :32] / 255.0))[tap]
        np.testing.assert_allclose(features, whole.mean((1, 2)), atol=1e-4)
    pair = [
        {trunk: [measures.features(x, trunk)] for trunk in measures.trunks}
        for x in (original, decoded)
    ]
    values, gaps, patches = measures.distances(*pair)
    assert sorted(values) == sorted(names) and not gaps and patches == 8
    assert values["mobilenet_frechet"] != values["mobilenet_last_frechet"] > 0


def test_types_of_tfjs_files_are_read(tmp_path):
    values = np.asarray([[1.5, -2.0, 0.25]], np.float32)
    halves = {"name": "a", "shape": [1, 3], "dtype": "float32"}
    halves["quantization"] = {"dtype": "float16", "original_dtype": "float32"}
    entries = [halves, {"name": "b", "shape": [], "dtype": "int32"}]
    data = values.astype("<f2").tobytes() + np.int32(-7).astype("<i4").tobytes()
    (tmp_path / "w.bin").write_bytes(data)
    model = {"weightsManifest": [{"paths": ["w.bin"], "weights": entries}]}
    (tmp_path / "model.json").write_text(json.dumps(model))
    found = read_tfjs_file(tmp_path / "model.json")
    np.testing.assert_array_equal(found["a"], values)
    assert found["a"].dtype == np.float32 and found["b"] == -7


def test_damaged_tfjs_files_are_refused_in_a_sentence(tmp_path, capsys):
    file = tmp_path / "model.json"
    (tmp_path / "w.bin").write_bytes(bytes(24))
    good = {"name": "a", "shape": [2, 3], "dtype": "float32"}

    def refusal(paths, *weights, text=None):
        model = {"weightsManifest": [{"paths": paths, "weights": weights}]}
        file.write_text(json.dumps(model) if text is None else text)
        with pytest.raises(ValueError) as caught:
            read_tfjs_file(file)
        return str(caught.value)

    for name in ("../w.bin", "/etc/passwd", "a/w.bin", "", "..", "w\0", 3):
        assert "names of files beside it" in refusal([name], good), name
    assert "gone.bin, which does not exist" in refusal(["gone.bin"], good)
    assert "found 1 in the first" in refusal(["w.bin"], good, good)
    assert "found 0 in the first 0 of 24 bytes" in refusal(["w.bin"])
    assert "exactly 2 different weights, found 1" in refusal(
        ["w.bin"], good | {"shape": [3]}, good | {"shape": [3]}
    )
    huge = good | {"shape": [1 << 40, 1 << 40]}
    assert "found 0 in the first 0 of 24 bytes" in refusal(["w.bin"], huge)
    assert "shape (-2, -3)" in refusal(["w.bin"], good | {"shape": [-2, -3]})
    assert "type 'object'" in refusal(["w.bin"], good | {"dtype": "object"})
    broken = "not a readable model of TensorFlow.js"
    assert broken in refusal(["w.bin"], good | {"shape": [math.pi, 2]})
    assert broken in refusal(["w.bin"], good | {"quantization": {"dtype": []}})
    for text in ("", "[]", "{}", '{"weightsManifest": [[]]}', "[" * 100_000, "\xff"):
        assert broken in refusal([], text=text)
    assert "a has 100000 axes" in refusal(["w.bin"], good | {"shape": [9] * 100_000})
    of_bytes = good | {"shape": [24], "dtype": "uint8"}
    for key, value in (("scale", math.nan), ("min", math.inf), ("scale", 1e300)):
        quantised = {"dtype": "uint8", "scale": 1.0, "min": 0.0} | {key: value}
        message = refusal(["w.bin"], of_bytes | {"quantization": quantised})
        assert "a has scale" in message
    # At the command line: one line, nothing written.
    outputs = str(tmp_path / "weights")
    assert main(["convert", "features", str(file), outputs]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "weights").exists()


def test_groups_of_a_tfjs_file_are_bounded_together(tmp_path, monkeypatch):
    file = tmp_path / "model.json"
    (tmp_path / "w.bin").write_bytes(bytes(24))

    def read(*names):
        groups = [
            {
                "paths": ["w.bin"],
                "weights": [{"name": name, "shape": [6], "dtype": "float32"}],
            }
            for name in names
        ]
        file.write_text(json.dumps({"weightsManifest": groups}))
        return read_tfjs_file(file)

    monkeypatch.setattr(tfjs_files, "_MAX_WEIGHTS_BYTES", 50)
    assert sorted(read("a", "b")) == ["a", "b"]
    with pytest.raises(ValueError, match="at most 50 bytes of weights"):
        read("a", "b", "c")
    with pytest.raises(ValueError, match="two weights named a"):
        read("a", "a")


def test_weights_of_another_shape_are_refused(tmp_path):
    weights = keras_weights(5)
    weights["block_3_expand_BN/gamma"] = np.ones(1, np.float32)
    write_model(tmp_path / "web", weights)
    source = tmp_path / "web" / "model.json"
    with pytest.raises(ValueError, match="block_3_expand_BN/gamma.* of 144 channels"):
        load_features(source, "mobilenet_v2")
    del weights["block_3_expand_BN/gamma"], weights["Conv1/kernel"]
    write_model(tmp_path / "other", weights)
    with pytest.raises(ValueError, match="expected the arrays block_3_expand_BN/gamma"):
        load_features(tmp_path / "other" / "model.json", "mobilenet_v2")


def test_a_large_json_of_tensorflow_js_is_not_read(tmp_path, monkeypatch):
    write_model(tmp_path / "web", {"a": np.zeros(3, np.float32)})
    file = tmp_path / "web" / "model.json"
    size_bytes = file.stat().st_size
    monkeypatch.setattr(tfjs_files, "_MAX_JSON_BYTES", size_bytes)
    assert list(read_tfjs_file(file)) == ["a"]
    monkeypatch.setattr(tfjs_files, "_MAX_JSON_BYTES", size_bytes - 1)
    with pytest.raises(ValueError, match=f"at most {size_bytes - 1} bytes, found"):
        read_tfjs_file(file)


def test_unknown_taps_and_small_images_are_refused():
    network = MobileNetV2()
    for taps in ((), ("block_0_expand_relu",), ("block_17_expand_relu",)):
        with pytest.raises(ValueError, match="taps must be among block_1_expand_relu"):
            network.clone(taps=taps).apply({}, jnp.zeros((1, 32, 32, 3)))
    for height, width in ((31, 64), (64, 31)):
        found = f"needs images of at least 32x32 pixels, found {width}x{height}"
        with pytest.raises(ValueError, match=f"MobileNetV2 {found}"):
            network.apply({}, jnp.zeros((1, height, width, 3)))
    image = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    taps, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), image)
    assert [taps[name].shape for name in network.taps] == [
        (2, 16, 16, 96),
        (2, 8, 8, 144),
        (2, 4, 4, 192),
        (2, 2, 2, 576),
        (2, 1, 1, 1280),
    ]
