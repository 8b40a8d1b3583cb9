# SPDX-License-Identifier: Apache-2.0
"""The entropy networks in exact integers: export, proof, and running them.

A decoder must find the table index and the mean of every latent bit for bit as the
encoder found them, on another processor. Here the float parameters of
`model.context.EntropyModel` become integers, the bound that makes every float32 sum
exact is proved for each output channel, and the same Linen modules run on them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from semlic_jax.coding.bitstream import BitstreamError
from semlic_jax.coding.symbol_passes import Parameters, PassCoder, Symbols
from semlic_jax.coding.symbol_tables import MAX_SYMBOL, SymbolTables
from semlic_jax.compilation import exact_program
from semlic_jax.model.compression import ModelConfig, entropy_model, image_masks
from semlic_jax.model.context import (
    ACCUMULATOR_LIMIT,
    MEAN_STEPS,
    SHIFT_MAX,
    UNIT,
    WEIGHT_MAX,
    EntropyModel,
    Pass,
    checkerboard,
    traverse,
    weight_shift,
)

Array = jax.Array
IntegerTree = dict[str, dict[str, np.ndarray]]

_INT32_LIMIT = 2**31


def export_integers(params: dict[str, Any], config: ModelConfig) -> IntegerTree:
    """Integer parameters of the entropy networks.

    Args:
        params: float parameters, the subtree `entropy` of `CompressionModel`.
        config: of the model.

    Returns:
        By layer: `kernel` int8 [k, k, C_in, C_out], `bias` int32 [C_out], `shift`
        int32 [C_out] (the right shift that ends the layer).

    Raises:
        ValueError: a parameter is not finite or too large for its integer, or a layer
            breaks the bound (see `prove_exact`).
    """
    tree: IntegerTree = {}
    for name, spec in entropy_model(config, "exact").layer_specs().items():
        shift = weight_shift(
            np.asarray(params[name]["kernel"], np.float32), spec.input_max
        )
        kernel, bias = (
            np.asarray(params[name][part], np.float64) for part in ("kernel", "bias")
        )
        tree[name] = {
            "kernel": _rounded(f"{name}/kernel", np.ldexp(kernel, shift), np.int8),
            "bias": _rounded(f"{name}/bias", np.ldexp(bias * UNIT, shift), np.int32),
            "shift": shift + np.int32(spec.right),
        }
    prove_exact(tree, config)
    return tree


def _rounded(name: str, array: np.ndarray, dtype: type[np.signedinteger]) -> np.ndarray:
    """Nearest integers; a cast alone would wrap round without a word."""
    limit = np.iinfo(dtype).max
    # Also false where it is not a number.
    if not (np.abs(array) <= limit).all():
        raise ValueError(
            f"expected {name} within +-{limit} steps, found {np.abs(array).max():g}"
        )
    return np.rint(array).astype(dtype)


def float_twin(integers: IntegerTree, config: ModelConfig) -> dict[str, Any]:
    """Float parameters whose `twin` arithmetic gives the same values as the integers.

    What refinement differentiates through, when only the integers were kept.
    """
    tree = {}
    for name, spec in entropy_model(config, "exact").layer_specs().items():
        layer = integers[name]
        scale = np.ldexp(np.float32(1), spec.right - layer["shift"])
        tree[name] = {
            "kernel": jnp.asarray(layer["kernel"] * scale),
            "bias": jnp.asarray(layer["bias"] * scale / np.float32(UNIT)),
        }
    return tree


def prove_exact(integers: IntegerTree, config: ModelConfig) -> None:
    """Check that no sum in the networks can leave the integers of float32.

    Every partial sum of products, in any order, is at most `sum |w| * max |a|` of its
    output channel in magnitude. Below 2**24 float32 represents it exactly, and so does
    bfloat16 or TF32 multiplication with float32 sums, since every factor is at most
    2**8. The rest (bias, rounding, shift) is int32.

    Raises:
        ValueError: a layer is missing, has another shape or type, or breaks a bound;
            names the layer.
    """
    specs = entropy_model(config, "exact").layer_specs()
    if set(integers) != set(specs):
        odd = sorted(set(integers) ^ set(specs))
        raise ValueError(
            f"expected the layers of {config.name}, found differences in {odd}"
        )
    for name, spec in specs.items():
        layer = integers[name]
        shape = (spec.kernel, spec.kernel, spec.inputs, spec.features)
        wanted = {
            "kernel": (shape, np.int8),
            "bias": ((spec.features,), np.int32),
            "shift": ((spec.features,), np.int32),
        }
        if set(layer) != set(wanted):
            raise ValueError(
                f"expected {sorted(wanted)} in {name}, found {list(layer)}"
            )
        for key, (size, dtype) in wanted.items():
            if layer[key].shape != size or layer[key].dtype != dtype:
                raise ValueError(
                    f"expected {name}/{key} as {np.dtype(dtype)} {size}, found "
                    f"{layer[key].dtype} {layer[key].shape}"
                )
        # Not int64: a hostile file can have a kernel of gigabytes.
        weights = np.abs(layer["kernel"], dtype=np.int16)
        if weights.max(initial=0) > WEIGHT_MAX:
            raise ValueError(
                f"expected weights within +-{WEIGHT_MAX} in {name}, found "
                f"{weights.max()}"
            )
        products = weights.sum(axis=(0, 1, 2), dtype=np.int64) * spec.input_max
        shift = layer["shift"].astype(np.int64)
        if shift.min() < 1 or shift.max() > SHIFT_MAX + spec.right:
            raise ValueError(
                f"expected shifts from 1 to {SHIFT_MAX + spec.right} in {name}, found "
                f"{shift.min()} to {shift.max()}"
            )
        total = products + np.abs(layer["bias"].astype(np.int64)) + (1 << (shift - 1))
        if products.max() >= ACCUMULATOR_LIMIT:
            raise ValueError(
                f"expected sums of products below 2**24 in {name}, found up to "
                f"{products.max()}"
            )
        if total.max() >= _INT32_LIMIT:
            raise ValueError(
                f"expected sums within int32 in {name}, found up to {total.max()}"
            )


@exact_program(static_argnums=0)
def _psi(
    network: EntropyModel, params: Any, z_hat: Array, level: Array, size: Array
) -> Array:
    """psi [1, h, w, P] of z_hat int32 [h/4, w/4, N]."""
    masks = image_masks(size[None], (4 * z_hat.shape[0], 4 * z_hat.shape[1]), jnp.int32)
    psi: Any = network.apply(
        {"params": params}, z_hat[None], level[None], masks, method="hyper_synthesis"
    )
    return psi


def _parameters(
    network: EntropyModel,
    pass_: Pass,
    params: Any,
    psi: Array,
    y_hat: tuple[Array, ...],
    level: Array,
    size: Array,
    second: Array | None = None,
) -> tuple[Array, Array]:
    """Index uint8 and mean int16 of one pass, [1, h, w, C]."""
    masks = image_masks(size[None], (psi.shape[1], psi.shape[2]), jnp.int32)
    found: Any = network.apply(
        {"params": params},
        pass_,
        psi,
        y_hat,
        level[None],
        masks,
        second,
        method="parameters",
    )
    index, mean = found
    return index.astype(jnp.uint8), mean.astype(jnp.int16)


# Of a decoder, which waits for each pass. One for both passes of a group: half as many
# to compile.
_group_parameters = exact_program(static_argnums=(0, 1))(_parameters)


@exact_program(static_argnums=0)
def _symbols(
    network: EntropyModel,
    params: Any,
    y_scaled: Array,
    z: Array,
    level: Array,
    size: Array,
) -> tuple[Array, ...]:
    """The fields of `Symbols`: the whole walk of the encoder as one program."""
    grid = (y_scaled.shape[0], y_scaled.shape[1])
    inside = image_masks(size[None], grid, jnp.int32)
    z_hat = _bounded_round(z) * inside.z[0]
    psi = _psi(network, params, z_hat, level, size)
    fields: list[list[Array]] = [[], [], []]

    def visit(pass_: Pass, index: Array, mean: Array) -> Array:
        y = y_scaled[None, ..., pass_.start : pass_.stop]
        symbol = _bounded_round(y - mean / MEAN_STEPS) * inside.y
        ours = checkerboard(*grid, pass_.parity)
        for field, values in zip(fields, (symbol, index, mean), strict=True):
            if pass_.parity == 0:
                field.append(values * ours)
            else:
                field[-1] = field[-1] + values * ours
        return symbol * MEAN_STEPS + mean

    traverse(
        network.groups,
        grid,
        lambda pass_, y_hat: _parameters(
            network, pass_, params, psi, y_hat, level, size
        ),
        visit,
    )
    symbol, index, mean = (jnp.concatenate(field, -1)[0] for field in fields)
    return z_hat, symbol, index, mean


def _bounded_round(x: Array) -> Array:
    """Nearest int32 that the coder takes."""
    return jnp.clip(jnp.round(x), -MAX_SYMBOL, MAX_SYMBOL).astype(jnp.int32)


class IntegerEntropyModel(PassCoder):
    """The entropy model of one model file: symbols <-> bytes, exactly.

    Compiled programs depend on the padded grid only, never on the image size.

    Attributes:
        config: of the model.
        y_tables, z_tables: integer frequencies.
        integers: of the networks, a copy.
    """

    def __init__(
        self,
        config: ModelConfig,
        integers: IntegerTree,
        y_tables: SymbolTables,
        z_tables: SymbolTables,
    ) -> None:
        """Proves the bounds of the integers; raises ValueError as `prove_exact`."""
        # A CPU device takes over aligned arrays as they are. The caller's may change.
        self.integers: IntegerTree = jax.tree.map(np.array, integers)
        prove_exact(self.integers, config)
        super().__init__(config, y_tables, z_tables)
        self._params = jax.device_put(self.integers)
        self._network = entropy_model(config, "exact")

    def symbols(
        self, y_scaled: Array, z: Array, level: int, size: tuple[int, int]
    ) -> Symbols:
        found = _symbols(
            self._network,
            self._params,
            y_scaled,
            z,
            jnp.int32(level),
            jnp.asarray(size, jnp.int32),
        )
        return Symbols(*(np.asarray(array) for array in found))

    def parameters(
        self, z: np.ndarray, level: int, size: tuple[int, int], index_check: bytes
    ) -> Parameters:
        if index_check:
            raise BitstreamError(
                "expected no checksum of table indexes, since this model's are exact, "
                f"found {index_check.hex()}"
            )
        level_array = jnp.int32(level)
        size_array = jnp.asarray(size, jnp.int32)
        psi = _psi(self._network, self._params, z, level_array, size_array)

        def parameters(
            pass_: Pass, y_hat: tuple[np.ndarray, ...]
        ) -> tuple[np.ndarray, np.ndarray]:
            first = pass_.parity == 0
            if first:
                shape = (*psi.shape[:3], pass_.stop - pass_.start)
                y_hat = (*y_hat, np.zeros(shape, np.int32))
            found = _group_parameters(
                self._network,
                pass_._replace(parity=0),
                self._params,
                psi,
                y_hat,
                level_array,
                size_array,
                jnp.int32(not first),
            )
            return np.asarray(found[0]), np.asarray(found[1])

        return parameters
