# SPDX-License-Identifier: Apache-2.0
"""Model files: round trips, fingerprints, and refusal of whatever is not one."""

import dataclasses
import io
import json
import os
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest

from semlic_jax import arrays_file, weights
from semlic_jax.model.compression import SIZES, ModelConfig
from semlic_jax.packaged import load_for, name_of_model
from semlic_jax.weights import export_model, load_model, save_model


def flat(model):
    """Every array of a model by name."""
    arrays = dict(weights._flatten("transforms", model.transforms))
    arrays |= dict(weights._flatten("prior", model.prior))
    return arrays | dict(model._exact_arrays())


def changed(tree, path, change):
    """A copy of a tree of arrays with one of them changed."""
    head, _, rest = path.partition("/")
    if rest:
        return {**tree, head: changed(tree[head], rest, change)}
    return {**tree, head: change(tree[head].copy())}


def put(value):
    def change(array):
        array[(0,) * array.ndim] = value
        return array

    return change


def test_round_trip(tiny_file, tiny_model):
    loaded = load_model(tiny_model)
    assert loaded.config == tiny_file.config
    assert loaded.fingerprint() == tiny_file.fingerprint()
    before, after = flat(tiny_file), flat(loaded)
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype, name
        np.testing.assert_array_equal(array, after[name], name)
    assert {a.dtype.str for n, a in after.items() if n.startswith("transforms")} == {
        "<f2"
    }


def test_saving_is_deterministic_and_replaces(tiny_file, tiny_model, tmp_path):
    path = tmp_path / "again.npz"
    path.write_bytes(b"something else")
    save_model(path, tiny_file)
    assert path.read_bytes() == tiny_model.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.npz"]


def test_fingerprint_is_of_what_decides_the_meaning_of_a_file(tiny_file):
    def variant(**fields):
        return dataclasses.replace(tiny_file, **fields).fingerprint()

    base = tiny_file.fingerprint()
    assert len(base) == 32 and base == variant()
    # Floats, and what of the architecture has no part in the coding.
    kernel = "g_s/skip/kernel"
    assert base == variant(transforms=changed(tiny_file.transforms, kernel, put(9)))
    assert base == variant(prior=changed(tiny_file.prior, "bias_0", put(9)))
    config = tiny_file.config
    assert base == variant(config=dataclasses.replace(config, name="other", blocks=2))
    # All else.
    found = {base}
    for layer in tiny_file.integers:
        for part in ("kernel", "bias", "shift"):
            integers = changed(tiny_file.integers, f"{layer}/{part}", put(3))
            found.add(variant(integers=integers))
    tables = tiny_file.y_tables
    counts = tables.counts.copy()
    counts[:2] += np.array([-1, 1], np.int64).astype(np.uint32)
    other = dataclasses.replace(tables, counts=counts)
    found.add(variant(y_tables=other))
    found.add(variant(y_tables=tiny_file.z_tables, z_tables=tables))
    found.add(variant(z_tables=other))
    for field, value in (
        ("context_shifts", (4, 2, 3)),
        ("groups", (8, 4, 12)),
        ("psi_channels", 17),
        ("context_channels", 17),
        ("hidden_channels", 17),
        ("hyper_channels", 9),
    ):
        found.add(variant(config=dataclasses.replace(config, **{field: value})))
    assert len(found) == 1 + 3 * len(tiny_file.integers) + 3 + 6


def test_fingerprint_does_not_depend_on_order_or_memory_layout(tiny_file):
    integers = {
        name: {part: np.asfortranarray(a) for part, a in reversed(layer.items())}
        for name, layer in reversed(tiny_file.integers.items())
    }
    other = dataclasses.replace(tiny_file, integers=integers)
    assert other.fingerprint() == tiny_file.fingerprint()


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("g_s/skip/kernel", 1e5, "g_s/skip/kernel within .*65504, found 100000"),
        ("g_a/skip/kernel", np.nan, "g_a/skip/kernel"),
        ("log_gain", -np.inf, "log_gain"),
        ("prior/matrix_0", np.nan, "prior/matrix_0"),
        ("entropy/h_s_0/kernel", np.nan, "h_s_0/kernel"),
    ],
)
def test_parameters_that_do_not_fit_are_not_exported(
    tiny_params, tiny_config, path, value, message
):
    with pytest.raises(ValueError, match=message):
        export_model(tiny_config, changed(tiny_params, path, put(value)))


