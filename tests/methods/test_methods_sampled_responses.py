"""Rollouts, GRPO and PPO on tiny models: what was drawn, two programs, and that rewards rise."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import fmjax
from fmjax.methods import lora
from fmjax.methods.grpo import grpo_loss, grpo_prepare
from fmjax.methods.policy_gradient import response_scores
from fmjax.methods.ppo_language import (
    CONTROL,
    critic,
    ppo_loss,
    ppo_prepare,
    save,
    trained_of,
    with_critic,
)
from fmjax.methods.preference import with_reference
from fmjax.methods.sampled_responses import (
    Prompts,
    Sampling,
    checked_rewards,
    learn,
    make_rollout,
    make_update,
    response_texts,
)
from fmjax.models import gpt2
from fmjax.perf.timing import compile_events
from fmjax.train import gradient, init_state, make_train_step
from fmjax.tree import flatten

V, EOS = 19, 3
CONFIG = gpt2.Config(
    vocab_size=V, n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3,
)  # fmt: skip
SAMPLING = Sampling(
    prompt_length=5, max_new_tokens=8, group_size=4, temperature=0.7, eos_token_id=EOS
)
IDS = np.array([[0, 0, 4, 5, 6], [7, 8, 9, 10, 11], [0, 12, 13, 14, 15]])
PROMPTS = Prompts(IDS, (IDS != 0).astype(np.int32), ["a", "b", "c"])


@pytest.fixture(scope="module")
def policy():
    """A scanned model and its variables; the reference is another one."""
    model, variables = fmjax.create(
        "gpt2", CONFIG, head="causal_lm", rng=jax.random.key(0), scan=True
    )
    _, other = fmjax.create("gpt2", CONFIG, head="causal_lm", rng=jax.random.key(1), scan=True)
    return model, {**variables, "reference": other}


@pytest.fixture(scope="module")
def drawn(policy):
    model, variables = policy
    return make_rollout(model, SAMPLING)(variables, PROMPTS, jax.random.key(2))


def decode(tokens):
    return " ".join(map(str, tokens))


def test_log_probs_are_those_of_the_generation(policy, drawn):
    """The same draws as `fmjax.generate`, and the log-probabilities of its processed logits."""
    model, variables = policy
    out = fmjax.generate(
        model, {"params": variables["params"]}, IDS, attention_mask=PROMPTS.attention_mask,
        max_new_tokens=8, do_sample=True, top_k=0, temperature=0.7, eos_token_id=EOS,
        pad_token_id=0, num_return_sequences=4, rng=jax.random.key(2), output_scores=True,
    )  # fmt: skip
    np.testing.assert_array_equal(drawn["input_ids"][:, 5:], out.tokens)
    mask = np.asarray(drawn["response_mask"])
    np.testing.assert_array_equal(mask.sum(axis=1), out.lengths)
    assert 0 < out.lengths.min() < out.lengths.max() <= 8  # some ended early
    np.testing.assert_array_equal(drawn["finished"], [EOS in row for row in out.tokens])
    log_p = np.asarray(jax.nn.log_softmax(out.step_scores))
    picked = np.take_along_axis(log_p, out.tokens[..., None], axis=2)[..., 0]
    # Both are float32 sums in another order; measured 3e-6.
    np.testing.assert_allclose(drawn["log_probs"] * mask, picked * mask, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_log_probs_are_those_of_a_plain_forward_pass(policy, drawn):
    """Of the row without its padding, logits over the temperature; the reference's too."""
    model, variables = policy
    for name, params in (
        ("log_probs", variables["params"]),
        ("reference_log_probs", variables["reference"]["params"]),
    ):
        for row in (0, 5):
            mask = np.asarray(drawn["attention_mask"][row]) == 1
            ids = np.asarray(drawn["input_ids"][row])[mask]
            logits = model.apply({"params": params}, input_ids=ids[None]).logits[0]
            log_p = np.asarray(jax.nn.log_softmax(logits / 0.7))
            count = int(drawn["response_mask"][row].sum())
            expected = [log_p[t - 1, ids[t]] for t in range(len(ids) - count, len(ids))]
            np.testing.assert_allclose(drawn[name][row, :count], expected, rtol=1e-4, atol=1e-5)


