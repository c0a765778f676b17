"""Predicted memory against what is really allocated and written at a tiny size."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcscale.common import ledger
from pcscale.common.sizes import HIDDEN_BUDGET_BYTES, LOGIT_CHUNK_VALUES
from pcscale.distributed.zero_form import ZeroForm
from pcscale.memory import working
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.stages import ACTIVATIONS, CUDA_HOST_BYTES, LIBRARY_BYTES, LOGITS, working_parts
from pcscale.projection.checkpoint import write_outer, write_records
from pcscale.projection.layout import RecordFormat, record_bytes, trainable_values
from tests.memory.plans import (
    COMPONENTS,
    DEPLOYMENTS,
    FORMS,
    GPU,
    HEADER_SHARE,
    HOST,
    KEYS,
    ON_GPU_ALONE,
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
    predicted = Prediction(compression.plan, config).checkpoint_bytes
    assert predicted < written < (1 + HEADER_SHARE) * predicted
    # One more while it is written, before the oldest goes.
    assert Prediction(compression.plan, config).disk["train"]["checkpoints"] == 4 * predicted


def test_the_merged_model_takes_what_was_predicted(compression: Compression, tmp_path: Path) -> None:
    compression.model().save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    predicted = Prediction(compression.plan, settings()).disk["merge"]["merged model"]
    assert predicted < written < (1 + HEADER_SHARE) * predicted


def test_the_disk_is_worn_by_records_or_by_checkpoints(compression: Compression) -> None:
    plan = compression.plan
    records = sum(record_bytes(planned, RecordFormat()) for planned in plan.matrices)
    assert Prediction(plan, settings(residency="disk")).written_bytes_per_step == records
    in_memory = settings(save_steps=50)
    assert Prediction(plan, in_memory).written_bytes_per_step == Prediction(plan, in_memory).checkpoint_bytes // 50


def test_checkpointing_and_smaller_batches_take_less(compression: Compression) -> None:
    def activations(**changes: Any) -> int:
        return Prediction(compression.plan, settings(**changes), GPU).training["forward"][ACTIVATIONS].num_bytes

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(per_device_train_batch_size=2) * 2 == activations(per_device_train_batch_size=4)
    assert activations() / 2 < activations(bf16=True) < activations()


def test_logits_are_bounded_by_their_chunk(compression: Compression) -> None:
    def logits(tokens: int) -> int:
        config = settings(per_device_train_batch_size=1, sequence_length=tokens)
        return Prediction(compression.plan, config, GPU).training["backward"][LOGITS].num_bytes

    assert logits(2) == 3 * 2 * 300 * 4
    assert logits(10**6) == 3 * LOGIT_CHUNK_VALUES * 4


@pytest.mark.parametrize("phase", ["calibrate", "evaluate"])
def test_waiting_hidden_states_are_bounded_by_their_budget(phase: str, compression: Compression) -> None:
    def hidden(tokens: int) -> int:
        small = {"per_device_train_batch_size": 1, "sequence_length": 2}
        config = settings(**{"calibration_tokens": 1, "eval_tokens": 1, **small, KEYS[phase]: tokens})
        prediction = Prediction(compression.plan, config, HOST)
        part = (prediction.calibrate if phase == "calibrate" else prediction.evaluate)[ledger.HIDDEN]
        assert part.placement == "host"
        return part.num_bytes

    assert hidden(100_000) == 100_000 * 32 * 4
    assert hidden(10**9) == HIDDEN_BUDGET_BYTES


def test_hidden_states_that_wait_beside_a_gpu_are_in_the_host_s_peak(compression: Compression) -> None:
    """The device's peak is that of the merged model; the host's is not in the same stage."""
    config = settings(eval_tokens=10**9)
    plan = with_vocabulary(compression.plan, 10**6)
    found = Prediction(plan, config, GPU).peaks["evaluate"]
    libraries = LIBRARY_BYTES["evaluate"] + CUDA_HOST_BYTES
    assert found["host_bytes"] == HIDDEN_BUDGET_BYTES + libraries
    assert found["device_bytes"] > 4 * plan.parameters


def test_the_plan_document_has_the_keys_of_the_contract(compression: Compression) -> None:
    plan = compression.plan
    document = Prediction(plan, settings()).document("tiny")
    assert list(document) == [
        "base",
        "compressed",
        "trainable",
        "flops",
        "moved",
        "written_bytes_per_step",
        "communicated_bytes_per_step",
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
    assert tuple(document["peak"]) == tuple(document["phases"]) == tuple(document["disk"])
    assert tuple(document["disk"]) == ("calibrate", "train", "merge", "evaluate")
    for peak in document["peak"].values():
        assert peak.keys() == {"device_bytes", "host_bytes", "disk_bytes"}
        assert all(isinstance(value, int) and value >= 0 for value in peak.values())
    assert document["alternatives"].keys() == {"published form", "hard pruning", "this run"}
    assert document["ranks"] == 1


@pytest.mark.parametrize("where", DEPLOYMENTS)
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_peaks_are_the_sums_of_parts_in_a_stage(form: int, where: str, compression: Compression) -> None:
    changes = {key: value for key, value in FORMS[form].items() if key != "gradient_home" or where == "gpu"}
    prediction = Prediction(compression.plan, settings(**changes), DEPLOYMENTS[where])
    phases, stages, found = prediction.phases, prediction.training, prediction.peaks
    for phase in ("calibrate", "merge", "evaluate"):
        assert {key: found[phase][key] for key in ("device_bytes", "host_bytes")} == sums(phases[phase])
    of_stages = [sums(parts) for parts in stages.values()]
    for key in ("device_bytes", "host_bytes"):
        assert found["train"][key] == max(total[key] for total in of_stages)
    first = "device_bytes" if prediction.deployment.on_gpu else "host_bytes"
    assert sums(phases["train"])[first] == found["train"][first]
    assert {phase: peak["disk_bytes"] for phase, peak in found.items()} == {
        phase: sum(prediction.disk[phase].values()) for phase in phases
    }
    document = prediction.document("tiny")
    assert document["peak"] == found
    assert document["ranks"] == prediction.deployment.ranks
    for name, part in document["memory"].items():
        assert part["bytes"] == max(parts[name].num_bytes for parts in stages.values() if name in parts), name


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_without_a_gpu_all_but_the_disk_is_the_host_s(form: int, compression: Compression) -> None:
    plan, config = compression.plan, settings(**FORMS[form])
    on_gpu, alone = (Prediction(plan, config, deployment).training["sweep"] for deployment in (GPU, HOST))
    assert {part.placement for part in alone.values()} <= {"host", "disk"}
    assert on_gpu.keys() - alone.keys() == ON_GPU_ALONE & on_gpu.keys()
    assert {name for name, part in alone.items() if part.placement == "disk"} == {
        name for name, part in on_gpu.items() if part.placement == "disk"
    }
    for name in (ledger.WEIGHTS, ledger.GRADIENTS, ledger.DIRECT, ledger.RECORDS, ledger.MOMENTS, ledger.FROZEN_BASE):
        if name in on_gpu:
            assert alone[name].num_bytes == on_gpu[name].num_bytes
    for phase, peak in Prediction(plan, config, HOST).peaks.items():
        assert peak["device_bytes"] == 0, phase
        assert peak["host_bytes"] > LIBRARY_BYTES[phase]
    for parts in (Prediction(plan, config, HOST).calibrate, Prediction(plan, config, HOST).evaluate):
        assert {part.placement for part in parts.values()} == {"host"}
        assert not parts.keys() & ON_GPU_ALONE


def test_ranks_send_gradients_and_weights(compression: Compression) -> None:
    plan = compression.plan
    once = plan.parameters * (4 + 4)
    split = Deployment(ranks=2, zero=ZeroForm(1))
    assert Prediction(plan, settings(), GPU).communicated_bytes_per_step == 0
    assert Prediction(plan, settings(), Deployment(ranks=2, zero=ZeroForm())).communicated_bytes_per_step == once
    assert Prediction(plan, settings(), split).communicated_bytes_per_step == 2 * once
    in_half = settings(bf16=True)
    assert Prediction(plan, in_half, split).communicated_bytes_per_step == 2 * plan.parameters * 6


def test_the_alternatives_take_16_bytes_a_value(compression: Compression) -> None:
    plan = compression.plan
    found = Prediction(plan, settings(), GPU).alternatives
    stage = Prediction(plan, settings(), GPU).training["backward"]
    same = stage[ledger.LIBRARIES].num_bytes + sum(part.num_bytes for part in working_parts(stage))
    same += stage[ledger.CONTEXT].num_bytes
    composed = sum(math.prod(planned.shape) for planned in plan.matrices)
    values = sum(map(trainable_values, plan.weights))
    assert found["hard pruning"]["bytes"] == 16 * plan.parameters + same
    assert found["published form"]["bytes"] == (4 * plan.base_parameters + 16 * values + 8 * composed + same)
    peak = Prediction(plan, settings(), GPU).peaks["train"]
    assert max(peak["device_bytes"], peak["host_bytes"]) < found["this run"]["bytes"]
    assert found["this run"]["bytes"] <= peak["device_bytes"] + peak["host_bytes"]


def test_a_merge_s_need_is_bounded_by_its_blocks_at_any_vocabulary(compression: Compression) -> None:
    plan = compression.plan
    largest = max(4 * math.prod(planned.base_shape) for planned in plan.weights)
    assert working.merge_need_bytes(plan) >= largest
    need = working.merge_need_bytes(with_vocabulary(plan, 10**6))
    assert need == working.merge_need_bytes(with_vocabulary(plan, 2 * 10**6))
    parts = Prediction(plan, settings(), GPU).merge
    assert sums(parts)["host_bytes"] == (LIBRARY_BYTES["merge"] + CUDA_HOST_BYTES + working.merge_need_bytes(plan))


def test_predicting_imports_neither_torch_nor_transformers() -> None:
    modules = "pcscale.memory.predict, pcscale.memory.choose, pcscale.distributed.zero_form"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'transformers'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
