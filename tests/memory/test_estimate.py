"""Predicted memory against what is really allocated and written at a tiny size."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pcscale.base import forward
from pcscale.base.int8 import Int8Base
from pcscale.compressed import loss
from pcscale.config.schema import DataConfig, RunConfig
from pcscale.memory.estimate import (
    LIBRARY_BYTES,
    PHASES,
    checkpoint_bytes,
    merge_need_bytes,
    moved_bytes,
    on_host_alone,
    phase_peaks,
    plan_document,
    train_components,
)
from pcscale.projection.layout import RecordFormat, overlap_bytes, record_bytes
from pcscale.projection.persist import write_outer, write_records
from pcscale.projection.residency import Residency
from pcscale.projection.sweep import ProjectedAdamW
from tests.projection.parts import Compression, TinyBase
from tests.tiny import CASES

HEADER_SHARE = 0.1
"""Of a tiny checkpoint: safetensors headers and kept indices, which the estimate leaves out."""
COMPONENTS = {
    "compressed weights",
    "gradients",
    "frozen base",
    "records",
    "moments",
    "record buffers",
    "pinned buffers",
    "norms and biases",
    "base on its way",
    "base in flight",
    "sweep temporaries",
    "activations",
    "logits",
    "libraries",
}


def settings(**changes: Any) -> RunConfig:
    return RunConfig(base="-", output="-", data=DataConfig(train=["-"]), **changes)


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", False))


def held_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("method", ["projected", "hard_prune"])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_state_is_predicted_to_the_byte(family: str, tied: bool, method: str, bf16: bool, tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base(family, tied))
    model = compression.model(torch.bfloat16 if bf16 else torch.float32)
    optimizer = compression.optimizer(model, project=method == "projected")
    parts = [part for record in optimizer.records.values() for part in record.parts.values()]
    direct = list(optimizer.direct.values())
    own = [part.value for part in direct if part.value.data_ptr() not in {p.data_ptr() for p in model.parameters()}]
    held = {
        "compressed weights": held_bytes(list(model.parameters())),
        "gradients": 4 * sum(parameter.numel() for parameter in model.parameters()),
        "records": held_bytes([part.value for part in parts]),
        "moments": held_bytes([moment for part in parts for moment in (part.exp_avg, part.exp_avg_sq)]),
        "norms and biases": held_bytes([moment for part in direct for moment in (part.exp_avg, part.exp_avg_sq)] + own),
        "base in flight": 4 * compression.weights["model.embed_tokens.weight"].numel() if optimizer.records else 0,
    }
    predicted = train_components(compression.plan, settings(method=method, bf16=bf16))
    assert {name: predicted[name].num_bytes for name in held} == held


def test_every_component_is_positive_and_has_a_home(compression: Compression) -> None:
    components = train_components(compression.plan, settings())
    assert components.keys() == COMPONENTS
    unused = {"record buffers", "pinned buffers"}
    assert {name for name, component in components.items() if not component.num_bytes} == unused
    homes = {"libraries": "host", "pinned buffers": "host", "frozen base": "disk"}
    assert {name: component.home for name, component in components.items()} == {
        name: homes.get(name, "device") for name in COMPONENTS
    }


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
    optimizer = ProjectedAdamW(
        compression.model(),
        compression.plan,
        base,
        compression.kept,
        weight_decay=weight_decay,
        form=RecordFormat(config.record_dtype, config.moments, config.rank),
        residency=Residency(config.residency, tmp_path / "records"),
    )
    optimizer.records.traffic.base_read = 0
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [record.tensors() for record in optimizer.records.values()]
    predicted = train_components(compression.plan, config)
    found = {
        "records": held_bytes([tensor for record in tensors for name, tensor in record.items() if "." not in name]),
        "moments": held_bytes([tensor for record in tensors for name, tensor in record.items() if "." in name]),
        "frozen base": sum(base.weight(planned.name).num_bytes for planned in compression.plan.matrices),
    }
    assert {name: predicted[name].num_bytes for name in found} == found
    traffic = optimizer.records.traffic
    moved = moved_bytes(compression.plan, config)
    assert moved == {
        "base": traffic.base_read,
        "records_read": moved["records_written"],
        "records_written": traffic.records_written,
    }


def test_buffers_are_those_that_residency_takes(compression: Compression, tmp_path: Path) -> None:
    sizes = [record_bytes(planned, RecordFormat()) for planned in compression.plan.matrices]
    whole = train_components(compression.plan, settings(residency="disk"))
    assert whole["record buffers"].num_bytes == whole["pinned buffers"].num_bytes == overlap_bytes(sizes)
    capped = train_components(compression.plan, settings(residency="disk", pinned_memory=max(sizes)))
    assert capped["pinned buffers"].num_bytes == max(sizes)
    on_host = on_host_alone(plan_document(compression.plan, settings(residency="disk", pinned_memory=max(sizes)), "x"))
    assert "record buffers" not in on_host["memory"], "one set of buffers does for both"
    assert on_host["memory"]["pinned buffers"]["bytes"] == max(sizes)


def test_a_gpu_holds_the_base_weights_that_are_fetched_ahead(compression: Compression) -> None:
    sizes = [math.prod(planned.base_shape) * 4 for planned in compression.plan.matrices]
    on_its_way = train_components(compression.plan, settings())["base on its way"]
    assert on_its_way.home == "device"
    assert max(sizes) < on_its_way.num_bytes < sum(sizes)
    assert on_its_way.num_bytes == max(sum(sizes[first : first + 8]) for first in range(len(sizes) - 7))
    assert train_components(compression.plan, settings(base_home="device"))["base on its way"].num_bytes == 0


def test_hard_pruning_has_no_records_and_no_base(compression: Compression) -> None:
    components = train_components(compression.plan, settings(method="hard_prune"))
    zero = {name for name, component in components.items() if not component.num_bytes}
    held = {"records", "moments", "record buffers", "pinned buffers"}
    assert zero == {*held, "frozen base", "base on its way", "base in flight", "sweep temporaries"}
    document = plan_document(compression.plan, settings(method="hard_prune"), "tiny")
    assert document["flops"]["compose_per_step"] == document["flops"]["pull_back_per_step"] == 0
    assert document["trainable"]["parameters"] == compression.plan.parameters


@pytest.mark.parametrize("method", ["projected", "hard_prune"])
def test_a_checkpoint_takes_what_was_predicted(compression: Compression, method: str, tmp_path: Path) -> None:
    optimizer = compression.optimizer(compression.model(), project=method == "projected")
    files = write_records(optimizer, tmp_path) | write_outer(optimizer, tmp_path)
    written = sum((tmp_path / name).stat().st_size for name in files)
    predicted = checkpoint_bytes(compression.plan, settings(method=method))
    assert predicted < written < (1 + HEADER_SHARE) * predicted


def test_checkpointing_and_smaller_batches_take_less(compression: Compression) -> None:
    def activations(**changes: Any) -> int:
        return train_components(compression.plan, settings(**changes))["activations"].num_bytes

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(per_device_train_batch_size=2) * 2 == activations(per_device_train_batch_size=4)
    assert activations(bf16=True) * 2 == activations()


def test_constants_that_need_no_torch_are_those_of_the_code() -> None:
    assert loss.LOGIT_CHUNK_VALUES == 2**23
    assert forward.HIDDEN_BUDGET_BYTES == 2**29


def test_logits_are_bounded_by_their_chunk(compression: Compression) -> None:
    def logits(tokens: int) -> int:
        config = settings(per_device_train_batch_size=1, sequence_length=tokens)
        return train_components(compression.plan, config)["logits"].num_bytes

    assert logits(2) == 3 * 2 * 300 * 4
    assert logits(10**6) == 3 * loss.LOGIT_CHUNK_VALUES * 4


def test_waiting_hidden_states_are_bounded_by_their_budget(compression: Compression) -> None:
    def hidden(tokens: int) -> int:
        config = settings(calibration_tokens=tokens, eval_tokens=1)
        return phase_peaks(compression.plan, config)["calibrate"]["host_bytes"] - LIBRARY_BYTES

    assert hidden(1000) == 1000 * 32 * 4
    assert hidden(10**9) == forward.HIDDEN_BUDGET_BYTES


def test_the_plan_document_has_the_keys_of_the_contract(compression: Compression) -> None:
    plan = compression.plan
    document = plan_document(plan, settings(), "tiny")
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
    assert document["memory"].keys() == COMPONENTS
    assert all(component.keys() == {"home", "bytes"} for component in document["memory"].values())
    assert tuple(document["peak"]) == PHASES == ("calibrate", "train", "merge", "evaluate")
    for peak in document["peak"].values():
        assert peak.keys() == {"device_bytes", "host_bytes", "disk_bytes"}
        assert all(isinstance(value, int) and value >= 0 for value in peak.values())


def test_the_training_peak_is_the_sum_of_its_components(compression: Compression) -> None:
    document = plan_document(compression.plan, settings(), "tiny")
    totals = {"device": 0, "host": 0, "disk": 0}
    for component in document["memory"].values():
        totals[component["home"]] += component["bytes"]
    assert document["peak"]["train"]["device_bytes"] == totals["device"]
    assert document["peak"]["train"]["host_bytes"] == totals["host"]
    assert document["peak"]["train"]["disk_bytes"] == 3 * checkpoint_bytes(compression.plan, settings())


def test_on_the_host_alone_the_device_s_share_moves_to_the_host(compression: Compression) -> None:
    document = plan_document(compression.plan, settings(), "tiny")
    moved = on_host_alone(document)
    assert {component["home"] for component in moved["memory"].values()} == {"host", "disk"}
    gpu_alone = {"base on its way", "pinned buffers"}
    assert document["memory"].keys() - moved["memory"].keys() == gpu_alone
    absent = sum(document["memory"][name]["bytes"] for name in gpu_alone)
    for phase, peak in document["peak"].items():
        assert moved["peak"][phase] == {
            "device_bytes": 0,
            "host_bytes": peak["device_bytes"] + peak["host_bytes"] - absent * (phase == "train"),
            "disk_bytes": peak["disk_bytes"],
        }
    assert {key: moved[key] for key in ("base", "compressed", "trainable", "flops")} == {
        key: document[key] for key in ("base", "compressed", "trainable", "flops")
    }
    assert document["peak"]["train"]["device_bytes"] > 0, "the document itself is left alone"


def test_a_merge_s_need_is_bounded_by_its_blocks_at_any_vocabulary(compression: Compression) -> None:
    small = merge_need_bytes(compression.plan)
    largest = max(4 * math.prod(planned.base_shape) for planned in compression.plan.weights)
    assert small >= largest
    config = {**compression.plan.base_config, "vocab_size": 10**6}
    plan = type(compression.plan)(compression.plan.family, config, 24, 40)
    doubled = type(compression.plan)(compression.plan.family, {**config, "vocab_size": 2 * 10**6}, 24, 40)
    assert merge_need_bytes(plan) == merge_need_bytes(doubled)


def test_predicting_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, pcscale.memory.estimate; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