def test_texts_have_no_end(drawn):
    for text, row, mask in zip(
        response_texts(drawn, decode), drawn["input_ids"], drawn["response_mask"], strict=True
    ):
        tokens = np.asarray(row)[5:][np.asarray(mask) == 1].tolist()
        assert text == decode(tokens[:-1] if EOS in tokens else tokens)


def test_on_policy_gradients(policy, drawn):
    """At ratio 1 the gradient is that of -A log p; equal rewards give none."""
    model, variables = policy
    rewards = jnp.arange(12.0) % 5

    def slope(loss, batch):
        return jax.jit(jax.grad(lambda p: loss({**variables, "params": p}, batch, None)[0]))(
            variables["params"]
        )

    loss = grpo_loss(model, kl_weight=0.0, temperature=0.7)
    prepare = grpo_prepare(4)
    batch = prepare(variables, drawn, rewards).batch
    score = response_scores(model, temperature=0.7)

    def plain(variables, batch, rng):
        mask = batch["response_mask"]
        mean = (score(variables, batch).log_probs * mask).sum(axis=1) / mask.sum(axis=1)
        return -jnp.mean(mean * batch["advantages"]), None

    got, want = jax.tree.leaves(slope(loss, batch)), jax.tree.leaves(slope(plain, batch))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)
    equal = prepare(variables, drawn, jnp.ones(12)).batch
    for leaf in jax.tree.leaves(slope(loss, equal)):
        assert (np.asarray(leaf) == 0).all()
    value, aux = jax.jit(loss)(variables, batch, None)
    assert abs(value) < 1e-5  # advantages of a group add up to 0, and so do means of ratios of 1
    assert aux.metrics["clipped"].value == 0
    # The divergence is that of k3, weighed and in the metrics.
    near = grpo_loss(model, kl_weight=0.5, temperature=0.7)
    more, aux = jax.jit(near)(variables, {**batch, "advantages": jnp.zeros(12)}, None)
    difference = drawn["reference_log_probs"] - drawn["log_probs"]
    k3 = np.exp(difference) - difference - 1
    mask = drawn["response_mask"]
    np.testing.assert_allclose(more, 0.5 * ((k3 * mask).sum(1) / mask.sum(1)).mean(), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["kl"].value, (k3 * mask).sum() / mask.sum(), rtol=1e-4)


def large_numbers(examples, texts):
    """What responses are worth in these tests: the share of 8 tokens that are above 9."""
    assert len(examples) == len(texts)
    return [sum(int(token) > 9 for token in text.split()) / 8 for text in texts]


def run_turns(state, rollout, update, turns):
    """Rewards by turn and the last state."""
    found = []
    state = learn(
        state, itertools.repeat(PROMPTS), rollout=rollout, reward=large_numbers, update=update,
        decode=decode, iterations=turns, hook=found.append,
    )  # fmt: skip
    return state, found


def test_grpo_learns_in_two_programs(policy):
    """Compiled once each over several turns; the reference stays; rewards rise."""
    model, variables = policy
    variables = with_reference({"params": jax.tree.map(jnp.copy, variables["params"])})
    reference = jax.tree.map(np.asarray, variables["reference"])
    tx = optax.adam(1e-2)
    step = make_train_step(gradient(grpo_loss(model, temperature=0.7)), tx)
    update = make_update(chex.assert_max_traces(step, 1), grpo_prepare(4), epochs=2, minibatches=2)
    state = init_state(variables, tx, jax.random.key(0))
    rollout = make_rollout(model, SAMPLING)
    state, found = run_turns(state, rollout, update, 1)
    with compile_events() as events:
        state, more = run_turns(state, rollout, update, 7)
    assert events.compilations == 0
    assert int(state.step) == 8 * 4
    rewards = [turn.metrics["reward"] for turn in [*found, *more]]
    assert np.mean(rewards[-3:]) > rewards[0] + 0.2, rewards
    assert all(turn.metrics["kl"] > 0 for turn in more)
    chex.assert_trees_all_equal(
        jax.tree.map(np.asarray, state.non_trainable["reference"]), reference
    )
    assert more[0].texts != more[1].texts


