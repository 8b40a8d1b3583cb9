# SPDX-License-Identifier: Apache-2.0
"""Reading photographs that nobody has checked, and writing files whole."""

from __future__ import annotations

import io
import os
import stat
import threading
import types

import numpy as np
import pytest
from PIL import Image, ImageCms, JpegImagePlugin, PngImagePlugin
from png_files import png

from semlic_jax import images
from semlic_jax.training import sources

RNG_SEED = 7


@pytest.fixture
def pixels():
    return np.random.default_rng(RNG_SEED).integers(0, 256, (5, 7, 3), np.uint8)


def read(image: Image.Image, *, kind: str = "PNG", background=None, **options):
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    stream.seek(0)
    return images.read_photograph(stream, background=background)


def test_rgb_is_read_as_it_is_without_a_note(pixels):
    photograph = read(Image.fromarray(pixels))
    np.testing.assert_array_equal(photograph.pixels, pixels)
    assert photograph.pixels.dtype == np.uint8
    assert photograph.pixels.flags.writeable
    assert photograph.notes == () and photograph.icc_profile is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(pixels, orientation):
    # The eight cases of the EXIF standard: how stored pixels become upright ones.
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph = read(Image.fromarray(pixels), exif=exif)
    np.testing.assert_array_equal(photograph.pixels, upright)


