"""Finds published weights and loads them, completely or not at all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.clip_towers import HFTowers

__all__ = ["build_open_clip", "expected", "load_hf_towers", "locate", "one_line"]


def load_hf_towers(
    info: RewardInfo,
    path_or_id: str | Path | None,
    tokenizer: str | Path | None = None,
    local_files_only: bool | None = None,
) -> HFTowers:
    """A CLIPModel and its tokenizer from a folder or the Hub, in float32.

    `model.safetensors` is preferred; a repository with `pytorch_model.bin` only is read with `weights_only=True`,
    which refuses anything but tensors. Every tensor of the model must be in the file, and no other (but the
    position ids that old files hold).

    Args:
        info: Which model it is, for the default id and the messages.
        path_or_id: Local folder, Hub id, or None for the id in `info`.
        tokenizer: Folder or id of the tokenizer; None looks beside the weights.
        local_files_only: Never ask the Hub; None follows HF_HUB_OFFLINE.

    Raises:
        WeightsError: If something is missing, damaged, or does not belong together.
    """
    spec = info.weights[0]
    source, local = locate(info, path_or_id if path_or_id is not None else spec.repo, local_files_only)
    try:
        model = _load_clip(source, local)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, pickle.UnpicklingError) as error:
        raise WeightsError(f"cannot load {info.name} from {source!r}: {one_line(error)}; {expected(info)}") from error
    words, local = locate(info, tokenizer if tokenizer is not None else source, local_files_only)
    try:
        tokens = transformers.CLIPTokenizer.from_pretrained(words, local_files_only=local)
        # Where the files are missing, transformers 5 may give back a tokenizer that knows no word.
        if set(tokens.get_vocab()) <= set(tokens.all_special_tokens):
            raise OSError("there is no vocabulary")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise WeightsError(
            f"cannot load the tokenizer of {info.name} from {words!r}: {one_line(error)}; expected tokenizer.json, or "
            "vocab.json and merges.txt, there or in the local folder of the weights"
        ) from error
    _check_tokenizer(info, tokens, model.config.text_config, words)
    return HFTowers(model, tokens)


def locate(info: RewardInfo, path_or_id: str | Path, local_files_only: bool | None) -> tuple[str, bool]:
    """A local path or a Hub id as text, and whether to stay off the network for it.

    Raises:
        WeightsError: If it can only be a local path and there is nothing.
    """
    path = Path(path_or_id).expanduser()
    if path.exists():
        return str(path), True
    text = str(path_or_id)
    if isinstance(path_or_id, Path) or text.startswith(("/", ".", "~")) or text.count("/") != 1:
        raise WeightsError(f"cannot load {info.name}: there is no folder or file {text!r}; {expected(info)}")
    return text, bool(local_files_only)


def expected(info: RewardInfo) -> str:
    """What a message says about where the weights are and how to go without the Hub."""
    files = " or ".join(dict.fromkeys(f"{w.filename!r} of Hub id {w.repo!r}" for w in info.weights if w.repo))
    where = f"expected {files}" if files else f"expected {info.weights[0].filename!r} in a local folder"
    return f"{where}; without network, copy it to a local folder and pass the folder as path"


def one_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    if isinstance(error, pickle.UnpicklingError):  # its own text advises to load what was refused
        return "the file is damaged or holds more than plain tensors, and is not executed"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__


def _load_clip(source: str, local_files_only: bool) -> transformers.CLIPModel:
    folder = Path(source)
    if folder.is_dir():
        files = {f.name for f in folder.iterdir()}
        safe = bool(files & {"model.safetensors", "model.safetensors.index.json"})
        if not safe and "pytorch_model.bin" not in files:
            raise OSError(f"the folder holds no model.safetensors, only: {', '.join(sorted(files)) or 'nothing'}")
        attempts = [safe]
    elif folder.is_file():
        raise OSError("expected a folder with config.json and model.safetensors, got a file")
    else:
        attempts = [True, False]
    for i, safe in enumerate(attempts):
        try:
            model, report = transformers.CLIPModel.from_pretrained(
                source,
                local_files_only=local_files_only,
                use_safetensors=safe,
                weights_only=True,
                output_loading_info=True,
                dtype=torch.float32,
            )
            break
        except OSError:
            if i == len(attempts) - 1:
                raise
    surplus = {k for k in report["unexpected_keys"] if not k.endswith("embeddings.position_ids")}
    for what, keys in (("missing", report["missing_keys"]), ("not of this model", surplus)):
        if keys:
            total = len(model.state_dict())
            raise ValueError(f"{len(keys)} tensors are {what} (the model has {total}), such as {sorted(keys)[0]!r}")
    return model


def _check_tokenizer(info: RewardInfo, tokenizer: Any, text_config: Any, source: str) -> None:
    """The end-of-text token must be the one at which the encoder is read, and all tokens must have an embedding."""
    # Published configs from before transformers 4.31 say 2, which means "the largest id of the sequence".
    end = len(tokenizer) - 1 if text_config.eos_token_id == 2 else text_config.eos_token_id
    if len(tokenizer) > text_config.vocab_size or tokenizer.eos_token_id != end:
        raise WeightsError(
            f"the tokenizer in {source!r} does not belong to {info.name}: it has {len(tokenizer)} tokens and ends "
            f"texts with id {tokenizer.eos_token_id}; the model has {text_config.vocab_size} and expects id {end}"
        )


def build_open_clip(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> open_clip.CLIP:
    """A CLIP of open_clip with these weights, in the type they have; no random initialisation, no copy.

    Args:
        config: open_clip model configuration: embed_dim, vision_cfg, text_cfg.
        state: Exactly the tensors of such a model.

    Raises:
        RuntimeError: If a tensor is missing, superfluous or of another shape.
    """
    with torch.device("meta"):
        model = open_clip.CLIP(**copy.deepcopy(dict(config)))
    model.load_state_dict(state, strict=True, assign=True)
    # The causal mask is not stored with the weights, so it is still without values.
    length = model.context_length
    model.attn_mask = torch.full((length, length), float("-inf")).triu(1)
    return model
