"""An ordinary training script for one device, with one line added.

python examples/make_inputs.py
PARAPLAN_DEVICES=cpu:4 python examples/train_mistral.py      # or on all GPUs, without it
PARAPLAN_DISABLE=1 python examples/train_mistral.py          # as if the line were not there
"""

import argparse
import copy

import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

torch.moreh.option.enable_advanced_parallelization()

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="./mistral-small")
parser.add_argument("--dataset", default="mistral_dataset.pt")
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--epoch", type=int, default=2)
parser.add_argument("--lr", type=float, default=1e-4)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
torch.manual_seed(args.seed)

model = AutoModelForCausalLM.from_pretrained(args.model)
dataset = torch.load(args.dataset)
train_dataloader = torch.utils.data.DataLoader(
    dataset, batch_size=args.batch_size, shuffle=True, drop_last=True
)


def mask_pads(input_ids, attention_mask, ignore_index=-100):
    idx_mask = attention_mask
    labels = copy.deepcopy(input_ids)
    labels[~idx_mask.bool()] = ignore_index
    return labels


optim = AdamW(model.parameters(), lr=args.lr)
for epoch in range(args.epoch):
    for i, batch in enumerate(train_dataloader, 0):
        input_ids = batch["input_ids"]
        attn_mask = batch["attention_mask"]
        labels = mask_pads(input_ids, attn_mask)
        outputs = model(
            input_ids.cuda(), attention_mask=attn_mask.cuda(), labels=labels.cuda(), use_cache=False
        )
        loss = outputs[0]
        loss.backward()
        optim.step()
        model.zero_grad(set_to_none=True)
        print(f"epoch {epoch} step {i} loss {loss.item():.9f}", flush=True)
