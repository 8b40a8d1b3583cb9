# SPDX-License-Identifier: Apache-2.0
"""Training from a model file, and a new decoder for the files of an old one."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ml_collections")

from mini_config import get_config  # noqa: E402

from semlic_jax.codec import Codec  # noqa: E402
from semlic_jax.training import average, export, integer_cost  # noqa: E402
from semlic_jax.training.model_files import (  # noqa: E402
    mean_decoder,
    training_params,
    with_decoder,
)
from semlic_jax.training.settings import read_settings  # noqa: E402
from semlic_jax.training.train import initial_params  # noqa: E402
from semlic_jax.weights import export_model, load_model, save_model  # noqa: E402


def textured(config, params):
    """The configuration and parameters with texture layers that do something."""
    rng = np.random.default_rng(3)
    g_s = dict(params["g_s"])
    for level, width in enumerate(config.widths[-2::-1]):
        g_s[f"texture_{level}"] = {
            name: {
                "kernel": rng.normal(0, 0.2, (1, 1, *shape)).astype(np.float32),
                "bias": np.zeros(shape[1], np.float32),
            }
            for name, shape in (("gate", (width, 4)), ("mix", (4, width)))
        }
    return dataclasses.replace(config, texture_channels=4), {**params, "g_s": g_s}


def test_a_model_file_is_exported_again_as_it_was(tiny_file):
    params = training_params(tiny_file)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    again = export_model(tiny_file.config, params)
    assert again.fingerprint() == tiny_file.fingerprint()
    for name in tiny_file.transforms:
        jax.tree.map(
            np.testing.assert_array_equal,
            tiny_file.transforms[name],
            again.transforms[name],
        )


def test_another_decoder_reads_the_same_files(tiny_file, photograph):
    config, params = textured(tiny_file.config, training_params(tiny_file))
    model = with_decoder(tiny_file, config, params)
    assert model.fingerprint() == tiny_file.fingerprint()
    image = photograph(80, 112)
    old, new = Codec(tiny_file), Codec(model)
    data = old.compress(image, quality=0.3)
    assert new.compress(image, quality=0.3) == data
    assert (new.decompress(data) != old.decompress(data)).any()
    np.testing.assert_array_equal(new.decompress(data), new.decompress(data))


def test_decoders_of_other_latents_are_refused(tiny_file):
    config, params = textured(tiny_file.config, training_params(tiny_file))
    with pytest.raises(ValueError, match="found one with different gains"):
        with_decoder(tiny_file, config, {**params, "log_gain": params["log_gain"] + 1})
    other = dataclasses.replace(config, blocks=2)
    with pytest.raises(ValueError, match="expected a decoder for the architecture"):
        with_decoder(tiny_file, other, params)


def test_training_starts_from_a_model_file(tiny_model, tmp_path):
    config = get_config()
    config.architecture = dict(texture_channels=4)
    config.init_from = str(tiny_model)
    settings = read_settings(config)
    params = initial_params(settings, None)
    known = training_params(load_model(tiny_model))
    for name in ("g_a", "h_a", "entropy", "prior", "log_gain"):
        jax.tree.map(np.testing.assert_array_equal, params[name], known[name])
    # Fresh texture layers change nothing yet.
    assert not params["g_s"]["texture_0"]["mix"]["kernel"].any()
    assert params["g_s"]["texture_0"]["gate"]["kernel"].any()
    config.architecture = dict(blocks=2)
    with pytest.raises(ValueError, match="does not fit this model"):
        initial_params(read_settings(config), None)


def test_training_starts_from_a_packaged_model(tmp_path, monkeypatch):
    """By its name, whatever is called so in the working folder."""
    monkeypatch.chdir(tmp_path)
    config = get_config()
    config.update(model="small", init_from="small")
    known = load_model("small")
    # Fresh texture layers would have to be compiled.
    config.architecture = dataclasses.asdict(known.config) | dict(texture_channels=0)
    settings = read_settings(config)
    (tmp_path / "small").mkdir()
    params = initial_params(settings, None)
    for name in ("g_a", "entropy"):
        jax.tree.map(
            np.testing.assert_array_equal, params[name], training_params(known)[name]
        )


def test_export_keeps_the_rest_of_a_model(
    tiny_model, tiny_file, tmp_path, monkeypatch, capsys
):
    _, params = textured(tiny_file.config, training_params(tiny_file))
    config = dataclasses.replace(tiny_file.config, texture_channels=4)
    monkeypatch.setitem(export.SIZES, "tiny", config)
    monkeypatch.setattr(export, "read_params", lambda stage, step: params)
    path = tmp_path / "new.npz"
    arguments = ["run", str(path), "--size", "tiny", "--decoder-for", str(tiny_model)]
    export.main(arguments)
    model = load_model(path)
    assert model.fingerprint() == tiny_file.fingerprint()
    assert model.config == config
    with pytest.raises(SystemExit):
        export.main([*arguments, "--fit-tables", "synthetic:2"])
    before = path.read_bytes()
    with pytest.raises(SystemExit) as ended:
        export.main(arguments)
    assert ended.value.code == 1 and path.read_bytes() == before
    assert "give --force" in capsys.readouterr().err
    converted = tmp_path / "other.npz"
    save_model(converted, model)
    assert converted.read_bytes() == path.read_bytes()


def test_the_architecture_is_that_of_the_run(
    tiny_model, tiny_file, tmp_path, monkeypatch, capsys
):
    config, params = textured(tiny_file.config, training_params(tiny_file))
    monkeypatch.setattr(export, "read_params", lambda stage, step: params)
    path, run = tmp_path / "new.npz", tmp_path / "run"
    arguments = [f"{run}/perceptual", str(path), "--decoder-for", str(tiny_model)]
    settings = get_config()
    settings.architecture = dataclasses.asdict(config)
    run.mkdir()
    (run / "config.json").write_text(settings.to_json_best_effort())
    export.main(arguments)
    assert load_model(path).config == config

    def refusal(*more):
        before = path.read_bytes()
        with pytest.raises(SystemExit) as ended:
            export.main([*arguments, "--force", *more])
        assert ended.value.code == 1 and path.read_bytes() == before
        return capsys.readouterr().err

    assert "found that of small" in refusal("--size", "small")
    settings.architecture = dict(no_such=1)
    (run / "config.json").write_text(settings.to_json_best_effort())
    assert "cannot read the model's architecture" in refusal()
    (run / "config.json").write_text("[]")
    assert "cannot read the model's architecture" in refusal()
    (run / "config.json").unlink()
    assert "does not exist: give --size" in refusal()


def test_photographs_that_cannot_be_read_are_refused(tmp_path, capsys):
    pytest.importorskip("array_record", reason="needs array-record (extra `train`)")
    (tmp_path / "bad.array_record").write_text("text")
    arguments = ["run/integer", str(tmp_path / "new.npz"), "--size", "tiny"]
    with pytest.raises(SystemExit) as ended:
        export.main([*arguments, "--fit-tables", str(tmp_path / "bad.array_record")])
    assert ended.value.code == 1
    assert "bad.array_record: ArrayRecord file should be" in capsys.readouterr().err


def test_parameters_of_another_model_are_refused(
    tiny_file, tmp_path, monkeypatch, capsys
):
    params = training_params(tiny_file)
    monkeypatch.setattr(export, "read_params", lambda stage, step: params)
    arguments = ["run/labeller", str(tmp_path / "new.npz"), "--size"]

    def refusal(size):
        with pytest.raises(SystemExit) as ended:
            export.main([*arguments, size])
        assert ended.value.code == 1
        return capsys.readouterr().err

    assert "in run/labeller does not fit this model" in refusal("small")
    del params["g_s"]
    assert "should have shape" in refusal("tiny")


# Means of decoders.


@pytest.fixture
def other_decoder(tiny_file):
    """The same model with a g_s three times as large."""
    g_s = jax.tree.map(lambda leaf: 3 * leaf, tiny_file.transforms["g_s"])
    transforms = {**tiny_file.transforms, "g_s": g_s}
    return dataclasses.replace(tiny_file, transforms=transforms)


@pytest.mark.parametrize(("weights", "factor"), [(None, 2.0), ([6, 2], 1.5)])
def test_the_mean_of_decoders(tiny_file, other_decoder, weights, factor):
    mean = mean_decoder([tiny_file, other_decoder], weights)
    assert mean.fingerprint() == tiny_file.fingerprint()
    for name, tree in tiny_file.transforms.items():
        scale = factor if name == "g_s" else 1.0
        for own, leaf in zip(
            jax.tree.leaves(mean.transforms[name]), jax.tree.leaves(tree), strict=True
        ):
            assert own.dtype == np.float16
            np.testing.assert_allclose(own, scale * leaf, rtol=1e-3, atol=1e-6)


def test_models_with_other_latents_have_no_mean(tiny_file):
    transforms = dict(tiny_file.transforms)
    transforms["log_gain"] = transforms["log_gain"] + np.float16(1)
    scaled = dataclasses.replace(tiny_file, transforms=transforms)
    with pytest.raises(ValueError, match="differ only in their decoder"):
        mean_decoder([tiny_file, scaled])
    frequencies = dataclasses.replace(tiny_file, z_tables=tiny_file.y_tables)
    with pytest.raises(ValueError, match="differ only in their decoder"):
        mean_decoder([tiny_file, frequencies])
    config = dataclasses.replace(tiny_file.config, texture_channels=4)
    with pytest.raises(ValueError, match="models of one architecture"):
        mean_decoder([tiny_file, dataclasses.replace(tiny_file, config=config)])


@pytest.mark.parametrize(
    "weights", [[1], [2, -1], [0, 0], [1, float("nan")], [1e308, 1e308]]
)
def test_weights_of_a_mean_are_checked(tiny_file, weights):
    with pytest.raises(ValueError, match="expected (a weight|finite weights)"):
        mean_decoder([tiny_file, tiny_file], weights)


def test_the_command_writes_a_mean(
    tiny_model, tiny_file, other_decoder, tmp_path, capsys
):
    other, path = tmp_path / "other.npz", tmp_path / "mean.npz"
    save_model(other, other_decoder)
    arguments = [str(path), str(tiny_model), str(other), "--weights", "1,3"]
    average.main(arguments)
    expected = mean_decoder([tiny_file, other_decoder], [1, 3])
    written = load_model(path)
    jax.tree.map(np.testing.assert_array_equal, written.transforms, expected.transforms)
    before = path.read_bytes()
    for wrong in (arguments, [*arguments[:-1], "1,2,3", "--force"]):
        with pytest.raises(SystemExit) as ended:
            average.main(wrong)
        assert ended.value.code == 1 and path.read_bytes() == before
    errors = capsys.readouterr().err
    assert "give --force" in errors and "a weight for each model" in errors
    with pytest.raises(SystemExit) as ended:
        average.main([*arguments[:-1], "1,x", "--force"])
    assert ended.value.code == 2  # wrong usage
    assert "numbers with commas between them, found '1,x'" in capsys.readouterr().err


def test_a_model_that_appears_meanwhile_is_kept(
    tiny_model, tiny_file, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "mean.npz"

    def meanwhile(models, weights):
        path.write_bytes(b"theirs")
        return tiny_file

    monkeypatch.setattr(average, "mean_decoder", meanwhile)
    with pytest.raises(SystemExit) as ended:
        average.main([str(path), str(tiny_model)])
    assert ended.value.code == 1 and path.read_bytes() == b"theirs"
    assert "exists: give --force" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_what_has_no_checkpoint_is_not_exported(place, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"no folder")
    with pytest.raises(SystemExit) as ended:
        export.main([str(tmp_path / place), str(tmp_path / "new.npz")])
    assert ended.value.code == 1
    reason = f"expected a checkpoint in {tmp_path / place}, found none"
    assert capsys.readouterr().err.endswith(f"{reason}\n")


@pytest.mark.parametrize(
    ("image", "reason"),
    [("ok.png", "does not fit this model"), ("no.png", "No such file")],
)
def test_the_cost_of_integers_needs_a_codec_and_images(
    tiny_model, tmp_path, monkeypatch, capsys, image, reason
):
    Image.new("RGB", (64, 64)).save(tmp_path / "ok.png")
    monkeypatch.setattr(integer_cost, "read_params", lambda stage: {})
    monkeypatch.setattr(integer_cost, "integer_cost", None)
    command = ["", str(tmp_path), str(tiny_model), str(tmp_path / image)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        integer_cost.main()
    assert ended.value.code == 1 and reason in capsys.readouterr().err
