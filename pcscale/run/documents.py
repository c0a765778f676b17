"""JSON files of a run as typed values: written whole, and refused in one line where something in them is wrong."""

import reprlib
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, Strict, TypeAdapter, ValidationError

from pcscale.common.errors import RequestError
from pcscale.common.files import read_json, write_json

Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Seconds = Annotated[Number, Field(ge=0)]
Count = Annotated[int, Strict(), Field(ge=0, lt=2**63)]
RESTORE = "Restore the file."
_OBJECTS = ("dataclass_type", "dict_type")

Value = TypeVar("Value")


def read_document(path: Path, kind: type[Value], remedy: str = RESTORE) -> Value | None:
    """The JSON document in a file, as `kind`; None: there is no file.

    Raises:
        RequestError: the file is not JSON, or holds something else.
    """
    return checked(read_json(path), kind, str(path), remedy) if path.exists() else None


def write_document(path: Path, value: Any) -> None:
    """Replace a file by the fields of a dataclass; a field that is None is left out."""
    write_json(path, {key: part for key, part in asdict(value).items() if part is not None})


def checked(values: Any, kind: type[Value], where: str, remedy: str = RESTORE) -> Value:
    """A value of `kind` made of what a JSON document holds.

    Raises:
        RequestError: a key is missing, or what it holds is of another kind; the first one is named.
    """
    try:
        return _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise RequestError(f"{where}{_first_problem(error)}. {remedy}") from None


@cache
def _adapter(kind: type[Value]) -> TypeAdapter[Value]:
    return TypeAdapter(kind)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
    if problem["type"] == "missing":
        return f" has no '{key}'"
    expected = "a JSON object" if problem["type"] in _OBJECTS else problem["msg"].removeprefix("Input should be ")
    return f"{f': {key}' if key else ''} is {reprlib.repr(problem['input'])}, expected {expected}"
