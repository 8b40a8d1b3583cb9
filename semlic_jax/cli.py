# SPDX-License-Identifier: Apache-2.0
"""The command line: `semlic compress | decompress | refine | info | demo | models |
bench | eval | compare | convert | train | pack`.

Each command imports what it needs when it runs, so that `semlic --help` and `semlic
info` answer at once. A refusal is one sentence on the error stream and exit status 1;
wrong usage is status 2; an error of ours is status 3 (`--debug` shows the traceback);
status 4 says that the work is done, but for some inputs that were skipped.
Results go to the standard output; notes and progress to the error stream, progress only
where that is a terminal.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import semlic_jax

if TYPE_CHECKING:
    import numpy as np

    from semlic_jax.codec import Codec
    from semlic_jax.images import Photograph
    from semlic_jax.refinement import Progress, Region, Settings

SUFFIX = ".semlic"

_BAR_WIDTH = 24
_REFUSED, _USAGE, _INTERNAL, _SKIPPED, _INTERRUPTED = 1, 2, 3, 4, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if "program" in options:
        options.rest = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        status = options.run(options)
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        # The reader went away. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _REFUSED
    except KeyboardInterrupt:
        _say("semlic: interrupted")
        return _INTERRUPTED
    except Exception as error:
        if options.debug:
            raise
        message, status = _explain(error)
        _say(f"semlic: {message}")
        return status


def _explain(error: Exception) -> tuple[str, int]:
    """One sentence for people, and the exit status."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", _REFUSED
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError):
        return f"there is not enough memory: {text}", _REFUSED
    if isinstance(error, ValueError | OSError):
        return text, _REFUSED
    kind = type(error).__name__
    return f"internal error, {kind}: {text} (--debug shows where)", _INTERNAL


