"""Small files: written whole or not at all, read strictly.

pytest tests/test_files.py
"""

import pytest

from deltatc.errors import DataError
from deltatc.files import atomic_path, check_manifest, read_json, read_jsonl, write_json, write_jsonl, write_manifest

BAD_LINES = {
    b'{"a": 1, "a": 2}\n': "appears twice", b'{"a": NaN}\n': "NaN", b'{"a": Infinity}\n': "Infinity",
    b'{"a": 1e999}\n': "not valid", b"{\n": "not valid JSON",
    b"[1]\n": "expected a JSON object", b"3\n": "expected a JSON object", b"\n": "not valid JSON",
    b'{"a": 1}': "newline",
    b'{"a": "\\ud800"}\n': "surrogates", b'{"a": "\xff"}\n': "not UTF-8", b"[" * 100_000 + b"\n": "not valid JSON",
    b'{"a": 1} {"b": 2}\n': "not valid JSON", b"{'a': 1}\n": "not valid JSON", b'{"a": 1}\x00\n': "not valid JSON",
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), list(BAD_LINES.items()), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_refused_with_its_number(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"good": 1}\n' + line)
    with pytest.raises(DataError, match=rf"x\.jsonl:2: .*{message}"):
        read_jsonl(tmp_path / "x.jsonl")


def test_a_byte_order_mark_and_a_missing_file_are_refused(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    with pytest.raises(DataError, match="byte order mark"):
        read_jsonl(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"missing.*dvc repro"):
        read_json(tmp_path / "none.json")


def test_round_trips(tmp_path):
    rows = [{"text": 'ä\n"quote" ✓', "n": 1.5}, {}]
    write_jsonl(tmp_path / "deep/rows.jsonl", rows)
    write_json(tmp_path / "one.json", {"rows": rows})
    assert read_jsonl(tmp_path / "deep/rows.jsonl") == rows and read_json(tmp_path / "one.json") == {"rows": rows}
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == [] or (tmp_path / "none.jsonl").read_text() == ""


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    write_json(tmp_path / "x.json", {"old": 1})
    with pytest.raises(DataError, match="not finite"):
        write_json(tmp_path / "x.json", {"new": float("nan")})
    with pytest.raises(DataError, match="not finite"):
        write_jsonl(tmp_path / "x.json", [{"new": 1}, {"new": float("inf")}])
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "x.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(tmp_path / "x.json") == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_manifest_notices_what_changed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"12345")
    assert write_manifest(folder, tmp_path / "m.json") == (1, 5)
    check_manifest(folder, tmp_path / "m.json")
    check_manifest(folder, folder)  # a folder is its own manifest
    with pytest.raises(DataError, match=r"none\.json is missing; write it with `deltatc manifest"):
        check_manifest(folder, tmp_path / "none.json")
    with pytest.raises(DataError, match=r"absent is missing; expected the folder.*dvc pull data.dvc models.dvc"):
        check_manifest(tmp_path / "absent", tmp_path / "m.json")
    (folder / "a.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"has 3 bytes.*says 5.*deltatc manifest"):
        check_manifest(folder, tmp_path / "m.json")
