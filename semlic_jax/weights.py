# SPDX-License-Identifier: Apache-2.0
"""Model files: load, save, fingerprint. No pickle anywhere.

A model file is a NumPy `.npz` archive:

==========================  ==========================================================
entry                       content
==========================  ==========================================================
`config`                    uint8: the model's `ModelConfig` as JSON
`transforms/<path>`         float16: g_a, g_s, h_a, gains
`prior/<path>`              float32: the density of z (for refinement, not for coding)
`entropy/<layer>/<array>`   int8 kernels, int32 biases, int8 shifts
`tables/<y or z>/<array>`   int32 offsets and starts, uint32 counts
==========================  ==========================================================

A converted model (`semlic convert neuralcompression`) has float entropy networks, and
its files decode only on the machine that made them:

==========================  ==========================================================
entry                       content
==========================  ==========================================================
`config`                    uint8: the model's `MeanScaleConfig` as JSON
`transforms/<path>`         float32: g_a, g_s, h_a
`prior/<path>`              float32: the density of z
`entropy/<path>`            float32: h_s, and the medians of z
`tables/<y or z>/<array>`   int32 offsets and starts, uint32 counts
==========================  ==========================================================

The fingerprint is the SHA-256 of the shape of the entropy model, its networks
and the tables: of everything that decides what the bytes of a file mean, and of nothing
else. Models that differ in their float transforms only can read each other's files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from semlic_jax.arrays_file import as_tree, read_arrays_file

if TYPE_CHECKING:
    from semlic_jax.coding.integer_networks import IntegerTree
    from semlic_jax.coding.symbol_tables import SymbolTables
    from semlic_jax.model.compression import ModelConfig
    from semlic_jax.model.mean_scale import Config, MeanScaleConfig
    from semlic_jax.model.priors import FactorizedPrior

PRETRAINED_FOLDER = Path(__file__).parent / "pretrained"
_MAX_CONFIG_BYTES = 2**14
_ENTRIES = {"config", "transforms", "prior", "entropy", "tables"}
_DTYPES = ("<f2", "<f4", "|i1", "<i4", "|u1", "<u4")
_TABLE_ARRAYS = ("offsets", "starts", "counts")
# What of the configuration decides the meaning of a file. Named one by one: a field
# that a later version adds must not change the fingerprints of models that are out.
_CODING_FIELDS = (
    "latent_channels",
    "groups",
    "hyper_channels",
    "psi_channels",
    "context_channels",
    "hidden_channels",
    "context_shifts",
)
_FLOAT_CODING_FIELDS = ("family", "latent_channels", "hyper_channels")


@dataclasses.dataclass(frozen=True, eq=False)
class ModelFile:
    """The content of a model file.

    Attributes:
        config: the architecture.
        transforms: float parameters by name: `g_a`, `g_s`, `h_a`, `log_gain`.
        prior: float parameters of the density of z.
        integers: the entropy networks (`coding.integer_networks`).
        y_tables, z_tables: the frequencies of the coder.
    """

    config: ModelConfig
    transforms: dict[str, Any]
    prior: dict[str, Any]
    integers: IntegerTree
    y_tables: SymbolTables
    z_tables: SymbolTables

    def fingerprint(self) -> bytes:
        """32 bytes; see the module's docstring."""
        fields = {name: getattr(self.config, name) for name in _CODING_FIELDS}
        return _fingerprint(fields, self._exact_arrays())

    def _exact_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What decides what the bytes of a file mean, by entry."""
        yield from _flatten("entropy", self.integers)
        yield from _table_arrays(self)


@dataclasses.dataclass(frozen=True, eq=False)
class FloatModelFile:
    """The content of a converted model's file: same-machine decoding only.

    Attributes:
        config: the architecture.
        transforms: float32 parameters by name: `g_a`, `g_s`, `h_a`.
        prior: float32 parameters of the density of z.
        entropy: float32 parameters of `HyperSynthesis`.
        y_tables, z_tables: the frequencies of the coder.
    """

    config: MeanScaleConfig
    transforms: dict[str, Any]
    prior: dict[str, Any]
    entropy: dict[str, Any]
    y_tables: SymbolTables
    z_tables: SymbolTables

    def fingerprint(self) -> bytes:
        """32 bytes; see the module's docstring."""
        fields = {name: getattr(self.config, name) for name in _FLOAT_CODING_FIELDS}
        return _fingerprint(fields, self._exact_arrays())

    def _exact_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """What decides what the bytes of a file mean, by entry."""
        yield from _flatten("entropy", self.entropy)
        yield from _table_arrays(self)


