"""The model card of a run: `README.md` in its folder, as the Hugging Face Hub shows it, with the curves beside it.

Everything in it is read from what the run has left: `config.yaml`, `run.json`, `metrics.jsonl`, the report of the
encoded pairs, `evaluation/comparison.json` and the validation pictures. What is not there is said not to be there;
nothing is guessed, the licence least of all.
"""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from diffalign import __version__
from diffalign.backbones.loading import BUILTIN, FAMILIES, LORA_FILE
from diffalign.curves import draw_curves, panels, read_series
from diffalign.data.index import MANIFEST
from diffalign.data.pairs import ReadReport
from diffalign.lora_formats import is_hub_id, pipeline_class
from diffalign.public_text import public
from diffalign.resumable import read_object, write_atomically

CARD = "README.md"
CURVES = "curves.png"
REFINER = "StableDiffusionXLImg2ImgPipeline"


@dataclass(frozen=True)
class Run:
    """What a run's folder tells.

    Attributes:
        folder: The run's output folder.
        config: Its configuration, every default written out; local paths shortened, see `diffalign.public_text`.
        facts: `run.json`: the method in one line, kappa, the number of pairs, perhaps the commands; likewise.
        weights: Names of the files and folders with trained weights, relative to the folder.
        family: Class of the base model's pipeline; None if the model is not on this machine.
        is_video: Whether the model makes videos.
    """

    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    weights: tuple[str, ...]
    family: str | None
    is_video: bool

    @property
    def base(self) -> str:
        """The model that training started from."""
        return str(self.config["model"]["pretrained_model_name_or_path"])

    @property
    def is_lora(self) -> bool:
        """Whether the weights are an adapter."""
        return LORA_FILE in self.weights

    @property
    def method(self) -> str:
        """The trainer's name."""
        return str(self.config["trainer"]["name"])


