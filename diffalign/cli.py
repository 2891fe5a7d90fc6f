"""The command line. Thin on purpose: it parses, calls `diffalign.commands`, and turns user errors into one line.

Nothing heavy is imported before a command runs, so that `diffalign --help` answers at once; nor before a run's
configuration was read, so that a mistake in it is told at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import click

from diffalign import __version__
from diffalign.click_classes import SeveralNames, UserErrors, process_prefix
from diffalign.command_bodies import heavy, light
from diffalign.processes import is_first, leave

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
REWARD_OPTIONS = click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME.KEY=VALUE",
    help="Of a reward model, as in Python: vision_reward-video.texts=FOLDER, jpeg.quality=80; may be repeated.",
)


@click.group(cls=UserErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--debug", is_flag=True, help="Show tracebacks of user errors.")
def cli(debug: bool) -> None:
    """Preference alignment for text-to-image and text-to-video diffusion and flow models.

    pairs, rollout, sample, score, train, evaluate and evaluate-reward share their work among processes:
    `accelerate launch -m diffalign ...`
    """


@cli.command()
@click.option("--output", default="runs/demo", show_default=True, help="Folder of the run.")
@click.option("--seeds", default="0", show_default=True, help="Comma-separated seeds; several are pooled at the end.")
@click.option("--quick", is_flag=True, help="A few images and steps only: checks the installation, shows no effect.")
def demo(output: str, seeds: str, quick: bool) -> None:
    """Align the embedded model: sample pairs, score, train, evaluate, report. Nothing to download."""
    parts = [part.strip() for part in seeds.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--seeds: expected whole numbers like 0,1,2, found {seeds!r}")
    heavy()
    from diffalign import demo as body

    body.run(output, [int(part) for part in parts], quick)


@cli.command()
@click.argument("model")
@click.option("--prompts", required=True, help="Text or JSONL file, or diffalign://shapes/held_out.")
@click.option("--output", required=True, help="Folder for images/ or videos/, and index.jsonl.")
@click.option("--adapter", default=None, help="Trained weights: a run's output folder.")
@click.option("--limit", type=int, default=None, help="Take only so many prompts.")
@click.option("--num-images-per-prompt", type=int, default=1, show_default=True)
@click.option("--guidance-scale", type=float, default=None, help="Default: what the model's family is sampled with.")
@click.option("--num-inference-steps", type=int, default=None, help="Likewise.")
@click.option("--height", type=click.IntRange(min=1), default=None, help="In pixels, with --width; likewise.")
@click.option("--width", type=click.IntRange(min=1), default=None)
@click.option("--num-frames", type=click.IntRange(min=1), default=None, help="Of a video; likewise.")
@click.option("--fps", type=float, default=None, help="Frames per second of the video files; likewise.")
@click.option("--batch-size", type=int, default=None, help="Default: 8 images or 1 video.")
@click.option("--torch-compile", is_flag=True, help="Compile the denoiser first: for many pictures on a GPU.")
@click.option(
    "--deep-cache", type=click.IntRange(min=1), default=None, help="Of UNets: compute all every N steps only."
)
@click.option("--first-block-cache", type=click.FloatRange(min=0), default=None, help="Of transformers: threshold.")
@click.option("--reward-guidance", default=None, help="Folder of a reward model that `train-reward` made.")
@click.option("--reward-weights", default="", help="Of its dimensions, such as VQ=0.5,TA=1; default: 1 for all.")
@click.option("--reward-scale", type=float, default=1.0, show_default=True, help="Strength of its guidance.")
@click.option("--negative-model", default=None, help="Weights for guidance to turn away from: an npo run's folder, ...")
@click.option("--negative-alpha", type=float, default=1.0, show_default=True, help="Share of --adapter in them, 0..1.")
@click.option("--negative-scale", type=float, default=1.0, show_default=True, help="Share of their own training, 0..1.")
@click.option("--seed", type=int, default=0, show_default=True)
def sample(
    model: str,
    prompts: str,
    output: str,
    adapter: str | None,
    limit: int | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    reward_weights: str,
    **sampling: Any,
) -> None:
    """Sample images or videos from MODEL (folder, Hub id or diffalign://shapes). Goes on where it was stopped."""
    if (height is None) != (width is None):
        raise ValueError("--height and --width go together; give both or neither")
    size = (height, width) if height is not None and width is not None else None
    sampling["reward_weights"] = _weights(reward_weights)
    _print(heavy().sample(model, prompts, output, adapter, limit, sampling, size, num_frames))


@cli.command()
@click.argument("config")
@OVERRIDES
def pairs(config: str, overrides: tuple[str, ...]) -> None:
    """Make preference pairs with the model of CONFIG: sample, score, keep best against worst."""
    _print(heavy(config, overrides).pairs(config, overrides))


@cli.command()
@click.argument("config")
@OVERRIDES
def rollout(config: str, overrides: tuple[str, ...]) -> None:
    """Draw the images that people label next, with the weights the run of CONFIG has now. Goes on where it stopped."""
    _print(heavy(config, overrides).rollout(config, overrides))


@cli.command(cls=SeveralNames)
@click.argument("source", metavar="INPUT")
@click.option(
    "--reward",
    "--model",
    "rewards",
    multiple=True,
    required=True,
    metavar="NAME[=PATH]...",
    help="Reward models, see `diffalign rewards`; with a path or Hub id for other weights. One behind a server is "
    "remote=http://HOST:PORT#NAME. May be repeated.",
)
@REWARD_OPTIONS
@click.option("--output", default=None, help="Scores as .jsonl or .parquet; default: scores.jsonl beside the index.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Threads that read and resize; 0: one per core.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--image-column", default=None, help="Field or column of the media; default: image, video, file_name, ..."
)
@click.option("--prompt-column", default=None, help="Field or column of the prompts; default: prompt, text, caption.")
@click.option("--histograms/--no-histograms", default=True, show_default=True, help="Draw them beside the output.")
def score(source: str, rewards: tuple[str, ...], output: str | None, **options: Any) -> None:
    """Score the images or videos of INPUT with one or more reward models. Goes on where it was stopped.

    INPUT is a folder (the prompt of a.png in a.txt, or a metadata.jsonl or .csv as imagefolder reads it), a JSONL with
    id, prompt and image, or a parquet file with paths or bytes.
    """
    _print(light().score(source, rewards, output, **options))


@cli.command("evaluate-reward")
@click.argument("rewards", nargs=-1, required=True, metavar="NAME[=PATH]...")
@click.option(
    "--benchmark",
    required=True,
    metavar="NAME|FILE",
    help="hpdv2, imagerewarddb, pickapic_v2 or videogen_rewardbench with --data, or a file of comparisons.",
)
@REWARD_OPTIONS
@click.option("--output", required=True, help="Folder for scores, comparisons and report.json.")
@click.option("--data", default=None, help="Annotations of a named benchmark: its file, or the folder with it.")
@click.option("--media-dir", default=None, help="What names of media are relative to; default: the file's folder.")
@click.option("--calibration", default=None, help="Other comparisons of its kind, to choose on where ties begin.")
@click.option("--calibration-media", default=None, help="What names of their media are relative to.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--workers", type=click.IntRange(min=0), default=0, help="Threads that read and resize; 0: one per core.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def evaluate_reward(rewards: tuple[str, ...], benchmark: str, output: str, **options: Any) -> None:
    """Measure how often reward models agree with people, on pairs or rankings. Goes on where it was stopped.

    FILE is JSONL, JSON, CSV or parquet with prompt, media_a, media_b and label (a, b, tie) or p_a, or with the columns
    of Pick-a-Pic, HPDv2, HPDv3, ImageRewardDB or VideoGen-RewardBench.
    """
    _print(light().evaluate_reward(rewards, benchmark, output, **options))


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Everything that is known, for programs.")
def rewards(as_json: bool) -> None:
    """List the reward models: kind, dimensions, licence, weights, memory, differentiable or not."""
    click.echo(light().rewards(as_json))


@cli.command("serve-reward")
@click.argument("rewards", nargs=-1, required=True, metavar="NAME[=PATH]...")
@REWARD_OPTIONS
@click.option("--host", default="127.0.0.1", show_default=True, help="Others than this machine need --token-env.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
@click.option("--token-env", default=None, help="Environment variable with the token that clients have to send.")
@click.option("--max-body", type=click.IntRange(min=1), default=64_000_000, show_default=True, help="Bytes a request.")
@click.option("--max-pixels", type=click.IntRange(min=1), default=50_000_000, show_default=True, help="Of one medium.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
def serve_reward(rewards: tuple[str, ...], **options: Any) -> None:
    """Score what other machines send over HTTP; their side is the reward model `remote`."""
    light().serve_reward(rewards, **options)


@cli.command()
@click.argument("config")
@OVERRIDES
@click.option("--dry-run", is_flag=True, help="Say what the run would train, hold in memory and compute, then stop.")
def train(config: str, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Align the model of CONFIG on its pairs.

    With several processes: accelerate launch --config_file configs/accelerate/ddp.yaml -m diffalign train CONFIG
    """
    _print(heavy(config, overrides).train(config, overrides, dry_run))


@cli.command("train-reward")
@click.argument("config")
@OVERRIDES
def train_reward(config: str, overrides: tuple[str, ...]) -> None:
    """Train the reward model that CONFIG's section `reward` describes.

    kind: scorer trains PickScore, HPSv2, ImageReward, MPS, HPSv3, PAL or the embedded CLIP on comparisons, checklist
    fits VisionReward's weights, noisy_latent makes one for `sample --reward-guidance`.
    """
    _print(heavy().train_reward(config, overrides))


@cli.command(cls=SeveralNames)
@click.argument("target", metavar="CONFIG|MODEL")
@OVERRIDES
@click.option(
    "--benchmark", "benchmarks", multiple=True, metavar="NAME...", help="Judge MODEL on these; see docs/benchmarks.md."
)
@click.option("--adapter", default=None, help="Trained weights on top of MODEL: a run's output folder.")
@click.option("--against", default=None, metavar="BASE", help="Another model to compare with, pair by pair.")
@click.option("--held-out", multiple=True, metavar="REWARD", help="Mark it as unseen by training; may be repeated.")
@click.option("--output", default=None, help="Folder for pictures, rows and reports; several models may share it.")
@click.option("--limit", type=click.IntRange(min=1), default=None, help="Take only so many prompts of each benchmark.")
@click.option("--samples", type=click.IntRange(min=1), default=None, help="Per prompt; default: the benchmark's own.")
@click.option("--stage", type=click.Choice(["generate", "score", "aggregate"]), default=None, help="Do only this one.")
@click.option(
    "--option", "options", multiple=True, metavar="NAME.KEY=VALUE", help="geneval.mode=strict; may be repeated."
)
@click.option("--guidance-scale", type=float, default=None, help="Default: what the model's family is sampled with.")
@click.option("--num-inference-steps", type=int, default=None, help="Likewise.")
@click.option("--height", type=click.IntRange(min=1), default=None, help="In pixels, with --width; likewise.")
@click.option("--width", type=click.IntRange(min=1), default=None)
@click.option("--num-frames", type=click.IntRange(min=1), default=None, help="Of a video; likewise.")
@click.option("--batch-size", type=click.IntRange(min=1), default=None, help="Default: 8 images or 1 video.")
@click.option("--torch-compile", is_flag=True, help="Compile the denoiser first: for many pictures on a GPU.")
@click.option(
    "--deep-cache", type=click.IntRange(min=1), default=None, help="Of UNets: compute all every N steps only."
)
@click.option(
    "--import", "imported", default=None, metavar="FOLDER", help="Judge pictures made elsewhere; draw nothing."
)
@click.option(
    "--export", "exported", default=None, metavar="FOLDER", help="Write pictures as the original tools read them."
)
@click.option("--training-prompts", default=None, metavar="FILE", help="Warn of a benchmark's prompts that are in it.")
def evaluate(target: str, overrides: tuple[str, ...], benchmarks: tuple[str, ...], **options: Any) -> None:
    """Compare base and aligned model of CONFIG, or judge MODEL on benchmarks: `evaluate MODEL --benchmark geneval`.

    The comparison is made at equal seeds and equal guidance. Benchmarks draw what is missing, score what is missing,
    and aggregate; killed at any moment, the same command goes on where it was.
    """
    is_config = target.lower().endswith((".yaml", ".yml"))
    if not benchmarks:
        given = [name for name, value in options.items() if value not in (None, (), False)]
        if given or not (is_config or os.path.isfile(target)):
            flag = (
                {"imported": "import", "exported": "export", "options": "option"}.get(given[0], given[0])
                if given
                else ""
            )
            found = f"--{flag.replace('_', '-')}" if given else f"{target!r}, which is no .yaml file"
            raise ValueError(
                f"evaluate takes a CONFIG, or a MODEL with --benchmark NAME; found {found} and no --benchmark"
            )
        _print(heavy(target, overrides).evaluate(target, overrides))
        return
    if is_config:
        raise ValueError(f"--benchmark judges a MODEL (folder, Hub id or diffalign://...), found the config {target!r}")
    if overrides:
        raise ValueError(f"{overrides[0]!r}: only a CONFIG takes overrides; a benchmark's are --option NAME.KEY=VALUE")
    heavy()
    from diffalign.benchmarking import evaluate_benchmarks

    _print(evaluate_benchmarks(target, benchmarks, **options))


@cli.command("evaluate-images", cls=SeveralNames)
@click.argument("folder")
@click.option(
    "--against", required=True, metavar="FOLDER|FILE", help="Reference pictures; for fid also .npz statistics."
)
@click.option(
    "--metric", "metrics", multiple=True, metavar="NAME...", default=("fid", "cmmd"), help="fid (extra `fid`), cmmd."
)
@click.option("--output", default=None, metavar="FILE", help="Write the report there, as JSON.")
@click.option("--limit", type=click.IntRange(min=2), default=None, help="Take only the first so many of each.")
@click.option("--blocks", type=click.IntRange(min=0), default=20, show_default=True, help="For intervals; 0: none.")
@click.option("--fid-weights", default=None, help="Inception's file; default: fetched once.")
@click.option("--cmmd-weights", default=None, help="Folder or Hub id of CLIP ViT-L/14 at 336 pixels.")
def evaluate_images(folder: str, against: str, metrics: tuple[str, ...], **options: Any) -> None:
    """Measure how far the pictures of FOLDER are from reference pictures: FID, CMMD."""
    heavy()
    from diffalign.benchmarking import evaluate_images as body

    click.echo(body(folder, against, metrics, **options))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output", default=None, help="Default: report.html in the run's folder, or the one that holds them all."
)
@click.option(
    "--format",
    type=click.Choice(["html", "markdown", "latex"]),
    default="html",
    show_default=True,
    help="The page, or its tables alone.",
)
@click.option("--scorer", default=None, help="The one that verdicts speak of; default: the first.")
@click.option("--force", is_flag=True, help="Let numbers of different protocols share a column.")
@click.option("--thumbnail", type=click.IntRange(32, 2048), default=None, help="Larger side of pictures, in pixels.")
@click.option("--max-images", type=click.IntRange(min=1), default=4000, show_default=True, help="An even part of more.")
def report(runs: tuple[str, ...], **options: Any) -> None:
    """Write the report of one RUN, or of several side by side, as one HTML file that needs nothing else.

    RUN is the output_dir of a training run, or the --output of an evaluation.
    """
    click.echo(light().report(runs, **options))


@cli.command()
@click.argument("source")
@click.option("--layout", type=click.Choice(["kohya", "comfyui", "diffusers"]), default="kohya", show_default=True)
@click.option("--output", required=True, help="File to write, *.safetensors; with diffusers also a folder.")
@click.option(
    "--family",
    type=click.Choice(["sd", "sdxl", "sdxl-refiner", "flux"]),
    default=None,
    help="Needed for a FLUX file outside its run's folder.",
)
def export(source: str, layout: str, output: str, family: str | None) -> None:
    """Write the LoRA of SOURCE (a run's folder or a file) in another program's key layout, or back."""
    from diffalign import lora_formats

    click.echo(lora_formats.export(source, layout, output, family))


@cli.command()
@click.argument("run_dir")
@click.option("--license", default=None, help="Licence of the weights, as the Hub names it.")
@click.option("--repo-id", default=None, help="Where it will be published, for the card's examples.")
def card(run_dir: str, license: str | None, repo_id: str | None) -> None:
    """Write the model card of a run: README.md, with data, configuration, curves and scores."""
    from diffalign import model_card

    click.echo(model_card.card(run_dir, license, repo_id))


@cli.command()
@click.argument("run_dir")
@click.argument("repo_id")
@click.option("--private", is_flag=True)
@click.option("--license", default=None, help="Licence of the weights, as the Hub names it.")
def push(run_dir: str, repo_id: str, private: bool, license: str | None) -> None:
    """Publish the weights and the model card of a run on the Hugging Face Hub, in one commit."""
    from diffalign import publishing

    click.echo(publishing.push(run_dir, repo_id, private, license))


@cli.command()
@click.option("--output", default=".", help="Folder whose disk is looked at.")
def doctor(output: str) -> None:
    """Print versions, devices, attention backends, disk, and what is missing for which feature."""
    click.echo(light().doctor(output))


def _weights(text: str) -> dict[str, float]:
    """`VQ=0.5,TA=1` as numbers by name."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError as error:
        raise ValueError(f"--reward-weights: expected numbers by name like VQ=0.5,TA=1, found {text!r}") from error


def _print(result: str) -> None:
    """Prints what a command returned; of several processes the first one does, when all are done."""
    if is_first():
        click.echo(result)
    leave()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `diffalign` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet()
    run: Callable[..., Any] = cli.main
    run(args=arguments, prog_name="diffalign", standalone_mode=True)


def _quiet() -> None:
    """Our own log lines on the terminal; the libraries' progress bars and hints off."""
    import logging

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logger = logging.getLogger("diffalign")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(f"%(levelname)s: {'' if is_first() else process_prefix()}%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if is_first() else logging.WARNING)


if __name__ == "__main__":
    main()
