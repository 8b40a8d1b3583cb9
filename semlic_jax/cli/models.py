# SPDX-License-Identifier: Apache-2.0
"""`semlic models | train | pack | convert`: models, and where they come from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import semlic_jax
from semlic_jax.cli.options import (
    DEBUG_HELP,
    DEFAULT_MODEL,
    Commands,
    add_command,
    add_force,
    add_json,
)
from semlic_jax.cli.terminal import say
from semlic_jax.terminal import progress_line


def add_models(commands: Commands) -> None:
    sub = add_command(commands, "models", _models, "list the packaged models")
    add_json(sub)


def _models(options: argparse.Namespace) -> None:
    cards = semlic_jax.pretrained_models()
    # The default one first.
    names = sorted(cards, key=lambda name: name != DEFAULT_MODEL)
    models = {name: cards[name] for name in names}
    if options.json:
        facts = {
            name: {"default": name == DEFAULT_MODEL, **card}
            for name, card in models.items()
        }
        print(json.dumps(facts, indent=2, default=str))
        return
    for name, card in models.items():
        print(f"{name} (the default)" if name == DEFAULT_MODEL else name)
        for fact, value in card.items():
            print(f"  {fact.replace('_', ' '):<18}{value}")


def add_programs(commands: Commands) -> None:
    # These two read their own options, `--help` too.
    for name, run, text in (
        ("train", _train, "train a model (needs the extra `train`)"),
        ("pack", _pack, "pack photographs into array_record files, for training"),
    ):
        sub = commands.add_parser(name, help=text, add_help=False, allow_abbrev=False)
        sub.set_defaults(run=run, program=name)
        sub.add_argument("--debug", action="store_true", help=DEBUG_HELP)


def _train(options: argparse.Namespace) -> None:
    try:
        from semlic_jax.training import train
    except ImportError as error:
        raise ValueError(
            f"training needs the package {error.name}: pip install 'semlic_jax[train]'"
        ) from error
    train.main(options.rest)


def _pack(options: argparse.Namespace) -> int:
    from semlic_jax.training import pack

    return pack.main(options.rest)


def add_convert(commands: Commands) -> None:
    sub = add_command(
        commands,
        "convert",
        _convert_features,
        "convert published weights and checkpoints",
    )
    kinds = sub.add_subparsers(metavar="WHAT", required=True)

    def convert(
        name: str, run: Callable[[Any], int | None], text: str
    ) -> argparse.ArgumentParser:
        kind = kinds.add_parser(
            name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False
        )
        kind.set_defaults(run=run, command=kind)
        kind.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG_HELP
        )
        return kind

    kind = convert(
        "features",
        _convert_features,
        "convert published weights of feature networks, LPIPS heads or DISTS",
    )
    kind.add_argument(
        "inputs",
        metavar="SRC",
        type=Path,
        nargs="+",
        help="file of published weights: .pth, .pt, .npz or model.json",
    )
    kind.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        help="output folder, or an .npz file for a single SRC",
    )
    kind.add_argument(
        "--network",
        metavar="NAME",
        help="what SRC contains: squeezenet1_0, vgg16, lpips_alex, dists and others; "
        "default: detected from the file",
    )
    add_force(kind)

    kind = convert(
        "neuralcompression",
        _convert_neuralcompression,
        "convert an MS-ILLM or No-GAN checkpoint; files of the model decode only on "
        "the machine that made them",
    )
    kind.add_argument("input", metavar="CKPT", type=Path, help="checkpoint file, .ckpt")
    kind.add_argument(
        "output", metavar="OUT", type=Path, help="model file to write, .npz"
    )
    add_force(kind)


def _convert_features(options: argparse.Namespace) -> None:
    from semlic_jax.converters.features import convert_feature_files

    paths = convert_feature_files(
        options.inputs, options.output, network=options.network, force=options.force
    )
    for path in paths:
        print(path)


def _convert_neuralcompression(options: argparse.Namespace) -> None:
    from semlic_jax.converters.neuralcompression import convert_neuralcompression

    with progress_line() as progress:
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
    say(
        "note: the model's entropy networks use floating point, so its files decode "
        "only on the machine that made them"
    )
