"""What the terminal shows of a run."""

import pytest
from tests.gan.shards import SIZE, numbered, stream_of, write_shards

from spectralnorm.cli.display import TerminalDisplay
from spectralnorm.gan import make_config

RECORD = 3 * SIZE * SIZE + 16


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (10**6, "Decoded images are kept for later epochs in {folder} (at most 5.62 KiB)."),
        (30 * RECORD, "The first 30 decoded images are kept for later epochs in {folder} (at most 1.88 KiB)."),
        (0, "Decoded images are not kept: the limit is 0."),
    ],
)
def test_a_line_after_the_table_of_a_streamed_set_says_what_is_kept_where(tmp_path, monkeypatch, capsys, limit, text):
    monkeypatch.setenv("SPECTRALNORM_CACHE", str(tmp_path / "cache"))
    shards = write_shards(tmp_path / "set", [numbered(number) for number in range(100)])
    TerminalDisplay(make_config("fashion")).data(stream_of(shards, cache_bytes=limit))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == text.format(folder=tmp_path / "cache" / "streams")
