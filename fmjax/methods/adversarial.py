"""Inputs changed within bounds so that the loss rises, and training on them.

An attack is a function (variables, batch, rng) -> batch of any loss over continuous inputs: pixels,
audio, embedded tokens. The attacked model is differentiated with respect to its input only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from fmjax.tasks.apply import apply_fn, row_weights
from fmjax.tree import flatten, merge
from fmjax.types import Aux, Batch, GradFn, LossFn, Mean, Variables

ATTACHES = ("loss", "gradient")


class Attack(Protocol):
    """(variables, batch, rng) -> the batch with its input changed."""

    def __call__(self, variables: Variables, batch: Batch, rng: Array | None) -> Batch: ...


class Ball(NamedTuple):
    """How far inputs may be changed.

    Args:
        norm: "linf", each number by itself, or "l2", an example as a whole.
        epsilon: the largest change, in the input's units.
        low, high: what inputs lie between; None for no bound.
    """

    norm: Literal["linf", "l2"]
    epsilon: float
    low: float | None = None
    high: float | None = None

    def direction(self, g: Array) -> Array:
        """The steepest change of size 1: [B, ...]."""
        return jnp.sign(g) if self.norm == "linf" else g / _lengths(g)

    def projected(self, x: Array, clean: Array) -> Array:
        """The nearest input that is allowed: [B, ...]."""
        change = x - clean
        if self.norm == "linf":
            change = jnp.clip(change, -self.epsilon, self.epsilon)
        else:
            change = change * jnp.minimum(1.0, self.epsilon / _lengths(change))
        x = clean + change
        return x if self.low is None and self.high is None else jnp.clip(x, self.low, self.high)

    def drawn(self, rng: Array, clean: Array) -> Array:
        """An input drawn from the ball, evenly: [B, ...]."""
        if self.norm == "linf":
            change = jax.random.uniform(rng, clean.shape, clean.dtype, -1, 1) * self.epsilon
        else:
            way, radius = jax.random.split(rng)
            change = jax.random.normal(way, clean.shape, clean.dtype)
            size = clean[0].size
            one = (len(clean), *(1 for _ in clean.shape[1:]))
            far = jax.random.uniform(radius, one, clean.dtype) ** (1 / size)
            change = change / _lengths(change) * far * self.epsilon
        return self.projected(clean + change, clean)


def _lengths(x: Array) -> Array:
    """Each example's l2 norm, [B, 1, ...], and 1 where it is 0."""
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)), keepdims=True))
    return jnp.where(length == 0, 1.0, length)


def fgsm(
    loss_fn: LossFn,
    *,
    epsilon: float,
    norm: Literal["linf", "l2"] = "linf",
    low: float | None = None,
    high: float | None = None,
    name: str = "pixel_values",
) -> Attack:
    """The fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572, section 4).

    Args:
        loss_fn: what is to rise; as in evaluation, built with ``train=False``.
        epsilon: the size of the one step, in the input's units.
        norm, low, high: see `Ball`.
        name: of the input, float [B, ...].

    Raises:
        ValueError: settings that do not fit.
    """
    return pgd(
        loss_fn, epsilon=epsilon, step_size=epsilon, steps=1, random_start=False, norm=norm,
        low=low, high=high, name=name,
    )  # fmt: skip


def pgd(
    loss_fn: LossFn,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    random_start: bool = True,
    norm: Literal["linf", "l2"] = "linf",
    low: float | None = None,
    high: float | None = None,
    name: str = "pixel_values",
) -> Attack:
    """Projected gradient ascent on the input (Madry et al. 2018, arXiv:1706.06083, section 2.1).

    Args:
        loss_fn: what is to rise; as in evaluation, built with ``train=False``, or batch statistics
            would be those of the attacked batch.
        epsilon: the largest change, in the input's units.
        step_size: of each step.
        steps: how many.
        random_start: whether the first input is drawn from the ball; needs a key.
        norm, low, high: see `Ball`.
        name: of the input, float [B, ...].

    Raises:
        ValueError: settings that do not fit, a key that is missing, or an input of whole numbers.
    """
    climb = _climb(epsilon, step_size, steps, norm, low, high)

    def attack(variables: Variables, batch: Batch, rng: Array | None) -> Batch:
        clean = _floats(batch, name)
        variables = jax.lax.stop_gradient(variables)
        start = clean
        if random_start:
            if rng is None:
                raise ValueError("random_start draws the first input: give the attack a key")
            start = climb.ball.drawn(rng, clean)

        def of_input(x: Array) -> Array:
            # A sum, so that one example's direction does not depend on how many others there are.
            loss, aux = loss_fn(variables, {**batch, name: x}, None)
            return loss * aux.weight

        return {**batch, name: climb(of_input, start, clean)}

    return attack


