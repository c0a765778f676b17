"""What `import pcscale` offers."""

import subprocess
import sys

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
