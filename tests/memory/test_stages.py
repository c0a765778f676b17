"""Predicted components against what is really allocated at a tiny size, and what is alive in each stage."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.base.held import HeldBase
from pcscale.base.int8 import Int8Base
from pcscale.calibration.collect import activation_scores, read_rebuilt, write_rebuilt
from pcscale.calibration.select import select
from pcscale.common import ledger
from pcscale.common.topology import Topology
from pcscale.distributed.zero_form import ZeroForm
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.stages import (
    ACTIVATIONS,
    ALLOCATOR,
    CUDA_HOST_BYTES,
    HEAD_GRADIENT,
    IN_FLIGHT,
    LIBRARY_BYTES,
    LOGITS,
    ON_ITS_WAY,
    TEMPORARIES,
)
from pcscale.model.compressed import build_compressed
from pcscale.projection.layout import RecordFormat, overlap_bytes, record_bytes
from pcscale.projection.owners import owned_matrices
from pcscale.projection.residency import State
from pcscale.projection.starts import STARTS, Start, make_start, start_tensors
from tests.entered import Entered
from tests.memory.plans import (
    COMPONENTS,
    GPU,
    HELD,
    HOST,
    held_bytes,
    settings,
    sums,
)
from tests.optimizers import build_optimizer
from tests.projection.parts import CPU, Compression, TinyBase, token_batches
from tests.tiny import CASES


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["projected", "hard_prune"])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_state_is_predicted_to_the_byte(family: str, tied: bool, method: str, bf16: bool, tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base(family, tied))
    entered = Entered()
    model = compression.model(torch.bfloat16 if bf16 else torch.float32)
    optimizer = compression.optimizer(model, project=method == "projected")
    parts = [part for record in optimizer.records.values() for part in record.parts.values()]
    direct = list(optimizer.direct.values())
    own = [part.value for part in direct if part.value.data_ptr() not in {p.data_ptr() for p in model.parameters()}]
    held = {
        ledger.WEIGHTS: held_bytes(list(model.parameters())),
        ledger.RECORDS: held_bytes([part.value for part in parts]),
        ledger.MOMENTS: held_bytes([moment for part in parts for moment in (part.exp_avg, part.exp_avg_sq)]),
        ledger.DIRECT: held_bytes([moment for part in direct for moment in (part.exp_avg, part.exp_avg_sq)] + own),
    }
    told = entered.now()
    assert {name: told.get(("host", name), 0) for name in held} == held
    model(torch.zeros(1, 2, dtype=torch.long)).logits.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    held[ledger.GRADIENTS] = held_bytes(gradients)
    assert entered.now()["host", ledger.GRADIENTS] == held[ledger.GRADIENTS]
    predicted = Prediction(compression.plan, settings(method=method, bf16=bf16), HOST).training["sweep"]
    assert {name: predicted[name].num_bytes if name in predicted else 0 for name in held} == held


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_start_keeps_is_predicted_to_the_byte(
    start: str, tied: bool, tiny_base: TinyBase, tmp_path: Path
) -> None:
    compression = Compression.of(tiny_base("llama", tied))
    plan, base, path = compression.plan, compression.base, tmp_path / "rebuilt.safetensors"
    batches = token_batches(2)
    scores = activation_scores(plan, base, "activation", batches, CPU, torch.float32)
    write_rebuilt(path, plan, base, select(plan, scores), batches, CPU, torch.float32)
    made, config, entered = make_start(start, plan, scores, base.tensor, {}), settings(start=start), Entered()
    model = build_compressed(plan, start_tensors(plan, made, base.tensor), CPU, torch.float32)
    optimizer = build_optimizer(model, plan, base, made)
    dense = [tensor for tensor in optimizer.fixed.values() if tensor.is_floating_point()]
    assert bool(dense) == start.startswith("pca")
    assert entered.now().get(("host", ledger.ROTATION), 0) == held_bytes(dense)
    parts = Prediction(plan, config, HOST).training["sweep"]
    assert (parts[ledger.ROTATION].num_bytes if config.rotates else 0) == held_bytes(dense)
    rebuilt = Prediction(plan, config).disk["calibrate"]["rebuilt channels"]
    in_file = sum(tensor.nbytes for tensor in read_rebuilt(path).values())
    assert rebuilt == (in_file if start.endswith("least_squares") else 0)


@pytest.mark.parametrize(("rank", "base_precision", "weight_decay"), [(None, "stored", 0.0), (4, "int8", 0.1)])
@pytest.mark.parametrize("residency", ["device", "cpu", "disk"])
@pytest.mark.parametrize("moments", ["32bit", "8bit"])
@pytest.mark.parametrize("record_dtype", ["float32", "bfloat16"])
def test_records_of_every_form_and_home_are_predicted_to_the_byte(
    record_dtype: str,
    moments: str,
    residency: str,
    rank: int | None,
    base_precision: str,
    weight_decay: float,
    tiny_base: TinyBase,
    tmp_path: Path,
) -> None:
    compression = Compression.of(tiny_base("llama", True))
    config = settings(
        record_dtype=record_dtype,
        moments=moments,
        residency=residency,
        projection_rank=rank or "full",
        base_precision=base_precision,
        weight_decay=weight_decay,
    )
    base = compression.base
    if base_precision == "int8":
        base = Int8Base(base, tmp_path / "base-int8.safetensors")
    model = compression.model()
    entered = Entered()
    optimizer = build_optimizer(
        model,
        compression.plan,
        base,
        Start(compression.kept),
        weight_decay=weight_decay,
        form=RecordFormat(config.record_dtype, config.moments, config.rank),
        state=State(config.residency, tmp_path / "records"),
    )
    told = entered.now()
    optimizer.records.traffic.base_read = 0
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [record.tensors() for record in optimizer.records.values()]
    predicted = Prediction(compression.plan, config, HOST).training["sweep"]
    found = {
        ledger.RECORDS: held_bytes([part for record in tensors for name, part in record.items() if "." not in name]),
        ledger.MOMENTS: held_bytes([part for record in tensors for name, part in record.items() if "." in name]),
        ledger.FROZEN_BASE: sum(base.weight(planned.name).num_bytes for planned in compression.plan.matrices),
    }
    assert {name: predicted[name].num_bytes for name in found} == found
    in_memory = {} if residency == "disk" else {name: found[name] for name in (ledger.RECORDS, ledger.MOMENTS)}
    buffers = predicted[ledger.RECORD_BUFFERS].num_bytes
    in_memory |= {ledger.RECORD_BUFFERS: buffers} if buffers else {}
    assert (buffers > 0) == (residency != "device")
    assert {name: told["host", name] for name in in_memory} == in_memory
    assert not {name for _, name in told} & {ledger.RECORDS, ledger.MOMENTS, ledger.RECORD_BUFFERS} - in_memory.keys()
    traffic = optimizer.records.traffic
    moved = Prediction(compression.plan, config).moved
    assert moved == {
        "base": traffic.base_read,
        "records_read": moved["records_written"],
        "records_written": traffic.records_written,
    }
    form = RecordFormat(config.record_dtype, config.moments, config.rank, weight_decay > 0)
    sizes = [record_bytes(planned, form) for planned in compression.plan.matrices]
    kept = Prediction(compression.plan, config).disk["train"]["records and moments"]
    assert kept == sum(sizes) * (residency == "disk")


@pytest.mark.parametrize("precision", ["stored", "int8"])
def test_a_base_that_is_held_is_entered_as_it_is_predicted(
    precision: str, compression: Compression, tmp_path: Path
) -> None:
    base = compression.base
    if precision == "int8":
        base = Int8Base(base, tmp_path / "base-int8.safetensors")
    entered = Entered()
    held = HeldBase(base, CPU)
    config = settings(base_precision=precision, base_home="cpu")
    predicted = Prediction(compression.plan, config, HOST).training["sweep"][ledger.FROZEN_BASE]
    assert predicted.placement == "host"
    assert entered.now() == {("host", ledger.FROZEN_BASE): predicted.num_bytes}
    del held
    assert entered.now() == {}


def test_every_component_has_its_placement_and_only_buffers_are_empty(compression: Compression) -> None:
    stages = Prediction(compression.plan, settings(), GPU).training
    placements = {name: part.placement for parts in stages.values() for name, part in parts.items()}
    assert placements == COMPONENTS
    empty = set(placements) - {name for parts in stages.values() for name, part in parts.items() if part.num_bytes}
    # A base weight that is stored in the products' dtype is multiplied where it lies.
    assert empty == {ledger.RECORD_BUFFERS, ledger.PINNED_BUFFERS, IN_FLIGHT}


@pytest.mark.parametrize(
    ("changes", "name", "home"),
    [
        ({"residency": "cpu"}, ledger.RECORDS, "pinned"),
        ({"residency": "cpu"}, ledger.MOMENTS, "pinned"),
        ({"residency": "disk"}, ledger.RECORDS, "disk"),
        ({"base_home": "cpu"}, ledger.FROZEN_BASE, "pinned"),
        ({"base_home": "device"}, ledger.FROZEN_BASE, "device"),
        ({"gradient_home": "cpu"}, ledger.GRADIENTS, "pinned"),
    ],
)
def test_a_setting_moves_its_component_and_changes_no_size(
    changes: dict[str, Any], name: str, home: str, compression: Compression
) -> None:
    before, after = (
        Prediction(compression.plan, config, GPU).training["sweep"] for config in (settings(), settings(**changes))
    )
    assert after[name].placement == home != before[name].placement
    assert after[name].num_bytes == before[name].num_bytes


def test_each_stage_has_what_is_alive_then(compression: Compression) -> None:
    stages = Prediction(compression.plan, settings(), GPU).training
    besides = {name: parts.keys() - HELD.keys() - {ALLOCATOR} for name, parts in stages.items()}
    gradients = {ledger.GRADIENTS}
    assert {name: parts for name, parts in besides.items() if name != "start"} == {
        "evaluate": gradients | {ACTIVATIONS, LOGITS},
        "forward": gradients | {ACTIVATIONS, LOGITS},
        "backward": gradients | {ACTIVATIONS, LOGITS, HEAD_GRADIENT},
        "sweep": gradients | {ON_ITS_WAY, IN_FLIGHT, TEMPORARIES},
        "checkpoint": gradients,
    }
    assert all(parts.keys() >= HELD.keys() for name, parts in stages.items() if name != "start")


def test_with_one_micro_batch_gradients_are_born_in_the_backward_pass(compression: Compression) -> None:
    stages = Prediction(compression.plan, settings(gradient_accumulation_steps=1), HOST).training
    assert {name for name, parts in stages.items() if ledger.GRADIENTS in parts} <= {"backward", "sweep"}
    assert stages["sweep"][ledger.GRADIENTS].num_bytes == 4 * compression.plan.parameters


def test_gradients_in_bfloat16_take_half(compression: Compression) -> None:
    config = settings(bf16=True, gradient_dtype="bfloat16")
    assert Prediction(compression.plan, config, GPU).training["sweep"][ledger.GRADIENTS].num_bytes == (
        2 * compression.plan.parameters
    )


@pytest.mark.parametrize("deployment", [GPU, HOST], ids=["gpu", "host"])
def test_the_tensors_of_the_start_are_on_the_host_beside_the_model(
    deployment: Deployment, compression: Compression
) -> None:
    """Hard pruning has no records that would outweigh them later."""
    plan, config = compression.plan, settings(method="hard_prune")
    least = 4 * plan.parameters + LIBRARY_BYTES["train"] + CUDA_HOST_BYTES * deployment.on_gpu
    assert Prediction(plan, config, deployment).peaks["train"]["host_bytes"] >= least
    assert sums(Prediction(plan, config, deployment).training["start"])["host_bytes"] >= least


def test_buffers_are_those_that_residency_takes(compression: Compression) -> None:
    def buffers(deployment: Deployment, **changes: Any) -> tuple[int, int | None]:
        parts = Prediction(compression.plan, settings(**changes), deployment).training["sweep"]
        pinned = parts.get(ledger.PINNED_BUFFERS)
        return parts[ledger.RECORD_BUFFERS].num_bytes, pinned and pinned.num_bytes

    sizes = [record_bytes(planned, RecordFormat()) for planned in compression.plan.matrices]
    overlap, largest = overlap_bytes(sizes), max(sizes)
    assert buffers(GPU) == (0, 0)
    assert buffers(GPU, residency="cpu") == (overlap, 0)
    assert buffers(GPU, residency="disk") == (overlap, overlap)
    assert buffers(GPU, residency="disk", pinned_memory=largest) == (overlap, largest)
    # Without a GPU one set of buffers does for both.
    assert buffers(HOST) == (0, None)
    assert buffers(HOST, residency="cpu") == (overlap, None)
    assert buffers(HOST, residency="disk", pinned_memory=largest) == (largest, None)
    assert largest < overlap


def test_capped_buffers_are_entered_as_they_are_predicted(compression: Compression, tmp_path: Path) -> None:
    largest = max(record_bytes(planned, RecordFormat()) for planned in compression.plan.matrices)
    model, entered = compression.model(), Entered()
    optimizer = compression.optimizer(model, state=State("disk", tmp_path / "records", largest))
    assert entered.now()["host", ledger.RECORD_BUFFERS] == largest
    del optimizer, model


def test_a_gpu_holds_the_base_weights_that_are_fetched_ahead(compression: Compression) -> None:
    def on_its_way(**changes: Any) -> int:
        part = Prediction(compression.plan, settings(**changes), GPU).training["sweep"][ON_ITS_WAY]
        assert part.placement == "device"
        return part.num_bytes

    sizes = [math.prod(planned.base_shape) * 4 for planned in compression.plan.matrices]
    assert max(sizes) < on_its_way() < sum(sizes)
    assert on_its_way() == max(sum(sizes[first : first + 8]) for first in range(len(sizes) - 7))
    assert on_its_way(base_home="cpu") == on_its_way()
    assert on_its_way(base_home="device") == 0


def test_a_base_weight_in_another_dtype_than_the_products_is_converted(compression: Compression) -> None:
    def in_flight(deployment: Deployment, **changes: Any) -> int:
        return Prediction(compression.plan, settings(**changes), deployment).training["sweep"][IN_FLIGHT].num_bytes

    largest = max(math.prod(planned.base_shape) for planned in compression.plan.matrices)
    assert in_flight(GPU) == in_flight(HOST) == in_flight(HOST, bf16=True) == 0
    assert in_flight(GPU, bf16=True) == 2 * largest
    assert in_flight(GPU, base_precision="int8") == 4 * largest


def test_each_rank_is_predicted_as_the_one_that_owns_most(compression: Compression) -> None:
    plan, ranks = compression.plan, 3
    sizes = {planned.name: record_bytes(planned, RecordFormat()) for planned in plan.matrices}
    owned = [owned_matrices(list(plan.matrices), None, Topology(rank, ranks)) for rank in range(ranks)]
    deployment = Deployment(ranks=ranks, zero=ZeroForm(1))
    found = Prediction(plan, settings(), deployment).owned
    assert found.records == max(sum(sizes[name] for name in names) for names in owned)
    assert sum(sizes.values()) / ranks <= found.records < sum(sizes.values())
    parts = Prediction(plan, settings(), deployment).training["sweep"]
    assert parts[ledger.RECORDS].num_bytes + parts[ledger.MOMENTS].num_bytes == found.records
    assert 3 * parts[ledger.RECORDS].num_bytes == found.records


def test_hard_pruning_has_no_records_and_no_base(compression: Compression) -> None:
    config = settings(method="hard_prune")
    stages = Prediction(compression.plan, config, GPU).training
    absent = {
        ledger.FROZEN_BASE,
        ledger.RECORDS,
        ledger.MOMENTS,
        ledger.RECORD_BUFFERS,
        ledger.PINNED_BUFFERS,
        ON_ITS_WAY,
        IN_FLIGHT,
        TEMPORARIES,
    }
    found = {name for parts in stages.values() for name in parts}
    assert found == COMPONENTS.keys() - absent
    document = Prediction(compression.plan, config).document("tiny")
    assert document["flops"]["compose_per_step"] == document["flops"]["pull_back_per_step"] == 0
    assert document["trainable"]["parameters"] == compression.plan.parameters
    assert set(document["moved"].values()) == {0}
    assert document["disk"]["train"]["records and moments"] == 0
