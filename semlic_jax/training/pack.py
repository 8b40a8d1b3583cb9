# SPDX-License-Identifier: Apache-2.0
"""Turns folders of photographs into array_record files, for fast random access.

semlic pack photos/ photos.array_record --shards 8

A record is an image file, byte for byte. Files that cannot be decoded are left out,
counted and named. To train on the result, give it as `--config.data.train`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from semlic_jax.training.sources import UnusableImage, decode, image_files

SUFFIX = ".array_record"


def pack(
    patterns: Sequence[str], output: Path, *, shards: int = 1
) -> tuple[int, list[str]]:
    """Write the image files of all patterns.

    Args:
        patterns: folders or globs of files.
        output: `NAME.array_record`; several shards are `NAME-00000-of-00008...`.
        shards: number of files; image i goes to shard i % shards.

    Returns:
        How many images were written, and which files were left out and why.

    Raises:
        ValueError: there are no images or fewer than shards, the output's name is
            wrong, or array-record is not installed.
        FileExistsError: an output exists already.
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
    paths = sorted({path for pattern in patterns for path in image_files(pattern)})
    if not paths:
        raise ValueError(f"expected photographs in {', '.join(patterns)}, found none")
    if not 1 <= shards <= len(paths):
        raise ValueError(
            f"shards must be 1 to the {len(paths)} photographs there are, "
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
            raise FileExistsError(17, "exists already", str(target))
    partial = [Path(f"{target}.partial") for target in targets]
    skipped: list[str] = []
    writers = [ArrayRecordWriter(str(path), "group_size:1") for path in partial]
    written = 0
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for data in pool.map(_checked, paths):
            if isinstance(data, str):
                skipped.append(data)
                continue
            writers[written % shards].write(data)
            written += 1
    for writer in writers:
        writer.close()
    for path, target in zip(partial, targets, strict=True):
        path.rename(target)
    return written, skipped


def _checked(path: str) -> bytes | str:
    """The file's bytes if it can be decoded, else the reason why it cannot."""
    try:
        data = Path(path).read_bytes()
        decode(data, path)
        return data
    except OSError as error:
        return f"{path} ({error.strerror})"
    except UnusableImage as error:
        return str(error)


def main(argv: Sequence[str] | None = None) -> None:
    """`semlic pack PHOTOS... OUT.array_record [--shards N]`."""
    parser = argparse.ArgumentParser(
        prog="semlic pack", description="Turn photographs into array_record files."
    )
    parser.add_argument("photos", nargs="+", help="folders or globs of image files")
    parser.add_argument("output", type=Path, help="NAME.array_record")
    parser.add_argument("--shards", type=int, default=1, help="number of files")
    options = parser.parse_args(argv)
    written, skipped = pack(options.photos, options.output, shards=options.shards)
    for name in skipped:
        print(f"left out: {name}")
    print(f"{written} photographs written, {len(skipped)} left out")


if __name__ == "__main__":
    main()
