"""Videos from files."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fmjax.data.clips import read_clips, segment_middles
from fmjax.data.decoding import decode
from fmjax.data.images import resized


def write_gif(path, levels):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(np.full((6, 9, 3), level, np.uint8)) for level in levels]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def test_segment_middles():
    np.testing.assert_array_equal(segment_middles(9, 3), [1, 4, 7])
    np.testing.assert_array_equal(segment_middles(2, 4), [0, 0, 1, 1])
    np.testing.assert_array_equal(segment_middles(1, 2), [0, 0])


def test_animated_files_and_folders_of_frames(tmp_path):
    write_gif(tmp_path / "dark" / "a.gif", [10, 20, 30, 40, 50, 60])
    folder = tmp_path / "light" / "b"
    folder.mkdir(parents=True)
    for number, level in enumerate((200, 210, 220)):
        Image.new("L", (9, 6), level).save(folder / f"{number}.png")
    (tmp_path / "light" / "notes.txt").write_text("no video")
    examples = read_clips(tmp_path, frames=3, read=lambda frame: resized(decode(frame), (4, 4)))
    assert examples.clips.shape == (2, 3, 4, 4, 3)
    assert examples.label_names == ("dark", "light")
    np.testing.assert_array_equal(examples.labels, [0, 1])
    np.testing.assert_array_equal(examples.clips[:, :, 0, 0, 0], [[20, 40, 60], [200, 210, 220]])
    columns = examples.columns()
    assert len(columns) == 2


def test_all_that_is_wrong_is_listed(tmp_path):
    write_gif(tmp_path / "dark" / "a.gif", [10, 20])
    (tmp_path / "dark" / "b.gif").write_bytes(b"GIF89a broken")
    (tmp_path / "odd" / "empty").mkdir(parents=True)
    Image.new("RGB", (5, 5)).save(tmp_path / "dark" / "c.png")
    content = bytearray((tmp_path / "dark" / "c.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)  # of its header
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "dark" / "large.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"b\.gif") as error:
        read_clips(tmp_path, frames=2, label_names=("dark",))
    assert "the folder odd is none of the classes" in str(error.value)
    assert "dark/large.png: Image size (3600000000 pixels)" in str(error.value)
    assert "holds no pictures" in str(error.value)
    assert "the frames have 2 sizes" in str(error.value)
    with pytest.raises(ValueError, match="there are no videos"):
        read_clips(tmp_path / "odd" / "empty", frames=2)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        read_clips(tmp_path / "none", frames=2)
    with pytest.raises(ValueError, match="frames is 0"):
        read_clips(tmp_path, frames=0)
