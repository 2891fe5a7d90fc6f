"""The ready accelerate configs, read by accelerate's own loader; the launcher and the plain command read one YAML."""

from __future__ import annotations

import json
import os
import subprocess
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.forks import Forks

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
    "multi_node": DistributedType.MULTI_GPU,
}


def test_these_are_all() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name]
    assert config.num_processes > 1
    assert not config.use_cpu
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    assert "mixed_precision" not in written  # the run's own YAML says it
    assert "gradient_accumulation_steps" not in written.get("deepspeed_config", {})


@pytest.mark.parametrize("name", ["deepspeed_zero2", "deepspeed_zero3"])
def test_deepspeed_says_that_it_was_not_measured(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "# Not measured here" in text
    assert yaml.safe_load(text)["deepspeed_config"]["zero_stage"] == int(name[-1])


def launched(name: str, *more: str) -> Namespace:
    """The arguments that `accelerate launch` works with, its config file merged in."""
    line = ["--config_file", str(FOLDER / f"{name}.yaml"), *more, "-m", "diffalign", "train", "run.yaml", "seed=1"]
    arguments: Namespace = _validate_launch_command(launch_command_parser().parse_args(line))[0]
    return arguments


def test_fsdp_means_what_the_loop_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    environment = prepare_multi_gpu_env(launched("fsdp2"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    for key, value in environment.items():
        if key.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False


def test_the_command_after_it_is_ours() -> None:
    arguments = launched("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert arguments.module is True
    assert (arguments.training_script, arguments.training_script_args) == ("diffalign", ["train", "run.yaml", "seed=1"])
    assert (arguments.num_machines, arguments.num_processes, arguments.machine_rank) == (2, 16, 1)
    assert arguments.main_process_ip == "10.0.0.1"


def test_the_slurm_script_is_a_script_and_names_files_that_exist() -> None:
    path = FOLDER / "slurm.sh"
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8")
    assert "configs/accelerate/multi_node.yaml" in text
    assert "-m diffalign train" in text


def launch(*line: str) -> None:
    """`accelerate launch LINE`."""
    launch_command(launch_command_parser().parse_args(line))


@pytest.mark.slow
def test_the_launcher_and_the_plain_command_read_the_same_file(
    tmp_path: Path, tiny_pipeline: Path, forks: Forks
) -> None:
    config: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(tiny_pipeline), "lora": {"rank": 2}},
        "training": {"max_train_steps": 3, "per_device_train_batch_size": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))
    command = ("train", str(path), "--dry-run")
    (by_launcher,) = forks.run(launch, "--cpu", "--num_processes", "1", "-m", "diffalign", *command, cwd=tmp_path)
    (plain,) = forks.command(*command, cwd=tmp_path)
    assert plain.code == 0, plain.err
    assert by_launcher.out == plain.out
    assert "steps: 3" in plain.out
    assert not (tmp_path / "run").exists()
