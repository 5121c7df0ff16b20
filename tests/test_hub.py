"""Finding folders, hub ids without a network, and what loading costs in memory."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from chex import assert_trees_all_close, assert_trees_all_equal

import fmjax
from fmjax import hub
from fmjax.config import write_json
from fmjax.data.tokenizer import train_tokenizer
from fmjax.models import dalle, family_of
from fmjax.tree import stack_layers

FIXTURES = Path(__file__).resolve().parent / "fixtures"


def test_what_is_no_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        fmjax.load(tmp_path / "nowhere" / "at" / "all")
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(NotADirectoryError, match=r"give the folder with its config\.json"):
        fmjax.load(file)
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        fmjax.load(tmp_path)


def test_a_tokenizer_without_a_vocabulary_is_none(tmp_path):
    """transformers makes one of special tokens alone, and every text would be unknown to it."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileNotFoundError, match=r"no files of a tokenizer .*save_pretrained"):
        fmjax.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no vocabulary, only the special tokens"):
        fmjax.load_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    assert fmjax.load_tokenizer(tmp_path)("a b")["input_ids"] == [100, 35, 101, 1]  # its bytes
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\na\n")
    assert fmjax.load_tokenizer(tmp_path)("a film")["input_ids"] == [2, 6, 5, 3]


def test_a_tokenizer_is_fetched_without_weights(monkeypatch, tmp_path):
    import huggingface_hub

    fetched = []

    def download(repo_id, *, allow_patterns):
        fetched.append(allow_patterns)
        (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfilm\na\n")
        (tmp_path / "config.json").write_text('{"model_type": "bert", "eos_token_id": 3}')
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(fmjax.load_tokenizer("somebody/something")) == 7
    assert fmjax.load_generation_config("somebody/something").eos == (3,)
    assert fetched == [list(hub.OTHER_FILES)] * 2


def test_a_hub_id_offline_says_that_it_could_not_be_fetched():
    with pytest.raises(FileNotFoundError, match="as a hub id it could not be fetched"):
        fmjax.load("nobody/nothing-at-all")


@pytest.mark.parametrize(
    ("present", "tried"),
    [("model.safetensors", 1), ("pytorch_model.bin", 2), ("flax_model.msgpack", 3)],
)
def test_a_hub_id_is_fetched_in_the_best_format_it_has(monkeypatch, tmp_path, present, tried):
    """Against a stand-in for the download, which has one format of weights only."""
    import huggingface_hub

    calls = []

    def download(repo_id, *, allow_patterns):
        assert repo_id == "somebody/something"
        calls.append(allow_patterns)
        if present in allow_patterns:
            (tmp_path / present).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.find_folder("somebody/something") == tmp_path
    assert len(calls) == tried
    assert all("*.json" in patterns for patterns in calls)


def test_model_types_with_hyphens_are_files_with_underscores():
    assert hub.families() == sorted(hub.families())
    with pytest.raises(ValueError, match=r"'xlm-roberta-nope' is not among the families"):
        hub.family_of("xlm-roberta-nope")


@pytest.mark.parametrize("scan", [False, True])
def test_abstract_variables_are_traced_once_and_belong_to_the_caller(scan, monkeypatch):
    from fmjax.models.bert import VARIANTS, Model

    model = Model(VARIANTS["tiny"], head="masked_lm", scan=scan)
    first = hub.abstract_variables(model)
    monkeypatch.setattr(jax, "eval_shape", None)
    second = hub.abstract_variables(model)
    assert first == second
    first["params"].clear()
    assert second == hub.abstract_variables(model)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("aligned", [True, False])
def test_what_was_loaded_owns_its_memory(tmp_path, scan, aligned):
    """The file may be written over, and a step may be given the arrays to write to."""
    model, variables = fmjax.create("bert", "tiny", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padding = -(8 + length) % 64 + (0 if aligned else 8)  # CPUs share lines of 64 bytes
    header = whole[8 : 8 + length] + b" " * padding
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    model, loaded = fmjax.load(tmp_path, scan=scan)
    with file.open("r+b") as opened:
        opened.write(b"\xff" * file.stat().st_size)
    expected = stack_layers(variables) if scan else variables
    assert_trees_all_equal(loaded, expected)
    leaves = jax.tree.leaves(loaded)
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    given = jax.jit(lambda leaves: [leaf + 1 for leaf in leaves], donate_argnums=0)(leaves)
    assert {leaf.unsafe_buffer_pointer() for leaf in given} == set(places)


def test_loading_heeds_what_the_caller_has_said_around_it():
    """Though other threads than the caller's put the arrays on a device."""
    other = jax.devices()[1]
    with jax.default_device(other):
        _, variables = fmjax.load(FIXTURES / "bert-mlm-legacy")
    assert {leaf.device for leaf in jax.tree.leaves(variables)} == {other}
    assert not any(leaf.committed for leaf in jax.tree.leaves(variables))
    with jax.enable_x64(True):
        _, variables = fmjax.load(FIXTURES / "bert-mlm-legacy", dtype=jnp.float64)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float64)}


