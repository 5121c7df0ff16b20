"""Text to image: losses by PyTorch's cross-entropy, and a model that learns what texts mean."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
import torch

import fmjax
from fmjax.models import dalle
from fmjax.tasks import text_to_image as task
from fmjax.train import gradient, init_state, jit_step, make_train_step

CONFIG = dataclasses.replace(
    dalle.VARIANTS["tiny"], text_vocab_size=11, dropout=0.0, initializer_range=0.3
)


def rows(codes, texts):
    ids = [dalle.padded_ids(CONFIG, texts), task.image_tokens(CONFIG, codes)]
    return np.concatenate(ids, axis=1)


def test_losses_are_cross_entropies_of_each_kind():
    model, variables = fmjax.create("dalle", CONFIG, head="causal_lm", rng=jax.random.key(0))
    codes = np.random.default_rng(0).integers(0, 7, (3, 3, 3))
    ids = rows(codes, [[1], [2, 3, 4, 5], [6, 7]])
    batch = {"input_ids": ids, "weight": np.float32([1, 1, 0])}
    value, aux = jax.jit(task.loss(model))(variables, batch, None)
    logits = torch.tensor(np.asarray(jax.jit(model.apply)(variables, ids).logits))
    cross = torch.nn.functional.cross_entropy
    # Of the text: nothing of the first row, whose second position is padding; 3, 4, 5 of the other.
    text = cross(logits[1, :3, :11], torch.tensor([3, 4, 5]))
    image = cross(logits[:2, 3:12, 15:].flatten(0, 1), torch.tensor(codes[:2].reshape(-1)))
    assert float(aux.metrics["text"].value) == pytest.approx(float(text), rel=1e-5)
    assert float(aux.metrics["text"].weight) == 3
    assert float(aux.metrics["image"].value) == pytest.approx(float(image), rel=1e-5)
    assert float(aux.metrics["image"].weight) == 18
    assert float(value) == pytest.approx(float(text / 8 + 7 * image / 8), rel=1e-5)
    assert float(aux.weight) == 2


@pytest.mark.slow
def test_pictures_are_what_their_texts_say():
    """A text of one token, the code that fills its picture but for the middle, which is free."""
    model, variables = fmjax.create("dalle", CONFIG, head="causal_lm", rng=jax.random.key(0))
    tx, rng = optax.adam(3e-3), np.random.default_rng(0)
    state = init_state(variables, tx, jax.random.key(0))
    step = jit_step(make_train_step(gradient(task.loss(model)), tx))

    def draw(count):
        words = rng.integers(0, 5, count)
        codes = np.tile(words[:, None, None], (1, 3, 3))
        codes[:, 1, 1] = rng.integers(5, 7, count)
        return words, codes

    for _ in range(500):
        words, codes = draw(16)
        state, _ = step(state, {"input_ids": rows(codes, [[word] for word in words])})
    words = np.arange(5)
    made = task.draw_codes(
        model, state.trainable, dalle.padded_ids(CONFIG, [[word] for word in words]),
        rng=jax.random.key(3), count=8,
    )  # fmt: skip
    assert made.shape == (5, 8, 3, 3)
    around = np.delete(made.reshape(5, 8, 9), 4, axis=-1)
    assert (around == words[:, None, None]).mean() > 0.9
    middle = made[:, :, 1, 1]
    assert np.isin(middle, (5, 6)).mean() > 0.9
    assert len(np.unique(middle)) == 2


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        task.loss(dalle.Model(CONFIG, head="causal_lm"), text_weight=1.5)
    with pytest.raises(ValueError, match="the model's have \\(3, 3\\)"):
        task.image_tokens(CONFIG, np.zeros((1, 2, 3), int))
    with pytest.raises(ValueError, match="codes go from 0 to 7"):
        task.image_tokens(CONFIG, np.arange(9).reshape(1, 3, 3) % 8)