def read_run(folder: str | Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: If it is missing, was not made by `diffalign train`, or holds no trained weights.
    """
    run = Path(folder)
    if not run.is_dir():
        raise ValueError(f"run folder {str(folder)!r} does not exist; give the output_dir of a run")
    if not (run / "config.yaml").is_file():
        raise ValueError(f"{folder} holds no config.yaml; expected the output_dir of `diffalign train`")
    try:
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        model, _ = config["model"], config["trainer"]["name"]
        base = model["pretrained_model_name_or_path"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"{run / 'config.yaml'} is no configuration of a run ({error})") from error
    family = pipeline_class(base, model.get("revision"))
    is_video = False
    if family in FAMILIES:
        module, _, name = FAMILIES[family].partition(":")
        is_video = bool(getattr(importlib.import_module(f"diffalign.backbones.{module}"), name).is_video)
    return Run(run, public(config), public(_json(run / "run.json") or {}), _weights(run), family, is_video)


def write_card(run_dir: str | Path, *, license: str | None = None, repo_id: str | None = None) -> Path:
    """Writes `README.md` and `curves.png` into a run's folder.

    Args:
        run_dir: The run's output folder.
        license: Identifier of the weights' licence, such as "openrail++"; None leaves it out.
        repo_id: Where the weights will be published, for the lines that load them.

    Returns:
        The card.

    Raises:
        ValueError: See `read_run`; or if a file of the run is damaged.
    """
    run = read_run(run_dir)
    text = render_card(run, license, repo_id)
    curves = draw_curves(run.folder)
    if curves is not None:
        write_atomically(run.folder / CURVES, curves)
    write_atomically(run.folder / CARD, text.encode("utf-8"))
    return run.folder / CARD


def render_card(run: Run, license: str | None = None, repo_id: str | None = None) -> str:
    """The text of the card; see `write_card`."""
    return str(ModelCard(f"---\n{_data(run, license).to_yaml()}\n---\n\n{_body(run, license, repo_id)}"))


def shown_pictures(folder: Path) -> list[Path]:
    """The first and the last validation picture, which the card shows; relative to the run's folder."""
    numbered = {int(match[1]): path for path in folder.glob("validation/*.png") if (match := _STEP.search(path.stem))}
    steps = sorted(numbered)
    return [numbered[step].relative_to(folder) for step in dict.fromkeys([*steps[:1], *steps[-1:]])]


_STEP = re.compile(r"(\d+)$")


def _weights(run: Path) -> tuple[str, ...]:
    if (run / LORA_FILE).is_file():
        return (LORA_FILE,)
    parts = sorted(path.parent.name for path in run.glob("*/config.json") if any(path.parent.glob("*.safetensors")))
    parts = [part for part in parts if not part.startswith("checkpoint-")]
    if not parts:
        raise ValueError(f"{run} holds no trained weights ({LORA_FILE} or a denoiser's folder); finish training first")
    return tuple(parts)


def _json(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None


# --- front matter ----------------------------------------------------------------------------------------------------


def _data(run: Run, license: str | None) -> ModelCardData:
    data = run.config.get("data") or {}
    dataset = data.get("dataset_name")
    tags = ["diffusers", "preference-alignment", run.method.replace("_", "-"), "diffalign"]
    known = is_hub_id(run.base)
    relation = "adapter" if run.is_lora else "finetune"
    return ModelCardData(
        base_model=run.base if known else None,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        library_name="diffusers",
        license=license,
        pipeline_tag=_task(run),
        tags=[*tags, "lora"] if run.is_lora else tags,
        base_model_relation=relation if known else None,
    )


# --- body ------------------------------------------------------------------------------------------------------------


def _task(run: Run) -> str | None:
    if run.family is None:
        return None
    if run.family == REFINER:
        return "image-to-image"
    return "text-to-video" if run.is_video else "text-to-image"


def _body(run: Run, license: str | None, repo_id: str | None) -> str:
    blocks = [f"# {(repo_id or run.folder.resolve().name).rpartition('/')[2]}", _summary(run)]
    blocks += ["## Use", *_use(run, repo_id)]
    blocks += ["## Training", *_training(run)]
    blocks += ["## Evaluation", *_evaluation(run)]
    blocks += ["## Reproduce", _fenced("\n".join(_commands(run)), "bash"), "The configuration, `config.yaml`:"]
    text = yaml.safe_dump(dict(run.config), sort_keys=False)
    blocks += [f"<details><summary>config.yaml</summary>\n\n{_fenced(text.strip(), 'yaml')}\n\n</details>"]
    terms = f"{_plain(license)}." if license else "None was stated for these weights."
    blocks += ["## Licence", f"{terms} They derive from {_code(run.base)}: see the terms of that model."]
    return "\n\n".join(blocks) + f"\n\nWritten by diffalign {__version__}.\n"


def _summary(run: Run) -> str:
    lora = run.config["model"].get("lora") or {}
    kind = "All weights of the denoiser"
    if run.is_lora:
        alpha = lora.get("alpha") or lora.get("rank")
        kind = f"LoRA weights (rank {lora['rank']}, alpha {alpha:g})" if lora else "LoRA weights"
    family = f" ({run.family})" if run.family else ""
    text = f"{kind} for {_code(run.base)}{family}, aligned with preferences by the method {_code(run.method)}."
    if run.facts.get("negative_model"):
        text += (
            " They are a negative model, for the unconditional branch of guidance: what they draw by themselves is "
            "what guidance then turns away from."
        )
    earlier = run.facts.get("started_from")
    if earlier:
        text += (
            f" Training went on from the weights {_code(earlier)}, which are contained in these: load these alone on "
            "the base model."
        )
    return text


def _use(run: Run, repo_id: str | None) -> list[str]:
    place = repo_id or "path/to/this/folder"
    base = repr(run.base) if is_hub_id(run.base) else '"path/to/the/base/model"'
    negative = run.facts.get("negative_model")
    if run.base.startswith(BUILTIN) or negative:
        model = repr(run.base) if run.base.startswith(BUILTIN) else base
        code = "import diffalign as da\n"
        if repo_id:
            code += f"from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({repo_id!r})\n"
        adapter = "folder" if repo_id else repr(place)
        code += f"\npolicy = da.load_policy({model}{'' if negative else f', adapter={adapter}'})\n"
        if negative:
            code += f"policy.put_negative({adapter})\n"
        draw = f'policy.sample(["a red cube"], seeds=[0]{", negative=True" if negative else ""})'
        return [_fenced(f"{code}images = {draw}  # [1, 3, H, W] in [0, 1]", "python")]
    if run.is_lora:
        code = (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({base})\npipe.load_lora_weights({place!r})"
        )
        for path in sorted(run.folder.glob(f"{Path(LORA_FILE).stem}_*.safetensors")):  # of a second expert
            part = path.stem.removeprefix(f"{Path(LORA_FILE).stem}_")
            code += f"\npipe.load_lora_weights({place!r}, weight_name={path.name!r}, load_into_{part}=True)"
        if run.family == REFINER:
            code += '\nbetter = pipe("a red cube", image=image, strength=0.3).images[0]  # a refiner needs an image'
        note = "`diffalign export` writes the same adapter for programs that read kohya's or ComfyUI's key layout."
        return [_fenced(code, "python"), note]
    parts = {part: (_json(run.folder / part / "config.json") or {}).get("_class_name") for part in run.weights}
    code = f"from diffusers import DiffusionPipeline, {', '.join(sorted({str(kind) for kind in parts.values()}))}\n\n"
    code += "".join(f'{part} = {kind}.from_pretrained({place!r}, subfolder="{part}")\n' for part, kind in parts.items())
    arguments = ", ".join(f"{part}={part}" for part in parts)
    return [_fenced(f"{code}pipe = DiffusionPipeline.from_pretrained({base}, {arguments})", "python")]


def _training(run: Run) -> list[str]:
    training = run.config.get("training") or {}
    lines = [f"- {text}" for text in _data_lines(run)]
    if "method" in run.facts:
        lines.append(f"- Method: {_plain(run.facts['method'])}")
    batch = training.get("per_device_train_batch_size", 1) * training.get("gradient_accumulation_steps", 1)
    if "max_train_steps" in training:
        rate = f" at a learning rate of {training['learning_rate']:g}" if "learning_rate" in training else ""
        lines.append(f"- {training['max_train_steps']} optimizer steps of {batch} pairs per process{rate}")
    blocks = ["\n".join(lines)]
    if panels(read_series(run.folder / "metrics.jsonl")):
        blocks += [f"![Loss and implicit accuracy over the optimizer steps]({CURVES})", _LEGEND]
    pictures = shown_pictures(run.folder)
    if pictures:
        prompts = "; ".join(_plain(prompt) for prompt in training.get("validation_prompts") or ())
        blocks.append(f"Validation pictures ({prompts}):" if prompts else "Validation pictures:")
        blocks += [f"![{path.stem}]({path.as_posix()})" for path in pictures]
    return blocks


_LEGEND = (
    "Implicit accuracy is the share of pairs whose chosen side gained more likelihood over the reference than the "
    "rejected one, by the training objective; it starts at one half."
)


def _data_lines(run: Run) -> list[str]:
    data, pairs, lines = run.config.get("data"), run.config.get("pairs"), []
    if data:
        where = data.get("dataset_name") or Path(str(data.get("train_data_dir"))).name
        lines.append(f"Preference pairs: {_code(where)}, split {_code(data.get('split', 'train'))}")
    elif pairs:
        lines.append(
            f"Preference pairs: drawn with {_code(run.base)} for the prompts {_code(pairs['prompts'])}, "
            f"{pairs['num_images_per_prompt']} pictures each, best against worst by the reward model "
            f"{_code(pairs['reward_model'])}"
        )
    elif rollout := run.config.get("rollout"):
        judge = "people" if rollout["labels"] == "human" else f"the reward model {_code(rollout['reward_model'])}"
        lines.append(
            f"Preference pairs: drawn by the model itself while it was trained, in rounds of "
            f"{rollout['prompts_per_round']} prompts from {_code(rollout['prompts'])} with "
            f"{rollout['num_images_per_prompt']} pictures each, ranked by {judge}"
        )
    manifests = sorted((run.folder / "cache").glob(f"{run.facts.get('cache', '*')}/{MANIFEST}"))
    if len(manifests) == 1:  # several, in a run that did not note its own: the folder does not tell which was used
        manifest = _json(manifests[0]) or {}
        size = "x".join(str(side) for side in manifest["size"])  # height x width
        lines.append(f"Read: {ReadReport.from_json(manifest['report']).summary()}, at {size} px")
    if "pairs" in run.facts:
        held = (run.config.get("training") or {}).get("num_validation_pairs") or 0
        aside = f"; about {held} more, by whole prompts, were set aside for validation" if held else ""
        lines.append(f"Trained on {run.facts['pairs']} of them{aside}")
    return lines


def _evaluation(run: Run) -> list[str]:
    path = run.folder / "evaluation" / "comparison.json"
    comparison = public(_json(path))
    if comparison is None:
        return ["Not evaluated yet; `diffalign evaluate config.yaml` compares base and aligned model."]
    try:
        sampling = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in comparison["sampling"].items())
        count = comparison["n_expected"] - comparison["n_missing"]
        partial = " (partial: pairs are missing)" if comparison["partial"] else ""
        blocks = [f"Base against aligned, equal prompts, seeds and sampler: {count} pairs{partial}; {sampling}."]
        blocks += [_table(_scorers(comparison["scores"])), _table(_judge(comparison["scores"]))]
        blocks.append("\n".join(f"- Warning: {_plain(text)}" for text in comparison["warnings"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a comparison ({error!r} is missing); evaluate the run again") from error
    return [block for block in blocks if block]


def _scorers(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per scorer of a comparison's JSON."""
    rows = []
    for name, win in scores.items():
        kind, _, scorer = name.partition("/")
        if kind != "win_rate":
            continue
        gain = scores[f"difference/{scorer}"]
        counts = "/".join(str(win["details"].get(key, 0)) for key in ("wins", "ties", "losses"))
        rows.append(
            {
                "scorer": scorer,
                "base": _number(gain["details"].get("base")),
                "aligned": _number(gain["details"].get("aligned")),
                "difference [95 %]": f"{_number(gain['value'], '+.3g')} {_interval(gain, '+.3g')}",
                "win rate [95 %]": f"{_number(win['value'], '.1%')} {_interval(win, '.1%')}",
                "wins/ties/losses": counts,
                "pairs": str(win["n"]),
            }
        )
    return rows


def _judge(scores: Mapping[str, Any]) -> list[dict[str, str]]:
    """The judge's share of right pictures, where a benchmark gave verdicts."""
    sides = {side: scores[f"judge_score/{side}"] for side in _JUDGED if f"judge_score/{side}" in scores}
    row = {side: f"{_number(s['value'], _JUDGED[side])} {_interval(s, _JUDGED[side])}" for side, s in sides.items()}
    return [{"judge": "share of right pictures", **row}] if row else []


_JUDGED = {"base": ".1%", "aligned": ".1%", "difference": "+.1%"}


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _interval(score: Mapping[str, Any], form: str) -> str:
    if score.get("ci95") is None:
        return ""
    low, high = score["ci95"]
    return f"[{low:{form}}, {high:{form}}]"


def _commands(run: Run) -> list[str]:
    if run.facts.get("commands"):
        return [str(line) for line in run.facts["commands"]]
    stages = ["train", "evaluate"]
    if run.config.get("pairs") and not run.config.get("data"):
        stages.insert(0, "pairs")
    return [shlex.join(["diffalign", stage, "config.yaml"]) for stage in stages]


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    heads = list(rows[0])
    lines = [heads, [":--", *("--:" for _ in heads[1:])], *([_plain(row[head]) for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: object) -> str:
    """Text of the run that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _code(value: object) -> str:
    """Inline code that its own backticks cannot end."""
    return "`" + " ".join(str(value).split()).replace("`", "'") + "`"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


# --- the command -----------------------------------------------------------------------------------------------------


def card(run_dir: str, license: str | None = None, repo_id: str | None = None) -> str:
    """Body of `diffalign card`."""
    return f"model card: {write_card(run_dir, license=license, repo_id=repo_id)}"
