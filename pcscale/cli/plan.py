"""`pcscale plan`: widths, sizes and predicted memory, from config.json alone; and the settings that fit a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcscale.cli.common import Result, command, option, print_table

if TYPE_CHECKING:
    from pcscale.config.schema import PlanConfig
    from pcscale.families.plan import Plan
    from pcscale.memory.choose import Budget, Choice

_SIZE = "Size of the compressed model (one way; default: keep 0.5)"
_BUDGET = "Budget: choose the cheapest settings that fit, and write a run.yaml"
_BASE_HELP = "Checkpoint folder (config.json alone is enough) or Hub id."
_OVERRIDES_HELP = "Settings of run.yaml to plan for."


@command
def main(
    base: Annotated[str, typer.Argument(help=_BASE_HELP)],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help=_OVERRIDES_HELP)] = None,
    keep: Annotated[float | None, option(_SIZE, "Share of the real parameter count to keep.")] = None,
    target_params: Annotated[float | None, option(_SIZE, "Parameters to come close to, such as 4.5e9.")] = None,
    hidden_size: Annotated[int | None, option(_SIZE, "Exact residual width.")] = None,
    intermediate_size: Annotated[int | None, option(_SIZE, "Exact ffn width.")] = None,
    device_memory: Annotated[str | None, option(_BUDGET, "Of each GPU, such as 24GB. Absent: no GPU.")] = None,
    host_memory: Annotated[str | None, option(_BUDGET, "Of the host, such as 64GiB.")] = None,
    disk: Annotated[str | None, option(_BUDGET, "Free disk for the run folder.")] = None,
    gpus: Annotated[int, option(_BUDGET, "GPUs of one host, a rank each.", min=1)] = 1,
    data: Annotated[list[str] | None, option(_BUDGET, "Training text for the run.yaml; may be repeated.")] = None,
    write: Annotated[Path, option(_BUDGET, "The run.yaml to be; never replaces a file.")] = Path("run.yaml"),
) -> Result:
    """Pick legal widths; count parameters and FLOPs; predict memory. Reads no weight, needs no GPU.

    With a budget it chooses the settings that fit it and compute and move least, explains them, and writes a run.yaml
    that `compress` takes.
    """
    from pcscale.common.errors import RequestError
    from pcscale.common.units import parse_bytes
    from pcscale.distributed.zero_form import forms_to_choose
    from pcscale.memory.choose import Budget, choose, reasons
    from pcscale.memory.predict import Prediction
    from pcscale.memory.shared import KNOBS

    sizes = {"keep": keep, "target_params": target_params}
    widths = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    config, own = _settings(base, {**sizes, **widths}, overrides or [], data)
    plan = _plan(config)
    prediction = Prediction(plan, config)
    limits = [None if size is None else parse_bytes(size) for size in (device_memory, host_memory, disk)]
    budget = Budget(*limits, gpus=gpus)
    if budget == Budget():
        document = prediction.document(base)
        return Result(document, lambda: _print(document, plan))
    if write.exists():
        raise RequestError(f"{write} exists already. Name another file with --write, or remove it.")
    choice = choose(prediction, budget, forms_to_choose(), config.model_fields_set)
    _write(write, choice.config, own)
    document = choice.prediction.document(base)
    why = reasons(choice, config, budget)
    chosen = {key: {"value": getattr(choice.config, key), "why": why.get(key, "")} for key in KNOBS}
    more = {"chosen": chosen, "needs": choice.needs, "run_yaml": str(write)}

    def show() -> None:
        _print(document, plan)
        _print_choice(choice, chosen, budget)
        print(f"wrote {write}. Next: pcscale compress {write}")

    return Result({**document, **more}, show)


def _settings(
    base: str, sizes: dict[str, Any], overrides: list[str], data: list[str] | None
) -> tuple["PlanConfig", dict[str, Any]]:
    """The settings to plan for, and those of a run alone: its folder, and its text where that is named."""
    from pcscale.config.load import apply_overrides, check_settings
    from pcscale.config.schema import PlanConfig, RunConfig

    own: dict[str, Any] = {"output": f"runs/{Path(base).name}"} | ({"data": {"train": data}} if data else {})
    values = apply_overrides({"base": base, **sizes, **own}, overrides)
    own = {key: values.pop(key) for key in ("output", "data") if key in values}
    config = check_settings(PlanConfig, values, "plan")
    if "data" in own:
        check_settings(RunConfig, {**values, **own}, "plan")
    return config, own


def _plan(config: "PlanConfig") -> "Plan":
    from pcscale.base.checks import read_base_entries
    from pcscale.base.resolve import resolve_base
    from pcscale.families.hf_config import read_config
    from pcscale.families.registry import family_of
    from pcscale.families.widths import make_plan
    from pcscale.storage.index import has_weights

    source = resolve_base(config.base, config_only=True)
    base_config = read_config(source.folder)
    family = family_of(base_config, str(source.folder / "config.json"))
    if has_weights(source.folder):
        read_base_entries(source.folder, family, base_config)
    return make_plan(family, base_config, config)


def _write(path: Path, config: "PlanConfig", own: dict[str, Any]) -> None:
    """Write run.yaml; where it names no text, a comment shows how to."""
    import yaml

    from pcscale.common.files import write_text
    from pcscale.config.load import check_settings
    from pcscale.config.schema import PlanConfig

    # A setting that was given may not go with one that was chosen.
    check_settings(PlanConfig, config.model_dump(), "plan")
    settings = config.model_dump(mode="json", exclude_defaults=True)
    first = {"base": settings.pop("base"), **own}
    lines = ["# Chosen by `pcscale plan`.", ""]
    if "data" not in own:
        lines[1:1] = ["# Name your text: pcscale compress run.yaml data.train='[text/*.txt]'"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + yaml.safe_dump({**first, **settings}, sort_keys=False, allow_unicode=True))


def _print_choice(choice: "Choice", chosen: dict[str, dict[str, Any]], budget: "Budget") -> None:
    from pcscale.common.units import format_bytes
    from pcscale.memory.choose import RESOURCES

    rows = [[key, str(entry["value"]).lower(), entry["why"]] for key, entry in chosen.items()]
    title = "Chosen: of the settings that fit those that compute and move least"
    print_table(title, ["setting", "value", "the default instead"], rows)
    limits = {name: format_bytes(limit) for name, limit in budget.limits.items()}
    rows = [
        [label, format_bytes(choice.needs[name]), limits.get(name, "no limit")]
        for name, label in RESOURCES.items()
        if name != "device" or name in limits
    ]
    print_table("Peaks of the whole run", ["", "predicted", "budget"], rows)


def _print(document: dict[str, Any], plan: "Plan") -> None:
    from pcscale.common.units import format_bytes, format_count

    base, compressed, flops = document["base"], document["compressed"], document["flops"]
    rows = [
        ["parameters", format_count(base["parameters"]), format_count(compressed["parameters"])],
        ["hidden_size", str(plan.base_config["hidden_size"]), str(compressed["hidden_size"])],
        ["intermediate_size", str(plan.base_config["intermediate_size"]), str(compressed["intermediate_size"])],
        ["kept share", "", f"{compressed['keep_fraction']:.4f}"],
    ]
    tied = "tied" if base["tied"] else "untied"
    print_table(f"{base['name']} ({base['family']}, {tied} embeddings)", ["", "base", "compressed"], rows)
    sweep = flops["compose_per_step"] + flops["pull_back_per_step"]
    rows = [
        ["trainable values", format_count(document["trainable"]["parameters"])],
        ["their state", format_bytes(document["trainable"]["bytes"])],
        ["FLOPs of a sweep (once a step)", format_count(sweep)],
        ["FLOPs of a token", format_count(flops["train_per_token"])],
        ["tokens a step at which the sweep takes half of the time", format_count(sweep / flops["train_per_token"])],
        ["moved to where it computes and back, a step", format_bytes(sum(document["moved"].values()))],
        ["written to files, a step", format_bytes(document["written_bytes_per_step"])],
    ]
    if document["communicated_bytes_per_step"]:
        rows.append(["communicated by a rank, a step", format_bytes(document["communicated_bytes_per_step"])])
    print_table("Training", ["", "predicted"], rows)
    rows = [[name, part["home"], format_bytes(part["bytes"])] for name, part in document["memory"].items()]
    print_table("Memory while training, each part at its largest (of one rank)", ["part", "home", "predicted"], rows)
    rows = [
        [phase, *(format_bytes(peak[f"{resource}_bytes"]) for resource in ("device", "host", "disk"))]
        for phase, peak in document["peak"].items()
    ]
    print_table("Predicted peaks", ["phase", "device", "host (anonymous)", "disk"], rows)
