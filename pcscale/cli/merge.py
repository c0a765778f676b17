"""`pcscale merge`: a checkpoint into an ordinary Hugging Face folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pcscale.cli.common import Result, command


@command
def main(
    checkpoint: Annotated[
        Path, typer.Argument(help="A step-… folder of a run, or a run folder (its last checkpoint).")
    ],
    output: Annotated[Path, typer.Option(help="The folder to write; new or empty.")],
    base: Annotated[
        str | None, typer.Option(help="The base: folder or Hub id. Absent: found by the name in the checkpoint.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest file.", rich_help_panel="Size")] = "5GB",
    max_memory: Annotated[
        str, typer.Option(help="Cap on anonymous memory, beside 300 MiB of interpreter.", rich_help_panel="Size")
    ] = "2GiB",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.", rich_help_panel="Size")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the finished shards of an interrupted merge.")] = False,
) -> Result:
    """Write the compressed model shard by shard, without ever holding a model."""
    from pcscale.base.mapped import MappedBase
    from pcscale.base.resolve import resolve_base
    from pcscale.common.units import format_bytes, format_seconds, parse_bytes
    from pcscale.merging.merge import find_base, merge
    from pcscale.run.folder import RunFolder
    from pcscale.run.manifest import Manifest

    folder = RunFolder(checkpoint).latest_checkpoint() or checkpoint
    source = resolve_base(base) if base else find_base(Manifest.read(folder))
    shard, memory = parse_bytes(max_shard_size), parse_bytes(max_memory)
    result = merge(folder, MappedBase(source), output, shard, memory, dtype, resume)
    text = (
        f"{output}: {result.tensors} tensors in {result.shards} files, {format_bytes(result.bytes_written)}, "
        f"{format_seconds(result.seconds)}, peak anonymous memory {format_bytes(result.peak_anonymous_bytes)}"
    )
    return Result(asdict(result), lambda: print(text))
