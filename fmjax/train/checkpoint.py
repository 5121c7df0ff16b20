"""Checkpoints of a run on Orbax: one series of steps, in which the newest names the best."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmjax.config import write_json
from fmjax.placing import on_device
from fmjax.train.loop import Event, Hook, Memory
from fmjax.train.recording import writable_folder
from fmjax.tree import flatten, map_with_path
from fmjax.types import PyTree, TrainState

_LISTED = 20
"""How many differing leaves an error lists."""


class Restored(NamedTuple):
    """A checkpoint: the state, the position in the data, and what the loop remembered."""

    state: TrainState
    data: dict[str, Any]
    memory: Memory


class Checkpoints:
    """The checkpoints of a run: the newest, and the best that the newest knows of.

    There is one folder a checkpoint, named by its step; it appears, complete, by a single rename,
    with the state, the data position and the loop's memory in it. So whatever moment a run dies
    at, the newest folder is a moment of the run in which everything belongs together, and the best
    state that its memory names is still there: older ones are deleted only after the rename.

    Files are written by a thread while the run goes on. Use it in a ``with`` statement, which waits
    for the thread.

    Args:
        folder: made if it is missing; leftovers of saves that were cut off are removed.
        settings: what a resumed run must have in common with the saved one, as JSON values; None
            accepts any.

    Raises:
        OSError: the folder is not writable.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, settings: Mapping[str, Any] | None = None
    ) -> None:
        import orbax.checkpoint as ocp

        self.folder = writable_folder(folder)
        self._settings = None if settings is None else json.loads(json.dumps(dict(settings)))
        self._keep = _NewestAndBest()
        self._remembered: dict[str, Any] | None = None  # in the newest, if it was saved from here
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep, cleanup_tmp_directories=True
            ),
            item_handlers={
                # Compressed, floats are hardly smaller, and take three times the processor's time.
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "run": ocp.JsonCheckpointHandler(),
            },
        )

    def save(self, state: TrainState, data: Mapping[str, Any], memory: Memory) -> None:
        """Starts saving; when it returns, the state may be donated.

        On an accelerator the arrays have been copied to the host by then. On a CPU Orbax writes
        from the buffers themselves; JAX leaves those that are being read alone and gives the next
        step new ones, so that for a moment there are two states in memory.

        If the newest checkpoint is of this very step, what the loop remembers is renewed in it, if
        hooks have changed that since.

        Args:
            data: the position from ``batches.get_state()``, as JSON values.

        Raises:
            ValueError: the folder has a checkpoint of a later step, that is of another run.
        """
        import orbax.checkpoint as ocp

        remembered = json.loads(json.dumps(dataclasses.asdict(memory)))
        step, newest = int(state.step), self._manager.latest_step()
        if newest == step:
            self._remember(step, remembered)
            return
        if newest is not None and newest > step:
            raise ValueError(
                f"{self.folder} has a checkpoint of step {newest}, later than step {step}; resume "
                "from it, or use another folder"
            )
        run = {
            "leaves": _leaves(state),
            "settings": self._settings,
            "data": data,
            "memory": remembered,
        }
        self._keep.best = memory.best_step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                # A copy, because the run goes on changing these while the thread writes.
                run=ocp.args.JsonSave(json.loads(json.dumps(run))),
            ),
        )
        self._remembered = remembered

    def _remember(self, step: int, remembered: dict[str, Any]) -> None:
        """Puts this in place of the memory that the newest checkpoint has, by a single rename."""
        if remembered == self._remembered:
            return
        self.wait()
        run = self._read_run(step)
        if remembered != run["memory"] and jax.process_index() == 0:
            write_json(self.folder / str(step) / "run" / "metadata", run | {"memory": remembered})
        self._keep.best = remembered["best_step"]
        self._remembered = remembered

    def restore_last(self, abstract_state: TrainState) -> Restored | None:
        """The newest checkpoint, or None if there is none.

        Args:
            abstract_state: ``jax.eval_shape(init)``, or a state. Leaves with a sharding are placed
                accordingly, whatever they were saved from; the others come back as `init_state`
                leaves them, free to follow the step.

        Raises:
            ValueError: the checkpoint is of another model or of other settings, or cannot be read.
        """
        newest = self._manager.latest_step()
        return None if newest is None else self._restore(newest, abstract_state)

    def restore_best(self, abstract_state: TrainState) -> Restored | None:
        """The checkpoint of the best evaluation, or None if there was none; see `restore_last`."""
        newest = self._manager.latest_step()
        if newest is None:
            return None
        best = self._read_run(newest)["memory"]["best_step"]
        return None if best is None else self._restore(best, abstract_state)

    def wait(self) -> None:
        """Returns when the last save is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the threads."""
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore(self, step: int, abstract_state: TrainState) -> Restored:
        import orbax.checkpoint as ocp

        self.wait()
        run = self._read_run(step)
        self._check(step, run, abstract_state)
        template = jax.tree.map(_template, abstract_state)
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        template,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(template),
                    )
                ),
            )["state"]
        except (ValueError, OSError, KeyError) as error:
            raise self._unreadable(step, error) from error
        leaves, structure = jax.tree.flatten(read)
        del read
        for index, leaf in enumerate(jax.tree.leaves(abstract_state)):
            leaves[index] = _placed(leaves[index], leaf)  # one by one: what was read goes
        state = structure.unflatten(leaves)
        return Restored(state, run["data"], Memory.from_json(run["memory"]))

    def _read_run(self, step: int) -> dict[str, Any]:
        import orbax.checkpoint as ocp

        try:
            run = self._manager.restore(
                step,
                args=ocp.args.Composite(run=ocp.args.JsonRestore()),
            )["run"]
            Memory.from_json(run["memory"])
            return {name: run[name] for name in ("leaves", "settings", "data", "memory")}
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: Exception) -> ValueError:
        others = sorted(set(self._manager.all_steps()) - {step})
        return ValueError(
            f"{self.folder / str(step)}: the checkpoint cannot be read ({error}); delete this "
            + (f"folder to go on from step {others[-1]}" if others else "folder to start again")
        )

    def _check(self, step: int, run: dict[str, Any], abstract_state: TrainState) -> None:
        where = self.folder / str(step)
        saved, wanted = run["leaves"], _leaves(abstract_state)
        problems = [
            *(f"{path}: not in the checkpoint" for path in wanted.keys() - saved.keys()),
            *(f"{path}: not in this model" for path in saved.keys() - wanted.keys()),
            *(
                f"{path}: {saved[path]} in the checkpoint, {wanted[path]} in this model"
                for path in wanted.keys() & saved.keys()
                if wanted[path] != saved[path]
            ),
        ]
        if problems:
            more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise ValueError(
                f"{where} is of another model or optimizer; build the one it was saved from, or "
                "use another folder:\n  " + "\n  ".join(sorted(problems)[:_LISTED]) + more
            )
        if self._settings is None or run["settings"] is None:
            return
        old, new = (
            {key: repr(value) for key, value in flatten(settings).items()}
            for settings in (run["settings"], self._settings)
        )
        differing = [
            f"{key}: {old.get(key, 'not set')} in the checkpoint, {new.get(key, 'not set')} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        ]
        if differing:
            raise ValueError(
                f"{where} is of a run with other settings; restore them, or use another folder:\n  "
                + "\n  ".join(differing)
            )


@dataclasses.dataclass
class _NewestAndBest:
    """Orbax's question of what to keep, asked when a save has begun."""

    best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        newest = max(checkpoint.step for checkpoint in checkpoints)
        return [checkpoint.step in (newest, self.best) for checkpoint in checkpoints]


def _leaves(state: PyTree) -> dict[str, str]:
    """Shape and dtype by path: ``{"trainable/params/head/bias": "float32[2]"}``."""
    leaves: dict[str, str] = {}

    def note(path: str, leaf: Any) -> None:
        leaves[path] = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    map_with_path(note, state)
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _sharding(leaf: Any) -> Any:
    """Where a leaf must live; None where it may follow the others."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding


def _template(leaf: Any) -> Any:
    """What Orbax is asked for: a placed array, or a numpy one where no place is given."""
    sharding = _sharding(leaf)
    if sharding is None and _is_key(leaf):
        # Otherwise Orbax asks for the devices it was saved from, which another machine lacks.
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if sharding is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)  # takes no memory


def _placed(restored: Any, leaf: Any) -> Any:
    if _sharding(leaf) is not None:
        return restored
    if _is_key(leaf):
        data = np.asarray(jax.random.key_data(restored))
        return jax.random.wrap_key_data(jnp.array(data), impl=jax.random.key_impl(restored))
    return on_device(restored)


def saving(
    checkpoints: Checkpoints, position: Callable[[], Mapping[str, Any]], memory: Memory
) -> Hook:
    """A hook that saves; the last of the hooks, so that what it saves is all there is.

    Args:
        position: ``batches.get_state``.
        memory: the one given to `fit`.
    """

    def hook(event: Event) -> None:
        checkpoints.save(event.state, position(), memory)

    return hook
