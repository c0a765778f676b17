"""The check of a folder's tensors against its config. Reads headers only: no torch, no weight."""

from pathlib import Path

from pcscale.common.errors import RequestError
from pcscale.families.spec import Config, Family, Kind, sizes_of
from pcscale.storage.index import TensorEntry, read_folder

_FLOAT_DTYPES = ("F32", "BF16", "F16")
_REBUILT_BUFFER = "rotary_emb.inv_freq"  # Old Llama checkpoints carry it; the stock class computes it.


def read_base_entries(folder: Path, family: Family, config: Config) -> dict[str, TensorEntry]:
    """The base's tensors in the order of the family's table, each present and of the promised shape.

    Raises:
        RequestError: a tensor is absent, unknown, of another shape or not of a floating-point dtype.
    """
    entries = read_folder(folder)
    sizes = sizes_of(config)
    checked: dict[str, TensorEntry] = {}
    for weight in family.weights(config):
        entry = entries.get(weight.name)
        if entry is None:
            raise RequestError(
                f"{folder}: {weight.name} is not in the weights, family '{family.name}' needs it. "
                "Check config.json beside the weights."
            )
        if entry.shape != weight.shape(sizes):
            axes = ", ".join(f"{axis}={sizes[axis]}" for axis in weight.axes)
            raise RequestError(
                f"{entry.file}: {weight.name} has shape {list(entry.shape)}, family '{family.name}' expects [{axes}]. "
                "Check config.json beside the weights."
            )
        if entry.dtype not in _FLOAT_DTYPES:
            raise RequestError(
                f"{entry.file}: {weight.name} is stored as {entry.dtype}, expected one of {', '.join(_FLOAT_DTYPES)}. "
                "Use the checkpoint in its full precision."
            )
        checked[weight.name] = entry
    # A tied checkpoint may carry its head as well; the stock class drops it too.
    droppable = {spec.name for spec in family.after if spec.kind is Kind.HEAD}
    known = checked.keys() | droppable
    unknown = [name for name in entries if name not in known and _REBUILT_BUFFER not in name]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise RequestError(
            f"{folder}: the weights hold {unknown[0]}, which family '{family.name}' does not know{more}. "
            "Check model_type in config.json."
        )
    return checked
