"""DeiT against transformers: heads, other image sizes, published sizes."""

import dataclasses
from functools import partial

import pytest
from parity import check_defaults, check_head, check_sizes
from pictures import SMALL, images, without_labels

from fmjax.models import deit

CONFIG = deit.Config(**dataclasses.asdict(SMALL))


@pytest.mark.parametrize("head", deit.HEADS)
def test_equals_pytorch(head, tmp_path):
    masked = head == "masked_image_modeling"
    check_head(deit, without_labels(CONFIG, head), head, tmp_path, images(CONFIG, masked=masked))


def test_positions_of_other_sizes_equal_pytorch(tmp_path):
    def prepare(twin):
        twin.forward = partial(twin.forward, interpolate_pos_encoding=True)

    inputs = images(CONFIG, rows=26, columns=31)
    check_head(deit, CONFIG, "image_classification", tmp_path, inputs, prepare=prepare)


def test_published_sizes():
    check_sizes(deit, dict.fromkeys(deit.VARIANTS, "DeiTModel"))


def test_config_defaults_are_transformers_defaults():
    check_defaults(deit)