def _say(text: str) -> None:
    print(text, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"semlic: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="semlic",
        description="A perceptual image codec: small files that look real.",
    )
    parser.add_argument(
        "--version", action="version", version=f"semlic_jax {semlic_jax.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[Any], int | None], text: str) -> _Parser:
        # No abbreviations: a script must not break when an option is added.
        sub = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False
        )
        sub.set_defaults(run=run)
        sub.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
        return sub

    sub = command("compress", _compress, "write a photograph as a .semlic file")
    sub.add_argument("input", metavar="IN", type=Path, help="an image file")
    sub.add_argument("output", metavar="OUT", type=Path, nargs="?")
    _add_model(sub)
    sub.add_argument(
        "--coder", default="ans", choices=("ans", "tfc"), help="tfc needs the extra tfc"
    )
    _add_rate(sub.add_mutually_exclusive_group(required=True))
    _add_background(sub)
    _add_force(sub)
    _add_refinement(sub.add_argument_group("refinement of this image"))
    _add_region(sub.add_argument_group("what matters in the image, with --refine"))

    sub = command("decompress", _decompress, "write a .semlic file as an image file")
    sub.add_argument("input", metavar="IN", type=Path, help="a .semlic file")
    sub.add_argument("output", metavar="OUT", type=Path, nargs="?")
    sub.add_argument(
        "--model", metavar="M", help="name or path; found by itself if packaged"
    )
    _add_force(sub)

    sub = command("refine", _refine, "compress a folder of photographs, each refined")
    sub.add_argument("input", metavar="IN_DIR", type=Path, help="images")
    sub.add_argument("output", metavar="OUT_DIR", type=Path, help="goes on where it is")
    _add_model(sub)
    sub.add_argument(
        "--bpp", type=_positive_float, metavar="B", required=True, help="bits per pixel"
    )
    sub.add_argument(
        "--steps",
        metavar="N",
        type=_preset_or_steps,
        default="default",
        help="of the refinement, or a preset: fast, default, best",
    )
    sub.add_argument(
        "--batch",
        metavar="N",
        type=_positive_int,
        help="images refined together; default 1 on a CPU, 16 elsewhere",
    )
    _add_objective(sub)
    _add_background(sub)
    _add_force(sub)
    group = sub.add_argument_group("a share of the images, for several processes")
    group.add_argument(
        "--distributed",
        default="none",
        metavar="MODE",
        help="none, auto (TPU pods, SLURM) or explicit (with the three below); none "
        "with the last two needs no connection",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT")
    group.add_argument("--processes", default=0, type=int, metavar="N")
    group.add_argument("--process", default=-1, type=int, metavar="0..N-1")

    sub = command("info", _info, "say what a .semlic file holds")
    sub.add_argument("input", metavar="FILE", type=Path)
    _add_json(sub)

    sub = command("demo", _demo, "compare one photograph with JPEG, WebP and AVIF")
    sub.add_argument("input", metavar="IMAGE", type=Path, nargs="?")
    sub.add_argument("--out", metavar="DIR", type=Path, default=Path("demo"))
    sub.add_argument("--bpp", type=_positive_float, default=0.15, help="default 0.15")
    _add_model(sub)
    _add_background(sub)
    _add_force(sub)

    sub = command("models", _models, "list the packaged models")
    _add_json(sub)

    sub = command("bench", _bench, "measure speed beside JPEG, WebP and AVIF")
    sub.add_argument("input", metavar="IMAGE", type=Path, nargs="?")
    sub.add_argument("--quality", type=_unit_float, default=0.5, help="default 0.5")
    sub.add_argument("--repeats", type=_positive_int, default=5, help="default 5")
    _add_model(sub)
    _add_background(sub)
    _add_json(sub)

    # These two read their own options, `--help` too.
    for name, run, text in (
        ("train", _train, "train a model (needs the extra `train`)"),
        ("pack", _pack, "turn photographs into array_record files, for training"),
    ):
        sub = commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
        sub.set_defaults(run=run, program=name)
        sub.add_argument("--debug", action="store_true")

    sub = command("eval", _eval, "compare codecs over many images, rates and metrics")
    sub.add_argument("inputs", metavar="IMAGES", type=Path, nargs="+")
    sub.add_argument(
        "--codecs",
        metavar="C,...",
        type=_names,
        default=["semlic", "avif", "webp", "jpeg"],
        help="semlic, semlic:MODEL, semlic+refine:PRESET, avif, webp, jxl, jpeg, "
        "jpeg2000; default semlic,avif,webp,jpeg",
    )
    sub.add_argument(
        "--bpp",
        metavar="B,...",
        type=_rates,
        default=[0.1, 0.15, 0.2, 0.3, 0.45],
        help="default 0.1,0.15,0.2,0.3,0.45",
    )
    sub.add_argument(
        "--metrics", metavar="M,...", type=_names, help="default: what is here"
    )
    sub.add_argument("--out", metavar="DIR", type=Path, default=Path("eval"))
    _add_model(sub)
    sub.add_argument("--anchor", metavar="C", help="of BD-rates; default avif")
    sub.add_argument("--weights", metavar="DIR", type=Path, help="of feature networks")
    sub.add_argument(
        "--patch", metavar="N", type=_positive_int, default=256, help="default 256"
    )
    sub.add_argument(
        "--published", metavar="SET", help="draw published curves; kodak is recognised"
    )
    sub.add_argument(
        "--jobs", metavar="N", type=_positive_int, help="threads; 1 for exact timings"
    )
    sub.add_argument(
        "--remeasure", action="store_true", help="take all metrics anew from the files"
    )
    _add_background(sub)

    sub = command(
        "compare", _compare, "show one photograph by several codecs in a page"
    )
    sub.add_argument("input", metavar="IMAGE", type=Path)
    sub.add_argument("--bpp", type=_positive_float, default=0.15, help="default 0.15")
    sub.add_argument("--out", metavar="PAGE", type=Path, help="default IMAGE.html")
    sub.add_argument(
        "--codecs",
        metavar="C,...",
        type=_names,
        default=["semlic", "avif", "webp", "jpeg"],
        help="as in eval; the others get the bytes of the first one's file",
    )
    sub.add_argument(
        "--metrics", metavar="M,...", type=_names, help="default: what is here"
    )
    sub.add_argument("--weights", metavar="DIR", type=Path, help="of feature networks")
    _add_model(sub)
    _add_background(sub)
    _add_force(sub)

    sub = command(
        "convert", _convert_features, "turn files of others into files of ours"
    )
    kinds = sub.add_subparsers(metavar="WHAT", required=True)

    def convert(name: str, run: Callable[[Any], int | None], text: str) -> _Parser:
        kind = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        kind.set_defaults(run=run)
        kind.add_argument("--debug", action="store_true", default=argparse.SUPPRESS)
        return kind

    kind = convert(
        "features",
        _convert_features,
        "weights of feature networks, LPIPS heads, DISTS, as published",
    )
    kind.add_argument("inputs", metavar="SRC", type=Path, nargs="+")
    kind.add_argument(
        "output", metavar="OUT", type=Path, help="a folder; for one SRC also an .npz"
    )
    kind.add_argument(
        "--network", metavar="N", help="what SRC is; recognised if not given"
    )
    _add_force(kind)

    kind = convert(
        "neuralcompression",
        _convert_neuralcompression,
        "an MS-ILLM or No-GAN checkpoint; its files decode only on one machine",
    )
    kind.add_argument("input", metavar="CKPT", type=Path)
    kind.add_argument("output", metavar="OUT", type=Path, help="a model file, .npz")
    _add_force(kind)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M", default="small", help="name or path; default small"
    )