def _fingerprint(
    fields: Mapping[str, Any], arrays: Iterator[tuple[str, np.ndarray]]
) -> bytes:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, array in sorted(arrays, key=lambda pair: pair[0]):
        little = array.astype(array.dtype.newbyteorder("<"))
        digest.update(f"{name} {little.dtype.str} {little.shape}".encode())
        digest.update(little.tobytes())
    return digest.digest()


def _table_arrays(
    model: ModelFile | FloatModelFile,
) -> Iterator[tuple[str, np.ndarray]]:
    for kind, tables in (("y", model.y_tables), ("z", model.z_tables)):
        for name in _TABLE_ARRAYS:
            yield f"tables/{kind}/{name}", getattr(tables, name)


def export_model(config: ModelConfig, params: Mapping[str, Any]) -> ModelFile:
    """Turn trained parameters into a model file's content.

    The tables of y are those of Gaussians; `training.fit_tables` counts better ones.

    Args:
        config: the architecture.
        params: the parameter tree of `CompressionModel`.

    Raises:
        ValueError: an integer network breaks its bound, or a parameter is not finite
            or beyond float16.
    """
    from semlic_jax.coding.integer_networks import export_integers
    from semlic_jax.coding.symbol_tables import gaussian_tables
    from semlic_jax.model.priors import FactorizedPrior, scale_table

    names = ("g_a", "g_s", "h_a", "log_gain")
    return ModelFile(
        config=config,
        transforms={name: to_dtype(name, params[name], np.float16) for name in names},
        prior=to_dtype("prior", params["prior"], np.float32),
        integers=export_integers(params["entropy"], config),
        y_tables=gaussian_tables(scale_table()),
        z_tables=prior_tables(FactorizedPrior(config.hyper_channels), params["prior"]),
    )


def to_dtype(name: str, tree: Any, dtype: type[np.floating]) -> Any:
    """A parameter tree in another precision.

    Raises:
        ValueError: a parameter is not finite or beyond it; names it.
    """
    if isinstance(tree, Mapping):
        return {key: to_dtype(f"{name}/{key}", tree[key], dtype) for key in tree}
    array = np.asarray(tree, np.float32)
    limit = np.finfo(dtype).max
    if not (np.abs(array) <= limit).all():
        raise ValueError(
            f"expected {name} within +-{limit:g}, found {np.abs(array).max():g}"
        )
    return array.astype(dtype)


def prior_tables(
    density: FactorizedPrior, prior: Any, centre: Any = 0.0
) -> SymbolTables:
    """One table for each channel of z, over the symbols that can occur in practice.

    Args:
        density, prior: the density of z and its parameters.
        centre: of each channel, [N], the value that the symbol 0 stands for.

    Raises:
        ValueError: a channel has next to no density near its centre.
    """
    import jax

    from semlic_jax.coding.symbol_tables import tables_from_pmfs

    radius = 127
    z = np.arange(-radius, radius + 1, dtype=np.float32)
    grid = np.zeros((len(z), density.channels), np.float32) + z[:, None] + centre
    probability = jax.jit(
        lambda z: density.apply({"params": prior}, z, method="probability")
    )(grid.astype(np.float32))
    pmfs, offsets = [], []
    for channel, pmf in enumerate(np.asarray(probability, np.float64).T):
        # What is less likely than this is left to the escape.
        likely = np.nonzero(pmf > 1e-6)[0]
        if not likely.size:
            raise ValueError(
                f"expected probability of channel {channel} of z within +-{radius}, "
                "found next to none"
            )
        pmfs.append(pmf[likely[0] : likely[-1] + 1])
        offsets.append(int(z[likely[0]]))
    return tables_from_pmfs(pmfs, offsets)


