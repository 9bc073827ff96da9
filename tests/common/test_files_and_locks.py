"""Files appear whole, in their place and nowhere else; locks say who has them; damaged entries are made again."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from compress.common.cache import entries, use
from compress.common.errors import UserError
from compress.common.files import check_target, disk_error, filling, new_folder, replacing, save_array, write_text_atomic
from compress.common.journal import Journal
from compress.common.locks import Owner, locked
from compress.reports.cached import cache_report


def test_a_link_keeps_its_place_and_a_device_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_text_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    write_text_atomic(Path("/dev/null"), "gone")
    with pytest.raises(UserError, match="/dev/null: is not a regular file"):
        save_array(Path("/dev/null"), np.zeros(3))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file"), replacing(tmp_path / "pipe"):
        pass


def test_a_failed_write_leaves_nothing_and_what_a_killed_one_left_is_removed(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "x.json") as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"x\.json: the disk is full"):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f".x.json.{'0' * 12}.writing").write_text("left by a killed process")
    other = tmp_path / f".y.json.{'0' * 12}.writing"
    other.write_text("of another file")
    with replacing(tmp_path / "x.json") as first:
        first.write_text("1")
        with replacing(tmp_path / "x.json") as second:  # somebody else who writes it at the same time
            second.write_text("2")
        assert first.exists()
    assert (tmp_path / "x.json").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "x.json"]


def test_errors_of_libraries_that_write_by_themselves_are_those_of_the_disk(tmp_path: Path) -> None:
    full = SafetensorError(
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
    )
    known = disk_error(full, tmp_path)
    assert known is not None
    assert known.message == f"{tmp_path}: the disk is full"
    assert disk_error(ValueError("code: 28"), tmp_path) is None


def test_a_folder_of_the_user_s_is_never_removed(tmp_path: Path) -> None:
    own = tmp_path / ".export.partial"  # as a temporary folder of ours was called
    own.mkdir()
    (own / "mine").write_text("x")
    with filling(tmp_path / "export") as folder:
        (folder / "a").write_text("a")
    assert (own / "mine").exists()
    assert (tmp_path / "export" / "a").read_text() == "a"
    with pytest.raises(UserError, match="is there already"), new_folder(tmp_path / "export"):
        pass
    with pytest.raises(KeyError), filling(tmp_path / "other"):
        raise KeyError
    assert sorted(path.name for path in tmp_path.iterdir()) == [".export.partial", "export"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = "import os; from pathlib import Path; from compress.common.files import filling\nwith filling(Path('e')): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    with filling(tmp_path / "e"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_targets_are_checked_before_the_work(tmp_path: Path) -> None:
    check_target(tmp_path / "new" / "deep" / "x")
    for wrong, why in ((tmp_path, "is a folder"), (tmp_path / "f" / "x", "is not a folder"), (tmp_path / ("n" * 300), "too long")):
        (tmp_path / "f").write_text("")
        with pytest.raises(UserError, match=why):
            check_target(wrong)
    with pytest.raises(UserError, match="there is no folder"):
        check_target(tmp_path / "new" / "x", make_folders=False)


HOLDER = "import sys; from pathlib import Path; from compress.common.locks import locked\nwith locked(Path('l'), 'it'): print(1, flush=True); sys.stdin.read()"


def test_a_lock_says_who_has_it_and_outlasts_nobody(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdin=-1, stdout=-1, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        said = json.loads(path.read_text())
        assert (said["pid"], said["host"]) == (holder.pid, socket.gethostname())
        with pytest.raises(UserError, match=f"run x: in use by pid {holder.pid} on {socket.gethostname()}"), locked(path, "run x"):
            pass
        holder.kill()
    assert path.exists()  # stale
    with locked(path, "run x"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists()


def test_owners_that_have_ended_are_told_from_others() -> None:
    assert Owner.this().is_alive()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not Owner(ended.pid, socket.gethostname(), 0).is_alive()
    assert not Owner(os.getpid(), socket.gethostname(), 1.0).is_alive()  # a later process with its pid
    assert Owner(ended.pid, "another host", 0).is_alive()
    assert Owner.read('{"pid": []}') is None


def test_a_damaged_result_is_made_again_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checked, damage in (
        (False, lambda text: text[:-1]),
        (True, lambda text: text.replace("0.5", "0.6")),
        (True, lambda text: "[]"),
    ):
        journal = Journal(tmp_path, checked=checked)
        journal.put("a", {"score": 0.5})
        journal.path("a").write_text(damage(journal.path("a").read_text()))
        assert not journal.has("a")
        assert journal.once("a", lambda: {"score": 0.7}) == {"score": 0.7}
        assert "a.json: is damaged" in capsys.readouterr().err
    journal.path("a").write_text('{"score": 0.1}')
    assert journal.get("a") == {"score": 0.1}  # of an earlier version


def test_the_cache_is_listed_checked_and_emptied(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(use("scores", "s"), checked=True).put("good", {"a": 1})
    (use("scores", "s") / "bad.json").write_text("{")
    (use("vectors", "v") / "000000-1.keys").write_bytes(b"0" * 16)
    (cache / "mine.txt").write_text("not ours")
    assert any("scores" in line and line.endswith(" s") for line in cache_report("list"))
    found = list(cache_report("check"))
    assert [line.split(":")[0].rpartition("/")[2] for line in found[:-1]] == ["000000-1.keys", "bad.json"]
    assert list(cache_report("check"))[-1].endswith("2 entries checked, 0 damaged parts removed")
    assert list(cache_report("empty", "scores"))[-1].startswith(f"{cache}: 1 entries removed")
    assert [entry.kind for entry in entries()] == ["vectors"]
    list(cache_report("empty"))
    assert (cache / "mine.txt").exists()
    assert entries() == []
    with pytest.raises(UserError, match="not known"):
        list(cache_report("lst"))
    monkeypatch.setenv("COMPRESS_CACHE_GB", "much")
    with pytest.raises(UserError, match="COMPRESS_CACHE_GB is 'much'"):
        use("scores", "s")