def test_ppo_learns_and_saves_its_critic(policy, tmp_path):
    model, variables = policy
    plain = {"params": jax.tree.map(jnp.copy, variables["params"])}
    variables = with_critic(model, plain, kl_coefficient=0.05)
    tx = optax.adam(1e-2)
    step = make_train_step(gradient(ppo_loss(model, temperature=0.7)), tx)
    update = make_update(
        chex.assert_max_traces(step, 1), ppo_prepare(target_kl=3.0), epochs=2, minibatches=2
    )
    state = init_state(variables, tx, jax.random.key(0), trained_of(variables))
    state, found = run_turns(state, make_rollout(model, SAMPLING, beside=critic), update, 8)
    rewards = [round(turn.metrics["reward"], 3) for turn in found]
    assert np.mean(rewards[-3:]) > rewards[0] + 0.2, rewards
    assert found[0].metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert found[0].metrics["kl_coefficient"] == pytest.approx(0.05)
    assert state.non_trainable[CONTROL]["coefficient"] != pytest.approx(0.05)
    trained = {**state.trainable, **state.non_trainable}
    folder = save(tmp_path / "policy", model, trained)
    loaded, weights = fmjax.load(folder, scan=True)
    assert loaded.config == model.config
    chex.assert_trees_all_equal(weights["params"], state.trainable["params"])
    head = load_file(folder / "value_head.safetensors")
    assert head["kernel"].shape == (16, 1)
    np.testing.assert_array_equal(head["kernel"], state.trainable["value_head"]["kernel"])


@pytest.mark.parametrize("own", ["params", "adapters"])
def test_what_ppo_trains(own):
    """Adapters alone where there are some: the model without them is the reference."""
    model = gpt2.Model(CONFIG, head="causal_lm")
    inputs = gpt2.inputs(CONFIG, "causal_lm")
    variables = jax.eval_shape(model.init, jax.random.key(0), **inputs)
    plain = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), variables)
    if own == "adapters":
        plain = lora.add(plain, jax.random.key(0), rank=1, alpha=1.0)
    variables = with_critic(model, plain)
    trained = filter(trained_of(variables), flatten(variables))
    assert {path.partition("/")[0] for path in trained} == {own, "value_head"}


def test_ppo_losses_are_their_formulas(policy, drawn):
    """Rewards with the penalty, and both clipped losses, in numpy."""
    model, variables = policy
    variables = with_critic(model, {"params": variables["params"]}, kl_coefficient=0.3)
    draw = np.random.default_rng(0)
    values = draw.normal(size=(12, 8)).astype(np.float32)
    rewards = draw.normal(size=12).astype(np.float32)
    mask = np.asarray(drawn["response_mask"])
    made = ppo_prepare(target_kl=1.0)(variables, {**drawn, "values": values}, rewards)
    away = np.asarray((drawn["log_probs"] - drawn["reference_log_probs"]) * mask)
    np.testing.assert_allclose(made.metrics["kl"].value, away.sum(1).mean(), rtol=1e-4)
    returns = np.zeros((12, 8))
    for row in range(12):
        advantage, count = 0.0, int(mask[row].sum())
        for t in reversed(range(count)):
            reward = -0.3 * away[row, t] + (rewards[row] if t == count - 1 else 0)
            after = values[row, t + 1] if t + 1 < count else 0
            advantage = reward + after - values[row, t] + 0.95 * advantage
            returns[row, t] = advantage + values[row, t]
    np.testing.assert_allclose(made.batch["returns"], returns, rtol=1e-3, atol=1e-4)
    # The critic is all zeros: its values are 0 now, and were `values`.
    batch = {**made.batch, "log_probs": drawn["log_probs"] + 0.5 * draw.normal(size=(12, 8))}
    loss, aux = ppo_loss(model, temperature=0.7, value_clip=0.4)(variables, batch, None)
    ratio = np.exp(np.asarray(drawn["log_probs"]) - batch["log_probs"])
    gain = np.asarray(batch["advantages"])
    policy_loss = -np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
    near = values + np.clip(-values, -0.4, 0.4)
    value_loss = 0.5 * np.maximum(returns**2, (near - returns) ** 2)
    mean = lambda x: (x * mask).sum() / mask.sum()  # noqa: E731
    np.testing.assert_allclose(aux.metrics["policy_loss"].value, mean(policy_loss), rtol=1e-4)
    np.testing.assert_allclose(aux.metrics["value_loss"].value, mean(value_loss), rtol=1e-3)
    np.testing.assert_allclose(loss, mean(policy_loss) + 0.1 * mean(value_loss), rtol=1e-3)


