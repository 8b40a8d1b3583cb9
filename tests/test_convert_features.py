# SPDX-License-Identifier: Apache-2.0
"""`semlic convert features`: what is recognised, what is written, what is refused."""

from __future__ import annotations

import pickle
import zipfile

import jax
import numpy as np
import pytest

from semlic_jax.cli import main
from semlic_jax.objectives import feature_weights, features
from semlic_jax.objectives.features import load_features

RNG = np.random.default_rng(0)
ALEXNET = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}


def alexnet_state() -> dict[str, np.ndarray]:
    """Random weights in torchvision's names, the classifier among them."""
    state = {"classifier.6.weight": np.zeros((10, 20), np.float32)}
    for index, shape in ALEXNET.items():
        scale = np.prod(shape[1:]) ** -0.5
        kernel = scale * RNG.standard_normal(shape)
        state[f"features.{index}.weight"] = kernel.astype(np.float32)
        state[f"features.{index}.bias"] = np.zeros(shape[0], np.float32)
    return state


def heads_state(trunk: str) -> dict[str, np.ndarray]:
    channels = feature_weights._LPIPS_CHANNELS[trunk]
    return {
        f"lin{i}.model.1.weight": RNG.random((1, c, 1, 1), np.float32)
        for i, c in enumerate(channels)
    }


def dists_state() -> dict[str, np.ndarray]:
    total = sum(feature_weights.DISTS_CHANNELS)
    return {key: RNG.random((1, total, 1, 1), np.float32) for key in ("alpha", "beta")}


def save(path, state):
    np.savez(path, **state)
    return str(path)


