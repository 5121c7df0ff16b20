"""The reader of Keras' files against Keras, and against hostile files."""

import os
import zipfile

os.environ["KERAS_BACKEND"] = "jax"

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras.src.legacy.saving import legacy_h5_format

from fmjax.weights import open_checkpoint


def load(path):
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "keras"
        return {name: np.array(tensor.read()) for name, tensor in checkpoint.tensors.items()}


def net():
    """Layers of every kind the reader names, with names of their own and without."""
    layers = keras.layers
    image = layers.Input((8, 8, 3))
    x = layers.Normalization(name="pixels")(image)
    x = layers.Conv2D(4, 3)(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.DepthwiseConv2D(3, use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.SeparableConv2D(5, 1, name="separable")(x)
    x = layers.BatchNormalization(center=False, name="uncentred")(x)
    x = layers.Conv2D(4, 1, use_bias=False)(x)
    x = layers.Flatten()(layers.LayerNormalization(name="layer")(x))
    return keras.Model(image, layers.Dense(2)(layers.Dropout(0.5, seed=1)(x)))


# What Keras calls the array, and who has it.
NAMES = {
    "conv2d_0": ("kernel", "bias"),
    "conv2d_1": ("kernel",),
    "batch_normalization_0": ("beta", "moving_mean", "moving_variance"),
    "depthwise": ("kernel",),
    "norm": ("gamma", "beta", "moving_mean", "moving_variance"),
    "separable": ("depthwise_kernel", "pointwise_kernel", "bias"),
    "uncentred": ("gamma", "moving_mean", "moving_variance"),
    "layer": ("gamma", "beta"),
    "pixels": ("mean", "variance", "count"),
    "dense_0": ("kernel", "bias"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model in every layout; automatic names do not begin where the session did."""
    folder = tmp_path_factory.mktemp("keras")
    keras.backend.clear_session()
    keras.layers.Conv2D(1, 1)
    model = net()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.normal(size=variable.shape).astype(variable.dtype))
    model.compile(optimizer="adam")
    model.optimizer.build(model.trainable_variables)
    model.save(folder / "whole.keras")
    model.save(folder / "whole.h5")
    model.save_weights(folder / "new.weights.h5")
    with h5py.File(folder / "old.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
    return folder, model


@pytest.mark.parametrize("file", ["whole.keras", "whole.h5", "old.h5", "new.weights.h5"])
def test_every_layout_gives_the_same_names_and_numbers(saved, file):
    folder, model = saved
    assert [layer.name for layer in model.layers][2] == "conv2d_1"
    expected = {}
    for variable in model.weights:
        layer, _, weight = variable.path.rpartition("/")
        layer = {"conv2d_1": "conv2d_0", "conv2d_2": "conv2d_1", "dense": "dense_0"}.get(
            layer, layer.replace("batch_normalization", "batch_normalization_0")
        )
        expected[f"{layer}/{weight}"] = np.asarray(variable)
    assert expected.keys() == {f"{k}/{name}" for k, names in NAMES.items() for name in names}
    if file == "new.weights.h5":  # which does not say that the shift is missing, not the scale
        expected["uncentred/beta"] = expected.pop("uncentred/gamma")
    read = load(folder / file)
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        assert read[name].dtype == array.dtype, name
        np.testing.assert_array_equal(read[name], array, err_msg=name)


def test_names_of_layers_come_from_the_config_or_are_asked_for(saved, tmp_path):
    """As Keras 3.0 wrote it, without names beside the weights."""
    folder, _ = saved
    with zipfile.ZipFile(folder / "whole.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    file = tmp_path / "model.weights.h5"
    file.write_bytes(members["model.weights.h5"])
    with h5py.File(file, "r+") as opened:
        for group in opened["layers"].values():
            if "vars" in group:
                group["vars"].attrs.pop("name", None)
    with pytest.raises(ValueError, match="does not name its layers"):
        load(file)
    members["model.weights.h5"] = file.read_bytes()
    with zipfile.ZipFile(tmp_path / "old.keras", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    read, reference = load(tmp_path / "old.keras"), load(folder / "whole.keras")
    assert read.keys() == reference.keys()
    for name, array in reference.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)


def test_models_inside_models_keep_all_parts_of_their_names(tmp_path):
    inner = keras.Sequential(
        [
            keras.layers.Input((2,)),
            keras.layers.Dense(3, name="a"),
            keras.layers.Dense(1, name="b"),
        ],
        name="inner",
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, keras.Sequential([inner]))
    assert all(name.startswith("inner/") for name in load(tmp_path / "x.h5"))
    assert len(load(tmp_path / "x.h5")) == 4


def old_file(path, arrays, layer="conv", **attributes):
    """The older layout by hand."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode()]
        group = file.create_group(layer)
        group.attrs["weight_names"] = [name.encode() for name in arrays]
        for name, array in arrays.items():
            group[name] = array
            group[name].attrs.update(attributes)
    return path


def test_names_of_the_oldest_files(tmp_path):
    arrays = {"conv_W_1:0": np.ones((1, 2)), "conv_b_1:0": np.zeros(2)}
    assert list(load(old_file(tmp_path / "x.h5", arrays))) == ["conv/kernel", "conv/bias"]


@pytest.mark.parametrize("dtype", ["<f8", ">f4", "<f2", "<i8", ">i2", "u1"])
def test_numbers_of_every_kind(dtype, tmp_path):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    (read,) = load(old_file(tmp_path / "x.h5", {"conv/kernel": array})).values()
    assert read.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read, array)


def test_bfloat16_is_marked_by_an_attribute(tmp_path):
    array = np.arange(3).astype(ml_dtypes.bfloat16)
    path = old_file(tmp_path / "x.h5", {"conv/kernel": array.view("V2")}, dtype="bfloat16")
    (read,) = load(path).values()
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_long_lists_of_names_are_in_pieces(tmp_path):
    """HDF5 keeps attributes below 64 KiB."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for part, names in enumerate(("ab", "c")):
            file.attrs[f"layer_names{part}"] = [name.encode() for name in names]
        for name in "abc":
            group = file.create_group(name)
            group.attrs["weight_names"] = [b"kernel:0"]
            group["kernel:0"] = np.ones(1)
    assert list(load(tmp_path / "x.h5")) == ["a/kernel", "b/kernel", "c/kernel"]


def hostile(make):
    """A file whose one array `make` writes into the group."""

    def write(path):
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = [b"conv"]
            group = file.create_group("conv")
            group.attrs["weight_names"] = [b"kernel"]
            make(file, group)

    return write


def external_storage(file, group):
    group.create_dataset("kernel", (4,), "u1", external=[("/etc/hostname", 0, 4)])


def virtual(file, group):
    layout = h5py.VirtualLayout((4,), "u1")
    layout[:] = h5py.VirtualSource("/etc/hostname", "x", (4,))
    group.create_virtual_dataset("kernel", layout)


def object_dtype(file, group):
    group.create_dataset("kernel", data=["text"], dtype=h5py.string_dtype())


def compound(file, group):
    group["kernel"] = np.zeros(2, [("a", "f4"), ("b", "i4")])


def odd_float(file, group):
    """Four bytes, but not IEEE's."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(100)
    space = h5py.h5s.create_simple((2,))
    h5py.h5d.create(group.id, b"kernel", kind, space).write(
        h5py.h5s.ALL, h5py.h5s.ALL, np.ones(2, "f4")
    )


def many_names(file, group):
    group.attrs.create("weight_names", np.zeros((0,)))
    del group.attrs["weight_names"]
    group.attrs["weight_names"] = np.ones(3)


HOSTILE = {
    "external link": (
        lambda _, group: group.__setitem__("kernel", h5py.ExternalLink("/etc/x.h5", "/a")),
        "link to elsewhere",
    ),
    "soft link": (
        lambda _, group: group.__setitem__("kernel", h5py.SoftLink("/conv")),
        "link to elsewhere",
    ),
    "missing": (lambda _, group: None, "or missing"),
    "group": (lambda _, group: group.create_group("kernel"), "is no array"),
    "external storage": (external_storage, "lies in other files"),
    "virtual": (virtual, "lies in other files"),
    "object": (object_dtype, "none of numbers"),
    "compound": (compound, "none of numbers"),
    "odd float": (odd_float, "none of numbers"),
    "compressed": (
        lambda _, group: group.create_dataset("kernel", data=np.zeros(9), compression="gzip"),
        "chunked, compressed",
    ),
    # Eight terabytes that are nowhere.
    "unwritten": (lambda _, group: group.create_dataset("kernel", (10**12,), "f8"), "empty"),
    "null": (lambda _, group: group.create_dataset("kernel", data=h5py.Empty("f4")), "is no array"),
    "numbers as names": (many_names, "are no strings"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused(kind, tmp_path):
    make, words = HOSTILE[kind]
    hostile(make)(tmp_path / "x.h5")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "x.h5")


def test_damaged_files_are_refused(saved, tmp_path):
    folder, _ = saved
    data = (folder / "old.h5").read_bytes()
    for length in (4, 100, 2000, len(data) // 2, len(data) - 100):
        (tmp_path / "x.h5").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"HDF5|damaged|outside the file"):
            load(tmp_path / "x.h5")
    (tmp_path / "x.h5").write_bytes(b"x" * 600 + data)
    with pytest.raises(ValueError, match="not HDF5"):
        load(tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a"] = np.ones(1)
    with pytest.raises(ValueError, match="neither layer_names nor layers"):
        load(tmp_path / "x.h5")


def test_collections_of_strings_are_checked_before_hdf5_reads_them(saved, tmp_path):
    """HDF5 2.0 loops for ever over an object of no size."""
    folder, _ = saved
    data = bytearray((folder / "new.weights.h5").read_bytes())
    first = data.index(b"GCOL\x01\0\0\0") + 16
    for number, size in ((0, 0), (1, 2**40)):
        data[first : first + 2] = number.to_bytes(2, "little")
        data[first + 8 : first + 16] = size.to_bytes(8, "little")
        (tmp_path / "x.h5").write_bytes(data)
        with pytest.raises(ValueError, match="damaged collection of strings"):
            load(tmp_path / "x.h5")


def test_cycles_of_groups_end(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("layers/conv2d")
        group["vars"] = group["again"] = group
    with pytest.raises(ValueError, match="in two groups"):
        load(tmp_path / "x.h5")


def test_zips_that_are_not_keras(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.keras", "w") as archive:
        archive.writestr("../model.weights.h5", b"")
    with pytest.raises(ValueError, match=r"without config.json and model.weights.h5"):
        load(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", b"{}" * 100)
    with pytest.raises(ValueError, match="is compressed"):
        load(tmp_path / "x.keras")
