# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2's convolutional part, a judge with which no model was trained.

This is the network of keras.applications at width 1 (Sandler et al. 2018,
arXiv:1801.04381), whose strided convolutions pad at the bottom and at the right only.
Batch norms are folded into the convolutions when weights are converted. Imports jax and
flax only.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from semlic_jax.objectives.trunks import preprocess, require_side, require_taps

# Channels and stride of each inverted residual except the first, which has no number.
_BLOCKS = (
    *((24, 2), (24, 1)),
    *((32, 2), (32, 1), (32, 1)),
    *((64, 2), (64, 1), (64, 1), (64, 1)),
    *((96, 1), (96, 1), (96, 1)),
    *((160, 2), (160, 1), (160, 1)),
    (320, 1),
)
_KNOWN_TAPS = (
    *(f"block_{number}_expand_relu" for number in range(1, len(_BLOCKS) + 1)),
    "out_relu",
)
# The last features at each of five resolutions, from 1/2 to 1/32 of the image's.
MOBILENET_TAPS = (
    *("block_1_expand_relu", "block_3_expand_relu", "block_6_expand_relu"),
    *("block_13_expand_relu", "out_relu"),
)


class MobileNetV2(nn.Module):
    """MobileNetV2's convolutional part.

    Attributes:
        taps: layers to return, named as Keras does: "block_1_expand_relu" ...
            "block_16_expand_relu", "out_relu".
        preprocessing: see `trunks.preprocess`; "unit" for the weights of nsfwjs,
            "signed" for those of keras.applications.
        dtype: compute type; None computes in the type of images and weights.
    """

    taps: tuple[str, ...] = MOBILENET_TAPS
    preprocessing: str = "unit"
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Map images float [B, H, W, 3] in [0, 1] to taps [B, h, w, C] by name.

        Raises:
            ValueError: a tap is unknown, or the images have a side under 32 pixels.
        """
        require_taps(self.taps, _KNOWN_TAPS)
        require_side(images, 32, "MobileNetV2")
        taps: dict[str, jax.Array] = {}

        def conv(
            name: str,
            x: jax.Array,
            features: int,
            size: int = 1,
            *,
            stride: int = 1,
            groups: int = 1,
        ) -> jax.Array:
            # "SAME" would put half of an odd side's padding at the top and the left.
            before, after = ((size - 1) // 2 if stride == 1 else 0, size // 2)
            layer = nn.Conv(
                features,
                (size, size),
                strides=stride,
                padding=((before, after), (before, after)),
                feature_group_count=groups,
                dtype=self.dtype,
                name=name,
            )
            return layer(x)

        def residual(name: str, x: jax.Array, features: int, stride: int) -> jax.Array:
            width = x.shape[-1]
            y = conv(f"{name}_depthwise", x, width, 3, stride=stride, groups=width)
            return conv(f"{name}_project", nn.relu6(y), features)

        x = nn.relu6(
            conv("Conv1", preprocess(images, self.preprocessing), 32, 3, stride=2)
        )
        x = residual("expanded_conv", x, 16, 1)
        for number, (features, stride) in enumerate(_BLOCKS, start=1):
            name = f"block_{number}"
            wide = nn.relu6(conv(f"{name}_expand", x, 6 * x.shape[-1]))
            if f"{name}_expand_relu" in self.taps:
                taps[f"{name}_expand_relu"] = wide
            if len(taps) == len(set(self.taps)):
                break
            y = residual(name, wide, features, stride)
            x = x + y if x.shape == y.shape else y
        else:
            taps["out_relu"] = nn.relu6(conv("Conv_1", x, 1280))
        return {name: taps[name] for name in self.taps}