def refusal(capsys, *arguments: object) -> str:
    assert main(["convert", "features", *map(str, arguments)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_published_files_become_a_folder_that_loads(tmp_path, capsys):
    alexnet = alexnet_state()
    sources = [
        save(tmp_path / "a.npz", alexnet),
        save(tmp_path / "b.npz", heads_state("alex")),
        save(tmp_path / "c.npz", dists_state()),
    ]
    folder = tmp_path / "weights"
    assert main(["convert", "features", *sources, str(folder)]) == 0
    written = capsys.readouterr().out.splitlines()
    names = ["alexnet.npz", "lpips_v0.1_alex.npz", "dists_alpha_beta.npz"]
    assert written == [str(folder / name) for name in names]
    network = load_features(folder, "alexnet")
    np.testing.assert_array_equal(
        network.params["conv2"]["kernel"],
        alexnet["features.3.weight"].transpose(2, 3, 1, 0),
    )
    assert len(feature_weights.load_lpips_heads(folder, "alex")) == 5
    assert len(feature_weights.load_dists_weights(folder)[0]) == 6


def test_one_source_can_become_one_file(tmp_path):
    source = save(tmp_path / "published.npz", alexnet_state())
    output = tmp_path / "mine.npz"
    arguments = ["convert", "features", source, str(output), "--network", "alexnet"]
    assert main(arguments) == 0
    assert load_features(output, "alexnet").taps


@pytest.mark.parametrize(
    "name", sorted(set(feature_weights._RENAME) - {"inception_v3"})
)
def test_every_network_is_recognised_by_its_names(name):
    rename = feature_weights._RENAME[name]
    layers = [f"features.{i}{part}" for i in range(32) for part in ("", ".squeeze")]
    state = {f"{x}.weight": np.zeros((1, 1, 1, 1)) for x in layers if rename(x)}
    state["classifier.1.weight"] = np.zeros((1000, 512, 1, 1))
    assert feature_weights.recognise(state, "f") == name


def test_inception_and_deep_compression_are_recognised():
    kernel = np.zeros((1, 1, 1, 1))
    state = {"Mixed_5b.branch1x1.conv.weight": kernel}
    assert feature_weights.recognise(state, "f") == "inception_v3"
    state = {"conv1.weight": kernel, "fire2.conv1x1_1.weight": kernel}
    state |= {"fire2.conv1x1_2.weight": kernel, "fire2.conv3x3_2.weight": kernel}
    assert feature_weights.recognise(state, "f").startswith("squeezenet1_")


@pytest.mark.parametrize("shapes", [
    {"AuxLogits.conv0.conv.weight": (128, 768, 1, 1)},
    {"fc.weight": (1000, 2048)},
    {"AuxLogits.conv0.conv.weight": (128, 768, 1, 1), "fc.weight": (1000, 2048)},
])  # fmt: skip
@pytest.mark.parametrize("options", [(), ("--network", "inception_v3")])
def test_torchvisions_inception_is_not_that_of_fid(tmp_path, capsys, shapes, options):
    state = {"Mixed_5b.branch1x1.conv.weight": np.zeros((64, 192, 1, 1), np.float32)}
    state |= {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    source = save(tmp_path / "published.npz", state)
    error = refusal(capsys, source, tmp_path / "weights", *options)
    assert "expected FID's Inception-v3" in error and "torchvision's" in error
    # The published one has 1008 classes; here it lacks the other layers.
    state = {key: state[key] for key in state if not key.startswith("AuxLogits")}
    state["fc.weight"] = np.zeros((1008, 2048), np.float32)
    error = refusal(capsys, save(source, state), tmp_path / "weights", *options)
    assert "torchvision" not in error and "Conv2d_1a_3x3" in error


def test_a_missing_tensor_is_named_and_nothing_is_written(tmp_path, capsys):
    state = alexnet_state()
    del state["features.6.weight"]
    folder = tmp_path / "weights"
    sources = [
        save(tmp_path / "good.npz", heads_state("vgg")),
        save(tmp_path / "bad.npz", state),
    ]
    error = refusal(capsys, *sources, folder)
    assert "bad.npz" in error and "conv3/kernel" in error
    assert not folder.exists()
    heads = heads_state("squeeze")
    del heads["lin6.model.1.weight"]
    error = refusal(capsys, save(tmp_path / "heads.npz", heads), folder)
    assert "heads" in error and "384" in error
    error = refusal(
        capsys, tmp_path / "heads.npz", folder, "--network", "lpips_squeeze"
    )
    assert "lin6.model.1.weight" in error


def test_a_missing_statistic_of_a_norm_is_named():
    name = "Mixed_5b.branch1x1"
    state = {
        f"{name}.conv.weight": np.zeros((2, 1, 1, 1)),
        f"{name}.bn.running_var": np.ones(2),
        f"{name}.bn.weight": np.ones(2),
        f"{name}.bn.bias": np.ones(2),
    }
    with pytest.raises(ValueError, match="Mixed_5b.branch1x1.bn.running_mean"):
        feature_weights.convert_network(state, "inception_v3")


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (print, ("the pickle ran",))

    path = tmp_path / "evil.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"x": Attack()}, protocol=2))
    error = refusal(capsys, path, tmp_path / "weights")
    assert "refused" in error and "print" in error


def test_unknown_and_converted_files_are_refused(tmp_path, capsys):
    folder = tmp_path / "weights"
    error = refusal(capsys, tmp_path / "none.pth", folder)
    assert "does not exist" in error
    error = refusal(capsys, tmp_path, folder)
    assert f"{tmp_path} is a folder: expected a file of weights" in error
    other = save(tmp_path / "other.npz", {"encoder.weight": np.zeros((4, 3, 3, 3))})
    error = refusal(capsys, other, folder)
    assert "alexnet" in error and "encoder.weight" in error
    heads = {"lin0.model.1.weight": np.zeros((1, 7, 1, 1))}
    error = refusal(capsys, save(tmp_path / "heads.npz", heads), folder)
    assert "(7,)" in error
    error = refusal(capsys, other, folder, "--network", "resnet")
    assert "unknown feature weights 'resnet'" in error
    source = save(tmp_path / "alexnet_source.npz", alexnet_state())
    assert main(["convert", "features", source, str(folder)]) == 0
    capsys.readouterr()
    error = refusal(capsys, folder / "alexnet.npz", tmp_path / "twice")
    assert "already converted" in error


@pytest.mark.parametrize("name", ["im0.png", "im0.pth", "empty"])
def test_files_that_are_no_weights_are_refused_by_their_kind(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty" else b"\x89PNG\r\n\x1a\n")
    error = refusal(capsys, path, tmp_path / "weights")
    expected = f"weights in a .pth, .pt, .npz or model.json file, found {name}"
    assert error == f"semlic: expected {expected}, which is none of these\n"


def test_networks_without_a_rule_are_named(tmp_path, capsys, monkeypatch):
    """One that a user adds loads from this package's form; conversion needs a rule."""
    monkeypatch.setitem(features.NETWORKS, "mynet", features.AlexNet())
    state = alexnet_state()
    source = save(tmp_path / "published.npz", state)
    error = refusal(capsys, source, tmp_path / "weights", "--network", "mynet")
    assert "no rule to convert weights of mynet: expected those of alexnet" in error
    arrays = feature_weights.convert_network(state, "alexnet")
    source = save(tmp_path / "mynet.npz", arrays | {"network": np.asarray("mynet")})
    assert features.load_features(source).taps == features.AlexNet().taps


def test_outputs_are_kept_unless_forced(tmp_path, capsys):
    source = save(tmp_path / "source.npz", alexnet_state())
    folder = tmp_path / "weights"
    folder.mkdir()
    output = folder / "alexnet.npz"
    output.write_bytes(b"mine")
    assert "--force" in refusal(capsys, source, folder)
    assert "--force" in refusal(capsys, source, output)
    assert output.read_bytes() == b"mine"
    error = refusal(capsys, source, source, tmp_path / "new.npz")
    assert "an output folder for 2 files" in error
    error = refusal(capsys, source, source, tmp_path / "new")
    assert "one source for alexnet.npz, found two" in error
    error = refusal(capsys, source, tmp_path / "no" / "such" / "folder")
    assert "No such file or directory" in error
    assert main(["convert", "features", source, str(folder), "--force"]) == 0
    jax.block_until_ready(load_features(folder, "alexnet").params)


def test_networks_see_pixels_as_their_weights_were_trained_with():
    """Deep Compression's SqueezeNet, of the published tables, those of Caffe."""
    kernel, one = np.ones((2, 2, 1, 1), np.float32), np.ones(2, np.float32)
    norm = ("running_mean", "running_var", "weight", "bias")
    inception = {f"Mixed_5b.branch1x1.bn.{part}": one for part in norm}
    for name, layer, more, wanted in (
        ("squeezenet1_0", "fire2.conv1x1_1", {}, "caffe"),
        ("squeezenet1_0", "features.3.squeeze", {}, "imagenet"),
        ("vgg16", "features.0", {}, "imagenet"),
        ("inception_v3", "Mixed_5b.branch1x1.conv", inception, "torch_fidelity"),
    ):
        state = {f"{layer}.weight": kernel} | more
        found = feature_weights.convert_network(state, name)
        assert str(found["preprocessing"]) == wanted, layer
    inception["Mixed_5b.branch1x1.bn.running_var"] = np.float32([0.5, -5e-4])
    with pytest.raises(ValueError, match="variances of at least 0 in .*running_var"):
        feature_weights.convert_network(state | inception, "inception_v3")


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    def exhausted(*_):
        raise MemoryError

    path = save(tmp_path / "a.npz", {"a": np.zeros(1)})
    monkeypatch.setattr(feature_weights, "read_arrays_file", exhausted)
    with pytest.raises(MemoryError):
        feature_weights.read_arrays(path)
