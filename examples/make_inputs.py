"""Makes what train_mistral.py reads: a small model with random weights, and a dataset.

    python examples/make_inputs.py
    python examples/train_mistral.py --model ./mistral-small --dataset mistral_dataset.pt

A full-size checkpoint of your own takes the place of the first (``--model ./mistral-7b``).
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "mistral": dict(num_key_value_heads=2, intermediate_size=160, sliding_window=16),
    "llama": dict(num_key_value_heads=2, intermediate_size=160),
    "qwen2": dict(num_key_value_heads=2, intermediate_size=160, tie_word_embeddings=True),
    "gpt2": dict(n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}
"""What differs; the names of the common sizes are mapped by the config classes."""


def make_model(kind: str, folder: str) -> None:
    """Save a model of 8 layers with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=8,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        **SIZES[kind],
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def make_dataset(file: str, rows: int, length: int) -> None:
    """Save a list of rows with input_ids and attention_mask; rows end in padding of their own."""
    draw = torch.Generator().manual_seed(1)
    dataset = []
    for _ in range(rows):
        ids = torch.randint(3, 256, (length,), generator=draw)
        padding = int(torch.randint(0, length // 2, (), generator=draw))
        mask = (torch.arange(length) < length - padding).long()
        dataset.append({"input_ids": ids * mask, "attention_mask": mask})
    torch.save(dataset, file)


def main() -> None:
    """Make both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SIZES, default="mistral")
    parser.add_argument("--model", default="./mistral-small")
    parser.add_argument("--dataset", default="mistral_dataset.pt")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args()
    make_model(args.kind, args.model)
    make_dataset(args.dataset, args.rows, args.length)


if __name__ == "__main__":
    main()
