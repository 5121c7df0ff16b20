"""The loop of reinforcement learning of language models, in two compiled programs.

One program draws responses and scores them (`make_rollout`). On the host a function of the texts
says what they are worth. The other program (`make_update`) makes advantages of that and runs the
ordinary train step over some epochs of minibatches. `learn` is the loop round them.

    step = make_train_step(gradient(grpo_loss(model)), tx)
    state = learn(
        init_state(with_reference(variables), tx, jax.random.key(0)),
        prompts,
        rollout=make_rollout(model, sampling),
        reward=lambda examples, texts: [...],
        update=make_update(step, grpo_prepare(sampling.group_size), minibatches=4),
        decode=tokenizer.decode,
        iterations=100,
    )
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.generate.forward import Prompt
from fmjax.generate.inputs import decoder_positions, is_encoder_decoder, make_plan
from fmjax.generate.sampling import Temperature
from fmjax.generate.search import go_on, start
from fmjax.generate.state import Controls
from fmjax.generation_config import GenerationConfig
from fmjax.methods.policy_gradient import Scores, response_scores, token_weights
from fmjax.methods.preference import policy_of, reference_of
from fmjax.tasks.vocabulary_loss import CHUNK_SIZE
from fmjax.tree import merge, override
from fmjax.types import Batch, Mean, StepFn, TrainState, Variables

ATTACHES = ("program",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn: from the policy itself, at a temperature.

    Cuts of the tail (top-k, top-p) are not offered: the ratio of probabilities, which the losses
    are made of, would be that of another distribution than was drawn from.

    Args:
        prompt_length: P, the columns of prompts; shorter ones are padded on the left. Of
            encoder-decoders, how many tokens the decoder starts with.
        max_new_tokens: N.
        group_size: G, responses to each prompt.
        temperature: divides the logits, in the losses too.
        eos_token_id: ends a response; None ends none before N tokens.
        pad_token_id: what follows the end.

    Raises:
        ValueError: numbers out of range.
    """

    prompt_length: int
    max_new_tokens: int
    group_size: int = 1
    temperature: float = 1.0
    eos_token_id: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be at least 1"
            for name, value in dataclasses.asdict(self).items()
            if name in ("prompt_length", "max_new_tokens", "group_size") and value < 1
        ]
        if not self.temperature > 0:
            problems.append(f"temperature={self.temperature} must be positive")
        if problems:
            raise ValueError("sampling: " + "; ".join(problems))


class Prompts(NamedTuple):
    """B prompts.

    Args:
        input_ids: int [B, P'], padded on the left, P' at most `Sampling.prompt_length`; what an
            encoder reads is padded on the right, and None where it reads none.
        attention_mask: [B, P'], 1 = token; None is everything but the padding token.
        examples: B things that the reward reads beside a response, such as the right answer, or
            none.
        sources: what an encoder reads that reads no tokens, such as ``pixel_values``, by name.
        decoder_input_ids: int [B, P], what the decoder of an encoder-decoder starts with; None is
            the config's ``decoder_start_token_id``.
    """

    input_ids: Any = None
    attention_mask: Any = None
    examples: Sequence[Any] = ()
    sources: Mapping[str, Any] = MappingProxyType({})
    decoder_input_ids: Any = None

    def check(self) -> None:
        """Refuses examples that are not one for each prompt.

        Raises:
            ValueError: there are some, and not B.
        """
        given = (self.input_ids, *self.sources.values())
        rows = len(next((x for x in given if x is not None), self.examples))
        if len(self.examples) not in (0, rows):
            raise ValueError(f"there are {len(self.examples)} examples for {rows} prompts")


Rollout = Callable[[Variables, Prompts, Array], dict[str, Array]]
"""(variables, prompts, rng) -> a batch of R = B * G rows; see `make_rollout`."""
Reward = Callable[[Sequence[Any], Sequence[str]], Sequence[float] | np.ndarray]
"""(R examples, R texts) -> R rewards, on the host."""


class Prepared(NamedTuple):
    """What an update trains on.

    Args:
        batch: arrays with leading axis R.
        updates: new values of leaves that do not train.
        metrics: means to log.
    """

    batch: Batch
    updates: Variables
    metrics: dict[str, Mean]


Prepare = Callable[[Variables, Batch, Array], Prepared]
"""(variables, rollout, rewards [R]) -> Prepared: what a method makes of rewards."""


