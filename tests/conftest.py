"""Four devices on any machine, no network, and few compilations."""

import atexit
import csv
import itertools
import os
import shutil
import tempfile
from importlib import metadata

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=4"
    # Tiny models spend their time in the compiler: much less of it without LLVM's optimisations.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    # One LLVM module a program, and not one a core: a fifth less, and the other core has a worker.
    + " --xla_cpu_parallel_codegen_split_count=1"
)
if metadata.version("jaxlib") < "0.11":  # later ones know no such flag, and stop at it
    # The plain emitters of fused loops compile sooner: three BERT heads in 3.3 s of CPU, not 8.9 s.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one process has compiled, the other worker and the processes they start need not.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="fmjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
from hypothesis import settings

# Compiling takes longer than any deadline, and drawn examples must not differ between machines.
settings.register_profile("fmjax", deadline=None, derandomize=True, max_examples=20)
settings.load_profile("fmjax")


MODULES = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """What a module's tests have compiled is of little use to the next one's: 80 models a run.

    Not after each one: what JAX has traced of its own functions takes half a second to trace again.
    """
    yield
    if next(MODULES) % 8 == 0:
        jax.clear_caches()


@pytest.fixture
def rng():
    """A typed random key."""
    return jax.random.key(0)


WORDS = "film story actor plot scene music long short quiet loud red blue".split()
GOOD, BAD = "wonderful lovely great".split(), "awful boring dull".split()


def sentences(count, seed):
    """Sentences whose label is the kind of adjective in them."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = list(draw.choice(WORDS, draw.integers(2, 14)))
        label = int(draw.integers(2))
        words.insert(int(draw.integers(len(words))), draw.choice([BAD, GOOD][label]))
        rows.append({"text": " ".join(words), "label": ["bad", "good"][label]})
    return rows


@pytest.fixture(scope="session")
def sentence_files(tmp_path_factory):
    """A folder with train.csv, val.csv and test.csv."""
    folder = tmp_path_factory.mktemp("sentences")
    for split, count, seed in (("train", 150, 0), ("val", 40, 1), ("test", 41, 2)):
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(sentences(count, seed))
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A Hugging Face folder: a tiny random BERT with the words above as its tokenizer's."""
    from transformers import BertTokenizerFast

    import fmjax
    from fmjax.models.bert import Config

    folder = tmp_path_factory.mktemp("tiny_bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *GOOD, *BAD]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(vocabulary))
    config = Config(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    model, variables = fmjax.create("bert", config, head="model", rng=jax.random.key(0))
    return fmjax.save(folder, model, variables, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def stripes(tmp_path_factory):
    """A folder of gray pictures of two kinds of stripes."""
    from PIL import Image

    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 8), ("test", 9)):
        for kind in ("columns", "rows"):
            folder = root / split / kind
            folder.mkdir(parents=True)
            for number in range(count):
                stripes = np.tile(rng.permutation([0, 0, 0, 255, 255, 255, 60, 190]), (8, 1))
                picture = (stripes if kind == "columns" else stripes.T).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{number}.png")
    return root
