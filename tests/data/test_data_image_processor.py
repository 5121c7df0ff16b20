"""preprocessor_config.json: the pixels that transformers' Pillow processors make, or an error."""

import io
import json
import warnings

import numpy as np
import pytest
import transformers
from PIL import Image
from transformers.image_utils import load_image

from fmjax.data.decoding import decode
from fmjax.data.image_processor import (
    TYPES,
    ImageProcessor,
    Size,
    load_image_processor,
    parse_image_processor,
)

# Sizes that no wrong side or rounding survives; of every rule, of every type its own.
SQUARE = [{"size": {"height": 13, "width": 18}}, {"size": 11}]
EDGE = [{"size": {"shortest_edge": 13}}, {"size": 12}]
CROPS = [
    {"size": {"shortest_edge": 17}, "crop_size": {"height": 14, "width": 9}},
    {"size": {"height": 9, "width": 21}, "crop_size": 16},
    {"size": 15, "crop_size": [12, 20], "rescale_factor": 1 / 127.5},
]
DETRS = [
    {"size": {"shortest_edge": 17, "longest_edge": 29}},
    {"size": 16, "max_size": 21},
    {"size": {"max_height": 12, "max_width": 15}, "pad_size": {"height": 40, "width": 33}},
]
CHANGES = {
    "ViT": [*SQUARE, {"do_resize": False, "do_rescale": False}, *CROPS[:1]],
    "Beit": [*SQUARE, {"do_center_crop": True, **CROPS[0]}],
    "Bit": CROPS,
    "CLIP": CROPS[:1],
    "ConvNext": [*EDGE, {"size": 384, "resample": 1}, {"size": 20, "crop_pct": 0.9, "resample": 0}],
    "DeiT": [*CROPS, {"do_center_crop": False, "do_normalize": False, **SQUARE[0]}],
    "EfficientNet": [
        *SQUARE,
        {"rescale_offset": True, "rescale_factor": 1 / 127.5, "do_normalize": False, **SQUARE[0]},
        {"include_top": False, "image_mean": [0.1, 0.2, 0.3], **SQUARE[1]},
    ],
    "MobileNetV1": CROPS[:1],
    "MobileNetV2": CROPS,
    "MobileViT": CROPS[:2],
    "Pvt": SQUARE,
    "Segformer": SQUARE,
    "Siglip": SQUARE[:1],
    "Detr": DETRS,
    "ConditionalDetr": DETRS[:1],
    "DeformableDetr": DETRS[:1],
}


def pictures(*sizes):
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for size in (sizes or [(20, 31), (37, 22), (16, 16)])
    ]


def theirs(kind, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, f"{kind}ImageProcessorPil")(**settings)


def check(ours, peer, images):
    """Each alone, and where sizes agree together: what both make of the pictures."""
    together = ours.do_pad or ours.do_center_crop
    for group in [images] if together else [[image] for image in images]:
        expected = peer(group, return_tensors="np")
        out = ours(group)
        assert out.keys() == expected.keys()
        want = np.moveaxis(expected["pixel_values"], 1, -1)
        assert out["pixel_values"].shape == want.shape
        assert out["pixel_values"].dtype == np.float32
        # The factor and the mean come in another order: one rounding of float32.
        np.testing.assert_allclose(
            out["pixel_values"], want, rtol=1e-6, atol=1e-6 / min(ours.normalisation[1])
        )
        if ours.do_pad:
            np.testing.assert_array_equal(out["pixel_mask"], expected["pixel_mask"])


@pytest.mark.parametrize("kind", TYPES)
def test_pixels_are_transformers(kind):
    for change in CHANGES[kind]:
        check(
            parse_image_processor({"image_processor_type": f"{kind}ImageProcessor", **change}),
            theirs(kind, **change),
            pictures(),
        )


@pytest.mark.parametrize("kind", TYPES)
def test_defaults_are_those_of_the_class(kind, tmp_path):
    """What a file leaves out is as if it were there; what we write PyTorch reads as we do."""
    peer = theirs(kind)
    peer.save_pretrained(tmp_path)
    short = parse_image_processor({"image_processor_type": f"{kind}ImageProcessor"})
    assert load_image_processor(tmp_path) == short
    short.save_pretrained(tmp_path)
    again = type(peer).from_pretrained(tmp_path).to_dict()
    for key, value in peer.to_dict().items():
        found = again[key]
        assert (list(found) if isinstance(value, tuple) else found) == (
            list(value) if isinstance(value, tuple) else value
        ), key
    assert load_image_processor(tmp_path) == short