def make_rollout(
    model: Any,
    sampling: Sampling,
    *,
    beside: Callable[[Variables, Scores], Mapping[str, Array]] | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> Rollout:
    """The program that draws: ``(variables, prompts, rng) -> batch``, compiled once for a B.

    The batch is one of `fmjax.methods.policy_gradient` and has ``finished`` bool [R], whether a
    response came to its end. Log-probabilities are those of one forward pass over what was drawn,
    the same function as in the losses: before the first step all ratios are 1. Those of the
    reference are there if the variables have one (`fmjax.methods.preference.reference_of`).

    Args:
        model: a decoder with the head ``causal_lm``, or an encoder-decoder with ``seq2seq_lm``.
        sampling: how to draw.
        beside: what else to keep of the policy's scores, [R, N] each.
        chunk_size: see `response_scores`.

    Raises:
        ValueError: a model that does not generate, or too few positions; when called, prompts that
            are too long or that generation refuses, or examples that are not one for each.
    """
    both = is_encoder_decoder(model)
    length, count = sampling.prompt_length, sampling.max_new_tokens
    positions = decoder_positions(model)
    if positions is not None and length + count > positions:
        raise ValueError(
            f"prompt_length={length} and max_new_tokens={count} are {length + count} positions, "
            f"more than the model's {positions}; make one of them smaller"
        )
    config = GenerationConfig(
        max_new_tokens=count,
        eos_token_id=sampling.eos_token_id,
        pad_token_id=sampling.pad_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id if both else None,
    )
    score = response_scores(model, temperature=sampling.temperature, chunk_size=chunk_size)

    @jax.jit
    def program(variables: Variables, prompt: Prompt, rng: Array) -> Batch:
        policy = policy_of(variables)
        controls = Controls(
            (Temperature(jnp.float32(sampling.temperature)),),
            np.array(config.eos, np.int32),
            np.array(config.pad, np.int32),
            None,
            rng,
        )
        limit, rows = jnp.int32(count), len(prompt.tokens)
        carry, context = start(
            model,
            policy,
            prompt,
            controls,
            limit,
            jnp.zeros(rows, jnp.int32),
            capacity=length + count,
            repeats=sampling.group_size,
        )
        carry = go_on(model, policy, carry, context, controls, limit)
        drawn = jnp.arange(count) < carry.lengths[:, None]  # [R, N]
        batch: dict[str, Array] = {
            "response_mask": drawn.astype(jnp.float32),
            "finished": carry.finished,
        }
        if both:
            assert prompt.encoder_inputs is not None  # the plan has made them
            read = dict(prompt.encoder_inputs)
            if prompt.encoder_mask is not None:
                read["attention_mask"] = prompt.encoder_mask
            batch |= {name: jnp.repeat(x, sampling.group_size, axis=0) for name, x in read.items()}
            batch["decoder_input_ids"] = carry.state.tokens
        else:
            real = jnp.arange(length) >= carry.state.padding[:, None]  # [R, P]
            batch["input_ids"] = carry.state.tokens
            batch["attention_mask"] = jnp.concatenate([real, drawn], axis=1).astype(jnp.int32)
        found = score(policy, batch)
        batch["log_probs"] = found.log_probs
        if (reference := reference_of(variables)) is not None:
            batch["reference_log_probs"] = score(reference, batch).log_probs
        if beside is not None:
            batch |= beside(variables, found)
        return batch

    def rollout(variables: Variables, prompts: Prompts, rng: Array) -> dict[str, Array]:
        prompts.check()
        plan = make_plan(
            model,
            policy_of(variables),
            config,
            {"max_new_tokens": count},
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            sources=prompts.sources,
            decoder_input_ids=prompts.decoder_input_ids,
        )
        width, rows = plan.prefix.shape[1], len(plan.prefix)
        longest = width - int(plan.padding.min())
        if longest > length:
            long = np.flatnonzero(width - plan.padding > length).tolist()
            raise ValueError(
                f"the prompts {long} have up to {longest} tokens, more than "
                f"prompt_length={length}; cut them, or set it higher"
            )
        if both and width < length:
            raise ValueError(
                f"the decoder starts with {width} tokens, and prompt_length={length}; it must be "
                "as many: an encoder-decoder's has no padding"
            )
        tokens = np.zeros((rows, length), np.int32)
        tokens[:, max(length - width, 0) :] = plan.prefix[:, max(width - length, 0) :]
        padding = plan.padding + (length - width)
        return dict(program(variables, plan.prompt._replace(tokens=tokens, padding=padding), rng))

    return rollout


def rollout_metrics(rollout: Batch, rewards: Array) -> dict[str, Mean]:
    """Means over responses: ``reward``, ``tokens`` and ``finished``, the share that ended."""
    weights = token_weights(rollout)
    rows = weights.max(axis=1)
    return {
        "reward": Mean.of(rewards, rows),
        "tokens": Mean.of((weights > 0).sum(axis=1), rows),
        "finished": Mean.of(jnp.asarray(rollout["finished"]), rows),
    }


Update = Callable[[TrainState, Batch, Array | np.ndarray], tuple[TrainState, dict[str, Mean]]]
"""(state, rollout, rewards [R]) -> (state, metrics)."""


def make_update(step: StepFn, prepare: Prepare, *, epochs: int = 1, minibatches: int = 1) -> Update:
    """The program that learns: several train steps on one rollout, compiled once.

    Args:
        step: from `fmjax.train.make_train_step`.
        prepare: rewards into what the loss reads, such as `fmjax.methods.grpo.grpo_prepare`.
        epochs: passes over the rollout; the order of rows is drawn anew for each.
        minibatches: steps in a pass.

    Returns:
        The update; it donates the state. Metrics are means over its steps.

    Raises:
        ValueError: numbers below 1; when called, rows that do not divide into minibatches.
    """
    if epochs < 1 or minibatches < 1:
        raise ValueError(f"epochs={epochs} and minibatches={minibatches} must be at least 1")

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState, rollout: Batch, rewards: Array) -> Any:
        rewards = jnp.asarray(rewards, jnp.float32)
        batch, updates, metrics = prepare(
            merge(state.trainable, state.non_trainable), rollout, rewards
        )
        if len(rewards) % minibatches:
            raise ValueError(f"{len(rewards)} rows do not divide into {minibatches} minibatches")
        state = dataclasses.replace(state, non_trainable=override(state.non_trainable, updates))
        keys = jax.random.split(turn_key(state, 1), epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, len(rewards)))(keys)

        def one(state: TrainState, rows: Array) -> tuple[TrainState, dict[str, Mean]]:
            return step(state, {name: jnp.asarray(leaf)[rows] for name, leaf in batch.items()})

        state, steps = jax.lax.scan(one, state, orders.reshape(epochs * minibatches, -1))
        sums = jax.tree.map(lambda x: x.sum(axis=0), steps)
        return state, {**sums, **metrics}

    return update


