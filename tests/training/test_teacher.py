"""The teacher against stock transformers, and the loss that it takes part in against its definition in float64."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from pcscale.common.ledger import HIDDEN, TEACHER
from pcscale.config.schema import DataConfig, DistillConfig, RunConfig
from pcscale.jobs.compress import compress
from pcscale.memory.deployment import Deployment
from pcscale.memory.predict import Prediction
from pcscale.memory.stages import TARGETS
from pcscale.model.loss import Distillation, NextTokenLoss, top_divergence
from pcscale.training.teacher import Teacher
from tests.entered import Entered
from tests.memory.plans import held_bytes
from tests.projection.parts import CPU, Compression, TinyBase, token_batches
from tests.runs import World, curve, run_config
from tests.tiny import CASES

pytestmark = pytest.mark.usefixtures("no_plots")

FLOAT32_TOLERANCE = 1e-5
BATCHES = token_batches(3, batch=2, tokens=12)


@pytest.fixture
def compression(tiny_base: TinyBase) -> Compression:
    return Compression.of(tiny_base("llama", True))


def teacher_of(compression: Compression, **settings: float | int) -> Teacher:
    return Teacher(compression.base, DistillConfig.model_validate(settings), CPU, torch.float32)


def stock_logits(compression: Compression, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(compression.base.folder)(ids_BT).logits.double()


def divergence(logits_BTV: torch.Tensor, taught_BTV: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean KL(teacher ‖ model) over predicted tokens, from its definition."""
    q, p = ((x[:, :-1] / temperature).log_softmax(-1) for x in (logits_BTV, taught_BTV))
    return (p.exp() * (p - q)).sum(-1).mean()


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_its_targets_are_those_of_the_stock_base(family: str, tied: bool, tiny_base: TinyBase) -> None:
    compression = Compression.of(tiny_base(family, tied))
    whole = teacher_of(compression)
    assert whole.distillation.head_VH is not None
    for ids_BT, (hidden_BTH,) in zip(BATCHES, whole.targets(BATCHES), strict=True):
        logits_BTV = (hidden_BTH @ whole.distillation.head_VH.T).double()
        torch.testing.assert_close(logits_BTV, stock_logits(compression, ids_BT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("block_values", [2**23, 1000], ids=["one block", "blocks of rows"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_its_most_likely_tokens_are_those_of_the_stock_base(
    temperature: float, block_values: int, compression: Compression, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcscale.base.forward.LOGIT_CHUNK_VALUES", block_values)
    teacher = teacher_of(compression, top_k=7, temperature=temperature)
    assert teacher.distillation.head_VH is None
    for ids_BT, (top_BTk, log_p_BTk) in zip(BATCHES, teacher.targets(BATCHES), strict=True):
        expected = (stock_logits(compression, ids_BT) / temperature).log_softmax(-1).topk(7)
        assert top_BTk.dtype == torch.int32
        assert torch.equal(top_BTk.long(), expected.indices)
        torch.testing.assert_close(log_p_BTk.double(), expected.values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "chunks"])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (0.9, 2.0), (1.0, 1.0)])
def test_the_loss_and_its_gradients_are_those_of_the_definition(
    weight: float, temperature: float, chunk: int | None, compression: Compression
) -> None:
    teacher, ids_BT = teacher_of(compression, weight=weight, temperature=temperature), BATCHES[0]
    loss_module = NextTokenLoss(compression.model(), teacher.distillation)
    loss_module._chunk = chunk or loss_module._chunk
    loss = loss_module(ids_BT, *teacher.targets([ids_BT])[0])
    loss.backward()
    model = compression.model().double()
    logits_BTV = model(ids_BT).logits
    entropy = cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
    diverged = divergence(logits_BTV, stock_logits(compression, ids_BT), temperature)
    expected = (1 - weight) * entropy + weight * temperature**2 * diverged
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=FLOAT32_TOLERANCE)
    for (name, parameter), other in zip(loss_module.model.named_parameters(), model.parameters(), strict=True):
        assert parameter.grad is not None
        assert other.grad is not None
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=1e-4 * scale, msg=name)


