# SPDX-License-Identifier: Apache-2.0
"""PyTorch's files without PyTorch: what is read, and what is refused unread."""

import os
import pickle
import time
import zipfile

import numpy as np
import pytest

from semlic_jax.objectives.torch_files import read_torch_file


def write_zip(path, data, storages=(), compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in storages:
            archive.writestr(f"archive/data/{key}", content)


def tensor_pickle(shape, strides, count=6, offset=0, names="x"):
    """The pickle of {"x": tensor} as torch.save writes it, by hand.

    For several names, of one letter each, it is the same tensor each time.
    """

    def number(n):
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage + number(count) + b"tQ" + number(offset)
        + numbers(shape) + numbers(strides) + b"\x89N" + b"tR"
    )  # fmt: skip
    keys = (b"X\x01\0\0\0" + name.encode() for name in names)
    return b"\x80\x02}" + b"".join(key + tensor + b"s" for key in keys) + b"."


def write_stream(path, little=True, count=6, values=6, data=None):
    """The older form of `tensor_pickle([2, 3], [3, 1])`: five pickles, then values."""
    number = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    order = b"}X\x0d\0\0\0little_endian" + (b"\x88" if little else b"\x89") + b"s."
    pickles = (b"\x8a\x0a" + number + b".", b"M\xe9\x03.", order)
    head = b"".join(b"\x80\x02" + part for part in pickles)
    keys = b"\x80\x02](X\x01\0\0\x000e."
    content = count.to_bytes(8, "little") + np.arange(values, dtype="<f4").tobytes()
    path.write_bytes(head + (data or tensor_pickle([2, 3], [3, 1])) + keys + content)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_read_as_pytorch_reads_them(tmp_path, zipped):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    state = module.state_dict()
    base = torch.arange(60, dtype=torch.int64).reshape(3, 4, 5)
    cases = [
        state,
        {"epoch": 3, "state_dict": state, "options": {"rate": 1e-3, "names": ["a"]}},
        dict(module.named_parameters()),
        {"a": base.permute(2, 0, 1)[1:, :, ::2], "b": base[1], "c": base.bool()},
        {"h": state["0.weight"].half(), "d": base.double(), "u": base.byte()},
    ]
    for number, saved in enumerate(cases):
        path = tmp_path / f"{number}.pth"
        torch.save(saved, path, _use_new_zipfile_serialization=zipped)
        found = read_torch_file(path)
        expected = saved.get("state_dict", saved)
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_array_equal(found[key], tensor.detach().numpy())
            assert found[key].dtype == tensor.detach().numpy().dtype
    torch.save({"x": torch.tensor([1.5, -2.0]).bfloat16()}, tmp_path / "b.pth")
    np.testing.assert_array_equal(read_torch_file(tmp_path / "b.pth")["x"], [1.5, -2])


def test_hand_written_zip_reads(tmp_path):
    values = np.arange(6, dtype=np.float32)
    write_zip(tmp_path / "a.pth", tensor_pickle([2, 3], [3, 1]), [("0", values)])
    found = read_torch_file(tmp_path / "a.pth")["x"]
    np.testing.assert_array_equal(found, values.reshape(2, 3))


@pytest.mark.parametrize(
    "shape, strides, count, offset",
    [
        ([2, 4], [4, 1], 6, 0),
        ([2, 3], [3, 1], 6, 1),
        ([2, 3], [3, 1], 5, 0),
        ([1000, 1000], [0, 0], 6, 0),
        ([2, 3], [3, -1], 6, 0),
        ([2, 3], [1], 6, 0),
    ],
)
def test_tensors_outside_their_storage_are_refused(
    tmp_path, shape, strides, count, offset
):
    data = tensor_pickle(shape, strides, count, offset)
    write_zip(tmp_path / "a.pth", data, [("0", np.zeros(6, np.float32))])
    with pytest.raises(ValueError, match="a.pth is not a readable"):
        read_torch_file(tmp_path / "a.pth")


