"""What ``--model`` may name, and what it may not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paraplan.errors import InputError
from paraplan.models import preset_names, resolve_model


def write_config(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    return folder


def test_every_preset_resolves() -> None:
    assert len(preset_names()) == 19
    for name in preset_names():
        source = resolve_model(name)
        assert (source.name, source.kind) == (name, "config")
        assert source.config["model_type"]
        assert (source.max_sequence_length is None) == (name == "vit-huge")
        assert source.fixed_sequence_length == (256 if name == "vit-huge" else None)


def test_preset_names_ignore_case() -> None:
    assert resolve_model("Mistral-7B").config_sha256 == resolve_model("mistral-7b").config_sha256


def test_directory_and_file(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "my-model", max_position_embeddings=64)
    source = resolve_model(str(folder))
    assert (source.name, source.max_sequence_length) == ("my-model", 64)
    other = tmp_path / "other.json"
    other.write_text((folder / "config.json").read_text())
    assert resolve_model(str(other)).name == "other"
    assert resolve_model(str(other)).config_sha256 == source.config_sha256


def test_digest_is_of_content_not_of_spelling(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text('{"model_type": "llama", "vocab_size": 7}')
    two.write_text('{"vocab_size":7,\n\n"model_type":"llama"}')
    assert resolve_model(str(one)).config_sha256 == resolve_model(str(two)).config_sha256
    two.write_text('{"vocab_size": 8, "model_type": "llama"}')
    assert resolve_model(str(one)).config_sha256 != resolve_model(str(two)).config_sha256


def test_hub_id_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repo = tmp_path / "models--someone--their-model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    write_config(repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert resolve_model("someone/their-model").name == "their-model"
    with pytest.raises(InputError, match="unknown model 'someone/other'"):
        resolve_model("someone/other")


def test_callable() -> None:
    source = resolve_model("package.module:make")
    assert (source.kind, source.name, dict(source.config)) == ("callable", "make", {})


@pytest.mark.parametrize(
    ("wrong", "right"), [("mistral7b", "mistral-7b"), ("llama-3-80b", "llama-3"), ("gpt-2", "gpt2")]
)
def test_unknown_name_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(wrong)
    assert right in str(caught.value.hint)


@pytest.mark.parametrize(
    "spec", ["", "x" * 5000, "a\0b", "no/such/deep/path", "./nowhere", "~nobody"]
)
def test_nonsense_names(spec: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(spec)
    assert "\n" not in str(caught.value)


BROKEN = {
    "empty": b"",
    "not json": b"{",
    "not utf-8": b"\xff\xfe{}",
    "a list": b"[1, 2]",
    "a number": b"17",
    "deep": b"[" * 100_000,
    "nan": b'{"model_type": "llama", "rope_theta": NaN}',
    "infinite": b'{"model_type": "llama", "rope_theta": 1e999}',
    "no type": b'{"hidden_size": 8}',
    "type of a wrong type": b'{"model_type": 3}',
    "negative": b'{"model_type": "llama", "hidden_size": -8}',
    "zero": b'{"model_type": "llama", "num_hidden_layers": 0}',
    "a string": b'{"model_type": "llama", "vocab_size": "many"}',
    "a fraction": b'{"model_type": "llama", "num_attention_heads": 1.5}',
    "true": b'{"model_type": "llama", "num_attention_heads": true}',
    "huge number": b'{"model_type": "llama", "hidden_size": 1000000000000}',
    "own code": b'{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_configs_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        resolve_model(str(tmp_path))
    message = str(caught.value)
    assert "config.json" in message
    assert "\n" not in message and len(message) < 400


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "x": "y" * 2**23}))
    with pytest.raises(InputError, match="is no model config"):
        resolve_model(str(tmp_path))


def test_own_code_needs_permission(tmp_path: Path) -> None:
    folder = write_config(tmp_path, auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    with pytest.raises(InputError, match="trust-remote-code"):
        resolve_model(str(folder))
    assert resolve_model(str(folder), trust_remote_code=True).trust_remote_code
    assert not resolve_model("gpt2", trust_remote_code=True).trust_remote_code


def test_resolving_imports_nothing_heavy() -> None:
    code = (
        "import sys; from paraplan.models import resolve_model; resolve_model('llama-3-70b');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
