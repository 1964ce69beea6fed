import math
import pathlib
import shutil

import pytest
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from uad_jax import writer


def read_events(workdir: pathlib.Path) -> list[list[event_pb2.Event]]:
    """Decodes the TFRecord frames of every event file, oldest first."""
    files = []
    for path in sorted((workdir / "tb").iterdir()):
        data, events = path.read_bytes(), []
        while data:
            length = int.from_bytes(data[:8], "little")
            body = data[12 : 12 + length]
            stored = int.from_bytes(data[12 + length : 16 + length], "little")
            assert stored == record_writer.masked_crc32c(body)
            events.append(event_pb2.Event.FromString(body))
            data = data[16 + length :]
        files.append(events)
    return files


def test_metrics_are_read_as_written(tmp_path: pathlib.Path) -> None:
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(1, {"train/loss": 0.5})
    metrics.write(2, {"train/loss": 0.25, "eval/loss": math.inf})
    assert writer.read_metrics(tmp_path) == [  # before close: every line is flushed
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25, "eval/loss": math.inf},
    ]
    metrics.close()


def test_a_run_without_metrics_has_none(tmp_path: pathlib.Path) -> None:
    assert writer.read_metrics(tmp_path) == []


def test_tensorboard_gets_the_same_scalars(tmp_path: pathlib.Path) -> None:
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(7, {"train/loss": 0.5, "perf/slices_per_second": 120.0})
    metrics.close()
    (events,) = read_events(tmp_path)
    assert events[0].file_version == "brain.Event:2"
    assert [
        (e.step, [(v.tag, v.simple_value) for v in e.summary.value]) for e in events[1:]
    ] == [(7, [("train/loss", 0.5), ("perf/slices_per_second", 120.0)])]


def test_a_torn_last_line_is_left_out(tmp_path: pathlib.Path) -> None:
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(1, {"train/loss": 0.5})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    assert [line["step"] for line in writer.read_metrics(tmp_path)] == [1]
    metrics = writer.MetricWriter(tmp_path, resume_step=1)
    metrics.write(2, {"train/loss": 0.25})
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "train/loss": 0.5}',
        '{"step": 2, "train/loss": 0.25}',
    ]


def test_going_on_writes_no_step_twice(tmp_path: pathlib.Path) -> None:
    metrics = writer.MetricWriter(tmp_path)
    for step in (10, 20, 30, 40):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    metrics = writer.MetricWriter(tmp_path, resume_step=20)
    metrics.write(30, {"train/loss": 2.0})
    metrics.close()
    assert writer.read_metrics(tmp_path) == [
        {"step": 10, "train/loss": 1.0},
        {"step": 20, "train/loss": 1.0},
        {"step": 30, "train/loss": 2.0},
    ]
    _, second = read_events(tmp_path)
    assert second[1].step == 21
    assert second[1].session_log.status == event_pb2.SessionLog.START


def test_a_run_from_scratch_drops_old_lines(tmp_path: pathlib.Path) -> None:
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(10, {"train/loss": 1.0})
    metrics.close()
    writer.MetricWriter(tmp_path).close()
    assert writer.read_metrics(tmp_path) == []
    _, second = read_events(tmp_path)
    assert second[1].step == 1
    assert second[1].session_log.status == event_pb2.SessionLog.START


def test_fault_A39_lost_log_files_are_warned_about_once(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(1, {"train/loss": 1.0})
    shutil.rmtree(tmp_path / "tb")
    (tmp_path / "metrics.jsonl").unlink()
    for step in (2, 3):
        metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    assert [line["step"] for line in writer.read_metrics(tmp_path)] == [2, 3]
    assert caplog.text.count("training goes on without it") == 1
    assert "tb cannot be written" in caplog.text


def test_fault_A39_a_failing_disk_is_warned_about_once(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = tmp_path / "run"
    metrics = writer.MetricWriter(workdir)
    shutil.rmtree(workdir)
    for step in (1, 2):
        metrics.write(step, {"train/loss": 1.0})
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    workdir.mkdir()  # the file system is back
    metrics.write(3, {"train/loss": 1.0})
    metrics.close()
    assert [line["step"] for line in writer.read_metrics(workdir)] == [3]


def test_fault_A39_tensorboard_that_never_opens_does_not_stop_a_run(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "tb").write_text("in the way")
    metrics = writer.MetricWriter(tmp_path)
    metrics.write(1, {"train/loss": 1.0})
    metrics.close()
    assert "tb cannot be written" in caplog.text
    assert len(writer.read_metrics(tmp_path)) == 1
