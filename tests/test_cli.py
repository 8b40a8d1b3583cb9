# SPDX-License-Identifier: Apache-2.0
"""The command line as a person meets it: what it writes, prints and refuses."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest
from PIL import Image

import semlic_jax
from semlic_jax import cli
from semlic_jax.coding.bitstream import Header, pack, unpack
from semlic_jax.evaluation import benchmark, demo
from semlic_jax.evaluation.demo import packaged_photograph


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a photograph in it."""
    monkeypatch.chdir(tmp_path)
    pixels = packaged_photograph().pixels[120:168, 200:264]
    Image.fromarray(pixels).save("photo.png")
    return tmp_path


@pytest.fixture
def semlic(capsys, tiny_model):
    """Runs a command with the small test model; gives status, output and errors."""

    def run(*argv, model=tiny_model):
        argv = [str(arg) for arg in argv]
        if model is not None and argv[0] in ("compress", "decompress", "demo", "bench"):
            argv += ["--model", str(model)]
        try:
            status = cli.main(argv)
        except SystemExit as stop:  # argparse
            status = stop.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def opened(path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def refused(result, *words, status=1):
    """Checks that a result is a refusal in one sentence that says these words."""
    found, out, err = result
    assert found == status, err
    assert out == ""
    assert err.startswith("semlic: ") and err.count("\n") == 1, err
    for word in words:
        assert str(word) in err
    return True


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("name", ["b.png", "b.JPG", "none.webp"])
def test_outputs_that_are_named_as_images_are_refused(folder, semlic, name, force):
    """What a shell makes of *.png with two photographs must not cost one of them."""
    for photo in ("b.png", "b.JPG"):
        opened("photo.png").save(photo)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    # The input is not even read: there is none.
    command = ("compress", "a.png", name, "--quality", 0.5, *force)
    better = name[:-4].removesuffix(".") + ".semlic"
    refused(semlic(*command), f"the output {name} is named like an image", better)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_options_may_stand_anywhere(folder, semlic):
    orders = (
        ["photo.png", "--quality", 0.5, "q.semlic"],
        ["--quality", 0.5, "photo.png", "q.semlic"],
        ["photo.png", "q.semlic", "--quality", 0.5],
        ["photo.png", "--force", "--quality", 0.5, "q.semlic", "--debug"],
    )
    for order in orders:
        assert semlic("compress", *order)[0] == 0
        os.remove("q.semlic")
    assert semlic("compress", "photo.png", "q.semlic", "--quality", 0.5)[0] == 0
    assert semlic("decompress", "q.semlic", "--force", "q.png")[0] == 0
    assert sorted(os.listdir()) == ["photo.png", "q.png", "q.semlic"]
    (folder / "--photo.png").write_bytes((folder / "photo.png").read_bytes())
    command = ["compress", "--quality", 0.5, "--", "--photo.png", "--q.semlic"]
    assert semlic(*command, model=None)[0] == 0
    assert (folder / "--q.semlic").exists()


def test_a_folder_is_no_output(folder, semlic):
    os.mkdir("out")
    result = semlic("compress", "photo.png", "out", "--quality", 0.5)
    refused(result, "the output out is a folder", "--out-dir out")
    refused(semlic("compress", "out", "--quality", 0.5), "out is a folder")


def test_there_and_back(folder, semlic):
    status, out, err = semlic("compress", "photo.png", "--quality", 0.5)
    assert (status, err) == (0, "")
    size = os.path.getsize("photo.semlic")
    assert f"photo.semlic: 64x48, {size:,} bytes" in out
    status, out, err = semlic("decompress", "photo.semlic", "again.png")
    assert (status, err) == (0, "") and out.startswith("again.png: 64x48")
    assert opened("again.png").size == (64, 48)
    assert sorted(os.listdir()) == ["again.png", "photo.png", "photo.semlic"]


def test_outputs_are_named_after_inputs(folder, semlic):
    semlic("compress", "photo.png", "--quality", 0)
    os.remove("photo.png")
    assert semlic("decompress", "photo.semlic")[0] == 0
    assert sorted(os.listdir()) == ["photo.png", "photo.semlic"]


@pytest.mark.parametrize("option", ["--max-bytes", "--bpp"])
def test_budgets_are_kept(folder, semlic, option):
    semlic("compress", "photo.png", "least.semlic", "--quality", 0)
    semlic("compress", "photo.png", "most.semlic", "--quality", 1)
    least, most = (os.path.getsize(f"{name}.semlic") for name in ("least", "most"))
    budget = (least + most) // 2
    value = budget if option == "--max-bytes" else 8 * budget / (64 * 48)
    assert semlic("compress", "photo.png", option, value)[0] == 0
    assert least <= os.path.getsize("photo.semlic") <= budget
    refused(
        semlic(
            "compress",
            "photo.png",
            "x.semlic",
            option,
            {"--max-bytes": 1, "--bpp": 0.001}[option],
        )
    )
    assert not os.path.exists("x.semlic")


def test_info(folder, semlic):
    semlic("compress", "photo.png", "--quality", 0.4)
    status, out, err = semlic("info", "photo.semlic", "--json")
    facts = json.loads(out)
    data = (folder / "photo.semlic").read_bytes()
    assert (status, err) == (0, "")
    assert (facts["width"], facts["height"]) == (64, 48)
    assert facts["file_bytes"] == len(data)
    assert facts["bpp"] == pytest.approx(8 * len(data) / (64 * 48), abs=1e-6)
    assert facts["quality"] == pytest.approx(0.4, abs=1 / 255)
    assert facts["fingerprint"] == unpack(data)[0].fingerprint.hex()
    status, out, err = semlic("info", "photo.semlic")
    assert status == 0 and "64" in out and facts["fingerprint"] in out


def test_models(semlic):
    status, out, _ = semlic("models", "--json")
    assert status == 0
    assert set(json.loads(out)) == set(semlic_jax.pretrained_models())
    cards = json.loads(out)
    assert next(iter(cards)) == "small"
    assert [name for name, card in cards.items() if card["default"]] == ["small"]
    status, out, _ = semlic("models")
    assert status == 0 and out.startswith("small (the default)\n")
    assert out.count("the default") == 1
    for name in semlic_jax.pretrained_models():
        assert name in out


def test_profile_is_carried(folder, semlic, other_profile):
    opened("photo.png").save("tagged.png", icc_profile=other_profile)
    semlic("compress", "tagged.png", "--quality", 0.5)
    semlic("decompress", "tagged.semlic", "again.png")
    assert opened("again.png").info["icc_profile"] == other_profile
    command = ("compress", "tagged.png", "plain.semlic", "--quality", 0.5, "--srgb")
    status, _, err = semlic(*command)
    assert status == 0 and "converted from its ICC profile to sRGB" in err
    assert unpack(Path("plain.semlic").read_bytes())[0].chunks == {}


def test_conversions_are_noted(folder, semlic):
    opened("photo.png").convert("L").save("grey.png")
    status, out, err = semlic("compress", "grey.png", "--quality", 0.5)
    assert (
        status == 0
        and err == "note: grey.png: a greyscale image was converted to RGB\n"
    )


def test_transparency_needs_a_background(folder, semlic):
    Image.new("RGBA", (20, 10), (9, 9, 9, 99)).save("clear.png")
    refused(semlic("compress", "clear.png", "--quality", 0.5), "--background white")
    assert not os.path.exists("clear.semlic")
    command = ("compress", "clear.png", "--quality", 0.5, "--background")
    refused(semlic(*command, "whyte"), "whyte")
    assert semlic(*command, "white")[0] == 0


def test_existing_outputs_are_kept_without_force(folder, semlic):
    (folder / "photo.semlic").write_bytes(b"mine")
    command = ("compress", "photo.png", "--quality", 0.5)
    refused(semlic(*command), "photo.semlic", "--force")
    assert (folder / "photo.semlic").read_bytes() == b"mine"
    assert semlic(*command, "--force")[0] == 0
    before = (folder / "photo.png").read_bytes()
    refused(semlic("decompress", "photo.semlic"), "photo.png", "--force")
    assert (folder / "photo.png").read_bytes() == before


def test_the_input_is_never_overwritten(folder, semlic):
    before = (folder / "photo.png").read_bytes()
    os.link("photo.png", "other")
    command = ("compress", "photo.png", "other", "--quality", 0.5, "--force")
    refused(semlic(*command), "is also an input")
    assert (folder / "photo.png").read_bytes() == before


def test_what_is_not_an_image(folder, semlic):
    (folder / "letter.txt").write_text("Dear Sir")
    refused(semlic("compress", "letter.txt", "--quality", 0.5), "letter.txt")
    refused(semlic("compress", "none.png", "--quality", 0.5), "none.png")
    refused(semlic("compress", folder, "--quality", 0.5), "folder")
    refused(semlic("decompress", "photo.png", "x.png"), "semlic")
    refused(semlic("info", "letter.txt"))
    refused(semlic("info", "none.semlic"), "none.semlic")
    assert sorted(os.listdir()) == ["letter.txt", "photo.png"]


def test_places_that_cannot_be_written(folder, semlic):
    command = ("compress", "photo.png", "none/photo.semlic", "--quality", 0.5)
    refused(semlic(*command), "none")
    semlic("compress", "photo.png", "--quality", 0.5)
    refused(semlic("decompress", "photo.semlic", "photo.gif"), ".gif")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--roi-weight", 0], "--roi-weight needs --refine"),
        (["--roi-variant", "L2"], "--roi-variant needs --refine"),
        (["--roi-resize"], "--roi-resize needs --refine"),
        (["--refine", 2, "--roi-weight", 0], "--roi-weight needs --roi"),
        (["--refine", 2, "--roi-variant", "L2"], "--roi-variant needs --roi"),
        (["--refine", 2, "--roi-resize"], "--roi-resize needs --roi"),
    ],
)
def test_options_that_would_do_nothing_are_refused(folder, semlic, options, words):
    refused(semlic("compress", "photo.png", "--quality", 0.5, *options), words)
    assert os.listdir() == ["photo.png"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "photo.png"],
        ["compress", "photo.png", "--quality", "0.5", "--bpp", "1"],
        ["compress", "photo.png", "--quality", "1.5"],
        ["compress", "photo.png", "--quality", "high"],
        ["compress", "photo.png", "--bpp", "nan"],
        ["compress", "photo.png", "--bpp", "-1"],
        ["compress", "photo.png", "--max-bytes", "0"],
        ["compress", "photo.png", "--max-bytes", "1e3"],
        ["compress", "--quality", "0.5"],
        ["decompress"],
        ["squeeze", "photo.png"],
        ["info", "photo.png", "--xml"],
        ["compress", "photo.png", "--quality", "0.5", "--xml"],
        ["compress", "a.png", "b.png", "c.png", "--quality", "0.5"],
        ["compress", "-", "--quality", "0.5"],
        ["decompress", "-"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_sentence(folder, semlic, arguments):
    known = arguments[0] != "squeeze"
    command = f"semlic {arguments[0]} --help" if known else "semlic --help"
    assert refused(semlic(*arguments, model=None), f"see {command}\n", status=2)
    assert os.listdir() == ["photo.png"]


def test_every_flipped_bit_is_refused(folder, semlic):
    semlic("compress", "photo.png", "--quality", 0)
    data = (folder / "photo.semlic").read_bytes()
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        (folder / "bad.semlic").write_bytes(damaged)
        assert refused(semlic("decompress", "bad.semlic", "bad.png"))
    assert not os.path.exists("bad.png")


def test_files_of_another_length_are_refused(folder, semlic):
    semlic("compress", "photo.png", "--quality", 0)
    data = (folder / "photo.semlic").read_bytes()
    for damaged in (b"", data[:1], data[:10], data[:-1], data + b"\0", data + data):
        (folder / "bad.semlic").write_bytes(damaged)
        assert refused(semlic("decompress", "bad.semlic", "bad.png"))
        assert refused(semlic("info", "bad.semlic"))
    assert not os.path.exists("bad.png")


def test_newer_formats_and_huge_claims_are_refused(folder, semlic):
    newer = bytearray(pack(Header(8, 8, 99, b"\x12\x34\x56\x78"), b"payload!"))
    newer[4] += 1
    newer[-4:] = zlib.crc32(newer[:-4]).to_bytes(4, "little")
    (folder / "newer.semlic").write_bytes(newer)
    refused(semlic("decompress", "newer.semlic"), f"{semlic_jax.BITSTREAM_VERSION + 1}")
    huge = pack(Header(65535, 65535, 99, b"\x12\x34\x56\x78"), b"", max_pixels=2**32)
    (folder / "huge.semlic").write_bytes(huge)
    refused(semlic("decompress", "huge.semlic"), "65535")
    refused(semlic("info", "huge.semlic"), "65535")


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 1), (65, 3)])
def test_small_images(folder, semlic, size):
    Image.new("RGB", size, (200, 100, 50)).save("small.png")
    assert semlic("compress", "small.png", "--quality", 0.5)[0] == 0
    assert semlic("decompress", "small.semlic", "again.png")[0] == 0
    assert opened("again.png").size == size