def _add_rate(group: argparse._MutuallyExclusiveGroup) -> None:
    group.add_argument("--quality", type=_unit_float, metavar="Q", help="0 to 1")
    group.add_argument(
        "--bpp", type=_positive_float, metavar="B", help="bits per pixel"
    )
    group.add_argument(
        "--max-bytes", type=_positive_int, metavar="N", help="largest size of the file"
    )


def _add_refinement(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--refine",
        metavar="N",
        type=_preset_or_steps,
        help="steps, or a preset: fast, default, best",
    )
    _add_objective(group)


def _add_objective(group: argparse._ActionsContainer) -> None:
    """What a refinement minimises; each one as the preset has it where not given."""
    for name, text in (
        ("alpha", "weight of the squared error"),
        ("beta", "weight of the rate to start with"),
        ("gamma", "weight of the perceptual terms; 0 refines for PSNR"),
    ):
        group.add_argument(f"--{name}", metavar="W", type=float, help=text)
    group.add_argument("--method", metavar="M", help="of the relaxed rounding")
    group.add_argument(
        "--features", metavar="PATH", help="weights of another feature network"
    )
    group.add_argument("--seed", metavar="N", type=int, help="of the noise; default 0")


def _add_region(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--roi", metavar="REGION", help="MASK.png, x,y,width,height or auto"
    )
    group.add_argument(
        "--roi-resize", action="store_true", help="resize a mask of another size"
    )
    group.add_argument(
        "--roi-weight",
        metavar="W",
        type=_unit_float,
        help="share of the foreground in the error; default 0.8",
    )
    group.add_argument(
        "--roi-variant", metavar="V", help="L1: the error alone (default), or L2"
    )


def _add_background(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background", metavar="COLOUR", help="what transparent pixels are laid on"
    )


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace existing outputs")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs to read")


def _unit_float(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, found {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text}")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text}")
    return value


def _preset_or_steps(text: str) -> str | int:
    return text if text.isalpha() else int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> list[float]:
    return [_positive_float(rate) for rate in _names(text)]


# argparse names the type in "invalid ... value".
_unit_float.__name__ = _positive_float.__name__ = "number"
_rates.__name__ = "list of numbers"
_positive_int.__name__ = "whole number"
_preset_or_steps.__name__ = "preset or number of steps"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """One line on the terminal that says what is being done; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return

    def show(text: str) -> None:
        print(f"\r\x1b[K{text} ...", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def _stops_when_asked() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C a question that the caller asks; a second one interrupts.

    Yields a function that says whether there was one.
    """
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        _say("\nstopping with the best so far; once more to stop at once")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _warnings_are_notes() -> Iterator[None]:
    """Shows warnings of refinement as notes, as they come."""
    from semlic_jax.refinement import RefinementWarning, RegionWarning

    with warnings.catch_warnings():
        for kind in (RefinementWarning, RegionWarning):
            warnings.simplefilter("always", kind)

        def show(message: Warning | str, *rest: Any, **more: Any) -> None:
            _say(f"note: {message}")

        warnings.showwarning = show
        yield


def _read(path: Path, background: str | None) -> Photograph:
    from semlic_jax.images import parse_colour, read_photograph

    colour = None if background is None else parse_colour(background)
    photograph = read_photograph(path, background=colour)
    for note in photograph.notes:
        _say(f"note: {path.name}: {note}")
    return photograph


