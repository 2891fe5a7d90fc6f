from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign.config import ConfigError, RunConfig, dump_config, load_config, trainer_settings
from diffalign.rollout_checks import check_rollout
from diffalign.trainers.diffusion_dpo import DiffusionDPO

MINIMAL = "output_dir: runs/x\nmodel: {pretrained_model_name_or_path: somewhere}\n"
PACKAGED = sorted(
    p.name for p in Path(str(resources.files("diffalign.configs"))).glob("*.yaml") if "reward" not in p.name
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


def test_a_minimal_config_has_every_default(write: Any) -> None:
    config = load_config(write(MINIMAL))
    assert config.trainer == {"name": "diffusion_dpo"}
    assert config.training.max_train_steps == 2000
    assert config.model.lora is None
    assert config.data is None
    assert config.seed == 0


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_config_loads_and_its_trainer_settings_are_good(name: str) -> None:
    config = load_config(name)
    assert load_config(f"configs/{name}") == config
    trainer, settings = trainer_settings(config)
    assert isinstance(settings, trainer.Config)
    assert config.data is not None or config.pairs is not None or config.rollout is not None
    check_rollout(config, trainer, settings)


def test_there_are_packaged_configs_for_the_demo_and_for_sd15() -> None:
    assert {"demo.yaml", "sd15_diffusion_dpo.yaml"} <= set(PACKAGED)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainig: {}", "unknown config key 'trainig'; did you mean 'training'? (available: data, evaluation, model"),
        (
            "training: {learning_rat: 1.0e-4}",
            "unknown config key 'training.learning_rat'; did you mean 'learning_rate'? (available: adam_beta1",
        ),
        ("data: {dataset_nam: x}", "unknown config key 'data.dataset_nam'; did you mean 'dataset_name'?"),
        ("pairs: {prompt: x}", "unknown config key 'pairs.prompt'; did you mean 'prompts'?"),
        ("sampling: {guidance: 3}", "unknown config key 'sampling.guidance'; did you mean 'guidance_scale'?"),
        ("evaluation: {rewards: []}", "unknown config key 'evaluation.rewards'; did you mean 'reward_models'?"),
        ("training: {qqqqq: 1}", "unknown config key 'training.qqqqq' (available: "),
        ("training: {max_train_steps: 0}", "'training.max_train_steps': Input should be greater than or equal to 1"),
        ("training: {max_train_steps: many}", "'training.max_train_steps': Input should be a valid integer"),
        ("training: {learning_rate: 0}", "'training.learning_rate': Input should be greater than 0; found 0"),
        ("training: {mixed_precision: fp8}", "'training.mixed_precision': Input should be 'no', 'fp16' or 'bf16'"),
        ("data: {}", "'data': data needs dataset_name or train_data_dir, found neither; set exactly one"),
        ("training: [1, 2]", "'training': Input should be a valid dictionary or instance of TrainingConfig"),
    ],
)
def test_bad_keys_and_values_are_one_line(write: Any, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(MINIMAL + text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_under_an_optional_section_gets_its_suggestion(write: Any) -> None:
    text = "output_dir: x\nmodel: {pretrained_model_name_or_path: y, lora: {rnk: 4}}\n"
    with pytest.raises(ConfigError, match=r"'model.lora.rnk'; did you mean 'rank'\? \(available: alpha, rank"):
        load_config(write(text))


def test_every_problem_gets_its_line(write: Any) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write("outputdir: x\ntraining: {seed: 1}\n"))
    lines = str(error.value).splitlines()
    assert "config key 'output_dir' is missing" in lines
    assert "config key 'model' is missing" in lines
    assert any(line.startswith("unknown config key 'outputdir'; did you mean 'output_dir'?") for line in lines)
    assert any(line.startswith("unknown config key 'training.seed'") for line in lines)


@pytest.mark.parametrize(
    ("written", "value"), [("1e-5", 1e-5), ("1.0e-5", 1e-5), ("2E3", 2000.0), ("1e+2", 100.0), ("5", 5.0), (".5", 0.5)]
)
def test_floats_are_read_as_everyone_means_them(write: Any, written: str, value: float) -> None:
    by_file = load_config(write(MINIMAL + f"training: {{learning_rate: {written}}}")).training.learning_rate
    by_override = load_config(write(MINIMAL), [f"training.learning_rate={written}"]).training.learning_rate
    assert by_file == by_override == value
    untyped = load_config(
        write(MINIMAL + f"trainer: {{name: x, beta: {written}}}"), [f"trainer.other={written}"]
    ).trainer
    assert untyped["beta"] == untyped["other"] == value  # not the text of it


@pytest.mark.parametrize("word", ["1e", "e5", "run-1e-5", "0x1e5z"])
def test_words_that_look_like_floats_stay_words(write: Any, word: str) -> None:
    assert load_config(write(MINIMAL), [f"output_dir={word}"]).output_dir == word


def test_overrides_reach_sections_that_the_file_has_and_that_it_has_not(write: Any) -> None:
    overrides = [
        "seed=7",
        "model.lora.rank=4",
        "training.validation_prompts=[a cat, a dog]",
        "training.resume_from_checkpoint=latest",
        "training.report_to=null",
        "trainer.beta=500",
        "trainer.name=diffusion_dpo",
        "output_dir=runs/a=b",
    ]
    config = load_config(write(MINIMAL), overrides)
    assert config.seed == 7
    assert config.model.lora is not None
    assert config.model.lora.rank == 4
    assert config.training.validation_prompts == ("a cat", "a dog")
    assert config.training.resume_from_checkpoint == "latest"
    assert config.training.report_to is None
    assert config.trainer == {"beta": 500, "name": "diffusion_dpo"}
    assert config.output_dir == "runs/a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.max_train_steps", "override 'training.max_train_steps' is not of the form section.key=value"),
        ("=3", "override '=3' is not of the form"),
        ("output_dir.x=3", "override 'output_dir.x=3': 'output_dir' is a value, not a section"),
        ("training.max_train_step=3", "did you mean 'max_train_steps'?"),
        ("training.validation_prompts=[a, b", "override 'training.validation_prompts=[a, b': not a YAML value"),
    ],
)
def test_bad_overrides_are_one_line(write: Any, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(MINIMAL), [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_without_content_is_a_section_of_defaults_for_overrides(write: Any) -> None:
    text = MINIMAL + "training:\n"
    assert load_config(write(text), ["training.max_train_steps=3"]).training.max_train_steps == 3


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("difusion_dpo", "unknown trainer 'difusion_dpo'; did you mean 'diffusion_dpo'?"),
        ("{beta: 3}", "config key 'trainer.name' is missing, for example trainer: {name: diffusion_dpo}"),
        ("{name: diffusion_dpo, beta: 0}", "config key 'trainer': beta must be positive and finite, got 0.0"),
        ("{name: diffusion_dpo, beta: -2.5}", "config key 'trainer': beta must be positive and finite, got -2.5"),
        ("{name: diffusion_dpo, beta: .nan}", "beta must be positive and finite, got nan"),
        ("{name: diffusion_dpo, bta: 3}", "unknown config key 'trainer.bta'; did you mean 'beta'? (available: beta, "),
        ("{name: diffusion_dpo, loss_type: cpo}", "'trainer.loss_type': Input should be 'sigmoid', 'ipo', 'hinge'"),
        ("{name: diffusion_dpo, loss_type: robust}", "'robust' needs label_smoothing, the share of flipped labels"),
        ("{name: diffusion_dpo, loss_type: ipo, label_smoothing: 0.1}", "belongs to loss_type 'sigmoid' or 'robust'"),
        ("{name: diffusion_dpo, label_smoothing: 0.5}", "label_smoothing must lie in [0, 0.5), got 0.5"),
        ("{name: diffusion_dpo, caption_dropout: 2}", "'trainer.caption_dropout': Input should be less than or equal"),
        ("{name: diffusion_dpo, timestep_sampling: sobol}", "'trainer.timestep_sampling': Input should be 'uniform'"),
    ],
)
def test_bad_trainer_settings_are_one_line(write: Any, trainer: str, message: str) -> None:
    config = load_config(write(MINIMAL + f"trainer: {trainer}"))
    with pytest.raises(ConfigError) as error:
        trainer_settings(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trainer_may_be_given_by_its_name_alone(write: Any) -> None:
    trainer, settings = trainer_settings(load_config(write(MINIMAL + "trainer: diffusion_dpo")))
    assert trainer is DiffusionDPO
    assert settings == DiffusionDPO.Config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of sections, found list"),
        ("", "expected a mapping of sections, found NoneType"),
    ],
)
def test_files_that_are_no_configs(write: Any, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_packaged_ones(tmp_path: Path) -> None:
    for path in (tmp_path / "demo.yaml", Path("nothing.yaml")):
        with pytest.raises(ConfigError, match=r"does not exist \(packaged configs: .*demo.yaml"):
            load_config(path)


@pytest.mark.slow
def test_what_is_written_down_reads_back_the_same(write: Any) -> None:
    for name in PACKAGED:
        config = load_config(name)
        text = dump_config(config)
        assert RunConfig.model_validate(yaml.safe_load(text)) == config
        assert load_config(write(text)) == config


def test_configs_are_frozen(write: Any) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(write(MINIMAL)).seed = 3
