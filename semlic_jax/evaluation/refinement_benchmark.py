# SPDX-License-Identifier: Apache-2.0
"""Steps per second of refinement: the compiled scan against a plain PyTorch loop.

    python -m semlic_jax.evaluation.refinement_benchmark --model small --side 256

Both sides do the same steps on one image: relaxed rounding of y and z (SGA), the
entropy networks, the decoder, the squared error, with `--features` the feature
distance, gradients to the latents alone, Adam. The PyTorch side is what a user would
write: eager, channels-last, no gradients of weights; its entropy networks leave out the
rounding to integers, which makes its steps a little cheaper. Steps of both sides
alternate in one process, and medians are compared. `--batch` also measures a batch
against one image at a time, in images per second, and the share of the device's matrix
peak.

Needs PyTorch, which nothing else of a refinement does; `--no-torch` leaves it out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import semlic_jax
from semlic_jax import refinement
from semlic_jax.codec import Codec
from semlic_jax.evaluation.benchmark import packaged_pixels
from semlic_jax.images import check_outputs, read_photograph, write_file
from semlic_jax.option_kinds import positive_int
from semlic_jax.refinement.batch import Batch

_QUALITY = 0.4
_TEMPERATURE = 0.3


def photographs(paths: Sequence[Path], count: int, side: int) -> list[np.ndarray]:
    """Crops of this side, uint8, of these photographs or of the packaged one.

    Raises:
      ValueError: a photograph is smaller.
    """
    pictures = [read_photograph(path).pixels for path in paths] or [packaged_pixels()]
    crops = []
    for index in range(count):
        picture = pictures[index % len(pictures)]
        if min(picture.shape[:2]) < side:
            raise ValueError(
                f"expected photographs of at least {side} x {side}, found "
                f"{picture.shape[1]} x {picture.shape[0]}"
            )
        # Other corners of the same picture where there are too few.
        room = min(picture.shape[:2]) - side
        start = room * (index // len(pictures)) // max(count // len(pictures), 1)
        crops.append(picture[start : start + side, start : start + side])
    return crops


def new_batch(
    codec: Codec, images: Sequence[np.ndarray], settings: refinement.Settings
) -> Batch:
    """A refinement that is ready to start, at a middle quality."""
    files = [codec.compress(image, quality=_QUALITY) for image in images]
    nothing = [None] * len(images)
    budgets = [len(file) for file in files]
    return Batch(codec, settings, images, budgets, nothing, nothing, files)


def torch_stepper(
    codec: Codec, batch: Batch, settings: refinement.Settings
) -> Callable[[], float]:
    """A closure that does one step of the loop in PyTorch, from the same latents.

    Raises:
        ValueError: the loop has no networks like those of the model.
    """
    import torch
    import torch.nn.functional as F

    from semlic_jax.model.compression import (
        QUALITY_LEVELS,
        ModelConfig,
        entropy_model,
    )
    from semlic_jax.model.context import MEAN_LIMIT, MEAN_STEPS, coding_order
    from semlic_jax.model.priors import NUM_SCALES, SCALE_MAX, SCALE_MIN
    from semlic_jax.model.transforms import STRIDE
    from semlic_jax.training.torch_twin import (
        Twin,
        convert,
        depth_to_space,
        leaves,
        squeezenet_distance,
    )

    config = codec.config
    if not isinstance(config, ModelConfig):
        raise ValueError(
            f"the comparison with PyTorch needs a model that was not converted, found "
            f"{config.name}: give --no-torch"
        )
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    params = jax.tree.map(np.asarray, codec.twin_params())
    twin = Twin(
        config, params, entropy_model(config, "float").layer_specs(), device=device
    )
    for tensor in leaves(twin.params):
        tensor.requires_grad_(False)

    def channels_first(array: Any) -> Any:
        tensor = torch.tensor(np.asarray(array).transpose(0, 3, 1, 2), device=device)
        return tensor.contiguous(memory_format=torch.channels_last)

    y, z = (channels_first(part).requires_grad_() for part in batch.start)
    x = channels_first(batch.images.x)
    quality = torch.tensor(np.asarray(batch.images.quality), device=device)
    gain = twin.gain(quality)
    optimizer = torch.optim.Adam([y, z], lr=settings.learning_rate)
    beta = float(np.exp(np.asarray(batch.log_beta)).mean())
    pixels = x.shape[2] * x.shape[3]
    trunk = None
    if batch.frozen.features is not None:
        trunk = convert(jax.tree.map(np.asarray, batch.frozen.features.params), device)
        for tensor in leaves(trunk):
            tensor.requires_grad_(False)
        taps = batch.frozen.features.taps
    level = (quality * (QUALITY_LEVELS - 1)).round()[:, None, None, None]
    rows = torch.arange(y.shape[2], device=device)[:, None]
    columns = torch.arange(y.shape[3], device=device)
    colours = [((rows + columns) % 2 == parity).float() for parity in (0, 1)]
    log_step = float(np.log(SCALE_MAX / SCALE_MIN)) / (NUM_SCALES - 1)
    assert x.shape[2] == STRIDE * y.shape[2]

    def relaxed(v: Any) -> Any:
        low = v.detach().floor()
        u = (v - low).clamp(1e-5, 1 - 1e-5)
        logit = (torch.atanh(u) - torch.atanh(1 - u)) / _TEMPERATURE
        noise = torch.logit(torch.rand_like(v).clamp(1e-6, 1 - 1e-6))
        return low + torch.sigmoid((logit + noise) / _TEMPERATURE)

    def bits_of(residual: Any, scale: Any) -> Any:
        distance = residual.abs()
        root = 0.5**0.5
        mass = 0.5 * (
            torch.erfc((distance - 0.5) / scale * root)
            - torch.erfc((distance + 0.5) / scale * root)
        )
        return -torch.log2(mass.clamp(min=1e-9))

    def activation(x: Any) -> Any:
        return F.relu(x).clamp(max=255.0)

    def run() -> float:
        conv = twin._integer_conv
        z_soft = relaxed(z)
        bits = twin.z_bits(z_soft).sum()
        plane = level.expand(-1, 1, *z.shape[2:])
        h = torch.cat([(z_soft * 8).clamp(-128, 127), plane], 1)
        h = activation(conv("h_s_0", h))
        h = activation(depth_to_space(conv("h_s_1", h), 2))
        psi = activation(depth_to_space(conv("h_s_2", h), 2))
        plane = level.expand(-1, 1, *y.shape[2:])
        nothing = psi.new_zeros(psi.shape[0], config.context_channels, *psi.shape[2:])
        done: list[Any] = []
        for pass_ in coding_order(config.groups):
            k = pass_.group
            context = [
                (group * 2.0**-shift).clamp(-128, 127)
                for group, shift in zip(done, config.context_shifts, strict=False)
            ]
            features = [psi, plane]
            if k > 0:
                h = conv(f"g_ch_{k}_0", torch.cat(context[:k], 1))
                features.append(activation(conv(f"g_ch_{k}_1", activation(h))))
            if pass_.parity == 1:
                features.append(activation(conv(f"g_sp_{k}", context[k])))
            else:
                features.append(nothing)
            h = activation(conv(f"g_ep_{k}_0", torch.cat(features, 1)))
            h = torch.cat([activation(conv(f"g_ep_{k}_1", h)), plane], 1)
            index = conv(f"g_ep_{k}_index", h).clamp(0, NUM_SCALES - 1)
            mean = conv(f"g_ep_{k}_mean", h).clamp(-MEAN_LIMIT, MEAN_LIMIT)
            channels = slice(pass_.start, pass_.stop)
            residual = relaxed(y[:, channels] - mean / MEAN_STEPS)
            ours = colours[pass_.parity]
            scale = SCALE_MIN * torch.exp(log_step * index)
            bits = bits + (bits_of(residual, scale) * ours).sum()
            values = (residual * MEAN_STEPS + mean) * ours
            if pass_.parity == 0:
                done.append(values)
            else:
                done[-1] = done[-1] + values
        y_hat = torch.cat(done, 1) / MEAN_STEPS
        x_hat = twin.synthesis(y_hat / gain, quality).clamp(0, 1)
        loss = settings.alpha * 255**2 * (x - x_hat).square().mean()
        if trunk is not None:
            distance = squeezenet_distance(trunk, x, x_hat, taps).mean()
            loss = loss + settings.gamma * distance
        loss = loss + beta * bits / pixels
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def _timed(run: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    run()
    return time.perf_counter() - begun_s


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements, in seconds and ratios.

    Raises:
      ValueError: the photographs are too small, weights are missing, or the model is
        a converted one and the loop in PyTorch is wanted.
    """
    codec = semlic_jax.load(options.model)
    settings = refinement.preset(
        options.steps,
        method="sga",  # what the loop in PyTorch does
        gamma=0.0 if options.features is None else None,
        structure=0.0,  # as in that loop, and the next three
        mean_style=0.0,
        lattice=0.0,
        mesh=0.0,
        features=options.features,
        dtype=options.dtype,
    )
    (image,) = photographs(options.images, 1, options.side)
    batch = new_batch(codec, [image], settings)
    begun_s = time.perf_counter()
    stepper = batch.stepper()
    stepper(options.steps)
    facts: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "model": options.model,
        "side": options.side,
        "perceptual": options.features is not None,
        "dtype": options.dtype,
        "first_steps_s": time.perf_counter() - begun_s,
    }
    other = None if options.no_torch else torch_stepper(codec, batch, settings)
    if other is not None:
        other()
    jax_s, torch_s = [], []
    for _ in range(options.repeats):
        jax_s.append(_timed(lambda: stepper(options.steps)) / options.steps)
        if other is not None:
            seconds = [_timed(other) for _ in range(options.steps)]
            torch_s.append(sum(seconds) / options.steps)
    facts["jax_step_s"] = statistics.median(jax_s)
    if other is not None:
        facts["torch_step_s"] = statistics.median(torch_s)
        facts["jax_speed_up"] = facts["torch_step_s"] / facts["jax_step_s"]
    if options.batch > 1:
        images = photographs(options.images, options.batch, options.side)
        together = new_batch(codec, images, settings).stepper()
        together(options.steps)
        seconds = [
            _timed(lambda: together(options.steps)) / options.steps
            for _ in range(options.repeats)
        ]
        facts["batch"] = options.batch
        facts["batch_step_s"] = statistics.median(seconds)
        gain = options.batch * facts["jax_step_s"] / facts["batch_step_s"]
        facts["images_per_second_gain"] = gain
    flops = stepper.flops()
    if flops:
        from semlic_jax.training.benchmark import matrix_peak

        peak = matrix_peak(jnp.dtype(options.dtype), options.repeats)
        per_second = flops / facts["jax_step_s"]
        facts["flop_per_step"] = flops
        facts["share_of_matrix_peak"] = per_second / peak
        if options.batch > 1:
            per_second = options.batch * flops / facts["batch_step_s"]
            facts["batch_share_of_matrix_peak"] = per_second / peak
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status, 1 for a refusal."""
    parser = argparse.ArgumentParser(
        prog="python -m semlic_jax.evaluation.refinement_benchmark",
        description="Measure steps per second of refinement, beside a plain PyTorch "
        "loop.",
    )
    parser.add_argument(
        "images", type=Path, nargs="*", help="photographs; default: the packaged one"
    )
    parser.add_argument("--model", default="small")
    parser.add_argument("--side", type=positive_int, default=256)
    parser.add_argument(
        "--steps", type=positive_int, default=5, help="steps of one measurement"
    )
    parser.add_argument("--repeats", type=positive_int, default=9)
    parser.add_argument("--batch", type=positive_int, default=1)
    parser.add_argument(
        "--features",
        metavar="PATH",
        help="feature weights: measure with perceptual terms",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    options = parser.parse_args(argv)
    try:
        if options.json:
            check_outputs([options.json], force=options.force)
        if not options.no_torch and importlib.util.find_spec("torch") is None:
            raise ValueError("PyTorch is not installed: give --no-torch")
        facts = json.dumps(measure(options), indent=2)
        print(facts)
        if options.json:
            write_file(options.json, f"{facts}\n".encode(), force=options.force)
    except (ValueError, OSError) as error:
        print(f"benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
