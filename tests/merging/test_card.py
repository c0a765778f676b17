"""What stands beside the merged weights: the base's files and the model card."""

from pathlib import Path

import pytest
import yaml

from pcscale.merging.card import base_licence
from tests.merging.conftest import FURNITURE, TRAINER
from tests.merging.trained import BASE_NAME, FFN, HIDDEN, STEPS, Train, TrainedRun, merge_run


def _card(folder: Path) -> tuple[dict, str]:
    """The front matter, parsed, and the text below it."""
    start, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(front), text


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "LICENSE.txt", "NOTICE"])
def test_what_belongs_to_the_model_is_copied(name: str, furnished: tuple[TrainedRun, Path]) -> None:
    assert (furnished[1] / name).read_text(encoding="utf-8") == FURNITURE[name]


def test_the_tokenizer_is_copied_byte_for_byte(furnished: tuple[TrainedRun, Path]) -> None:
    run, folder = furnished
    tokenizer = sorted(path.name for path in run.base_folder.glob("tokenizer*"))
    assert "tokenizer.json" in tokenizer
    for name in tokenizer:
        assert (folder / name).read_bytes() == (run.base_folder / name).read_bytes()


def test_nothing_else_of_the_base_is_copied(furnished: tuple[TrainedRun, Path]) -> None:
    run, folder = furnished
    copied = {path.name for path in run.base_folder.glob("tokenizer*")}
    copied |= {"chat_template.jinja", "generation_config.json", "LICENSE.txt", "NOTICE"}
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    own = {"config.json", "README.md", "model.safetensors.index.json"}
    assert {path.name for path in folder.iterdir()} == copied | shards | own


def test_the_card_names_base_licence_and_method(furnished: tuple[TrainedRun, Path]) -> None:
    front, text = _card(furnished[1])
    assert front == {
        "base_model": "tiny",  # a local folder, whose path means nothing elsewhere
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pcscale", "projected-compression"],
        "license": "mit",
    }
    assert "by Projected Compression. An ordinary `Qwen3ForCausalLM`: it needs no extra code." in text


def test_the_card_tells_sizes_steps_data_and_losses(furnished: tuple[TrainedRun, Path]) -> None:
    run, folder = furnished
    _, text = _card(folder)
    keep = sum(weight.numel() for weight in run.weights.values()) / run.plan.base_parameters
    for line in (
        f"# tiny at {keep:.1%} of its parameters",
        f"| hidden_size | 32 | {HIDDEN} |",
        f"| intermediate_size | 48 | {FFN} |",
        f"- Base: {BASE_NAME}",
        f"- Kept share of the base's real parameter count: {keep:.4f}",
        f"- Optimizer steps: {STEPS}",
        "- Data: prose/*.txt, more.jsonl",
        "- Tokens: 72,000",
        "- Training loss at the last step: 4.2500 nats a token",
        "- Held-out loss when last evaluated: 4.5000 nats a token",
    ):
        assert line in text.splitlines()


def test_the_cards_run_yaml_is_the_runs(furnished: tuple[TrainedRun, Path]) -> None:
    _, text = _card(furnished[1])
    assert yaml.safe_load(text.split("## run.yaml\n\n```yaml\n")[1].split("```")[0]) == TRAINER["settings"]


def test_a_checkpoint_of_ones_own_loop_has_a_card_without_data_and_losses(trained: Train, tmp_path: Path) -> None:
    merge_run(trained("llama", True, "hard_prune"), tmp_path / "merged")
    front, text = _card(tmp_path / "merged")
    assert front["tags"] == ["pcscale", "pruned"]
    assert "license" not in front
    assert "by hard pruning and retraining" in text
    assert "Data:" not in text
    assert "run.yaml" not in text
    assert f"- Optimizer steps: {STEPS}" in text


def test_the_hubs_commit_is_named(trained: Train, tmp_path: Path) -> None:
    run = trained().copy(tmp_path)
    run.change_manifest(base_revision="abc123")
    merge_run(run, tmp_path / "merged")
    assert f"- Base: {BASE_NAME} at revision abc123" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\ntext", "apache-2.0"),
        ("---\ntags:\n- a\nlicense: 'other'\n---\n", "other"),
        ("---\nlicense: [mit, gpl]\n---\n", None),
        ("---\n- license\n---\n", None),
        ("---\nlicense: : {\n---\n", None),
        ("---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_what_the_bases_front_matter_says_and_nothing_else(
    card: str, licence: str | None, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(card)
    assert base_licence(tmp_path) == licence


def test_a_base_without_a_card_has_no_licence(tmp_path: Path) -> None:
    assert base_licence(tmp_path) is None
