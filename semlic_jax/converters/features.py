# SPDX-License-Identifier: Apache-2.0
"""Converts published weights of feature networks to files that `load_features` reads.

This module decides which file goes where. `objectives.feature_weights` knows the forms
of the weights; `objectives.torch_files` and `objectives.tfjs_files` read the files of
PyTorch and TensorFlow.js.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from semlic_jax.images import check_outputs, write_file
from semlic_jax.objectives.features import convert_features

_SUFFIX = ".npz"


def convert_feature_files(
    sources: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    network: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Convert published files: all of them or, if one is refused, none.

    Args:
        sources: .pth, .pt or .npz files with torchvision's SqueezeNets, VGG-16 and
            AlexNet, FID's Inception-v3, LPIPS heads, or alpha and beta of DISTS; a
            model.json of TensorFlow.js with MobileNetV2.
        output: a folder, created if it is missing, in which each file gets the name
            that `load_features` looks for; with one source also a new .npz file.
        network: what the source is (see `objectives.features.convert_features`); None
            recognises it.
        force: replace existing files.

    Returns:
        the paths that were written, in the order of the sources.

    Raises:
        ValueError: a source is unreadable or unknown, weights are missing or do not
            fit, there are two sources for one file, or an output exists or cannot be
            written.
        OSError: the folder cannot be created.
    """
    folder = Path(output)
    as_file = folder.suffix == _SUFFIX and not folder.is_dir()
    if as_file and len(sources) > 1:
        raise ValueError(
            f"expected an output folder for {len(sources)} files, found {folder}"
        )
    if not as_file and folder.exists() and not folder.is_dir():
        raise ValueError(
            f"expected a folder or a new .npz file as output, found {folder}"
        )
    check_outputs([folder] if as_file else [], force=force)
    converted: dict[Path, bytes] = {}
    for source in sources:
        if Path(source).is_dir():
            raise ValueError(f"{source} is a folder: expected a file of weights")
        name, data = convert_features(Path(source), network)
        path = folder if as_file else folder / name
        if path in converted:
            raise ValueError(f"expected one source for {name}, found two")
        converted[path] = data
    if not as_file:
        folder.mkdir(exist_ok=True)
    check_outputs(list(converted), force=force)
    for path, data in converted.items():
        write_file(path, data, force=force)
    return list(converted)
