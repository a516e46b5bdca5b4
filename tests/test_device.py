import json
import random
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest

from paraplan.device import Device, device_names, load_device
from paraplan.errors import InputError
from paraplan.profile_types import Figure, Frozen


def text_of(name: str) -> str:
    return resources.files("paraplan_profiles").joinpath("devices", f"{name}.toml").read_text()


def figures(part: Any, place: str = "") -> Iterator[tuple[str, Figure]]:
    if isinstance(part, Figure):
        yield place, part
    elif isinstance(part, Frozen):
        for name in type(part).model_fields:
            yield from figures(getattr(part, name), f"{place}.{name}")
    elif isinstance(part, dict):
        for name, value in part.items():
            yield from figures(value, f"{place}.{name}")
    elif isinstance(part, tuple):
        for index, value in enumerate(part):
            yield from figures(value, f"{place}[{index}]")


@pytest.mark.parametrize("name", device_names())
def test_shipped_devices_are_whole(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert {"bfloat16", "float32"} <= set(device.peak_flops_per_second)
    found = list(figures(device))
    assert len(found) >= 25
    for place, figure in found:
        assert len(figure.source) > 3, place
        # Nothing was measured by us on a GPU.
        assert figure.basis != "measured" or device.kind == "cpu", place


def test_the_devices_of_the_issue_ship() -> None:
    wanted = {"a100-40gb-sxm", "a100-80gb-sxm", "h100-sxm", "h200", "b200", "mi250", "mi300x"}
    wanted |= {"b300", "mi325x", "mi355x"}
    assert wanted | {"gb200", "gb300", "h100-96gb-500w", "l40s", "rtx-4090", "cpu"} == set(
        device_names()
    )


@pytest.mark.parametrize(
    ("alias", "name"), [("h100", "h100-sxm"), ("A100", "a100-80gb-sxm"), ("4090", "rtx-4090")]
)
def test_aliases(alias: str, name: str) -> None:
    assert load_device(alias).name == name


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown device 'h10'") as caught:
        load_device("h10")
    assert caught.value.hint == "did you mean 'h100'?"


H100_CAPACITY = "memory_capacity_bytes = { value = 84.9437e9"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (H100_CAPACITY, "memory_capacity_bytes = { value = nan", "memory_capacity_bytes.value"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = -1.0", "memory_capacity_bytes.value"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = 0", "memory_capacity_bytes"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = 1e400", "memory_capacity_bytes.value"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = 1e40", "memory_capacity_bytes.value"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = true", "memory_capacity_bytes.value"),
        (H100_CAPACITY, "memory_capacity_bytes = { value = '80 GB'", "memory_capacity_bytes.val"),
        (H100_CAPACITY, "memory_capacity = { value = 1", "memory_capacity"),
        ("format = 1", "format = 2", "format"),
        ("format = 1", "format = 1\ncolour = 3", "colour is not a known field"),
        ('kind = "cuda"', 'kind = "tpu"', "kind"),
        ("wave_loss = { value = 0.525", "wave_loss = { value = 1.5", "gemm.wave_loss"),
        ("multiprocessors = { value = 132", "multiprocessors = { value = 1.5", "multiprocessors"),
        ('basis = "datasheet"', 'basis = "guess"', "basis"),
        ("tile_rows = 128", "tile_rows = 0", "tile_rows"),
        ("[gemm]", "[gemm", "not TOML"),
        ("\nfloat8 = ", "\nfp8 = ", "fp8"),
    ],
)
def test_bad_file_is_one_line_naming_file_and_field(
    tmp_path: Any, old: str, new: str, message: str
) -> None:
    text = text_of("h100-sxm")
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InputError) as caught:
        load_device(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_files_of_other_kinds(tmp_path: Any) -> None:
    binary = tmp_path / "x.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    array = tmp_path / "x.json"
    array.write_text("[1, 2]")
    for path in (binary, array, tmp_path / "missing.toml", tmp_path / "folder.json"):
        if path.name == "folder.json":
            path.mkdir()
        with pytest.raises(InputError):
            load_device(path)


def test_mutated_files_never_end_in_another_error(tmp_path: Any) -> None:
    source = text_of("h100-sxm")
    rng = random.Random(7)
    path = tmp_path / "mutated.toml"
    refused = 0
    for _ in range(150):
        text = list(source)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            action = rng.random()
            if action < 0.4:
                text[place] = rng.choice("0-e.{}[]=\"nax\n'")
            elif action < 0.7:
                del text[place : place + rng.randint(1, 40)]
            else:
                text.insert(place, rng.choice(["-", "inf", "9" * 30, "[[", '"', "\x00"]))
        path.write_text("".join(text))
        try:
            load_device(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 75


def test_json_profile_is_the_same_device(tmp_path: Any) -> None:
    device = load_device("h100")
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(device.model_dump(mode="json")))
    again = load_device(path)
    assert again == device
    assert again.sha256 == device.sha256


def test_copies_do_not_keep_what_was_computed_before() -> None:
    device = load_device("h100")
    before = device.sha256, device.rates.attention
    smaller = device.with_memory(Figure(value=4e10, basis="modelled", source="a test"))
    assert smaller.memory_capacity_bytes.value == 4e10
    assert smaller.sha256 != before[0]
    other = device.with_attention("flash-attention-2")
    assert other.attention[0].implementation == "flash-attention-2"
    assert set(other.attention) == set(device.attention)
    assert other.rates.attention != before[1]
    assert (device.sha256, device.rates.attention) == before


def test_unknown_attention_implementation() -> None:
    with pytest.raises(InputError, match="no attention implementation 'flash-9'") as caught:
        load_device("h100").with_attention("flash-9")
    assert "flash-attention-2" in (caught.value.hint or "")


def test_dtypes_must_agree() -> None:
    data = load_device("a100").model_dump(mode="json")
    del data["gemm"]["efficiency"]["float16"]
    with pytest.raises(ValueError, match="float16 stands in one of them"):
        Device.model_validate(data)


def test_attention_efficiency_between_head_sizes() -> None:
    rates = load_device("h100").rates.attention
    low, high = rates.efficiency(64, "forward"), rates.efficiency(128, "forward")
    assert rates.efficiency(96, "forward") == pytest.approx((low + high) / 2)
    assert rates.efficiency(32, "forward") == low
    assert rates.efficiency(512, "forward") == rates.efficiency(256, "forward")
    assert rates.efficiency(128, "backward") < high