def save_model(path: str | os.PathLike[str], model: ModelFile | FloatModelFile) -> None:
    """Write a model file, whole or not at all; replaces an existing file."""
    from semlic_jax.images import write_file

    write_file(path, model_bytes(model), force=True)


def model_bytes(model: ModelFile | FloatModelFile) -> bytes:
    """The bytes of a model file."""
    arrays = {"config": np.frombuffer(_config_bytes(model.config), np.uint8)}
    arrays |= dict(_flatten("transforms", model.transforms))
    arrays |= dict(_flatten("prior", model.prior))
    for name, array in model._exact_arrays():
        arrays[name] = array.astype(np.int8) if name.endswith("/shift") else array
    packed = io.BytesIO()
    # Trained float32 would take minutes to become a tenth smaller.
    save = np.savez if isinstance(model, FloatModelFile) else np.savez_compressed
    save(packed, **arrays)  # type: ignore[arg-type]
    return packed.getvalue()


def load_model(
    name_or_path: str | os.PathLike[str],
) -> ModelFile | FloatModelFile:
    """Read a packaged model by name, or a model file.

    Args:
        name_or_path: the name of a packaged model, whatever is called so in the working
            directory (`./small` is a file there), or else a path.

    Raises:
        ValueError: no such model, or not a valid model file.
        MemoryError: the model is too large for this machine.
    """
    from semlic_jax.coding.integer_networks import prove_exact
    from semlic_jax.model.compression import ModelConfig
    from semlic_jax.model.mean_scale import MeanScaleConfig
    from semlic_jax.model.priors import NUM_SCALES

    path = Path(name_or_path)
    packaged = packaged_file(path.name)
    # A path with a folder is no name, and `Path` drops that of `./small`. `Path.exists`
    # would raise OSError for names that the system refuses.
    if os.fspath(name_or_path) == path.name and os.path.exists(packaged):
        path = packaged
    elif not path.suffix and not os.path.exists(path):
        known = ", ".join(sorted(pretrained_models())) or "none"
        raise ValueError(
            f"expected the name of a packaged model ({known}) or the path of a model "
            f"file, found {str(name_or_path)!r}"
        )
    try:
        tree = as_tree(read_arrays_file(path, _DTYPES))
        if set(tree) != _ENTRIES or tree["config"].size > _MAX_CONFIG_BYTES:
            raise ValueError(
                f"expected the entries {sorted(_ENTRIES)}, found {sorted(tree)[:9]}"
            )
        fields = json.loads(tree["config"].tobytes())
        floating = "family" in fields
        config = MeanScaleConfig(**fields) if floating else ModelConfig(**fields)
        parts = {
            "transforms": tree["transforms"],
            "prior": tree["prior"],
            "y_tables": _tables("y", tree["tables"]["y"], NUM_SCALES),
            "z_tables": _tables("z", tree["tables"]["z"], config.hyper_channels),
        }
        model: ModelFile | FloatModelFile
        if isinstance(config, MeanScaleConfig):
            model = FloatModelFile(config=config, entropy=tree["entropy"], **parts)
            floats = {**model.transforms, "prior": model.prior}
            check_params(model.config, floats | {"entropy": model.entropy})
        else:
            integers = {
                layer: {
                    name: array.astype(np.int32) if name == "shift" else array
                    for name, array in arrays.items()
                }
                for layer, arrays in tree["entropy"].items()
            }
            model = ModelFile(config=config, integers=integers, **parts)
            prove_exact(integers, model.config)
            check_params(model.config, {**model.transforms, "prior": model.prior})
    except FileNotFoundError:
        raise ValueError(f"the model file {path} does not exist") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged zip or header fails in any way it likes
        if isinstance(error, OSError) and error.filename is not None:  # of opening it
            raise ValueError(
                f"the model file {path} cannot be read: {error.strerror}"
            ) from None
        reason = str(error) or type(error).__name__
        if isinstance(error, KeyError):
            reason += " is missing"
        raise ValueError(f"{path} is not a valid model file: {reason}") from error
    return model