def test_a_density_far_from_zero_is_not_exported(tiny_params, tiny_config):
    far = changed(tiny_params, "prior/bias_3", put(-1e4))
    with pytest.raises(
        ValueError, match="channel 0 of z within .*127, found next to none"
    ):
        export_model(tiny_config, far)


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="packaged model .* found 'huge'"):
        load_model("huge")
    with pytest.raises(ValueError, match="none.npz does not exist"):
        load_model(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + ".npz", "a\0b", "a/" * 3000])
def test_names_that_the_system_refuses(name):
    with pytest.raises(
        ValueError, match="the name of a packaged|not a valid model file|cannot be read"
    ):
        load_model(name)


def test_files_in_folders_that_may_not_be_read(monkeypatch):
    """As /proc/1/root for all but root."""
    stat = os.stat

    def denied(path, **options):
        if str(path).startswith("/locked"):
            raise PermissionError(13, "Permission denied")
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ValueError, match="found '/locked/x'"):
        load_model("/locked/x")


@pytest.mark.parametrize("function", ["read_arrays_file", "check_params"])
def test_a_lack_of_memory_is_not_taken_for_a_damaged_file(
    tiny_model, function, monkeypatch
):
    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr(weights, function, exhausted)
    with pytest.raises(MemoryError):
        load_model(tiny_model)


def test_packaged_models_have_cards_and_are_found_by_their_files():
    most_bytes = {"small": 12_000_000, "base": 60_000_000}
    assert weights.pretrained_models().keys() == most_bytes.keys()
    for name, card in weights.pretrained_models().items():
        model = load_model(name)
        assert model.fingerprint().hex() == card["fingerprint"]
        assert name_of_model(model.fingerprint()) == name
        assert model.config == SIZES[name]
        folder = weights.PRETRAINED_FOLDER
        assert (folder / f"{name}.npz").stat().st_size <= most_bytes[name]
        assert (folder.parent / card["card"]).is_file()


