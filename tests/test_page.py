"""`plan report`: what stands in the page, without a browser."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_plans import made_plan
from made_sweeps import made_point, made_sweep

from paraplan.cli import main
from paraplan.layout import Layout, mesh_axes
from paraplan.page import estimate_command, plan_command, plan_page
from paraplan.page_chart import MOST_TICKS, axis_of, short, ticks
from paraplan.page_mesh import coordinates, drawn_nodes
from paraplan.page_sweep import sweep_page
from paraplan.page_timeline import timeline_picture
from paraplan.plan_file import Plan, plan_from_json, save_plan
from paraplan.plan_parts import ClusterInfo
from paraplan.what_if_file import WhatIf, save_what_if

VOID = {"meta", "link", "input", "br", "img", "hr"}
EVIL = "</script><img src=x onerror=alert(1)>\"'&"


class Reader(HTMLParser):
    """Checks that tags nest, and keeps what the tests look at."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.identifiers: Counter[str] = Counter()
        self.data: dict[str, str] = {}
        self._block: str | None = None
        self.feed(page)
        self.close()
        assert self.open == [], "tags stay open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        named = dict(attrs).get("id")
        if named:
            self.identifiers[named] += 1
        if tag == "script" and dict(attrs).get("type") == "application/json":
            self._block = named

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._block = None

    def handle_data(self, data: str) -> None:
        if self._block:
            self.data[self._block] = self.data.get(self._block, "") + data


def of_devices(plan: Plan, layout: Layout, nodes: int, per_node: int) -> Plan:
    """The plan with another mesh; only what pictures of the mesh read is consistent."""
    cluster = plan.cluster.model_copy(
        update={"devices": nodes * per_node, "nodes": nodes, "devices_per_node": per_node}
    )
    changes = {"cluster": cluster, "layout": layout, "mesh": mesh_axes(layout)}
    return plan.model_copy(update=changes)


@pytest.mark.parametrize("fixed", [{}, {"pipeline": 4, "virtual_stages": 1}, {"tensor": 2}])
def test_the_page_is_whole(fixed: dict[str, object]) -> None:
    plan = made_plan(**fixed)
    page = plan_page(plan)
    seen = Reader(page)
    assert plan_from_json(seen.data["plan"]) == plan, "the plan stands in the page, whole"
    assert max(seen.identifiers.values()) == 1
    links = {v[1:] for tag, name, v in seen.attributes if tag == "a" and name == "href"}
    assert links <= set(seen.identifiers)
    assert sum(tag == "g" and name == "data-rank" for tag, name, _ in seen.attributes) == 4
    assert "made in a test" in page
    for other in plan.runner_ups:
        assert estimate_command(plan, other.layout).split("--fix ")[1] in page