def _check_not_input(options: argparse.Namespace, output: Path) -> None:
    if output.exists() and output.samefile(options.input):
        raise ValueError(f"the output {output} is the input: give another name")


def _codec_of_file(data: bytes, given: str | None) -> Codec:
    """The model that `given` names, or else the packaged one the file was made with."""
    if given is not None:
        return semlic_jax.load(given)
    from semlic_jax.packaged import load_for

    return load_for(data)


def _compress(options: argparse.Namespace) -> int:
    from semlic_jax.images import check_outputs, write_file

    settings = _settings(options, options.refine)
    output = options.output or options.input.with_suffix(SUFFIX)
    photograph = _read(options.input, options.background)
    _check_not_input(options, output)
    check_outputs([output], force=options.force)
    refined = ""
    with _progress() as progress:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model, coder=options.coder)
        progress(f"compressing {options.input.name}")
        start_s = time.perf_counter()
        budget: dict[str, Any] = dict(
            quality=options.quality,
            bpp=options.bpp,
            max_bytes=options.max_bytes,
            icc_profile=photograph.icc_profile,
        )
        if settings is None:
            data = codec.compress(photograph.pixels, **budget)
            steps = wanted = 0
        else:
            data, steps = _refined(
                codec, photograph.pixels, settings, options, budget, progress
            )
            wanted = settings.steps
            refined = f", {steps} steps"
        wall_s = time.perf_counter() - start_s
    write_file(output, data, force=options.force)
    height, width = photograph.pixels.shape[:2]
    print(
        f"{output}: {width}x{height}, {len(data):,} bytes, "
        f"{8 * len(data) / (height * width):.4f} bpp, {wall_s:.2f} s{refined}"
    )
    return _INTERRUPTED if steps < wanted else 0


def _settings(options: argparse.Namespace, refine: str | int | None) -> Settings | None:
    """How to refine; None where that was not asked for."""
    names = ("alpha", "beta", "gamma", "method", "features", "seed")
    changes = {name: getattr(options, name) for name in names}
    if refine is None:
        given = {**changes, "roi": options.roi}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"expected --refine with --{name}, found none")
        return None
    from semlic_jax import refinement

    return refinement.preset(refine, **changes)


def _region(options: argparse.Namespace, pixels: np.ndarray) -> Region | None:
    if options.roi is None:
        return None
    from semlic_jax.refinement import Region, parse_region

    mask = parse_region(options.roi, pixels, resize=options.roi_resize)
    weights: dict[str, Any] = {}
    if options.roi_weight is not None:
        weights = dict(foreground=options.roi_weight, background=1 - options.roi_weight)
    if options.roi_variant is not None:
        weights["variant"] = options.roi_variant
    return Region(mask, **weights)


def _refined(
    codec: Codec,
    pixels: np.ndarray,
    settings: Settings,
    options: argparse.Namespace,
    budget: dict[str, Any],
    progress: Callable[[str], None],
) -> tuple[bytes, int]:
    """The file of a refined image, and how many steps it took."""
    from semlic_jax import refinement

    region = _region(options, pixels)
    with _warnings_are_notes(), _stops_when_asked() as stop:
        progress(f"refining {options.input.name}: compiling")

        def show(now: Progress) -> bool:
            progress(f"refining {options.input.name}: {_bar(now)}")
            return not stop()

        result = refinement.refine(
            codec,
            pixels,
            settings=settings,
            region=region,
            progress=show,
            **budget,
        )
    return result.data, result.steps


def _bar(now: Progress) -> str:
    """Steps as a bar, with the mean rate and loss of the images."""
    filled = _BAR_WIDTH * now.step // now.steps
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    return (
        f"[{bar}] {now.step}/{now.steps}, {now.bpp.mean():.4f} bpp, "
        f"loss {now.value.mean():.4f}"
    )


