"""A step without room for it: what is said, and whether what is said is so."""

import re

import jax
import numpy as np
import pytest

import fmjax
from fmjax import cli
from fmjax.data.batches import batches
from fmjax.data.columns import Columns
from fmjax.models import bert
from fmjax.perf.memory import MemoryUse, memory_use
from fmjax.recipes import memory_errors
from fmjax.recipes.memory_errors import Setup, cheapest, explanation, said_bytes, ways
from fmjax.recipes.training import Training, train
from fmjax.tasks import masked_lm
from fmjax.train import accumulate, adamw, cast, gradient, init_state, make_train_step
from fmjax.train.compile import lower_step

SETUP = Setup(
    batch_size=32, microbatches=1, remat="none", scan=False, precision="float32",
    optimizer="adamw", moments="float32", parts=1, rows=1, devices=1,
)  # fmt: skip


def model_of(length=64, **options):
    config = bert.Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=length, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return fmjax.create("bert", config, head="masked_lm", rng=jax.random.key(0), **options)


def use_of(microbatches=1, precision="float32", batch_size=32, **options):
    """What a step needs, by the compiler."""
    model, variables = model_of(**options)
    tokens = jax.ShapeDtypeStruct((batch_size, 64), np.int32)
    batch = {"input_ids": tokens, "labels": tokens}
    batch["weight"] = jax.ShapeDtypeStruct((batch_size,), np.float32)
    loss = masked_lm.loss(model)
    loss = cast(loss, "bfloat16") if precision == "bfloat16" else loss
    tx = adamw(1e-3)
    state = jax.eval_shape(lambda: init_state(variables, tx, jax.random.key(0)))
    step = make_train_step(accumulate(gradient(loss), microbatches), tx)
    return memory_use(lower_step(step, state, batch).compile(), state)


@pytest.mark.slow
def test_what_is_reckoned_is_near_what_the_compiler_says():
    use = use_of()
    boundaries = 4 * 32 * 64 * 32 * 4  # L B T D, float32
    found = {way.setting: way.after(use).total for way in ways(SETUP, 4, boundaries)}
    # Measured, of 36.2 MB: 26.2, 17.5, 10.8 and 17.3; reckoned 25.6, 18.6, 10.6 and 18.4.
    for setting, options in {
        "precision=bfloat16": {"precision": "bfloat16"},
        "microbatches=2": {"microbatches": 2},
        "remat=block, scan=True": {"remat": "block", "scan": True},
        "batch_size=16": {"batch_size": 16},
    }.items():
        assert found[setting] == pytest.approx(use_of(**options).total, rel=0.1), setting


def test_the_cheapest_that_fit_come_first():
    use = MemoryUse(10, 20, 10, 100, 0)
    found = ways(SETUP, 12, 5)
    chosen = cheapest(found, use, 115)
    assert [(way.setting, need) for way, need, _ in chosen] == [
        ("precision=bfloat16", 115),
        ("microbatches=2", 100),
        ("remat=block, scan=True", 53),
    ]
    assert all(fits for *_, fits in chosen)
    settings = [way.setting for way, _, _ in cheapest(found, use, 90)]
    assert settings == ["microbatches=4", "remat=block, scan=True", "batch_size=16"]
    # On eight devices the state can be divided; one that recomputes already is not told to.
    # Nor can pieces have fewer rows than there are devices.
    several = Setup(
        batch_size=64, microbatches=4, remat="block", scan=True, precision="bfloat16",
        optimizer="lion", moments="bfloat16", parts=1, rows=8, devices=8,
    )  # fmt: skip
    settings = [way.setting for way in ways(several, 12, 5)]
    lora = "low-rank adapters (fmjax.methods.lora)"
    assert settings == ["microbatches=8", "mesh=fsdp=8", "batch_size=32", lora]
    state = MemoryUse(100, 200, 100, 10, 0)
    (first, need, fits), *_ = cheapest(ways(several, 12, 5), state, 80)
    assert (first.setting, need, fits) == ("mesh=fsdp=8", 12 + 25 + 12 + 10, True)


def test_what_is_not_enough_alone_is_reckoned_together():
    use = MemoryUse(10, 20, 10, 100, 0)
    options = {"setup": SETUP, "layers": 12, "boundaries": 5}
    text = explanation("RESOURCE_EXHAUSTED: no room", use, limit=20, **options)
    assert text.count("alone is not enough") == 3
    assert re.search(r"all of them: about .* GB, still too much", text)
    assert "which fits alone" in explanation("no room", use, limit=200, **options)


def test_messages_name_bytes():
    assert said_bytes("Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.") == 20.5 * 2**30
    assert said_bytes("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 512 bytes") == 512
    assert said_bytes("it did not fit") == 0


def test_a_step_without_room_says_what_fills_it(tmp_path):
    """Real: attention over 2^18 positions has scores of 2^39 bytes a row."""
    length = 2**18
    model, variables = model_of(length)
    ids = np.ones((8, length), np.int32)
    stream = batches(Columns((), {"input_ids": ids, "labels": ids}), batch_size=8)
    settings = Training(output=tmp_path / "run", batch_size=8, epochs=1)
    with pytest.raises(MemoryError) as caught:
        train(
            settings,
            model,
            variables,
            masked_lm.loss(model),
            stream,
            evaluate=lambda state: {"loss": 0.0},
            metric="loss",
            mode="min",
            about={"source": "new", "data": {"source": "ones", "splits": {"train": 8}}},
        )
    text = str(caught.value)
    assert "RESOURCE_EXHAUSTED" in text
    assert "activations and temporaries: " in text
    needed = float(re.search(r"step needs ([\d.]+) GB", text)[1])
    assert needed > 2**39 / 1e9
    for words in (
        "remat=block, scan=True",
        "microbatches=2",
        "all of them: about",
        "still too much",
    ):
        assert words in text
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_a_compiler_that_refuses_is_believed(monkeypatch):
    """As on a TPU, whose compiler says how much it would have taken."""
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."

    def refused(*args, **options):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(memory_errors, "lower_step", refused)
    monkeypatch.setattr(memory_errors, "device_memory", lambda: 15.75 * 2**30)
    _, variables = model_of()
    state = jax.eval_shape(lambda: init_state(variables, adamw(1e-3), jax.random.key(0)))
    watched = memory_errors.Watched(refused)
    batch = {"input_ids": np.ones((32, 64), np.int32)}
    with (
        pytest.raises(MemoryError, match=r"step needs 22.01 GB") as caught,
        memory_errors.explained(watched, None, state, SETUP, None, None),
    ):
        watched(state, batch)
    for way in ("precision=bfloat16: about 15.4", "microbatches=2: about 11.0", "remat=block"):
        assert way in str(caught.value)
    assert "not enough" not in str(caught.value)
    # Other errors, and those before the first step, are not its.
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory_errors.explained(watched, None, state, SETUP, None, None),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_other_commands_say_it_in_a_line(monkeypatch, capsys):
    def refused(args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(cli, "generate", refused)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert cli.main(["generate", "model", "a text"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fmjax: the device has no room for this (RESOURCE_EXHAUSTED: Out of mem")
    assert "--dtype bfloat16" in said
