"""Reading and writing of small files: whole or not at all, and strict about what is in them.

A writer never leaves a torn file: it writes to a temporary name in the same folder, syncs, and renames.
Transcoder files are in formats.py; model folders in models.py.
"""

import csv
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deltatc.errors import DataError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed to `path`, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; outputs follow the user's umask
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused (they are not JSON)."""
    write_text(path, _to_json(value, path, indent=2) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line; NaN and infinities are refused (they are not JSON)."""
    write_text(path, "".join(_to_json(row, path) + "\n" for row in rows))


def write_csv(path: str | Path, rows: Iterable[dict], columns: Sequence[str]) -> None:
    """Write rows under a header of `columns`; None becomes an empty field."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_json(path: str | Path) -> Any:
    """Read one strict JSON document (no NaN, no duplicate keys)."""
    return _parse_json(_read_utf8(path), str(path))


def read_jsonl(path: str | Path) -> list[dict]:
    """Read JSON objects, one a line; the first bad line is refused with `file:line` and nothing is skipped."""
    rows = []
    lines = _read_utf8(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    else:
        where = f"{path}:{len(lines)}"
        raise DataError(f"{where}: the last line does not end in a newline, so the file may be cut; complete it")
    for number, line in enumerate(lines, start=1):
        row = _parse_json(line, f"{path}:{number}")
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        rows.append(row)
    return rows


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: str | Path, path: str | Path) -> tuple[int, int]:
    """Write {file: {bytes, sha256}} of a folder's files, and return (files, bytes); DVC depends on it, not on 40 GB."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; expected the folder of a model or of transcoders")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts)
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    hashes = tqdm(sizes.items(), desc=f"hash {folder.name}", unit="file", disable=None)
    write_json(path, {name: {"bytes": size, "sha256": sha256_file(folder / name)} for name, size in hashes})
    return len(sizes), sum(sizes.values())


def check_manifest(folder: str | Path, path: str | Path) -> None:
    """Refuse a folder whose files are not those of its manifest, by name and size (a folder is its own manifest)."""
    folder, path = Path(folder), Path(path)
    if not folder.is_dir():
        raise DataError(
            f"{folder} is missing; expected the folder of a model or of transcoders there: run `dvc pull data.dvc "
            f"models.dvc` for the embedded ones, or download yours as the first lines of params.yaml say"
        )
    if path.is_dir():
        return
    if not path.is_file():
        raise DataError(f"{path} is missing; write it with `deltatc manifest {folder} {path}`")
    for name, entry in read_json(path).items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != entry["bytes"]:
            raise DataError(
                f"{file} has {found} bytes, {path} says {entry['bytes']}; fetch the file again, or write the manifest "
                f"anew with `deltatc manifest {folder} {path}`"
            )


def _to_json(value: Any, path: str | Path, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    except ValueError as error:
        raise DataError(f"{path}: a number to be written is not finite ({error}); nothing was written") from None


def _read_utf8(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing; run the stage that writes it (`dvc repro`)") from None
    if data.startswith(b"\xef\xbb\xbf"):
        raise DataError(f"{path}:1: starts with a byte order mark; save it as plain UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save it as plain UTF-8") from None


def _parse_json(text: str, where: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        # A lone surrogate, and 1e999, parse but cannot be written again: find them here, where the line is known.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); mend or remove it") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key {twice[0]!r} appears twice")
    return keys


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