def test_what_does_not_fit_is_refused(policy, drawn):
    model, variables = policy
    with pytest.raises(ValueError, match=r"prompt_length=0 .*max_new_tokens=0 .*temperature=0"):
        Sampling(prompt_length=0, max_new_tokens=0, temperature=0)
    with pytest.raises(ValueError, match="26 positions, more than the model's 24"):
        make_rollout(model, Sampling(prompt_length=16, max_new_tokens=10))
    with pytest.raises(ValueError, match="does not generate"):
        make_rollout(model.clone(head="model"), SAMPLING)
    rollout = make_rollout(model, SAMPLING)
    long = Prompts(np.ones((2, 7), int), np.array([[0] * 4 + [1] * 3, [1] * 7]))
    with pytest.raises(ValueError, match=r"the prompts \[1\] have up to 7 tokens"):
        rollout(variables, long, jax.random.key(0))
    for rows in (PROMPTS, Prompts(sources={"pixel_values": np.zeros((3, 2))})):
        few = rows._replace(examples=["a"])
        with pytest.raises(ValueError, match="1 examples for 3 prompts"):
            rollout(variables, few, jax.random.key(0))
    with pytest.raises(ValueError, match=r"response 1 \('x'\) has nan"):
        checked_rewards([1.0, np.nan], ["a", "x"])
    with pytest.raises(ValueError, match=r"an array \(1,\) for 2 responses"):
        checked_rewards([1.0], ["a", "x"])
    empty = {**drawn, "response_mask": drawn["response_mask"].at[3].set(0)}
    with pytest.raises(ValueError, match=r"responses \[3\] are empty"):
        response_texts(empty, decode)
    with pytest.raises(ValueError, match="epochs=0"):
        make_update(lambda state, batch: (state, {}), grpo_prepare(4), epochs=0)
    without = {name: leaf for name, leaf in drawn.items() if name != "reference_log_probs"}
    with pytest.raises(ValueError, match="needs reference_log_probs"):
        grpo_loss(model)(variables, {**without, "advantages": jnp.ones(12)}, None)
    values = {"values": jnp.zeros((12, 8)), "returns": jnp.zeros((12, 8))}
    with pytest.raises(ValueError, match="no 'value_head'; make them by with_critic"):
        ppo_loss(model)(variables, {**drawn, "advantages": jnp.ones((12, 8)), **values}, None)
    with pytest.raises(ValueError, match=r"no \['values'\]"):
        ppo_prepare()(variables, drawn, jnp.ones(12))
    state = init_state({"params": variables["params"]}, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="the prompts ended before turn 1 of 2"):
        learn(
            state, iter([]), rollout=rollout, reward=large_numbers,
            update=lambda *_: (state, {}), decode=decode, iterations=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="1 examples for 3 prompts"):
        learn(
            state, iter([few._replace(input_ids=IDS)]), rollout=lambda *_: drawn,
            reward=large_numbers, update=lambda *_: (state, {}), decode=decode, iterations=1,
        )  # fmt: skip
    step = make_train_step(gradient(grpo_loss(model)), optax.sgd(0.1))
    update = make_update(step, grpo_prepare(4), minibatches=5)
    with pytest.raises(ValueError, match="12 rows do not divide into 5 minibatches"):
        update(state, drawn, np.ones(12))