def test_files_of_other_models_name_both(folder, semlic, tiny_model):
    stranger = pack(Header(8, 8, 99, b"\x12\x34\x56\x78"), b"payload!")
    (folder / "other.semlic").write_bytes(stranger)
    ours = semlic_jax.load(tiny_model).fingerprint[:4].hex()
    refused(semlic("decompress", "other.semlic"), "12345678", ours)
    refused(semlic("decompress", "other.semlic", model=None), "12345678", "(--model, ")
    status, out, _ = semlic("info", "other.semlic")
    assert status == 0 and "12345678" in out and "not a packaged model" in out
    assert not os.path.exists("other.png")


def test_unknown_model_is_refused(folder, semlic):
    command = ("compress", "photo.png", "--quality", 0.5)
    refused(semlic(*command, model="enormous"), "enormous")
    refused(semlic(*command, model=folder / "photo.png"), "photo.png")


def test_errors_of_ours_are_told_apart(folder, semlic, monkeypatch):
    def broken(name, **options):
        raise KeyError("inside")

    monkeypatch.setattr(semlic_jax, "load", broken)
    command = ("compress", "photo.png", "--quality", 0.5)
    refused(semlic(*command), "internal error", "--debug", status=3)
    with pytest.raises(KeyError):
        semlic(*command, "--debug")


