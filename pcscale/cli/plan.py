"""`pcscale plan`: widths, sizes and predicted memory, from config.json alone."""

from typing import Annotated, Any

import typer

from pcscale.cli.common import DebugFlag, JsonFlag, QuietFlag, command, print_json, print_table

_SIZE = "Size of the compressed model (one way; default: keep 0.5)"


@command
def main(
    base: Annotated[str, typer.Argument(help="Checkpoint folder (config.json alone is enough) or Hub id.")],
    keep: Annotated[
        float | None, typer.Option(help="Share of the real parameter count to keep.", rich_help_panel=_SIZE)
    ] = None,
    target_params: Annotated[
        float | None, typer.Option(help="Parameters to come close to, such as 4.5e9.", rich_help_panel=_SIZE)
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Exact residual width.", rich_help_panel=_SIZE)] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Exact ffn width.", rich_help_panel=_SIZE)] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Pick legal widths; count parameters and FLOPs; predict memory. Reads no weight, needs no GPU."""
    from pcscale.base.checks import read_base_entries
    from pcscale.base.resolve import resolve_base
    from pcscale.config.load import check_values
    from pcscale.families.hf_config import read_config
    from pcscale.families.registry import family_of
    from pcscale.families.widths import make_plan
    from pcscale.memory.estimate import plan_document
    from pcscale.storage.index import has_weights

    sizes = {
        "keep": keep,
        "target_params": target_params,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
    }
    config = check_values({"base": base, "output": "-", "data": {"train": ["-"]}, **sizes}, "plan")
    source = resolve_base(base, config_only=True)
    base_config = read_config(source.folder)
    family = family_of(base_config, str(source.folder / "config.json"))
    if has_weights(source.folder):
        read_base_entries(source.folder, family, base_config)
    document = plan_document(make_plan(family, base_config, config), config, base)
    if json:
        print_json(document)
    else:
        _print(document, base_config)


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
        ["FLOPs of a token (training, sequences of 512)", format_count(flops["train_per_token"])],
        ["tokens a step at which the sweep takes half of the time", format_count(sweep / flops["train_per_token"])],
    ]
    print_table("Training", ["", "predicted"], rows)
    rows = [[name, part["home"], format_bytes(part["bytes"])] for name, part in document["memory"].items()]
    print_table("Memory while training (device: the host's where there is no GPU)", ["part", "home", "predicted"], rows)
    rows = [
        [phase, *(format_bytes(peak[f"{home}_bytes"]) for home in ("device", "host", "disk"))]
        for phase, peak in document["peak"].items()
    ]
    print_table("Predicted peaks", ["phase", "device", "host (anonymous)", "disk"], rows)
