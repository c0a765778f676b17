"""The settings as text for `--help` and the docs, made from the schema's own docstrings."""

from pydantic.fields import FieldInfo

from pcscale.config.schema import RunConfig

THEMES = ("model", "data", "training", "memory", "output")


def themed_fields() -> dict[str, dict[str, FieldInfo]]:
    """Every setting by theme."""
    fields = RunConfig.model_fields
    return {
        theme: {
            name: field
            for name, field in fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("theme") == theme
        }
        for theme in THEMES
    }


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return (
        "null"
        if field.default is None
        else str(field.default).lower()
        if field.default in (True, False)
        else str(field.default)
    )


def settings_help() -> str:
    """One paragraph per theme, a line per setting."""
    parts = []
    for theme, fields in themed_fields().items():
        lines = [
            f"{name} ({default_text(field)}): {' '.join((field.description or '').split())}"
            for name, field in fields.items()
        ]
        parts.append("\b\n" + f"Settings: {theme}\n" + "\n".join(f"  {line}" for line in lines))
    return "\n\n".join(parts)
