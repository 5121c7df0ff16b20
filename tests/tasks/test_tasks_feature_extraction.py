import jax
import numpy as np
import pytest

import fmjax
from fmjax.models.bert import Config
from fmjax.tasks.feature_extraction import embed

CONFIG = Config(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=16,
)


@pytest.fixture(scope="module")
def model_and_batch():
    model, variables = fmjax.create("bert", CONFIG, rng=jax.random.key(0))
    mask = np.ones((3, 7), np.int32)
    mask[1, 4:] = 0
    ids = np.random.default_rng(0).integers(1, 40, (3, 7))
    return model, variables, {"input_ids": ids, "attention_mask": mask}


def test_poolings(model_and_batch):
    model, variables, batch = model_and_batch
    out = model.apply(variables, **batch)
    hidden, keep = np.asarray(out.last_hidden_state), batch["attention_mask"].astype(bool)
    expected = {
        "mean": np.stack([h[k].mean(axis=0) for h, k in zip(hidden, keep, strict=True)]),
        "max": np.stack([h[k].max(axis=0) for h, k in zip(hidden, keep, strict=True)]),
        "cls": hidden[:, 0],
        "pooler": np.asarray(out.pooler_output),
    }
    for pooling, vectors in expected.items():
        ours = embed(model, pooling=pooling)(variables, batch)
        np.testing.assert_allclose(ours, vectors, atol=1e-6)
        unit = embed(model, pooling=pooling, normalize=True)(variables, batch)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1.0, rtol=1e-5)


def test_what_cannot_be_pooled_is_named(model_and_batch):
    model, _, batch = model_and_batch
    with pytest.raises(ValueError, match="'median'"):
        embed(model, pooling="median")
    bare, weights = fmjax.create("bert", CONFIG, head="masked_lm", rng=jax.random.key(0))
    with pytest.raises(ValueError, match='head="model"'):
        embed(bare)(weights, batch)
