"""The help text is the schema's own."""

import pytest

from pcscale.config.help import default_text, settings_help, themed_fields
from pcscale.config.schema import RunConfig


def test_every_setting_stands_under_exactly_one_theme() -> None:
    names = [name for fields in themed_fields().values() for name in fields]
    assert sorted(names) == sorted(RunConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("base", "required"),
        ("keep", "null"),
        ("bf16", "false"),
        ("seed", "0"),
        ("max_grad_norm", "1.0"),
        ("learning_rate", "0.0001"),
        ("max_memory", "2GiB"),
    ],
)
def test_a_default_is_shown_as_it_is_written_in_yaml(name: str, text: str) -> None:
    assert default_text(RunConfig.model_fields[name]) == text


def test_the_help_names_every_setting_with_default_and_description() -> None:
    lines = settings_help().splitlines()
    for name, field in RunConfig.model_fields.items():
        assert field.description
        description = " ".join(field.description.split())  # A docstring may go over several lines.
        assert f"  {name} ({default_text(field)}): {description}" in lines, name
