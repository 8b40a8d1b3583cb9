# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a stage: all that its updates change, and the next stage's start.

A checkpoint is one tree: `params`, `average` and `optimizer` of the network that the
stage trains, and whatever else its updates change. Orbax writes it in the background
into a folder for each step, which is named by its number only once it is complete, so
a run that dies while writing still has the checkpoint before it as the last one.
Folders may be in a bucket (`gs://...`), where orbax marks complete ones with a file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

Tree = Any

# What the statuses of tensorstore that come of damage mean.
_DAMAGES = {
    "NOT_FOUND": "a file is missing",
    "OUT_OF_RANGE": "a file is too short",
    "DATA_LOSS": "the data of a file are not those that were written",
}
_ITEM = "default"  # orbax's name for the tree of a checkpoint


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The loop asks, at every step: JAX must be asked with numbers of one sequence.
        del step
        return False


class Checkpoints:
    """The checkpoints of one stage; a context manager that waits for the last write."""

    def __init__(self, folder: epath.PathLike, keep: int) -> None:
        """Create the folder.

        Args:
            folder: the stage's folder.
            keep: how many checkpoints are kept, the latest ones.

        Raises:
            ValueError: the folder cannot be written to.
        """
        self.folder = _absolute(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable_{jax.process_index()}"
            probe.write_bytes(b"0")
            probe.unlink()
        except Exception as error:  # bucket libraries raise errors of their own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(
                f"checkpoints need a writable folder, found {folder}: {reason[:300]}"
            ) from error
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = _Manager(
            self.folder,
            options=options,
            item_handlers=ocp.StandardCheckpointHandler(),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None and jax.process_count() > 1:
            # It takes all processes to finish a checkpoint, and one may be gone.
            return
        try:
            self._guarded(self._manager.wait_until_finished)
        except ValueError:
            # An earlier error is the one to report.
            if kind is None:
                raise
        finally:
            self._manager.close()

    def restore(self, shapes: Tree) -> tuple[Tree, int] | None:
        """The last checkpoint and its step, or None if there is none.

        Args:
            shapes: the state's leaves as `jax.ShapeDtypeStruct` with shardings, which
                may differ from those that it was saved with.

        Raises:
            ValueError: the checkpoint is of another model, and the first difference is
                named; or it is damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        # Extra leaves are refused here too: orbax's own error would list both trees.
        with _naming_damage(self.folder, step):
            item = self.folder / str(step) / _ITEM
            found = self._manager.item_metadata(step) if item.exists() else None
            if not jax.tree.leaves(found):
                raise FileNotFoundError
        check_fits(found, shapes, self.folder, exactly=True)
        with _naming_damage(self.folder, step):
            restored = self._manager.restore(
                step, args=ocp.args.StandardRestore(shapes)
            )
        return restored, step

    def save(self, step: int, state: Tree) -> None:
        """Start writing a checkpoint; the state may be donated right after.

        Raises:
            ValueError: this checkpoint or the one before it cannot be written.
        """
        self._guarded(
            lambda: self._manager.save(
                step, args=ocp.args.StandardSave(state), force=True
            )
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            ValueError: it cannot be written.
        """
        self._guarded(self._manager.wait_until_finished)

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except Exception as error:
            steps = _complete_steps(self.folder)
            raise ValueError(
                f"cannot write a checkpoint into {self.folder} (the last complete one "
                f"is {f'that of step {steps[-1]}' if steps else 'none'}): "
                f"{' '.join(str(error).split())[:300]}"
            ) from error


def check_fits(
    found: Any, wanted: Tree, where: epath.PathLike, *, exactly: bool = False
) -> None:
    """Check that a checkpoint has the shapes of a state.

    Args:
        found, wanted: trees whose leaves have a shape.
        where: the checkpoint's folder, for the message.
        exactly: whether `found` must have no further leaves.

    Raises:
        ValueError: a leaf differs; names the first one.
    """
    shapes = {
        _name(path): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = _name(path)
        if shapes.get(name) != np.shape(leaf):
            raise ValueError(
                f"the checkpoint in {where} does not fit this model: {name} should "
                f"have shape {np.shape(leaf)}, found {shapes.get(name, 'none')}"
            )
        del shapes[name]
    if exactly and shapes:
        raise ValueError(
            f"the checkpoint in {where} does not fit this model: it has "
            f"{min(shapes)}, which the model does not have"
        )


def _name(path: Any) -> str:
    keys = [getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))) for p in path]
    return "/".join(str(key) for key in keys)


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    # pathlib would resolve gs://bucket to a path on this machine.
    return path if path.is_absolute() else path.resolve()


def _complete_steps(folder: epath.Path) -> list[int]:
    # Orbax knows which are complete; in a bucket, unfinished ones have a number too.
    return sorted(ocp.path.step.checkpoint_steps(folder))


@contextmanager
def _naming_damage(folder: epath.Path, step: int) -> Iterator[None]:
    """Turn errors in reading a checkpoint into one that says what to do about it.

    Raises:
        ValueError: it is damaged, or cannot be read now.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the device is full, or another process is gone
    except Exception as error:  # orbax and tensorstore raise errors of many kinds
        status = str(error).partition(":")[0]
        reason = _DAMAGES.get(status)
        if isinstance(error, FileNotFoundError):
            reason = _DAMAGES["NOT_FOUND"]
        elif isinstance(error, json.JSONDecodeError | KeyError):
            reason = "its metadata cannot be parsed"
        elif reason is None:
            # No permission, no network, a missing package: nothing that should be
            # deleted, and what bucket libraries raise cannot be told apart.
            raise ValueError(
                f"cannot read the checkpoint {folder / str(step)}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        earlier = [each for each in _complete_steps(folder) if each < step]
        follows = f"continue from step {earlier[-1]}" if earlier else "start again"
        raise ValueError(
            f"the checkpoint {folder / str(step)} is damaged ({reason}); delete it to "
            f"{follows}"
        ) from error


def last_step(folder: epath.PathLike) -> int:
    """Step of the last complete checkpoint of a stage, 0 if there is none."""
    return max(_complete_steps(_absolute(folder)), default=0)


def read_params(
    folder: epath.PathLike, step: int | None = None, which: str = "average"
) -> Tree:
    """Parameters from a stage's checkpoint, as NumPy arrays.

    Args:
        folder: the stage's folder, such as `runs/small/rate_distortion`.
        step: the checkpoint's step; None for the last one.
        which: `average`, `params`, or another part of the state.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    folder = _absolute(folder)
    steps = _complete_steps(folder) if folder.is_dir() else []
    if step is None and steps:
        step = steps[-1]
    if step not in steps:
        raise ValueError(
            f"expected a checkpoint{'' if step is None else f' of step {step}'} in "
            f"{folder}, found {', '.join(map(str, steps)) or 'none'}"
        )
    path = folder / str(step) / _ITEM
    logging.info("reading %s", path)
    handler = ocp.PyTreeCheckpointHandler()
    with _naming_damage(folder, step):
        tree = handler.metadata(path).tree
    if which not in tree:
        raise ValueError(f"{path} has no {which}, found {', '.join(sorted(tree))}")
    wanted = {which: tree[which]}
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
    with _naming_damage(folder, step):
        restored = handler.restore(
            path,
            args=ocp.args.PyTreeRestore(
                item=wanted, restore_args=arguments, partial_restore=True
            ),
        )
    handler.close()
    return restored[which]
