"""Starts against their definitions, written out by hand, and against what records compose to."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pcscale.base.int8 import Int8Base
from pcscale.calibration.collect import activation_scores, read_rebuilt, write_rebuilt
from pcscale.calibration.score import Scores, random_scores
from pcscale.calibration.select import select
from pcscale.calibration.statistics import SECOND_MOMENT, dropped_of, rebuild
from pcscale.common.errors import RequestError
from pcscale.config.schema import REBUILDING_STARTS
from pcscale.families.plan import Plan
from pcscale.model.compressed import build_compressed
from pcscale.projection.layout import RecordFormat
from pcscale.projection.record import basis_name
from pcscale.projection.starts import STARTS, TIED_GAIN, Start, make_start, rotated, start_tensors
from pcscale.projection.sweep import ProjectedAdamW
from tests.optimizers import build_optimizer
from tests.projection.parts import ALL_CASES, CPU, Compression, TinyBase, case_folder, copies, token_batches
from tests.tiny import build_base

FLOAT32_TOLERANCE = 2e-5
"""Sums of some tens of products in another order; of the largest entry."""
UP, DOWN, QUERY = (f"model.layers.1.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"))
INPUT_NORM, LAST_NORM, EMBEDDING = (
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
)
BATCHES = token_batches(4, batch=3, tokens=20)


def calibrated(compression: Compression) -> Scores:
    return activation_scores(compression.plan, compression.base, "activation", BATCHES, CPU, torch.float32)


def start_of(name: str, compression: Compression, folder: Path) -> Start:
    """The start as a run makes it."""
    plan, base = compression.plan, compression.base
    scores, rebuilt = calibrated(compression), {}
    if "least_squares" in name:
        path = folder / "rebuilt.safetensors"
        write_rebuilt(path, plan, base, select(plan, scores), BATCHES, CPU, torch.float32)
        rebuilt = read_rebuilt(path)
    return make_start(name, plan, scores, base.tensor, rebuilt)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = FLOAT32_TOLERANCE) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


# What records compose to.


@pytest.mark.parametrize(("family", "tied", "biased"), ALL_CASES)
@pytest.mark.parametrize("name", STARTS)
def test_records_compose_to_the_start_in_every_family(
    name: str, family: str, tied: bool, biased: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(case_folder(family, tied, biased, tiny_base, tmp_path))
    assert_composes(compression, start_of(name, compression, tmp_path))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("name", STARTS)
def test_records_over_an_8_bit_base_compose_to_the_same(
    name: str, rank: int | None, weight_decay: float, compression: Compression, tmp_path: Path
) -> None:
    coded = Int8Base(compression.base, tmp_path / "coded.safetensors")
    start = start_of(name, compression, tmp_path)
    optimizer = assert_composes(compression, start, coded, RecordFormat(rank=rank), weight_decay)
    if weight_decay:
        record = optimizer.records[DOWN]
        assert record.aux_start is not None
        assert torch.equal(record.aux_start, record.parts["aux"].value)


def assert_composes(
    compression: Compression,
    start: Start,
    base: Int8Base | None = None,
    form: RecordFormat | None = None,
    weight_decay: float = 0.0,
) -> ProjectedAdamW:
    plan = compression.plan
    model = build_compressed(plan, start_tensors(plan, start, compression.base.tensor), CPU, torch.float32)
    expected = copies(model)
    optimizer = build_optimizer(
        model, plan, base or compression.base, start, form=form or RecordFormat(), weight_decay=weight_decay
    )
    with torch.no_grad():
        for planned in plan.matrices:
            model.get_parameter(planned.name).fill_(torch.nan)
    optimizer.compose_all()
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), expected[name])
    return optimizer


# Rotation.


def orthogonal(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q.float()


@pytest.mark.parametrize(("family", "tied", "biased"), [case for case in ALL_CASES if not case[1]])
def test_a_rotation_with_nothing_cut_gives_the_base_s_logits(
    family: str, tied: bool, biased: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    folder = case_folder(family, tied, biased, tiny_base, tmp_path)
    compression = Compression.of(folder)
    base, sizes = compression.base, compression.plan.base_sizes
    plan = Plan(base.family, base.config, sizes["residual"], sizes["ffn"])
    everything = {name: torch.arange(size) for name, size, _ in plan.kept_axes()}
    start = rotated(plan, everything, orthogonal(sizes["residual"]), 1.0, base.tensor)
    model = build_compressed(plan, start_tensors(plan, start, base.tensor), CPU, torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(model.get_parameter(UP), stock.get_parameter(UP))
    with torch.no_grad():
        for ids_BT in BATCHES:
            assert_close(model(ids_BT).logits, stock(ids_BT).logits, 1e-4)


def test_the_basis_spans_the_main_directions_and_lies_closest_to_the_kept_coordinates(
    compression: Compression, tmp_path: Path
) -> None:
    start, moment_HH = start_of("pca", compression, tmp_path), calibrated(compression)[SECOND_MOMENT].double()
    basis_Hh, kept = start.fixed[basis_name("residual")].double(), start.fixed["residual"]
    assert_close(basis_Hh.T @ basis_Hh, torch.eye(basis_Hh.shape[1]))
    left, _, _ = torch.linalg.svd(moment_HH)
    main_Hh = left[:, : basis_Hh.shape[1]]
    assert_close(basis_Hh @ basis_Hh.T, main_Hh @ main_Hh.T, 1e-4)
    # What orthogonal Procrustes is known by: the overlap is symmetric, and no direction of it is turned around.
    overlap_hh = basis_Hh[kept]
    assert_close(overlap_hh, overlap_hh.T, 1e-4)
    assert torch.linalg.eigvalsh((overlap_hh + overlap_hh.T) / 2).min() > -1e-6


def test_matrices_are_rotated_with_their_norm_folded_in(compression: Compression, tmp_path: Path) -> None:
    start, weights = start_of("pca", compression, tmp_path), compression.weights
    tensors = start_tensors(compression.plan, start, compression.base.tensor)
    P_Hh, ffn = start.fixed[basis_name("residual")], start.fixed["ffn.1"]
    gamma_H = weights[INPUT_NORM]
    mean = gamma_H.square().mean().sqrt()
    assert_close(tensors[QUERY], weights[QUERY] @ (gamma_H / mean).diag() @ P_Hh)
    assert_close(tensors[EMBEDDING], weights[EMBEDDING] @ P_Hh)
    assert_close(tensors[DOWN], P_Hh.T @ weights[DOWN][:, ffn])
    moment_HH = calibrated(compression)[SECOND_MOMENT]
    kept_energy = (P_Hh.T @ moment_HH @ P_Hh).trace() / moment_HH.trace()
    gain = (kept_energy * P_Hh.shape[0] / P_Hh.shape[1]).sqrt()
    assert_close(tensors[INPUT_NORM], (mean * gain).expand(P_Hh.shape[1]))


def test_the_last_norm_of_a_tied_head_is_turned_with_the_basis(tiny_base: TinyBase, tmp_path: Path) -> None:
    compression = Compression.of(tiny_base("llama", True))
    start, untied = (start_of(name, compression, tmp_path) for name in ("pca", "rescaled"))
    P_Hh, gamma_H = start.fixed[basis_name("residual")], compression.weights[LAST_NORM]
    moment_HH = calibrated(compression)[SECOND_MOMENT]
    gain = ((P_Hh.T @ moment_HH @ P_Hh).trace() / moment_HH.trace() * P_Hh.shape[0] / P_Hh.shape[1]).sqrt()
    assert_close(start.norms[LAST_NORM], (P_Hh.T @ gamma_H.diag() @ P_Hh).diagonal() * gain * TIED_GAIN)
    assert basis_name("residual") not in untied.fixed


def test_a_residual_stream_that_keeps_its_width_is_not_rotated(tiny_base: TinyBase, tmp_path: Path) -> None:
    compression = Compression.of(tiny_base("llama", True), hidden_size=32)
    start = start_of("pca_least_squares", compression, tmp_path)
    assert basis_name("residual") not in start.fixed
    assert not start.norms
    assert start.rebuilt
    assert_composes(compression, start)


# Norms and rebuilt channels.


def test_rescaled_norms_make_up_for_the_energy_that_is_cut(compression: Compression, tmp_path: Path) -> None:
    """In the mean over tokens, what a norm divides by is then what it was in the base."""
    start, weights = start_of("rescaled", compression, tmp_path), compression.weights
    model, inputs = AutoModelForCausalLM.from_pretrained(compression.base.folder), []
    norm = model.get_submodule(INPUT_NORM.removesuffix(".weight"))
    norm.register_forward_hook(lambda module, given, output: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for ids_BT in BATCHES:
            model(ids_BT)
    x_NH, kept = torch.cat(inputs), start.fixed["residual"]
    x_NH = x_NH / x_NH.square().mean(1, keepdim=True).sqrt()
    root_mean_square = x_NH[:, kept].square().mean().sqrt()
    assert_close(start.norms[INPUT_NORM], weights[INPUT_NORM][kept] * root_mean_square, 1e-4)
    assert len(start.norms) == 5


def test_rebuilding_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(6)
    x_NC = torch.randn(200, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    kept = torch.tensor([0, 2, 3, 5, 8, 9, 11])
    dropped = dropped_of(kept, 12)
    assert dropped.tolist() == [1, 4, 6, 7, 10]
    found = rebuild(x_NC.T @ x_NC, kept, ridge=0.0)
    expected = torch.linalg.lstsq(x_NC[:, kept].double(), x_NC[:, dropped].double()).solution.T
    assert_close(found, expected, 1e-4)
    ridged = rebuild(x_NC.T @ x_NC, kept, ridge=10.0)
    assert ridged.norm() < found.norm()


def test_the_ffn_is_rebuilt_from_what_enters_its_last_matrix(compression: Compression, tmp_path: Path) -> None:
    start, weights = start_of("pca_least_squares", compression, tmp_path), compression.weights
    model, inputs = AutoModelForCausalLM.from_pretrained(compression.base.folder), []
    down = model.get_submodule(DOWN.removesuffix(".weight"))
    down.register_forward_pre_hook(lambda module, given: inputs.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        for ids_BT in BATCHES:
            model(ids_BT)
    x_NF, kept = torch.cat(inputs), start.fixed["ffn.1"]
    expected_df = rebuild(x_NF.T @ x_NF, kept)
    assert start.rebuilt["ffn.1"].dtype == torch.bfloat16
    assert_close(start.rebuilt["ffn.1"], expected_df, 2**-8)
    dropped, P_Hh = dropped_of(kept, x_NF.shape[1]), start.fixed[basis_name("residual")]
    tensors = start_tensors(compression.plan, start, compression.base.tensor)
    whole = weights[DOWN][:, kept] + weights[DOWN][:, dropped] @ start.rebuilt["ffn.1"].float()
    assert_close(tensors[DOWN], P_Hh.T @ whole)
    # It is nearer to what the whole matrix gives than the kept channels alone are.
    y_NH = x_NF @ weights[DOWN].T
    missed = [(y_NH - x_NF[:, kept] @ w.T).norm() for w in (whole, weights[DOWN][:, kept])]
    assert missed[0] < missed[1]


def test_the_residual_stream_is_rebuilt_behind_its_norms(compression: Compression, tmp_path: Path) -> None:
    start, weights = start_of("least_squares", compression, tmp_path), compression.weights
    kept, M_dh = start.fixed["residual"], rebuild(calibrated(compression)[SECOND_MOMENT], start.fixed["residual"])
    dropped, gamma_H = dropped_of(kept, 32), weights[INPUT_NORM]
    tensors = start_tensors(compression.plan, start, compression.base.tensor)
    behind_dh = gamma_H[dropped, None] * M_dh / gamma_H[kept]
    assert_close(tensors[QUERY], weights[QUERY][:, kept] + weights[QUERY][:, dropped] @ behind_dh)
    assert torch.equal(tensors[EMBEDDING], weights[EMBEDDING][:, kept]), "nothing is known before the first layer"
    assert start.norms.keys() == start_of("rescaled", compression, tmp_path).norms.keys()


def test_a_norm_that_passes_nothing_is_not_divided_by(tmp_path: Path) -> None:
    folder = build_base(tmp_path / "base", "llama", False)
    weights = load_file(folder / "model.safetensors")
    weights[INPUT_NORM][:4] = 0.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    compression = Compression.of(folder)
    start = start_of("least_squares", compression, tmp_path)
    assert all(
        torch.isfinite(tensor).all()
        for tensor in start_tensors(compression.plan, start, compression.base.tensor).values()
    )
    assert_composes(compression, start)


def test_kept_entries_of_the_published_start_stay_in_the_stored_dtype(tmp_path: Path) -> None:
    compression = Compression.of(build_base(tmp_path / "base", dtype=torch.bfloat16))
    for name, dtype in (("selection", torch.bfloat16), ("pca", torch.float32)):
        tensors = start_tensors(compression.plan, start_of(name, compression, tmp_path), compression.base.tensor)
        assert {tensors[matrix].dtype for matrix in (UP, DOWN, EMBEDDING)} == {dtype}


def test_scores_without_activations_are_refused(compression: Compression) -> None:
    scores = random_scores(compression.plan, 0)
    assert make_start("selection", compression.plan, scores, compression.base.tensor).fixed.keys() == scores.keys()
    for name in STARTS.keys() - {"selection"}:
        with pytest.raises(RequestError, match=rf"start {name} needs second_moment.residual, which these scores lack"):
            make_start(name, compression.plan, scores, compression.base.tensor)


@pytest.mark.parametrize("name", REBUILDING_STARTS)
def test_what_is_rebuilt_must_be_given_to_a_start_that_rebuilds(name: str, compression: Compression) -> None:
    with pytest.raises(RequestError, match=f"^start {name} rebuilds ffn channels: give `rebuilt`"):
        make_start(name, compression.plan, calibrated(compression), compression.base.tensor)


@pytest.mark.parametrize("name", STARTS)
def test_a_layer_that_does_nothing_has_a_start_that_does_nothing(name: str, tmp_path: Path) -> None:
    """An ffn whose gate is zero, and a norm that is."""
    folder = build_base(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    gate, norm = "model.layers.1.mlp.gate_proj.weight", "model.layers.0.input_layernorm.weight"
    save_file({**weights, gate: 0 * weights[gate], norm: 0 * weights[norm]}, folder / "model.safetensors")
    compression = Compression.of(folder)
    tensors = start_tensors(compression.plan, start_of(name, compression, tmp_path), compression.base.tensor)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    model = build_compressed(compression.plan, tensors, CPU, torch.float32)
    attention, ffn = model.model.layers[0].self_attn, model.model.layers[1].mlp
    outputs: list[torch.Tensor] = []
    for module in (attention.o_proj, ffn):
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    loss = model(input_ids=BATCHES[0], labels=BATCHES[0]).loss
    assert loss.isfinite()
    assert [output.abs().max().item() for output in outputs] == [0.0, 0.0]