def test_tensors_may_share_a_storage_but_not_without_end(tmp_path):
    """Each name costs an array of its own."""
    values = np.arange(6, dtype=np.float32)
    tied = tensor_pickle([2, 3], [3, 1], names="abcd")
    write_zip(tmp_path / "a.pth", tied, [("0", values)])
    found = read_torch_file(tmp_path / "a.pth")
    assert list(found) == list("abcd")
    for array in found.values():
        np.testing.assert_array_equal(array, values.reshape(2, 3))
    copies = tensor_pickle([2, 3], [3, 1], names="abcde")
    write_zip(tmp_path / "a.pth", copies, [("0", values)])
    with pytest.raises(
        ValueError, match="a.pth was refused: .* than 4 times the bytes"
    ):
        read_torch_file(tmp_path / "a.pth")


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_code_in_a_torch_file_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 1, 2, 4, 5):
        data = pickle.dumps({"x": _Evil()}, protocol=protocol)
        for path in (tmp_path / "zip.pth", tmp_path / "raw.pth"):
            if path.name == "zip.pth":
                write_zip(path, data)
            else:
                path.write_bytes(data)
            with pytest.raises(ValueError, match=r"mkdir|operation \w+,|not start"):
                read_torch_file(path)
    write_zip(tmp_path / "a.pth", pickle.dumps({"x": _Evil()}, protocol=2))
    with pytest.raises(ValueError, match=r"a.pth was refused: it holds \w+\.mkdir,"):
        read_torch_file(tmp_path / "a.pth")
    write_zip(tmp_path / "a.pth", pickle.dumps({"x": 1}, 2), (), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_file(tmp_path / "a.pth")
    assert not (tmp_path / "pwned").exists()


def test_damaged_torch_files_give_one_error(tmp_path):
    path = tmp_path / "a.pth"
    good = tensor_pickle([2, 3], [3, 1])
    for cut in range(len(good)):
        write_zip(path, good[:cut], [("0", np.zeros(6, np.float32))])
        with pytest.raises(ValueError, match="a.pth"):
            read_torch_file(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="a.pth"):
        read_torch_file(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_torch_file(tmp_path / "none.pth")


def ordered_dict_of(pairs: int, times: int) -> bytes:
    """A pickle that makes OrderedDicts of one list of pairs, many times."""
    one = b"ccollections\nOrderedDict\nh\x01\x85R"
    listed = b"".join(
        b"(J" + index.to_bytes(4, "little") + b"Nt" for index in range(pairs)
    )
    return b"\x80\x02](" + listed + b"eq\x01" + times * one + b"."


# Tuples of tuples: to hash them recurses in C, or takes exponential time.
NESTED = b")" + b"\x85" * 2000
DOUBLED = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60))


@pytest.mark.parametrize("key", [NESTED, DOUBLED])
def test_keys_of_torch_files_are_plain(tmp_path, key):
    path = tmp_path / "a.pth"
    for data in (
        b"}" + key + b"K\x01s.",  # SETITEM
        b"}(" + key + b"K\x01u.",  # SETITEMS
        b"(" + key + b"K\x01d.",  # DICT
        b"ccollections\nOrderedDict\n](](" + key + b"K\x01ee\x85R.",
        b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"NK\x01tQ.",
    ):
        write_zip(path, b"\x80\x02" + data)
        with pytest.raises(ValueError, match="it uses a tuple as a key"):
            read_torch_file(path)
    # The old form names its storages in a list.
    number = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
    head = b"\x8a\x0a" + number + b".", b"M\xe9\x03.", b"}.", b"}."
    path.write_bytes(
        b"".join(b"\x80\x02" + part for part in head) + b"](" + key + b"e."
    )
    with pytest.raises(ValueError, match="it uses a tuple as a key"):
        read_torch_file(path)


def test_ordered_dicts_of_torch_files_copy_no_more_than_was_written(tmp_path):
    path = tmp_path / "a.pth"
    write_zip(path, ordered_dict_of(1000, 3))
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(path)
    write_zip(path, ordered_dict_of(1000, 5))
    with pytest.raises(ValueError, match="copies one list of pairs many times"):
        read_torch_file(path)
    write_zip(path, b"\x80\x02ccollections\nOrderedDict\n}\x85R.")
    with pytest.raises(ValueError, match="not a list of pairs"):
        read_torch_file(path)


