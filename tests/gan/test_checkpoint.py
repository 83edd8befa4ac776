import errno
import os
from pathlib import Path

import pytest
import torch

from spectralnorm.errors import UserError
from spectralnorm.gan import checkpoint
from spectralnorm.gan.checkpoint import has_checkpoint, latest_checkpoint, save_checkpoint


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((4, 3), value).t(),
        "step": torch.tensor(value),
        "half": torch.full((2,), value, dtype=torch.bfloat16),
        "random": torch.arange(5, dtype=torch.uint8),
    }


def test_a_checkpoint_reads_back_exactly(tmp_path: Path):
    save_checkpoint(tmp_path, tensors=_tensors(0.1), numbers={"step": 7, "batches": {"epoch": 2}})
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.numbers == {"step": 7, "batches": {"epoch": 2}}
    assert loaded.tensors.keys() == _tensors(0).keys()
    for name, tensor in _tensors(0.1).items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path):
    for step in (5, 900, 1000, 20_000):
        save_checkpoint(tmp_path, tensors=_tensors(step), numbers={"step": step})
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.numbers["step"] == 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000001000.safetensors",
        "step-000020000.safetensors",
    ]


def test_an_empty_or_missing_folder_holds_no_checkpoint(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str):
    save_checkpoint(tmp_path, tensors=_tensors(1), numbers={"step": 1})
    newest = save_checkpoint(tmp_path, tensors=_tensors(2), numbers={"step": 2})
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[-20] ^= 1
    newest.write_bytes({"truncated": content[:-9], "flipped": content, "empty": b""}[damage])
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert loaded.numbers["step"] == 1


def test_where_no_checkpoint_is_whole_the_reason_of_each_is_told(tmp_path: Path):
    for step in (1, 2):
        save_checkpoint(tmp_path, tensors=_tensors(step), numbers={"step": step})
    older, newest = sorted(tmp_path.iterdir())
    content = bytearray(older.read_bytes())
    content[-20] ^= 1
    older.write_bytes(content)
    newest.write_bytes(b"cut")
    told = (
        rf"No checkpoint in {tmp_path} is whole: {newest.name} \(Error while deserializing header: .*\), "
        rf"{older.name} \(its tensors are not those that were written\); "
    )
    with pytest.raises(UserError, match=f"^{told}put a whole copy of one there, or train anew in another folder"):
        latest_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_the_system_does_not_give_is_not_taken_for_damaged(tmp_path: Path):
    save_checkpoint(tmp_path, tensors=_tensors(1), numbers={"step": 1})
    newest = tmp_path / "step-000000002.safetensors"
    newest.symlink_to(newest)
    with pytest.raises(UserError, match=rf"^Cannot read {newest} \(Too many levels of symbolic links\)"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("target", ["checkpoints", "unmounted/checkpoints"])
def test_a_folder_that_the_system_does_not_give_is_not_taken_for_empty(tmp_path: Path, target: str):
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / target)
    for look in (latest_checkpoint, has_checkpoint):
        with pytest.raises(UserError, match=rf"^Cannot read {folder} \(.*\); see to its permissions and its disk"):
            look(folder)


def test_a_folder_of_a_failing_disk_is_not_taken_for_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, tensors=_tensors(1), numbers={"step": 1})

    def fail(path: str | Path, *arguments: object, **options: object):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    for look in (latest_checkpoint, has_checkpoint):
        with monkeypatch.context() as patched:
            for name in ("lstat", "stat", "listdir", "scandir"):
                patched.setattr(os, name, fail)
            with pytest.raises(UserError, match=rf"^Cannot read {folder} \(Stale file handle\)"):
                look(folder)


def test_a_checkpoint_written_beneath_damaged_ones_takes_their_place(tmp_path: Path):
    for step in (1000, 2000):
        save_checkpoint(tmp_path, tensors=_tensors(step), numbers={"step": step}).write_bytes(b"cut")
    for step in (5, 6):
        written = save_checkpoint(tmp_path, tensors=_tensors(step), numbers={"step": step})
        loaded = latest_checkpoint(tmp_path)
        assert loaded is not None
        assert loaded.path == written
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000000005.safetensors",
        "step-000000006.safetensors",
    ]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, tensors=_tensors(1), numbers={"step": 1})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, tensors=_tensors(2), numbers={"step": 2})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001.safetensors"]
    loaded = latest_checkpoint(tmp_path)
    assert loaded is not None
    assert torch.equal(loaded.tensors["weight"], _tensors(1)["weight"])


def test_a_really_full_disk_leaves_the_earlier_checkpoint(tiny_disk: Path):
    save_checkpoint(tiny_disk, tensors=_tensors(1), numbers={"step": 1})
    with pytest.raises(OSError, match="No space left") as error:
        save_checkpoint(tiny_disk, tensors={"weight": torch.zeros(10**6)}, numbers={"step": 2})
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in tiny_disk.iterdir()] == ["step-000000001.safetensors"]


def test_what_a_kill_left_half_written_is_removed_by_the_next_checkpoint(tmp_path: Path):
    (tmp_path / ".step-000000003.safetensors.tmp").write_bytes(b"half")
    path = save_checkpoint(tmp_path, tensors=_tensors(4), numbers={"step": 4})
    assert list(tmp_path.iterdir()) == [path]
