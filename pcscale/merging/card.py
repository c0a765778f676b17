"""The model card of a merged model: its base, its making and its losses."""

import re
from pathlib import Path
from typing import Any

import yaml

from pcscale.common.files import read_json, write_text
from pcscale.common.units import format_count
from pcscale.run.manifest import TRAINER_NAME, Manifest


def write_card(path: Path, checkpoint: Path, manifest: Manifest, base_folder: Path) -> None:
    """Write README.md with the Hub's front matter: base_model, licence, tags.

    Data, losses and settings come from the checkpoint's trainer.json, where there is one.
    """
    trainer = read_json(checkpoint / TRAINER_NAME) if (checkpoint / TRAINER_NAME).exists() else {}
    plan = manifest.plan
    tag, method = {
        "projected": ("projected-compression", "Projected Compression"),
        "hard_prune": ("pruned", "hard pruning and retraining"),
    }[manifest.method]
    front: dict[str, Any] = {
        # A folder's path means nothing elsewhere.
        "base_model": manifest.base_name if manifest.base_revision else Path(manifest.base_name).name,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pcscale", tag],
    }
    licence = base_licence(base_folder)
    if licence:
        front["license"] = licence
    lines = [
        f"# {Path(manifest.base_name).name} at {plan.keep_fraction:.1%} of its parameters",
        "",
        f"Compressed with pcscale by {method}. An ordinary `{(plan.config.get('architectures') or ['model'])[0]}`: "
        "it needs no extra code.",
        "",
        "| | base | this model |",
        "|---|---|---|",
        f"| parameters | {format_count(plan.base_parameters)} | {format_count(plan.parameters)} |",
        f"| hidden_size | {plan.base_config['hidden_size']} | {plan.hidden_size} |",
        f"| intermediate_size | {plan.base_config['intermediate_size']} | {plan.intermediate_size} |",
        "",
        f"- Base: {manifest.base_name}" + (f" at revision {manifest.base_revision}" if manifest.base_revision else ""),
        f"- Kept share of the base's real parameter count: {plan.keep_fraction:.4f}",
        f"- Optimizer steps: {manifest.step}",
    ]
    settings = trainer.get("settings")
    if settings:
        lines.append(f"- Data: {', '.join(settings['data']['train'])}")
        lines.append(f"- Tokens: {trainer['tokens']:,}")
    taught = " (of it and the base's share)" if settings and settings.get("distill") else ""
    labels = {"loss": f"Training loss{taught} at the last step", "eval_loss": "Held-out loss when last evaluated"}
    for key, label in labels.items():
        if trainer.get(key) is not None:
            lines.append(f"- {label}: {trainer[key]:.4f} nats a token")
    if settings:
        lines += ["", "## run.yaml", "", "```yaml", yaml.safe_dump(settings, sort_keys=False).rstrip(), "```"]
    header = yaml.safe_dump(front, sort_keys=False).rstrip()
    write_text(path, f"---\n{header}\n---\n\n" + "\n".join(lines) + "\n")


def base_licence(folder: Path) -> str | None:
    """The licence in the base's own card; None: the card names none."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
