"""Projected Compression in a training loop of one's own, cell by cell: SmolLM2-135M to half on text files.

Run it as a script, `python examples/own_loop.py BASE OUTPUT TEXT...`, or open it as a notebook in an editor that knows
`# %%` cells.
"""

# %% What to compress, where to, and on what text
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

import pcscale

base, output, *texts = sys.argv[1:] or ["HuggingFaceTB/SmolLM2-135M", "runs/own-loop", "text.txt"]
tokens_per_sequence, sequences_per_batch, max_steps = 64, 4, 20

# %% Token ids in batches of whole sequences
tokenizer = AutoTokenizer.from_pretrained(base)
ids = [token for text in texts for token in tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"]]
num_sequences = len(ids) // tokens_per_sequence
sequences = torch.tensor(ids[: num_sequences * tokens_per_sequence]).view(num_sequences, tokens_per_sequence)
batches = sequences.split(sequences_per_batch)

# %% The compression: widths, importance scores and a start. The base stays on disk.
compression = pcscale.prepare(base, keep=0.5, text=batches[:8])
model = compression.model  # A stock AutoModelForCausalLM.
print(f"{compression.plan.parameters:,} parameters, hidden {model.config.hidden_size}")

# %% Training: an ordinary loop over an ordinary model
optimizer = pcscale.ProjectedAdamW(compression)
model.train()
for step in range(max_steps):
    batch = batches[step % len(batches)].to(model.device)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1}: loss {loss.item():.3f}")

# %% A checkpoint without any base weight, and the merged model: an ordinary Hugging Face folder
optimizer.save_pretrained(Path(output) / "checkpoint")
pcscale.merge(Path(output) / "checkpoint", Path(output) / "merged")
tokenizer.save_pretrained(Path(output) / "merged")