MEMORY = """
import sys
import jax
import fmjax
jax.block_until_ready(jax.numpy.zeros(3))
fmjax.load(sys.argv[1])                      # imports, compiles and small things
def resident(field):                         # ru_maxrss would be the parent's across exec
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
before = resident("VmRSS")
model, variables = fmjax.load(sys.argv[2], scan=sys.argv[3] == "scan")
jax.block_until_ready(variables)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_costs_little_more_than_the_file(tmp_path):
    """Peak resident memory grows by at most 1.3 times the file, with transposes and stacking."""
    from fmjax.models.bert import Config, Model

    config = Config(
        hidden_size=1024,
        num_hidden_layers=10,
        num_attention_heads=16,
        intermediate_size=4096,
        vocab_size=1000,
    )
    model = Model(config, head="model")
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), hub.abstract_variables(model)
    )
    fmjax.save(tmp_path, model, zeros)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > 400e6
    small = FIXTURES / "bert-mlm-legacy"
    for form in ("loop", "scan"):
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(small), str(tmp_path), form],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        grown = int(done.stdout)
        assert grown <= 1.3 * size, f"{form}: {grown / size:.2f} times the file"
    (tmp_path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_labels": "2"}, "num_labels='2' must be a positive int, or distinct names"),
        ({"num_labels": {0: "bad", 1: "good"}}, "must be a positive int, or distinct names"),
        ({"num_labels": [0, 1]}, "must be a positive int, or distinct names"),
        ({"num_labels": True}, "must be a positive int"),
        ({"num_labels": 2.0}, "must be a positive int"),
        ({"dtype": "bf16"}, "dtype='bf16' must be of floats"),
        ({"dtype": "int8", "rng": 0}, "rng=0 must be a key.*dtype='int8' must be of floats"),
        # The letters of "he" begin the paths of head and of embeddings.
        ({"new": "he"}, r"new='he' is one string and must be several: new=\('he',\)"),
    ],
    ids=repr,
)
def test_arguments_of_the_wrong_kind_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        fmjax.load(FIXTURES / "bert-seqcls", **arguments)


def test_arguments_of_new_models_are_checked():
    with pytest.raises(ValueError, match="rng=None must be a key"):
        fmjax.create("bert", "tiny", rng=None)
    with pytest.raises(ValueError, match="a family whose heads have no labels"):
        fmjax.create("vae", "tiny", num_labels=2, rng=jax.random.key(0))
    model, _ = fmjax.load(FIXTURES / "bert-seqcls", num_labels=np.int64(2), new=("head/",))
    assert model.config.id2label == ("LABEL_0", "LABEL_1")


def test_how_to_generate_is_saved_with_the_model(tmp_path):
    source = FIXTURES / "gpt2-lm"
    model, variables = fmjax.load(source)
    config = fmjax.load_generation_config(source).replace(eos_token_id=[30, 31], pad_token_id=2)
    with pytest.raises(ValueError, match="tokenizer='gpt2' has no save_pretrained"):
        fmjax.save(tmp_path / "it", model, variables, "gpt2")
    assert not (tmp_path / "it").exists()
    fmjax.save(tmp_path / "it", model, variables, generation_config=config)
    assert fmjax.load_generation_config(tmp_path / "it") == config
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "it")
    assert (theirs.eos_token_id, theirs.pad_token_id) == ([30, 31], 2)


def test_saving_leaves_a_folder_that_says_what_it_is(tmp_path, rng):
    model, variables = fmjax.load(FIXTURES / "bert-seqcls")
    fmjax.save(tmp_path / "a" / "b", model, variables)
    data = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert data["architectures"] == ["BertForSequenceClassification"]
    assert data["model_type"] == "bert"
    assert data["dtype"] == "float32"
    assert "add_pooling_layer" not in data
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_a_save_over_another_that_is_cut_off_is_no_model(tmp_path, monkeypatch):
    """Not new weights beside the old config, which have the same shapes."""
    model, variables = fmjax.load(FIXTURES / "bert-seqcls")
    fmjax.save(tmp_path, model, variables)
    replace = os.replace

    def killed(source, target):
        if Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    other = model.clone(config=dataclasses.replace(model.config, hidden_act="relu"))
    with pytest.raises(KeyboardInterrupt):
        fmjax.save(tmp_path, other, variables)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        fmjax.load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["marian", "mixtral"])
def test_a_key_gives_the_same_weights_however_layers_run(name):
    """And they are what the model's own initialisation gives, not zeros or each other's."""
    family = family_of(name)
    rng = jax.random.key(3)
    model, loop = fmjax.create(name, "tiny", rng=rng)
    _, scanned = fmjax.create(name, "tiny", rng=rng, scan=True)
    assert_trees_all_equal(stack_layers(loop), scanned)
    inputs = family.inputs(model.config, "model")
    own = jax.jit(lambda rng: model.init(rng, **inputs))(rng)
    assert_trees_all_close(loop, own, rtol=1e-6)
    _, other = fmjax.create(name, "tiny", rng=jax.random.key(4))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((loop, other))]
    assert len(set(pointers)) == len(pointers)  # or donating them would fail
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), loop, other)
    assert any(jax.tree.leaves(moved))
    _, low = fmjax.create(name, "tiny", rng=rng, dtype=jnp.bfloat16)
    assert_trees_all_equal(low, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loop))


def test_tokenizers_of_families_that_are_ours_alone_come_without_a_warning(tmp_path, capfd):
    tokenizer = train_tokenizer(["a red heart", "a blue flag"], kind="bytebpe", vocab_size=270)
    config = dataclasses.replace(dalle.VARIANTS["tiny"], text_vocab_size=len(tokenizer))
    model, variables = fmjax.create("dalle", config, head="causal_lm", rng=jax.random.key(0))
    fmjax.save(tmp_path, model, variables, tokenizer)
    read = fmjax.load_tokenizer(tmp_path)
    assert read("a red flag")["input_ids"] == tokenizer("a red flag")["input_ids"]
    assert "model of type" not in capfd.readouterr().err
