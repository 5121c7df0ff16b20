"""Prompts: rows of the table of words, batches with them, files, and what does not go."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from composition import check_trains
from parity import assert_near, torch_twin

import fmjax
from fmjax.methods import peft_files, prompt_tuning
from fmjax.methods.selection import matching
from fmjax.models import family_of
from fmjax.tasks import causal_lm, question_answering, seq2seq, sequence_classification
from fmjax.tasks.apply import apply_fn
from fmjax.train import accumulate, gradient
from fmjax.tree import flatten

IDS = np.random.default_rng(0).integers(5, 90, (2, 6)).astype(np.int32)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
WORDS = [11, 12, 13]


@functools.cache
def made(model_type, head, **changes):
    """A tiny model and its random variables."""
    config = family_of(model_type).VARIANTS["tiny"]
    return fmjax.create(model_type, config, head=head, rng=jax.random.key(0), **changes)


def logits_fn(model):
    apply = apply_fn(model)
    return lambda variables, batch: apply(variables, batch, None, train=False)[0].logits


def with_words(ids, after=0):
    """The ids with the words that a prompt was copied from."""
    new = np.broadcast_to(WORDS, (len(ids), len(WORDS)))
    return np.concatenate([ids[:, :after], new, ids[:, after:]], axis=1)


@pytest.mark.parametrize(
    ("model_type", "head", "after"),
    [
        ("gpt2", "causal_lm", 0),
        ("bert", "sequence_classification", 1),
        pytest.param("llama", "sequence_classification", 0, marks=pytest.mark.slow),
        pytest.param("bart", "sequence_classification", 0, marks=pytest.mark.slow),
    ],
)
def test_a_prompt_of_words_is_these_words(model_type, head, after):
    """Scaled embeddings (BART's) and all."""
    model, variables = made(model_type, head)
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=3, tokens=[WORDS])
    run = logits_fn(model)
    ids = IDS.copy()
    ids[:, -1] = 2  # where BART's classifier reads
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    mask = np.ones((2, 9), np.int32)
    plain = run(variables, {"input_ids": with_words(ids, after), "attention_mask": mask})
    ours = prompt_tuning.prompted(run, model, after=after)(tuned, batch)
    chex.assert_trees_all_equal(ours, plain)


def test_ids_outside_the_vocabulary_stay_what_they_were():
    model, variables = made("gpt2", "model")
    size = model.config.vocab_size
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=2, init="random")
    outside, virtual = jnp.array([[3, size + 2]]), jnp.array([[3, size, size + 1]])
    for others, ids, known in (
        (variables, virtual, False),
        (variables, outside, False),
        (tuned, virtual, True),
        (tuned, outside, False),
    ):
        hidden = model.apply(others, input_ids=ids).last_hidden_state
        assert np.isfinite(hidden[0, -1]).all() == known


def test_without_prompts_the_program_is_what_it_was():
    model, variables = made("gpt2", "model")

    def lookups(variables):
        run = lambda v: model.apply(v, input_ids=IDS).last_hidden_state  # noqa: E731
        return str(jax.make_jaxpr(run)(variables)).count("= gather[")

    assert lookups(variables) == 2  # words and positions
    assert lookups(prompt_tuning.create(variables, jax.random.key(0), length=1)) == 3


def test_first_vectors():
    _, variables = made("gpt2", "model")
    table = np.asarray(variables["params"]["embed"]["word"]["embedding"])

    def rows(**options):
        tuned = prompt_tuning.create(variables, jax.random.key(3), **options)
        return np.asarray(tuned["adapters"]["embed"]["word"]["prompt"])

    drawn = rows(length=40, vocabulary=7)
    places = np.array([np.flatnonzero((table == row).all(axis=1))[0] for row in drawn])
    assert places.max() < 7
    assert len(set(places)) > 3
    uniform = rows(length=40, init="random")
    assert -0.5 <= uniform.min() < -0.4
    assert 0.4 < uniform.max() <= 0.5
    named = rows(length=3, sets=2, tokens=[[4, 5], [6, 7, 8, 9]])
    np.testing.assert_array_equal(named, table[[4, 5, 4, 6, 7, 8]])