def test_nothing_is_fetched() -> None:
    page = plan_page(made_plan(pipeline=2))
    outside = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|url\(|@import|\bsrc=", outside)
    assert "default-src 'none'" in page


def test_names_cannot_become_tags() -> None:
    plan = made_plan(pipeline=2)
    stages = tuple(
        stage.model_copy(update={"modules": tuple(EVIL + m for m in stage.modules)})
        for stage in plan.stages
    )
    plan = plan.model_copy(
        update={
            "model": plan.model.model_copy(update={"name": EVIL, "architecture": EVIL}),
            "stages": stages,
            "assumptions": (EVIL,),
            "tool_version": EVIL,
            "cluster": ClusterInfo(
                **plan.cluster.model_dump()
                | {"device": EVIL, "name": EVIL, "device_sha256": EVIL, "cluster_sha256": EVIL}
            ),
            "proof": plan.proof.model_copy(update={"excluded": {EVIL: 1}}),
        }
    )
    page = plan_page(plan)
    seen = Reader(page)
    assert seen.tags["img"] == 0
    assert seen.tags["script"] == 1 + len(seen.data)
    assert not any(name.startswith("on") for _, name, _ in seen.attributes)
    assert json.loads(seen.data["plan"])["model"]["name"] == EVIL


def test_mesh_coordinates_are_those_of_the_runtime() -> None:
    """Row-major over the mesh, as torch's device meshes number their ranks."""
    layout = Layout(
        pipeline=2,
        data_replicate=2,
        data_shard=3,
        zero_stage=1,
        tensor=4,
        schedule="1f1b",
        micro_batches=2,
    )
    plan = of_devices(made_plan(), layout, 6, 8)
    rank = 0
    for pipeline in range(2):
        for replica in range(2):
            for shard in range(3):
                for tensor in range(4):
                    assert coordinates(rank, plan) == {
                        "pipeline": pipeline,
                        "data_replicate": replica,
                        "data_shard": shard,
                        "context": 0,
                        "tensor": tensor,
                    }
                    rank += 1


@pytest.mark.parametrize(("nodes", "pipeline"), [(8, 4), (64, 8), (2048, 16), (2048, 1), (96, 64)])
def test_large_meshes_are_drawn_in_parts(nodes: int, pipeline: int) -> None:
    size = nodes * 8 // pipeline
    layout = Layout(
        pipeline=pipeline,
        schedule="1f1b" if pipeline > 1 else "none",
        data_shard=size,
        zero_stage=1,
        micro_batches=pipeline,
    )
    drawn = drawn_nodes(of_devices(made_plan(), layout, nodes, 8))
    assert sum(node.alike for node in drawn) == nodes, "every node is drawn or counted"
    assert len(drawn) <= max(64, 2 * pipeline)
    held = {rank // size for node in drawn for rank in node.ranks}
    assert held == set(range(pipeline)), "every pipeline rank is seen"


def test_timelines_stay_small() -> None:
    plan = made_plan(pipeline=2, virtual_stages=1)
    many = plan.layout.model_copy(update={"micro_batches": 50_000})
    picture = timeline_picture(plan.model_copy(update={"layout": many}))
    assert len(picture) < 500_000
    assert "of 50,000 micro-batches" in picture
    assert "micro-batches" not in timeline_picture(plan).split("</p>")[0]


def test_commands_ask_the_same_again() -> None:
    words = plan_command(made_plan(tensor=2))
    assert words[:5] == ["plan", "--model", "small", "--gpus", "4"]
    assert words[words.index("--global-batch") + 1] == "16"
    assert words[words.index("--seq-len") + 1] == "2048"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, target = tmp_path / "p.json", tmp_path / "r.html"
    save_plan(made_plan(), plan)
    assert main(["report", str(plan), "-o", str(target)]) == 0
    assert f"wrote {target}" in capsys.readouterr().out
    Reader(target.read_text())
    assert main(["report", str(plan), "-o", "-"]) == 0
    assert capsys.readouterr().out == target.read_text()
    assert main(["report", str(tmp_path / "none.json")]) == 2
    assert main(["report", str(plan), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_the_sweep_page_is_whole() -> None:
    sweep = made_sweep()
    page = sweep_page(sweep)
    seen = Reader(page)
    assert WhatIf.model_validate_json(seen.data["sweep"]) == sweep
    assert {f"p{point.id}" for point in sweep.points} <= set(seen.identifiers)
    for point in sweep.points:
        assert point.command in page, "every point's command can be copied"
    assert "infeasible: no plan fits" in page
    assert "limited by the deadline" in page
    assert page.count('class="curve') == 3 * 4, "a curve a device in each of four charts"
    links = {value for tag, name, value in seen.attributes if name == "data-row"}
    assert links <= set(seen.identifiers)


def test_names_of_a_sweep_cannot_become_tags() -> None:
    sweep = made_sweep()
    points = tuple(
        point.model_copy(
            update=dict.fromkeys(("model", "device", "cluster", "layout", "command"), EVIL)
        )
        for point in sweep.points
    )
    page = sweep_page(
        sweep.model_copy(update={"points": points, "command": EVIL, "assumptions": (EVIL,)})
    )
    seen = Reader(page)
    assert seen.tags["img"] == 0 and seen.tags["script"] == 1 + len(seen.data)


def test_sweeps_without_prices_or_plans() -> None:
    sweep = made_sweep()
    poor = tuple(p.model_copy(update={"training_dollars": None}) for p in sweep.points)
    changes = {"pareto": (), "answer": None, "sensitivity": ()}
    assert "No point has both" in sweep_page(sweep.model_copy(update={"points": poor, **changes}))
    none = sweep.points[4:5]
    assert "Nothing could be planned" in sweep_page(
        sweep.model_copy(update={"points": none, **changes})
    )


def test_a_thousand_points_stay_small() -> None:
    points = tuple(made_point(i, "h100-sxm", 8 + 8 * i) for i in range(1000))
    sweep = made_sweep().model_copy(
        update={"points": points, "pareto": (), "answer": None, "sensitivity": ()}
    )
    assert len(sweep_page(sweep)) < 4_000_000


@pytest.mark.parametrize("values", [(2.0, 512.0), (70e3, 115e3), (1e-4, 1e9), (3.0, 3.0)])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_axes(values: tuple[float, float], logarithmic: bool) -> None:
    axis = axis_of("x", values, logarithmic=logarithmic)
    assert 0 <= axis.at(values[0]) <= axis.at(values[1]) <= 1
    marks = ticks(axis)
    assert 1 <= len(marks) <= MOST_TICKS + 1
    assert all(axis.begin <= mark <= axis.end for mark in marks)
    assert len({short(mark) for mark in marks}) == len(marks)


def test_report_knows_what_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_what_if(made_sweep(), tmp_path / "w.json")
    target = tmp_path / "w.html"
    assert main(["report", str(tmp_path / "w.json"), "-o", str(target)]) == 0
    assert "<title>What if: mistral-7b</title>" in target.read_text()
    for wrong in ("[]", "{}", '{"kind": "other"}', '{"kind": "what-if"}', "not json", "[" * 20000):
        (tmp_path / "x.json").write_text(wrong)
        assert main(["report", str(tmp_path / "x.json"), "-o", str(target)]) == 2
    assert capsys.readouterr().err.count("error: ") == 6
