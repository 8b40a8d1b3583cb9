# SPDX-License-Identifier: Apache-2.0
"""What commands say on the terminal, and the signals and warnings that reach them."""

from __future__ import annotations

import argparse
import signal
import warnings

import numpy as np
import pytest
from PIL import Image

from semlic_jax.cli.refine import region_of
from semlic_jax.cli.terminal import stops_when_asked, warnings_are_notes
from semlic_jax.refinement import RefinementWarning


@pytest.fixture
def at_sigint():
    """Function that sets what SIGINT does; afterwards it does what it did."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_program_in_the_background_ignores_ctrl_c(at_sigint):
    at_sigint(signal.SIG_IGN)
    with stops_when_asked() as stop:
        signal.raise_signal(signal.SIGINT)
        assert not stop()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_the_second_ctrl_c_interrupts(at_sigint, capsys):
    at_sigint(signal.default_int_handler)
    with stops_when_asked() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop() and "press Ctrl-C again" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_only_warnings_of_refinement_are_notes(capsys):
    notes = []
    with (
        pytest.warns(RuntimeWarning, match="of another kind"),
        warnings_are_notes(notes.append),
    ):
        warnings.warn("smaller batches", RefinementWarning, stacklevel=1)
        warnings.warn("of another kind", RuntimeWarning, stacklevel=1)
    assert notes == ["smaller batches"]
    assert capsys.readouterr().err == "note: smaller batches\n"


def test_what_pillow_warns_of_in_a_mask_is_not_shown(tmp_path, monkeypatch, recwarn):
    path = tmp_path / "mask.png"
    Image.fromarray(np.full((5, 7), 255, np.uint8)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # it warns of the 35
    options = argparse.Namespace(
        roi=str(path), roi_resize=None, roi_weight=None, roi_variant=None
    )
    notes = []
    region = region_of(options, np.zeros((5, 7, 3), np.uint8), notes.append)
    assert region is not None and notes == [] and not recwarn.list
