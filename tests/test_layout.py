"""The shape of the project: links, package list, the direction of imports, light imports, plugin names."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import diffalign
from diffalign import plugins

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("trainers", "reward_models", "eval", "configs")
PLUGINS = ("trainers", "reward_models", "eval")
SOURCES = ("diffalign", *LINKED, "tests")
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "datasets", "xformers", "matplotlib", "scipy")

CORE_REACHES = {
    "diffalign/__init__.py": {"trainers", "reward_models", "eval"},  # types only: the names are loaded when used
    "diffalign/benchmark_models.py": {"eval"},
    "diffalign/benchmark_options.py": {"eval"},
    "diffalign/benchmarking.py": {"eval"},
    "diffalign/commands.py": {"reward_models", "eval"},  # the commands' bodies put the parts together
    "diffalign/demo.py": {"eval"},
    "diffalign/light_commands.py": {"reward_models", "eval"},
    "diffalign/reward_names.py": {"reward_models"},
    "diffalign/training.py": {"reward_models"},  # scorers of the validation pictures
    "diffalign/shapes/build.py": {"reward_models", "eval"},  # which appraises what it has built
    "diffalign/validating.py": {"reward_models", "eval"},
}
"""The files of the core that may import a plugin folder, and only inside a function or for types."""

PLUGINS_REACH: dict[str, set[str]] = {
    "trainers": set(),  # a trainer receives scores as a callable
    "reward_models": set(),
    "eval": {"reward_models"},
}
"""Which other plugin folders a plugin folder may import."""


def python_files(folder: str) -> Iterator[Path]:
    """The files of a real folder; links are not followed, so that every file comes once."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        inside = [ROOT / folder / part for part in path.relative_to(ROOT / folder).parents if str(part) != "."]
        if not any(part.is_symlink() for part in inside):
            yield path