def turn_key(state: TrainState, use: int) -> Array:
    """A key for one turn of the loop: of the state alone, so that resuming is exact."""
    return jax.random.fold_in(jax.random.fold_in(state.rng, state.step), use)


@dataclasses.dataclass(frozen=True)
class Turn:
    """What `learn` tells after an update.

    Args:
        number: turns done.
        state: after the update; the next one donates it: read it, and keep no part of it.
        examples, texts, rewards: R each, what was drawn and what it was worth.
        metrics: plain numbers.
    """

    number: int
    state: TrainState
    examples: Sequence[Any]
    texts: Sequence[str]
    rewards: np.ndarray
    metrics: dict[str, float]


def learn(
    state: TrainState,
    prompts: Iterator[Prompts],
    *,
    rollout: Rollout,
    reward: Reward,
    update: Update,
    decode: Callable[[list[int]], str],
    iterations: int,
    hook: Callable[[Turn], None] | None = None,
) -> TrainState:
    """Draws, rewards and learns, `iterations` times.

    Args:
        state: from `init_state`; the first update donates it.
        prompts: one batch a turn, all of the same B.
        rollout, update: the two programs.
        reward: what responses are worth, from their texts (without what ends them).
        decode: token ids to text.
        iterations: turns.
        hook: called after each turn.

    Raises:
        ValueError: rewards that are not finite or not one for each response, named by row;
            examples that are not one for each prompt; no more prompts.
    """
    for number in range(1, iterations + 1):
        batch = next(prompts, None)
        if batch is None:
            raise ValueError(f"the prompts ended before turn {number} of {iterations}")
        batch.check()
        variables = merge(state.trainable, state.non_trainable)
        drawn = rollout(variables, batch, turn_key(state, 0))
        texts = response_texts(drawn, decode)
        several = len(texts) // max(len(batch.examples), 1)
        examples = [example for example in batch.examples for _ in range(several)]
        rewards = checked_rewards(reward(examples, texts), texts)
        state, metrics = update(state, drawn, rewards)
        if hook is not None:
            shown = {name: float(mean.value) for name, mean in jax.device_get(metrics).items()}
            hook(Turn(number, state, examples, texts, rewards, shown))
    return state


def response_texts(rollout: Batch, decode: Callable[[list[int]], str]) -> list[str]:
    """The texts of the responses, without the token that ended them.

    Raises:
        ValueError: responses without a token, named by row.
    """
    lengths = np.asarray(rollout["response_mask"]).sum(axis=1).astype(int)
    if len(empty := np.flatnonzero(lengths == 0)):
        raise ValueError(
            f"the responses {empty.tolist()} are empty; a response has at least one token, its end"
        )
    every = np.asarray(rollout.get("decoder_input_ids", rollout.get("input_ids")))
    ids = every[:, every.shape[1] - rollout["response_mask"].shape[1] :]
    kept = lengths - np.asarray(rollout["finished"])
    return [decode(row[:length].tolist()) for row, length in zip(ids, kept, strict=True)]


def checked_rewards(rewards: Sequence[float] | np.ndarray, texts: Sequence[str]) -> np.ndarray:
    """float32 [R].

    Raises:
        ValueError: not one number for each text, or numbers that are not finite.
    """
    values = np.asarray(rewards, np.float32)
    if values.shape != (len(texts),):
        raise ValueError(f"the reward gave an array {values.shape} for {len(texts)} responses")
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        shown = "; ".join(f"response {n} ({texts[n]!r}) has {values[n]}" for n in wrong[:10])
        raise ValueError(f"rewards must be finite: {shown}")
    return values
