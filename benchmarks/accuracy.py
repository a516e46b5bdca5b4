"""Write docs/accuracy.md from measured runs.

    python benchmarks/fit_runs.py FOLDER > FITS                    (some minutes on one core)
    python benchmarks/accuracy.py FOLDER FITS > docs/accuracy.md   (half a minute)

FOLDER holds the published runs; the text around the tables is ``accuracy_text.md``, whose lines
``{tables}``, ``{worst}``, ``{noise}``, ``{modes}``, ``{but_for_modes}``, ``{picks}``,
``{told_apart}`` and ``{carries}`` are replaced. Why a row is off is said by hand, below.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ceilings import (
    but_for_modes_table,
    mode_tables,
    noise_table,
    picks_table,
    told_apart_table,
)

from paraplan.validate import as_text, validate_files
from paraplan.validate_predict import Prediction

WHY = {
    "hf_playbook_nanotron": "a run without the waits that all other runs of tensor ranks "
    "and pipelines over several nodes show",
    "megatron_sc21": "ZeRO-3 of 2021: the paper gives neither buckets nor prefetch",
    "mlperf_training_llm": "a short step of LoRA over many nodes; the layout is a guess, as the "
    "notes say, and the recomputation is unknown",
    "vtrain_multi": "not explained; its neighbours are 0 to 10 % off",
    "torchtitan": "fp8 scaled by row: the cost of its kernels is not modelled",
    "aleph_alpha_layouts": "one of three pipelined runs with large micro-batches that are slow "
    "without recorded reason; the same layout with flash-attention 1 took 44.7 s",
    "bloom_a100_chronicles": "one of four runs with heads of 150, among the first of these tests; "
    "not explained",
    "llm_foundry_mpt": "a run over a slower network than the same model's other runs",
    "vtrain_single": "products of hidden size 2048 in two tensor ranks run faster than the model's",
    "dgxc_benchmarking": "its neighbours of 256 and 2,048 devices are faster than it; noise of the "
    "run",
    "nemo_2407": "short sequences packed for fine-tuning: the attention mask is not known",
    "nemo_docs_2502_2507": "recomputation and overlap not published",
    "fms_fsdp": "reduction over the replicas, hidden better than modelled or not",
    "korthikanti2022": "",
    "megatron_bridge": "no virtual stages published; the same machine and model ran with five in "
    "other releases",
}
WORST = 10


def main(arguments: Sequence[str]) -> int:
    """Print the page."""
    if len(arguments) != 2:
        print(__doc__)
        return 2
    results = validate_files(sorted(Path(arguments[0]).glob("*.csv")))
    made = [p for result in results.values() for p in result.predictions if p.row.headline]
    text = (Path(__file__).parent / "accuracy_text.md").read_text()
    text = text.replace("{tables}", as_text(results)).replace("{worst}", worst_rows(made))
    every = [p for result in results.values() for p in result.predictions]
    text = text.replace("{noise}", noise_table(made)).replace("{modes}", mode_tables(every))
    text = text.replace("{but_for_modes}", but_for_modes_table(every))
    text = text.replace("{picks}", picks_table(made))
    text = text.replace("{told_apart}", told_apart_table(made))
    text = text.replace("{carries}", "```\n" + Path(arguments[1]).read_text().strip() + "\n```")
    print(text, end="")
    return 0


def worst_rows(predictions: Sequence[Prediction]) -> str:
    """The worst row of each of the ten worst sources."""
    worst: dict[str, Prediction] = {}
    for one in predictions:
        if one.time_error is not None:
            known = worst.get(one.row.file)
            if known is None or abs(one.time_error) > abs(known.time_error or 0.0):
                worst[one.row.file] = one
    lines = ["| row | layout | predicted s | measured s | why |", "|---|---|---|---|---|"]
    for one in sorted(worst.values(), key=lambda p: -abs(p.time_error or 0.0))[:WORST]:
        cells = one.row.cells
        layout = f"{cells['n_gpus']} GPUs, tp {cells['tp']}, pp {cells['pp']}"
        layout += f", micro-batch {cells['micro_batch']}"
        times = f"{one.predicted_s:.4g} | {one.measured_s or 0.0:.4g}"
        lines.append(f"| {cells['id']} | {layout} | {times} | {WHY.get(one.row.file, '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