@functools.cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """Every imported dotted name of a file, and whether it is imported when the module is: not in a function or for
    types only."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            now = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            if isinstance(child, ast.expr):  # most of a file, and no place for an import
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, now) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import in line {child.lineno}"
                yield from ((f"{child.module}.{alias.name}", now) for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                yield from walk(child, False)
            else:
                yield from walk(child, now)

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")), True))


def reached(path: Path) -> Iterator[tuple[str, bool]]:
    """The plugin folders a file imports."""
    for name, at_import in imports(path):
        for folder in PLUGINS:
            if name == f"diffalign.{folder}" or name.startswith(f"diffalign.{folder}."):
                yield folder, at_import


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", LINKED)
def test_link_points_at_the_real_folder(name: str) -> None:
    link = ROOT / "diffalign" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert (ROOT / name).is_dir()
    assert not (ROOT / name).is_symlink()


def test_package_list_is_what_is_on_disk() -> None:
    listed = settings()["tool"]["setuptools"]
    found = {"diffalign", *(f"diffalign.{name}" for name in LINKED)}
    for file in python_files("diffalign"):
        found.add(".".join(file.relative_to(ROOT).parent.parts))
    for name in LINKED:  # plugin folders stay flat
        assert {f.parent for f in python_files(name)} == {ROOT / name}
    assert set(listed["packages"]) == found
    assert listed["package-dir"] == {"diffalign": "diffalign", **{f"diffalign.{name}": name for name in LINKED}}
    assert listed["include-package-data"] is False


def test_core_reaches_plugins_only_where_it_may() -> None:
    found: dict[str, set[str]] = {}
    for path in python_files("diffalign"):
        for folder, at_import in reached(path):
            name = path.relative_to(ROOT).as_posix()
            assert not at_import, f"{name} imports diffalign.{folder} when it is imported"
            found.setdefault(name, set()).add(folder)
    wrong = {name: folders - CORE_REACHES.get(name, set()) for name, folders in found.items()}
    assert not any(wrong.values()), f"reversed imports: {wrong}; the core finds plugins with diffalign.plugins.find"


@pytest.mark.parametrize("kind", PLUGINS)
def test_plugins_import_one_way(kind: str) -> None:
    for path in python_files(kind):
        wrong = {folder for folder, _ in reached(path)} - PLUGINS_REACH[kind] - {kind}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_one_import_name() -> None:
    """`import trainers` at the root would load every module a second time, with other classes."""
    perhaps = re.compile(rf"(import|from|,)\s+({'|'.join(LINKED)})\b")  # parsing all files takes long
    for folder in SOURCES:
        for path in python_files(folder):
            if not perhaps.search(path.read_text(encoding="utf-8")):
                continue
            wrong = [name for name, _ in imports(path) if name.split(".")[0] in LINKED]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}; write diffalign.{wrong[0]}"


@pytest.mark.slow
def test_every_imported_distribution_is_declared_and_explained() -> None:
    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[^\w.-]", text)[0].lower().replace("_", "-") for text in requirements}

    project = settings()["project"]
    extras = names([text for extra in project["optional-dependencies"].values() for text in extra])
    providers = metadata.packages_distributions()
    optional = {"bitsandbytes"}  # for one optimizer, asked for by name when it is used
    decision = (ROOT / "docs" / "decisions" / "0001-dependencies.md").read_text(encoding="utf-8")
    for folder in (*PLUGINS, "diffalign", "configs"):
        for path in python_files(folder):
            roots = {name.split(".")[0] for name, _ in imports(path)}
            for root in roots - sys.stdlib_module_names - {"diffalign"} - optional:
                found = {name.lower().replace("_", "-") for name in providers.get(root, [root])}
                assert found & (names(project["dependencies"]) | extras), f"{path.relative_to(ROOT)} imports {root}"
    for name in names(project["dependencies"]):
        assert re.search(rf"\b{name}\b", decision), f"docs/decisions/0001-dependencies.md does not say why {name}"


def test_imports_are_light() -> None:
    """One after the other in one process: whatever is heavy appears with the first that needs it."""
    modules = ["diffalign", "diffalign.cli", "diffalign.plugins", *(f"diffalign.{name}" for name in PLUGINS)]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, [heavy for heavy in {HEAVY} if heavy in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in modules]


@pytest.mark.parametrize("kind", PLUGINS)
def test_plugins_are_classes_found_by_file_name(kind: plugins.Kind) -> None:
    names = plugins.available(kind)
    assert names
    base = importlib.import_module(f"diffalign.{kind}.base")
    bases = tuple(c for c in vars(base).values() if inspect.isclass(c) and c.__module__ == base.__name__)
    for name in names:
        module = importlib.import_module(f"diffalign.{kind}.{name}")
        hint = f"{kind}/{name}.py is no plugin; name what plugins share in plugins._SHARED, or as plugins._PARTS end"
        assert hasattr(module, "__all__"), hint
        plugin = plugins.find(kind, name)
        assert inspect.isclass(plugin), hint
        assert issubclass(plugin, bases), hint
        assert plugin.__module__ == module.__name__
        assert not inspect.isabstract(plugin), f"{kind}/{name}.py: {plugin.__name__} is abstract"
    for name in plugins._SHARED:  # a name that no longer exists would hide a plugin of that name
        assert any((ROOT / folder / f"{name}.py").is_file() for folder in PLUGINS), f"no module {name}"


@pytest.mark.parametrize("module", ["diffalign", *(f"diffalign.{name}" for name in PLUGINS), "diffalign.data"])
def test_public_names_resolve(module: str) -> None:
    package = importlib.import_module(module)
    assert len(set(package.__all__)) == len(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = package.no_such_name


def test_names_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"\bda\.((?:trainers\.|reward_models\.)?\w+)", readme))
    assert {"load_policy", "fit", "trainers.DiffusionDPO"} <= names
    for name in names:
        found: Any = diffalign
        for part in name.split("."):
            found = getattr(found, part)
    for path in re.findall(r"configs/\w+\.yaml", readme):
        assert (ROOT / path).is_file()


def test_version_is_written_once_more_in_the_package() -> None:
    assert settings()["project"]["version"] == diffalign.__version__


def test_no_word_about_where_it_was_written() -> None:
    """No paths of a developer's machine, no unfinished notes."""
    words = re.compile(r"/home/\w|/root/|/work/|\bTODO\b|\bFIXME\b|this session|coding session")
    texts = [path for folder in (*SOURCES, "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci" / "run"]
    for path in texts:
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", "") and path != Path(__file__):
            found = words.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"
