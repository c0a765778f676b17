"""`pcscale plan`: widths, sizes and predicted memory, from config.json alone; and the settings that fit a budget."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table

if TYPE_CHECKING:
    from pcscale.config.schema import RunConfig
    from pcscale.families.plan import Plan
    from pcscale.memory.budget import Budget, Choice
    from pcscale.memory.hardware import Hardware

_SIZE = "Size of the compressed model (one way; default: keep 0.5)"
_BUDGET = "Budget: choose the fastest settings that fit, and write a run.yaml"
_SPEED = "Speed: what step times are predicted for"
_ASSUMED = "a100-80gb"
"""Whose speeds decide between settings where nothing was measured or named; no times are shown then."""


@command
def main(
    base: Annotated[str, typer.Argument(help="Checkpoint folder (config.json alone is enough) or Hub id.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings of run.yaml to plan for.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the real parameter count to keep.", rich_help_panel=_SIZE)
    ] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Parameters to come close to, such as 4.5e9.", rich_help_panel=_SIZE)
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Exact residual width.", rich_help_panel=_SIZE)] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Exact ffn width.", rich_help_panel=_SIZE)] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="Of each GPU, such as 24GB. Absent: no GPU.", rich_help_panel=_BUDGET)
    ] = None,
    host_memory: Annotated[
        str | None, typer.Option(help="Of the host, such as 64GiB.", rich_help_panel=_BUDGET)
    ] = None,
    disk: Annotated[str | None, typer.Option(help="Free disk for the run folder.", rich_help_panel=_BUDGET)] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of one host, a rank each.", rich_help_panel=_BUDGET)] = 1,
    data: Annotated[
        list[str] | None, typer.Option(help="Training text for the run.yaml; may be repeated.", rich_help_panel=_BUDGET)
    ] = None,
    write: Annotated[
        Path, typer.Option(help="The run.yaml to be; never replaces a file.", rich_help_panel=_BUDGET)
    ] = Path("run.yaml"),
    hardware: Annotated[
        str | None, typer.Option(help="A GPU by name, such as rtx-4090 or h100-80gb.", rich_help_panel=_SPEED)
    ] = None,
    calibrate_machine: Annotated[
        bool,
        typer.Option(
            "--calibrate-machine", help="Measure this machine first; it is remembered.", rich_help_panel=_SPEED
        ),
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Pick legal widths; count parameters and FLOPs; predict memory. Reads no weight, needs no GPU.

    With a budget it chooses what fits it best, says why, and writes a run.yaml that `compress` takes.
    """
    from pcscale.base.checks import read_base_entries
    from pcscale.base.resolve import resolve_base
    from pcscale.common.units import parse_bytes
    from pcscale.config.load import apply_overrides, check_values
    from pcscale.families.hf_config import read_config
    from pcscale.families.registry import family_of
    from pcscale.families.widths import make_plan
    from pcscale.memory.budget import Budget, choose
    from pcscale.memory.estimate import plan_document
    from pcscale.storage.index import has_weights

    sizes = {
        "keep": keep,
        "target_params": target_params,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    values = {"base": base, "output": f"runs/{Path(base).name}", "data": {"train": data or ["-"]}}
    config = check_values(apply_overrides({**values, **sizes}, overrides or []), "plan")
    source = resolve_base(base, config_only=True)
    base_config = read_config(source.folder)
    family = family_of(base_config, str(source.folder / "config.json"))
    if has_weights(source.folder):
        read_base_entries(source.folder, family, base_config)
    plan = make_plan(family, base_config, config)
    speed, known = _speed(hardware, calibrate_machine)
    sizes_of = [None if size is None else parse_bytes(size) for size in (device_memory, host_memory, disk)]
    budget = Budget(*sizes_of, gpus=gpus)
    if budget == Budget():
        document = plan_document(plan, config, base, hardware=speed if known else None)
        print_json(document) if json else _print(document, base_config)
        return
    _refuse_to_replace(write)
    choice = choose(plan, config, budget, speed, config.model_fields_set)
    check_values(choice.config.model_dump(), "plan")
    document = plan_document(plan, choice.config, base, choice.place, speed if known else None)
    written = _write(write, choice, has_data=bool(data))
    chosen = _chosen(plan, choice, config, budget, speed, known)
    if json:
        print_json({**document, "chosen": chosen, "needs": choice.needs, "run_yaml": str(write)})
        return
    _print(document, base_config)
    _print_choice(choice, chosen, budget, written)


def _speed(name: str | None, measure: bool) -> tuple["Hardware", bool]:
    """The figures to predict times with, and whether they are of a machine that was named or measured."""
    from pcscale.common.cache import cache_folder
    from pcscale.memory.hardware import CALIBRATION_NAME, named_hardware, read_calibration, write_calibration

    path = cache_folder() / CALIBRATION_NAME
    if measure:
        from pcscale.memory.calibrate_machine import calibrate_machine

        cache_folder().mkdir(parents=True, exist_ok=True)
        write_calibration(path, calibrate_machine(cache_folder()))
    found = named_hardware(name) if name else read_calibration(path)
    return found or named_hardware(_ASSUMED), found is not None


def _refuse_to_replace(path: Path) -> None:
    from pcscale.common.errors import RequestError

    if path.exists():
        raise RequestError(f"{path} exists already. Name another file with --write, or remove it.")


def _write(path: Path, choice: "Choice", has_data: bool) -> list[Path]:
    """Write run.yaml, and the DeepSpeed file that it names beside it."""
    import yaml

    from pcscale.common.files import write_json, write_text
    from pcscale.memory.budget import zero_file

    settings = choice.config.model_dump(mode="json", exclude_defaults=True)
    written = [path]
    path.parent.mkdir(parents=True, exist_ok=True)
    if choice.config.deepspeed is not None:
        file = path.parent / choice.config.deepspeed
        if not file.exists():
            write_json(file, zero_file(choice.config.deepspeed))
        settings["deepspeed"] = str(file)
        written.append(file)
    lines = ["# Chosen by `pcscale plan`.", ""]
    if not has_data:
        del settings["data"]
        lines[1:1] = ["# Name your text: pcscale compress run.yaml data.train='[text/*.txt]'"]
    write_text(path, "\n".join(lines) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    return written


def _chosen(
    plan: "Plan", choice: "Choice", config: "RunConfig", budget: "Budget", speed: "Hardware", known: bool
) -> dict[str, dict[str, Any]]:
    from pcscale.memory.budget import KNOBS, reasons

    why = reasons(plan, choice, config, budget, speed, timed=known)
    return {key: {"value": getattr(choice.config, key), "why": why.get(key, "")} for key in KNOBS}


def _print_choice(choice: "Choice", chosen: dict[str, dict[str, Any]], budget: "Budget", written: list[Path]) -> None:
    from pcscale.common.units import format_bytes
    from pcscale.memory.budget import RESOURCES

    rows = [[key, str(entry["value"]).lower(), entry["why"]] for key, entry in chosen.items()]
    print_table("Chosen: the fastest settings that fit", ["setting", "value", "the default instead"], rows)
    limits = {"device": budget.device, "host": budget.host, "disk": budget.disk}
    rows = [
        [RESOURCES[name], format_bytes(choice.needs[name]), format_bytes(limit) if limit else "no limit"]
        for name, limit in limits.items()
        if name != "device" or limit
    ]
    print_table("Peaks of the whole run", ["", "predicted", "budget"], rows)
    print(f"wrote {' and '.join(map(str, written))}. Next: pcscale compress {written[0]}")


def _print(document: dict[str, Any], base_config: dict[str, Any]) -> None:
    from pcscale.common.units import format_bytes, format_count

    base, compressed, flops = document["base"], document["compressed"], document["flops"]
    rows = [
        ["parameters", format_count(base["parameters"]), format_count(compressed["parameters"])],
        ["hidden_size", str(base_config["hidden_size"]), str(compressed["hidden_size"])],
        ["intermediate_size", str(base_config["intermediate_size"]), str(compressed["intermediate_size"])],
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
    seconds = document["step_seconds"] or {}
    rows += [[f"seconds of a step, {name}", f"{value:.2f}"] for name, value in seconds.items()]
    print_table("Training", ["", "predicted"], rows)
    rows = [[name, part["home"], format_bytes(part["bytes"])] for name, part in document["memory"].items()]
    print_table("Memory while training, each part at its largest (of one rank)", ["part", "home", "predicted"], rows)
    rows = [
        [phase, *(format_bytes(peak[f"{home}_bytes"]) for home in ("device", "host", "disk"))]
        for phase, peak in document["peak"].items()
    ]
    print_table("Predicted peaks", ["phase", "device", "host (anonymous)", "disk"], rows)
