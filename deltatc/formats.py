"""Transcoder files: Gemma Scope's params.npz (read, export) and deltatc's own safetensors (lossless, un-fusable).

Files come from other people: nothing is unpickled, shapes and sizes are checked before data is read, and values must
be finite. Model checkpoints are models.py's business.
"""

import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltatc.errors import FormatError
from deltatc.files import atomic_path
from deltatc.sites import DEFAULT_SITE
from deltatc.transcoder import KEYS, DeltaTranscoder, Transcoder, check_shapes, record_parts

FORMAT = "deltatc.transcoder.1"
FORMAT_DELTA = "deltatc.delta.1"
PARTS = ("b_dec_base", "b_dec_delta")
NPY_DTYPES = {np.dtype("<f4"): torch.float32, np.dtype("<f8"): torch.float64}


def load_transcoder(path: str | Path, site: str = DEFAULT_SITE) -> Transcoder:
    """Load a transcoder from an .npz or .safetensors file, or from a folder that holds one of them.

    `site` says where an .npz transcoder reads; a .safetensors file declares its own.
    """
    file = _transcoder_file(Path(path))
    if file.suffix == ".npz":
        return Transcoder(**_read_npz(file), site=site, metadata={"source": file.parent.name})
    tensors, metadata = _read_safetensors(file, FORMAT)
    parts = {name: tensors.pop(name) for name in PARTS if name in tensors}
    k, k_delta = (_optional_int(file, metadata, key) for key in ("k", "k_delta"))
    extra = {key[5:]: value for key, value in metadata.items() if key.startswith("user.")}
    transcoder = Transcoder(**tensors, site=metadata.get("site", DEFAULT_SITE), k=k, metadata=extra)
    d_new = _optional_int(file, metadata, "d_new")
    like = [(part.shape, part.dtype) for part in parts.values()]
    if like != [(transcoder.b_dec.shape, transcoder.b_dec.dtype)] * (0 if d_new is None else len(PARTS)):
        raise FormatError(f"{file}: expected d_new, {' and '.join(PARTS)} together and like b_dec, or none of them")
    if d_new is not None:
        record_parts(transcoder, d_new, parts["b_dec_base"], parts["b_dec_delta"], k_delta)
    return transcoder


def save_transcoder(transcoder: Transcoder, path: str | Path) -> None:
    """Write a transcoder: .safetensors keeps everything, .npz is Gemma Scope's layout (a fused one keeps the sum)."""
    path = Path(path)
    tensors = {name: getattr(transcoder, name).detach().cpu().contiguous() for name in KEYS}
    if path.suffix == ".npz":
        if transcoder.k is not None or transcoder.k_delta is not None:
            raise FormatError(f"{path}: params.npz cannot say k = {transcoder.k}; save as .safetensors")
        arrays = {name: tensor.float().clamp(min=0) if name == "threshold" else tensor.float()
                  for name, tensor in tensors.items()}  # fmt: skip
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in arrays.items()})
        return
    if path.suffix != ".safetensors":
        raise FormatError(f"{path}: expected a name that ends in .safetensors or .npz")
    metadata = {"site": transcoder.site} | {f"user.{key}": value for key, value in transcoder.metadata.items()}
    if transcoder.k is not None:
        metadata["k"] = str(transcoder.k)
    if transcoder.d_new:
        metadata["d_new"] = str(transcoder.d_new)
        if transcoder.k_delta is not None:
            metadata["k_delta"] = str(transcoder.k_delta)
        tensors |= {name: getattr(transcoder, name).detach().cpu().contiguous() for name in PARTS}
    _write_safetensors(path, tensors, metadata, FORMAT)