def test_a_causal_loss_ignores_virtual_tokens():
    """And predicts the first real one from the last of them, as a text behind words would."""
    model, variables = made("gpt2", "causal_lm")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=3, tokens=[WORDS])
    loss = causal_lm.loss(model, train=False)
    batch = {"input_ids": IDS, "attention_mask": MASK, "weight": np.array([1.0, 0.5])}
    longer = np.concatenate([np.ones((2, 3), np.int32), MASK], axis=1)
    labels = np.concatenate([np.full((2, 3), -100), IDS], axis=1)
    expected, aux = loss(
        variables,
        {
            "input_ids": with_words(IDS),
            "attention_mask": longer,
            "labels": labels,
            "weight": batch["weight"],
        },
        None,
    )
    value, ours = prompt_tuning.prompted(loss, model)(tuned, batch, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert float(ours.weight) == float(aux.weight) == 6 + 0.5 * 4


@pytest.mark.slow
def test_other_tasks_move_with_the_prompt():
    model, variables = made("bert", "question_answering")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=3, tokens=[WORDS])
    loss = question_answering.loss(model, train=False)
    start, end = np.array([0, 2]), np.array([3, 3])
    batch = {"input_ids": IDS, "attention_mask": MASK, "weight": np.ones(2)}
    batch |= {"token_type_ids": MASK, "start_positions": start, "end_positions": end}
    longer = {
        **batch,
        "input_ids": with_words(IDS, 1),
        "attention_mask": np.concatenate([MASK[:, :1], np.ones((2, 3), int), MASK[:, 1:]], 1),
        "token_type_ids": np.concatenate([MASK[:, :1], np.zeros((2, 3), int), MASK[:, 1:]], 1),
        "start_positions": np.array([0, 5]),
        "end_positions": end + 3,
    }
    expected, _ = loss(variables, longer, None)
    value, _ = prompt_tuning.prompted(loss, model, after=1)(tuned, batch, None)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_each_example_takes_the_prompt_of_its_task():
    model, variables = made("gpt2", "causal_lm")
    tuned = prompt_tuning.create(
        variables, jax.random.key(0), length=2, sets=2, tokens=[[11, 12], [13, 14]]
    )
    run = logits_fn(model)
    ours = prompt_tuning.prompted(run, model, sets=2)(
        tuned, {"input_ids": IDS, "task": np.array([1, 0])}
    )
    words = np.concatenate([np.array([[13, 14], [11, 12]]), IDS], axis=1)
    chex.assert_trees_all_equal(ours, run(variables, {"input_ids": words}))


@pytest.mark.slow
def test_prompts_of_t5_train_in_pieces():
    """The encoder's ids get the prompt, the decoder's labels do not; two tasks, accumulated."""
    model, variables = made("t5", "seq2seq_lm")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=4, sets=2)
    ids = jax.random.randint(jax.random.key(1), (4, 5), 3, 99)
    task = jnp.arange(4) % 2
    batch = {"input_ids": ids, "attention_mask": jnp.ones((4, 5), jnp.int32)}
    batch |= {"labels": jnp.where(task[:, None] == 1, 7, 5) + jnp.zeros((4, 3), jnp.int32)}
    batch |= {"task": task, "weight": jnp.array([1.0, 1.0, 0.5, 1.0])}
    loss = prompt_tuning.prompted(seq2seq.loss(model, train=False), model, sets=2)
    whole, _, _ = gradient(loss)(tuned, {}, batch, None)
    pieces, _, _ = accumulate(gradient(loss), 2)(tuned, {}, batch, None)
    chex.assert_trees_all_close(pieces, whole, rtol=2e-4, atol=1e-5)
    check_trains(
        tuned,
        loss,
        optax.adam(0.5),
        batch,
        is_trainable=matching(["adapters/*"], tuned),
        differentiate=lambda loss: accumulate(gradient(loss), 2),
    )


def test_prompts_that_do_not_fit():
    model, variables = made("gpt2", "causal_lm")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=2, sets=2)
    run = logits_fn(model)

    def call(batch, **options):
        prompt_tuning.prompted(run, model, **options)(tuned, batch)

    with pytest.raises(ValueError, match="has 4 rows, which are not sets=3"):
        call({"input_ids": IDS}, sets=3)
    with pytest.raises(ValueError, match="no task: of several"):
        call({"input_ids": IDS}, sets=2)
    with pytest.raises(ValueError, match="a task: of several"):
        call({"input_ids": IDS, "task": np.zeros(2, int)})
    with pytest.raises(ValueError, match=r"segment_ids.*\[B, T, T\]"):
        call({"input_ids": IDS, "segment_ids": IDS, "attention_mask": np.ones((2, 6, 6))})
    with pytest.raises(ValueError, match="not be negative"):
        call({"input_ids": IDS}, after=-1)
    with pytest.raises(ValueError, match="already"):
        prompt_tuning.create(tuned, jax.random.key(0), length=2)
    with pytest.raises(ValueError, match="init='zeros' is not"):
        prompt_tuning.create(variables, jax.random.key(0), length=2, init="zeros")
    with pytest.raises(ValueError, match=r"length=0.*\n.*vocabulary=0"):
        prompt_tuning.create(variables, jax.random.key(0), length=0, vocabulary=0)
    with pytest.raises(ValueError, match=r"rows for sets=2.*\n.*\[200\]"):
        prompt_tuning.create(variables, jax.random.key(0), length=1, sets=2, tokens=[[200]])
    with pytest.raises(ValueError, match="no adapters/embed"):
        prompt_tuning.prompt_ids(variables)
    _, images = made("vit", "model")
    with pytest.raises(ValueError, match="one table of words"):
        prompt_tuning.create(images, jax.random.key(0), length=1)