def test_files_called_as_packaged_models_are_not_read_in_their_place(
    tiny_model, tiny_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "small"
    small.write_bytes(tiny_model.read_bytes())
    card = weights.pretrained_models()["small"]
    assert load_model("small").fingerprint().hex() == card["fingerprint"]
    file = Path(__file__).parent / "data" / "packaged" / "small" / "90x37.semlic"
    codec = load_for(file.read_bytes())
    assert (codec.name, codec.fingerprint.hex()) == ("small", card["fingerprint"])
    for path in ("./small", small, str(small)):
        assert load_model(path).fingerprint() == tiny_file.fingerprint()
    small.rename("large")
    assert load_model("large").fingerprint() == tiny_file.fingerprint()


def entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


def npy_of(header):
    """An array's file whose header is this text."""
    text = header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.fixture
def rebuilt(tiny_model, tmp_path):
    """Function: writes the model file with some entries changed or (None) left out."""

    def write(**changes):
        content = entries(tiny_model) | {
            name.replace("__", "/") + ".npy": data for name, data in changes.items()
        }
        path = tmp_path / "changed.npz"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                if data is not None:
                    archive.writestr(name, data)
        return path

    return write


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def test_rebuilt_files_are_valid(rebuilt, tiny_file):
    assert load_model(rebuilt()).fingerprint() == tiny_file.fingerprint()


class Exploit:
    """Loading this would run code."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_refused(rebuilt, tmp_path):
    objects = np.array([Exploit()], dtype=object)
    refused(rebuilt(config=npy(objects, allow_pickle=True)), "config.npy of <f2.* |O")
    for data in (npy(objects, allow_pickle=True), __import__("pickle").dumps({})):
        path = tmp_path / "pickle.npz"
        path.write_bytes(data)
        refused(path, "not a valid model file")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"config": None}, "expected the entries"),
        ({"extra": npy(np.zeros(3, np.float32))}, "expected the entries"),
        ({"transforms__log_gain": None}, "log_gain of shape .* found nothing"),
        ({"transforms__g_x": npy(np.zeros(2, np.float16))}, "g_x of shape nothing"),
        ({"transforms__log_gain": npy(np.zeros((6, 23), np.float16))}, "log_gain"),
        ({"transforms__log_gain": npy(np.zeros((6, 24), np.int8))}, "finite floats"),
        (
            {"transforms__log_gain": npy(np.full((6, 24), np.nan, np.float16))},
            "finite floats as log_gain",
        ),
        ({"transforms__log_gain": npy(np.zeros((6, 24)))}, "log_gain.npy of .*<f8"),
        ({"transforms__log_gain": npy(np.zeros((6, 24), ">f2"))}, "found >f2"),
        ({"prior__bias_0": None}, "prior/bias_0"),
        ({"entropy__h_s_0__kernel": None}, "h_s_0"),
        ({"entropy__h_s_0__kernel": npy(np.zeros((3, 3, 9, 15), np.int8))}, "h_s_0/k"),
        ({"entropy__h_s_0__shift": npy(np.zeros(16, np.int8))}, "shifts from 1 to 14"),
        ({"entropy__h_s_0": npy(np.zeros(16, np.int8))}, "h_s_0"),
        ({"entropy__h_s_0__kernel__x": npy(np.zeros(1, np.int8))}, "kernel"),
        ({"tables__z__counts": None}, "counts"),
        ({"tables__z__counts": npy(np.ones(3, np.uint32))}, "counts"),
        ({"tables__z__offsets": npy(np.zeros(8, np.float32))}, "offsets"),
        ({"tables__z__offsets": npy(np.zeros(9, np.int32))}, "8 z tables, found 9 off"),
        ({"tables__y__starts": npy(np.zeros(66, np.int32))}, "64 y tables.* 66 starts"),
        ({"config": b"config"}, "not a valid model file"),
        ({"config": npy(np.zeros(3, np.int8), version=(2, 0))}, "version"),
        ({"config": npy(np.zeros(3, np.int8))[:-1]}, "config.npy of shape"),
        ({"config": npy(np.zeros(3, np.int8)) + b"\0"}, "config.npy of shape"),
        ({"config": npy_of("{'descr': (")}, "not a valid model file: .*EOF"),
        (
            {"config": npy_of("-" * 9000 + "1")},
            "header of config.npy is nested too deeply",
        ),
        ({"config": npy_of("if 1:\n  2\n 3")}, "not a valid model file: unindent"),
        (
            {"config": npy_of("{'descr': (), 'fortran_order': False, 'shape': ()}")},
            "not a valid model file: tuple index",
        ),
        (
            {
                "tables__y": npy(np.zeros(3, np.int32)),
                **{f"tables__y__{name}": None for name in weights._TABLE_ARRAYS},
            },
            "not a valid model file: only integers",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_files_with_a_wrong_entry_are_refused(rebuilt, changes, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of zipfile, about two entries
        path = rebuilt(**changes)
    refused(path, message)


def test_entries_that_are_there_twice_are_refused(tiny_model, tmp_path):
    path = tmp_path / "twice.npz"
    path.write_bytes(tiny_model.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("config.npy", npy(np.zeros(3, np.uint8)))
    refused(path, "expected one config.npy, found two")


def test_claims_cost_no_memory(rebuilt, tmp_path, monkeypatch):
    """A header that claims a petabyte; entries that unpack to more than allowed."""
    header = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (2**48,)}
    np.lib.format.write_array_header_1_0(header, claim)
    refused(rebuilt(transforms__log_gain=header.getvalue()), "log_gain.npy of shape")
    monkeypatch.setattr(arrays_file, "MAX_FILE_BYTES", 2**20)
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.npy", npy(np.zeros(2**21, np.uint8)))
    assert path.stat().st_size < 2**14
    refused(path, "of 1048576 bytes in total, found 1 of 2097")
    monkeypatch.undo()
    monkeypatch.setattr(arrays_file, "ALLOWED_BYTES", 2**20)
    limit = 16 * path.stat().st_size + 2**20
    refused(path, f"of {limit} bytes in total, found 1 of 2097")
    monkeypatch.setattr(arrays_file, "MAX_ENTRIES", 3)
    refused(rebuilt(), "at most 3 arrays")


def test_tables_that_do_not_fit_are_refused_before_they_are_copied(rebuilt):
    """A file may be small and its tables not."""
    counts = np.ones(2**23, np.uint32)
    path = rebuilt(
        tables__y__offsets=npy(np.zeros(2**8, np.int32)),
        tables__y__starts=npy(np.arange(0, 2**23 + 1, 2**15, dtype=np.int32)),
        tables__y__counts=npy(counts),
    )
    refused(path, "64 y tables, found 256")  # loads what any file needs
    tracemalloc.start()
    refused(path, "64 y tables, found 256")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2.2 * counts.nbytes  # zipfile takes twice what it returns
    refused(rebuilt(tables__y__counts=npy(counts)), "65538 counts .* found 8388608")


def test_a_directory_that_lies_costs_no_memory(tmp_path):
    path = tmp_path / "lie.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.npy", npy(np.zeros(2**25, np.uint8)))
        archive.infolist()[0].file_size = 10**5
    refused(path, "not a valid model file")  # loads what any file needs
    tracemalloc.start()
    refused(path, "not a valid model file")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**21


def test_other_compressions_are_refused(tmp_path):
    path = tmp_path / "lzma.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("config.npy", npy(np.zeros(9, np.uint8)))
    refused(path, "stored or deflated")


def as_json(**changes):
    fields = dataclasses.asdict(SIZES["tiny"]) | changes
    text = json.dumps({key: value for key, value in fields.items() if value != "-"})
    return npy(np.frombuffer(text.encode(), np.uint8))


@pytest.mark.parametrize(
    "data, message",
    [
        (as_json(blocks="-"), "blocks"),
        (as_json(colour=3), "colour"),
        (as_json(blocks=10**9), "blocks, found 1000000000"),
        (as_json(blocks=True), "blocks, found True"),
        (as_json(blocks=1.0), "blocks, found 1.0"),
        (as_json(blocks="1"), "blocks, found '1'"),
        (as_json(name=7), "name, found 7"),
        (as_json(linear_skip=1), "linear_skip, found 1"),
        (as_json(groups=24), "groups, found 24"),
        (as_json(groups=[-4, 16, 12]), "groups, found -4"),
        (as_json(groups=[0, 12, 12]), "groups, found 0"),
        (as_json(groups=[4, 8, 13]), "add up to latent_channels 24, found 25"),
        (as_json(groups=[[4], [8], [12]]), "groups"),
        (as_json(groups=[]), "groups"),
        (as_json(context_shifts=[4, 2]), "each of 3 groups, found 2"),
        (as_json(context_shifts=[4, 2, -1]), "context_shifts, found -1"),
        (as_json(context_shifts=[4, 2, 99]), "context_shifts, found 99"),
        (as_json(widths=[16, 24]), "3 widths"),
        (as_json(patch=3), "patch of 1, 2 or 4, found 3"),
        (as_json(gain_anchors=1), "gain_anchors, found 1"),
        (as_json(psi_channels=10**6), "psi_channels"),
        (as_json(widths=[16, 24, 48]), "shape"),
        (npy(np.frombuffer(b"[" * 9999, np.uint8)), "not a valid model file"),
        (npy(np.frombuffer(b"[1, 2]", np.uint8)), "not a valid model file"),
        (npy(np.frombuffer(b"\xff\xfe", np.uint8)), "not a valid model file"),
        (npy(np.zeros(2**15, np.uint8)), "expected the entries"),
    ],
)
def test_hostile_configurations_are_refused(rebuilt, data, message):
    refused(rebuilt(config=data), message)


def test_configurations_of_all_sizes_survive_json():
    for config in SIZES.values():
        again = ModelConfig(**json.loads(json.dumps(dataclasses.asdict(config))))
        assert again == config and hash(again) == hash(config)


def test_damaged_files_give_one_kind_of_error(tiny_model, tmp_path):
    """Flipped bytes all over the file, with most of them where zip keeps its own."""
    data = tiny_model.read_bytes()
    rng = np.random.default_rng(0)
    directory = data.rindex(b"PK\1\2", 0, data.index(b"PK\1\2") + 4)
    positions = [*rng.integers(0, len(data), 60), *rng.integers(0, 300, 40)]
    positions += list(rng.integers(directory, len(data), 100))
    path = tmp_path / "damaged.npz"
    refusals = 0
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_model(path)
        except ValueError as error:
            refusals += 1
            assert str(path) in str(error)
    assert refusals > 100  # the rest are dates and the like
    for size in (0, 1, 30, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        refused(path, "not a valid model file")


def test_arrays_by_columns_keep_their_values(rebuilt, tiny_file):
    kernel = tiny_file.integers["h_s_0"]["kernel"]
    gain = tiny_file.transforms["log_gain"]
    path = rebuilt(
        entropy__h_s_0__kernel=npy(np.asfortranarray(kernel)),
        transforms__log_gain=npy(np.asfortranarray(gain)),
    )
    loaded = load_model(path)
    np.testing.assert_array_equal(loaded.transforms["log_gain"], gain)
    assert loaded.fingerprint() == tiny_file.fingerprint()
