# SPDX-License-Identifier: Apache-2.0
"""The codecs of a sweep, by name, each fitted to a rate.

    semlic                        the model given by `--model`
    semlic:small                  a packaged model, semlic:PATH a model file
    semlic+refine:fast            with latent refinement by a preset
    avif, webp, jxl, jpeg, ...    see `codecs.py`

An entrant makes the best file of at most a given number of bits per pixel, or says why
it cannot. Each may be called from several threads at once.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import PIL
from PIL import features

import semlic_jax
from semlic_jax.evaluation.codecs import CODECS, ClassicalCodec, classical_codec
from semlic_jax.level_search import best_known

if TYPE_CHECKING:
    from semlic_jax.codec import Codec, Latents
    from semlic_jax.refinement import Settings

# A codec's largest file counts as reaching a rate if it has at least this part of it.
_LEAST_USE = 0.97


@dataclass(frozen=True)
class Encoded:
    """A file, the setting that made it, and how long one call took."""

    data: bytes
    setting: str
    encode_s: float


class TooSmallError(ValueError):
    """The codec's largest file of an image, `encoded`, is far below the rate."""

    def __init__(self, encoded: Encoded, pixels: int) -> None:
        self.encoded = encoded
        most = 8 * len(encoded.data) / pixels
        super().__init__(f"its largest file of this image takes {most:.3f} bpp")


class Entrant(Protocol):
    """A codec as a sweep sees it.

    Attributes:
      key: its name on the command line, in tables and folders.
      label: its name in plots.
      suffix: suffix of its files.
      identity: a text that changes when its files would; cached files of another
        identity are not used.
    """

    key: str
    label: str
    suffix: str
    identity: str

    def fitter(self, image: np.ndarray) -> Callable[[float], Encoded]:
        """Return a function of bits per pixel for one image, uint8 [H, W, 3].

        That function returns the best file of at most that rate. It raises ValueError
        with the reason if the codec does not reach the rate, and TooSmallError if its
        files end far below.
        """
        ...

    def decode(self, data: bytes) -> np.ndarray:
        """A file -> uint8 [H, W, 3]."""
        ...


class RateSearch:
    """The files of one image at a codec's settings, and the best of them at a rate.

    Files that were made for one rate narrow the search for the next. Sizes are assumed
    to grow with the setting except for small dips, as in `Codec.compress`; where they
    do not, the file found is still within the rate.

    Args:
      codec: see `ClassicalCodec`.
      image: uint8 [H, W, 3].
    """

    def __init__(self, codec: ClassicalCodec, image: np.ndarray) -> None:
        self._codec, self._image = codec, image
        self._pixels = image.shape[0] * image.shape[1]
        self._files: dict[int, Encoded] = {}  # by position among the settings

    def fit(self, bpp: float) -> Encoded:
        """The largest file of at most `bpp` bits per pixel.

        Raises:
          ValueError: the codec does not reach the rate on this image; says how far it
            gets. It is a TooSmallError if the largest file is far below the rate.
        """
        budget = max(semlic_jax.Codec.budget_bytes(bpp, self._image.shape), 1)
        last = len(self._codec.settings) - 1
        sizes = {at: len(file.data) for at, file in self._files.items()}
        low = max((at for at, size in sizes.items() if size <= budget), default=-1)
        above = (at for at, size in sizes.items() if size > budget and at > low)
        high = min(above, default=last + 1)
        while high - low > 1:
            at = self._guess(low, high, budget)
            if self._size(at) <= budget:
                low = at
            else:
                high = at
        sizes = {at: len(file.data) for at, file in self._files.items()}
        best = best_known(self._size, sizes, high, budget, last)
        if best is None:
            least = 8 * min(sizes.values()) / self._pixels
            raise ValueError(f"its smallest file of this image takes {least:.3f} bpp")
        if low == last and self._bpp(last) < _LEAST_USE * bpp:
            raise TooSmallError(self._files[last], self._pixels)
        return self._files[best]

    def _encode(self, at: int) -> Encoded:
        if at not in self._files:
            setting = self._codec.settings[at]
            start_s = time.perf_counter()
            data = self._codec.encode(self._image, setting)
            wall_s = time.perf_counter() - start_s
            self._files[at] = Encoded(data, str(setting), wall_s)
        return self._files[at]

    def _size(self, at: int) -> int:
        return len(self._encode(at).data)

    def _bpp(self, at: int) -> float:
        return 8 * self._size(at) / self._pixels

    def _guess(self, low: int, high: int, budget: int) -> int:
        """Guess where log(size), nearly linear in the setting, meets the budget."""
        known = sorted(self._files)
        below = [at for at in known if at <= low][-2:]
        above = [at for at in known if at >= high][:2]
        if below and above:
            a, b = below[-1], above[0]
        elif len(known) >= 2:
            a, b = (below or above)[0], (below or above)[-1]
        elif known:
            # Only one file so far: over the settings of most codecs, sizes double about
            # ten times.
            size = len(self._files[known[0]].data)
            octaves = math.log2(budget / size)
            step = len(self._codec.settings) / 10
            return self._between(known[0] + octaves * step, low, high)
        else:
            return self._between(len(self._codec.settings) / 4, low, high)
        log_a, log_b = (math.log(len(self._files[at].data)) for at in (a, b))
        if log_a == log_b:
            return (low + high) // 2
        position = a + (b - a) * (math.log(budget) - log_a) / (log_b - log_a)
        return self._between(position, low, high)

    @staticmethod
    def _between(position: float, low: int, high: int) -> int:
        return min(max(round(position), low + 1), high - 1)


