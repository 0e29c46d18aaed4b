"""What is written is whole or absent, whatever happens on the way; a folder has one process."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soul import stored
from soul.folderlock import LOCK, alone_in
from soul.stored import StorageError


@pytest.fixture
def small_files():
    """No file of this process may grow beyond 64 KiB: what a quota or a full disk does to a large one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    file = tmp_path / "scores.json"
    stored.write_json(file, {"value": 1})
    with pytest.raises(StorageError, match=r"File too large.*is whole: free some space \(\d+ MiB.*the same command"):
        stored.write_json(file, {"value": "x" * (1 << 17)})
    assert json.loads(file.read_text()) == {"value": 1}
    assert names(tmp_path) == ["scores.json"]


def test_a_line_that_does_not_fit_is_no_line(tmp_path):
    file = tmp_path / "log.jsonl"
    stored.append_line(file, {"step": 1}, flush=True)
    with file.open("ab") as stream:
        stream.write('{"step": 2, "text": "\u2028'.encode()[:-1])  # cut inside of a character
    assert stored.read_lines(file) == [{"step": 1}]
    full = tmp_path / "full.jsonl"
    full.symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device"):
        stored.append_line(full, {"step": 1})


def test_lines_end_at_newlines_alone(tmp_path):
    rows = [{"text": "one\u2028two\u0085three"}, {"text": ""}]
    stored.write_lines(tmp_path / "rows.jsonl", rows)
    assert stored.read_lines(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n[2]\n')
    with pytest.raises(ValueError, match="line 2: must hold an object"):
        stored.read_lines(tmp_path / "rows.jsonl")


def test_a_folder_is_published_whole_over_an_old_one(tmp_path):
    place = tmp_path / "model"
    for content in ("old", "new"):
        part = tmp_path / "model.part"
        (part / "deep").mkdir(parents=True)
        (part / "deep/weights").write_text(content)
        stored.publish(part, place)
    assert names(tmp_path) == ["model"]
    assert (place / "deep/weights").read_text() == "new"


def test_other_words_for_a_full_disk(tmp_path):
    for words in ("I/O error: No space left on device (os error 28)", "[enforce fail at inline_container.cc:672] . "):
        with pytest.raises(StorageError, match="cannot write"), stored.writing(tmp_path):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError), stored.writing(tmp_path):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(ConnectionError), stored.writing(tmp_path):
        raise ConnectionError("the hub cannot be reached")
    other = OSError(errno.EACCES, "Permission denied", "/root/data.jsonl")
    with pytest.raises(PermissionError), stored.writing(tmp_path):
        raise other  # a data file that cannot be read is no matter of the run's folder


@pytest.mark.parametrize("found", [2, 0, "1", None, True, [1]])
def test_a_form_of_another_version_is_refused(found):
    with pytest.raises(ValueError, match=r"where: format must be 1, not .*newer version"):
        stored.check_format("checkpoint", {"format": found}, "where")


def test_a_folder_has_one_process_and_its_lock_goes_with_it(tmp_path):
    folder = tmp_path / "run"
    code = f"""
import sys, time
from pathlib import Path
from soul.folderlock import alone_in
with alone_in(Path({str(folder)!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        (folder / "rows").mkdir()
        (folder / "recipe.yaml").write_text("a run")
        (folder / "film.part").write_text("of somebody's browser")
        part = folder / "rows/forget.jsonl.1.part"
        part.write_text("half")
        started = time.perf_counter()
        with (
            pytest.raises(ValueError, match=r"another process is at work in .*run: wait .*another --out"),
            alone_in(folder),
        ):
            raise AssertionError
        assert time.perf_counter() - started < 1
        assert part.is_file()  # it is the other one's
        process.send_signal(signal.SIGKILL)
    with alone_in(folder):
        assert names(folder) == [LOCK, "film.part", "recipe.yaml", "rows"]
        assert not part.exists()
        with pytest.raises(ValueError, match="another process"), alone_in(folder):
            raise AssertionError


def test_a_folder_that_is_no_run_keeps_what_is_in_it(tmp_path):
    (tmp_path / "model.part").write_text("whose?")
    with alone_in(tmp_path):
        assert names(tmp_path) == [LOCK, "model.part"]


def test_a_folder_that_came_to_nothing_goes(tmp_path):
    with pytest.raises(ValueError, match="bad"), alone_in(tmp_path / "run"):
        raise ValueError("bad settings")
    assert names(tmp_path) == []


def test_a_cache_that_cannot_be_written_costs_no_more_than_the_cache(tmp_path, small_files, caplog):
    import torch

    from soul.curvature import cache

    cache.write(tmp_path / "curvature/a.safetensors", {"x": torch.zeros(1 << 16)}, {})
    assert "cannot keep the curvature" in caplog.text
    assert names(tmp_path / "curvature") == []
    old = tmp_path / "curvature/b.safetensors.1.part"
    old.write_text("of a process that was killed")
    os.utime(old, (0, 0))
    cache.write(tmp_path / "curvature/a.safetensors", {"x": torch.zeros(16)}, {})
    assert names(tmp_path / "curvature") == ["a.safetensors"]
