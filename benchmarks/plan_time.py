"""`pcscale plan` on the config.json of Llama-3.1-8B, in a new process each time, interpreter start included."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.report import Row

REPEATS = 9
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def run(scratch: Path) -> list[Row]:
    folder = scratch / "llama-3.1-8b-config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    command = [sys.executable, "-m", "pcscale", "plan", str(folder), "--keep", "0.5", "--json"]
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", *command[1:]], check=True, capture_output=True, text=True
    ).stderr
    heavy = [name for name in ("torch", "transformers") if f" {name}\n" in loaded]
    return [
        (f"median of {REPEATS} runs", f"{statistics.median(seconds):.2f} s", "under 2 s"),
        ("slowest run", f"{max(seconds):.2f} s", "under 2 s"),
        ("of torch and transformers it imports", ", ".join(heavy) or "neither", "neither"),
    ]
