"""Who was trained on? Membership inference, the audit of a private run.

The loss-threshold attack (Yeom et al. 2018, arXiv:1709.01604), the likelihood-ratio attack with
shadow models (LiRA; Carlini et al. 2022, arXiv:2112.03570, Algorithm 1), whose shadow models train
side by side in one program, and lower bounds on epsilon that a successful attack proves, by
Clopper-Pearson intervals (Jagielski, Ullman and Oprea 2020, arXiv:2006.07709) or from one run
(Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fmjax.methods.ensembles import member_step
from fmjax.metrics.optional import optional_library
from fmjax.tasks.apply import row_weights
from fmjax.types import Batch, LossFn, StepFn, Variables

ATTACHES = ("program",)

FEW_SHADOWS = 64
"""Models below which variances are shared by all examples (arXiv:2112.03570, section VI-C)."""


def example_losses(loss_fn: LossFn) -> Callable[[Variables, Batch], Array]:
    """``(variables, batch) -> [B]``: the loss of every row alone; 0 for rows of weight 0.

    With `fmjax.tasks.apply.collect` these are the losses of a whole set; of all shadow models,
    [B, K], with `fmjax.methods.ensembles.of_members`.

    Args:
        loss_fn: built with ``train=False``.
    """

    def losses(variables: Variables, batch: Batch) -> Array:
        rows = {name: jnp.asarray(leaf)[:, None] for name, leaf in batch.items()}
        return jax.vmap(lambda row: loss_fn(variables, row, None)[0])(rows)

    return losses


def logit_confidence(losses: np.ndarray) -> np.ndarray:
    """``log(p / (1 - p))`` of the label's probability p, from its loss ``-log p`` in nats.

    Nearly normal over models, which is what LiRA supposes (arXiv:2112.03570, equation 5).
    """
    losses = np.maximum(np.asarray(losses, np.float64), 1e-30)
    return -losses - np.log(-np.expm1(-losses))


def likelihood_ratio(
    target: np.ndarray,
    shadows: np.ndarray,
    included: np.ndarray,
    *,
    online: bool = True,
    shared_variance: bool | None = None,
) -> np.ndarray:
    """LiRA's score of each example, float64 [N]: higher where it is likelier a member.

    Online, the log of how much likelier the target's confidence is among models that were trained
    on the example than among those that were not. Offline, how many standard deviations it is
    above the latter, which has the order of the paper's probability.

    Args:
        target: [N], `logit_confidence` of the audited model.
        shadows: [K, N], of each shadow model.
        included: bool [K, N], which examples each shadow model was trained on.
        online: whether models that were trained on an example are used.
        shared_variance: one variance for all examples, which few models need; by default of fewer
            than 64.

    Raises:
        ValueError: shapes that do not fit, or examples that no shadow model leaves out (or, online,
            none has).
    """
    included = np.asarray(included, bool)
    if shadows.shape != included.shape or shadows.shape[1:] != target.shape:
        raise ValueError(
            f"target {target.shape}, shadows {shadows.shape} and included {included.shape} must be "
            "[N], [K, N] and [K, N]"
        )
    shared = len(shadows) < FEW_SHADOWS if shared_variance is None else shared_variance
    least = 1 if shared else 2
    sides = {"leave out": ~included, **({"have": included} if online else {})}
    problems = [
        f"{lacking} examples, which fewer than {least} shadow models {what}"
        for what, side in sides.items()
        if (lacking := int((side.sum(axis=0) < least).sum()))
    ]
    if problems:
        raise ValueError("; ".join(problems) + ": include each example in half of the models")

    def fitted(side: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = side.sum(axis=0)
        mean = np.where(side, shadows, 0).sum(axis=0) / count
        squares = np.where(side, (shadows - mean) ** 2, 0)
        if shared:
            variance = np.full(len(mean), squares.sum() / max(1, side.sum() - len(mean)))
        else:
            variance = squares.sum(axis=0) / (count - 1)
        return mean, np.maximum(variance, 1e-12)

    mean, variance = fitted(~included)
    if not online:
        return (target - mean) / np.sqrt(variance)
    outside = -((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2
    mean, variance = fitted(included)
    return -((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2 - outside


def attack_metrics(
    members: np.ndarray,
    others: np.ndarray,
    *,
    at: Sequence[float] = (0.001, 0.01, 0.1),
) -> dict[str, float]:
    """What an attack's scores are worth, on its ROC curve.

    Args:
        members: scores of examples that were trained on, the higher the likelier.
        others: scores of examples that were not.
        at: false positive rates at which the true positive rate is read (arXiv:2112.03570,
            section III-B).

    Returns:
        ``advantage``, the most that the true positive rate is above the false one (an upper end,
        as the threshold is chosen on these scores), ``auc``, and ``tpr_at_...``.

    Raises:
        ValueError: scores that are nan, or of no examples.
    """
    false_rate, true_rate, _ = roc(members, others)
    return {
        "advantage": float(np.max(true_rate - false_rate)),
        "auc": float(np.trapezoid(true_rate, false_rate)),
        **{
            f"tpr_at_{rate:g}": float(true_rate[np.searchsorted(false_rate, rate, "right") - 1])
            for rate in at
        },
    }


def roc(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(false positive rates, true positive rates, thresholds), by falling thresholds.

    Raises:
        ValueError: scores that are nan, or of no examples.
    """
    from sklearn.metrics import roc_curve

    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others: both are needed")
    scores = np.concatenate([members, others])
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of the scores are nan")
    truth = np.arange(len(scores)) < len(members)
    return roc_curve(truth, scores, drop_intermediate=False)