@pytest.mark.parametrize("given", [{}, {"special_tokens_mask": np.zeros_like(IDS)}])
def test_masked_tokens_are_real_ones(given):
    """Whether or not the batch says which tokens are special."""
    model, variables = made("bert", "masked_lm")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=3, tokens=[WORDS])
    seen = []

    def loss_fn(variables, batch, rng):
        seen.append(batch)
        return jnp.zeros(()), None

    prompt_tuning.prompted(loss_fn, model, after=1)(tuned, {"input_ids": IDS, **given}, None)
    np.testing.assert_array_equal(seen[0]["special_tokens_mask"], [[0, 1, 1, 1, 0, 0, 0, 0, 0]] * 2)


@pytest.mark.slow
def test_folders_come_back(tmp_path):
    model, variables = made("bert", "sequence_classification")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=3, init="random")
    folder = prompt_tuning.save(tmp_path / "prompt", model, tuned, modules=("head*",))
    config, tensors = peft_files.read_adapter(folder)
    assert config["num_virtual_tokens"] == 3
    assert config["task_type"] == "SEQ_CLS"
    assert set(tensors) == {
        "prompt_embeddings",
        "base_model.classifier.weight",
        "base_model.classifier.bias",
    }
    plain = jax.tree.map(jnp.zeros_like, variables)
    # A table of zeros is one that words and vectors read alike.
    back = prompt_tuning.load(model, plain, folder)
    for path in ("adapters/embed/word/prompt", "params/head/classifier/kernel"):
        np.testing.assert_array_equal(flatten(back)[path], flatten(tuned)[path])
    (folder / "adapter_config.json").write_text('{"peft_type": "P_TUNING", "num_layers": 2}')
    with pytest.raises(ValueError, match="'P_TUNING' is not 'PROMPT_TUNING'"):
        prompt_tuning.load(model, variables, folder)
    scaled, others = made("gemma", "causal_lm")
    other = prompt_tuning.create(others, jax.random.key(0), length=3)
    with pytest.raises(ValueError, match="scales the vectors of words"):
        prompt_tuning.save(tmp_path / "other", scaled, other)


@pytest.mark.parametrize(
    ("model_type", "head", "task"),
    [
        ("gpt2", "causal_lm", "CAUSAL_LM"),
        ("t5", "seq2seq_lm", "SEQ_2_SEQ_LM"),
        pytest.param("llama", "causal_lm", "CAUSAL_LM", marks=pytest.mark.slow),
        pytest.param("bert", "sequence_classification", "SEQ_CLS", marks=pytest.mark.slow),
    ],
)
def test_parity_with_peft(model_type, head, task, tmp_path):
    """Outputs, gradients and files both ways."""
    peft = pytest.importorskip("peft")
    import torch

    family = family_of(model_type)
    twin = torch_twin(family, family.VARIANTS["tiny"], head)
    twin.save_pretrained(tmp_path / "base")
    model, variables = fmjax.load(tmp_path / "base", head=head)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
    theirs = peft.get_peft_model(twin, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    tuned = prompt_tuning.load(model, variables, tmp_path / "theirs")
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if model_type == "t5":
        inputs["decoder_input_ids"] = IDS[:, :4]
    tensors = {name: torch.tensor(array).long() for name, array in inputs.items()}
    expected = theirs(**tensors).logits
    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(weights)).sum().backward()
    run = prompt_tuning.prompted(logits_fn(model), model)

    def weighed(prompt):
        logits = run({**tuned, "adapters": {"embed": {"word": {"prompt": prompt}}}}, inputs)
        return (logits * weights).sum(), logits

    prompt = tuned["adapters"]["embed"]["word"]["prompt"]
    slope, logits = jax.jit(jax.grad(weighed, has_aux=True))(prompt)
    assert_near(logits, expected.detach().numpy(), "logits")
    reference = theirs.prompt_encoder.default.embedding.weight.grad.numpy()
    assert_near(slope, reference[:3], "gradient")
    modules = ("head*",) if task == "SEQ_CLS" else ()
    prompt_tuning.save(tmp_path / "ours", model, tuned, modules=modules)
    again = torch_twin(family, family.VARIANTS["tiny"], head)
    back = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    assert_near(back(**tensors).logits.detach().numpy(), expected.detach().numpy(), "back")


def test_a_classifier_learns_through_its_prompt_alone():
    """The default place, behind no token; a row of weight 0 does not count."""
    model, variables = made("bert", "sequence_classification")
    tuned = prompt_tuning.create(variables, jax.random.key(0), length=4)
    loss = prompt_tuning.prompted(sequence_classification.loss(model, train=False), model)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": np.array([1, 9])}
    batch |= {"weight": np.array([1.0, 0.0])}
    value, aux = loss(tuned, batch, None)
    assert np.isfinite(value)
    assert float(aux.weight) == 1
