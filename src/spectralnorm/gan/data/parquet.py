"""Images in Parquet files, as Hugging Face and others keep them; read by pyarrow.

The column of the images holds encoded files (bytes, or a struct with the field ``bytes``) or nested lists of whole
numbers from 0 to 255. The classes are text, or whole numbers whose names the file may bring in Hugging Face's metadata.
"""

from __future__ import annotations

import hashlib
import io
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spectralnorm.errors import UserError
from spectralnorm.gan.data.columns import choose_images, choose_labels
from spectralnorm.gan.data.decode import Decoded, UnreadableError, decode_array, decode_file
from spectralnorm.gan.data.extras import import_extra
from spectralnorm.gan.data.files import number_classes, part_of
from spectralnorm.gan.data.summary import printable

__all__ = ["ParquetSource"]

# Groups of rows kept in memory: images are asked for nearly in order, by several threads.
_GROUPS_KEPT = 3


class ParquetSource:
    """The rows of Parquet files, one image each.

    Args:
        paths: the files, all with the same columns. Where some are called train and some test (or val), or lie in
            folders called so, these are held out.
        what: how messages name them.

    Raises:
        UserError: pyarrow is missing, a file is damaged, or no column holds images.
    """

    padding = None

    def __init__(self, paths: Sequence[Path], *, what: str) -> None:
        self._arrow = import_extra("pyarrow", extra="parquet", what=what)
        self._parquet = import_extra("pyarrow.parquet", extra="parquet", what=what)
        self._what = what
        self.files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        self.ignored: Counter[str] = Counter()
        self._paths = list(paths)
        self._groups: list[tuple[int, int]] = []  # file, group of rows in it
        counts, self.held_out = [], None
        tables: list[Any] = []
        schema = self._open(0).schema_arrow
        features = _features(schema)
        self._column = choose_images(self._image_columns(schema), schema.names, what=what)
        label_column = choose_labels(self._label_columns(schema), [name for name in features if name in schema.names])
        for number in range(len(paths)):
            file = self._open(number)
            missing = {self._column, label_column} - {None} - set(file.schema_arrow.names)
            if missing:
                raise UserError(
                    f"{str(paths[number])!r} lacks the column {min(missing)!r} of the other files of {what}."
                )
            for group in range(file.num_row_groups):
                self._groups.append((number, group))
                counts.append(file.metadata.row_group(group).num_rows)
            if label_column is not None:
                tables.append(self._safely(number, lambda file=file: file.read(columns=[label_column])))
        self.groups = np.cumsum([0, *counts])
        """Where each group of rows begins, and the end: images of a group lie side by side."""
        if not len(self):
            raise UserError(f"{what} has no rows; give a Parquet file that holds images.")
        parts = [_part(path) for path in paths]
        if None not in parts and set(parts) == {False, True}:
            self.held_out = np.repeat([parts[number] is True for number, _ in self._groups], counts)
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] = ()
        if label_column is not None:
            values = [value for table in tables for value in table.column(label_column).to_pylist()]
            self.labels, self.class_names = named_classes(values, features.get(label_column), what=what)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def hashes(self) -> np.ndarray:
        """Of the names of files and the numbers of rows: an order that looks random."""
        texts = (
            f"{self._paths[number].name}/{group}/{row}"
            for (number, group), count in zip(self._groups, np.diff(self.groups).tolist(), strict=True)
            for row in range(count)
        )
        return np.array(
            [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts],
            np.uint64,
        )

    def __len__(self) -> int:
        return int(self.groups[-1])

    def file_name(self, index: int) -> str:
        position = self._group_of(index)
        number = self._groups[position][0]
        return f"{self._paths[number].name}, row {index - self.groups[self._first_group(number)]}"

    def costs_decoding(self, image_size: int, channels: int) -> bool:
        del image_size, channels
        return True

    def read(self, index: int, *, image_size: int, channels: int) -> Decoded:
        """Decode the image of row ``index``; raises `UnreadableError`."""
        position = self._group_of(index)
        value = self._rows(position)[index - int(self.groups[position])].as_py()
        return decode_value(value, image_size=image_size, channels=channels)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self.groups, index, side="right")) - 1

    def _first_group(self, number: int) -> int:
        return next(position for position, group in enumerate(self._groups) if group[0] == number)

    def _rows(self, position: int) -> Any:
        with self._lock:
            if position not in self._kept:
                number, group = self._groups[position]
                try:
                    file = self._parquet.ParquetFile(self._paths[number])
                    column = file.read_row_group(group, columns=[self._column]).column(self._column)
                except (OSError, ValueError, self._arrow.ArrowException) as error:
                    raise UnreadableError(_reason(error)) from error
                self._kept[position] = column
                if len(self._kept) > _GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(position)
            return self._kept[position]

    def _open(self, number: int) -> Any:
        return self._safely(number, lambda: self._parquet.ParquetFile(self._paths[number]))

    def _safely(self, number: int, read: Any) -> Any:
        try:
            return read()
        except (OSError, ValueError, self._arrow.ArrowException) as error:
            raise UserError(
                f"{str(self._paths[number])!r} is not a Parquet file that can be read ({_reason(error)}); "
                "download or copy it again."
            ) from error

    def _image_columns(self, schema: Any) -> list[str]:
        types = self._arrow.types

        def holds_images(kind: Any) -> bool:
            if types.is_struct(kind):
                return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
            if types.is_binary(kind) or types.is_large_binary(kind):
                return True
            depth = 0
            kind = getattr(kind, "storage_type", kind)
            while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
                depth, kind = depth + 1, kind.value_type
            return depth in (2, 3) and (types.is_integer(kind) or types.is_boolean(kind))

        return [field.name for field in schema if holds_images(field.type)]

    def _label_columns(self, schema: Any) -> list[str]:
        types = self._arrow.types

        def holds_classes(kind: Any) -> bool:
            kind = kind.value_type if types.is_dictionary(kind) else kind
            return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)

        return [field.name for field in schema if holds_classes(field.type)]