def _refine(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation.image_sets import list_images
    from semlic_jax.images import parse_colour

    settings = _settings(options, options.steps)
    assert settings is not None
    background = options.background
    colour = None if background is None else parse_colour(background)
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(
            f"expected a folder as OUT_DIR, found the file {options.output}"
        )
    images = list_images([options.input])
    process, processes = _share(options)
    import jax

    from semlic_jax.refinement import FolderProgress, refine_folder

    batch = options.batch or (1 if jax.default_backend() == "cpu" else 16)
    with _progress() as progress, _warnings_are_notes(), _stops_when_asked() as stop:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        progress(f"refining {len(images)} images: compiling")

        def show(now: FolderProgress) -> bool:
            progress(f"{now.done}/{now.images} images: {_bar(now.batch)}")
            return not stop()

        report = refine_folder(
            codec,
            images,
            options.output,
            bpp=options.bpp,
            settings=settings,
            batch=batch,
            process=process,
            processes=processes,
            background=colour,
            force=options.force,
            progress=show,
        )
    for row in report.rows:
        print(
            f"{row.file}: {row.bytes:,} of {row.budget_bytes:,} bytes, loss "
            f"{row.value:.4f}, unrefined {row.unrefined_value:.4f}"
        )
    for name, reason in report.skipped.items():
        _say(f"skipped {name}: {reason}")
    if report.stopped:
        return _INTERRUPTED
    return _SKIPPED if report.skipped else 0


def _share(options: argparse.Namespace) -> tuple[int, int]:
    """Which process this is, and of how many."""
    if options.distributed == "none":
        if options.processes == 0 and options.process == -1:
            return 0, 1
        if not 0 <= options.process < options.processes:
            raise ValueError(
                "expected --processes=N with --process=0..N-1, found "
                f"{options.processes} and {options.process}"
            )
        return options.process, options.processes
    import jax

    from semlic_jax.training.sharding import start_processes

    start_processes(
        options.distributed, options.coordinator, options.processes, options.process
    )
    share = jax.process_index(), jax.process_count()
    # They work apart: one that is done early, or dies, is no matter to the others.
    jax.distributed.shutdown()
    return share


def _decompress(options: argparse.Namespace) -> None:
    from semlic_jax.coding.bitstream import unpack
    from semlic_jax.images import check_outputs, check_suffix, encode_image, write_file

    output = options.output or options.input.with_suffix(".png")
    check_suffix(output.suffix)
    data = options.input.read_bytes()
    header, _ = unpack(data)
    _check_not_input(options, output)
    check_outputs([output], force=options.force)
    with _progress() as progress:
        progress("loading the model")
        codec = _codec_of_file(data, options.model)
        progress(f"decompressing {options.input.name}")
        start_s = time.perf_counter()
        image = codec.decompress(data)
        wall_s = time.perf_counter() - start_s
        progress(f"writing {output.name}")
        encoded = encode_image(
            image, output.suffix, icc_profile=header.chunks.get(b"ICCP")
        )
    write_file(output, encoded, force=options.force)
    print(f"{output}: {header.width}x{header.height}, {wall_s:.2f} s")


def _info(options: argparse.Namespace) -> None:
    from semlic_jax.coding.bitstream import unpack
    from semlic_jax.packaged import name_of_model

    data = options.input.read_bytes()
    header, payload = unpack(data)
    icc_profile = header.chunks.get(b"ICCP")
    facts = {
        "file": str(options.input),
        "format_version": semlic_jax.BITSTREAM_VERSION,
        "width": header.width,
        "height": header.height,
        "file_bytes": len(data),
        "payload_bytes": len(payload),
        "bpp": round(8 * len(data) / (header.width * header.height), 6),
        "quality": round(header.quality / 255, 6),
        "fingerprint": header.fingerprint.hex(),
        "model": name_of_model(header.fingerprint),
        "icc_profile_bytes": len(icc_profile) if icc_profile else 0,
        "same_machine_only": bool(header.index_check),
        "coder": header.coder,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    facts["model"] = facts["model"] or "not packaged here"
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<18}{value}")


def _demo(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import demo
    from semlic_jax.images import check_outputs

    if options.input is None:
        photograph, stem = demo.packaged_photograph(), "photograph"
    else:
        photograph, stem = _read(options.input, options.background), options.input.stem
    outputs = demo.Outputs.of(options.out, stem)
    if options.out.exists():
        check_outputs(outputs.paths(), force=options.force)
    with _progress() as progress:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        outputs, candidates = demo.run_demo(
            codec,
            photograph,
            stem,
            options.out,
            bpp=options.bpp,
            force=options.force,
            progress=progress,
        )
    print(demo.table(candidates))
    print()
    print(f"the file          {outputs.file}")
    print(f"decoded from it   {outputs.decoded}")
    print(f"side by side      {outputs.comparison}")


def _models(options: argparse.Namespace) -> None:
    models = semlic_jax.pretrained_models()
    if options.json:
        print(json.dumps(models, indent=2, default=str))
        return
    for name, card in models.items():
        print(name)
        for fact, value in card.items():
            print(f"  {fact.replace('_', ' '):<18}{value}")


def _bench(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import benchmark

    if options.input is None:
        pixels = benchmark.packaged_pixels()
    else:
        pixels = _read(options.input, options.background).pixels
    with _progress() as progress:
        progress(f"loading the model {options.model}")
        codec = semlic_jax.load(options.model)
        report = benchmark.run_benchmark(
            codec,
            pixels,
            model=options.model,
            quality=options.quality,
            repeats=options.repeats,
            progress=progress,
        )
    print(json.dumps(report.facts(), indent=2) if options.json else report.table())


def _eval(options: argparse.Namespace) -> int:
    from semlic_jax.evaluation import evaluate, tables
    from semlic_jax.images import parse_colour

    background = options.background
    with _progress() as progress:
        report = evaluate.evaluate(
            options.inputs,
            options.codecs,
            options.bpp,
            options.out,
            metrics=options.metrics,
            model=options.model,
            anchor=options.anchor,
            weights=options.weights,
            patch_side=options.patch,
            image_set=options.published,
            jobs=options.jobs or 0,
            background=None if background is None else parse_colour(background),
            remeasure=options.remeasure,
            progress=progress,
        )
    print(tables.markdown(report.summary))
    print()
    for path in report.paths:
        print(path)
    skipped = report.summary.results.skipped
    for each in skipped:
        _say(f"skipped {each.name}: {each.reason}")
    return _SKIPPED if skipped else 0


def _compare(options: argparse.Namespace) -> None:
    from semlic_jax.evaluation import compare
    from semlic_jax.evaluation.entrants import entrants
    from semlic_jax.evaluation.measures import Measures, default_metrics
    from semlic_jax.images import check_outputs, write_file
    from semlic_jax.objectives.metrics import IMAGE_METRICS

    output = options.out or options.input.with_suffix(".html")
    photograph = _read(options.input, options.background)
    _check_not_input(options, output)
    check_outputs([output], force=options.force)
    metrics = options.metrics
    if metrics is None:
        found, notes = default_metrics(options.weights)
        metrics = [name for name in found if name in IMAGE_METRICS]
        for note in notes:
            _say(f"note: {note}")
    with _progress() as progress:
        progress("loading codecs and metrics")
        contestants = entrants(options.codecs, model=options.model)
        measures = Measures(metrics, options.weights)
        shown = compare.compare(
            photograph.pixels, contestants, options.bpp, measures, progress=progress
        )
        progress("writing the page")
        page = compare.page(
            options.input.name,
            photograph.pixels,
            shown,
            measures,
            icc_profile=photograph.icc_profile,
        )
    write_file(output, page.encode(), force=options.force)
    print(compare.table(shown, measures))
    print()
    print(output)


def _convert_features(options: argparse.Namespace) -> None:
    from semlic_jax.converters.features import convert_feature_files

    paths = convert_feature_files(
        options.inputs, options.output, network=options.network, force=options.force
    )
    for path in paths:
        print(path)


def _convert_neuralcompression(options: argparse.Namespace) -> None:
    from semlic_jax.converters.neuralcompression import convert_neuralcompression

    with _progress() as progress:
        progress(f"converting {options.input.name}")
        model = convert_neuralcompression(
            options.input, options.output, force=options.force
        )
    config = model.config
    print(
        f"{options.output}: widths {', '.join(map(str, config.widths))}, "
        f"{config.blocks} blocks, {config.latent_channels} latents, "
        f"{config.hyper_channels} hyper-latents, fingerprint "
        f"{model.fingerprint().hex()[:8]}"
    )
    _say(
        "note: its entropy networks work in floats, so its files decode only on the "
        "machine that made them"
    )


def _train(options: argparse.Namespace) -> None:
    try:
        from semlic_jax.training import train
    except ImportError as error:
        raise ValueError(
            f"training needs the package {error.name}: pip install 'semlic_jax[train]'"
        ) from error
    train.main(options.rest)


def _pack(options: argparse.Namespace) -> None:
    from semlic_jax.training import pack

    pack.main(options.rest)


if __name__ == "__main__":
    sys.exit(main())
