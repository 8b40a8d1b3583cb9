# SPDX-License-Identifier: Apache-2.0
"""The training loop: rows, pictures, checkpoints, stops."""

from __future__ import annotations

import gc
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from counting_run import counting_program, read_rows, run_counting

from semlic_jax.training import checkpoints, loop, plot
from semlic_jax.training.loop import NotFiniteError
from semlic_jax.training.plot import read_log
from semlic_jax.training.sharding import Preempted, stops_at_sigterm
from semlic_jax.training.writers import Writer

PNG = b"\x89PNG\r\n"

pytestmark = pytest.mark.usefixtures("quick_to_compile")


def test_a_row_follows_the_part_of_one_that_a_killed_run_left(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    writer = Writer(tmp_path, active=True, tensorboard=False)
    writer.scalars("a", 2, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in read_log(log)["a"]] == [1, 2]


def test_a_plot_without_a_log_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        plot.main([str(tmp_path)])
    assert ended.value.code == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert last.endswith(f"{tmp_path / 'metrics.jsonl'}, does not exist")


def test_a_plot_of_a_log_with_lines_that_are_no_rows(tmp_path, capsys):
    log = tmp_path / "metrics.jsonl"
    row = b'{"stage": "a", "step": %d, "loss": 1.0, "style": "?"}\n'
    odd = b'{"a": 1}\n[]\n3\n\xff\n{"stage": "a", "step": "1"}\n{"stage": "a", "st'
    log.write_bytes(row % 1 + odd + b"\n" + row % 2)
    plot.main([str(tmp_path)])
    assert (tmp_path / "metrics.png").read_bytes().startswith(PNG)
    log.write_bytes(b'{"stage": "a", "step": 1}\n')
    with pytest.raises(SystemExit) as ended:
        plot.main([str(tmp_path)])
    assert ended.value.code == 1 and "has no terms" in capsys.readouterr().err


def test_a_plot_replaces_no_file_that_is_named(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1, "loss": 1.0}\n')
    photograph = tmp_path / "photo.png"
    photograph.write_bytes(b"mine")
    for wrong, reason in (
        (photograph, "exists: give --force"),
        (tmp_path, "ends in .png"),
        (tmp_path / "x.pdf", "ends in .png"),
        (tmp_path / "no" / "x.png", "does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            plot.main([str(tmp_path), str(wrong)])
        assert ended.value.code == 1 and reason in capsys.readouterr().err
    assert photograph.read_bytes() == b"mine"
    plot.main([str(tmp_path), str(photograph), "--force"])
    assert photograph.read_bytes().startswith(PNG)


def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(NotFiniteError, match="style is nan at step 8 of the stage"):
        run_counting(tmp_path, counting_program(8), log_steps=100)
    # The checkpoint of step 9 would have held it; that of 6 is the last.
    found = checkpoints.read_params(tmp_path / "perceptual")
    assert found == {"n": 6.0}
    assert run_counting(tmp_path, counting_program(), log_steps=100) == {"n": 10.0}


def test_a_run_that_is_told_to_stop_saves_first(tmp_path, monkeypatch):
    told = iter([False] * 3 + [True])
    monkeypatch.setattr(loop, "told_to_stop", lambda: next(told))
    with pytest.raises(Preempted, match="of step 4 of the stage perceptual is saved"):
        run_counting(tmp_path, counting_program(), checkpoint_steps=100)
    assert checkpoints.read_params(tmp_path / "perceptual", 4) == {"n": 4.0}
    monkeypatch.undo()
    assert run_counting(tmp_path, counting_program()) == {"n": 10.0}


def test_a_signal_to_a_run_by_itself_saves_first(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def update(state, step, images):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return program.update(state, step, images)

    program = counting_program()
    with pytest.raises(Preempted, match="of step 4 of the stage"), stops_at_sigterm():
        run_counting(tmp_path, program._replace(update=update), checkpoint_steps=100)
    assert checkpoints.read_params(tmp_path / "perceptual", 4) == {"n": 4.0}
    # Nothing of it is left.
    assert signal.getsignal(signal.SIGTERM) is before
    assert run_counting(tmp_path, program) == {"n": 10.0}


@pytest.mark.parametrize(
    "error", [RuntimeError("Backend Error, 503"), ImportError("Please install gcsfs")]
)
def test_a_checkpoint_behind_other_errors_is_not_to_be_deleted(
    tmp_path, monkeypatch, error
):
    run_counting(tmp_path, counting_program())

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(checkpoints._Manager, "restore", fail)
    with pytest.raises(ValueError, match="cannot read the checkpoint .*") as refused:
        run_counting(tmp_path, counting_program(), steps=20)
    assert "delete" not in str(refused.value)


def test_rows_and_pictures(tmp_path):
    run_counting(tmp_path, counting_program(), log_steps=4, image_steps=5)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 10]
    assert [row["loss"] for row in rows] == [1.5, 5.5, 8.5]
    assert all(row["stage"] == "perceptual" for row in rows)
    assert rows[-1]["images_per_second"] > 0 and rows[-1]["skipped_images"] == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["perceptual_0000005.png", "perceptual_0000010.png"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_counting(tmp_path, counting_program())
    other = counting_program()
    shapes = dict(other.shapes, average={"n": jax.ShapeDtypeStruct((3,), jnp.float32)})
    with pytest.raises(
        ValueError, match=r"average/n should have shape \(3,\), found \(\)"
    ):
        run_counting(tmp_path, other._replace(shapes=shapes))


def halve(paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "parsed": lambda step: halve(step.glob("default/_METADATA")),
    "is missing": lambda step: (step / "default" / "_METADATA").unlink(),
    "file is missing": lambda step: shutil.rmtree(step / "default"),
    "is too short": lambda step: halve(step.glob("default/d/*")),
    "are not those": lambda step: halve(step.glob("default/manifest.ocdbt")),
}


# Arrays are read at the same time, and tensorstore drops all errors but the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damaged_checkpoint_says_what_to_delete(tmp_path, reason):
    run_counting(tmp_path, counting_program(), steps=4, checkpoint_steps=2)
    folder = tmp_path / "perceptual"
    DAMAGES[reason](folder / "4")
    message = (
        rf"the checkpoint {folder}/4 is damaged \([^()]*{reason}[^()]*\); delete it to "
    )
    for read in (
        lambda: run_counting(tmp_path, counting_program()),
        lambda: checkpoints.read_params(folder),
    ):
        with pytest.raises(ValueError, match=message + "continue from step 2$"):
            read()
    gc.collect()  # what was dropped, while it is expected
    shutil.rmtree(folder / "2")
    with pytest.raises(ValueError, match=message + "start again$"):
        checkpoints.read_params(folder)
    shutil.rmtree(folder / "4")
    assert run_counting(tmp_path, counting_program()) == {"n": 10.0}


def test_a_checkpoint_that_cannot_be_read_now_is_not_to_be_deleted(tmp_path):
    for error in (PermissionError("no"), ValueError("UNAVAILABLE: no network")):
        with (
            pytest.raises(
                ValueError, match=f"cannot read the checkpoint .*/3: {error}"
            ),
            checkpoints._naming_damage(tmp_path, 3),
        ):
            raise error
