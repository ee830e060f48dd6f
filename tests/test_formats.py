"""Transcoder files: lossless round trips, and hostile files refused by name.

pytest tests/test_formats.py
"""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from deltatc import DeltaTranscoder, Transcoder, fuse, load_transcoder, save_transcoder
from deltatc.errors import FormatError, PartsNotRecorded, SiteError
from deltatc.formats import at_percentile, find_transcoders, load_delta, save_delta
from deltatc.transcoder import KEYS
from tests.helpers import random_transcoder, randomized


def same(a, b):
    return all(torch.equal(getattr(a, key), getattr(b, key)) for key in KEYS)


def arrays(d_model=4, d_sae=6):
    draw = np.random.default_rng(0)
    shapes = {
        "W_enc": (d_model, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_model),
        "b_dec": (d_model,),
        "threshold": (d_sae,),
    }
    return {key: draw.random(shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_round_trip_is_bit_exact(tmp_path, suffix):
    base = random_transcoder(0)
    save_transcoder(base, tmp_path / f"t.{suffix}")
    assert same(load_transcoder(tmp_path / f"t.{suffix}"), base)


def test_npz_is_gemma_scopes_layout(tmp_path):
    base = random_transcoder(0, d_sae=32)  # square: a transposition would go unnoticed by shape
    save_transcoder(base, tmp_path / "params.npz")
    stored = np.load(tmp_path / "params.npz")
    assert sorted(stored) == sorted(KEYS)
    assert all(np.array_equal(stored[key], getattr(base, key).numpy()) for key in KEYS)
    assert same(load_transcoder(tmp_path), base)


def test_same_transcoder_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_transcoder(random_transcoder(0), tmp_path / name / "params.npz")
        save_transcoder(random_transcoder(0), tmp_path / name / "transcoder.safetensors")
    for file in ("params.npz", "transcoder.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fused_file_comes_apart_and_the_export_does_not(tmp_path):
    delta = randomized(DeltaTranscoder(random_transcoder(0), 8))
    fused = fuse(delta.base, delta)
    fused.metadata["layer"] = "3"
    save_transcoder(fused, tmp_path / "transcoder.safetensors")
    loaded = load_transcoder(tmp_path)
    base, again = loaded.unfuse()
    assert same(base, delta.base) and same(again, delta) and loaded.metadata == {"layer": "3"}
    save_transcoder(fused, tmp_path / "params.npz")
    export = load_transcoder(tmp_path / "params.npz")
    x = torch.randn(5, 32)
    assert torch.equal(export(x), fused(x))
    with pytest.raises(PartsNotRecorded):
        export.unfuse()


def test_k_site_and_delta_files(tmp_path):
    base = random_transcoder(0)
    base.k = 7
    save_transcoder(base, tmp_path / "t.safetensors")
    assert load_transcoder(tmp_path / "t.safetensors").k == 7
    with pytest.raises(FormatError, match="cannot say k"):
        save_transcoder(base, tmp_path / "t.npz")
    delta = randomized(DeltaTranscoder(base, 3, k=2))
    save_delta(delta, tmp_path / "d.safetensors", {"layer": "1"})
    again = load_delta(tmp_path / "d.safetensors", base)
    assert same(again, delta) and again.k == 2
    with pytest.raises(FormatError, match="another model"):
        load_delta(tmp_path / "d.safetensors", random_transcoder(0, d_model=16))
    with pytest.raises(FormatError, match=r"expected 'deltatc\.transcoder"):
        load_transcoder(tmp_path / "d.safetensors")


def test_negative_thresholds_are_exported_as_zero(tmp_path):
    base = random_transcoder(0)
    lowered = Transcoder(base.W_enc, base.b_enc, base.W_dec, base.b_dec, base.threshold - 1)
    save_transcoder(lowered, tmp_path / "params.npz")
    assert load_transcoder(tmp_path).threshold.min() == 0
    x = torch.randn(5, 32)
    assert torch.equal(load_transcoder(tmp_path)(x), lowered(x))


def headers_only(shape, payload=b"", descr="<f4"):
    """Return an npz whose five headers declare `shape`, over `payload`."""
    saved = io.BytesIO()
    with zipfile.ZipFile(saved, "w", zipfile.ZIP_DEFLATED) as archive:
        for key in KEYS:
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
            archive.writestr(f"{key}.npy", header.getvalue() + payload)
    return saved.getvalue()


def hostile():
    good = arrays()
    saved, compressed = io.BytesIO(), io.BytesIO()
    np.savez(saved, **good)
    np.savez_compressed(compressed, **good)
    broken, encrypted = bytearray(compressed.getvalue()), bytearray(saved.getvalue())
    broken[40:80] = bytes(40)
    central = encrypted.index(b"PK\x01\x02")
    encrypted[central + 8] |= 1
    yield "missing key", {k: v for k, v in good.items() if k != "b_dec"}, "expected exactly"
    yield "extra key", good | {"more": good["b_dec"]}, "expected exactly"
    yield "wrong shape", good | {"b_enc": good["b_dec"]}, "b_enc has shape"
    yield "transposed", good | {"W_dec": good["W_enc"]}, "W_dec has shape"
    yield "rank", good | {"W_enc": good["b_enc"]}, "W_enc has shape"
    yield "integers", good | {"b_dec": np.arange(4)}, "dtype int64"
    yield "objects", good | {"b_dec": np.array([{}] * 4, dtype=object)}, "dtype object"
    yield "mixed dtypes", good | {"b_dec": good["b_dec"].astype(np.float64)}, "one floating-point dtype"
    yield "nan", good | {"b_dec": np.full(4, np.nan, np.float32)}, "not finite"
    yield "half precision", {key: value.astype(np.float16) for key, value in good.items()}, "dtype float16"
    yield "long double", good | {"b_dec": good["b_dec"].astype(np.longdouble)}, "dtype float128"
    yield "big endian", good | {"b_dec": good["b_dec"].astype(">f4")}, "dtype >f4"
    yield "infinite", good | {"threshold": np.full(6, np.inf, np.float32)}, "threshold holds a value that is not finite"
    yield "lying header", headers_only((10**6, 10**6)), "declares shape"
    yield "size that overflows to 0", headers_only((2**32, 2**32)), "declares shape"
    yield "negative shape", headers_only((-1, -4), bytes(16)), "declares shape"
    yield "trailing bytes", headers_only((2, 2), bytes(17)), "declares shape"
    yield "header that is no literal", headers_only((2, 2), bytes(16), "((("), "header|not a whole"
    yield "damaged deflate stream", bytes(broken), "not a whole .npz"
    yield "encrypted", bytes(encrypted), "not a whole .npz"
    yield "truncated", saved.getvalue()[:-100], "not a whole .npz"
    yield "no zip", b"\x00" * 100, "not a whole .npz"


@pytest.mark.parametrize(
    ("name", "content", "message"), list(hostile()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_hostile_npz_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / "params.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(FormatError, match=message):
        load_transcoder(path)


def test_damaged_safetensors_and_wrong_paths_are_refused(tmp_path):
    save_transcoder(random_transcoder(0), tmp_path / "t.safetensors")
    data = (tmp_path / "t.safetensors").read_bytes()
    for name, damaged in {
        "cut": data[:-1], "header cut": data[:20], "empty": b"", "longer": data + b"x",
        "header of 2^63 bytes": (2**63).to_bytes(8, "little") + data[8:],
    }.items():  # fmt: skip
        (tmp_path / "cut.safetensors").write_bytes(damaged)
        with pytest.raises(FormatError, match="not a whole safetensors"):
            load_transcoder(tmp_path / "cut.safetensors")
            pytest.fail(name)
    for path, message in ((tmp_path / "none.npz", "missing"), (tmp_path, "holds no transcoder")):
        with pytest.raises(FormatError, match=message):
            load_transcoder(path)
    (tmp_path / "t.bin").write_bytes(data)
    with pytest.raises(FormatError, match="ends in"):
        load_transcoder(tmp_path / "t.bin")


def changed(data, tensors=None, **metadata):
    """Return a safetensors file's bytes with other metadata (None removes) and renamed tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    found = header["__metadata__"] | metadata
    header["__metadata__"] = {key: value for key, value in found.items() if value is not None}
    header = {(tensors or {}).get(key, key): value for key, value in header.items()}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def test_safetensors_files_that_contradict_themselves_are_refused(tmp_path):
    delta = randomized(DeltaTranscoder(random_transcoder(0), 8))
    path = tmp_path / "t.safetensors"
    save_transcoder(fuse(delta.base, delta), path)
    data = path.read_bytes()
    path.write_bytes(changed(data, d_new="3"))
    assert load_transcoder(path).unfuse()[1].d_new == 3  # as the file says: the helper itself makes whole files
    for damaged, message in (
        (changed(data, format=None), "of format None"), (changed(data, format="pt"), "of format 'pt'"),
        (changed(data, d_new="0"), "d_new = 0"), (changed(data, d_new="48"), "d_new = 48"),
        (changed(data, d_new="-1"), "expected a whole number"), (changed(data, k="1e3"), "expected a whole number"),
        (changed(data, d_new=None), "expected d_new, b_dec_base and b_dec_delta together"),
        (changed(data, site="elsewhere"), "site 'elsewhere' is unknown"),
        (changed(data, {"b_dec_delta": "more"}), "expected exactly W_enc"),
        (changed(data, {"W_dec": "W"}), "expected exactly W_enc"),
    ):  # fmt: skip
        path.write_bytes(damaged)
        with pytest.raises((FormatError, SiteError), match=message):
            load_transcoder(path)
    plain = tmp_path / "plain.safetensors"
    save_transcoder(delta.base, plain)
    plain.write_bytes(changed(plain.read_bytes(), d_new="8"))
    with pytest.raises(FormatError, match="together"):
        load_transcoder(plain)
    for dtype in (torch.float16, torch.float8_e4m3fn, torch.int32):
        save_file({key: getattr(delta.base, key).to(dtype) for key in KEYS}, plain, {"format": "deltatc.transcoder.1"})
        with pytest.raises(FormatError, match="expected one floating-point dtype"):
            load_transcoder(plain)


def test_metadata_survives_whatever_it_holds_and_has_one_order(tmp_path):
    notes = {f"note {i}": 'ä\n"\\/\x01\x7f\u2028 ✓ 😀' for i in range(9)}
    base = random_transcoder(0)
    base.metadata = notes
    save_transcoder(base, tmp_path / "a.safetensors")
    base.metadata = dict(reversed(notes.items()))
    save_transcoder(base, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert load_transcoder(tmp_path / "a.safetensors").metadata == notes


def test_fortran_order_is_read_as_it_is_meant(tmp_path):
    good = arrays()
    np.savez(tmp_path / "params.npz", **{key: np.asfortranarray(value) for key, value in good.items()})
    loaded = load_transcoder(tmp_path)
    assert all(np.array_equal(getattr(loaded, key).numpy(), good[key]) for key in KEYS)


def test_folders_are_listed_in_numeric_order_and_percentiles_index_them(tmp_path):
    for layer in (10, 2):
        for l0 in (9, 100, 20):
            save_transcoder(random_transcoder(0), tmp_path / f"layer_{layer}/width_1k/average_l0_{l0}/params.npz")
    found = find_transcoders(tmp_path, "1k")
    assert list(found) == [2, 10] and list(found[2]) == [9, 20, 100]
    assert [at_percentile(found[2], p) for p in (0, 0.25, 0.34, 0.5, 0.75, 1)] == [9, 9, 20, 20, 100, 100]
    with pytest.raises(FormatError, match=r"expected layer_L/width_16k.*dvc pull"):
        find_transcoders(tmp_path, "16k")