def _tables(kind: str, arrays: Mapping[str, np.ndarray], number: int) -> SymbolTables:
    """The tables of y or z; arrays that cannot be so many are refused uncopied."""
    from semlic_jax.coding.symbol_tables import MAX_COUNTS, SymbolTables

    offsets, starts, counts = (arrays[name] for name in _TABLE_ARRAYS)
    if offsets.size != number or starts.size != number + 1:
        raise ValueError(
            f"expected {number} {kind} tables, found {offsets.size} offsets and "
            f"{starts.size} starts"
        )
    if counts.size > number * MAX_COUNTS:
        raise ValueError(
            f"expected at most {MAX_COUNTS} counts in each of {number} {kind} tables, "
            f"found {counts.size} in all"
        )
    return SymbolTables(offsets, starts, counts)


def check_params(
    config: Config, params: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> None:
    """Check float parameters against a configuration.

    Args:
        config: the architecture.
        params: the parameter tree, without integer entropy networks.
        names: what else a parameter is called, by its path, for messages.

    Raises:
        ValueError: a parameter is missing, too many, of another shape or not finite;
            names the first.
    """
    import jax

    from semlic_jax.model.mean_scale import MeanScaleConfig, network_of

    network = network_of(config)
    key = jax.random.key(0)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    y = jax.ShapeDtypeStruct((1, 4, 4, config.latent_channels), np.float32)
    z = jax.ShapeDtypeStruct((1, 1, 1, config.hyper_channels), np.float32)
    quality = jax.ShapeDtypeStruct((1,), np.float32)
    calls: dict[str, tuple[Any, ...]] = {
        "analysis": (image,),
        "scaled_latents": (y, quality),
        "synthesis": (y, quality),
        "z_bits": (z,),
    }
    if isinstance(config, MeanScaleConfig):
        inside = jax.ShapeDtypeStruct((1, 1, 1, 1), np.float32)
        calls["parameters"] = (z, quality, inside)
    # One call for each part: tracing the whole model, whose integer networks are
    # proved elsewhere, takes a second.
    expected: dict[str, Any] = {}
    for method, inputs in calls.items():
        init = partial(network.init, method=method)
        for name, tree in jax.eval_shape(init, key, *inputs)["params"].items():
            expected |= _flatten(name, tree)
    present = dict(pair for name in params for pair in _flatten(name, params[name]))
    for path in sorted(expected.keys() | present.keys()):
        label = f"{names[path]} ({path})" if names and path in names else path
        shapes = [
            tree[path].shape if path in tree else "nothing"
            for tree in (expected, present)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"expected {label} of shape {shapes[0]}, found {shapes[1]}"
            )
        array = present[path]
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise ValueError(f"expected finite floats as {label}, found other values")


def packaged_file(name: str) -> Path:
    """Where the packaged model of this name is, if there is one."""
    return PRETRAINED_FOLDER / f"{name}.npz"


def pretrained_models() -> dict[str, dict[str, Any]]:
    """The cards of the packaged models, by name."""
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted(PRETRAINED_FOLDER.glob("*.json"))
    }


def _config_bytes(config: Config) -> bytes:
    return json.dumps(dataclasses.asdict(config), sort_keys=True).encode()


def _flatten(prefix: str, tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _flatten(f"{prefix}/{key}", value)
    else:
        yield prefix, tree
