"""The wheel: one top-level name, everything that belongs inside, and a demo in another folder and environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("diffalign", "trainers", "reward_models", "eval", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def run(command: list[str | Path], cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed, without this checkout on its path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "COV_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: products of earlier builds cannot slip in, and none stay behind."""
    folder = tmp_path_factory.mktemp("source")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=junk)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist"], folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return archive.namelist()


def expected_files() -> set[str]:
    """Every file of the checkout's packages, under the name it has when imported."""
    files = set()
    for name in FOLDERS:
        prefix = name if name == "diffalign" else f"diffalign/{name}"
        for path in (ROOT / name).rglob("*"):  # does not go through links
            part = path.relative_to(ROOT / name)
            if path.is_file() and "__pycache__" not in part.parts:
                files.add(f"{prefix}/{part.as_posix()}")
    return files


def test_one_top_level_name_and_every_file_once(wheel: Path) -> None:
    found = [name for name in names(wheel) if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in found} == {"diffalign"}
    assert max(Counter(found).values()) == 1
    assert set(found) == expected_files()


def test_data_travel_along(wheel: Path) -> None:
    found = set(names(wheel))
    for needed in (
        "diffalign/py.typed",
        "diffalign/configs/demo.yaml",
        "diffalign/configs/sd15_diffusion_dpo.yaml",
        "diffalign/configs/prompts/validation.txt",
        "diffalign/eval/report_page/page.html.j2",
        "diffalign/eval/report_page/page.css",
        "diffalign/eval/report_page/gallery.js",
        "diffalign/shapes/split.json",
        "diffalign/shapes/assets/pipeline/model_index.json",
        "diffalign/shapes/assets/pipeline/unet/diffusion_pytorch_model.safetensors",
        "diffalign/shapes/assets/scorer/model.safetensors",
    ):
        assert needed in found
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in found)


def test_embedded_models_are_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        pipeline = [
            i.file_size for i in archive.infolist() if i.filename.startswith("diffalign/shapes/assets/pipeline/")
        ]
    assert 0 < sum(pipeline) <= 12e6


def test_installed_wheel_runs_the_demo_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment that sees the test environment's dependencies, but not the checkout."""
    target = tmp_path / "environment"
    venv.create(target, with_pip=False, symlinks=True)
    python = target / "bin" / "python"
    place = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], tmp_path).strip())
    # Paths in a .pth file are searched after the environment's own packages, and .pth files in them, such as the one
    # of an editable install, are not read.
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (place / "dependencies.pth").write_text("\n".join([*seen, ""]), encoding="utf-8")
    run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel],
        tmp_path,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = "import importlib.util as u, diffalign.trainers as t\nprint(t.__file__)\n"
    code += "print([n for n in ('trainers', 'reward_models', 'eval', 'configs') if u.find_spec(n)])"
    located, others = run([python, "-c", code], elsewhere).splitlines()
    assert Path(located).is_relative_to(place)
    assert others == "[]"

    output = run(
        [target / "bin" / "diffalign", "demo", "--quick"],
        elsewhere,
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        PYTHONWARNINGS="default",
    )
    report = elsewhere / "runs" / "demo" / "report.html"
    assert report.is_file()
    assert "<html" in report.read_text(encoding="utf-8")
    assert output.rstrip().splitlines()[-1] == "report: runs/demo/report.html"
