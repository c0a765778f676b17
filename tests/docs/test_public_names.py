"""What `import pcscale` offers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import pcscale


@pytest.mark.parametrize("name", pcscale.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(pcscale, name) is not None
    namespace: dict[str, object] = {}
    exec(f"from pcscale import {name}", namespace)
    assert namespace[name] is getattr(pcscale, name)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pcscale' has no attribute 'compres'"):
        _ = pcscale.compres


def test_importing_pcscale_imports_nothing_heavy() -> None:
    program = "import sys, pcscale; assert not {'torch', 'transformers'} & set(sys.modules); print(pcscale.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == pcscale.__version__


def test_the_reference_has_every_public_name() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: pcscale\.(\w+)$", page, re.MULTILINE)
    assert sorted([*documented, "__version__"]) == sorted(pcscale.__all__)
