# SPDX-License-Identifier: Apache-2.0
"""`semlic compress | decompress | info`: one photograph, one file."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import semlic_jax
from semlic_jax.cli.options import (
    Commands,
    add_background,
    add_command,
    add_force,
    add_json,
    add_model,
    add_rate,
    check_not_input,
    read_input,
)
from semlic_jax.cli.refine import (
    add_refinement,
    add_region,
    refine_image,
    settings_of,
)
from semlic_jax.cli.terminal import INTERRUPTED, tell
from semlic_jax.terminal import progress_line

if TYPE_CHECKING:
    from semlic_jax.codec import Codec


def add_compress(commands: Commands) -> None:
    sub = add_command(
        commands, "compress", _compress, "write a photograph as a .semlic file"
    )
    sub.add_argument("input", metavar="IN", type=Path, help="an image file")
    sub.add_argument("output", metavar="OUT", type=Path, nargs="?")
    add_model(sub)
    sub.add_argument(
        "--coder", default="ans", choices=("ans", "tfc"), help="tfc needs the extra tfc"
    )
    add_rate(sub.add_mutually_exclusive_group(required=True))
    add_background(sub)
    add_force(sub)
    add_refinement(sub.add_argument_group("refinement of this image"))
    add_region(sub.add_argument_group("what matters in the image, with --refine"))


def _compress(options: argparse.Namespace) -> int:
    from semlic_jax.images import check_outputs, write_file

    settings = settings_of(options, options.refine)
    output = options.output or options.input.with_suffix(".semlic")
    photograph = read_input(options)
    check_not_input(options, output)
    check_outputs([output], force=options.force)
    refined = ""
    with progress_line() as progress:
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
            data, steps = refine_image(
                codec, photograph.pixels, settings, options, budget, progress
            )
            wanted = settings.steps
            refined = f", {steps} steps"
        wall_s = time.perf_counter() - start_s
    write_file(output, data, force=options.force)
    height, width = photograph.pixels.shape[:2]
    tell(
        f"{output}: {width}x{height}, {len(data):,} bytes, "
        f"{8 * len(data) / (height * width):.4f} bpp, {wall_s:.2f} s{refined}",
        output,
    )
    return INTERRUPTED if steps < wanted else 0


def add_decompress(commands: Commands) -> None:
    sub = add_command(
        commands, "decompress", _decompress, "write a .semlic file as an image file"
    )
    sub.add_argument("input", metavar="IN", type=Path, help="a .semlic file")
    sub.add_argument("output", metavar="OUT", type=Path, nargs="?")
    sub.add_argument(
        "--model", metavar="M", help="name or path; found by itself if packaged"
    )
    add_force(sub)


def _decompress(options: argparse.Namespace) -> None:
    from semlic_jax.coding.bitstream import unpack
    from semlic_jax.images import check_outputs, check_suffix, encode_image, write_file

    output = options.output or options.input.with_suffix(".png")
    check_suffix(output.suffix)
    data = options.input.read_bytes()
    header, _ = unpack(data)
    check_suffix(output.suffix, (header.height, header.width))
    check_not_input(options, output)
    check_outputs([output], force=options.force)
    with progress_line() as progress:
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
    tell(f"{output}: {header.width}x{header.height}, {wall_s:.2f} s", output)


def _codec_of_file(data: bytes, given: str | None) -> Codec:
    """The model that `given` names, or else the packaged one the file was made with."""
    if given is not None:
        return semlic_jax.load(given)
    from semlic_jax.packaged import load_for

    return load_for(data)


def add_info(commands: Commands) -> None:
    sub = add_command(commands, "info", _info, "say what a .semlic file holds")
    sub.add_argument("input", metavar="FILE", type=Path)
    add_json(sub)


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