def test_interrupt(folder, semlic, monkeypatch):
    def interrupted(name, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(semlic_jax, "load", interrupted)
    assert refused(
        semlic("compress", "photo.png", "--quality", 0.5), "interrupted", status=130
    )
    assert os.listdir() == ["photo.png"]


def test_progress_shows_on_terminals_only(folder, semlic, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert semlic("compress", "photo.png", "--quality", 0.5)[0] == 0
    assert "compressing photo.png" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")  # the line is left clean


def test_demo(folder, semlic):
    semlic("compress", "photo.png", "middle.semlic", "--quality", 0.5)
    bpp = 8 * os.path.getsize("middle.semlic") / (64 * 48)
    command = ("demo", "photo.png", "--out", "out/deep", "--bpp", bpp)
    status, out, err = semlic(*command)
    assert status == 0, err
    assert sorted(os.listdir("out/deep")) == [
        "photo.comparison.png",
        "photo.decoded.png",
        "photo.semlic",
    ]
    for word in ("semlic", "AVIF", "WebP", "JPEG", "photo.comparison.png"):
        assert word in out
    refused(semlic(*command), "--force")
    assert semlic(*command, "--force")[0] == 0


def test_demo_notes_who_is_left_out(folder, semlic, monkeypatch):
    def narrow(*arguments):
        raise ValueError("too wide for me")

    monkeypatch.setattr(demo, "_rival", narrow)
    semlic("compress", "photo.png", "middle.semlic", "--quality", 0.5)
    bpp = 8 * os.path.getsize("middle.semlic") / (64 * 48)
    status, out, err = semlic("demo", "photo.png", "--out", "out", "--bpp", bpp)
    assert status == 0 and "note: webp is left out: too wide for me\n" in err


def test_bench(folder, semlic, monkeypatch):
    rival = benchmark._rival

    def without_webp(name, *arguments):
        if name == "webp":
            raise ValueError("too wide for me")
        return rival(name, *arguments)

    monkeypatch.setattr(benchmark, "_rival", without_webp)
    command = ("bench", "photo.png", "--repeats", 1, "--quality", 0.1, "--json")
    status, out, err = semlic(*command)
    assert status == 0, err
    report = json.loads(out)
    assert (report["width"], report["height"], report["repeats"]) == (64, 48, 1)
    assert [row["name"] for row in report["rows"]] == ["semlic", "JPEG", "AVIF"]
    assert report["missing"] == {"webp": "too wide for me"}
    ours = report["rows"][0]
    assert 0 < ours["coding_compress_s"] < ours["compress_s"]
    assert 0 < ours["coding_decompress_s"] < ours["decompress_s"]


def test_bench_of_an_image_that_others_code_exactly(folder, semlic):
    """JSON has no infinity, and what is larger than our file says so."""
    Image.new("RGB", (64, 64), (128, 128, 128)).save(folder / "flat.png")
    command = ("bench", "flat.png", "--repeats", 1, "--quality", 0)
    status, out, err = semlic(*command, "--json")
    assert status == 0, err
    report = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert report["rows"][1]["name"] == "JPEG" and report["rows"][1]["psnr_db"] is None
    status, out, err = semlic(*command)
    assert status == 0 and "JPEG cannot make a smaller file of this image" in out


def parsers(parser=None, name="semlic"):
    """Every command's parser, by its name."""
    parser = parser or cli._parser()
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice, each in action.choices.items():
                yield from parsers(each, f"{name} {choice}")


def options_of_commands():
    for name, parser in parsers():
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                what = "/".join(action.option_strings) or action.metavar
                yield pytest.param(action, id=f"{name} {what}")


@pytest.mark.parametrize("action", list(options_of_commands()))
def test_every_option_has_a_help_text(action):
    assert action.help and len(action.help) > 8
    if action.option_strings and action.nargs != 0:
        assert action.metavar or action.choices
    automatic = isinstance(action, argparse._HelpAction | argparse._VersionAction)
    if action.option_strings and not (automatic or action.required):
        rate = {"--quality", "--max-bytes", "--bpp"} & set(action.option_strings)
        assert "default" in action.help or rate or "--json" in action.option_strings
    if "--out-dir" in action.option_strings:
        assert "created if missing" in action.help


def help_of(command, option):
    actions = dict(parsers())[f"semlic {command}"]._actions
    (found,) = [a for a in actions if option in (*a.option_strings, a.metavar)]
    return found.help


def test_help_names_what_there_is():
    """Lists in help texts, which load nothing, against what they list."""
    from semlic_jax.evaluation.codecs import CODECS
    from semlic_jax.evaluation.measures import SET_METRICS
    from semlic_jax.evaluation.published import published_curves
    from semlic_jax.images import _SAVE_OPTIONS
    from semlic_jax.objectives.metrics import IMAGE_METRICS
    from semlic_jax.refinement.settings import _RELAXED_STEPS, PRESETS, Settings

    def words(text):
        return set(text.replace(",", " ").replace(";", " ").split())

    assert words(help_of("eval", "--metrics")) >= {*IMAGE_METRICS, *SET_METRICS}
    assert words(help_of("compare", "--metrics")) >= set(IMAGE_METRICS)
    assert not words(help_of("compare", "--metrics")) & set(SET_METRICS)
    for command in ("eval", "compare"):
        assert words(help_of(command, "--codecs")) >= set(CODECS)
    formats = {suffix[1:] for suffix in _SAVE_OPTIONS}
    assert words(help_of("decompress", "--format")) >= formats
    with pytest.raises(ValueError, match="expected one of") as known:
        published_curves("none")
    names = str(known.value).split(" one of ")[-1].split(", ")
    assert words(help_of("eval", "--published")) >= set(names)
    for command, option in (("compress", "--refine"), ("refine", "--steps")):
        text = help_of(command, option)
        for name, settings in PRESETS.items():
            assert f"{name} ({settings.steps}" in text
            assert f"{_RELAXED_STEPS[name]:,}" in text
    for name in (
        "alpha",
        "gamma",
        "structure",
        "lattice",
        "mesh",
        "method",
        "mean-style",
    ):
        default = getattr(Settings(), name.replace("-", "_"))
        default = default if isinstance(default, str) else f"{default:g}"
        assert f"default {default}" in help_of("compress", f"--{name}")
    others = {PRESETS[name].mean_style for name in ("fast", "best")}
    assert others == {2.0}
    assert "or 2 with the presets fast and best" in help_of("compress", "--mean-style")
    same = ("alpha", "gamma", "structure", "lattice", "mesh", "method")
    for name in same:
        assert len({getattr(settings, name) for settings in PRESETS.values()}) == 1
    assert "resumes" in help_of("refine", "OUT_DIR")
    for command, metavar in (("refine", "IN_DIR"), ("eval", "IMAGES")):
        assert "not searched" in help_of(command, metavar)


def test_as_a_program(folder, tiny_model):
    """The installed way in, in a process of its own, from photograph to photograph."""
    program = [sys.executable, "-m", "semlic_jax.cli"]

    def run(*argv):
        return subprocess.run([*program, *argv], capture_output=True, text=True)

    model = ["--model", str(tiny_model)]
    done = run("compress", "photo.png", "--quality", "0.5", *model)
    assert (done.returncode, done.stderr) == (0, "")
    done = run("decompress", "photo.semlic", "again.png", *model)
    assert (done.returncode, done.stderr) == (0, "")
    assert opened("again.png").size == (64, 48)
    done = run("decompress", "photo.png", *model)
    assert done.returncode == 1 and done.stderr.startswith("semlic: ")
    done = run("--version")
    assert done.stdout == f"semlic_jax {semlic_jax.__version__}\n"


def test_names_that_are_not_utf_8(folder):
    """They are printed in the bytes of the file system, as other programs do."""
    name = b"caf\xe9.semlic"
    Path(os.fsdecode(name)).write_bytes(
        pack(Header(8, 8, 99, b"\x12\x34\x56\x78"), b"payload!")
    )
    done = subprocess.run(
        [sys.executable, "-m", "semlic_jax.cli", "info", name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
    )
    assert (done.returncode, done.stderr) == (0, b"") and name in done.stdout


def test_names_that_the_output_has_no_letters_for(folder):
    name = "照.semlic"
    Path(name).write_bytes(pack(Header(8, 8, 99, b"\x12\x34\x56\x78"), b"payload!"))
    done = subprocess.run(
        [sys.executable, "-m", "semlic_jax.cli", "info", name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert (done.returncode, done.stderr) == (0, b"") and rb"\u7167" in done.stdout


def test_files_go_down_pipes(folder, tiny_model):
    program = f"{sys.executable} -m semlic_jax.cli compress photo.png /dev/stdout"
    command = f"{program} --quality 0.1 --model {tiny_model} | cat"
    done = subprocess.run(command, shell=True, capture_output=True)
    assert unpack(done.stdout)[0].width == 64  # a file and nothing else
    assert done.stderr.startswith(b"/dev/stdout: 64x48, ")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_errors(folder, tiny_model, closed):
    program = f"{sys.executable} -m semlic_jax.cli compress photo.png --quality 0.1"
    done = subprocess.run(
        f"{program} --model {tiny_model} {closed}",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("photo.semlic").exists()


def test_a_closed_pipe_is_no_error_message():
    program = [sys.executable, "-m", "semlic_jax.cli", "models"]
    done = subprocess.run(
        f"{' '.join(program)} | true", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


@pytest.mark.parametrize("kind", [MemoryError, jax.errors.JaxRuntimeError])
def test_a_lack_of_memory_is_a_refusal(folder, semlic, monkeypatch, kind):
    def exhausted(name, **options):
        raise kind("RESOURCE_EXHAUSTED: 9 GiB")

    monkeypatch.setattr(semlic_jax, "load", exhausted)
    command = ("compress", "photo.png", "--quality", 0.5)
    refused(semlic(*command), "not enough memory: RESOURCE_EXHAUSTED: 9 GiB")


def test_a_folder_of_which_nothing_is_done_is_refused(folder, semlic, tiny_model):
    (folder / "in").mkdir()
    Image.new("RGBA", (8, 8)).save("in/clear.png")
    command = ("refine", "in", "out", "--bpp", 1, "--gamma", 0, "--model", tiny_model)
    status, out, err = semlic(*command)
    assert (status, out) == (1, "") and "skipped clear.png: " in err
    # Beside other processes it is a share like others, or none.
    for process, found in ((0, 4), (1, 0)):
        share = ("--processes", 2, "--process", process)
        assert semlic(*command, *share)[0] == found


def test_a_file_is_no_folder_for_a_demo(folder, semlic):
    result = semlic("demo", "photo.png", "--out", "photo.png")
    refused(result, "expected a folder as --out, found the file photo.png")


def test_info_says_what_is_in_the_file(folder, semlic, other_profile):
    Image.open("photo.png").save("other.png", icc_profile=other_profile)
    assert semlic("compress", "other.png", "--quality", 0.4)[0] == 0
    facts = json.loads(semlic("info", "other.semlic", "--json")[1])
    header, payload = unpack(Path("other.semlic").read_bytes())
    assert facts["payload_bytes"] == len(payload)
    assert facts["icc_profile_bytes"] == len(header.chunks[b"ICCP"]) > 0
    assert (facts["same_machine_only"], facts["coder"]) == (False, "ans")
    assert facts["model"] is None  # no packaged one


def test_the_table_of_times_has_each_under_its_name():
    ours = benchmark.Row("semlic", 900, 1.5, 30.0, 0.01, 0.02, 0.003, 0.004)
    rival = benchmark.Row("JPEG", 901, 1.5, 31.0, 0.5, 1.5)
    missing = {"avif": "too wide for me"}
    report = benchmark.Report(8, 6, 2, "here", 3, (ours, rival), 7.0, 8.0, 9.0, missing)
    _, header, first, second, note, left, calls, process = report.table().splitlines()
    assert header.split()[4:] == ["compress", "(coding)", "decompress", "(coding)"]
    assert first.split("dB")[1].split() == (
        ["10.0", "ms", "3.0", "ms", "20.0", "ms", "4.0", "ms"]
    )
    assert second.split("dB")[1].split() == ["500.0", "ms", "-", "1,500.0", "ms", "-"]
    assert left == "avif was left out: too wide for me"
    assert note.startswith("JPEG ") and "compress 7.00 s, decompress 8.00 s" in calls
    assert process.endswith(" 9.00 s")