def decode_value(value: Any, *, image_size: int, channels: int) -> Decoded:
    """Decode a cell of a table: bytes, a dictionary with ``bytes`` or ``path``, nested lists or an array.

    Raises:
        UnreadableError: it holds no image.
    """
    if isinstance(value, dict):
        value = value.get("bytes")
        if value is None:
            raise UnreadableError("the table holds only its path; save the images themselves in it")
    if value is None:
        raise UnreadableError("the cell is empty")
    if isinstance(value, bytes):
        if not value:
            raise UnreadableError("the file is empty")
        return decode_file(io.BytesIO(value), image_size=image_size, channels=channels)
    try:
        pixels = np.asarray(value)
    except ValueError as error:
        raise UnreadableError("rows of different lengths") from error
    return decode_array(pixels, image_size=image_size, channels=channels)


def named_classes(
    values: Sequence[int | str | None], names: Sequence[str] | None, *, what: str
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels and names of the classes from a column; with names, a negative number means no class.

    Raises:
        UserError: a number has no name.
    """
    if names is None:
        return number_classes(values) if any(value is not None for value in values) else (None, ())
    numbers = np.array([-1 if value is None else int(value) for value in values], np.int64)
    if numbers.max(initial=-1) >= len(names):
        raise UserError(
            f"{what} has the class {numbers.max()}, but names only {len(names)} classes; correct its labels."
        )
    if (numbers < 0).all():
        return None, ()
    return np.maximum(numbers, -1), tuple(printable(str(name)) for name in names)


def _features(schema: Any) -> dict[str, list[str]]:
    """The names of classes by column, as Hugging Face writes them into the metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: list(feature["names"]) for column, feature in features.items() if "names" in feature}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _part(path: Path) -> bool | None:
    """Whether a file is called held out, by its own name or else its folder's."""
    for name in (path.stem, path.parent.name):
        part = part_of(name)
        if part is not None:
            return part[1]
    return None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