def test_shapes_of_torch_files_have_an_end(tmp_path):
    path = tmp_path / "a.pth"
    for shape in ([1] * 65, [2**31 - 1] * 200_000):
        write_zip(path, tensor_pickle(shape, [1] * len(shape)), [("0", bytes(24))])
        with pytest.raises(ValueError, match="impossible shape"):
            read_torch_file(path)


def test_marks_of_torch_files_cost_linear_time(tmp_path):
    marks = b"\x80\x02" + b"N" * 200_000 + b"(t" * 50_000 + b"."
    write_zip(tmp_path / "a.pth", marks)
    started = time.monotonic()
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(tmp_path / "a.pth")
    assert time.monotonic() - started < 30  # of a second; quadratic, of ten minutes


def test_messages_about_torch_files_are_short(tmp_path):
    path = tmp_path / "a.pth"
    for data in (b"c" + b"x" * 100_000 + b"\ny\n.", NESTED + b")R."):
        write_zip(path, b"\x80\x02" + data)
        with pytest.raises(ValueError, match="a.pth was refused") as caught:
            read_torch_file(path)
        assert len(str(caught.value)) < 400


def test_torch_files_of_the_other_byte_order_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    values = np.arange(6, dtype=np.float32)
    for little in (True, False):
        for zipped in (True, False):
            if zipped:
                data = tensor_pickle([2, 3], [3, 1])
                write_zip(path, data, [("0", values)])
                with zipfile.ZipFile(path, "a") as archive:
                    order = "little" if little else "big"
                    archive.writestr("archive/byteorder", order)
            else:
                write_stream(path, little)
            if little:
                found = read_torch_file(path)["x"]
                np.testing.assert_array_equal(found, values.reshape(2, 3))
            else:
                with pytest.raises(ValueError, match="numbers are big-endian"):
                    read_torch_file(path)


def test_storages_of_another_length_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    write_stream(path, count=7)
    with pytest.raises(ValueError, match="storage 0 has 7 elements"):
        read_torch_file(path)
    write_stream(path, values=5)
    with pytest.raises(ValueError, match="24 bytes, found 20"):
        read_torch_file(path)
    for count in (5, 7):
        values = np.zeros(count, np.float32)
        write_zip(path, tensor_pickle([2, 3], [3, 1]), [("0", values)])
        with pytest.raises(ValueError, match=f"24 bytes, found {4 * count}"):
            read_torch_file(path)


def test_views_of_storages_are_refused(tmp_path):
    """Their offset would be left out, and the weights be others."""
    path = tmp_path / "a.pth"
    plain, values = tensor_pickle([2, 3], [3, 1]), np.zeros(6, np.float32)
    write_zip(path, plain.replace(b"tQ", b"NtQ"), [("0", values)])
    assert read_torch_file(path)["x"].shape == (2, 3)
    view = b"(X\x01\0\0\x001K\x03K\x03ttQ"  # key, offset and size
    write_zip(path, plain.replace(b"tQ", view), [("0", values)])
    with pytest.raises(ValueError, match="not a plain storage"):
        read_torch_file(path)


def test_of_two_dicts_of_tensors_none_is_chosen(tmp_path):
    """As of a checkpoint with averaged weights beside those of the last step."""
    one = tensor_pickle([2, 3], [3, 1])[2:-1]
    names = (b"X\x01\0\0\0" + name for name in (b"a", b"b"))
    data = b"\x80\x02}" + b"".join(name + one + b"s" for name in names) + b"."
    write_zip(tmp_path / "a.pth", data, [("0", np.zeros(6, np.float32))])
    with pytest.raises(ValueError, match="no single dict of tensors"):
        read_torch_file(tmp_path / "a.pth")


def test_attributes_of_other_things_than_dicts_are_refused(tmp_path):
    write_zip(tmp_path / "a.pth", b"\x80\x02NNb.")
    with pytest.raises(ValueError, match="sets attributes of something that is not"):
        read_torch_file(tmp_path / "a.pth")
