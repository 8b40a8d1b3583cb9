# SPDX-License-Identifier: Apache-2.0
"""Turns folders of photographs into array_record files, for fast random access.

semlic pack photos/ photos.array_record --shards 8

A record is an image file, byte for byte. Files that cannot be decoded are skipped and
named, and the exit status is then 4. To train on the result, give it as
`--config.data.train`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from semlic_jax.terminal import SKIPPED
from semlic_jax.training.sources import (
    UnusableImage,
    decode,
    decoder_threads,
    image_files,
)

SUFFIX = ".array_record"


def pack(
    patterns: Sequence[str], output: Path, *, shards: int = 1
) -> tuple[int, list[str]]:
    """Write the image files of all patterns.

    Args:
        patterns: files, folders or globs of files.
        output: `NAME.array_record`; several shards are `NAME-00000-of-00008...`.
        shards: number of files; image i goes to shard i % shards.

    Returns:
        How many images were written, and which files were left out and why.

    Raises:
        ValueError: a pattern has no images, there are fewer than shards, none or fewer
            than shards can be decoded, the output's name is wrong, or array-record is
            not installed. No file is left then.
        FileExistsError: an output exists already.
        OSError: an output cannot be written.
    """
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise ValueError(
            "writing array_record files needs the package array-record: "
            "pip install 'semlic_jax[train]'"
        ) from error
    if output.suffix != SUFFIX:
        raise ValueError(f"the output's name must end in {SUFFIX}, found {output.name}")
    if not output.parent.is_dir():
        raise ValueError(f"the folder {output.parent} for {output.name} does not exist")
    by_place: dict[str, str] = {}  # each file once, however it is spelled
    for pattern in patterns:
        # A file that is named is tried, whatever its suffix.
        found = [pattern] if Path(pattern).is_file() else image_files(pattern)
        if not found:
            raise ValueError(f"expected photographs in {pattern}, found none")
        by_place |= {os.path.abspath(path): path for path in found}
    paths = sorted(by_place.values())
    if not 1 <= shards <= len(paths):
        raise ValueError(
            f"shards must be from 1 to {len(paths)}, the number of photographs, "
            f"found {shards}"
        )
    targets = [output]
    if shards > 1:
        stem = output.with_suffix("")
        targets = [
            Path(f"{stem}-{shard:05d}-of-{shards:05d}{SUFFIX}")
            for shard in range(shards)
        ]
    for target in targets:
        if target.exists():
            raise FileExistsError(17, "already exists", str(target))
    partial = [Path(f"{target}.partial") for target in targets]
    try:
        for path in partial:  # the writer's own error would be one of the program
            path.touch()
        writers = [ArrayRecordWriter(str(path), "group_size:1") for path in partial]
        try:
            written, skipped = _write(paths, writers)
        finally:
            for writer in writers:
                writer.close()
        if not written:
            raise ValueError(
                f"none of the {len(paths)} photographs could be read; the first: "
                f"{skipped[0]}"
            )
        if written < shards:
            raise ValueError(
                f"expected at least {shards} readable photographs for {shards} shards, "
                f"found {written}"
            )
        for path, target in zip(partial, targets, strict=True):
            path.rename(target)
    finally:
        for path in partial:
            path.unlink(missing_ok=True)
    return written, skipped


def _write(paths: Sequence[str], writers: Sequence[Any]) -> tuple[int, list[str]]:
    """Write the photographs that can be read to the writers in turn."""
    written = 0
    skipped: list[str] = []
    with ThreadPoolExecutor(decoder_threads()) as pool:
        for data in pool.map(_checked, paths):
            if isinstance(data, str):
                skipped.append(data)
                continue
            writers[written % len(writers)].write(data)
            written += 1
    return written, skipped


def _checked(path: str) -> bytes | str:
    """The file's bytes if it can be decoded, else the reason why it cannot."""
    try:
        data = Path(path).read_bytes()
        decode(data, path)
        return data
    except OSError as error:
        return f"{path}: {error.strerror}"
    except UnusableImage as error:
        return f"{path}: {error.__cause__ or error}"


def main(argv: Sequence[str] | None = None) -> int:
    """`semlic pack PHOTOS... OUT.array_record`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="semlic pack", description="Pack photographs into array_record files."
    )
    parser.add_argument("photos", nargs="+", help="image files, folders or globs")
    parser.add_argument("output", type=Path, help="file to write, NAME.array_record")
    parser.add_argument(
        "--shards", type=int, default=1, help="number of files; default 1"
    )
    # `semlic` takes this option itself; here it is for the help.
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show the traceback of an error; default: a one-sentence message",
    )
    options = parser.parse_args(argv)
    written, skipped = pack(options.photos, options.output, shards=options.shards)
    for each in skipped:
        print(f"skipped {each}", file=sys.stderr)
    print(f"{written} photographs written, {len(skipped)} skipped")
    return SKIPPED if skipped else 0


if __name__ == "__main__":
    sys.exit(main())
