# SPDX-License-Identifier: Apache-2.0
"""`semlic compress | decompress | info`: photographs and files.

One input has one output, `-` for either being a standard stream; any number of inputs
goes with `--out-dir`, and then one that fails is named and skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

import semlic_jax
from semlic_jax.cli.options import (
    Commands,
    add_background,
    add_command,
    add_force,
    add_json,
    add_model,
    add_rate,
    add_srgb,
    background_colour,
    check_not_inputs,
)
from semlic_jax.cli.refine import (
    add_refinement,
    add_region,
    refine_image,
    region_of,
    settings_of,
)
from semlic_jax.cli.terminal import (
    INTERRUPTED,
    SKIPPED,
    STREAM,
    bar,
    reason_of,
    say,
    tell,
)
from semlic_jax.memory import is_out_of_memory
from semlic_jax.terminal import progress_line

if TYPE_CHECKING:
    from semlic_jax.codec import Codec
    from semlic_jax.images import Photograph

SUFFIX = ".semlic"
_JSON_LINES = "print one line of JSON per file, for programs to read"

T = TypeVar("T")


class _Task(NamedTuple):
    """One file to make of another; either can be `STREAM`."""

    source: str
    target: str

    @property
    def name(self) -> str:
        return "standard input" if self.source == STREAM else Path(self.source).name


def _add_paths(sub: argparse.ArgumentParser, given: str, made: str) -> None:
    """IN, OUT and `--out-dir`; OUT holds further IN where that is given."""
    sub.add_argument("input", metavar="IN", help=f"{given}, or - for standard input")
    sub.add_argument(
        "others",
        metavar="OUT",
        nargs="*",
        default=[],
        help=f"{made}, or - for standard output; default: IN with its suffix replaced; "
        "with --out-dir: further IN",
    )
    sub.add_argument(
        "--out-dir",
        metavar="DIR",
        type=Path,
        help="folder for the outputs of all IN, created if missing; each has the name "
        "of its IN with the new suffix; default: a single IN, written to OUT",
    )


def _tasks(options: argparse.Namespace, suffix: str) -> list[_Task]:
    """What to make of what, by the command line alone.

    Args:
      options: of the command.
      suffix: of outputs that are not named.
    """
    given = [options.input, *options.others]
    if options.out_dir is not None:
        return _tasks_into(options.out_dir, given, suffix)
    if len(given) > 2:
        options.command.error(
            f"expected IN and OUT, found {len(given)} names: several files need "
            "--out-dir DIR"
        )
    if len(given) == 2:
        return [_Task(*given)]
    source = given[0]
    if source == STREAM:
        options.command.error("expected OUT when IN is -, found none")
    if Path(source).is_dir():
        raise ValueError(f"{source} is a folder: expected a file")
    return [_Task(source, str(Path(source).with_suffix(suffix)))]


def _tasks_into(folder: Path, given: Sequence[str], suffix: str) -> list[_Task]:
    tasks: dict[str, _Task] = {}
    for source in given:
        if source == STREAM:
            raise ValueError("expected file names with --out-dir, found -")
        target = str(folder / f"{Path(source).stem}{suffix}")
        # Names that differ in case alone are those of one file on some systems.
        name = target.casefold()
        if name in tasks:
            raise ValueError(
                f"expected one input for each output, found {tasks[name].source} and "
                f"{source} for {target}"
            )
        tasks[name] = _Task(source, target)
    return list(tasks.values())


def _check_targets(options: argparse.Namespace, tasks: Sequence[_Task]) -> None:
    """Refuses outputs that cannot or must not be written, before any work."""
    from semlic_jax.images import check_folder, check_outputs

    folder = options.out_dir
    if folder is None:
        for each in tasks:
            # `Path` would take `new/` for `new`.
            folder_named = each.target.endswith(("/", os.sep))
            if each.target != STREAM and (folder_named or os.path.isdir(each.target)):
                raise ValueError(
                    f"the output {each.target} is a folder: expected a file name, or "
                    f"--out-dir {each.target}"
                )
    else:
        check_folder(folder, "as --out-dir")
        if not folder.exists():
            return
    sources = [Path(each.source) for each in tasks if each.source != STREAM]
    targets = [Path(each.target) for each in tasks if each.target != STREAM]
    check_not_inputs(sources, targets)
    for target in targets:
        try:
            check_outputs([target], force=options.force)
        except OSError:
            if folder is None:
                raise  # of several, that one is skipped when it is to be written


def _attempt(
    options: argparse.Namespace, task: _Task, make: Callable[[], T]
) -> T | None:
    """What `make` returns; None for one of several files, named, that it fails for."""
    try:
        return make()
    except Exception as error:
        if options.out_dir is None or not _is_of_the_file(error):
            raise
        reason = reason_of(error)
        if isinstance(error, OSError) and error.filename == task.target:
            reason = f"{task.target}: {reason}"  # it is not the input's fault
        say(f"skipped {task.source}: {reason}")
        return None


def _is_of_the_file(error: Exception) -> bool:
    """Whether another file may do better."""
    if isinstance(error, BrokenPipeError):  # whoever reads our output went away
        return False
    return isinstance(error, ValueError | OSError) or is_out_of_memory(error)


def _shown(
    progress: Callable[[str], None], done: int, of: int
) -> Callable[[str], None]:
    """Progress of one of several files, after a bar of those that are done."""
    if of == 1:
        return progress
    return lambda text: progress(f"{bar(done, of)} {done}/{of} files: {text}")


def _stream_in() -> BinaryIO:
    if sys.stdin is None:
        raise ValueError("expected data on standard input, found it closed")
    return sys.stdin.buffer


def _read_coded(source: str) -> bytes:
    """All of a .semlic file; of any other only the start, however long it is."""
    from semlic_jax.coding.bitstream import MAGIC

    with contextlib.ExitStack() as stack:
        if source == STREAM:
            stream = _stream_in()
        else:
            stream = stack.enter_context(open(source, "rb"))
        start = stream.read(len(MAGIC))
        return start + stream.read() if start == MAGIC else start


def _write(target: str, data: bytes, *, force: bool) -> None:
    from semlic_jax.images import write_file

    if target != STREAM:
        write_file(target, data, force=force)
        return
    if sys.stdout is None:
        raise ValueError("expected an open standard output for -, found it closed")
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def add_compress(commands: Commands) -> None:
    sub = add_command(
        commands, "compress", _compress, "compress photographs to .semlic files"
    )
    rate = "(--quality Q | --bpp BPP | --max-bytes N)"
    sub.usage = (
        f"semlic compress IN [OUT] {rate} [option ...]\n"
        f"       semlic compress IN [IN ...] --out-dir DIR {rate} [option ...]"
    )
    _add_paths(sub, "an image file that Pillow reads", f"the {SUFFIX} file to write")
    add_model(sub)
    sub.add_argument(
        "--coder",
        default="ans",
        choices=("ans", "tfc"),
        help="entropy coder of the file: ans, or tfc, which needs the extra tfc; "
        "default ans",
    )
    add_rate(sub.add_mutually_exclusive_group(required=True))
    add_background(sub)
    add_srgb(sub)
    add_force(sub)
    add_json(sub, _JSON_LINES)
    add_refinement(sub.add_argument_group("refinement"))
    add_region(sub.add_argument_group("region of interest, with --refine"))


def _compress(options: argparse.Namespace) -> int:
    tasks = _tasks(options, SUFFIX)
    for each in tasks:
        _check_not_named_as_image(each.target)
    settings = settings_of(options, options.refine)
    background_colour(options)  # a wrong one is refused before the work
    _check_targets(options, tasks)

    def compress(
        task: _Task, codec: Codec | None, progress: Callable[[str], None]
    ) -> bool:
        """Whether to go on: False after a Ctrl-C."""
        photograph = _read_photograph(options, task)
        height, width = photograph.pixels.shape[:2]
        notes = list(photograph.notes)
        region = region_of(options, photograph.pixels, notes.append)
        if codec is None:
            codec = load(progress)
        progress(f"compressing {task.name}")
        start_s = time.perf_counter()
        budget: dict[str, Any] = dict(
            quality=options.quality,
            bpp=options.bpp,
            max_bytes=options.max_bytes,
            icc_profile=photograph.icc_profile,
        )
        steps, stopped = None, False
        if settings is None:
            data = codec.compress(photograph.pixels, **budget)
        else:
            data, steps, stopped = refine_image(
                codec,
                photograph.pixels,
                settings,
                region,
                budget,
                task.name,
                progress,
                notes.append,
            )
        wall_s = time.perf_counter() - start_s
        _write(task.target, data, force=options.force)
        facts = _facts(task, data, options.model, wall_s)
        if steps is not None:
            facts["steps"] = steps
        facts["notes"] = notes
        line = (
            f"{task.target}: {width}x{height}, {len(data):,} bytes, "
            f"{facts['bpp']:.4f} bpp, quality {facts['quality']:.3f}, {wall_s:.2f} s"
        )
        if steps is not None:
            line += f", {steps} steps"
        tell(json.dumps(facts) if options.json else line, task.target)
        return not stopped

    def load(progress: Callable[[str], None]) -> Codec:
        progress(f"loading the model {options.model}")
        return semlic_jax.load(options.model, coder=options.coder)

    status = 0
    with progress_line() as progress:
        codec = None  # of a single photograph only once that is known to be one
        if options.out_dir is not None:
            codec = load(progress)
            options.out_dir.mkdir(parents=True, exist_ok=True)
        for done, task in enumerate(tasks):
            show = _shown(progress, done, len(tasks))
            show(f"reading {task.name}")
            whole = _attempt(options, task, partial(compress, task, codec, show))
            if whole is None:
                status = SKIPPED
            elif not whole:
                return INTERRUPTED
    return status


def _check_not_named_as_image(target: str) -> None:
    """Refuses an output that is more likely a second photograph, `--force` or not."""
    from semlic_jax.other_formats import image_suffixes

    path = Path(target)
    suffix = path.suffix.lower()
    if suffix != SUFFIX and suffix in image_suffixes():
        raise ValueError(
            f"the output {target} is named like an image: expected a name such as "
            f"{path.with_suffix(SUFFIX)} (several photographs: --out-dir)"
        )


def _read_photograph(options: argparse.Namespace, task: _Task) -> Photograph:
    """The photograph of a task; what was changed in it is noted."""
    from semlic_jax.images import read_photograph

    source: Any = task.source
    if source == STREAM:
        source = io.BytesIO(_stream_in().read())
    photograph = read_photograph(
        source, background=background_colour(options), srgb=options.srgb
    )
    for note in photograph.notes:
        say(f"note: {task.name}: {note}")
    return photograph


def _facts(task: _Task, data: bytes, model: str, wall_s: float) -> dict[str, Any]:
    """What `--json` says of a `.semlic` file that was made or read."""
    from semlic_jax.coding.bitstream import unpack

    header, _ = unpack(data)
    return {
        "input": task.source,
        "output": task.target,
        "width": header.width,
        "height": header.height,
        "file_bytes": len(data),
        "bpp": round(8 * len(data) / (header.width * header.height), 6),
        "quality": round(header.quality / 255, 6),
        "model": model,
        "seconds": round(wall_s, 3),
    }


def add_decompress(commands: Commands) -> None:
    sub = add_command(
        commands, "decompress", _decompress, "decompress .semlic files to image files"
    )
    sub.usage = (
        "semlic decompress IN [OUT] [option ...]\n"
        "       semlic decompress IN [IN ...] --out-dir DIR [option ...]"
    )
    _add_paths(sub, f"a {SUFFIX} file", "the image file to write, such as photo.png")
    sub.add_argument(
        "--format",
        metavar="KIND",
        help="image format where OUT names none: png, tif, tiff, bmp, ppm, webp, jpg "
        "or jpeg; default png",
    )
    sub.add_argument(
        "--model",
        metavar="MODEL",
        help="small, base or the path of a model file; default: the packaged model "
        "that the file was made with",
    )
    add_force(sub)
    add_json(sub, _JSON_LINES)


def _decompress(options: argparse.Namespace) -> int:
    from semlic_jax.images import check_suffix

    usual = f".{(options.format or 'png').removeprefix('.').lower()}"
    check_suffix(usual)
    tasks = _tasks(options, usual)
    for each in tasks:
        suffix = _image_suffix(each.target, usual)
        check_suffix(suffix)
        if options.format and suffix != usual:
            raise ValueError(
                f"expected OUT to end in {usual}, as --format says, found {each.target}"
            )
    _check_targets(options, tasks)
    models = _Models(options.model)

    def decompress(task: _Task, progress: Callable[[str], None]) -> bool:
        from semlic_jax.coding.bitstream import unpack
        from semlic_jax.images import encode_image, keeps_profile

        data = _read_coded(task.source)
        header, _ = unpack(data)
        suffix = _image_suffix(task.target, usual)
        check_suffix(suffix, (header.height, header.width))
        progress("loading the model")
        codec = models.of_file(data, header.fingerprint)
        progress(f"decompressing {task.name}")
        start_s = time.perf_counter()
        pixels = codec.decompress(data)
        wall_s = time.perf_counter() - start_s
        progress(f"writing {task.target}")
        encoded = encode_image(pixels, suffix, icc_profile=header.icc_profile)
        _write(task.target, encoded, force=options.force)
        facts = _facts(task, data, options.model or codec.name, wall_s)
        facts["notes"] = []
        if header.icc_profile and not keeps_profile(suffix):
            kind = suffix.removeprefix(".").upper()
            note = f"{kind} has no place for the ICC profile, which was dropped"
            facts["notes"].append(note)
            say(f"note: {task.name}: {note}")
        line = f"{task.target}: {header.width}x{header.height}, {wall_s:.2f} s"
        tell(json.dumps(facts) if options.json else line, task.target)
        return True

    status = 0
    with progress_line() as progress:
        if options.out_dir is not None:
            models.load_given()
            options.out_dir.mkdir(parents=True, exist_ok=True)
        for done, task in enumerate(tasks):
            show = _shown(progress, done, len(tasks))
            if not _attempt(options, task, partial(decompress, task, show)):
                status = SKIPPED
    return status


def _image_suffix(target: str, usual: str) -> str:
    """Suffix of the image file, which a stream does not have."""
    return usual if target == STREAM else Path(target).suffix.lower()


class _Models:
    """The models of several files, each loaded once.

    Args:
      given: the model of all files; None: the packaged one each was made with.
    """

    def __init__(self, given: str | None) -> None:
        self._given = given
        self._loaded: dict[bytes, Codec] = {}

    def load_given(self) -> None:
        """Refuses a given model that is none, before the first file is read."""
        if self._given is not None:
            self._loaded[b""] = semlic_jax.load(self._given)

    def of_file(self, data: bytes, fingerprint: bytes) -> Codec:
        key = fingerprint if self._given is None else b""
        if key not in self._loaded:
            self._loaded[key] = self._load(data)
        return self._loaded[key]

    def _load(self, data: bytes) -> Codec:
        if self._given is not None:
            return semlic_jax.load(self._given)
        from semlic_jax.packaged import load_for

        return load_for(data)


def add_info(commands: Commands) -> None:
    sub = add_command(commands, "info", _info, "show what a .semlic file contains")
    sub.add_argument(
        "input", metavar="FILE", help=f"a {SUFFIX} file, or - for standard input"
    )
    add_json(sub)


def _info(options: argparse.Namespace) -> None:
    from semlic_jax.coding.bitstream import unpack
    from semlic_jax.packaged import name_of_model

    data = _read_coded(options.input)
    header, payload = unpack(data)
    facts = {
        "file": options.input,
        "format_version": semlic_jax.BITSTREAM_VERSION,
        "width": header.width,
        "height": header.height,
        "file_bytes": len(data),
        "payload_bytes": len(payload),
        "bpp": round(8 * len(data) / (header.width * header.height), 6),
        "quality": round(header.quality / 255, 6),
        "fingerprint": header.fingerprint.hex(),
        "model": name_of_model(header.fingerprint),
        "icc_profile_bytes": len(header.icc_profile or b""),
        "same_machine_only": bool(header.index_check),
        "coder": header.coder,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    facts["model"] = facts["model"] or "not a packaged model"
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<18}{value}")
