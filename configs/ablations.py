# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations: one config with one thing changed.

semlic train --config configs/ablations.py:without_style --workdir runs/without_style
semlic train --config configs/ablations.py:without_style,hific --workdir runs/...

The part after the comma names the config that is changed, by default `small`. Data,
feature weights, time and hardware are those of that config; to share its first stages,
set --config.stages='("perceptual",)' with --config.init_from and
--config.labeller_from.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

ABLATIONS = {
    "full": {},
    "without_style": {"weights": {"style": 0.0, "local_style": 0.0, "mean_style": 0.0}},
    "without_mean_style": {"weights": {"mean_style": 0.0}},
    "without_perceptual": {"weights": {"perceptual": 0.0}},
    "without_adversary": {"weights": {"adversarial": 0.0}},
    "without_adversary_and_mean_style": {
        "weights": {"adversarial": 0.0, "mean_style": 0.0}
    },
    "without_noise": {},
    "binary_discriminator": {"adversary": {"binary": True}},
    # MS-ILLM's loss: squared error + perceptual + non-binary adversary. The adversary's
    # pull is bounded as in the config that is changed.
    "msillm": {
        "weights": {
            "charbonnier": 0.0,
            "structural": 0.0,
            "lattice": 0.0,
            "squared_error": 50.0,
            "style": 0.0,
            "local_style": 0.0,
            "mean_style": 0.0,
        }
    },
}
# Fields of the model that an ablation changes.
ARCHITECTURES = {"without_noise": {"texture_channels": 0}}


def get_config(argument: str = "full") -> ConfigDict:
    """`argument` is the name of an ablation, or `name,config`."""
    name, _, base = argument.partition(",")
    if name not in ABLATIONS:
        raise ValueError(
            f"expected one of the ablations {', '.join(ABLATIONS)}, found {name!r}"
        )
    path = Path(__file__).with_name(f"{base or 'small'}.py")
    config = runpy.run_path(str(path))["get_config"]()
    config.perceptual.update(ABLATIONS[name])
    config.architecture.update(ARCHITECTURES.get(name, {}))
    return config
