"""Adapters of dense layers: identities, training, several at once, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from composition import check_trains
from jax.interpreters import partial_eval
from parity import assert_near, text_inputs

import fmjax
from fmjax.hub import abstract_variables
from fmjax.methods import bottleneck, ia3, lora
from fmjax.methods.adapted_layers import (
    choose_adapters,
    is_adapter,
    merge_adapters,
    of_modules,
    per_example,
    stack_adapters,
    take_adapter,
    unmerge_adapters,
    with_adapters,
    without_adapters,
)
from fmjax.models import bert, families, family_of, gpt2
from fmjax.tasks import sequence_classification
from fmjax.tasks.apply import apply_fn
from fmjax.tree import flatten, map_with_path, stack_layers, unflatten

BERT = bert.Config(
    vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
    intermediate_size=20, max_position_embeddings=16, initializer_range=0.3,
)  # fmt: skip
HEAD = "sequence_classification"
INPUTS = text_inputs(BERT, HEAD)
TARGETS = ("*/attn/*", "*/mlp/up")


@pytest.fixture(autouse=True)
def _traces_of_this_test_alone():
    chex.clear_trace_counter()


@pytest.fixture(scope="module")
def base():
    return fmjax.create("bert", BERT, head=HEAD, rng=jax.random.key(0))


def shaken(variables, seed=1):
    """As after training: no leaf of the adapters is what it was."""

    def shake(path, leaf):
        if not is_adapter(f"adapters/{path}"):
            return leaf
        return leaf + 0.1 * np.random.default_rng([seed, len(path)]).normal(size=leaf.shape)

    return {**variables, "adapters": map_with_path(shake, variables["adapters"])}


def adapted(variables, rank=2, seed=1, **options):
    return shaken(lora.add(variables, jax.random.key(seed), rank=rank, alpha=3, **options), seed)


@pytest.fixture(scope="module")
def forward(base):
    return jax.jit(lambda variables: base[0].apply(variables, **INPUTS).logits)


@pytest.mark.slow
def test_nothing_changes_at_first(base, forward):
    _, variables = base
    plain = forward(variables)
    key = jax.random.key(1)
    low_rank = lora.add(variables, key, rank=2, alpha=3, targets=TARGETS)
    np.testing.assert_array_equal(forward(low_rank), plain)
    np.testing.assert_array_equal(forward(ia3.add(variables)), plain)
    decomposed = lora.add(variables, key, rank=2, alpha=3, weight_decomposed=True)
    assert_near(forward(decomposed), plain, "decomposed", 1e-6)
    behind = bottleneck.add(variables, key, width=2, deviation=1e-4)
    assert_near(forward(behind), plain, "bottleneck", 1e-6)
    down = of_modules(low_rank)["layers_0/attn/query"]["down"]
    assert 0.2 < np.abs(down).max() <= 1 / np.sqrt(12)


def test_scale_is_by_the_rank_or_its_root(base):
    for stabilised, scale in ((False, 0.75), (True, 1.5)):
        leaves = of_modules(adapted(base[1], rank=4, rank_stabilised=stabilised))
        assert {float(x["scale"]) for x in leaves.values()} == {scale}


def test_merging(base, forward):
    _, variables = base
    for kind in (adapted(variables, targets=TARGETS), shaken(ia3.add(variables))):
        merged = merge_adapters(kind)
        assert_near(forward(merged), forward(kind), "merged")
        back = unmerge_adapters(merged, kind["adapters"])
        chex.assert_trees_all_close(back, variables, rtol=1e-5, atol=1e-6)
    decomposed = adapted(variables, weight_decomposed=True)
    merged = merge_adapters(decomposed)
    assert_near(forward(merged), forward(decomposed), "merged")
    with pytest.raises(ValueError, match="keep the base model"):
        unmerge_adapters(merged, decomposed["adapters"])
    with pytest.raises(ValueError, match="no part of it"):
        merge_adapters(bottleneck.add(variables, jax.random.key(0), width=2))


def test_scanned_layers_are_the_same(base, forward):
    model, variables = base
    key, options = jax.random.key(1), {"rank": 2, "alpha": 3, "weight_decomposed": True}
    loop = lora.add(variables, key, **options)
    loop = bottleneck.add(loop, key, width=2)
    scanned = lora.add(stack_layers(variables), key, **options)
    scanned = bottleneck.add(scanned, key, width=2)
    chex.assert_trees_all_close(scanned, stack_layers(loop), rtol=1e-6)
    scanned = shaken(scanned)
    unscanned = {
        path: leaf if "layers/" not in path else None for path, leaf in flatten(scanned).items()
    }
    unscanned = {path: leaf for path, leaf in unscanned.items() if leaf is not None} | {
        path.replace("layers/", f"layers_{i}/"): leaf[i]
        for path, leaf in flatten(scanned).items()
        for i in range(2)
        if "layers/" in path
    }
    expected = forward(unflatten(unscanned))
    again = model.clone(scan=True, remat="block").apply(scanned, **INPUTS).logits
    assert_near(again, expected, "scanned")
    plain = {**scanned, "adapters": lora.add(stack_layers(variables), key, **options)["adapters"]}
    chex.assert_trees_all_close(
        merge_adapters(plain), stack_layers(merge_adapters(lora.add(variables, key, **options))),
        rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True])
def test_each_example_has_its_own(base, forward, scan):
    model, variables = base
    model = model.clone(scan=scan)
    alone = [adapted(variables), adapted(variables, rank=3, seed=2, targets=TARGETS)]
    if scan:
        alone, variables = [stack_layers(each) for each in alone], stack_layers(variables)
    both = stack_adapters(variables, [each["adapters"] for each in alone])
    traced = chex.assert_max_traces(
        per_example(lambda v, batch: model.apply(v, **batch).logits), n=1
    )
    run = jax.jit(traced)
    plain = jax.jit(lambda variables: model.apply(variables, **INPUTS).logits)
    expected = [plain(each) for each in alone]
    for index in ([1, 0], [0, 0]):
        out = run(both, {**INPUTS, "adapter_index": jnp.array(index)})
        for row, chosen in enumerate(index):
            assert_near(out[row], expected[chosen][row], f"row {row} of {index}")
    assert_near(plain(take_adapter(both, 1)), expected[1], "one of them")


def test_stacks_of_unlike_adapters_are_refused(base):
    _, variables = base
    kinds = [adapted(variables), adapted(variables, weight_decomposed=True)]
    with pytest.raises(ValueError, match="different kinds"):
        stack_adapters(variables, [each["adapters"] for each in kinds])
    with pytest.raises(ValueError, match="no adapters to stack"):
        stack_adapters(variables, [])
    with pytest.raises(ValueError, match="no adapters to choose"):
        choose_adapters(variables, jnp.zeros(2, int))
    several = stack_adapters(variables, [kinds[0]["adapters"]] * 2)
    with pytest.raises(ValueError, match="several adapters"):
        merge_adapters(several)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["low-rank", pytest.param("choice", marks=pytest.mark.slow)])
def test_training(base, kind, tmp_path):
    """Under weight decay frozen leaves stay bitwise as they are; the head trains along."""
    model, variables = base
    loss = sequence_classification.loss(model)
    batch = {**INPUTS, "labels": np.array([0, 1]), "weight": np.ones(2, np.float32)}
    options = {"rank": 2, "alpha": 3, "dropout": 0.1, "weight_decomposed": True}
    start = lora.add(variables, jax.random.key(0), **options)
    folder = tmp_path if kind == "low-rank" else None
    if kind == "choice":
        start = stack_adapters(variables, [start["adapters"]] * 2)
        loss, batch = per_example(loss), batch | {"adapter_index": np.array([0, 1])}
    else:
        start = bottleneck.add(start, jax.random.key(1), width=2)
    state, _ = check_trains(
        start, loss, optax.adamw(3e-2, weight_decay=0.1), batch, folder=folder,
        is_trainable=lambda path: is_adapter(path) or path.startswith("params/head/"),
    )  # fmt: skip
    before, after = flatten(start), flatten(state.trainable)
    assert all((before[path] != leaf).any() for path, leaf in after.items() if "attn" in path)


def test_only_training_drops(base):
    model, variables = base
    apply = jax.jit(apply_fn(model.clone(config=bert.Config(**{
        **vars(BERT), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0
    }))), static_argnames="train")  # fmt: skip
    start = adapted(variables, dropout=0.5)
    runs = [
        apply(start, INPUTS, jax.random.key(seed), train=train)[0].logits
        for train in (False, True)
        for seed in (0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[2] - runs[3]).max() > 1e-4


def test_generation_equals_that_of_merged_kernels():
    config = gpt2.Config(vocab_size=31, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    model, variables = fmjax.create(
        "gpt2", config, head="causal_lm", rng=jax.random.key(0), scan=True
    )
    ids = np.array([[3, 4, 5], [6, 7, 8]])
    start = adapted(jax.tree.map(lambda x: 4 * x, variables), targets=("*/attn/*", "*/mlp/*"))

    def tokens(variables):
        return fmjax.generate(model, variables, ids, max_new_tokens=5).tokens

    np.testing.assert_array_equal(tokens(start), tokens(merge_adapters(start)))
    assert (tokens(start) != tokens(without_adapters(start))).any()


PLAIN = {"bert", "deberta", "mixtral"}
NO_DENSE = {"dcgan", "dvae", "mobilenet_v2", "vqgan"}  # under their last heads


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in PLAIN else pytest.mark.slow)
        for name in families()
        if name not in NO_DENSE
    ],
)
def test_whatever_is_added_is_read(name):
    """In every family: an output depends on each adapter of each dense kernel it depends on."""
    family = family_of(name)
    head = [*family.HEADS][-1]
    model = family.Model(family.VARIANTS["tiny"], head=head)
    start = jax.eval_shape(
        lambda v: lora.add(
            v, jax.random.key(0), rank=2, alpha=2, targets=("*",), weight_decomposed=True
        ),
        abstract_variables(model),
    )
    leaves = flatten(start)

    def run(values):
        variables = unflatten(dict(zip(leaves, values, strict=True)))
        return model.apply(variables, **family.inputs(model.config, head))

    jaxpr = jax.make_jaxpr(run)([*leaves.values()]).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    used = dict(zip(leaves, used, strict=True))
    assert len(of_modules(start)) >= 1
    for module, own in of_modules(start).items():
        for leaf in own:
            assert used[f"adapters/{module}/{leaf}"] == used[f"params/{module}/kernel"], module
    assert any(used[path] for path in used if path.startswith("adapters/"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NO_DENSE))
def test_where_there_is_no_dense_layer_it_is_said(name):
    family = family_of(name)
    variables = abstract_variables(family.Model(family.VARIANTS["tiny"], head=[*family.HEADS][-1]))
    with pytest.raises(ValueError, match=r"'\*' matches .* no dense kernel"):
        lora.add(variables, jax.random.key(0), rank=2, alpha=2, targets=("*",))


def test_bad_targets_and_numbers(base, tmp_path):
    model, variables = base
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"rank=0 .*alpha=-1 .*dropout=1"):
        lora.add(variables, key, rank=0, alpha=-1, dropout=1)
    with pytest.raises(ValueError, match=r"(?s)no module; near are .*attn/query.*no dense kernel"):
        lora.add(variables, key, rank=2, alpha=2, targets=("*/attn/querry", "embed/word"))
    with pytest.raises(ValueError, match=r"'q_proj' .* near are .*\*/attn/query"):
        lora.add(variables, key, rank=2, alpha=2, targets=("q_proj",))
    with pytest.raises(ValueError, match="targets: one text was given where a list"):
        lora.add(variables, key, rank=2, alpha=2, targets="*/attn/query")
    with pytest.raises(ValueError, match="width=0"):
        bottleneck.add(variables, key, width=0)
    with pytest.raises(ValueError, match="nothing to adapt"):
        ia3.add(variables, outputs=(), inputs=())
    start = lora.add(variables, key, rank=2, alpha=2)
    with pytest.raises(ValueError, match="there are adapters already"):
        lora.add(start, key, rank=2, alpha=2, targets=("*/query",))
    with pytest.raises(ValueError, match="merge them into the kernels"):
        fmjax.save(tmp_path, model, start)


@pytest.mark.filterwarnings("ignore")
def test_factors_against_peft(base, forward, tmp_path):
    model, variables = base
    fmjax.save(tmp_path, model, variables)
    twin = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager"
    )
    config = peft.IA3Config(
        target_modules=r".*(key|value|\d\.output\.dense)", feedforward_modules=r".*output\.dense"
    )
    twin = peft.get_peft_model(twin, config).double().eval()
    modules = {}
    for i in range(2):
        layer = twin.base_model.model.bert.encoder.layer[i]
        for path, module, leaf in (
            ("attn/key", layer.attention.self.key, "out_scale"),
            ("attn/value", layer.attention.self.value, "out_scale"),
            ("mlp/down", layer.output.dense, "in_scale"),
        ):
            factors = module.ia3_l["default"]
            factors.data = 1 + 0.3 * torch.randn_like(factors)
            modules[f"layers_{i}/{path}"] = {leaf: jnp.asarray(factors.detach().numpy().ravel())}
    theirs = twin(**{name: torch.tensor(x) for name, x in INPUTS.items()}).logits
    assert_near(forward(with_adapters(variables, modules)), theirs.detach(), "logits")
