"""Images of Hugging Face's ``datasets``: saved in a folder, named, or given as objects from Python."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.columns import choose_images, choose_labels
from spectralnorm.gan.data.decode import Decoded, decode_file
from spectralnorm.gan.data.extras import import_extra
from spectralnorm.gan.data.files import part_of
from spectralnorm.gan.data.parquet import decode_value, named_classes
from spectralnorm.gan.data.prepare import block_starts

__all__ = ["PREFIX", "HuggingFaceSource", "is_huggingface", "is_saved", "open_named", "open_saved"]

PREFIX = "hf:"
"""What a data path begins with that names a data set: ``hf:name`` or ``hf:name:split``."""

_EXTRA = "huggingface"


class HuggingFaceSource:
    """The rows of a ``Dataset``, or of the splits of a ``DatasetDict``.

    Args:
        data: of a dictionary, ``train`` is trained on, and of the others ``test``, or else ``validation``, is held out.
        what: how messages name it.
        files: what it was read from, its identity in the cache; None: the fingerprint that ``datasets`` keeps.

    Raises:
        UserError: it is streamed and has no length, or no column holds images.
    """

    padding = None

    def __init__(self, data: Any, *, what: str, files: list[tuple[str, int, int]] | None = None) -> None:
        library = import_extra("datasets", extra=_EXTRA, what=what)
        parts = _parts(data, library, what=what)
        features = parts[0].features
        self._column = choose_images(_image_columns(features, library), list(features), what=what)
        if isinstance(features[self._column], library.Image):
            # Decoded as all others here, with the same rules.
            parts = [part.cast_column(self._column, library.Image(decode=False)) for part in parts]
        named = {name: feature.names for name, feature in features.items() if isinstance(feature, library.ClassLabel)}
        plain = [name for name, feature in features.items() if _is_plain(feature)]
        label_column = choose_labels([*named, *plain], list(named))
        self._parts = [part.with_format(None).select_columns([self._column]) for part in parts]
        self._starts = np.cumsum([0, *map(len, parts)])
        self.groups = block_starts(self._starts)
        self.held_out = np.arange(len(self)) >= self._starts[1] if len(parts) > 1 else None
        self.ignored: Counter[str] = Counter()
        self.files = [(str(part._fingerprint), len(part), 0) for part in parts] if files is None else files
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if label_column is not None:
            tables = [part.select_columns([label_column]).with_format("arrow")[:] for part in parts]
            values = [value for table in tables for value in table.column(label_column).to_pylist()]
            self.labels, self.class_names = named_classes(values, named.get(label_column), what=what)

    @property
    def hashes(self) -> np.ndarray:
        """Of the numbers of the rows: an order that looks random."""
        digests = (hashlib.blake2b(str(row).encode(), digest_size=8).digest() for row in range(len(self)))
        return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def file_name(self, index: int) -> str:
        return f"row {index}"

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        del image_size, channels
        return True

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """Decode the image of row ``index``; raises `UnreadableError`."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        value = self._parts[number][index - int(self._starts[number])][self._column]
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            return decode_file(value["path"], image_size=image_size, channels=channels)
        return decode_value(value, image_size=image_size, channels=channels)


def is_huggingface(data: object) -> bool:
    """Whether an object comes from ``datasets``, without importing it."""
    return any(kind.__module__.partition(".")[0] == "datasets" for kind in type(data).__mro__)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def open_saved(folder: Path) -> HuggingFaceSource:
    """The data set that ``save_to_disk`` wrote to a folder."""
    what = f"the data set in {str(folder)!r}"
    library = import_extra("datasets", extra=_EXTRA, what=what)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    identity = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return HuggingFaceSource(_load(library.load_from_disk, str(folder), what=what), what=what, files=identity)


def open_named(name: str) -> HuggingFaceSource:
    """The data set ``name`` or ``name:split`` of the hub, or of a local folder that ``load_dataset`` reads.

    It is downloaded, or found in the cache, by ``datasets``; code that comes with it is not run.
    """
    what = f"the data set {PREFIX}{name}"
    library = import_extra("datasets", extra=_EXTRA, what=what)
    name, _, split = name.partition(":")
    if not name:
        raise UserError(f"{PREFIX!r} names no data set; give {PREFIX}name or {PREFIX}name:split.")
    return HuggingFaceSource(_load(library.load_dataset, name, split=split or None, what=what), what=what)


def _load(load: Any, *arguments: Any, what: str, **options: Any) -> Any:
    try:
        return load(*arguments, **options)
    # What a download or a damaged file may raise is beyond counting: of requests, of arrow, of the hub.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{what} cannot be loaded ({reason}); check its name and split.") from error


def _parts(data: Any, library: Any, *, what: str) -> Sequence[Any]:
    """What is trained on, and what is held out where the data says so."""
    if isinstance(data, library.IterableDataset | library.IterableDatasetDict):
        raise UserError(f"{what} is streamed and has no length; load it without streaming=True.")
    if not isinstance(data, library.DatasetDict):
        return [data]
    if len(data) == 1:
        return list(data.values())
    split = {name: part_of(name) for name in data}
    training = [name for name, part in split.items() if part and not part[1]]
    held_out = sorted(name for name, part in split.items() if part and part[1])
    if not training:
        raise UserError(f"{what} has the splits {', '.join(data)} and none is called train; name one of them.")
    return [data[training[0]], *(data[name] for name in held_out[:1])]


def _image_columns(features: Any, library: Any) -> list[str]:
    arrays = (library.Array2D, library.Array3D)
    return [
        name
        for name, feature in features.items()
        if isinstance(feature, (library.Image, *arrays)) or _value_type(feature) in ("binary", "large_binary")
    ]


def _is_plain(feature: Any) -> bool:
    kind = _value_type(feature)
    return kind.startswith(("int", "uint")) or kind in ("string", "large_string")


def _value_type(feature: Any) -> str:
    """``string``, ``int64``, ... of a plain column; ``""`` of any other."""
    return getattr(feature, "dtype", "") if type(feature).__name__ == "Value" else ""