def test_without_a_teacher_it_is_cross_entropy(compression: Compression) -> None:
    taught = NextTokenLoss(compression.model(), Distillation(0.7, 1.0))
    assert taught(BATCHES[0]).item() == NextTokenLoss(compression.model())(BATCHES[0]).item()


def test_all_tokens_among_the_most_likely_give_the_whole_divergence() -> None:
    generator = torch.Generator().manual_seed(1)
    p_NV, q_NV = (torch.randn(6, 9, generator=generator).log_softmax(-1) for _ in range(2))
    expected = (p_NV.exp() * (p_NV - q_NV)).sum().item()
    top = p_NV.topk(9)
    assert top_divergence(q_NV, top.indices.int(), top.values).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count", [1, 4])
def test_all_others_count_as_one_event(count: int) -> None:
    generator = torch.Generator().manual_seed(2)
    p_NV, q_NV = (torch.randn(6, 9, generator=generator).log_softmax(-1) for _ in range(2))
    top = p_NV.topk(count)
    of_top, of_others = (top.values.exp() * (top.values - q_NV.gather(-1, top.indices))).sum(), 0.0
    for p_V, q_V, ids in zip(p_NV.exp().double(), q_NV.exp().double(), top.indices, strict=True):
        others = [token for token in range(9) if token not in ids.tolist()]
        p, q = p_V[others].sum(), q_V[others].sum()
        of_others += (p * (p / q).log()).item()
    found = top_divergence(q_NV, top.indices.int(), top.values)
    assert found.item() == pytest.approx(of_top.item() + of_others, rel=FLOAT32_TOLERANCE)


def test_certainty_is_finite() -> None:
    sure_NV = torch.tensor([[100.0, 0.0, 0.0]]).log_softmax(-1).requires_grad_()
    top = sure_NV.detach().topk(1)
    loss = top_divergence(sure_NV, top.indices.int(), top.values)
    loss.backward()
    assert torch.isfinite(loss)
    assert sure_NV.grad is not None
    assert torch.isfinite(sure_NV.grad).all()


@pytest.mark.parametrize("top_k", [None, 16])
@pytest.mark.parametrize("method", ["projected", "hard_prune"])
def test_a_taught_run_comes_closer_to_its_base(method: str, top_k: int | None, world: World, tmp_path: Path) -> None:
    distill = {"weight": 0.9, "top_k": top_k}
    report = compress(run_config(world, tmp_path / "taught", method=method, distill=distill))
    assert report["evaluation"]["compressed"]["loss"] < report["evaluation"]["start"]["loss"]
    assert report["phases"]["train"]["stages"]["teach"]["seconds"] > 0
    compress(run_config(world, tmp_path / "alone", method=method))
    assert curve(tmp_path / "taught") != curve(tmp_path / "alone")


def test_a_taught_run_is_split_and_resumed_like_any_other(world: World, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    for name, changes in (("one", {}), ("other", split)):
        compress(run_config(world, tmp_path / name, distill={"weight": 0.5}, max_steps=4, **changes))
    one, other = ([row["loss"] for row in curve(tmp_path / name)] for name in ("one", "other"))
    assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("top_k", [None, 5])
def test_its_memory_and_targets_are_predicted_to_the_byte(top_k: int | None, compression: Compression) -> None:
    entered = Entered()
    teacher = teacher_of(compression, **({} if top_k is None else {"top_k": top_k}))
    targets = [values for of_batch in teacher.targets(BATCHES) for values in of_batch]
    config = RunConfig(
        base="-",
        output="-",
        start="selection",
        data=DataConfig(train=["-"]),
        distill=DistillConfig(top_k=top_k),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        sequence_length=12,
    )
    stages = Prediction(compression.plan, config, Deployment(on_gpu=False)).training
    assert stages["forward"][TARGETS].num_bytes == held_bytes(targets)
    held = stages["forward"].get(TEACHER)
    assert entered.now().get(("host", TEACHER), 0) == (0 if held is None else held.num_bytes)
    assert stages["teach"][HIDDEN].num_bytes == sum(ids_BT.numel() for ids_BT in BATCHES) * 32 * 4
