"""Opening folders of every format, and writing them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from fmjax.weights import Tensor, modern_names, open_checkpoint, parse_size, write_checkpoint

FIXTURES = Path(__file__).parents[1] / "fixtures"
MASKED_LM = {
    "bert-mlm-flax_safetensors": "flax safetensors",
    "bert-mlm-legacy": "safetensors",
    "bert-mlm-sharded_bin": "torch",
    "bert-mlm-sharded_msgpack": "flax msgpack",
}


def read_all(path):
    with open_checkpoint(path) as checkpoint:
        tensors = modern_names(checkpoint.tensors)
        return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def same(left, right):
    assert set(left) == set(right)
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert array.shape == right[name].shape
        assert array.tobytes() == right[name].tobytes()


def tensors_of(arrays):
    def tensor(name, array):
        return Tensor(name, array.shape, array.dtype, lambda: array)

    return [tensor(name, np.asarray(array)) for name, array in arrays.items()]


@pytest.mark.parametrize("name", MASKED_LM)
def test_every_format_of_a_bert(name):
    with open_checkpoint(FIXTURES / name) as checkpoint:
        assert checkpoint.format == MASKED_LM[name]
        assert all(file.is_file() for file in checkpoint.files)
        for key, tensor in checkpoint.tensors.items():
            array = tensor.read()
            assert (tensor.name, tensor.shape, tensor.dtype) == (key, array.shape, array.dtype)


def test_the_same_model_in_three_formats():
    flax_names = read_all(FIXTURES / "bert-mlm-flax_safetensors")
    same(flax_names, read_all(FIXTURES / "bert-mlm-sharded_msgpack"))
    pytorch = read_all(FIXTURES / "bert-mlm-sharded_bin")
    same(flax_names, {name: pytorch[name] for name in flax_names})
    # Tied copies, which only .bin files hold.
    assert set(pytorch) - set(flax_names) == {
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }


def test_the_two_files_of_the_legacy_folder():
    folder = FIXTURES / "bert-mlm-legacy"
    left = read_all(folder / "model.safetensors")
    right = read_all(folder / "pytorch_model.bin")
    assert any("LayerNorm.weight" in name for name in left)
    same({name: left[name] for name in left if name in right}, right)


def test_the_bin_shards_are_what_torch_loads():
    folder = FIXTURES / "bert-mlm-sharded_bin"
    expected = {}
    for file in folder.glob("*.bin"):
        expected |= torch.load(file, weights_only=True)
    same(read_all(folder), {name: tensor.numpy() for name, tensor in expected.items()})


def test_a_single_msgpack_is_what_flax_loads():
    folder = FIXTURES / "bert-seqcls"
    tree = flax.serialization.msgpack_restore((folder / "flax_model.msgpack").read_bytes())
    read = read_all(folder)
    np.testing.assert_array_equal(read["classifier.weight"], tree["classifier"]["kernel"].T)
    query = tree["bert"]["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"]
    name = "bert.encoder.layer.1.attention.self.query.weight"
    np.testing.assert_array_equal(read[name], query.T)
    assert len(read) == len(list(flatten(tree)))


@pytest.mark.parametrize(
    ("name", "auto", "absent"),
    [
        ("resnet_bottleneck-cls", "AutoModelForImageClassification", "num_batches_tracked"),
        ("gpt2-lm", "AutoModelForCausalLM", "lm_head.weight"),
    ],
)
def test_translated_names_and_shapes_are_those_of_pytorch(name, auto, absent):
    """Batch statistics, convolutions, and GPT-2's dense layers, which PyTorch has as [I, O]."""
    config = transformers.AutoConfig.from_pretrained(FIXTURES / name)
    model = getattr(transformers, auto).from_config(config)
    with open_checkpoint(FIXTURES / name) as checkpoint:
        shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert shapes == {key: shape for key, shape in expected.items() if not key.endswith(absent)}


def flatten(tree):
    for value in tree.values():
        if isinstance(value, dict):
            yield from flatten(value)
        else:
            yield value