def test_damaged_exif_does_not_stop_reading(pixels):
    photograph = read(Image.fromarray(pixels), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    np.testing.assert_array_equal(photograph.pixels, pixels)
    assert any("EXIF" in note for note in photograph.notes)


def test_rgb_icc_profile_is_kept_where_it_says_something(pixels, other_profile):
    photograph = read(Image.fromarray(pixels), icc_profile=other_profile)
    assert photograph.icc_profile == other_profile
    # One that cannot be used here may mean something elsewhere.
    foreign = other_profile.replace(b"TRC", b"???")
    photograph = read(Image.fromarray(pixels), icc_profile=foreign)
    assert photograph.icc_profile == foreign
    no_size = bytes(4) + other_profile[4:]
    junk = bytes(16) + b"RGB " + bytes(3000)
    for damaged in (other_profile[:-1], other_profile[:200], no_size, junk):
        photograph = read(Image.fromarray(pixels), icc_profile=damaged)
        assert photograph.icc_profile is None
        assert photograph.notes == ("its ICC profile is damaged and was dropped",)
    long = other_profile + bytes(2**24)
    photograph = read(Image.fromarray(pixels), kind="TIFF", icc_profile=long)
    assert photograph.icc_profile is None
    assert photograph.notes == (
        f"its ICC profile of {len(long):,} bytes is too large and was dropped",
    )
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photograph = read(Image.fromarray(pixels), icc_profile=srgb)
    assert photograph.icc_profile is None and photograph.notes == ()
    np.testing.assert_array_equal(photograph.pixels, pixels)


def test_profile_of_another_colour_space_is_not_kept(pixels):
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    photograph = read(Image.fromarray(pixels[..., 0]), icc_profile=lab)
    assert photograph.icc_profile is None
    assert any("ICC profile" in note for note in photograph.notes)


def test_greyscale(pixels):
    photograph = read(Image.fromarray(pixels[..., 0]))
    np.testing.assert_array_equal(
        photograph.pixels, np.repeat(pixels[..., :1], 3, axis=2)
    )
    assert photograph.notes == ("a greyscale image was converted to RGB",)


def test_black_and_white():
    photograph = read(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    np.testing.assert_array_equal(photograph.pixels[0], [[0] * 3, [255] * 3])


def test_programs_are_no_photographs():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="is a PostScript file: expected a photograph"):
        images.read_photograph(io.BytesIO(eps))


def iptc_records(content: bytes) -> bytes:
    """A file of IPTC records that holds another file as its 64 x 64 pixels."""
    records = [
        (3, 60, b"\1\0"),
        (3, 20, b"\0\x40"),
        (3, 30, b"\0\x40"),
        (3, 120, b"\5"),
        (8, 10, content),
        (9, 10, b""),
    ]
    return b"".join(
        bytes([0x1C, *kind, *len(data).to_bytes(2, "big")]) + data
        for *kind, data in records
    )


@pytest.mark.parametrize("reader", ["read_photograph", "read_brightness"])
def test_what_may_hold_a_program_is_no_photograph(reader, monkeypatch):
    """Pillow opens what IPTC records hold, whatever it is, while it loads pixels."""
    inner = io.BytesIO()
    Image.new("L", (64, 64)).save(inner, "PNG")
    outer = iptc_records(inner.getvalue())
    assert Image.open(io.BytesIO(outer)).format == "IPTC"
    with pytest.raises(ValueError, match="is a file of IPTC records: expected a photo"):
        getattr(images, reader)(io.BytesIO(outer))


class OwnError(Exception):
    """As some of Pillow's decoders have."""


@pytest.mark.parametrize("error", [AttributeError("no offset"), OwnError("no offset")])
def test_any_error_of_a_decoder_is_a_refusal(pixels, monkeypatch, error):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")

    def fail(*arguments, **options):
        raise error

    for owner, name, message in (
        (PngImagePlugin.PngImageFile, "load", "the input is damaged: no offset"),
        (Image, "open", "the input is not a readable image: no offset"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fail)
            with pytest.raises(ValueError, match=message):
                images.read_photograph(stream)
    assert images.read_photograph(stream).notes == ()
    with monkeypatch.context() as patched:
        patched.setattr(images.ImageOps, "exif_transpose", fail)
        assert images.read_photograph(stream).notes == (
            "damaged EXIF data were ignored",
        )
    monkeypatch.setattr(OwnError, "n_frames", property(fail), raising=False)
    assert images._count_frames(OwnError()) == 1
    # This says nothing of the file.
    error = MemoryError()
    with monkeypatch.context() as patched:
        patched.setattr(PngImagePlugin.PngImageFile, "load", fail)
        with pytest.raises(MemoryError):
            images.read_photograph(stream)


def test_sides_that_a_kind_of_file_cannot_have():
    wide = np.zeros((1, 65501, 3), np.uint8)
    for suffix, most in ((".jpg", 65500), (".webp", 16383)):
        with pytest.raises(ValueError, match=f"at most {most} pixels .* 65501x1"):
            images.encode_image(wide, suffix)
    images.check_suffix(".png", wide.shape)


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(images.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="the folder of .* cannot be written to"):
        images.check_outputs([tmp_path / "a.png"], force=False)
    images.check_outputs(["/dev/null"], force=False)


def test_what_a_shell_appends_to_is_not_replaced(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"kept, ")
    with open(path, "ab") as log:
        for name in (f"/dev/fd/{log.fileno()}", f"/proc/self/fd/{log.fileno()}"):
            if os.path.exists(name):
                images.write_file(name, b"whole", force=True)
    assert path.read_bytes() in (b"kept, whole", b"kept, wholewhole")


def test_a_file_that_is_replaced_keeps_its_users(tmp_path):
    path = tmp_path / "private"
    path.write_bytes(b"old")
    for mode in (0o600, 0o644):
        path.chmod(mode)
        images.write_file(path, b"new", force=True)
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["private"]


def test_what_cannot_be_written_is_named(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "fsync", no_space)
    path = tmp_path / "out.semlic"
    with pytest.raises(OSError, match="No space left") as caught:
        images.write_file(path, b"whole")
    assert caught.value.filename == str(path) and os.listdir(tmp_path) == []


def test_a_pipe_without_a_name_is_written_to():
    read_end, write_end = os.pipe()
    try:
        images.write_file(f"/dev/fd/{write_end}", b"whole")
        assert os.read(read_end, 9) == b"whole"
    finally:
        os.close(read_end)
        os.close(write_end)


def test_threads_leave_the_warnings_of_python_alone(pixels, monkeypatch):
    """What is caught is of the whole process: a thread must catch nothing."""

    def caught(**options):
        raise AssertionError

    stand_in = types.SimpleNamespace(catch_warnings=caught)
    monkeypatch.setattr(images, "warnings", stand_in)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    found = sources.decode(stream.getvalue(), "here")
    np.testing.assert_array_equal(found, pixels)
    assert images.read_brightness(stream).shape == pixels.shape[:2]  # of a mask


def test_palette(pixels):
    image = Image.fromarray(pixels).quantize(16)
    photograph = read(image)
    np.testing.assert_array_equal(photograph.pixels, np.array(image.convert("RGB")))
    assert photograph.notes == ("a palette image was converted to RGB",)


def test_cmyk():
    photograph = read(Image.new("CMYK", (3, 2), (255, 0, 0, 0)), kind="TIFF")
    np.testing.assert_array_equal(photograph.pixels[0, 0], [0, 255, 255])
    assert photograph.notes == ("a CMYK image was converted to RGB",)


def test_floating_point_samples_are_refused():
    with pytest.raises(ValueError, match="floating-point"):
        read(Image.fromarray(np.zeros((2, 2), np.float32)), kind="TIFF")


def test_samples_beyond_16_bits_are_refused():
    with pytest.raises(ValueError, match="0 to 65535"):
        images.photograph_of(Image.fromarray(np.full((2, 2), 70000, np.int32)))
    # Small ones would be taken for 16 bits, and be black.
    with pytest.raises(ValueError, match="32-bit samples: expected 8 or 16 bits"):
        read(Image.fromarray(np.full((2, 2), 200, np.int32)), kind="TIFF")


TRANSPARENT = {
    "RGBA": Image.new("RGBA", (2, 1), (200, 100, 0, 0)),
    "LA": Image.new("LA", (2, 1), (200, 0)),
    "half": Image.new("RGBA", (2, 1), (200, 100, 0, 128)),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_needs_a_background(name):
    message = "give a background colour .*background='white', --background white"
    with pytest.raises(ValueError, match=message):
        read(TRANSPARENT[name])


def test_transparent_pixels_are_laid_on_the_background():
    photograph = read(TRANSPARENT["RGBA"], background=(1, 2, 3))
    np.testing.assert_array_equal(photograph.pixels, [[[1, 2, 3]] * 2])
    photograph = read(TRANSPARENT["half"], background=(0, 0, 0))
    np.testing.assert_allclose(photograph.pixels[0, 0], [100, 50, 0], atol=1)
    assert photograph.notes == (
        "transparent pixels were laid on the background colour",
    )


def test_transparent_palette_entry(pixels):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    with pytest.raises(ValueError, match="transparent"):
        read(image, transparency=0)
    photograph = read(image, transparency=0, background=(255, 255, 255))
    np.testing.assert_array_equal(photograph.pixels[0], [[255] * 3, [40, 50, 60]])


def test_transparent_grey_value_of_a_16_bit_png():
    wide = Image.fromarray(np.array([[1000, 60000]], np.uint16))
    photograph = read(wide, transparency=1000, background=(9, 8, 7))
    np.testing.assert_array_equal(photograph.pixels[0], [[9, 8, 7], [233] * 3])


def test_opaque_alpha_is_dropped_with_a_note(pixels):
    photograph = read(Image.fromarray(pixels).convert("RGBA"))
    np.testing.assert_array_equal(photograph.pixels, pixels)
    assert "opaque" in photograph.notes[0]


def test_animations_give_their_first_frame(pixels):
    first, second = Image.fromarray(pixels), Image.fromarray(255 - pixels)
    photograph = read(first, save_all=True, append_images=[second])
    np.testing.assert_array_equal(photograph.pixels, pixels)
    assert photograph.notes == ("only the first of 2 frames is used",)


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
@pytest.mark.parametrize("as_path", [True, False])
def test_damage_behind_the_first_frame_does_not_matter(tmp_path, kind, as_path):
    noise = np.random.default_rng(RNG_SEED).integers(0, 256, (3, 12, 16), np.uint8)
    first, *others = [Image.fromarray(frame) for frame in noise]
    stream = io.BytesIO()
    first.save(stream, format=kind, save_all=True, append_images=others)
    data = stream.getvalue()
    notes = set()
    for length in [*range(0, len(data), 7), len(data)]:
        path = tmp_path / "photo"
        path.write_bytes(data[:length])
        try:
            photograph = images.read_photograph(
                path if as_path else io.BytesIO(data[:length])
            )
        except ValueError:  # the first frame is damaged too
            continue
        np.testing.assert_array_equal(photograph.pixels[..., 0], noise[0])
        notes.add(photograph.notes[0])
    assert "only the first of 3 frames is used" in notes
    assert any("converted to RGB" in note for note in notes)  # where no other is whole


@pytest.mark.parametrize(
    "error",
    [RuntimeError, ZeroDivisionError, KeyError, Image.DecompressionBombError],
)
@pytest.mark.parametrize("step", ["open", "load"])
def test_whatever_a_decoder_raises_is_damage(pixels, monkeypatch, error, step):
    def fail(*args):
        raise error("inside")

    data = io.BytesIO(images.encode_image(pixels, ".png"))
    if step == "open":
        monkeypatch.setattr(Image, "open", fail)
    else:
        monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(ValueError, match="^the input is .*inside"):
        images.read_photograph(data)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_photographs(tmp_path, pixels, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    photograph = images.read_photograph(path).pixels
    assert images.photograph_size(path) == photograph.shape[:2]
    # A mask is turned like the photograph that it is of.
    expected = np.asarray(Image.fromarray(photograph).convert("L"))
    np.testing.assert_array_equal(images.read_brightness(path), expected)


def test_sizes_of_files_with_damage(tmp_path, pixels):
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert images.photograph_size(path) == (5, 7)
    path.write_bytes(png(30000, 30000, 8, 2, b""))
    with pytest.raises(ValueError, match="photo.png is refused for its size"):
        images.photograph_size(path)
    path.write_bytes(png(12000, 12000, 8, 2, b""))
    with pytest.raises(ValueError, match="photo.png is too large: it is 12000x12000"):
        images.photograph_size(path)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="photo.png is not an image"):
        images.photograph_size(path)


def test_brightness_is_that_of_the_photograph(pixels):
    wide = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    for image in (Image.fromarray(wide), Image.fromarray(pixels)):
        for kind in ("PNG", "TIFF"):
            stream = io.BytesIO()
            image.save(stream, format=kind)
            expected = Image.fromarray(images.read_photograph(stream).pixels)
            stream.seek(0)
            found = images.read_brightness(stream)
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, np.asarray(expected.convert("L")))


def test_what_is_transparent_is_dark(pixels):
    alpha = np.linspace(0, 255, pixels[..., 0].size).round().astype(np.uint8)
    alpha = alpha.reshape(pixels.shape[:2])
    for mode in ("LA", "RGBA"):
        image = Image.fromarray(pixels).convert(mode)
        image.putalpha(Image.fromarray(alpha))
        stream = io.BytesIO()
        image.save(stream, format="PNG")
        expected = np.asarray(image.convert("L"), float) * alpha / 255
        found = images.read_brightness(stream)
        np.testing.assert_allclose(found, expected, atol=1)
    stream = io.BytesIO()
    wide = Image.fromarray(np.array([[65535, 700]], np.uint16))
    wide.save(stream, format="PNG", transparency=65535)
    np.testing.assert_array_equal(images.read_brightness(stream), [[0, 3]])


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 2), np.float32), "floating-point"),
        (np.full((2, 2), 200, np.int32), "32-bit samples"),
    ],
)
def test_brightness_of_samples_that_mean_nothing_here(samples, message):
    stream = io.BytesIO()
    Image.fromarray(samples).save(stream, format="TIFF")
    with pytest.raises(ValueError, match=message):
        images.read_brightness(stream)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0" + bytes(100)]
)
def test_not_an_image(tmp_path, data):
    path = tmp_path / "letter.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="letter.txt is not a") as caught:
        images.read_photograph(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF"])
def test_cut_off_image_is_refused(tmp_path, kind):
    noise = np.random.default_rng(RNG_SEED).integers(0, 256, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, format=kind)
    path = tmp_path / "photo"
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(ValueError, match="^photo is (damaged|not a)"):
        images.read_photograph(path)


def test_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        images.read_photograph(tmp_path)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.read_photograph(tmp_path / "none.png")


@pytest.mark.parametrize("size", [(30000, 30000), (12000, 12000), (65536, 1)])
def test_huge_images_are_refused_from_their_header(size):
    data = png(*size, 8, 2, b"")  # the pixels are not there: they must not be asked for
    with pytest.raises(ValueError, match="size|too large"):
        images.read_photograph(io.BytesIO(data))


def test_max_pixels():
    data = io.BytesIO(png(10, 10, 8, 2, (b"\0" + bytes(30)) * 10))
    assert images.read_photograph(data, max_pixels=100).pixels.shape == (10, 10, 3)
    data.seek(0)
    with pytest.raises(ValueError, match="10x10"):
        images.read_photograph(data, max_pixels=99)


@pytest.mark.parametrize(
    ("text", "colour"),
    [("white", (255, 255, 255)), ("#ff8800", (255, 136, 0)), ("rgb(1,2,3)", (1, 2, 3))],
)
def test_colours(text, colour):
    assert images.parse_colour(text) == colour


def test_unknown_colour():
    with pytest.raises(ValueError, match="'whyte'"):
        images.parse_colour("whyte")


@pytest.mark.parametrize("text", ["#ff000000", "#f008", "rgba(255, 0, 0, 254)"])
def test_colours_that_are_not_opaque_are_refused(text):
    with pytest.raises(ValueError, match="expected an opaque colour, found"):
        images.parse_colour(text)
    assert images.parse_colour("#ff0000ff") == (255, 0, 0)


@pytest.mark.parametrize("colour", ["white", (255, 255, 255), [255] * 3])
def test_backgrounds(colour):
    photograph = read(TRANSPARENT["RGBA"], background=colour)
    assert (photograph.pixels == 255).all()


@pytest.mark.parametrize(
    "colour", [(1, 2), (1, 2, 3, 4), (0, 0, 256), (0, -1, 0), (0.5, 0, 0), 7, "whyte"]
)
def test_backgrounds_that_are_no_colour(colour, pixels):
    """Also where nothing is transparent: a mistake shows at the first photograph."""
    with pytest.raises(ValueError, match="colour"):
        images.photograph_of(Image.fromarray(pixels), background=colour)


def test_photographs_from_pipes_have_no_notes(tmp_path, pixels):
    """What Pillow leaves open of them is nothing that a user can mend."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    data = images.encode_image(pixels, ".png")
    writer = threading.Thread(target=path.write_bytes, args=(data,))
    writer.start()
    photograph = images.read_photograph(path)
    writer.join()
    assert photograph.notes == ()
    np.testing.assert_array_equal(photograph.pixels, pixels)


@pytest.mark.parametrize(
    "suffix", [".png", ".PNG", ".tif", ".tiff", ".bmp", ".ppm", ".webp"]
)
def test_lossless_kinds_keep_every_value(pixels, suffix):
    data = images.encode_image(pixels, suffix)
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data))), pixels)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
def test_profiles_are_written(pixels, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = images.encode_image(pixels, suffix, icc_profile=profile)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile


@pytest.mark.parametrize("suffix", ["", ".txt", ".semlic"])
def test_unknown_kinds_are_refused(pixels, suffix):
    with pytest.raises(ValueError, match="cannot write"):
        images.encode_image(pixels, suffix)


def test_write_file_replaces_only_when_forced(tmp_path):
    path = tmp_path / "a"
    images.write_file(path, b"one")
    with pytest.raises(ValueError, match="--force"):
        images.write_file(path, b"two")
    assert path.read_bytes() == b"one"
    images.write_file(path, b"two", force=True)
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a"]


def test_names_as_long_as_they_can_be(tmp_path):
    path = tmp_path / ("ф" * 125 + ".png")  # 254 of the 255 bytes that a name has
    images.write_file(path, b"one")
    assert path.read_bytes() == b"one"
    assert os.listdir(tmp_path) == [path.name]


def test_write_file_respects_a_file_that_appeared_meanwhile(tmp_path, monkeypatch):
    path = tmp_path / "a"
    check = images.check_outputs

    def check_then_lose_the_race(*args, **options):
        check(*args, **options)
        path.write_bytes(b"theirs")

    monkeypatch.setattr(images, "check_outputs", check_then_lose_the_race)
    with pytest.raises(ValueError, match="exists"):
        images.write_file(path, b"ours")
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["a"]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        images.write_file(path, b"new", force=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_write_file_follows_links_and_spares_devices(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    images.write_file(link, b"new", force=True)
    assert link.is_symlink() and target.read_bytes() == b"new"
    images.write_file(os.devnull, b"gone")
    assert not os.path.isfile(os.devnull)


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    images.write_file(tmp_path / "ours", b"")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("path", ["", "none/a"])
def test_places_that_cannot_be_written(tmp_path, path):
    with pytest.raises(ValueError, match="folder"):
        images.write_file(tmp_path / path, b"", force=True)


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    """FAT and many network drives: the file is written all the same."""

    def no_links(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    images.write_file(tmp_path / "a", b"one")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["a"]


def test_a_link_that_leads_nowhere_is_kept_without_force(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(ValueError, match="link exists: give --force"):
        images.write_file(link, b"new")
    assert os.listdir(tmp_path) == ["link"]
    images.write_file(link, b"new", force=True)
    assert link.is_symlink() and target.read_bytes() == b"new"


def test_tif_is_lossless_too(pixels):
    data = images.encode_image(pixels, ".tif")
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(data))), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg"])
def test_jpeg_files_keep_the_resolution_of_colours(pixels, suffix):
    data = images.encode_image(pixels, suffix)
    with Image.open(io.BytesIO(data)) as image:
        assert JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
        assert max(image.quantization[0]) <= 12  # quality 95


def test_the_longest_side_is_read():
    data = png(65535, 1, 8, 0, b"\0" + bytes(65535))
    assert images.read_photograph(io.BytesIO(data)).pixels.shape == (1, 65535, 3)


def test_the_limit_of_pillow_is_no_note(pixels, monkeypatch):
    """Between 89 and 134 megapixels Pillow warns of what is read here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # the image has 35
    assert read(Image.fromarray(pixels)).notes == ()


def test_masks_are_refused_from_their_header_too():
    data = png(12000, 12000, 8, 2, b"")  # the pixels are not there
    with pytest.raises(ValueError, match="too large: it is 12000x12000"):
        images.read_brightness(io.BytesIO(data))