class _Climb(NamedTuple):
    """Steps of gradient ascent inside a ball."""

    ball: Ball
    step_size: float
    steps: int

    def __call__(self, of_input: Callable[[Array], Array], start: Array, clean: Array) -> Array:
        """Where the sum over examples `of_input` has risen to, from `start`: [B, ...]."""

        def step(_: int, x: Array) -> Array:
            way = self.ball.direction(jax.grad(of_input)(x))
            return self.ball.projected(x + self.step_size * way, clean)

        return jax.lax.stop_gradient(jax.lax.fori_loop(0, self.steps, step, start))


def _climb(
    epsilon: float, step_size: float, steps: int, norm: str, low: float | None, high: float | None
) -> _Climb:
    problems = []
    if norm not in ("linf", "l2"):
        problems.append(f"norm={norm!r} must be 'linf' or 'l2'")
    if not epsilon >= 0:
        problems.append(f"epsilon={epsilon} must be at least 0")
    if low is not None and high is not None and low >= high:
        problems.append(f"low={low} must be below high={high}")
    if steps < 1 or not step_size >= 0:
        problems.append(f"steps={steps} must be at least 1 and step_size={step_size} at least 0")
    if problems:
        raise ValueError("; ".join(problems))
    ball = Ball(norm, epsilon, low, high)  # pyright: ignore[reportArgumentType]
    return _Climb(ball, step_size, steps)


def _floats(batch: Batch, name: str) -> Array:
    if name not in batch:
        raise ValueError(f"the batch has no {name!r}, only {sorted(batch)}; set name=")
    x = jnp.asarray(batch[name])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {x.dtype}, which no small step changes; give floats (pixels from 0 to 1: "
            "fmjax.tasks.pixels.to_floats)"
        )
    return x


def attacked(loss_fn: LossFn, attack: Attack) -> LossFn:
    """The loss of the attacked batch: adversarial training (Madry et al. 2018, eq. 2.1), or, of a
    loss as in evaluation, robust accuracy."""

    def adversarial_loss(variables: Variables, batch: Batch, rng: Array | None):
        first, second = (None, None) if rng is None else jax.random.split(rng)
        return loss_fn(variables, attack(variables, batch, first), second)

    return adversarial_loss