def test_kinds_of_pictures():
    """Gray, palette, two colours, CMYK, alpha in three ways, turned, of one pixel."""
    rgb = pictures((20, 31))[0]
    alpha = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 31), dtype=np.uint8))
    clear = rgb.copy()
    clear.putalpha(alpha)
    palette = rgb.quantize(9)
    see_through = palette.copy()
    see_through.info["transparency"] = 3
    gray = rgb.convert("L")
    both = gray.copy()
    both.putalpha(alpha)
    kinds = [
        rgb, gray, palette, see_through, clear, both, rgb.convert("1"), rgb.convert("CMYK"),
        rgb.convert("YCbCr"), rgb.convert("HSV"), Image.new("RGB", (1, 1), (9, 99, 199)),
    ]  # fmt: skip
    check(
        parse_image_processor({"image_processor_type": "ViTImageProcessor", **SQUARE[0]}),
        theirs("ViT", do_convert_rgb=True, **SQUARE[0]),
        kinds,
    )
    for image in kinds:  # an array says the same, and so does the file
        if image.mode in ("L", "RGB", "RGBA"):
            np.testing.assert_array_equal(decode(np.asarray(image)), decode(image))
            file = io.BytesIO()
            image.save(file, "png")
            np.testing.assert_array_equal(decode(file.getvalue()), decode(image))


def test_a_turned_picture_and_a_file(tmp_path):
    image = pictures((20, 31))[0]
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path := tmp_path / "a.png", exif=exif)
    upright = load_image(str(path))
    assert upright.size == (20, 31)
    np.testing.assert_array_equal(decode(path), np.asarray(upright))
    np.testing.assert_array_equal(decode(str(path)), decode(Image.open(path)))


def test_sixteen_bits_are_eight():
    values = np.arange(0, 2**16, 257, dtype=np.uint16).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    np.testing.assert_array_equal(decode(file.getvalue(), 1)[..., 0].ravel(), np.arange(256))
    for wrong in (Image.new("I", (2, 2)), Image.new("F", (2, 2))):
        with pytest.raises(ValueError, match="without a known range; scale them to bytes"):
            decode(wrong)


def test_one_channel():
    ours = parse_image_processor(
        {
            "image_processor_type": "ViTImageProcessor", "image_mean": [0.3], "image_std": [0.2],
            **SQUARE[0],
        }
    )  # fmt: skip
    assert ours.channels == 1
    peer = theirs("ViT", image_mean=[0.3], image_std=[0.2], **SQUARE[0])
    check(ours, peer, [image.convert("L") for image in pictures()])
    np.testing.assert_array_equal(
        ours.batch(pictures()[:1])["pixel_values"],
        ours.batch([pictures()[0].convert("L")])["pixel_values"],
    )


def test_every_size_is_rounded_as_transformers():
    rng = np.random.default_rng(0)
    images = pictures(*rng.integers(1, 60, (60, 2)).tolist())
    for kind, size in (
        ("Bit", {"shortest_edge": 7}),
        ("Detr", {"shortest_edge": 23, "longest_edge": 31}),
        ("Detr", {"max_height": 19, "max_width": 11}),
    ):
        peer = theirs(kind, size=size, do_center_crop=False, do_pad=False)
        for image in images:
            want = np.array(image)
            try:
                want = peer.resize(np.moveaxis(want, -1, 0), peer.size, 2).shape[1:]
            except ValueError:  # no pixel is left of a side
                want = None
            got = Size(**size).of(image.height, image.width)
            assert (got if min(got) else None) == want


@pytest.mark.parametrize("format", ["png", "jpeg", "bmp", "gif", "webp"])
def test_broken_files_are_refused(format):
    """Cut off anywhere, or with a byte changed: an image, or one kind of error."""
    file = io.BytesIO()
    pictures((9, 14))[0].save(file, format)
    whole = file.getvalue()
    assert decode(whole).shape == (9, 14, 3)
    rng = np.random.default_rng(0)
    refused = 0
    cases = [whole[:length] for length in range(0, len(whole) - 40, 11)]
    for _ in range(200):
        content = bytearray(whole)
        content[rng.integers(min(len(whole), 200))] = rng.integers(256)
        cases.append(bytes(content))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in cases:
            try:
                assert decode(content).dtype == np.uint8
            except ValueError:  # nothing else
                refused += 1
    assert refused > 20


