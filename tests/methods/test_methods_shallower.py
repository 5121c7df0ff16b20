"""Students of a teacher's layers: the layers themselves, in any family, scanned or not."""

import dataclasses

import jax
import numpy as np
import pytest

import fmjax
from fmjax.methods.shallower import student_of
from fmjax.models import albert, bart, bert, gpt2, qwen2
from fmjax.tree import flatten, stack_layers, unstack_layers

CONFIG = bert.Config(
    vocab_size=20, hidden_size=8, num_hidden_layers=4, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=8,
)  # fmt: skip


def test_every_second_layer_runs_as_before(rng):
    model, variables = fmjax.create("bert", CONFIG, head="sequence_classification", rng=rng)
    student, kept = student_of(model, variables, (0, 2))
    assert student.config == dataclasses.replace(CONFIG, num_hidden_layers=2)
    flat, teacher = flatten(kept), flatten(variables)
    for path, leaf in flat.items():
        assert leaf is teacher[path.replace("layers_1", "layers_2")], path
    assert len(teacher) - len(flat) == 2 * sum("layers_0" in path for path in flat)
    # All layers are the teacher, and so are those whose neighbours do nothing.
    same, whole = student_of(model, variables, range(4))
    assert same.config == model.config
    jax.tree.map(np.testing.assert_array_equal, whole, variables)
    scanned, stacked = student_of(model.clone(scan=True), stack_layers(variables), (0, 2))
    assert scanned.scan
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), kept)
    ids = np.arange(12).reshape(2, 6)
    expected = jax.jit(student.apply)(kept, ids).logits
    np.testing.assert_allclose(jax.jit(scanned.apply)(stacked, ids).logits, expected, atol=1e-6)


@pytest.mark.slow
def test_other_families(rng):
    config = gpt2.Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=3, n_head=2)
    model, variables = fmjax.create("gpt2", config, head="causal_lm", rng=rng)
    student, kept = student_of(model, variables, (0, 2))
    assert student.config.n_layer == 2
    assert kept["params"]["layers_1"] == variables["params"]["layers_2"]
    config = dataclasses.replace(bart.VARIANTS["tiny"], decoder_layers=2)
    model, variables = fmjax.create("bart", config, head="seq2seq_lm", rng=rng)
    student, kept = student_of(model, variables, (1,), stack="decoder/")
    assert student.config == dataclasses.replace(config, decoder_layers=1)
    below = kept["params"]["decoder"]["layers_0"]
    assert below == variables["params"]["decoder"]["layers_1"]
    kinds = ("full_attention", "full_attention", "sliding_attention")
    config = dataclasses.replace(
        qwen2.VARIANTS["tiny"], num_hidden_layers=3, layer_types=kinds, use_sliding_window=True
    )
    model, variables = fmjax.create("qwen2", config, head="causal_lm", rng=rng)
    student, _ = student_of(model, variables, (0, 2))
    assert student.config.layer_types == (kinds[0], kinds[2])
    plain = model.clone(config=dataclasses.replace(config, layer_types=None))
    with pytest.raises(ValueError, match="layer_types is None"):
        student_of(plain, variables, (0, 2))


def test_refusals(rng):
    model, variables = fmjax.create("bert", CONFIG, rng=rng)
    for layers in ((), (2, 1), (0, 4), (1, 1)):
        with pytest.raises(ValueError, match=r"increasing numbers of 0\.\.3"):
            student_of(model, variables, layers)
    with pytest.raises(ValueError, match="bert has no layers params/decoder/layers_0"):
        student_of(model, variables, (0,), stack="decoder/")
    with pytest.raises(ValueError, match="stack is 'middle'"):
        student_of(model, variables, (0,), stack="middle")
    shared, its = fmjax.create("albert", albert.VARIANTS["tiny"], rng=rng)
    with pytest.raises(ValueError, match="albert has no layers"):
        student_of(shared, its, (0,))
