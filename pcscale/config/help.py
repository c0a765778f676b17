"""The settings as text for `--help` and the docs, made from the schema's own docstrings."""

import json

from pydantic.fields import FieldInfo

from pcscale.config.schema import RunConfig

THEMES = ("model", "data", "training", "memory", "output")


def themed_fields() -> dict[str, dict[str, FieldInfo]]:
    """Every setting by theme."""
    themes: dict[str, dict[str, FieldInfo]] = {theme: {} for theme in THEMES}
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.json_schema_extra, dict)
        themes[str(field.json_schema_extra["theme"])][name] = field
    return themes


def default_text(field: FieldInfo) -> str:
    """A setting's default as run.yaml would have it, or `required`."""
    if field.is_required():
        return "required"
    if field.default is None or isinstance(field.default, bool):
        return json.dumps(field.default)
    return str(field.default)


def settings_help() -> str:
    """One paragraph per theme, a line per setting."""
    parts = []
    for theme, fields in themed_fields().items():
        lines = [
            f"\n  {name} ({default_text(field)}): {' '.join((field.description or '').split())}"
            for name, field in fields.items()
        ]
        parts.append(f"\b\nSettings: {theme}" + "".join(lines))
    return "\n\n".join(parts)
