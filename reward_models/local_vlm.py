"""A chat vision-language model of transformers that answers questions in this process."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from diffalign.devices import resolve_device
from diffalign.reward_models.answering import Answer, Question
from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.weights import expected, locate, one_line

__all__ = ["LocalVLM"]

_VISION = ("pixel_values", "image_grid_thw", "image_sizes", "batch_num_images", "pixel_attention_mask")
"""What a processor gives beside values per token; with anything else, pictures are looked at for each question."""


class LocalVLM(nn.Module):
    """An `Answerer`: a chat VLM of transformers (Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, Gemma, InternVL ...).

    Decoding is greedy; the other settings of the model's generation config (a repetition penalty, end tokens) stay as
    published. Questions are answered one by one, so that no answer depends on padding or on its neighbours.

    Questions that follow each other about the same pictures, as those of a checklist do, share the part that their
    prompts have in common: the pictures pass the model once, and its keys and values are kept for all of them. Answers
    are the same but for rounding.
    """

    def __init__(
        self,
        info: RewardInfo,
        path_or_id: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] = "auto",
        local_files_only: bool | None = None,
        chat_template_options: Mapping[str, Any] | None = None,
    ):
        """Loads model and processor, completely or not at all; never code that comes with the weights.

        Args:
            info: For which reward model, for the messages.
            path_or_id: Folder in the layout of transformers, or a Hub id.
            device: As in `RewardModel.from_pretrained`.
            dtype: As in `RewardModel.from_pretrained`.
            local_files_only: As in `RewardModel.from_pretrained`.
            chat_template_options: Variables of the chat template, such as {"enable_thinking": False} for Qwen3.5.

        Raises:
            WeightsError: If something is missing, damaged, or no chat VLM that transformers knows.
        """
        super().__init__()
        source, local = locate(info, path_or_id, local_files_only)
        dtype = torch.float32 if dtype == "auto" else dtype
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(source, local_files_only=local)
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                source, local_files_only=local, dtype=dtype, output_loading_info=True, weights_only=True
            )
            _check_complete(model, report)
            tokenizer = getattr(self.processor, "tokenizer", None)
            if tokenizer is None or not self.processor.chat_template:
                raise ValueError("its processor has no tokenizer or no chat template, so it cannot be asked anything")
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, SafetensorError,
                pickle.UnpicklingError) as error:  # fmt: skip
            raise WeightsError(
                f"cannot load {info.name} from {source!r}: {one_line(error)}; expected config.json, model.safetensors, "
                f"processor and tokenizer of a chat VLM of transformers; {expected(info)}"
            ) from error
        device = resolve_device(device)
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = tokenizer
        self.chat_template_options = dict(chat_template_options or {})

    @property
    def identity(self) -> str:
        """See `Answerer`."""
        options = json.dumps(self.chat_template_options, sort_keys=True)
        return f"{type(self.model).__name__} {self.model.dtype} {options}"

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `Answerer`."""
        answers: list[Answer] = []
        for _, group in groupby(questions, key=lambda question: [id(image) for image in question.images]):
            answers += self._answer_about_the_same(list(group))
        return answers

    def _answer_about_the_same(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers to questions about the same pictures, which pass the model once where that can be."""
        first = self._read(questions[0])
        image_token = getattr(self.model.config, "image_token_id", None)
        ids = first["input_ids"]
        words = [name for name, value in first.items() if isinstance(value, Tensor) and value.shape == ids.shape]
        if len(questions) > 1 and image_token is not None and set(first) <= {*words, *_VISION}:
            texts = [{name: value for name, value in self._read(q).items() if name in words} for q in questions]
            shared = _common([text["input_ids"][0].tolist() for text in texts])
            # All pictures stand in the shared part; otherwise the template puts text before them.
            if not (ids[0, shared:] == image_token).any():
                start = {name: value[:, :shared] if name in words else value for name, value in first.items()}
                cache = self.model.base_model(**start, use_cache=True).past_key_values
                pairs = zip(questions, texts, strict=True)
                return [self._answer(q, {**text, "past_key_values": copy.deepcopy(cache)}) for q, text in pairs]
        rest = [self._answer(question, self._read(question)) for question in questions[1:]]
        return [self._answer(questions[0], first), *rest]

    def _read(self, question: Question) -> dict[str, Any]:
        """What the processor makes of pictures and text, on the model's device."""
        content = [*({"type": "image", "image": image} for image in question.images)]
        content.append({"type": "text", "text": question.text})
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            **self.chat_template_options,
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        return dict(inputs)

    def _answer(self, question: Question, inputs: Mapping[str, Any]) -> Answer:
        """The answer to a question as the processor read it; with `past_key_values`, whose tokens are not run again."""
        greedy = copy.deepcopy(self.model.generation_config)
        greedy.update(
            do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None,
            max_new_tokens=question.max_tokens, return_dict_in_generate=True, output_logits=bool(question.words),
        )  # fmt: skip
        watch = _Finite()
        output = self.model.generate(
            **inputs, generation_config=greedy, logits_processor=transformers.LogitsProcessorList([watch])
        )
        if not watch.finite:
            return Answer(error="the model's logits are not finite")
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        ends = greedy.eos_token_id if isinstance(greedy.eos_token_id, list) else [greedy.eos_token_id]
        return Answer(
            text=self.tokenizer.decode(new, skip_special_tokens=True),
            finished=new[-1].item() in ends,
            probabilities=self._probabilities(output.logits[0][0], question.words) if question.words else {},
        )

    def _probabilities(self, logits: Tensor, words: Sequence[str]) -> dict[str, float]:
        """Of each word that is one token, the probability under raw logits [V]: no penalty, no temperature."""
        probabilities = logits.float().softmax(-1)
        ids = {word: self.tokenizer.encode(word, add_special_tokens=False) for word in words}
        return {word: probabilities[i[0]].item() for word, i in ids.items() if len(i) == 1}


class _Finite(transformers.LogitsProcessor):  # type: ignore[misc]
    """Notices logits that are not finite; of NaN the first token would be "chosen" without a word.

    Minus infinity is allowed: it is what other processors and padded vocabularies write.
    """

    def __init__(self) -> None:
        self.finite = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.finite = self.finite and not bool(scores.isnan().any() or (scores == torch.inf).any())
        return scores


def _common(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, at least one of each left out: it gives the first logits of the answer."""
    longest = min(map(len, rows)) - 1
    return next((i for i in range(longest) if len({row[i] for row in rows}) > 1), longest)


def _check_complete(model: Any, report: Mapping[str, Any]) -> None:
    """Raises if a tensor of the model got no value, or one of the file went nowhere."""
    for what, key in (("missing", "missing_keys"), ("not of this model", "unexpected_keys")):
        names = sorted(report[key])
        if names:
            total = len(model.state_dict())
            raise ValueError(f"{len(names)} tensors are {what} (the model has {total}), such as {names[0]!r}")
