# SPDX-License-Identifier: Apache-2.0
"""The front door: uint8 images to bytes and back.

codec = load("small")
data = codec.compress(image, bpp=0.15)
image = codec.decompress(data)
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.coding.bitstream import (
    ICC_CHUNK,
    MAX_PIXELS,
    MAX_SIDE,
    Header,
    check_coder,
    pack,
    unpack,
)
from semlic_jax.coding.float_networks import FloatEntropyModel
from semlic_jax.coding.integer_networks import IntegerEntropyModel, float_twin
from semlic_jax.coding.symbol_passes import PassCoder, Symbols
from semlic_jax.compilation import (
    enter_bucket,
    exact_program,
    float_program,
    own_settings,
    use_disk_cache,
)
from semlic_jax.level_search import best_level
from semlic_jax.memory import require_memory
from semlic_jax.model.compression import QUALITY_LEVELS
from semlic_jax.model.mean_scale import Config, network_of
from semlic_jax.model.transforms import HYPER_STRIDE, STRIDE
from semlic_jax.weights import FloatModelFile, ModelFile, load_model

if TYPE_CHECKING:
    from semlic_jax.refinement import Region, Settings

Array = jax.Array

MAX_LEVEL = QUALITY_LEVELS - 1
# Larger images are not begun where they certainly have no room: above 17 megapixels
# one pixel more took 23 bytes to encode and 35 to decode, with `small`; rounded down.
_MANY_PIXELS = 2**24
_LEAST_BYTES = {"encoding": 22, "decoding": 30}
# Latents along a side of what g_a and the fine levels of g_s work on at once: 2048
# pixels, more than most pictures have.
_TILE = 128


class Latents(NamedTuple):
    """An analysed image, ready to be coded at any quality.

    Attributes:
        y: float32 [h, w, M] on the padded grid.
        size: height and width of the image in pixels.
    """

    y: Array
    size: tuple[int, int]


def bucket_side(side: int) -> int:
    """Padded length of an image side, in pixels.

    Multiples of 64, of which those above 15 x 64 have four significant bits: few enough
    that the compiled programs of a few buckets serve every image, close enough that
    they add at most an eighth to the length that the model needs anyway.
    """
    cells = -(-side // HYPER_STRIDE)
    step = 1 << max(0, cells.bit_length() - 4)
    return -(-cells // step) * step * HYPER_STRIDE


@float_program(static_argnums=0)
def _analyse(config: Config, params: Any, pixels: Array) -> Array:
    x = pixels[None].astype(jnp.float32) / 255
    network = network_of(config, tile=_TILE)
    y: Any = network.apply({"params": params}, x, method="analysis")
    return y[0]


@exact_program(static_argnums=0)
def _scale(config: Config, params: Any, y: Array, level: Array) -> tuple[Array, Array]:
    """y_scaled and z at a quality level."""
    quality = level[None].astype(jnp.float32) / MAX_LEVEL
    found: Any = network_of(config).apply(
        {"params": params}, y[None], quality, method="scaled_latents"
    )
    return found[0][0], found[1][0]


@float_program(static_argnums=0)
def _synthesise(config: Config, params: Any, y_hat: Array, level: Array) -> Array:
    quality = level[None].astype(jnp.float32) / MAX_LEVEL
    network = network_of(config, tile=_TILE)
    x_hat: Any = network.apply(
        {"params": params}, y_hat[None], quality, method="synthesis"
    )
    return jnp.round(jnp.clip(x_hat[0], 0.0, 1.0) * 255).astype(jnp.uint8)


class Codec:
    """One model, ready to compress and decompress.

    Threads may share one. It can be copied and pickled, so it can be sent to processes
    that are spawned; forked ones hang in JAX.

    Attributes:
        name: of the model.
        config: its architecture.
        fingerprint: 32 bytes that name what its files mean.
        entropy: the entropy model: exact, or in floats for a converted model.
        params: float32 parameters of the transforms, on the device.
        coder: of the files that are written; a file says which one it needs.
    """

    entropy: PassCoder

    @own_settings()
    def __init__(
        self,
        model: ModelFile | FloatModelFile,
        name: str | None = None,
        *,
        coder: str = "ans",
    ) -> None:
        """Puts a model on the default device.

        Raises:
            ValueError: the model's integer networks break their bounds, or there is no
                such coder.
        """
        use_disk_cache()
        check_coder(coder)
        self.coder = coder
        self.name = name or model.config.name
        self.config: Config = model.config
        self.fingerprint = model.fingerprint()
        # Converted by NumPy: JAX would compile a program for each shape.
        self.params = jax.device_put(
            jax.tree.map(lambda array: array.astype(np.float32), model.transforms)
        )
        self._prior = model.prior
        self._twin: Callable[[], Any]
        tables = (model.y_tables, model.z_tables)
        if isinstance(model, FloatModelFile):
            self.entropy = FloatEntropyModel(model.config, model.entropy, *tables)
            # Where z is counted from is a part of the entropy model.
            self.params["entropy"] = jax.device_put(
                jax.tree.map(np.array, model.entropy)
            )
            self._twin = partial(self.params.get, "entropy")
        else:
            entropy = IntegerEntropyModel(model.config, model.integers, *tables)
            self.entropy = entropy
            self._twin = partial(float_twin, entropy.integers, model.config)

    @own_settings()
    def compress(
        self,
        image: np.ndarray,
        *,
        quality: float | None = None,
        bpp: float | None = None,
        max_bytes: int | None = None,
        icc_profile: bytes | None = None,
        refine: str | int | Settings | None = None,
        roi: Region | np.ndarray | str | os.PathLike[str] | None = None,
    ) -> bytes:
        """Compress an image to the bytes of a `.semlic` file.

        Give exactly one of `quality`, `bpp` and `max_bytes`.

        Args:
            image: uint8 [H, W, 3], at least 1 x 1.
            quality: 0 (smallest file) to 1, in steps of 1/255.
            bpp: most bits per pixel, file bytes * 8 / (H * W). The file takes as many
                of them as the steps of the quality allow.
            max_bytes: most bytes of the file. More than the best quality needs is not
                an error.
            icc_profile: stored in the file as it is.
            refine: improve the latents of this image within the budget, which is the
                size of the unrefined file where a quality is given: a preset (`fast`,
                `default`, `best`), a number of steps or `refinement.Settings`.
            roi: with `refine`, what matters in the image: a mask [H, W] in 0..1 or
                uint8, `auto`, `x,y,width,height`, the path of an image, or a
                `refinement.Region`.

        Raises:
            ValueError: the image, the budget or the region is not of this form, or the
                model does not reach the budget; names the range that it reaches.
            MemoryError: the image is too large for this machine (on accelerators:
                JAX's own error).
        """
        for name, value in (("refine", refine), ("max_bytes", max_bytes)):
            if isinstance(value, bool):  # True would be the number 1
                raise ValueError(f"expected a number as {name}, found {value}")
        if refine is not None:
            from semlic_jax import refinement

            image = _checked_image(image)
            return refinement.refine(
                self,
                image,
                quality=quality,
                bpp=bpp,
                max_bytes=max_bytes,
                settings=refinement.preset(refine),
                region=refinement.as_region(roi, image),
                icc_profile=icc_profile,
            ).data
        if roi is not None:
            raise ValueError("a region of interest (roi) needs refine")
        image = _checked_image(image)
        budget = _checked_budget(image, quality, bpp, max_bytes)
        if icc_profile is not None and not isinstance(icc_profile, bytes):
            raise ValueError(
                f"expected bytes as icc_profile, found {type(icc_profile).__name__}"
            )
        latents = self.analyse(image)
        if quality is not None:
            return self.encode(latents, round(float(quality) * MAX_LEVEL), icc_profile)
        return self._fit(latents, budget, icc_profile, bpp=bpp)

    @own_settings()
    def decompress(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Decode the bytes of a `.semlic` file to uint8 [H, W, 3].

        Args:
            data: the file.
            max_pixels: refuse larger images. Decoding takes memory in proportion to
                the pixels, and a file of a few bytes may claim any number of them.

        Raises:
            BitstreamError: the data is damaged or not a `.semlic` file.
            IncompatibleModelError: another model made it.
            IncompatibleMachineError: a converted model made it, on another machine.
            ValueError: the file needs the coder tfc, whose package is not installed.
            MemoryError: the image is too large for this machine (on accelerators:
                JAX's own error).
        """
        header, _ = unpack(data, max_pixels=max_pixels)
        header.require_model(self.fingerprint)
        _require_room("decoding", header.height * header.width)
        header, y_hat = self.decode_latents(data, max_pixels=max_pixels)
        height, width = header.height, header.width
        # Positions outside the image repeat its edge, as the encoder's padding does.
        grid = [bucket_side(side) // STRIDE for side in (height, width)]
        pads = [(0, grid[i] - y_hat.shape[i]) for i in range(2)]
        padded = np.pad(y_hat, (*pads, (0, 0)), mode="edge")
        level = jnp.int32(header.quality)
        pixels = _synthesise(self.config, self.params, padded, level)
        # An array of its own: writable, contiguous, without the padding.
        return np.array(np.asarray(pixels)[:height, :width], order="C")

    def info(self, data: bytes) -> dict[str, Any]:
        """What a file says about itself, without decoding it.

        Raises:
            BitstreamError: the data is damaged or not a `.semlic` file.
        """
        header, payload = unpack(data)
        file_bytes = memoryview(data).nbytes
        return {
            "width": header.width,
            "height": header.height,
            "bytes": file_bytes,
            "payload_bytes": len(payload),
            "bpp": file_bytes * 8 / (header.width * header.height),
            "quality": header.quality / MAX_LEVEL,
            "fingerprint": header.fingerprint.hex(),
            "model": self.name
            if self.fingerprint.startswith(header.fingerprint)
            else None,
            "icc_profile_bytes": len(header.icc_profile or b""),
            "same_machine_only": bool(header.index_check),
            "coder": header.coder,
        }

    def icc_profile(self, data: bytes) -> bytes | None:
        """The ICC profile kept in a file.

        Raises:
            BitstreamError: the data is damaged or not a `.semlic` file.
        """
        return unpack(data)[0].icc_profile

    @own_settings()
    def twin_params(self) -> dict[str, Any]:
        """Parameters of `network_of(config, "twin")`, the differentiable twin.

        Its entropy networks give the same values as the exact ones.
        """
        return {**self.params, "prior": self._prior, "entropy": self._twin()}

    @staticmethod
    def budget_bytes(bpp: float, size: tuple[int, ...]) -> int:
        """The most bytes that are at most `bpp` for an image of this height and width.

        Args:
            bpp: positive bits per pixel.
            size: height and width in pixels.
        """
        pixels = size[0] * size[1]
        near = int(min(bpp * pixels / 8, 2.0**60))
        # The product rounds, and so may miss by one.
        return max(n for n in (near - 1, near, near + 1) if n * 8 / pixels <= bpp)

    @staticmethod
    def bucket(size: tuple[int, int]) -> tuple[int, int]:
        """Padded height and width of an image: one compiled program for each."""
        return bucket_side(size[0]), bucket_side(size[1])

    @own_settings()
    def analyse(self, image: np.ndarray) -> Latents:
        """g_a of an image, padded to its bucket by repeating the edge.

        Args:
            image: uint8 [H, W, 3].

        Raises:
            ValueError: the image is not of this form.
            MemoryError: it is too large for this machine (on accelerators: JAX's own
                error).
        """
        image = _checked_image(image)
        height, width = image.shape[:2]
        _require_room("encoding", height * width)
        enter_bucket((self.fingerprint, self.bucket((height, width))))
        pads = ((0, bucket_side(height) - height), (0, bucket_side(width) - width))
        padded = np.pad(image, (*pads, (0, 0)), mode="edge")
        return Latents(_analyse(self.config, self.params, padded), (height, width))

    @own_settings()
    def scaled(self, latents: Latents, level: int) -> tuple[Array, Array]:
        """y_scaled [h, w, M] and z [h/4, w/4, N] at a quality level 0..255."""
        return _scale(self.config, self.params, latents.y, jnp.int32(level))

    @own_settings()
    def encode(
        self, latents: Latents, level: int, icc_profile: bytes | None = None
    ) -> bytes:
        """The file of an analysed image at a quality level 0..255.

        Raises:
            TypeError, ValueError: the level is not a whole number, or out of range.
        """
        level = operator.index(level)
        if not 0 <= level <= MAX_LEVEL:
            raise ValueError(f"expected a level from 0 to {MAX_LEVEL}, found {level}")
        y_scaled, z = self.scaled(latents, level)
        symbols = self.entropy.symbols(y_scaled, z, level, latents.size)
        return self.encode_symbols(symbols, level, latents.size, icc_profile)

    def encode_symbols(
        self,
        symbols: Symbols,
        level: int,
        size: tuple[int, int],
        icc_profile: bytes | None = None,
    ) -> bytes:
        """The file of symbols that were chosen elsewhere (refinement).

        Args:
            symbols: on the padded grids.
            level: quality, 0..255.
            size: height and width of the image in pixels.
            icc_profile: stored in the file as it is.

        Raises:
            ValueError: a value is beyond what the format holds, or the coder cannot be
                used: see `PassCoder.encode`.
        """
        chunks = {ICC_CHUNK: icc_profile} if icc_profile else {}
        header = Header(
            width=size[1],
            height=size[0],
            quality=level,
            fingerprint=self.fingerprint,
            chunks=chunks,
            index_check=self.entropy.index_check(symbols, size),
            coder=self.coder,
        )
        return pack(header, self.entropy.encode(symbols, size, self.coder))

    @own_settings()
    def decode_latents(
        self, data: bytes, *, max_pixels: int = MAX_PIXELS
    ) -> tuple[Header, np.ndarray]:
        """Header and y_hat_scaled float32 [ceil(H/16), ceil(W/16), M] of a file.

        Raises:
            BitstreamError, IncompatibleModelError, IncompatibleMachineError,
            ValueError: see `decompress`.
        """
        header, payload = unpack(data, max_pixels=max_pixels)
        header.require_model(self.fingerprint)
        size = (header.height, header.width)
        bucket = self.bucket(size)
        enter_bucket((self.fingerprint, bucket))
        grid = (bucket[0] // STRIDE, bucket[1] // STRIDE)
        return header, self.entropy.decode(
            payload, header.quality, size, grid, header.index_check, header.coder
        )

    def _fit(
        self,
        latents: Latents,
        budget: int,
        icc_profile: bytes | None,
        *,
        bpp: float | None,
    ) -> bytes:
        """The best file within a budget of bytes, by search over the quality.

        Where the budget comes from bits per pixel, `bpp`, the model must reach it.
        """
        files: dict[int, bytes] = {}

        def size(level: int) -> int:
            if level not in files:
                files[level] = self.encode(latents, level, icc_profile)
            return len(files[level])

        level = best_level(size, budget, MAX_LEVEL)
        if level is None or (
            bpp is not None and level == MAX_LEVEL and size(level) < budget
        ):
            pixels = latents.size[0] * latents.size[1]
            high, low = size(MAX_LEVEL), size(0)
            low = min(low, *map(len, files.values()))  # sizes dip
            profile = (
                f" with its ICC profile of {len(icc_profile)} bytes"
                if icc_profile
                else ""
            )
            found = "" if bpp is None else f"{bpp:g} bpp, which is "
            raise ValueError(
                f"expected a budget from {low} to {high} bytes ({low * 8 / pixels:.4f} "
                f"to {high * 8 / pixels:.4f} bpp), the range of this model for this "
                f"image{profile}, found {found}{budget} bytes"
            )
        return files[level]


@own_settings()
def load(name_or_path: str | os.PathLike[str], *, coder: str = "ans") -> Codec:
    """Load a packaged model by name ("small", "base") or a model file by path.

    Args:
        name_or_path: the model; a file called `small` is `./small`.
        coder: of the files that it will write: `ans`, or `tfc` for TensorFlow
            Compression's range coder (the extra `tfc`). It reads both.

    Raises:
        ValueError: no such model or coder, or not a valid model file.
    """
    return Codec(load_model(name_or_path), Path(name_or_path).stem, coder=coder)


def _require_room(work: str, pixels: int) -> None:
    """MemoryError where there is certainly not enough memory."""
    if pixels > _MANY_PIXELS:
        require_memory(work, pixels, lambda: _LEAST_BYTES[work] * pixels)


def _checked_image(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"expected an image of uint8 [H, W, 3], found {image.dtype} of shape "
            f"{list(image.shape)}"
        )
    height, width = image.shape[:2]
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(
            f"expected sides of 1 to {MAX_SIDE} pixels, found {width} x {height}"
        )
    if height * width > MAX_PIXELS:
        raise ValueError(
            f"expected at most {MAX_PIXELS} pixels, found {width} x {height}"
        )
    return image


def _checked_budget(
    image: np.ndarray,
    quality: float | None,
    bpp: float | None,
    max_bytes: int | None,
) -> int:
    """The budget in bytes; 0 where a quality is given."""
    given = {
        name: value
        for name, value in (
            ("quality", quality),
            ("bpp", bpp),
            ("max_bytes", max_bytes),
        )
        if value is not None
    }
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise ValueError(
            f"expected exactly one of quality, bpp and max_bytes, found {found}"
        )
    if max_bytes is not None:
        try:
            budget = operator.index(max_bytes)
        except TypeError:
            budget = 0
        if budget <= 0:
            raise ValueError(
                f"expected a positive whole number as max_bytes, found {max_bytes!r}"
            )
        return budget
    name, value = next(iter(given.items()))
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if quality is not None:
        if not 0 <= number <= 1:
            raise ValueError(f"expected a quality from 0 to 1, found {quality!r}")
        return 0
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"expected a positive {name}, found {value!r}")
    return Codec.budget_bytes(number, image.shape[:2])
