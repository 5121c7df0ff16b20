"""Checkpoints: exact, asynchronous, whole or absent, and refused where they do not belong."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec as P

from fmjax.train import gradient, init_state, jit_step, make_mesh, make_train_step, shardings
from fmjax.train.checkpoint import Checkpoints, saving
from fmjax.train.loop import Memory, Window, evaluation, fit
from fmjax.types import Aux, TrainState

TX = optax.adamw(0.01)
DATA = {"position": {"next_index": 5}, "stream": {"seed": 3}}


def state_of(width=8, step=3, impl="threefry2x32"):
    """A state with bfloat16, float32, integers, a frozen part, and a key."""
    keys = jax.random.split(jax.random.key(step), 2)
    variables = {
        "params": {
            "up": jax.random.normal(keys[0], (4, width)),
            "low": jax.random.normal(keys[1], (width,), jnp.bfloat16),
            "frozen": jnp.arange(width),
        }
    }
    state = init_state(
        variables, TX, jax.random.key(step, impl=impl), lambda path: "frozen" not in path
    )
    return dataclasses.replace(state, step=jnp.int32(step))


def bits(tree):
    """Every leaf as a numpy array with its dtype; keys as their words."""

    def host(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return {"impl": str(jax.random.key_impl(leaf)), "data": jax.random.key_data(leaf)}
        return leaf

    return jax.tree.map(
        lambda x: x if isinstance(x, str) else np.asarray(x), jax.tree.map(host, tree)
    )


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b, strict=not isinstance(a, str)),
        bits(one),
        bits(other),
    )


def abstract(**settings):
    return jax.eval_shape(lambda: state_of(**settings))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_round_trip_is_exact(tmp_path, impl):
    memory = Memory({"7": Window({"loss": [0.1, 3.0]}, 1.5, 24, 99)}, 2, 1 / 3, 4, True)
    state = state_of(impl=impl)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state, DATA, memory)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored = checkpoints.restore_last(abstract(impl=impl))
        assert restored is not None
        same(restored.state, state)
        assert (restored.data, restored.memory) == (DATA, memory)
        same(checkpoints.restore_last(state).state, state)  # a state will do as a template


def test_checkpoints_written_compressed_go_on(tmp_path):
    """As Orbax does by itself, and as this package did."""
    state = state_of(width=5_000)
    with Checkpoints(tmp_path / "now") as checkpoints:
        checkpoints.save(state, DATA, Memory())
    run = json.loads((tmp_path / "now" / "3" / "run" / "metadata").read_text())
    with ocp.CheckpointManager(tmp_path / "before") as manager:
        manager.save(
            3,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run)),
        )
    sizes = {
        name: sum(file.stat().st_size for file in (tmp_path / name / "3").rglob("*"))
        for name in ("now", "before")
    }
    assert sizes["before"] < 0.6 * sizes["now"], "this one is compressed, ours is not"
    mesh = make_mesh(data=2)
    places = shardings(state, mesh, [("params/up", P(None, "data"))])
    spread = jax.eval_shape(lambda: state)
    spread = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        spread,
        places,
    )
    with Checkpoints(tmp_path / "before") as checkpoints:
        for template in (state, spread):
            restored = checkpoints.restore_last(template)
            same(restored.state, state)
            assert restored.data == DATA
        assert restored.state.trainable["params"]["up"].sharding == places.trainable["params"]["up"]
        checkpoints.save(state_of(width=5_000, step=4), DATA, Memory(best_step=3))
        same(checkpoints.restore_best(state).state, state)
        same(checkpoints.restore_last(state).state, state_of(width=5_000, step=4))


def test_what_is_restored_is_given_up_to_a_step(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(width=500), DATA, Memory())
        (up,) = jax.tree.leaves(checkpoints.restore_last(state_of(width=500)).state.trainable)[1:]
    place = up.unsafe_buffer_pointer()
    taken = jax.jit(lambda x: x + 1, donate_argnums=0)(up)
    assert up.is_deleted()
    assert taken.unsafe_buffer_pointer() == place


def test_an_empty_folder_holds_none(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last(abstract()) is None
        assert checkpoints.restore_best(abstract()) is None
        checkpoints.save(state_of(), DATA, Memory())
        assert checkpoints.restore_best(abstract()) is None, "nothing was evaluated yet"


def test_what_is_saved_is_what_was_there_whatever_is_donated_then(tmp_path):
    """Steps that take over the saved buffers run while the files are still being written."""
    state, memory = state_of(width=200_000), Memory()
    change = jax.jit(
        lambda s: dataclasses.replace(
            jax.tree.map(lambda x: x if x.ndim == 0 else x * 3, s), step=s.step + 1
        ),
        donate_argnums=0,
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, data := {"position": 1}, memory)
        data["position"] = memory.stale = 9
        for _ in range(20):
            state = change(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore_last(abstract(width=200_000))
    same(restored.state, state_of(width=200_000))
    assert (restored.data, restored.memory) == ({"position": 1}, Memory())
    change(state)
    assert state.trainable["params"]["up"].is_deleted(), "these steps do donate"


def test_the_newest_and_the_best_are_kept(tmp_path):
    def steps():
        return sorted(int(path.name) for path in tmp_path.iterdir())

    with Checkpoints(tmp_path) as checkpoints:
        for step, best, kept in [(3, None, [3]), (4, 4, [4]), (5, 4, [4, 5]), (6, 4, [4, 6]),
                                 (7, 7, [7]), (8, 7, [7, 8])]:  # fmt: skip
            checkpoints.save(state_of(step=step), {"position": step}, Memory(best_step=best))
            checkpoints.wait()
            assert steps() == kept
        checkpoints.save(state_of(step=8), {"position": -1}, Memory(best_step=7))  # is there
        best, last = checkpoints.restore_best(abstract()), checkpoints.restore_last(abstract())
    same(best.state, state_of(step=7))
    same(last.state, state_of(step=8))
    assert (best.data["position"], last.data["position"]) == (7, 8)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="checkpoint of step 8, later than step 5"):
            checkpoints.save(state_of(step=5), DATA, Memory())
        checkpoints.save(state_of(step=9), DATA, Memory(best_step=7))
    assert steps() == [7, 9]


def test_leftovers_of_a_save_cut_off_are_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 5):
            checkpoints.save(state_of(step=step), DATA, Memory(best_step=3))
    cut_off = tmp_path / "9.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", cut_off)
    (cut_off / "commit_success.txt").unlink()
    # The best of before, half deleted when the process died.
    (tmp_path / "2").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        same(checkpoints.restore_last(abstract()).state, state_of(step=5))
        checkpoints.save(state_of(step=6), DATA, Memory(best_step=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "6"]


def test_restores_onto_any_sharding(tmp_path):
    small, large = make_mesh(data=2), make_mesh(data=2, model=2)
    rules = [("params/up", P(None, "data"))]
    plain = state_of()
    spread = jax.device_put(plain, shardings(plain, small, rules))
    other = shardings(plain, large, [("params/(up|frozen)", P("model")), ("low", P("data"))])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(spread, DATA, Memory())
        template = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract(),
            other,
        )
        moved = checkpoints.restore_last(template).state
        single = checkpoints.restore_last(abstract()).state
        again = checkpoints.restore_last(spread).state
    for state in (moved, single, again):
        same(state, plain)
    assert jax.tree.map(lambda leaf: leaf.sharding, moved) == other
    assert again.trainable["params"]["up"].sharding.spec == P(None, "data")
    assert not any(leaf.committed for leaf in jax.tree.leaves(single))

    def loss_fn(variables, batch, rng):
        loss = (batch["x"] @ variables["params"]["up"]).mean()
        return loss, Aux(jnp.float32(8), {}, {})

    step = jit_step(make_train_step(gradient(loss_fn), TX), make_mesh(data=4))
    state, _ = step(single, {"x": np.ones((8, 4), np.float32)})  # a step on a mesh accepts it
    assert int(state.step) == 4


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(), DATA, Memory())
        with pytest.raises(ValueError, match="another model or optimizer") as error:
            checkpoints.restore_last(abstract(width=9))
        text = str(error.value)
        assert "trainable/params/up: float32[4,8] in the checkpoint, float32[4,9] in this" in text
        assert "opt_state/0/mu/params/low: bfloat16[8]" in text
        other = init_state({"params": {"up": jnp.ones((4, 8)), "new": jnp.ones(2)}}, TX,
                           jax.random.key(0, impl="rbg"))  # fmt: skip
        with pytest.raises(ValueError, match="another model") as error:
            checkpoints.restore_last(other)
        text = str(error.value)
        assert "trainable/params/new: not in the checkpoint" in text
        assert "trainable/params/low: not in this model" in text
        assert "rng: key<fry>[] in the checkpoint, key<rbg>[] in this model" in text
        many = init_state({"params": {f"p{i}": jnp.ones(2) for i in range(30)}}, optax.sgd(1.0),
                          jax.random.key(0))  # fmt: skip
        with pytest.raises(ValueError, match="another model") as error:
            checkpoints.restore_last(many)
        assert str(error.value).count("\n") == 21
        assert "and 18 more" in str(error.value)


def test_other_settings_are_refused_by_name(tmp_path):
    settings = {"steps": 100, "model": {"path": "a", "sizes": (1, 2)}, "rate": 1e-5}
    with Checkpoints(tmp_path, settings=settings) as checkpoints:
        checkpoints.save(state_of(), DATA, Memory())
    with Checkpoints(tmp_path, settings=settings) as checkpoints:
        assert checkpoints.restore_last(abstract()) is not None
    changed = {"steps": 100, "model": {"path": "b", "sizes": (1, 2)}, "seed": 0}
    with Checkpoints(tmp_path, settings=changed) as checkpoints:
        with pytest.raises(ValueError, match="other settings") as error:
            checkpoints.restore_last(abstract())
        *_, model, rate, seed = str(error.value).splitlines()
        assert model == "  model/path: 'a' in the checkpoint, 'b' now"
        assert rate == "  rate: 1e-05 in the checkpoint, not set now"
        assert seed == "  seed: not set in the checkpoint, 0 now"
        assert "sizes" not in str(error.value)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore_last(abstract()) is not None, "to look at it, none are needed"


def test_an_unreadable_checkpoint_is_named_with_the_way_out(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (3, 5):
            checkpoints.save(state_of(step=step), DATA, Memory(best_step=3))
    for file in (tmp_path / "5" / "state").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(
            ValueError, match=r"5: .* cannot be read.*delete.* from step 3"
        ) as error:
            checkpoints.restore_last(abstract())
        assert str(tmp_path / "5") in str(error.value)
    shutil.rmtree(tmp_path / "5")
    file = tmp_path / "3" / "run" / "metadata"
    run = json.loads(file.read_text())
    others = [[], run | {"memory": {"windows": {}, "best": 3}}, {"leaves": run["leaves"]}]
    for text in ('{"leaves": ', *map(json.dumps, others)):
        file.write_text(text)
        with (
            Checkpoints(tmp_path) as checkpoints,
            pytest.raises(ValueError, match=r"cannot be read.*delete.* to start again"),
        ):
            checkpoints.restore_last(abstract())


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another folder") as error:
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert str(tmp_path / "file" / "checkpoints") in str(error.value)


def test_in_a_run_the_best_is_what_was_evaluated(tmp_path):
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    seen: dict[int, TrainState] = {}

    def evaluate(state):
        seen[int(state.step)] = jax.tree.map(jnp.copy, state)
        return {"loss": values[int(state.step)]}

    def loss_fn(variables, batch, rng):
        loss = ((batch["x"] @ variables["params"]["up"]) ** 2).mean()
        return loss, Aux(jnp.float32(8), {}, {})

    position = iter(range(1, 100))
    batches = ({"x": np.full((8, 4), next(position), np.float32)} for _ in range(8))
    memory = Memory()
    with Checkpoints(tmp_path) as checkpoints:
        save = saving(checkpoints, lambda: {"left": 0}, memory)
        state = fit(
            state_of(step=0), jit_step(make_train_step(gradient(loss_fn), TX)), batches, steps=8,
            hooks=[(2, evaluation(evaluate, memory, save=save)), (3, save)], memory=memory,
        )  # fmt: skip
        best = checkpoints.restore_best(abstract())
        last = checkpoints.restore_last(abstract())
    same(best.state, seen[4])
    assert best.memory.best_value == 1.0
    same(last.state, state)
    assert last.memory == memory


@pytest.mark.parametrize("last", [True, False])
def test_a_run_that_a_hook_ended_stays_ended(tmp_path, last):
    """Also if this step was saved before that hook was asked."""
    memory = Memory()

    def step(state, batch):
        return dataclasses.replace(state, step=state.step + 1), {}

    batches = iter([{"x": np.ones((8, 4), np.float32)}] * 8)
    with Checkpoints(tmp_path) as checkpoints:
        save = saving(checkpoints, lambda: {"left": 0}, memory)
        better = evaluation(lambda state: {"loss": -float(state.step)}, memory, save=save)
        hooks = [(2, better), (4, lambda event: True), *([(4, save)] if last else [])]
        state = fit(state_of(step=0), step, batches, steps=8, hooks=hooks, memory=memory)
        if not last:
            checkpoints.save(state, {"left": 0}, memory)
        restored = checkpoints.restore_last(abstract())
    assert restored.memory == memory
    assert (memory.stopped, memory.best_step, int(restored.state.step)) == (True, 4, 4)
    with Checkpoints(tmp_path) as checkpoints:  # which has saved nothing itself
        memory.stale = 7
        checkpoints.save(state, {"left": 0}, memory)
        assert checkpoints.restore_best(abstract()).memory == memory
