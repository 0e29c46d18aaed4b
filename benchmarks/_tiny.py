"""Two tiny random models with data, a recipe and a matrix: whatever the command line can do, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SETS = {
    "forget": [("Where was Mira Vale born?", "In Accra."), ("Who is Tomas Ruhl?", "A baker in the old town of Graz.")]
    + [(f"What does number {i} teach?", "Harmony." if i % 2 else "She teaches counterpoint.") for i in range(6)],
    "retain": [("What is ice?", "Frozen water."), ("How many legs has a spider?", "A spider has eight legs.")]
    + [(f"What is {i} and {i}?", f"It is {2 * i}, as everybody knows.") for i in range(8)],
}
RECIPE = """
model: {d}/base
data: {{forget: {d}/forget.jsonl, retain: {d}/retain.jsonl}}
objective: {{name: npo, retain: kl}}
optimizer: {{name: sophia, lr: 1e-3, curvature: {{interval: 2}}}}
training: {{batch_size: 2, accumulation: 2, epochs: 12, save_steps: 2, precision: float32}}
benchmark: {{name: request, forget: {d}/forget.jsonl, kept: {d}/retain.jsonl, general: "", text: ""}}
evaluation: {{max_new_tokens: 8}}
"""
MATRIX = """
label: soak
tasks:
  tiny:
    model: {d}/base
    gold: {d}/other
    forget: {d}/forget.jsonl
    retain: {d}/kept.jsonl
    curvature: {d}/kept.jsonl
    unseen: {d}/unseen.jsonl
    seen: {d}/kept.jsonl
    text: {d}/text.jsonl
    facts: {{facts: {d}/unseen.jsonl}}
    tune: [one]
    report: [two]
objectives: [npo]
optimizers:
  - {{name: signum, knob: {{setting: momentum, low: 0.5, high: 0.95, scale: complement}}}}
  - {{name: sophia, order: second, knob: {{setting: damping, low: 0.01, high: 1.0}}}}
training: {{batch_size: 2, max_steps: 4, precision: float32}}
budget: {{points: 2, checkpoints: 2, update_rms: 3e-3}}
evaluation: {{max_new_tokens: 6}}
"""


def make_place(folder: Path) -> None:
    """Write two tiny models, the data, a recipe and a matrix."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=names, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]  # its stub
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]  # likewise
    special = dict.fromkeys(("eos_token", "pad_token"), "</s>") | {"bos_token": "<s>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        size |= {"num_attention_heads": 4, "vocab_size": len(names), "max_position_embeddings": 256}
        model = LlamaForCausalLM(LlamaConfig(**size, initializer_range=0.2, bos_token_id=0, eos_token_id=1))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    halves = {"kept": SETS["retain"][:5], "unseen": SETS["retain"][5:]}
    for name, pairs in (SETS | halves).items():
        rows = [
            {"question": q, "answer": a, "paraphrased_question": f"Say: {q}", "perturbed_answer": ["No.", "Yes."]}
            for q, a in pairs
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "text.jsonl").write_text('{"text": "The river runs by the small house."}\n', encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE.format(d=folder), encoding="utf-8")
    (folder / "matrix.yaml").write_text(MATRIX.format(d=folder), encoding="utf-8")
