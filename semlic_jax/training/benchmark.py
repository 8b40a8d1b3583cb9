# SPDX-License-Identifier: Apache-2.0
"""Measure the speed of a training step against PyTorch, the device and the input.

python -m semlic_jax.training.benchmark --size small --batch 8 --crop 128 [--torch]

The step is that of a `rate_distortion` stage with Charbonnier and perceptual terms:
forward and backward pass, clipping, Adam and averaging. `--torch` also runs the same
networks with the same parameters in eager PyTorch (`training.torch_twin`), under its
autocast with `--dtype bfloat16`. On a GPU, set XLA_PYTHON_CLIENT_PREALLOCATE=false so
that both fit.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.images import check_outputs, write_file
from semlic_jax.model.compression import SIZES, CompressionModel, entropy_model
from semlic_jax.model.transforms import HYPER_STRIDE
from semlic_jax.objectives.features import FeatureNetwork, SqueezeNet
from semlic_jax.objectives.losses import LossWeights
from semlic_jax.option_kinds import positive_int
from semlic_jax.training.data import Photographs
from semlic_jax.training.sources import open_sources
from semlic_jax.training.stages import Optimizer, Stage
from semlic_jax.training.steps import Networks, Trunk, codec_update, new_learner

Array = jax.Array

_PEAK_SIDE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Median duration of a call that waits for its result, after two warm-ups."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def matrix_peak(dtype: Any, repeats: int) -> float:
    """FLOP/s of one large matrix product, measured on this device."""
    side = _PEAK_SIDE.get(jax.default_backend(), 4096)
    a = jnp.ones((side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    seconds = median_seconds(lambda: jax.block_until_ready(product(a)), repeats)
    return 2 * side**3 / seconds


def jax_step(
    size: str, images: np.ndarray, dtype: Any
) -> tuple[Callable[[], Any], float, Any, Any]:
    """Return a closure that runs one step, its FLOP, and the networks' parameters.

    These are the initial parameters of the codec and those of the trunk.
    """
    config = SIZES[size]
    model = CompressionModel(config, dtype=dtype)
    key = jax.random.key(0)
    x = jnp.zeros((1, 64, 64, 3))
    params = jax.jit(model.init)(key, x, jnp.zeros(1), key)["params"]
    module = SqueezeNet("1.0", dtype=None if dtype == jnp.float32 else dtype)
    trunk_params = jax.jit(module.init)(key, x)["params"]
    trunk = Trunk(FeatureNetwork(trunk_params, module))
    kept = jax.tree.map(np.array, (params, trunk_params))
    stage = Stage(
        name="benchmark",
        steps=1000,
        optimizer=Optimizer(),
        weights=LossWeights(charbonnier=1.0, perceptual=0.02),
    )
    update = jax.jit(codec_update(Networks(model), stage, 0), donate_argnums=0)
    learner = jax.jit(lambda p: new_learner(p, stage.optimizer, stage.steps))(params)
    batch = jnp.asarray(images)
    arguments = (np.int32(0), batch, trunk, None, None)
    cost = update.lower(learner, *arguments).compile().cost_analysis() or {}
    if isinstance(cost, list):
        cost = cost[0]

    def step() -> Any:
        nonlocal learner
        learner, metrics, _ = update(learner, *arguments)
        return jax.block_until_ready(metrics)

    return step, float(cost.get("flops", float("nan"))), *kept


def torch_step(
    size: str, images: np.ndarray, params: Any, trunk_params: Any, dtype: str
) -> Callable[[], Any]:
    """Return a closure that runs one step in PyTorch."""
    import torch

    from semlic_jax.training.torch_twin import Twin, convert, make_step

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    config = SIZES[size]
    specs = entropy_model(config, "float").layer_specs()
    twin = Twin(config, params, specs, device=device, dtype=getattr(torch, dtype))
    taps = SqueezeNet("1.0").taps
    step = make_step(twin, convert(trunk_params, device), taps, lr=1e-4)
    x = torch.tensor(images.transpose(0, 3, 1, 2), device=device)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> Any:
        return step(x).item()

    return run


def input_seconds(data: Photographs, batch: int, repeats: int) -> float:
    """Seconds per batch of the input pipeline alone, with a warm cache."""
    batches = data.batches(0, repeats + 4, seed=0, examples=range(batch))
    for _ in range(4):
        next(batches)
    begun = time.perf_counter()
    count = sum(1 for _ in batches)
    return (time.perf_counter() - begun) / count


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements of one configuration, in seconds and FLOP/s.

    Raises:
        ValueError: an option does not fit, or no photograph can be used; before the
            work.
    """
    if options.crop % HYPER_STRIDE:
        raise ValueError(
            f"--crop must be a multiple of {HYPER_STRIDE}, found {options.crop}"
        )
    if options.torch and importlib.util.find_spec("torch") is None:
        raise ValueError("PyTorch is not installed: leave out --torch")
    photographs = None
    if options.train:
        photographs = Photographs(open_sources(options.train), crop=options.crop)
        for _ in photographs.sample(len(photographs)):
            pass  # they are in the cache now
    dtype = jnp.dtype(options.dtype)
    rng = np.random.default_rng(0)
    shape = (options.batch, options.crop, options.crop, 3)
    images = rng.uniform(size=shape).astype(np.float32)
    step, flops, params, trunk_params = jax_step(options.size, images, dtype)
    seconds = median_seconds(step, options.repeats)
    peak = matrix_peak(dtype, options.repeats)
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "size": options.size,
        "batch": options.batch,
        "crop": options.crop,
        "dtype": options.dtype,
        "jax_seconds_per_step": seconds,
        "flop_per_step": flops,
        "jax_flop_per_second": flops / seconds,
        "matrix_peak_flop_per_second": peak,
        "share_of_peak": flops / seconds / peak,
    }
    if options.torch:
        run = torch_step(options.size, images, params, trunk_params, options.dtype)
        other = median_seconds(run, options.repeats)
        facts |= {"torch_seconds_per_step": other, "jax_speed_up": other / seconds}
    if photographs is not None:
        each = input_seconds(photographs, options.batch, 4 * options.repeats)
        facts |= {
            "input_seconds_per_batch": each,
            "input_speed_over_step": seconds / each,
        }
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.training.benchmark",
        description=__doc__.splitlines()[0],
    )
    parser.add_argument("--size", default="small", choices=sorted(SIZES))
    parser.add_argument("--batch", type=positive_int, default=8)
    parser.add_argument("--crop", type=positive_int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=positive_int, default=5)
    parser.add_argument("--torch", action="store_true", help="measure PyTorch too")
    parser.add_argument(
        "--train", nargs="+", help="photographs to measure the input pipeline with"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    try:
        if options.json:
            check_outputs([options.json], force=options.force)
        facts = json.dumps(run_benchmark(options), indent=2)
        print(facts)
        if options.json:
            write_file(options.json, f"{facts}\n".encode(), force=options.force)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
