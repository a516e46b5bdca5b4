"""The Trainer of transformers, with one line added; ``--lora`` trains adapters only.

    python examples/make_inputs.py
    PARAPLAN_DEVICES=cpu:4 python examples/train_llm.py --lora

``per_device_train_batch_size`` is that of the one device that the script sees: the global batch.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

torch.moreh.option.enable_advanced_parallelization()

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="./mistral-small")
parser.add_argument("--dataset", default="mistral_dataset.pt")
parser.add_argument("--output", default="./trained")
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--lora", action="store_true")
args = parser.parse_args()
set_seed(0)

model = AutoModelForCausalLM.from_pretrained(args.model)
if args.lora:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    )
rows = [
    row | {"labels": row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)}
    for row in torch.load(args.dataset)
]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=8 // args.accumulate,
        gradient_accumulation_steps=args.accumulate,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    ),
    train_dataset=rows,
)
trainer.train()
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(f"step {entry['step']} loss {float(entry['loss']):.9f}", flush=True)
trainer.save_model(args.output)
