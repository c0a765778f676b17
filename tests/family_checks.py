"""What must hold for every family. A family's tests inherit `FamilyChecks` and name what they check."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pcscale.families.hf_config import read_config
from pcscale.families.plan import Plan
from pcscale.families.registry import family_of
from pcscale.families.spec import Kind, Weight
from pcscale.families.widths import plan_widths
from tests.tiny import build_base

NARROW = {"hidden_size": 24, "intermediate_size": 40}
"""Widths that no other axis of the tiny bases has, so that a mistaken axis shows."""

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(model: PreTrainedModel) -> Shapes:
    """The stock model's own parameters, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stock_model(folder: Path, config: dict[str, Any]) -> PreTrainedModel:
    """The model that stock transformers makes of a config.json, without loading a weight."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


class FamilyChecks:
    """The family's table against stock transformers, at the base's sizes and at the compressed model's."""

    family: ClassVar[str]
    changes: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(scope="class", params=[True, False], ids=["tied", "untied"])
    @classmethod
    def base(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return build_base(tmp_path_factory.mktemp("base"), cls.family, request.param, **cls.changes)

    @pytest.fixture(scope="class")
    @classmethod
    def plan(cls, base: Path) -> Plan:
        config = read_config(base)
        return plan_widths(family_of(config, str(base)), config, **NARROW)

    @pytest.fixture(scope="class")
    @classmethod
    def weights(cls, plan: Plan) -> dict[str, Weight]:
        return {weight.name: weight for weight in plan.family.weights(plan.base_config)}

    @pytest.fixture(scope="class")
    @classmethod
    def base_model(cls, base: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(base)

    @pytest.fixture(scope="class")
    @classmethod
    def compressed_model(cls, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
        return stock_model(tmp_path_factory.mktemp("compressed"), plan.config)

    def test_the_family_is_found_by_model_type(self, plan: Plan) -> None:
        assert plan.family.name == self.family

    def test_the_table_names_every_tensor_once(self, plan: Plan, weights: dict[str, Weight]) -> None:
        assert len(list(plan.family.weights(plan.base_config))) == len(weights) == len(plan.weights)

    def test_the_table_agrees_with_the_safetensors_file(self, base: Path, plan: Plan) -> None:
        stored = {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}
        assert {planned.name: planned.base_shape for planned in plan.weights} == stored

    def test_the_table_agrees_with_the_stock_model(self, plan: Plan, base_model: PreTrainedModel) -> None:
        assert {planned.name: planned.base_shape for planned in plan.weights} == parameter_shapes(base_model)

    def test_base_parameters_are_counted_as_the_stock_model_counts(
        self, plan: Plan, base_model: PreTrainedModel
    ) -> None:
        assert plan.base_parameters == base_model.num_parameters()

    def test_kinds_follow_the_stock_modules(self, weights: dict[str, Weight], base_model: PreTrainedModel) -> None:
        head, embedding = base_model.get_output_embeddings(), base_model.get_input_embeddings()
        kinds = {}
        for name, parameter in base_model.named_parameters():
            module = base_model.get_submodule(weights[name].module)
            if module is embedding:
                kinds[name] = Kind.EMBEDDING
            elif module is head:
                kinds[name] = Kind.HEAD
            elif isinstance(module, torch.nn.Linear):
                kinds[name] = Kind.LINEAR if parameter is module.weight else Kind.BIAS
            else:
                kinds[name] = Kind.NORM
        assert {name: weight.kind for name, weight in weights.items()} == kinds

    def test_weights_come_in_the_order_of_a_forward_pass(self, plan: Plan, weights: dict[str, Weight]) -> None:
        order = [weight.layer for weight in weights.values()]
        layers = [layer for layer in order if layer is not None]
        assert order[0] is None
        assert order[-1] is None
        assert layers == sorted(layers)
        assert set(layers) == set(range(plan.num_layers))
        for name, weight in weights.items():
            assert (weight.layer is None) == (f".layers.{weight.layer}." not in name)

    def test_compressed_shapes_are_those_of_the_stock_model(
        self, plan: Plan, compressed_model: PreTrainedModel
    ) -> None:
        assert {planned.name: planned.shape for planned in plan.weights} == parameter_shapes(compressed_model)

    def test_compressed_parameters_are_counted_as_the_stock_model_counts(
        self, plan: Plan, compressed_model: PreTrainedModel
    ) -> None:
        assert plan.parameters == compressed_model.num_parameters()
        assert plan.keep_fraction == plan.parameters / plan.base_parameters < 1

    def test_the_compressed_model_runs(self, plan: Plan, compressed_model: PreTrainedModel) -> None:
        tokens_BT = torch.arange(6).view(2, 3)
        with torch.no_grad():
            logits_BTV = compressed_model(tokens_BT).logits
        assert logits_BTV.shape == (2, 3, plan.base_config["vocab_size"])
        assert torch.isfinite(logits_BTV).all()

    def test_the_compressed_model_keeps_the_tie(self, plan: Plan, compressed_model: PreTrainedModel) -> None:
        embedding, head = compressed_model.get_input_embeddings(), compressed_model.get_output_embeddings()
        assert plan.tied == (embedding.weight is head.weight)

    def test_the_compressed_config_changes_widths_alone(self, plan: Plan) -> None:
        changed = {key for key, value in plan.config.items() if plan.base_config.get(key) != value}
        assert changed == set(NARROW)
        assert {key: plan.config[key] for key in NARROW} == NARROW

    def test_only_narrowed_sides_are_projected(self, plan: Plan) -> None:
        for planned in plan.weights:
            assert planned.projects_out == (planned.weight.axes[0] in ("residual", "ffn"))
            assert planned.projects_in == (planned.is_matrix and planned.weight.axes[-1] in ("residual", "ffn"))
