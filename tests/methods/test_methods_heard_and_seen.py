"""Methods on models that hear or see: what is theirs alone, beside the rows of `compositions`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compositions_captions import described, describes, looked_at, looks
from compositions_speech import frames, hears, judged, sounds, writes
from made_up import B, made, named_pictures

from fmjax.methods.ensembles import member_state, member_states, member_step
from fmjax.methods.grpo import grpo_loss, grpo_prepare
from fmjax.methods.membership import example_losses
from fmjax.methods.partly_labelled import pooled
from fmjax.methods.policy_gradient import response_scores
from fmjax.methods.preference import (
    dpo_loss,
    pair_rows,
    sequence_log_probs,
    with_reference,
)
from fmjax.methods.sampled_responses import Prompts, Sampling, learn, make_rollout, make_update
from fmjax.tasks import ctc, image_text, seq2seq
from fmjax.tasks.feature_extraction import encoder, pool
from fmjax.train import gradient, init_state, make_train_step


@pytest.mark.slow
def test_vectors_of_sounds_and_regions_are_without_padding():
    """Frames are fewer than the samples of the mask, and words with regions more than its words."""
    model, variables = hears("model")
    batch = {name: sounds()[name] for name in ("input_values", "attention_mask")}
    vectors, _ = encoder(model)(variables, batch, None, train=False)
    alone = {name: leaf[-1:, :64] for name, leaf in batch.items()}
    vector, _ = encoder(model)(variables, alone, None, train=False)
    np.testing.assert_allclose(vectors[-1:], vector, atol=1e-5)

    model, variables = looks("visual_reasoning")
    shown = {name: leaf for name, leaf in looked_at().items() if name not in ("labels", "weight")}
    out = model.apply(variables, **shown, output_hidden_states=True)
    alone = {name: leaf[:1] for name, leaf in shown.items()}
    assert alone["visual_attention_mask"][0, -1] == 0
    for name in ("visual_embeds", "visual_attention_mask"):
        alone[name] = alone[name][:, :2]
    one = model.apply(variables, **alone, output_hidden_states=True)
    read = pooled().read
    np.testing.assert_allclose(read(out, shown)[:1], read(one, alone), atol=1e-5)
    with pytest.raises(ValueError, match="have no mask"):
        pool(jnp.ones((2, 3, 4)), jnp.ones((2, 7)), "mean")


def test_pairs_of_transcripts_share_their_sound():
    model, variables = writes()
    batch = judged()
    rows = pair_rows(batch)
    np.testing.assert_array_equal(rows["input_features"][1], batch["input_features"][0])
    np.testing.assert_array_equal(rows["labels"][2], batch["chosen_labels"][1])
    got = sequence_log_probs(model)(variables, rows, None)
    for side, found in (("chosen", got.log_probs[0::2]), ("rejected", got.log_probs[1::2])):
        labels = batch[f"{side}_labels"]
        read = np.concatenate([np.ones((B, 1), int), labels[:, :-1]], axis=1)
        logits = model.apply(
            variables, input_features=batch["input_features"], decoder_input_ids=read
        ).logits
        each = np.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        np.testing.assert_allclose(found, each.sum(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(got.tokens, 4.0)
    loss, aux = dpo_loss(model)(with_reference(variables), batch, None)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert float(aux.weight) == B
    for wrong in ({"chosen_labels": labels, "rejected_labels": labels}, {**batch, "chosen_x": 1}):
        with pytest.raises(ValueError, match="a batch of pairs needs"):
            pair_rows(wrong)


@pytest.mark.slow
def test_transcripts_are_drawn_and_rewarded():
    """GRPO on a model that hears: what is drawn has the probabilities of a plain pass, and the
    symbol that is worth something becomes frequent."""
    model, variables = writes()
    sampling = Sampling(prompt_length=1, max_new_tokens=5, group_size=4, eos_token_id=2)
    rollout = make_rollout(model, sampling)
    prompts = Prompts(sources={"input_features": frames()["input_features"]})
    drawn = rollout(with_reference(variables), prompts, jax.random.key(1))
    assert drawn["input_features"].shape[0] == 4 * B
    np.testing.assert_array_equal(drawn["input_features"][3], prompts.sources["input_features"][0])
    real = np.asarray(drawn["response_mask"]) == 1
    labels = np.where(real, np.asarray(drawn["decoder_input_ids"])[:, 1:], -100)
    assert 0 < real.sum() < real.size
    again = {"input_features": drawn["input_features"], "labels": labels}
    expected = np.asarray(seq2seq.predict(model)(variables, again))
    np.testing.assert_allclose(drawn["log_probs"] * real, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        drawn["reference_log_probs"], drawn["log_probs"], rtol=1e-5, atol=1e-6
    )

    def reward(examples, texts):
        return [text.count("5") / max(len(text), 1) for text in texts]

    seen = []
    tx = optax.adam(1e-2)
    state = init_state(with_reference(variables), tx, jax.random.key(0))
    learn(
        state,
        itertools.repeat(prompts),
        rollout=rollout,
        reward=reward,
        update=make_update(make_train_step(gradient(grpo_loss(model)), tx), grpo_prepare(4)),
        decode=lambda tokens: "".join(map(str, tokens)),
        iterations=12,
        hook=lambda turn: seen.append(turn.metrics["reward"]),
    )
    assert np.mean(seen[-3:]) > np.mean(seen[:3]) + 0.1, seen
    with pytest.raises(ValueError, match="prompt_length=2"):
        make_rollout(model, Sampling(prompt_length=2, max_new_tokens=3))(
            variables, prompts, jax.random.key(0)
        )


@pytest.mark.slow
def test_captions_are_scored_as_they_are_taught():
    model, variables = describes()
    batch = described()
    labels = batch.pop("labels")
    batch["decoder_input_ids"] = np.concatenate([np.ones((B, 1), int), labels], axis=1)
    batch["response_mask"] = np.ones(labels.shape)
    found = response_scores(model, temperature=1.0)(variables, batch)
    expected = seq2seq.predict(model)(variables, described())
    np.testing.assert_allclose(found.log_probs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sounds", "pictures and texts"])
def test_programs_around_steps_take_any_task(kind):
    """Members of an ensemble train as alone, and losses are each example's own."""
    if kind == "sounds":
        model, variables = hears("ctc")
        loss, batch = ctc.loss(model, train=False), sounds()
    else:
        model, variables = made("clip", "model")
        loss, batch = image_text.loss(model, train=False), named_pictures()
    tx = optax.sgd(0.1)

    def begin(rng):
        keys = iter(jax.random.split(rng, len(jax.tree.leaves(variables))))
        moved = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(next(keys), x.shape), variables)
        return init_state(moved, tx, rng)

    keys = jax.random.split(jax.random.key(3), 2)
    step = make_train_step(gradient(loss), tx)
    states, alone = member_states(begin, keys), begin(keys[1])
    together = jax.jit(member_step(step))
    for _ in range(3):
        states, _ = together(states, batch)
        alone, _ = jax.jit(step)(alone, batch)
    pairs = zip(
        jax.tree.leaves(member_state(states, 1).trainable), jax.tree.leaves(alone.trainable),
        strict=True,
    )  # fmt: skip
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if kind == "sounds":  # pictures and texts are compared with each other: no example has a loss
        found = example_losses(loss)(variables, batch)
        each = [
            loss(variables, {n: x[i : i + 1] for n, x in batch.items()}, None)[0] for i in (0, 5)
        ]
        np.testing.assert_allclose(np.asarray(found)[[0, 5]], each, rtol=1e-4)
