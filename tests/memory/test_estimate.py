"""Predicted memory against what is really allocated and written at a tiny size."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcscale.base import forward
from pcscale.common import ledger
from pcscale.memory import components, step_time, working
from pcscale.memory.components import (
    ACTIVATIONS,
    LOGITS,
    calibrate_parts,
    evaluate_parts,
    merge_parts,
    train_moments,
)
from pcscale.memory.estimate import (
    PHASES,
    alternatives,
    checkpoint_bytes,
    communicated_bytes_per_step,
    disk_parts,
    merged_bytes,
    peaks,
    phase_parts,
    plan_document,
    written_bytes_per_step,
)
from pcscale.memory.hardware import HARDWARE
from pcscale.memory.place import Place, ZeroForm
from pcscale.model import loss
from pcscale.projection.layout import RecordFormat, record_bytes, trainable_values
from pcscale.projection.persist import write_outer, write_records
from tests.memory.plans import (
    COMPONENTS,
    FORMS,
    GPU,
    HEADER_SHARE,
    HOST,
    KEYS,
    ON_GPU_ALONE,
    PLACES,
    settings,
    sums,
    with_vocabulary,
)
from tests.projection.parts import Compression, TinyBase


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


@pytest.mark.parametrize("method", ["projected", "hard_prune"])
def test_a_checkpoint_takes_what_was_predicted(compression: Compression, method: str, tmp_path: Path) -> None:
    optimizer = compression.optimizer(compression.model(), project=method == "projected")
    files = write_records(optimizer, tmp_path) | write_outer(optimizer, tmp_path)
    written = sum((tmp_path / name).stat().st_size for name in files)
    config = settings(method=method, keep_checkpoints=3)
    predicted = checkpoint_bytes(compression.plan, config)
    assert predicted < written < (1 + HEADER_SHARE) * predicted
    # One more while it is written, before the oldest goes.
    assert disk_parts(compression.plan, config)["train"]["checkpoints"] == 4 * predicted


def test_the_merged_model_takes_what_was_predicted(compression: Compression, tmp_path: Path) -> None:
    compression.model().save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    predicted = merged_bytes(compression.plan)
    assert predicted < written < (1 + HEADER_SHARE) * predicted


def test_the_disk_is_worn_by_records_or_by_checkpoints(compression: Compression) -> None:
    plan = compression.plan
    records = sum(record_bytes(planned, RecordFormat()) for planned in plan.matrices)
    assert written_bytes_per_step(plan, settings(residency="disk")) == records
    in_memory = settings(save_steps=50)
    assert written_bytes_per_step(plan, in_memory) == checkpoint_bytes(plan, in_memory) // 50


def test_checkpointing_and_smaller_batches_take_less(compression: Compression) -> None:
    def activations(**changes: Any) -> int:
        return train_moments(compression.plan, settings(**changes), GPU)["forward"][ACTIVATIONS].num_bytes

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(per_device_train_batch_size=2) * 2 == activations(per_device_train_batch_size=4)
    assert activations() / 2 < activations(bf16=True) < activations()


def test_constants_that_need_no_torch_are_those_of_the_code() -> None:
    assert working.LOGIT_CHUNK_VALUES == step_time.LOGIT_CHUNK_VALUES == loss.LOGIT_CHUNK_VALUES
    assert working.LOGIT_CHUNK_VALUES == forward.LOGIT_BLOCK_VALUES
    assert working.HIDDEN_BUDGET_BYTES == forward.HIDDEN_BUDGET_BYTES


def test_logits_are_bounded_by_their_chunk(compression: Compression) -> None:
    def logits(tokens: int) -> int:
        config = settings(per_device_train_batch_size=1, sequence_length=tokens)
        return train_moments(compression.plan, config, GPU)["backward"][LOGITS].num_bytes

    assert logits(2) == 3 * 2 * 300 * 4
    assert logits(10**6) == 3 * loss.LOGIT_CHUNK_VALUES * 4


@pytest.mark.parametrize("phase", ["calibrate", "evaluate"])
def test_waiting_hidden_states_are_bounded_by_their_budget(phase: str, compression: Compression) -> None:
    def hidden(tokens: int) -> int:
        small = {"per_device_train_batch_size": 1, "sequence_length": 2}
        config = settings(**{"calibration_tokens": 1, "eval_tokens": 1, **small, KEYS[phase]: tokens})
        make = calibrate_parts if phase == "calibrate" else evaluate_parts
        part = make(compression.plan, config, HOST)[ledger.HIDDEN]
        assert part.home == "host"
        return part.num_bytes

    assert hidden(100_000) == 100_000 * 32 * 4
    assert hidden(10**9) == forward.HIDDEN_BUDGET_BYTES


def test_hidden_states_that_wait_beside_a_gpu_are_in_the_host_s_peak(compression: Compression) -> None:
    """The device's peak is that of the merged model; the host's is not in the same moment."""
    config = settings(eval_tokens=10**9)
    plan = with_vocabulary(compression.plan, 10**6)
    found = peaks(plan, config, GPU)["evaluate"]
    libraries = components.LIBRARY_BYTES["evaluate"] + components.CUDA_HOST_BYTES
    assert found["host_bytes"] == forward.HIDDEN_BUDGET_BYTES + libraries
    assert found["device_bytes"] > 4 * plan.parameters


def test_the_plan_document_has_the_keys_of_the_contract(compression: Compression) -> None:
    plan = compression.plan
    document = plan_document(plan, settings(), "tiny")
    assert list(document) == [
        "base",
        "compressed",
        "trainable",
        "flops",
        "moved",
        "written_bytes_per_step",
        "communicated_bytes_per_step",
        "step_seconds",
        "memory",
        "peak",
        "phases",
        "disk",
        "alternatives",
        "ranks",
    ]
    assert document["base"] == {
        "name": "tiny",
        "family": "llama",
        "parameters": sum(weight.numel() for weight in compression.weights.values()),
        "tied": False,
    }
    assert document["compressed"] == {
        "hidden_size": 24,
        "intermediate_size": 40,
        "parameters": compression.model().num_parameters(),
        "keep_fraction": plan.keep_fraction,
    }
    assert document["trainable"].keys() == {"parameters", "bytes"}
    assert document["trainable"]["bytes"] == 12 * document["trainable"]["parameters"]
    assert document["moved"].keys() == {"base", "records_read", "records_written"}
    assert document["flops"].keys() == {"compose_per_step", "pull_back_per_step", "train_per_token"}
    assert all(flops > 0 for flops in document["flops"].values())
    assert {name: part["home"] for name, part in document["memory"].items()} == COMPONENTS
    assert all(part.keys() == {"home", "bytes"} for part in document["memory"].values())
    assert tuple(document["peak"]) == tuple(document["phases"]) == tuple(document["disk"]) == PHASES
    assert PHASES == ("calibrate", "train", "merge", "evaluate")
    for peak in document["peak"].values():
        assert peak.keys() == {"device_bytes", "host_bytes", "disk_bytes"}
        assert all(isinstance(value, int) and value >= 0 for value in peak.values())
    assert document["alternatives"].keys() == {"published form", "hard pruning", "this run"}
    assert document["step_seconds"] is None
    assert document["ranks"] == 1


def test_a_step_s_seconds_are_those_of_the_machine(compression: Compression) -> None:
    machine = HARDWARE["a100-80gb"]
    found = plan_document(compression.plan, settings(), "tiny", hardware=machine)["step_seconds"]
    assert found == step_time.step_seconds(compression.plan, settings(), machine)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_peaks_are_the_sums_of_parts_at_a_moment(form: int, place: str, compression: Compression) -> None:
    changes = {key: value for key, value in FORMS[form].items() if key != "gradient_home" or place == "gpu"}
    plan, config, where = compression.plan, settings(**changes), PLACES[place]
    phases, moments = phase_parts(plan, config, where)
    found = peaks(plan, config, where)
    for phase in ("calibrate", "merge", "evaluate"):
        assert {key: found[phase][key] for key in ("device_bytes", "host_bytes")} == sums(phases[phase])
    of_moments = [sums(parts) for parts in moments.values()]
    for key in ("device_bytes", "host_bytes"):
        assert found["train"][key] == max(total[key] for total in of_moments)
    first = "device_bytes" if where.on_gpu else "host_bytes"
    assert sums(phases["train"])[first] == found["train"][first]
    disk = disk_parts(plan, config)
    assert {phase: peak["disk_bytes"] for phase, peak in found.items()} == {
        phase: sum(disk[phase].values()) for phase in PHASES
    }
    document = plan_document(plan, config, "tiny", where)
    assert document["peak"] == found
    assert document["ranks"] == where.ranks
    for name, part in document["memory"].items():
        assert part["bytes"] == max(parts[name].num_bytes for parts in moments.values() if name in parts), name


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_without_a_gpu_all_but_the_disk_is_the_host_s(form: int, compression: Compression) -> None:
    plan, config = compression.plan, settings(**FORMS[form])
    on_gpu, alone = (train_moments(plan, config, place)["sweep"] for place in (GPU, HOST))
    assert {part.home for part in alone.values()} <= {"host", "disk"}
    assert on_gpu.keys() - alone.keys() == ON_GPU_ALONE & on_gpu.keys()
    assert {name for name, part in alone.items() if part.home == "disk"} == {
        name for name, part in on_gpu.items() if part.home == "disk"
    }
    for name in (ledger.WEIGHTS, ledger.GRADIENTS, ledger.DIRECT, ledger.RECORDS, ledger.MOMENTS, ledger.FROZEN_BASE):
        if name in on_gpu:
            assert alone[name].num_bytes == on_gpu[name].num_bytes
    for phase, peak in peaks(plan, config, HOST).items():
        assert peak["device_bytes"] == 0, phase
        assert peak["host_bytes"] > components.LIBRARY_BYTES[phase]
    for parts in (calibrate_parts(plan, config, HOST), evaluate_parts(plan, config, HOST)):
        assert {part.home for part in parts.values()} == {"host"}
        assert not parts.keys() & ON_GPU_ALONE


def test_ranks_send_gradients_and_weights(compression: Compression) -> None:
    plan = compression.plan
    once = plan.parameters * (4 + 4)
    assert communicated_bytes_per_step(plan, settings(), GPU) == 0
    assert communicated_bytes_per_step(plan, settings(), Place(ranks=2, zero=ZeroForm())) == once
    assert communicated_bytes_per_step(plan, settings(), Place(ranks=2, zero=ZeroForm(1))) == 2 * once
    in_half = settings(bf16=True)
    assert communicated_bytes_per_step(plan, in_half, Place(ranks=2, zero=ZeroForm(1))) == 2 * plan.parameters * 6


def test_the_alternatives_take_16_bytes_a_value(compression: Compression) -> None:
    plan = compression.plan
    found = alternatives(plan, settings(), GPU)
    moment = train_moments(plan, settings(), GPU)["backward"]
    same = sum(moment[name].num_bytes for name in moment if name in {*components.WORKING_PARTS, "libraries"})
    same += moment[ledger.CONTEXT].num_bytes
    composed = sum(math.prod(planned.shape) for planned in plan.matrices)
    values = sum(map(trainable_values, plan.weights))
    assert found["hard pruning"]["bytes"] == 16 * plan.parameters + same
    assert found["published form"]["bytes"] == (4 * plan.base_parameters + 16 * values + 8 * composed + same)
    peak = peaks(plan, settings(), GPU)["train"]
    assert max(peak["device_bytes"], peak["host_bytes"]) < found["this run"]["bytes"]
    assert found["this run"]["bytes"] <= peak["device_bytes"] + peak["host_bytes"]


def test_a_merge_s_need_is_bounded_by_its_blocks_at_any_vocabulary(compression: Compression) -> None:
    plan = compression.plan
    largest = max(4 * math.prod(planned.base_shape) for planned in plan.weights)
    assert working.merge_need_bytes(plan) >= largest
    need = working.merge_need_bytes(with_vocabulary(plan, 10**6))
    assert need == working.merge_need_bytes(with_vocabulary(plan, 2 * 10**6))
    parts = merge_parts(plan, settings(), GPU)
    assert sums(parts)["host_bytes"] == (
        components.LIBRARY_BYTES["merge"] + components.CUDA_HOST_BYTES + working.merge_need_bytes(plan)
    )


def test_predicting_imports_neither_torch_nor_transformers() -> None:
    modules = "pcscale.memory.estimate, pcscale.memory.budget, pcscale.memory.series"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