class ClassicalEntrant:
    """A classical codec of `codecs.py`."""

    def __init__(self, key: str) -> None:
        self._codec = classical_codec(key)
        self.key = key
        self.label = self._codec.name
        self.suffix = self._codec.suffix
        self.identity = _classical_identity(key, self._codec)

    def fitter(self, image: np.ndarray) -> Callable[[float], Encoded]:
        return RateSearch(self._codec, image).fit

    def decode(self, data: bytes) -> np.ndarray:
        return self._codec.decode(data)


def _classical_identity(key: str, codec: ClassicalCodec) -> str:
    """The library's version, and the settings as the class's docstring and code state.

    Any change to the text of the class, even to a comment, changes the identity.
    """
    libraries = {
        "jpeg": "libjpeg_turbo",
        "webp": "webp",
        "avif": "avif",
        "avif-slow": "avif",
        "jpeg2000": "jpg_2000",
    }
    if key == "jxl":
        version = f"pillow-jxl-plugin {metadata.version('pillow-jxl-plugin')}"
    else:
        library = libraries.get(key)  # None for a codec that a user added
        version = f"Pillow {PIL.__version__}"
        if library:
            version += f", {library} {features.version(library)}"
    return f"{inspect.getdoc(type(codec))} {version}, {code_digest(type(codec))}"


def code_digest(kind: type | Callable[..., Any]) -> str:
    """Digest of the source of a function, or of a class and its bases.

    Of their names where there is no source.
    """
    digest = hashlib.sha256()
    for each in kind.__mro__[:-1] if isinstance(kind, type) else (kind,):
        try:
            code = inspect.getsource(each)
        except (OSError, TypeError):
            code = f"{each.__module__}.{each.__qualname__}"
        digest.update(code.encode())
    return digest.hexdigest()[:12]


class _AtLevels:
    """A model with one analysed image, as a `ClassicalCodec` of 256 settings."""

    suffix = ".semlic"
    settings = range(256)

    def __init__(self, codec: Codec, name: str, latents: Latents) -> None:
        self._codec, self.name, self._latents = codec, name, latents

    def encode(self, image: np.ndarray, setting: int) -> bytes:
        return self._codec.encode(self._latents, setting)

    def decode(self, data: bytes) -> np.ndarray:
        return self._codec.decompress(data)


class SemlicEntrant:
    """A model of this package, `codec`, without refinement.

    Encoding times leave out the analysis of the image, which all rates share.
    """

    suffix = ".semlic"

    def __init__(self, key: str, codec: Codec) -> None:
        self.codec = codec
        self.key = self.label = key
        self.identity = model_identity(codec)

    def fitter(self, image: np.ndarray) -> Callable[[float], Encoded]:
        latents = self.codec.analyse(image)
        latents.y.block_until_ready()  # so that the first file's time excludes it
        return RateSearch(_AtLevels(self.codec, self.label, latents), image).fit

    def decode(self, data: bytes) -> np.ndarray:
        return self.codec.decompress(data)


