"""What ``--model`` may name, resolved to a config without importing torch or transformers."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from paraplan.errors import InputError

_LARGEST_CONFIG_BYTES = 4 * 2**20  # real ones have a few KB; DeepSeek-V3's has 2
_POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """A model that can be traced.

    Attributes:
        name: for people and file names.
        kind: ``config``, or ``callable`` for ``module:callable``.
        config: the content of config.json; empty for a callable.
        config_sha256: of the config in canonical JSON, or of the spec for a callable.
        max_sequence_length: positions the config allows for, if it says so.
        fixed_sequence_length: the only sequence length possible (images), if there is one.
        spec: what the user wrote.
        origin: file that the config was read from, for errors.
        trust_remote_code: the user allowed the config's own code to run.
    """

    name: str
    kind: Literal["config", "callable"]
    config: Mapping[str, Any] = field(hash=False)
    config_sha256: str
    max_sequence_length: int | None
    fixed_sequence_length: int | None
    spec: str
    origin: str
    trust_remote_code: bool = False


def preset_names() -> tuple[str, ...]:
    """Names of the models that ship as config files, sorted."""
    files = resources.files("paraplan").joinpath("presets").iterdir()
    return tuple(sorted(f.name.removesuffix(".json") for f in files if f.name.endswith(".json")))


def resolve_model(spec: str, *, trust_remote_code: bool = False) -> ModelSource:
    """Find the model that ``spec`` names.

    Tried in this order: a directory with config.json or the path of such a file, a preset,
    ``module:callable`` (which runs the user's code when it is traced), a Hugging Face id in the
    local cache.

    Args:
        trust_remote_code: accept a config whose ``auto_map`` names Python files, and run them.

    Raises:
        InputError: unknown name or unusable config.
    """
    path = Path(spec).expanduser()
    if _looks_like_path(spec, path):
        return _from_path(spec, path, trust_remote_code)
    if spec.lower() in preset_names():
        file = resources.files("paraplan").joinpath("presets", f"{spec.lower()}.json")
        return _from_config(
            _parse(file.read_bytes(), f"preset {spec.lower()}"),
            name=spec.lower(),
            spec=spec,
            origin=f"preset {spec.lower()}",
            trust_remote_code=False,
        )
    if _CALLABLE.fullmatch(spec):
        digest = hashlib.sha256(spec.encode()).hexdigest()
        name = spec.partition(":")[2]
        return ModelSource(name, "callable", {}, digest, None, None, spec, spec)
    if _HUB_ID.fullmatch(spec):
        cached = _cached_config(spec)
        if cached is not None:
            return _from_path(spec, cached, trust_remote_code, name=spec.rpartition("/")[2])
    raise _unknown(spec)


def model_of_config(config: dict[str, Any], name: str = "model") -> ModelSource:
    """A model that is described by the content of a config.json.

    Raises:
        InputError: it does not describe a model.
    """
    return _from_config(config, name=name, spec=name, origin=name, trust_remote_code=False)


def _looks_like_path(spec: str, path: Path) -> bool:
    if spec.startswith((".", "/", "~")) or spec.endswith(".json"):
        return True
    try:
        return (path / "config.json").exists() or path.is_file()
    except (OSError, ValueError):
        return False


def _unknown(spec: str) -> InputError:
    shown = spec if len(spec) <= 80 else f"{spec[:77]}..."
    near = difflib.get_close_matches(spec.lower(), preset_names(), n=1, cutoff=0.5)
    others = "a directory with config.json and module:callable work too"
    return InputError(
        f"unknown model {shown!r}: no preset, directory or locally cached Hugging Face model",
        hint=f"did you mean {near[0]}?" if near else f"`plan models` lists the presets; {others}",
    )


def _cached_config(spec: str) -> Path | None:
    """config.json of a Hugging Face model in the local cache; never asks the network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec, "config.json")
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _from_path(
    spec: str, path: Path, trust_remote_code: bool, *, name: str | None = None
) -> ModelSource:
    try:
        file = path / "config.json" if path.is_dir() else path
        if file.stat().st_size > _LARGEST_CONFIG_BYTES:
            raise InputError(f"{file}: {file.stat().st_size} bytes is no model config")
        content = file.read_bytes()
    except FileNotFoundError:
        missing = f"{spec}: no such file or directory"
        raise InputError(f"{path}: no config.json in it" if path.is_dir() else missing) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{spec}: cannot read: {reason}") from None
    stem = file.parent.resolve().name if file.name == "config.json" else file.stem
    return _from_config(
        _parse(content, str(file)),
        name=name or stem,
        spec=spec,
        origin=str(file),
        trust_remote_code=trust_remote_code,
    )


def _parse(content: bytes, origin: str) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number that a model can have")

    try:
        config = json.loads(content.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{origin}: not a JSON config: {detail}") from None
    if not isinstance(config, dict):
        raise InputError(f"{origin}: holds a {type(config).__name__}, not an object of settings")
    return config


def _from_config(
    config: dict[str, Any], *, name: str, spec: str, origin: str, trust_remote_code: bool
) -> ModelSource:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            f"{origin}: model_type is {json.dumps(model_type)}; must name an architecture",
            hint='such as "model_type": "llama"',
        )
    if config.get("auto_map") and not trust_remote_code:
        raise InputError(
            f"{origin}: auto_map asks to run the model's own code, which needs --trust-remote-code",
            hint=f"or delete auto_map, if transformers' own {model_type} is the same model",
        )
    _check_numbers(config, origin)
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return ModelSource(
        name=name,
        kind="config",
        config=config,
        config_sha256=hashlib.sha256(canonical.encode()).hexdigest(),
        max_sequence_length=next(
            (config[k] for k in _POSITION_KEYS if isinstance(config.get(k), int)), None
        ),
        fixed_sequence_length=_patches(config),
        spec=spec,
        origin=origin,
        trust_remote_code=trust_remote_code and bool(config.get("auto_map")),
    )


_SIZES = re.compile(
    r"(hidden_size|intermediate_size|vocab_size|num_.*(heads|layers|experts)"
    r"|head_dim|n_embd|n_head|n_layer|n_inner|n_positions|max_position_embeddings"
    r"|d_model|d_ff|d_kv|patch_size|image_size)"
)
_MAY_BE_ZERO = re.compile(r"num_nextn_predict_layers|num_hash_layers")
_COUNTS = re.compile(r"num_.*layers|n_layer")
_MOST_LAYERS = 10_000  # the deepest published models have some hundreds; each one is built
_LARGEST_SIZE = 2**31  # no published model has a dimension near it; torch overflows past 2**63


def _check_numbers(config: Mapping[str, Any], origin: str) -> None:
    """Sizes are whole positive numbers; the rest is checked by transformers' own classes."""
    for key, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{origin}: {key} is {value}, not a finite number")
        if not _SIZES.fullmatch(key) or value is None:
            continue
        if isinstance(value, list) and key in ("patch_size", "image_size"):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        least = 0 if _MAY_BE_ZERO.fullmatch(key) else 1
        most = _MOST_LAYERS if _COUNTS.fullmatch(key) else _LARGEST_SIZE
        if not whole or not least <= value <= most:
            shown = json.dumps(value)[:40]
            raise InputError(
                f"{origin}: {key} is {shown}; must be a whole number from {least} to {most}"
            )


def _patches(config: Mapping[str, Any]) -> int | None:
    """Patches of an image, the sequence length of a vision transformer."""
    image, patch = config.get("image_size"), config.get("patch_size")
    if not isinstance(image, int) or not isinstance(patch, int) or "vocab_size" in config:
        return None
    return (image // patch) ** 2
