"""VQAScore: how probable it is that a model answers "Yes" when asked whether the picture shows the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from diffalign.devices import resolve_device
from diffalign.reward_models.answering import Answer, Question
from diffalign.reward_models.base import RewardInfo, Scores, WeightSpec, broadcast
from diffalign.reward_models.chat_server import ChatServer
from diffalign.reward_models.clip_flant5 import CLIPFlanT5, is_clip_flant5, load_clip_flant5
from diffalign.reward_models.judging import Asked, Judge, find_answerer, loading, somebody_is_asked
from diffalign.reward_models.media import Media

__all__ = ["VQAScore"]

QUESTION = 'Does this figure show "{}"? Please answer yes or no.'
YES, NO = ("Yes", "yes", "YES", " Yes", " yes"), ("No", "no", "NO", " No", " no")
"""Forms of the answer; the first is the one that counts unless all are added."""


class VQAScore(Judge):
    """The probability of the answer "Yes", in [0, 1].

    Source: Lin et al. 2024, "Evaluating Text-to-Visual Generation with Image-to-Text Generation" (arXiv:2404.01291).
    Who is asked decides what exactly it is, and scores of different models are not comparable:

    - CLIP-FlanT5, the paper's model: sqrt(p(Yes) p(</s> | Yes)), as the released code computes it; differentiable.
    - A chat VLM of transformers: p(Yes) as the first token of the answer.
    - A server: p(Yes) / (p(Yes) + p(No)) from the 20 most probable first tokens. A form that is not among them counts
      as impossible; if neither is, there is no score.
    """

    info = RewardInfo(
        name="vqa_score",
        license="Apache-2.0 (code; that of the weights is not confirmed here)",
        weights=(WeightSpec("zhiqiulin/clip-flant5-xxl", "pytorch_model.bin.index.json", "torch"),),
        nominal_range=(0.0, 1.0),
        tau=1.0,  # not fitted
        min_vram_gb=45.0,
    )

    def __init__(
        self,
        path_or_id: str | Path | None = None,
        *,
        question: str = QUESTION,
        form: Literal["probability", "conditional"] | None = None,
        all_spellings: bool = False,
        vision_tower: str | Path | None = None,
        tokenizer: str | Path | None = None,
        **asked: Unpack[Asked],
    ):
        """Loads CLIP-FlanT5 or finds who answers.

        Args:
            path_or_id: Folder or Hub id of CLIP-FlanT5 or of a chat VLM of transformers, which its config tells; None
                is the published CLIP-FlanT5-xxl, unless somebody else is asked.
            question: What is asked, with "{}" for the prompt.
            form: For chat VLMs, p(Yes) or p(Yes) / (p(Yes) + p(No)); None is the first in this process and the second
                for a server.
            all_spellings: For chat VLMs, whether "yes", "YES" and " Yes" count as well, and those of "No".
            vision_tower: Folder or Hub id of CLIP-FlanT5's CLIP; None is the one its config names.
            tokenizer: Folder or Hub id of CLIP-FlanT5's tokenizer; None is beside the weights, or FLAN-T5's.
            asked: Who answers, and where a model in this process runs; see `judging.Asked`.

        Raises:
            ValueError: If an option is unknown or does not fit the others.
            WeightsError: If weights or tokenizer cannot be loaded.
        """
        if "{}" not in question:
            raise ValueError(f"expected a question with '{{}}' for the prompt, got {question!r}")
        if form not in (None, "probability", "conditional"):
            raise ValueError(f"form must be 'probability' or 'conditional', got {form!r}")
        chat, where = somebody_is_asked(asked), loading(asked)
        device, local_files_only = where["device"], where["local_files_only"]
        if path_or_id is None and not chat:
            path_or_id = VQAScore.info.weights[0].repo
        flant5: CLIPFlanT5 | None = None
        if not chat and path_or_id is not None and is_clip_flant5(VQAScore.info, path_or_id, local_files_only):
            if form is not None or all_spellings:
                raise ValueError("CLIP-FlanT5 has one form of score; form and all_spellings are for chat VLMs")
            flant5 = load_clip_flant5(
                VQAScore.info, path_or_id, vision_tower=vision_tower, tokenizer=tokenizer, dtype=where["dtype"],
                local_files_only=local_files_only,
            )  # fmt: skip
            device = resolve_device(device)
            super().__init__(VQAScore.info, _Nobody())
            self.flant5: CLIPFlanT5 | None = flant5.to(device)
        else:
            if vision_tower is not None or tokenizer is not None:
                raise ValueError("vision_tower and tokenizer are those of CLIP-FlanT5; a chat VLM brings its own")
            name = VQAScore.info.name + "-chat"
            info = replace(VQAScore.info, name=name, differentiable=False, generative=True, weights=_chat_weights())
            super().__init__(info, find_answerer(info, path_or_id, asked))
            self.flant5 = None
        self.question = question
        self.form = form or ("conditional" if isinstance(self.answerer, ChatServer) else "probability")
        self.words = (YES, NO) if all_spellings else (YES[:1], NO[:1])

    def preprocess(self, item: Media) -> Any:
        """See `RewardModel`."""
        return super().preprocess(item) if self.flant5 is None else self.flant5.preprocess(item)

    def encode_text(self, prompts: Sequence[str], batch_size: int) -> list[Any]:
        """The question about each prompt; for CLIP-FlanT5 as token ids."""
        questions = [self.question.replace("{}", prompt) for prompt in prompts]
        return questions if self.flant5 is None else [self.flant5.encode_question(text) for text in questions]

    def score_prepared(self, prepared: Sequence[Any], texts: Sequence[Any]) -> Scores:
        """See `RewardModel`."""
        if self.flant5 is not None:
            return Scores({"overall": self.flant5(torch.stack(list(prepared)), texts)})
        words = (*self.words[0], *self.words[1])
        asked = [Question(t, i, 1, words, self.info.name) for t, i in zip(texts, prepared, strict=True)]
        answers = self.answerer.answer(asked)
        read = [self._read(answer) for answer in answers]
        values = torch.tensor([torch.nan if isinstance(value, str) else value for value in read])
        errors = [value if isinstance(value, str) else None for value in read]
        return Scores({"overall": values}, raw=[answer.text for answer in answers], errors=errors)

    def score_tensor(self, pixels: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Scores [B] with a graph to `pixels` [B, 3, H, W] in [0, 1]; with CLIP-FlanT5 only."""
        if self.flant5 is None:
            return super().score_tensor(pixels, prompts)
        texts = broadcast(prompts, len(pixels))
        ids = dict(zip(texts, self.encode_text(texts, len(texts)), strict=True))
        wide = pixels.to(self.device, torch.promote_types(pixels.dtype, torch.float32))
        scores: Tensor = self.flant5(self.flant5.preprocess_tensor(wide), [ids[text] for text in texts])
        return scores

    def settings(self) -> dict[str, str]:
        """See `RewardModel`."""
        own = {"question": self.question}
        if self.flant5 is None:
            own |= {"form": self.form, "words": repr(self.words)}
        return {**super().settings(), **own}

    def _read(self, answer: Answer) -> float | str:
        if answer.error is not None:
            return answer.error
        yes, no = (sum(answer.probabilities.get(word, 0.0) for word in words) for words in self.words)
        if not any(word in answer.probabilities for words in self.words for word in words):
            return (
                f"neither {YES[0]!r} nor {NO[0]!r} is among the known first tokens; the answer was {answer.text!r:.60}"
            )
        if self.form == "probability":
            return yes
        return yes / (yes + no) if yes + no > 0 else "the probabilities of yes and no are both zero"


class _Nobody:
    """In the place of who is asked where CLIP-FlanT5 scores by itself."""

    identity = "clip-flant5"

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        raise AssertionError("CLIP-FlanT5 is not asked in words")


def _chat_weights() -> tuple[WeightSpec, ...]:
    return (WeightSpec("Qwen/Qwen2.5-VL-7B-Instruct", "model.safetensors.index.json"),)
