"""Plans as files: what is written is read back, and what is broken is refused in one line."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from made_plans import made_plan

from paraplan.cluster import load_cluster
from paraplan.device import load_device
from paraplan.errors import InputError
from paraplan.layout import Layout, unsupported_fields
from paraplan.plan_file import load_plan, plan_from_json, plan_schema, plan_to_json, save_plan

ROOT = Path(__file__).parent.parent
KINDS: list[dict[str, object]] = [
    {},
    {"pipeline": 4, "virtual_stages": 1},
    {"pipeline": 2, "virtual_stages": 2},
    {"tensor": 2, "data_shard": 2},
]


@pytest.mark.parametrize("fixed", KINDS)
def test_round_trip(fixed: dict[str, object], tmp_path: Path) -> None:
    plan = made_plan(**fixed)
    save_plan(plan, tmp_path / "a.json")
    again = load_plan(tmp_path / "a.json")
    assert again == plan
    assert plan_to_json(again) == plan_to_json(plan)
    assert os.listdir(tmp_path) == ["a.json"], "temporary files stay behind"


@pytest.mark.parametrize("fixed", KINDS)
def test_parts_add_up(fixed: dict[str, object]) -> None:
    plan = made_plan(**fixed)
    seen = plan.prediction
    assert seen.breakdown.total == pytest.approx(seen.step_seconds, rel=1e-6)
    assert sum(seen.basis.model_dump().values()) == pytest.approx(1, abs=1e-5)
    assert seen.peak_memory_bytes == max(stage.memory_bytes for stage in plan.stages)
    assert seen.fits == (seen.peak_memory_bytes <= seen.capacity_bytes)
    tokens = plan.workload.global_batch * plan.workload.sequence_length
    assert seen.tokens_per_second == pytest.approx(tokens / seen.step_seconds, rel=1e-6)
    assert plan.layout.devices == plan.cluster.devices
    assert sum(stage.layers for stage in plan.stages) == 6
    modules = [path for stage in plan.stages for path in stage.modules]
    assert modules == ["embed", *(f"layers.{i}" for i in range(6)), "head"]
    assert len(plan.stages) == plan.layout.pipeline * plan.layout.virtual_stages
    for name, value in fixed.items():
        assert getattr(plan.layout, name) == value


def test_schema_is_the_published_one() -> None:
    published = json.loads((ROOT / "docs" / "plan.schema.json").read_text())
    assert published == json.loads(json.dumps(plan_schema())), "run: plan schema"
    for fixed in KINDS:
        jsonschema.validate(json.loads(plan_to_json(made_plan(**fixed))), published)


def test_one_record_a_line() -> None:
    text = plan_to_json(made_plan(pipeline=4, virtual_stages=1))
    assert sum(line.strip().startswith('{"index"') for line in text.splitlines()) == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format is 2"),
        ({"format": None}, "format is None"),
        ({"extra": 1}, "extra is not a known field"),
        ({"layout": {"tensor": 3}}, "!= devices"),
        ({"layout": {"expert": 3}}, "does not divide"),
        ({"layout": {"micro_batches": 3}}, "!= global_batch"),
        ({"layout": {"tensor": "two"}}, "layout.tensor is 'two'"),
        ({"prediction": {"step_seconds": math.nan}}, "prediction.step_seconds is nan"),
        ({"prediction": {"step_seconds": -1.0}}, "prediction.step_seconds is -1.0"),
        ({"stages": []}, "0 stages"),
        ({"mesh": [["tensor", 4]]}, "mesh does not follow"),
    ],
)
def test_inconsistent_plans_are_refused(change: dict[str, Any], says: str) -> None:
    data = json.loads(plan_to_json(made_plan()))
    for key, value in change.items():
        data[key] = data[key] | value if isinstance(value, dict) else value
    with pytest.raises(InputError, match=says.replace("(", r"\(")) as caught:
        plan_from_json(json.dumps(data), name="p.json")
    assert str(caught.value).startswith("p.json: ")
    assert "\n" not in str(caught.value)


def mutate(text: str, rng: random.Random) -> bytes:
    """Damage a file as disks, editors and people do."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        what = rng.randrange(7)
        if what == 0:
            del data[at:]
        elif what == 1:
            data[at] = rng.randrange(256)
        elif what == 2:
            del data[at : at + rng.randint(1, 40)]
        elif what == 3:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif what == 4:
            words = [
                b"NaN",
                b"-1",
                b"0",
                b"1e999",
                b"null",
                b"[]",
                b"{}",
                b'"x"',
                b"true",
                b"9" * 30,
            ]
            digits = [i for i in range(len(data)) if 48 <= data[i] <= 57] or [0]
            place = rng.choice(digits)
            data[place : place + 1] = rng.choice(words)
        elif what == 5:
            data[at:at] = b"[" * rng.choice([1, 10, 20000])
        else:
            data = data.replace(rng.choice([b"tensor", b"value", b"{", b":"]), b"", 1)
        if not data:
            break
    return bytes(data)


@pytest.mark.parametrize("block", range(4))
def test_a_thousand_damaged_files(block: int, tmp_path: Path) -> None:
    """Plan, device and cluster files: read, or refused in one line, never another exception."""
    rng = random.Random(block)
    profiles = ROOT / "profiles" / "paraplan_profiles"
    sources = [
        ("plan.json", plan_to_json(made_plan(pipeline=2)), load_plan),
        ("device.toml", (profiles / "devices" / "h100-sxm.toml").read_text(), load_device),
        ("cluster.toml", (profiles / "clusters" / "dgx-h100.toml").read_text(), load_cluster),
    ]
    refused = 0
    for _ in range(260):
        name, text, load = rng.choice(sources)
        file = tmp_path / name
        file.write_bytes(mutate(text, rng))
        try:
            load(str(file))  # type: ignore[operator]
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
            assert len(str(error)) < 2000
    assert refused > 100


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(InputError, match="plan file"):
            load_plan(path)
    empty = tmp_path / "empty.json"
    empty.write_text("")
    with pytest.raises(InputError, match="not JSON"):
        load_plan(empty)


def test_write_fails_whole(tmp_path: Path) -> None:
    plan = made_plan()
    with pytest.raises(InputError, match="cannot write"):
        save_plan(plan, tmp_path / "no" / "such" / "folder.json")
    assert list(tmp_path.iterdir()) == []


def test_what_the_runtime_cannot_apply() -> None:
    assert unsupported_fields(Layout()) == ()
    assert unsupported_fields(Layout(context=2, expert=2, data_replicate=2)) == (
        "context",
        "expert",
    )
