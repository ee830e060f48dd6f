"""deltatc: delta transcoders, a few new latents beside a frozen transcoder that explain what a finetune changed."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatc.formats import load_transcoder, save_transcoder
    from deltatc.hooks import capture_mlp, replace_mlp
    from deltatc.ops import build_info
    from deltatc.transcoder import DeltaTranscoder, Transcoder, fuse

__all__ = [
    "DeltaTranscoder",
    "Transcoder",
    "build_info",
    "capture_mlp",
    "fuse",
    "load_transcoder",
    "replace_mlp",
    "save_transcoder",
]
__version__ = "0.1.0"

_HOME = {
    "DeltaTranscoder": "transcoder",
    "Transcoder": "transcoder",
    "build_info": "ops",
    "capture_mlp": "hooks",
    "fuse": "transcoder",
    "load_transcoder": "formats",
    "replace_mlp": "hooks",
    "save_transcoder": "formats",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import deltatc` does not cost an import of torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'deltatc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"deltatc.{_HOME[name]}"), name)
