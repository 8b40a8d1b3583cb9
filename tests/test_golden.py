# SPDX-License-Identifier: Apache-2.0
"""Files that were once written decode for ever, to the same latents.

`data/golden/<version>/` holds a model file, `.semlic` files of it, and `golden.json`
with the SHA-256 of each file's decoded latents and the mean of each channel of its
picture. A folder is never changed: a new version of the format gets a new one,

    python tests/test_golden.py NEW_VERSION

and the old ones must still pass. `data/packaged/<model>/` has files of a model of the
package: whoever has such files needs that model for ever.

    python tests/test_golden.py --model base
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from semlic_jax.evaluation.exactness import digest
from semlic_jax.weights import pretrained_models

FOLDER = Path(__file__).parent / "data" / "golden"
PACKAGED = FOLDER.parent / "packaged"
VERSIONS = sorted(path.name for path in FOLDER.iterdir())

# Height, width, quality: one pixel, odd sizes, more than one hyper-latent.
CASES = ((1, 1, 1.0), (37, 90, 0.4), (130, 75, 0.0), (64, 128, 0.8))
# Of the packaged models: one shape, since these take longer to compile.
PACKAGED_CASES = ((37, 90, 0.2), (64, 128, 0.8))


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_files_decode(version):
    folder = FOLDER / version
    check(folder, folder / "model.npz", len(CASES))


@pytest.mark.parametrize("model", sorted(pretrained_models()))
def test_files_of_packaged_models_decode(model):
    check(PACKAGED / model, model, len(PACKAGED_CASES))


def check(folder: Path, model: Path | str, count: int) -> None:
    """Decodes the files of a folder."""
    import semlic_jax

    codec = semlic_jax.load(model)
    record = json.loads((folder / "golden.json").read_text())
    assert codec.fingerprint.hex() == record["fingerprint"]
    assert len(record["files"]) == count
    for name, expected in record["files"].items():
        data = (folder / name).read_bytes()
        header, y_hat = codec.decode_latents(data)
        assert digest(y_hat) == expected["latents_sha256"], name
        assert [header.height, header.width] == expected["size"]
        # Pixels are float arithmetic and may differ by a grey level between machines.
        means = codec.decompress(data).mean(axis=(0, 1))
        np.testing.assert_allclose(means, expected["channel_means"], atol=1)


def test_the_newest_version_is_there():
    import semlic_jax

    assert str(semlic_jax.BITSTREAM_VERSION) in VERSIONS


def make(version: str) -> None:
    """Write the folder of a version; refuses to change one that is there."""
    from conftest import lively_params

    import semlic_jax
    from semlic_jax.model.compression import SIZES
    from semlic_jax.weights import export_model, save_model

    folder = FOLDER / version
    folder.mkdir()
    save_model(
        folder / "model.npz", export_model(SIZES["tiny"], lively_params(SIZES["tiny"]))
    )
    write_files(folder, semlic_jax.load(folder / "model.npz"), CASES)


def make_packaged(model: str) -> None:
    """Write the folder of a packaged model; refuses to change one that is there."""
    import semlic_jax

    folder = PACKAGED / model
    folder.mkdir(parents=True)
    write_files(folder, semlic_jax.load(model), PACKAGED_CASES)


def write_files(folder: Path, codec, cases) -> None:
    from conftest import photograph_like

    files = {}
    for height, width, quality in cases:
        data = codec.compress(photograph_like(height, width), quality=quality)
        name = f"{width}x{height}.semlic"
        (folder / name).write_bytes(data)
        files[name] = {
            "size": [height, width],
            "latents_sha256": digest(codec.decode_latents(data)[1]),
            "channel_means": codec.decompress(data).mean(axis=(0, 1)).tolist(),
        }
    record = {"fingerprint": codec.fingerprint.hex(), "files": files}
    (folder / "golden.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "--model":
        make_packaged(sys.argv[2])
    else:
        make(sys.argv[1])