def test_one_file_of_any_kind(tmp_path):
    state = {"w": torch.ones(2)}
    for name in ("a.bin", "a.pt", "a.pth", "a.ckpt"):
        torch.save(state, tmp_path / name)
        assert set(read_all(tmp_path / name)) == {"w"}
    assert set(read_all(FIXTURES / "bert-mlm-sharded_bin" / "pytorch_model.bin.index.json")) == set(
        read_all(FIXTURES / "bert-mlm-sharded_bin")
    )
    (tmp_path / "a.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"\.safetensors, \.bin"):
        open_checkpoint(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.bin"):
        open_checkpoint(tmp_path / "none.bin")


def test_a_folder_prefers_safetensors_and_names_what_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"looked for model\.safetensors.*config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize({"flax": np.ones(1)})
    )
    assert set(read_all(tmp_path)) == {"flax"}
    torch.save({"torch": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert set(read_all(tmp_path)) == {"torch"}
    safetensors.torch.save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_all(tmp_path)) == {"safe"}


def test_other_makers_files(tmp_path):
    safetensors.torch.save_file(
        {"w": torch.ones(1)}, tmp_path / "model.safetensors", metadata={"format": "tf"}
    )
    with pytest.raises(ValueError, match="TensorFlow"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.x/spec/v1\noid ...")
    with pytest.raises(ValueError, match="git lfs pull"):
        open_checkpoint(tmp_path)
    safetensors.torch.save_file({"a\x1b[31m": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="not printable"):
        open_checkpoint(tmp_path)


def sharded(folder, weight_map, files):
    for name, state in files.items():
        safetensors.torch.save_file({key: torch.ones(1) for key in state}, folder / name)
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    "shard",
    ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "a\0b", 3],
)
def test_an_index_stays_in_its_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file({"w": torch.ones(1)}, tmp_path / "secret.safetensors")
    sharded(folder, {"w": shard}, {})
    with pytest.raises(ValueError, match="is mapped to"):
        open_checkpoint(folder)


def test_a_hub_cache_of_symlinks_opens(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    sharded(blobs, {"w": "s.safetensors"}, {"s.safetensors": ["w"]})
    for file in blobs.iterdir():
        os.symlink(os.path.relpath(file, snapshot), snapshot / file.name)
    assert set(read_all(snapshot)) == {"w"}


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{}", ValueError, "needs a weight_map"),
        ('{"weight_map": {}}', ValueError, "needs a weight_map"),
        ('{"weight_map": {"a": "s", "a": "s"}}', ValueError, "more than once"),
        ("[" * 10**5, ValueError, "no valid JSON"),
        ('{"weight_map": {"w": "s.safetensors"', ValueError, "no valid JSON"),
        (
            '{"weight_map": {"w": "gone1.safetensors", "v": "gone2.safetensors"}}',
            FileNotFoundError,
            r"gone1\.safetensors', 'gone2",
        ),
        (
            '{"weight_map": {"v": "s.safetensors", "u": "s.safetensors"}}',
            ValueError,
            r"v \(s.*u \(",
        ),
        ('{"weight_map": {"w": "s.txt"}}', ValueError, "what format"),
        ('{"weight_map": {"w": "s.safetensors", "v": "t.bin"}}', ValueError, "all alike"),
    ],
)
def test_false_indexes_are_refused(tmp_path, text, error, match):
    sharded(tmp_path, text, {"s.safetensors": ["w"]})
    (tmp_path / "s.txt").write_text("x")
    (tmp_path / "t.bin").write_text("x")
    with pytest.raises(error, match=match):
        open_checkpoint(tmp_path)


def test_a_huge_index_is_not_read(tmp_path):
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(10**10)  # sparse
    with pytest.raises(ValueError, match="the most is 100000000"):
        open_checkpoint(tmp_path)


def test_tensors_beside_the_index(tmp_path):
    files = {"a.safetensors": ["w", "extra"], "b.safetensors": ["v", "w"]}
    sharded(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"}, files)
    assert set(read_all(tmp_path)) == {"w", "v", "extra"}
    files["b.safetensors"].append("extra")
    sharded(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"}, files)
    with pytest.raises(ValueError, match="'extra' is in two shards"):
        open_checkpoint(tmp_path)


ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, ml_dtypes.bfloat16),
    "c": np.float32(2.5),
    "d": np.zeros((0, 3), np.int64),
    "e": np.arange(8, dtype=np.int64),
}


def test_one_file_as_pytorch_reads_it(tmp_path):
    written = write_checkpoint(tmp_path / "new" / "folder", tensors_of(ARRAYS))
    assert [path.name for path in written] == ["model.safetensors"]
    assert os.listdir(tmp_path / "new" / "folder") == ["model.safetensors"]
    with safetensors.safe_open(written[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("b").dtype == torch.bfloat16
        np.testing.assert_array_equal(file.get_tensor("a").numpy(), ARRAYS["a"])
    same(read_all(tmp_path / "new" / "folder"), {k: np.asarray(v) for k, v in ARRAYS.items()})


def test_shards_as_hugging_face_names_them(tmp_path):
    written = write_checkpoint(tmp_path, iter(tensors_of(ARRAYS)), max_shard_size=32)
    names = [path.name for path in written]
    assert names == [
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    index = json.loads(written[-1].read_text())
    assert index["metadata"]["total_size"] == sum(np.asarray(a).nbytes for a in ARRAYS.values())
    assert set(index["weight_map"]) == set(ARRAYS)
    for shard in names[:3]:
        held = safetensors.torch.load_file(tmp_path / shard)
        assert set(held) == {name for name, home in index["weight_map"].items() if home == shard}
        # 64 bytes of "e" alone exceed the limit, and have a shard of their own.
        assert sum(t.nbytes for t in held.values()) <= 32 or set(held) == {"e"}
    same(read_all(tmp_path), {k: np.asarray(v) for k, v in ARRAYS.items()})


@pytest.mark.parametrize("first", [10, 32, "1GB"])
@pytest.mark.parametrize("second", [10, 32, "1GB"])
def test_an_older_export_is_replaced_whole(tmp_path, first, second):
    for name in (
        "config.json",
        "model.safetensors.txt",
        "pytorch_model.bin",
        "my-model.safetensors",
    ):
        (tmp_path / name).write_text("not ours")
    (tmp_path / ".model.safetensors.123.tmp").write_text("of a killed export")
    write_checkpoint(tmp_path, tensors_of(ARRAYS), max_shard_size=first)
    arrays = {name: np.asarray(array) + np.ones((), array.dtype) for name, array in ARRAYS.items()}
    arrays["new"] = np.ones(3)
    written = write_checkpoint(tmp_path, tensors_of(arrays), max_shard_size=second)
    same(read_all(tmp_path), {name: np.asarray(array) for name, array in arrays.items()})
    kept = {"config.json", "model.safetensors.txt", "pytorch_model.bin", "my-model.safetensors"}
    assert set(os.listdir(tmp_path)) == kept | {path.name for path in written}


def test_a_failing_export_leaves_everything_as_it_was(tmp_path):
    write_checkpoint(tmp_path, tensors_of(ARRAYS), max_shard_size=32)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail():
        raise RuntimeError("the disk is on fire")

    broken = [*tensors_of(ARRAYS), Tensor("z", (8,), np.dtype(np.int64), fail)]
    for limit in (32, "1GB"):
        with pytest.raises(RuntimeError, match="on fire"):
            write_checkpoint(tmp_path, broken, max_shard_size=limit)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match=r"more than once: .*'a'"):
        write_checkpoint(tmp_path, tensors_of(ARRAYS) * 2)


@pytest.mark.parametrize("fail_at", range(1, 11))
def test_an_export_killed_while_renaming_is_never_a_mixture(tmp_path, monkeypatch, fail_at):
    """Shards of the same names: without care, an old index would name new shards."""
    write_checkpoint(
        tmp_path, tensors_of(ARRAYS), max_shard_size=32, described={"config.json": "old"}
    )
    old = read_all(tmp_path)
    arrays = {name: np.asarray(array) + np.ones((), array.dtype) for name, array in ARRAYS.items()}
    calls = 0

    def counted(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fail_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    with contextlib.suppress(KeyboardInterrupt):
        write_checkpoint(
            tmp_path, tensors_of(arrays), max_shard_size=32, described={"config.json": "new"}
        )
    monkeypatch.undo()
    try:
        found = read_all(tmp_path)
    except FileNotFoundError:
        return  # no index: not a checkpoint, and not a wrong one either
    assert found["a"].tobytes() in (old["a"].tobytes(), np.asarray(arrays["a"]).tobytes())
    new = found["a"].tobytes() != old["a"].tobytes()
    same(found, {k: np.asarray(v) for k, v in arrays.items()} if new else old)
    config = tmp_path / "config.json"
    assert not config.exists() or config.read_text() == ("new" if new else "old")


def test_a_checkpoint_can_be_written_over_itself(tmp_path):
    shutil.copytree(FIXTURES / "bert-mlm-sharded_msgpack", tmp_path / "x")
    before = read_all(tmp_path / "x")
    for _ in range(2):
        with open_checkpoint(tmp_path / "x") as checkpoint:
            write_checkpoint(tmp_path / "x", checkpoint.tensors.values())
        same(read_all(tmp_path / "x"), before)


def test_unwritable_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        write_checkpoint(tmp_path / "file", tensors_of(ARRAYS))
    with pytest.raises(OSError, match="file"):
        write_checkpoint(tmp_path / "file" / "below", tensors_of(ARRAYS))


def test_sizes():
    assert parse_size(7) == 7
    assert parse_size("7") == 7
    assert parse_size("200MB") == 200 * 10**6
    assert parse_size("5GB") == 5 * 10**9
    assert parse_size(" 1.5 GiB ") == 3 * 2**29
    assert parse_size("2kb") == 2000
    for wrong in ("", "GB", "5 parsecs", "-1GB", "0", 0, -3, "1e9", "0.1B", True, "5GBB"):
        with pytest.raises(ValueError, match="size"):
            parse_size(wrong)


def test_closing(tmp_path):
    write_checkpoint(tmp_path, tensors_of(ARRAYS))
    with open_checkpoint(tmp_path) as checkpoint:
        view = checkpoint.tensors["a"].read()
    np.testing.assert_array_equal(view, ARRAYS["a"])
    del view
    checkpoint.close()
    with pytest.raises(ValueError, match="closed"):
        checkpoint.tensors["a"].read()


LOADER = """
import sys
import numpy as np
from fmjax.weights import Rule, TRANSPOSE, import_params, open_checkpoint

class Leaf:
    dtype = np.dtype(np.float32)
    def __init__(self, shape):
        self.shape = shape

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key):
            return int(line.split()[1]) * 1024

path = sys.argv[1]
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
before = status("VmRSS")
with open_checkpoint(path) as checkpoint:
    names = sorted(checkpoint.tensors)
    abstract = {}
    rules = []
    for name in names:
        shape = checkpoint.tensors[name].shape
        # One dense kernel in two is transposed, as when loading PyTorch's.
        flip = len(shape) == 2 and int(name.split(".")[1]) % 2 == 0
        rules.append(Rule("params/" + name, name, *([TRANSPOSE] if flip else [])))
        abstract["params/" + name] = Leaf(shape[::-1] if flip else shape)
    params = import_params(rules, checkpoint.tensors, abstract, place=lambda path, leaf: leaf)
    peak = status("VmHWM") - before
print(peak, sum(leaf.nbytes for leaf in params.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["safetensors", "torch", "flax msgpack"])
def test_loading_takes_at_most_1_3_times_the_file(tmp_path, kind):
    """One leaf makes up half of it, as the embedding of a small language model does."""
    state = {"w.0.weight": np.ones((25_000, 1000), np.float32)}
    state |= {f"w.{i}.weight": np.full((1000, 2500), i, np.float32) for i in range(1, 11)}
    if kind == "safetensors":
        write_checkpoint(tmp_path, tensors_of(state))
    elif kind == "torch":
        torch.save(
            {name: torch.from_numpy(array) for name, array in state.items()},
            tmp_path / "pytorch_model.bin",
        )
    else:
        tree = {f"w.{i}": {"weight": array} for i, array in enumerate(state.values())}
        (tmp_path / "flax_model.msgpack").write_bytes(flax.serialization.msgpack_serialize(tree))
    del state
    (file,) = tmp_path.iterdir()
    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    )
    peak, held = map(int, result.stdout.split())
    assert held == 200_000_000
    assert held < peak < 1.3 * file.stat().st_size
