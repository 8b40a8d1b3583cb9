# SPDX-License-Identifier: Apache-2.0
"""Does a file decode to the same latents everywhere? One command that tries.

    python -m semlic_jax.evaluation.exactness IMAGES --model small --out report.json

Compresses each image at several qualities, then decodes all files in other processes:
with one thread and with two, without jit, under each default matrix precision, and with
XLA's fast mathematics. A variant passes if the SHA-256 of every decoded y_hat equals
the encoder's. An accelerator can be added as one more variant (`--platforms`). The
report also compares file sizes with the ideal code length of the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semlic_jax.images import check_outputs, write_file

QUALITIES = (0.0, 0.25, 0.5, 0.75, 1.0)

# Variables that each decoding process has in addition to the encoder's environment.
VARIANTS: dict[str, dict[str, str]] = {
    "another process": {},
    "one thread": {"SEMLIC_EXACTNESS_CPUS": "1"},
    "two threads": {"SEMLIC_EXACTNESS_CPUS": "2"},
    "without jit": {"JAX_DISABLE_JIT": "1"},
    "precision bfloat16": {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
    "precision tensorfloat32": {"JAX_DEFAULT_MATMUL_PRECISION": "tensorfloat32"},
    "precision highest": {"JAX_DEFAULT_MATMUL_PRECISION": "highest"},
    "fast mathematics": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"},
}


def digest(y_hat: np.ndarray) -> str:
    """SHA-256 of decoded latents."""
    return hashlib.sha256(np.ascontiguousarray(y_hat, "<f4").tobytes()).hexdigest()


def write_files(
    model: str, images: Sequence[Path], qualities: Sequence[float], folder: Path
) -> dict[str, Any]:
    """Encode all images at all qualities into `folder`.

    Returns:
        The encoder's `digests` by file name; the number of `files`, the totals
        `file_bytes` and `ideal_bytes`; and `largest_excess_bytes`, the largest of
        file bytes - (1.003 * ideal bytes + 20).
    """
    import semlic_jax
    from semlic_jax.codec import MAX_LEVEL
    from semlic_jax.images import read_photograph

    codec = semlic_jax.load(model)
    digests, ideal_bytes, file_bytes, excess = {}, [], [], []
    for index, path in enumerate(images):  # two images may have the same name
        latents = codec.analyse(read_photograph(path).pixels)
        for quality in qualities:
            level = round(quality * MAX_LEVEL)
            scaled = codec.scaled(latents, level)
            symbols = codec.entropy.symbols(*scaled, level, latents.size)
            data = codec.encode_symbols(symbols, level, latents.size)
            name = f"{index}-{path.stem}-{level}.semlic"
            (folder / name).write_bytes(data)
            rows, columns = (-(-side // 16) for side in latents.size)
            y_hat = symbols.y + symbols.mean_steps.astype(np.float32) / 16
            digests[name] = digest(y_hat[:rows, :columns])
            ideal_bytes.append(codec.entropy.ideal_bits(symbols, latents.size) / 8)
            file_bytes.append(len(data))
            excess.append(file_bytes[-1] - (1.003 * ideal_bytes[-1] + 20))
    return {
        "files": len(digests),
        "file_bytes": sum(file_bytes),
        "ideal_bytes": sum(ideal_bytes),
        "largest_excess_bytes": max(excess),
        "digests": digests,
    }


def decode_files(model: str, folder: Path) -> dict[str, str]:
    """Digests of the decoded latents of all files in a folder.

    If a file does not decode, as happens if one index differs, the decoder's message is
    in the place of the digest.
    """
    import semlic_jax
    from semlic_jax.coding.bitstream import BitstreamError, IncompatibleMachineError

    codec = semlic_jax.load(model)
    digests = {}
    for path in sorted(folder.glob("*.semlic")):
        try:
            digests[path.name] = digest(codec.decode_latents(path.read_bytes())[1])
        except (BitstreamError, IncompatibleMachineError) as error:
            digests[path.name] = f"not decoded: {error}"
    return digests


def decode_elsewhere(model: str, folder: Path, extra: dict[str, str]) -> dict[str, str]:
    """`decode_files` in a process of its own, with extra environment variables.

    Raises:
        RuntimeError: the process failed; the message has the end of what it printed.
    """
    environment = {**os.environ, **extra}
    command = [
        sys.executable,
        "-m",
        "semlic_jax.evaluation.exactness",
        "--decode",
        str(folder),
    ]
    done = subprocess.run(
        [*command, "--model", model], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"decoding failed: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(
    model: str,
    images: Sequence[Path],
    *,
    qualities: Sequence[float] = QUALITIES,
    variants: dict[str, dict[str, str]] = VARIANTS,
) -> dict[str, Any]:
    """Everything that the command prints, as one record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = write_files(model, images, qualities, folder)
        expected = written.pop("digests")
        results = {}
        for variant, extra in variants.items():
            found = decode_elsewhere(model, folder, extra)
            different = sorted(key for key in expected if found[key] != expected[key])
            results[variant] = {"different": len(different), "names": different[:5]}
            print(
                f"{variant}: {len(different)} of {len(expected)} differ",
                file=sys.stderr,
            )
    return {**written, "qualities": list(qualities), "variants": results}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.exactness",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("images", nargs="*", type=Path)
    parser.add_argument("--model", default="small")
    parser.add_argument("--out", type=Path, help="file to write the record to")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--platforms", nargs="*", default=[])
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cpus = os.environ.get("SEMLIC_EXACTNESS_CPUS")
    if cpus:  # XLA:CPU sizes its thread pool by the cores it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cpus)])
    if arguments.decode:
        print(json.dumps(decode_files(arguments.model, arguments.decode)))
        return 0
    if not arguments.images:
        parser.error("expected images, found none")
    variants = dict(VARIANTS)
    for platform in arguments.platforms:
        variants[f"on {platform}"] = {"JAX_PLATFORMS": platform}
    try:
        if arguments.out:
            check_outputs([arguments.out], force=arguments.force)
        record = report(arguments.model, arguments.images, variants=variants)
        text = json.dumps(record, indent=2)
        print(text)
        if arguments.out:
            write_file(arguments.out, f"{text}\n".encode(), force=arguments.force)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    return int(any(variant["different"] for variant in record["variants"].values()))


if __name__ == "__main__":
    sys.exit(main())
