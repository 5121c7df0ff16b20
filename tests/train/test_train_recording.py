"""The recorder: lines and events on disk at once, and nothing double after a restart."""

import json
import math
import struct
import time

import pytest
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent
from tensorboardX.proto.event_pb2 import SessionLog

from fmjax.train.loop import Event
from fmjax.train.recording import Recorder, read_metrics, recording, writable_folder


def tensorboard_events(folder):
    """All events of a folder as TensorBoard reads them: length, checksum, event, checksum."""
    events = []
    for path in sorted((folder / "tb").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = data[at + 12 : at + 12 + size]
            assert struct.unpack_from("<I", data, at + 8)[0] == masked_crc(data[at : at + 8])
            assert struct.unpack_from("<I", data, at + 12 + size)[0] == masked_crc(event)
            events.append(TensorBoardEvent.FromString(event))
            at += 16 + size
    return events


def masked_crc(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def shown_scalars(folder):
    """What TensorBoard shows: a session that starts at step s hides what was at s or later."""
    shown = {}
    for event in tensorboard_events(folder):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < event.step}
        for value in event.summary.value:
            shown[value.tag, event.step] = value.simple_value
    return shown


def test_lines_and_events_are_on_disk_when_write_returns(tmp_path):
    recorder = Recorder(tmp_path / "new" / "run")
    recorder.write(3, "val", {"loss": 0.5, "f1": math.nan})
    folder = tmp_path / "new" / "run"
    text = (folder / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "split": "val", "loss": 0.5, "f1": null}\n'
    shown = shown_scalars(folder)
    assert shown["val/loss", 3] == 0.5
    assert math.isnan(shown["val/f1", 3])
    recorder.close()


def test_events_have_a_version_and_times(tmp_path):
    start = time.time()
    with Recorder(tmp_path, step=299) as recorder:
        recorder.write(70_000, "train", {"loss": 0.5, "learning_rate": 2e-5})
    version, session, scalars = tensorboard_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert session.step == 300
    assert scalars.step == 70_000
    assert [value.tag for value in scalars.summary.value] == ["train/loss", "train/learning_rate"]
    assert start <= version.wall_time <= scalars.wall_time <= time.time()


def test_resuming_drops_what_came_after_and_a_torn_line(tmp_path):
    with Recorder(tmp_path) as recorder:
        for step in (1, 2, 3, 4):
            recorder.write(step, "train", {"loss": 0.1 * step})
    path = tmp_path / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:2]
    with path.open("a") as file:
        file.write('{"step": 5, "spl')
    with Recorder(tmp_path, step=2) as recorder:
        assert path.read_text() == "".join(kept)
        recorder.write(3, "train", {"loss": 7.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 7.0)]
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []
    shown = shown_scalars(tmp_path)
    assert {step: value for (_, step), value in shown.items()} == pytest.approx(
        {1: 0.1, 2: 0.2, 3: 7.0}
    )


def test_a_run_from_the_start_starts_with_nothing(tmp_path):
    with Recorder(tmp_path) as recorder:
        recorder.write(0, "val", {"loss": 1.0})
        recorder.write(1, "val", {"loss": 1.0})
    with Recorder(tmp_path, step=1):
        assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    with Recorder(tmp_path):
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_lines_that_are_no_records_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\nrubbish\n{"loss": 1}\n\xff\n[1]\n{"step": 2}\n{"st')
    with pytest.raises(ValueError, match=r"metrics.jsonl: lines \[2, 3, 4, 5\] \(4 in all\)"):
        Recorder(tmp_path, step=2)
    assert b"rubbish" in path.read_bytes(), "nothing was rewritten"


def test_the_training_line(tmp_path):
    event = Event(20, None, {"loss": 0.5, "grad_norm": 1.0}, 4.0, 64, 640)  # type: ignore
    with Recorder(tmp_path) as recorder:
        recording(recorder, schedule=lambda count: 0.01 * count)(event)
        recording(recorder)(Event(40, None, {"loss": 0.25}, 2.0, 64, 0))  # type: ignore
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "step": 20,
        "split": "train",
        "loss": 0.5,
        "grad_norm": 1.0,
        "learning_rate": 0.01 * 19,
        "examples_per_second": 16.0,
        "tokens_per_second": 160.0,
        "seconds": 4.0,
    }
    assert json.loads(second) == {
        "step": 40, "split": "train", "loss": 0.25, "examples_per_second": 32.0, "seconds": 2.0,
    }  # fmt: skip


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="choose another folder") as error:
            Recorder(folder)
        assert str(folder) in str(error.value)
    assert writable_folder(tmp_path / "a" / "b").is_dir()