def threshold_advantage(members: np.ndarray, others: np.ndarray) -> float:
    """The advantage of calling a member what has at most the mean loss of the training examples.

    arXiv:1709.01604, section 3.2, with the mean loss as the threshold; nothing is chosen on the
    examples that are judged.

    Args:
        members: losses of examples that were trained on.
        others: losses of examples that were not.
    """
    threshold = np.mean(members)
    return float(np.mean(members <= threshold) - np.mean(others <= threshold))


def epsilon_lower_bound(
    members: np.ndarray,
    others: np.ndarray,
    *,
    delta: float,
    confidence: float = 0.95,
    one_run: bool = True,
) -> float:
    """The epsilon that training has at least, as the attack would else be too good.

    Computed by ``jax-privacy`` (``pip install 'fmjax[privacy]'``), over all thresholds with a
    Bonferroni correction.

    Args:
        members, others: scores, as in `attack_metrics`.
        delta: of the guarantee that is tested.
        confidence: with which the bound holds.
        one_run: scores are of examples of one run, each included by a fair coin of its own
            (arXiv:2305.08846). Otherwise by Clopper-Pearson intervals, which hold where scores are
            independent: of one example each from many runs (arXiv:2006.07709).

    Raises:
        ValueError: an argument out of its range, or scores that are nan.
        ImportError: jax-privacy is not installed.
    """
    if not (0 < delta < 1 and 0.5 < confidence < 1):
        raise ValueError(f"delta={delta} must be in (0, 1), confidence={confidence} in (0.5, 1)")
    roc(members, others)  # refuses what are no scores
    auditing = optional_library("jax_privacy.auditing", "jax-privacy", "privacy")
    auditor = auditing.CanaryScoreAuditor(np.asarray(members), np.asarray(others))
    bound = auditor.epsilon_one_run if one_run else auditor.epsilon_clopper_pearson
    return float(bound(1 - confidence, delta))


def fair_coins(shadows: int, size: int, *, seed: int = 0) -> np.ndarray:
    """bool [K, N]: which examples each of K models is trained on, every one in half of them.

    Args:
        shadows: K, even.
        size: N.
        seed: of the draws.

    Raises:
        ValueError: an odd number of models.
    """
    if shadows < 2 or shadows % 2:
        raise ValueError(f"shadows={shadows} must be even, so that half of them have an example")
    order = np.random.default_rng(seed).random((shadows, size)).argsort(axis=0)
    return order < shadows // 2


def shadow_step(step: StepFn, included: np.ndarray, *, at_once: int | None = None) -> StepFn:
    """The step of K models at once on the same batches, each without the examples it must not see.

    See `fmjax.methods.ensembles.member_step`; the models' states are `member_states`.

    Args:
        step: from `make_train_step`.
        included: bool [K, N], which examples each model is trained on.
        at_once: models that are computed side by side; None for all.
    """
    table = jnp.asarray(np.pad(included, ((0, 0), (0, 1))))  # row -1 is padding

    def see(batch: Batch, model: Array) -> Batch:
        return {**batch, "weight": row_weights(batch) * table[model][batch["index"]]}

    return member_step(step, see=see, at_once=at_once)