class RefinedEntrant:
    """A model of this package, `codec`; each image is refined for each rate.

    Args:
      key: its name.
      codec: the model.
      refine: a preset by name, or `refinement.Settings`.
      label: its name in plots; None: the key.
    """

    suffix = ".semlic"

    def __init__(
        self,
        key: str,
        codec: Codec,
        refine: str | Settings,
        label: str | None = None,
    ) -> None:
        from semlic_jax import refinement

        self.codec = codec
        self._settings = refinement.preset(refine)
        self.key, self.label = key, label or key
        self.identity = refinement_identity(codec, self._settings)

    def fitter(self, image: np.ndarray) -> Callable[[float], Encoded]:
        def fit(bpp: float) -> Encoded:
            start_s = time.perf_counter()
            # A budget in bytes: the best quality may end below the rate, as without
            # refinement.
            budget = max(self.codec.budget_bytes(bpp, image.shape), 1)
            data = self.codec.compress(image, max_bytes=budget, refine=self._settings)
            wall_s = time.perf_counter() - start_s
            facts = self.codec.info(data)
            encoded = Encoded(data, f"{facts['quality'] * 255:.0f}", wall_s)
            if facts["quality"] == 1 and facts["bpp"] < _LEAST_USE * bpp:
                raise TooSmallError(encoded, facts["width"] * facts["height"])
            return encoded

        return fit

    def decode(self, data: bytes) -> np.ndarray:
        return self.codec.decompress(data)


def model_identity(codec: Codec) -> str:
    """Identify a model by all its numbers, not only those that its files depend on."""
    digest = _digest(codec.params, codec.fingerprint)
    return (
        f"semlic_jax {semlic_jax.__version__}, format "
        f"{semlic_jax.BITSTREAM_VERSION}, model {digest}"
    )


def refinement_identity(codec: Codec, settings: Settings) -> str:
    """Identify all that a refined file depends on: model, settings, feature network.

    Raises:
      ValueError: the weights of the feature network are missing.
    """
    from semlic_jax.refinement.settings import REVISION

    network = settings.load_features()
    named = "none"
    if network is not None:
        named = f"{network.module!r} {_digest(network.params)}"
    settings = replace(settings, features=None)
    return (
        f"{model_identity(codec)}, refinement {REVISION}, {settings}, features {named}"
    )


def _digest(params: Any, start: bytes = b"") -> str:
    import jax

    digest = hashlib.sha256(start)
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def entrants(names: Sequence[str], *, model: str = "small") -> list[Entrant]:
    """The codecs with these names, in order; see the module's docstring.

    Args:
      names: names of codecs, each given once.
      model: name or path of the model of codecs that name none.

    Raises:
      CodecUnavailableError: this machine lacks what a codec needs.
      ValueError: a name is unknown or comes twice, or a model cannot be loaded.
    """
    if not names:
        raise ValueError("expected the names of codecs, found none")
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise ValueError(f"the codec {twice[0]} was given twice")
    loaded: dict[str, Codec] = {}
    found = [_entrant(name, model, loaded) for name in names]
    for index, entrant in enumerate(found):
        if any(entrant.key == other.key for other in found[:index]):
            raise ValueError(
                f"two models have the name {entrant.key}: rename one of the model files"
            )
    return found


def _entrant(name: str, model: str, loaded: dict[str, Codec]) -> Entrant:
    if not name.startswith("semlic"):
        if name not in CODECS:
            raise ValueError(
                f"unknown codec {name!r}: expected semlic, semlic:MODEL, "
                f"semlic+refine:PRESET or one of {', '.join(CODECS)}"
            )
        return ClassicalEntrant(name)
    base, refined, preset = name.partition("+refine:")
    kind, _, given = base.partition(":")
    if kind != "semlic" or (refined and not preset) or base.endswith(":"):
        raise ValueError(
            f"unknown codec {name!r}: expected semlic, semlic:MODEL or "
            "semlic+refine:PRESET"
        )
    given = given or model
    if given not in loaded:
        loaded[given] = semlic_jax.load(given)
    # A path is too long for tables, where its stem names the model.
    key = f"semlic:{Path(given).stem}" if ":" in base else "semlic"
    if refined:
        return RefinedEntrant(f"{key}+refine:{preset}", loaded[given], preset)
    return SemlicEntrant(key, loaded[given])