def save_delta(delta: DeltaTranscoder, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write the delta's own weights, without the base, as safetensors."""
    tensors = {name: getattr(delta, name).detach().cpu().contiguous() for name in KEYS}
    more = {"site": delta.site} | ({} if delta.k is None else {"k": str(delta.k)})
    _write_safetensors(Path(path), tensors, more | (metadata or {}), FORMAT_DELTA)


def load_delta(path: str | Path, base: Transcoder) -> DeltaTranscoder:
    """Load a delta written by save_delta beside its base."""
    path = Path(path)
    tensors, metadata = _read_safetensors(path, FORMAT_DELTA)
    _expect_keys(path, tensors)
    if metadata.get("site") != base.site:
        raise FormatError(f"{path} was trained at site {metadata.get('site')!r}; expected the base's {base.site!r}")
    _expect_fit(path, tensors, base.d_model)
    delta = DeltaTranscoder(base, tensors["W_enc"].shape[1], k=_optional_int(path, metadata, "k"))
    delta.set_delta(**tensors)
    return delta


def find_transcoders(path: str | Path, width: str) -> dict[int, dict[int, Path]]:
    """List {layer: {average L0: params.npz}} below `path`, both in numeric order."""
    found: dict[int, dict[int, Path]] = {}
    for file in Path(path).glob(f"layer_*/width_{width}/average_l0_*/params.npz"):
        layer = re.fullmatch(r"layer_(\d+)", file.parts[-4])
        l0 = re.fullmatch(r"average_l0_(\d+)", file.parts[-2])
        if layer and l0:
            found.setdefault(int(layer[1]), {})[int(l0[1])] = file
    if not found:
        raise FormatError(
            f"{path} holds no transcoders of width {width}; expected layer_L/width_{width}/average_l0_N/params.npz "
            "there: run `dvc pull data.dvc models.dvc` for the embedded ones, or set transcoders.path and "
            "transcoders.width in params.yaml"
        )
    return {layer: dict(sorted(found[layer].items())) for layer in sorted(found)}


def load_fused_layers(path: str | Path, layers: list[int] | None, device: str) -> dict[int, DeltaTranscoder]:
    """Load {layer: DeltaTranscoder} of a folder of layer_L; all layers for None, none for an empty list."""
    path = Path(path)
    if layers is None:
        layers = sorted(int(folder.name.removeprefix("layer_")) for folder in path.glob("layer_*"))
    return {layer: load_transcoder(path / f"layer_{layer}").to(device).unfuse()[1] for layer in layers}


def at_percentile(choices: dict[int, Path], percentile: float) -> int:
    """Return the average L0 at index clamp(int(n * percentile), 0, n - 1) of the ascending list: higher is denser."""
    ascending = sorted(choices)
    return ascending[min(max(int(len(ascending) * percentile), 0), len(ascending) - 1)]


def _transcoder_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("transcoder.safetensors", "params.npz"):  # the lossless one first
            if (path / name).is_file():
                return path / name
        raise FormatError(f"{path} holds no transcoder; expected params.npz or transcoder.safetensors in it")
    if not path.is_file():
        raise FormatError(f"{path} is missing; expected a transcoder's .npz or .safetensors file, or its folder")
    if path.suffix not in (".npz", ".safetensors"):
        raise FormatError(f"{path}: expected a file that ends in .npz or .safetensors")
    return path


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {info.filename for info in archive.infolist()}
            wanted = {f"{key}.npy" for key in KEYS}
            if names != wanted or len(archive.infolist()) != len(wanted):
                raise FormatError(
                    f"{path} holds {', '.join(sorted(names))}; expected exactly {', '.join(sorted(wanted))}"
                )
            _expect_fit(path, {key: _declared(archive, f"{key}.npy", path) for key in KEYS})
            tensors = {key: _read_npy(archive, f"{key}.npy") for key in KEYS}
    except FormatError:
        raise
    except Exception as error:  # damaged bytes make zipfile, zlib and numpy's header parser raise a dozen types
        raise FormatError(f"{path} is not a whole .npz file ({error}); fetch it again") from error
    _expect_sound(path, tensors)
    return tensors


def _declared(archive: zipfile.ZipFile, name: str, path: Path) -> Tensor:
    """Return one array's shape and dtype, as a tensor without data; a header that lies about its size is refused."""
    info = archive.getinfo(name)
    with archive.open(info) as member:
        try:
            version = np.lib.format.read_magic(member)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = read(member)
        except (ValueError, KeyError) as error:
            raise FormatError(f"{path}: {name} has no readable .npy header ({error})") from None
        if dtype not in NPY_DTYPES:
            raise FormatError(f"{path}: {name} is of dtype {dtype}; expected <f4 or <f8 (float32, float64)")
        declared = math.prod(shape) * dtype.itemsize  # Python's integers do not overflow
        if min(shape, default=0) < 0 or member.tell() + declared != info.file_size:
            raise FormatError(f"{path}: {name} declares shape {shape}, {declared} bytes, but holds {info.file_size}")
    return torch.empty(shape, dtype=NPY_DTYPES[dtype], device="meta")


def _read_npy(archive: zipfile.ZipFile, name: str) -> Tensor:
    with archive.open(name) as member:
        return torch.from_numpy(np.ascontiguousarray(np.lib.format.read_array(member, allow_pickle=False)))


def _read_safetensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a whole safetensors file ({error}); write or fetch it again") from None
    if metadata.get("format") != kind:
        raise FormatError(f"{path} is of format {metadata.get('format')!r}; expected {kind!r}")
    _expect_sound(path, tensors)
    return tensors, metadata


def _write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], kind: str) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": kind} | metadata)
        _order_metadata(temporary)


def _order_metadata(path: Path) -> None:
    """Sort the header's metadata in place: safetensors writes it in random order, and DVC compares bytes."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(size)
        assert len(ordered) == size
        file.seek(8)
        file.write(ordered)


def _expect_keys(path: Path, tensors: dict[str, Tensor]) -> None:
    if set(tensors) != set(KEYS):
        raise FormatError(f"{path} holds {', '.join(sorted(tensors))}; expected exactly {', '.join(KEYS)}")


def _expect_sound(path: Path, tensors: dict[str, Tensor]) -> None:
    _expect_keys(path, {name: tensor for name, tensor in tensors.items() if name not in PARTS})
    _expect_fit(path, {key: tensors[key] for key in KEYS})
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{path}: {name} holds a value that is not finite; the file is damaged")


def _expect_fit(path: Path, tensors: dict[str, Tensor], d_model: int | None = None) -> None:
    try:
        check_shapes(tensors, d_model)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def _optional_int(path: Path, metadata: dict[str, str], key: str) -> int | None:
    if key not in metadata:
        return None
    if not re.fullmatch(r"[0-9]{1,9}", metadata[key]):
        raise FormatError(f"{path}: metadata {key} = {metadata[key]!r}; expected a whole number")
    return int(metadata[key])