def trades(
    model: Any,
    loss_fn: LossFn,
    *,
    beta: float = 6.0,
    epsilon: float,
    step_size: float,
    steps: int,
    norm: Literal["linf", "l2"] = "linf",
    low: float | None = None,
    high: float | None = None,
    name: str = "pixel_values",
    through: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> LossFn:
    """TRADES (Zhang et al. 2019, arXiv:1901.08573, eq. 5 and algorithm 1): the loss of clean inputs
    plus `beta` times the divergence of what the model says of changed ones from what it says of
    clean ones. Both passes drop the same units: the divergence is of one function, and is 0 where
    nothing is changed.

    Args:
        model: a classifier; its logits are [B, C].
        loss_fn: of clean inputs, such as the task's.
        beta: weight of the divergence, 1 / lambda in the paper.
        epsilon, step_size, steps, norm, low, high, name: see `pgd`; the divergence is what rises.
        through: what stands between the batch and the model, as
            ``lambda f: normalised(f, mean, std)``.

    Raises:
        ValueError: settings that do not fit.
    """
    if not beta >= 0:
        raise ValueError(f"beta={beta} must be at least 0")
    climb = _climb(epsilon, step_size, steps, norm, low, high)
    apply = apply_fn(model)

    def said(variables: Variables, batch: Batch, rng: Array | None, train: bool) -> Array:
        logits = apply(variables, batch, rng, train=train)[0].logits
        assert logits is not None
        return jax.nn.log_softmax(logits, axis=-1)  # [B, C]

    said = through(said)

    def trades_loss(variables: Variables, batch: Batch, rng: Array | None) -> tuple[Array, Aux]:
        if rng is None:
            raise ValueError("TRADES draws where its attack begins: give it a key")
        start, rng = jax.random.split(rng)
        clean = _floats(batch, name)
        fixed = jax.lax.stop_gradient(variables)
        target = said(fixed, batch, None, False)

        def of_input(x: Array) -> Array:
            return _divergence(target, said(fixed, {**batch, name: x}, None, False)).sum()

        # At the clean input itself the divergence has no gradient.
        near = clean + 1e-3 * jax.random.normal(start, clean.shape, clean.dtype)
        changed = {**batch, name: climb(of_input, near, clean)}
        loss, aux = loss_fn(variables, batch, rng)
        # With the key that the loss had: the compiler sees one forward pass, not two.
        p = said(variables, batch, rng, True)
        q = said(variables, changed, rng, True)
        extra = Mean.of(_divergence(p, q), row_weights(batch, len(clean)))
        metrics = {**aux.metrics, "divergence": extra}
        return loss + beta * extra.value, aux._replace(metrics=metrics)

    return trades_loss


def _divergence(p: Array, q: Array) -> Array:
    """KL(p || q) in nats, of log probabilities: [B, C] -> [B]."""
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def free_lb(
    loss_fn: LossFn,
    *,
    table: str,
    epsilon: float = 0.0,
    step_size: float = 0.1,
    steps: int = 3,
    initial: float = 0.1,
) -> GradFn:
    """FreeLB (Zhu et al. 2020, arXiv:1909.11764, algorithm 1): embedded tokens are moved uphill,
    and the mean of the gradients met on the way is the step's.

    Each example's move has its own length, all its tokens together; padding is not moved. Every
    pass draws the same dropout (section 3.3). The loss and metrics are means over the passes. What
    moves is what the table gives for the batch's ``input_ids``: a family that scales its vectors
    scales the moves, too.

    Args:
        loss_fn: of batches with ``input_ids`` [B, T], which the model looks up as they are; not
            compiled by itself.
        table: path of the embedding table [V, D], as "params/embed/word/embedding".
        epsilon: the longest move; 0 is no limit.
        step_size: alpha, the length of each step.
        steps: K passes.
        initial: the first move is drawn with this length at most.

    Raises:
        ValueError: settings that do not fit; when called, a table that the variables do not have,
            or one in which the batch's ids are not looked up.
    """
    if steps < 1 or min(epsilon, step_size, initial) < 0:
        raise ValueError(
            f"steps={steps} must be at least 1, and epsilon={epsilon}, step_size={step_size} and "
            f"initial={initial} at least 0"
        )

    def of_moved(trainable: Variables, move: Array, non_trainable: Variables, batch, rng):
        variables = merge(trainable, non_trainable)
        leaves = flatten(variables)
        if table not in leaves:
            tables = [path for path in leaves if path.endswith("embedding")]
            raise ValueError(f"table={table!r} is not a leaf; embedding tables are {tables}")
        # Here, because it imports Flax, which whoever has a model has already loaded.
        from fmjax.nn.embed import moved_vectors

        ids = jnp.asarray(batch["input_ids"])
        with moved_vectors(table, ids, move) as places:
            result = loss_fn(variables, {**batch, "input_ids": ids}, rng)
        if not places:
            raise ValueError(
                f"the model does not look up the batch's input_ids in {table!r}, so nothing moves; "
                "give the table of words, and a loss that neither changes them nor is compiled"
            )
        return result

    def grad_fn(
        trainable: Variables, non_trainable: Variables, batch: Batch, rng: Array | None
    ) -> tuple[Variables, Array, Aux]:
        if rng is None:
            raise ValueError("FreeLB draws its first move: give it a key")
        start, rng = jax.random.split(rng)
        ids = jnp.asarray(batch["input_ids"])
        real = jnp.asarray(batch.get("attention_mask", jnp.ones_like(ids)))[..., None]
        leaves = flatten(merge(trainable, non_trainable))
        width = leaves[table].shape[-1] if table in leaves else 1
        numbers = jnp.sum(real, axis=(1, 2), keepdims=True) * width  # [B, 1, 1]
        move = jax.random.uniform(start, (*ids.shape, width), jnp.float32, -1, 1) * real
        move = initial * move / jnp.sqrt(jnp.maximum(numbers, 1))

        def one(move: Array):
            both = jax.value_and_grad(of_moved, argnums=(0, 1), has_aux=True)
            return both(trainable, move, non_trainable, batch, rng)

        def body(carry, _):
            move, sums = carry
            (loss, aux), (grads, uphill) = one(move)
            sums = jax.tree.map(jnp.add, sums, (grads, loss, aux.weight, aux.metrics))
            move = move + step_size * real * uphill / _lengths(uphill * real)
            if epsilon:
                move = move * jnp.minimum(1.0, epsilon / _lengths(move))
            return (move, sums), aux.updates

        (loss, aux), (grads, _) = jax.eval_shape(one, move)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), (grads, loss, aux.weight, aux.metrics)
        )
        (_, sums), updates = jax.lax.scan(body, (move, zeros), None, length=steps)
        grads, loss, weight, metrics = sums
        mean = lambda x: x / steps  # noqa: E731
        # Means keep their value; the weight is one pass's, as of the batch itself.
        metrics = jax.tree.map(mean, metrics)
        last = jax.tree.map(lambda x: x[-1], updates)
        return jax.tree.map(mean, grads), mean(loss), Aux(mean(weight), metrics, last)

    return grad_fn
