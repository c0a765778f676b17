"""An optimizer's state as files, and back."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pcscale.common.errors import RequestError
from pcscale.model.loss import NextTokenLoss
from pcscale.projection.checkpoint import read_fixed, read_state, write_outer, write_records
from pcscale.projection.layout import RecordFormat
from pcscale.projection.starts import Start
from pcscale.projection.sweep import ProjectedAdamW
from pcscale.run.manifest import OUTER_NAME, Manifest, record_file
from pcscale.storage.hashing import fingerprint_file
from tests.optimizers import PUBLISHED_FORMAT, build_optimizer
from tests.projection.parts import Compression, TinyBase, copies, random_kept, token_batches

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
FORMS = {
    "bfloat16": RecordFormat("bfloat16"),
    "8bit": RecordFormat(moments="8bit"),
    "low rank": RecordFormat(rank=3),
    "all of them": RecordFormat("bfloat16", "8bit", 3),
}


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("qwen2", False))


def trained(
    compression: Compression,
    project: bool = True,
    dtype: torch.dtype = torch.float32,
    form: RecordFormat = PUBLISHED_FORMAT,
) -> tuple[torch.nn.Module, ProjectedAdamW]:
    """A model and its optimizer after two steps."""
    model = compression.model(dtype)
    optimizer = compression.optimizer(model, project=project, form=form)
    for ids_BT in token_batches(2):
        NextTokenLoss(model)(ids_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def manifest_of(compression: Compression, files: dict[str, str]) -> Manifest:
    plan = compression.plan
    return Manifest(
        step=2,
        method="projected",
        base_name="tiny",
        base_revision=None,
        base_config=compression.base.config,
        base_fingerprints={},
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        files=files,
    )


def written(optimizer: ProjectedAdamW, folder: Path) -> dict[str, str]:
    """What one process writes."""
    return write_records(optimizer, folder) | write_outer(optimizer, folder)


def write(compression: Compression, optimizer: ProjectedAdamW, folder: Path) -> Manifest:
    return manifest_of(compression, written(optimizer, folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("project", "form"),
    [(True, RecordFormat()), (False, RecordFormat()), *((True, form) for form in FORMS.values())],
    ids=["projected", "hard_prune", *FORMS],
)
def test_a_state_comes_back_to_the_last_bit(
    compression: Compression, project: bool, form: RecordFormat, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, optimizer = trained(compression, project, dtype, form)
    manifest = write(compression, optimizer, tmp_path)
    fresh_model = compression.model(dtype)
    fresh = compression.optimizer(fresh_model, project=project, form=form)
    read_state(fresh, tmp_path, manifest)
    for name, record in optimizer.records.items():
        for part, tensor in record.tensors().items():
            assert torch.equal(fresh.records[name].tensors()[part], tensor)
    for name, own in optimizer.direct.items():
        assert all(
            torch.equal(found, expected)
            for (_, found), (_, expected) in zip(fresh.direct[name].tensors(name), own.tensors(name), strict=True)
        )
    expected = copies(model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in fresh_model.named_parameters())


@pytest.mark.parametrize("form", [RecordFormat(), *FORMS.values()], ids=["published", *FORMS])
def test_training_goes_on_from_files_as_it_would_have_gone_on(
    form: RecordFormat, compression: Compression, tmp_path: Path
) -> None:
    model, optimizer = trained(compression, form=form)
    manifest = write(compression, optimizer, tmp_path)
    fresh_model = compression.model()
    fresh = compression.optimizer(fresh_model, form=form)
    read_state(fresh, tmp_path, manifest)
    fresh.load_state_dict(optimizer.state_dict())
    for one, own in ((model, optimizer), (fresh_model, fresh)):
        NextTokenLoss(one)(token_batches(1, seed=9)[0]).backward()
        own.step()
    expected = copies(model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in fresh_model.named_parameters())


@pytest.mark.parametrize("form", [RecordFormat(), *FORMS.values()], ids=["published", *FORMS])
def test_every_matrix_has_its_file_in_the_safetensors_format(
    form: RecordFormat, compression: Compression, tmp_path: Path
) -> None:
    _, optimizer = trained(compression, form=form)
    files = written(optimizer, tmp_path)
    matrices = {planned.name for planned in compression.plan.matrices}
    assert files.keys() == {record_file(name) for name in matrices} | {OUTER_NAME}
    assert files == {name: fingerprint_file(tmp_path / name) for name in files}
    for name in matrices:
        stored, held = load_file(tmp_path / record_file(name)), optimizer.records[name].tensors()
        assert stored.keys() == held.keys()
        assert all(torch.equal(stored[part], held[part]) for part in held)
    outer = load_file(tmp_path / OUTER_NAME)
    vectors = compression.weights.keys() - matrices
    parts = {f"direct.{name}{suffix}" for name in vectors for suffix in ("", ".exp_avg", ".exp_avg_sq")}
    assert outer.keys() == parts | {"kept.residual", "kept.ffn.0", "kept.ffn.1", "updates"}
    assert int(outer["updates"]) == optimizer.updates > 0


def test_kept_indices_are_read_alone(compression: Compression, tmp_path: Path) -> None:
    _, optimizer = trained(compression)
    kept = read_fixed(tmp_path, write(compression, optimizer, tmp_path))
    assert kept.keys() == compression.kept.keys()
    for name, indices in kept.items():
        assert indices.dtype == torch.int64
        assert torch.equal(indices, compression.kept[name])


def test_a_checkpoint_brings_its_own_kept_indices(compression: Compression, tmp_path: Path) -> None:
    model, optimizer = trained(compression)
    manifest = write(compression, optimizer, tmp_path)
    others = random_kept(compression.plan, seed=2)
    handed = {name: indices.clone() for name, indices in others.items()}
    fresh_model = compression.model()
    fresh = build_optimizer(fresh_model, compression.plan, compression.base, Start(handed))
    read_state(fresh, tmp_path, manifest)
    expected = copies(model)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in fresh_model.named_parameters())
    assert all(torch.equal(handed[name], others[name]) for name in others)
    assert all(torch.equal(fresh.fixed[name], compression.kept[name]) for name in others)


@pytest.mark.parametrize("name", [record_file(UP), OUTER_NAME])
def test_a_changed_file_is_refused(compression: Compression, tmp_path: Path, name: str) -> None:
    _, optimizer = trained(compression)
    manifest = write(compression, optimizer, tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    message = f"{tmp_path / name} is not what was written (its fingerprint differs). Use another checkpoint."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_state(optimizer, tmp_path, manifest)


@pytest.mark.parametrize("name", [record_file(UP), OUTER_NAME])
def test_a_missing_file_is_refused(compression: Compression, tmp_path: Path, name: str) -> None:
    _, optimizer = trained(compression)
    manifest = write(compression, optimizer, tmp_path)
    (tmp_path / name).unlink()
    message = f"{tmp_path / name} is missing from the checkpoint. Use another checkpoint."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_state(optimizer, tmp_path, manifest)


def test_a_state_of_other_widths_is_refused(compression: Compression, tmp_path: Path) -> None:
    _, optimizer = trained(compression)
    manifest = write(compression, optimizer, tmp_path)
    wider = Compression.of(compression.base.folder, hidden_size=28)
    message = (
        f"{tmp_path / record_file(EMBEDDING)}: aux is F32 [300, 24], this run expects F32 [300, 28]. "
        "Use the settings that it was saved with."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_state(wider.optimizer(wider.model()), tmp_path, manifest)


@pytest.mark.parametrize(
    ("form", "difference"),
    [
        ("bfloat16", "aux is F32 [300, 24], this run expects BF16 [300, 24]"),
        ("8bit", "aux.exp_avg is F32 [300, 24], this run expects U8 [300, 24]"),
        ("low rank", "delta_in is F32 [32, 24], this run expects nothing"),
    ],
)
def test_a_state_in_another_format_is_refused(
    form: str, difference: str, compression: Compression, tmp_path: Path
) -> None:
    _, optimizer = trained(compression)
    manifest = write(compression, optimizer, tmp_path)
    other = compression.optimizer(compression.model(), form=FORMS[form])
    message = f"{tmp_path / record_file(EMBEDDING)}: {difference}. Use the settings that it was saved with."
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_state(other, tmp_path, manifest)


def test_the_order_of_tensors_in_a_record_file_does_not_matter(compression: Compression, tmp_path: Path) -> None:
    """Checkpoints of format 1 have another one than those of format 2."""
    _, optimizer = trained(compression)
    files, path = written(optimizer, tmp_path), tmp_path / record_file(UP)
    save_file(load_file(path), path)  # By name, within a dtype.
    assert files[record_file(UP)] != fingerprint_file(path)
    files[record_file(UP)] = fingerprint_file(path)
    fresh = compression.optimizer(compression.model())
    read_state(fresh, tmp_path, manifest_of(compression, files))
    found, expected = (own.records[UP].tensors() for own in (fresh, optimizer))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[part], expected[part]) for part in expected)


def test_a_state_without_a_tensor_is_refused(compression: Compression, tmp_path: Path) -> None:
    _, optimizer = trained(compression)
    files = written(optimizer, tmp_path)
    outer = load_file(tmp_path / OUTER_NAME)
    del outer[f"direct.{NORM}.exp_avg"]
    save_file(outer, tmp_path / OUTER_NAME)
    files[OUTER_NAME] = fingerprint_file(tmp_path / OUTER_NAME)
    message = (
        f"{tmp_path / OUTER_NAME}: direct.{NORM}.exp_avg is nothing, this run expects F32 [24]. "
        "Use the settings that it was saved with."
    )
    with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
        read_state(optimizer, tmp_path, manifest_of(compression, files))
