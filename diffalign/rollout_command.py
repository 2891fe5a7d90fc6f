"""The body of `diffalign rollout`: draws a round of images for people to label, and goes on where it was stopped."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffalign import checkpoints
from diffalign.backbones.precision import DTYPES
from diffalign.config import ConfigError, RunConfig, trainer_settings
from diffalign.devices import pick_device
from diffalign.generation import IMAGE_FOLDER, VIDEO_FOLDER, NonFiniteImageError, to_png
from diffalign.labelling_page import labelling_page
from diffalign.processes import Processes, launched
from diffalign.resumable import claim_folder, to_line, write_atomically
from diffalign.rollout_checks import round_plan, steps_done
from diffalign.rollout_labels import to_do
from diffalign.rollout_store import FOLDER, RoundFolder, fingerprint
from diffalign.rollouts import StochasticSampler
from diffalign.rounds import RoundPrompts, chunks, round_settings
from diffalign.training import checked, training_policy
from diffalign.videos import to_mp4

__all__ = ["draw_round"]

PAGE = "label.html"


def draw_round(config: RunConfig) -> str:
    """Draws the next round of a run with the weights it has now, unless that is there already.

    Writes `images/<id>.png` or `videos/<id>.mp4`, the trajectories that training needs, and at the end `label.html` and
    `index.jsonl` with one row for each image. A rerun goes on where a killed one was, and gives the same bytes; several
    processes share the work.

    Args:
        config: A run with `rollout.labels: human`.

    Returns:
        What to do next.

    Raises:
        ValueError: If the configuration asks for something else, the run is in the middle of a round, or the folder
            holds a round of other settings.
    """
    source = checked(config)
    trainer_class, settings = trainer_settings(config)
    rollout = config.rollout
    if rollout is None or rollout.labels != "human":
        raise ConfigError(
            "`diffalign rollout` draws images for people to label; set rollout.labels: human and leave out "
            "rollout.reward_model (with a reward model, `diffalign train` draws its rounds itself)"
        )
    plan, (checkpoint, step) = round_plan(config, settings), steps_done(config)
    if checkpoint is not None:
        checkpoints.compare_settings(checkpoint, config.model_dump(mode="json"))
    number, inside = divmod(step, plan.steps_per_round)
    if inside:
        raise ConfigError(
            f"{checkpoint} lies within round {number}, which training has not finished; run `diffalign train` first"
        )
    if step >= config.training.max_train_steps:
        return f"training.max_train_steps, {config.training.max_train_steps}, are done; no round is left to draw"
    root = Path(config.output_dir) / FOLDER
    found = RoundFolder(root, number, {})
    if not found.index.is_file():
        policy: Any = training_policy(config, source, torch.device(pick_device()))
        if checkpoint is not None:
            policy.load_trained(checkpoint)
        sampler = trainer_class(policy, settings).sampler
        with torch.autocast(
            pick_device().partition(":")[0],
            DTYPES[config.training.mixed_precision],
            enabled=config.training.mixed_precision != "no",
        ):
            _draw(config, sampler, root, number, launched())
    reason = to_do(found, rollout)
    return reason or f"round {number} in {found.path} is drawn and labelled; run `diffalign train`"


def _draw(config: RunConfig, sampler: StochasticSampler, root: Path, number: int, processes: Processes) -> None:
    rollout, policy = config.rollout, sampler.policy
    assert rollout is not None
    every = [row.prompt for row in rollout.read_prompts(config.seed)]
    prompts = RoundPrompts(every, config.seed, rollout.prompts_per_round)
    facts = round_settings(sampler, prompts, rollout, None)
    store, weights = RoundFolder(root, number, facts), fingerprint(policy.trained_state())
    kind, media = ("video", VIDEO_FOLDER) if policy.is_video else ("image", IMAGE_FOLDER)
    fps = config.sampling.fps or policy.frame_rate

    def name(group: int, image: int) -> str:
        ending = "mp4" if policy.is_video else "png"
        return f"{media}/{store.image_id(group, image)}.{ending}"

    def claim() -> None:
        model = {"model": config.model.pretrained_model_name_or_path, "adapter": config.model.adapter}
        claim_folder(store.path, {**model, "weights": weights, **facts}, (media,))
        (store.path / media).mkdir(exist_ok=True)

    processes.on_first(claim)
    todo = processes.share(chunks(rollout.prompts_per_round, rollout))
    with tqdm(total=sum(map(len, todo)), desc=processes.label("drawing"), unit="prompt") as progress:
        for chunk in todo:
            if not all(store.weights(group) == weights for group in chunk):
                asked, draws = zip(*(prompts(number, group) for group in chunk), strict=True)
                drawn = sampler.rollout(asked, draws, rollout.num_images_per_prompt, rollout.batch_size)
                pictures = sampler.decode(drawn, rollout.batch_size).chunk(len(chunk))
                for place, (group, own) in enumerate(zip(chunk, pictures, strict=True)):
                    for image, picture in enumerate(own):
                        content = partial(to_mp4, fps=fps) if policy.is_video else to_png
                        path = store.path / name(group, image)
                        write_atomically(path, content(_finite(picture, store.image_id(group, image), asked[place])))
                    store.write(group, drawn.of_prompt(place), weights)  # last: a prompt with this file is done
            progress.update(len(chunk))
    processes.wait()

    def index() -> None:
        rows = []
        for group in range(rollout.prompts_per_round):
            prompt = prompts(number, group)[0]
            for image in range(rollout.num_images_per_prompt):
                own = {"id": store.image_id(group, image), "prompt_id": f"r{number}-{group:05d}", "prompt": prompt}
                rows.append({**own, kind: name(group, image)})
        title = f"round {number}, {weights[:8]}"
        write_atomically(store.path / PAGE, labelling_page(title, rows).encode())
        write_atomically(store.index, "".join(map(to_line, rows)).encode())

    processes.on_first(index)


def _finite(picture: Tensor, name: str, prompt: str) -> Tensor:
    if not bool(picture.isfinite().all()):
        raise NonFiniteImageError(
            f"{name} is not finite (prompt {prompt!r}); the weights may have diverged: resume an earlier checkpoint "
            "with a lower learning rate"
        )
    return picture