def test_what_cannot_be_used_is_named_all_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = pictures((8, 8))[0]
    image.save(good := tmp_path / "good.png")
    (tmp_path / "text.png").write_text("text")
    pictures((8, 130))[0].save(tmp_path / "large.png")
    pictures((80, 130))[0].save(tmp_path / "huge.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:100])
    names = ["good", "text", "large", "huge", "cut", "missing"]
    ours = ImageProcessor(size=Size(shortest_edge=8))
    everything = [
        *(tmp_path / f"{name}.png" for name in names), np.zeros((2, 2)), 3, np.zeros((1, 500), "u1")
    ]  # fmt: skip
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError) as error:  # noqa: PT011
        ours(everything)
    for words in (
        "pictures: 8 problems",
        "text.png: its 4 bytes are no picture; it must be PNG, JPEG",
        "large.png: it has 8 x 130 pixels, more than 1000; make it smaller or set",
        "huge.png: Image size (10400 pixels) exceeds",
        "cut.png: the file is broken",
        "missing.png: [Errno 2]",
        "picture 6: an array is float64 [2, 2]",
        "picture 7: a int is no picture",
        "picture 8: resized it would have 8 x 4000 pixels",
    ):
        assert words in str(error.value)
    assert "good.png" not in str(error.value)
    with pytest.raises(ValueError, match="have 2 sizes after ViTImageProcessor"):
        ours([image, pictures((8, 9))[0]])
    with pytest.raises(ValueError, match=r"pad_size=.* is below the pictures' 8 x 8"):
        parse_image_processor(
            {"image_processor_type": "DetrImageProcessor", "size": [8, 8], "pad_size": [4, 9]}
        )([image])
    with pytest.raises(ValueError, match="resized it would have 0 x 4"):
        ImageProcessor(size=Size(max_height=4, max_width=4))([np.zeros((1, 9), np.uint8)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["image_processor_type='' is not supported"]),
        ({"image_processor_type": "LevitImageProcessor"}, ["'LevitImageProcessor'"]),
        (
            {
                "image_processor_type": "ViTImageProcessorFast", "do_resize": 1,
                "size": {"side": 3}, "resample": 2.5, "image_mean": ["a"], "rescale_factor": True,
                "tiles": 4,
            },
            ["6 problems", "do_resize=1 must be true", "size={'side': 3} must be", "resample=2.5",
             "image_mean=['a'] must be a number", "rescale_factor=True must be a number",
             "tiles=4 is unknown"],
        ),
        (
            {
                "image_processor_type": "SegformerImageProcessor", "do_center_crop": True,
                "resample": 9, "image_mean": [0.5], "image_std": [0.5, 0.5, 0], "crop_pct": 2,
                "rescale_factor": 0, "do_pad": True, "pad_size": {"shortest_edge": 3},
            },
            ["10 problems", "do_center_crop=True: a Seg", "do_pad=True: a", "resample=9",
             "crop_pct=2.0: a", "image_std=(0.5, 0.5, 0.0) must be", "crop_pct=2.0 must be",
             "must have the same number of channels", "do_center_crop needs a crop_size",
             "rescale_factor=0.0 must", "pad_size={'shortest_edge': 3} must be a height"],
        ),
        (
            {"image_processor_type": "ConvNextImageProcessor", "size": [3, 4], "crop_pct": 2},
            ["of a ConvNext must be a shortest_edge", "crop_pct=2.0 must be above 0"],
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "size": -3, "image_std": [0.1, -1]},
            ["size={'height': -3, 'width': -3} must be a positive int"],
        ),
        (
            {"image_processor_type": "ViTImageProcessor", "image_std": [1, -1]},
            ["2 problems", "image_std=(1.0, -1.0) must be one number or three"],
        ),
    ],
)  # fmt: skip
def test_files_that_are_not_understood(data, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        parse_image_processor(data)
    for word in words:
        assert word in str(error.value)


def test_old_files(tmp_path):
    """From before classes had the name: feature extractors, ints as sizes, no name at all."""
    old = {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 2, "size": 224,
    }  # fmt: skip
    assert parse_image_processor(old) == ImageProcessor()
    detr = {
        "feature_extractor_type": "DetrFeatureExtractor", "format": "coco_detection", "size": 800,
        "max_size": 1333, "pad_and_return_pixel_mask": True,
    }  # fmt: skip
    assert parse_image_processor(detr) == parse_image_processor(
        {"image_processor_type": "DetrImageProcessor"}
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 256, "crop_size": 224}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deit"}))
    deit = load_image_processor(tmp_path)
    assert deit.image_processor_type == "DeiTImageProcessor"
    assert (deit.size, deit.crop_size, deit.resample) == (Size(256, 256), Size(224, 224), 3)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ValueError, match="no object"):
        load_image_processor(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no preprocessor_config\.json"):
        load_image_processor(tmp_path / "nowhere")
