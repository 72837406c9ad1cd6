from __future__ import annotations

import pytest
import yaml

from megatron_medgpt.config import presets
from megatron_medgpt.config.errors import UsageError
from megatron_medgpt.config.load import load_run, override_run, read_yaml, run_from_tree, to_yaml
from megatron_medgpt.config.schema import BlendConfig, ModelConfig, RunConfig, StageConfig

TREE = {
    "name": "r", "out": "runs/r", "tokenizer": "tok",
    "model": {"language": "tiny", "vision": {"preset": "tiny-clip", "image_size_px": 84}},
    "stages": [
        {"name": "align", "data": [{"path": "a"}], "num_steps": 5, "sequence_length": 256},
        {"name": "instruct", "data": [{"path": "b", "weight": 2}], "num_steps": 7, "sequence_length": 256},
    ],
}  # fmt: skip


def test_presets_are_named_and_may_be_changed_field_by_field():
    run = run_from_tree(TREE)
    assert run.model.language == presets.TINY
    assert run.model.vision.image_size_px == 84
    assert run.model.vision.hidden_size == presets.TINY_CLIP.hidden_size
    assert run.model.tokens_per_image == 36


def test_resolved_yaml_repeats_the_run(tmp_path):
    run = run_from_tree(TREE, ["stages.align.optimizer.module_learning_rates={projector: 1e-3}"])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))
    assert load_run(path) == run


def test_overrides_address_stages_by_name_and_by_number():
    run = run_from_tree(TREE, ["stages.instruct.num_steps=9", "stages.0.optimizer.learning_rate=1e-3"])
    assert run.stages[1].num_steps == 9
    assert run.stages[0].optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.align.num_stepz=3", "did you mean 'num_steps'"),
        ("stages.aling.num_steps=3", "did you mean 'align'"),
        ("modle.language=tiny", "did you mean 'model'"),
        ("model.language=gpt-oss-21b", "did you mean 'gpt-oss-20b'"),
        ("precision=fp8", "allowed: bf16, fp32"),
        ("stages.0.num_steps=0", "must be greater than 0"),
        ("stages.0.num_steps=many", "expected int"),
        ("checkpoint.interval=0", "checkpoint.interval is 0; it must be greater than 0"),
        ("stages.0.sequence_length=10", "cannot hold one image"),
        ("stages.0.frozen=[encoders]", "allowed: encoder"),
        ("stages.0.frozen=[encoder,projector,language,experts,router]", "nothing would learn"),
        ("seed", "section.field=value"),
        ("stages.9.num_steps=1", "no stage has the number 9; there are 0 (align)"),
        ("model.vision.patch_size_px=0", "model.vision.patch_size_px is 0; it must be greater than 0"),
        ("model.vision.num_attention_heads=0", "model.vision.num_attention_heads is 0"),
        ("model.vision.hidden_size=0", "model.vision.hidden_size is 0"),
        ("model.vision.std=[1,0,1]", "model.vision.std is 0"),
        ("model.projector.hidden_size=0", "model.projector.hidden_size is 0"),
        ("model.language.rope_base=0", "model.language.rope_base is 0.0; it must be greater than 1"),
        ("model.language.yarn_factor=0", "model.language.yarn_factor is 0.0"),
        ("stages.0.optimizer.beta1=2", "optimizer.beta1 is 2.0; it must be 0 or more and less than 1"),
        ("stages.0.optimizer.weight_decay=-1", "optimizer.weight_decay is -1.0; it must be 0 or more"),
        ("stages.0.optimizer.module_learning_rates.router=-1", "module_learning_rates.router is -1.0"),
        ("stages.0.optimizer.schedule.warmup_steps=-3", "schedule.warmup_steps is -3; it must be 0 or more"),
        ("stages.0.optimizer.schedule.min_factor=2", "schedule.min_factor is 2.0; allowed: 0 to 1"),
        ("stages.0.validation_interval=-1", "stages.align.validation_interval is -1; it must be 0 or more"),
        ("stages.0.validation_rows=0", "stages.align.validation_rows is 0"),
        ("stages.0.router_z_coefficient=-1", "stages.align.router_z_coefficient is -1.0"),
        ("stages.0.exit.threshold=1.0", "exit.threshold=1.0 needs exit.metric"),
        ("num_threads=-1", "num_threads is -1; it must be 0 or more"),
    ],
)
def test_bad_overrides_are_refused_in_one_line_that_names_the_field(override, says):
    with pytest.raises(UsageError) as caught:
        run_from_tree(TREE, [override])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_field_given_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UsageError, match="given twice"):
        read_yaml(path)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\xff"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"run\.yaml"):
        read_yaml(path)


def test_a_folder_in_the_place_of_a_file_is_refused_and_its_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="is a folder; name a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "run.yaml").write_text("name: r\n")
    with pytest.raises(UsageError, match=r"is a folder; name .*run\.yaml"):
        read_yaml(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_run(tmp_path / "none.yaml")


def test_a_missing_required_field_is_named():
    with pytest.raises(UsageError, match="tokenizer is missing"):
        run_from_tree({k: v for k, v in TREE.items() if k != "tokenizer"})


def test_an_override_returns_a_new_config_and_leaves_the_old_one():
    run = run_from_tree(TREE)
    assert override_run(run, ["seed=7"]).seed == 7
    assert run.seed == 1234


def test_numbers_written_like_people_write_them_are_numbers():
    assert yaml.safe_load("1e-3") == "1e-3"  # what plain YAML 1.1 does
    assert run_from_tree(TREE, ["stages.0.optimizer.learning_rate=1e-3"]).stages[0].optimizer.learning_rate == 0.001


def test_public_shapes_have_the_published_token_counts():
    stage = StageConfig(name="s", data=(BlendConfig(path="d"),), num_steps=1, sequence_length=4096)
    for vision, tokens in ((presets.CLIP_L_14_336, 576), (presets.MEDSIGLIP_448, 1024)):
        run = RunConfig(name="r", out="o", tokenizer="t", stages=(stage,), model=ModelConfig(vision=vision))
        assert run.model.tokens_per_image == tokens
