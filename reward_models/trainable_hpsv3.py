"""HPSv3 as something to train: mean and deviation of a picture's worth, read at one added token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.data.compared import Comparison
from diffalign.reward_models.hpsv3 import HPSv3
from diffalign.reward_models.qwen_heads import MarkedText, VisionTokens, pad_rows
from diffalign.reward_models.trainable import Tensors, Trainable, TrainingDropout, halves, thaw

__all__ = ["TrainableHPSv3"]


class TrainableHPSv3(Trainable):
    """HPSv3 with its head, the embedding of its token, and groups of layers thawed.

    Of the embeddings only the added tokens' rows are trained, as a small parameter of their own: the original trains
    the whole matrix and puts all other rows back after every step, which comes to the same and costs its optimizer
    state.
    """

    model: HPSv3

    def __init__(self, model: HPSv3) -> None:
        super().__init__(model)
        table = model.scorer.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        self.first_new = table.num_embeddings - len(model.reward_tokens)
        self.new_rows = nn.Parameter(table.weight[self.first_new :].detach().clone())
        table.register_forward_hook(self._embed_new)
        assert isinstance(model.scorer.rm_head, nn.Sequential)
        model.scorer.rm_head[2] = TrainingDropout(0.05)

    def _embed_new(self, _: nn.Module, arguments: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        """Embeddings with the trained rows in the places of the added tokens."""
        numbers = arguments[0] - self.first_new
        new = F.embedding(numbers.clamp(min=0), self.new_rows).to(embedded)
        return torch.where((numbers >= 0)[..., None], new, embedded)

    def collate(self, first: Sequence[VisionTokens], second: Sequence[VisionTokens]) -> tuple[Tensor, Tensor, Tensors]:
        """Patches of all pictures below each other, and their grids [B, 3]: pictures differ in size."""
        grids = {
            name: torch.tensor([item.grid for item in items]) for name, items in (("first", first), ("second", second))
        }
        return torch.cat([item.patches for item in first]), torch.cat([item.patches for item in second]), grids

    def read_texts(self, comparisons: Sequence[Comparison]) -> Tensors:
        """Token ids [B, L], padded, how many they are [B], and where the reward token is [B]."""
        texts = self.model.encode_text([item.prompt for item in comparisons], len(comparisons))
        ids, mask = pad_rows([text.ids for text in texts], torch.device("cpu"))
        return {"ids": ids, "lengths": mask.sum(1), "marks": torch.tensor([text.marks[0] for text in texts])}

    def forward(self, first: Tensor, second: Tensor, texts: Mapping[str, Tensor]) -> Tensors:
        """See `Trainable`; `log_deviations` is the logarithm of sigma."""
        words = [
            MarkedText(tuple(ids[:length]), (mark,))
            for ids, length, mark in zip(
                texts["ids"].tolist(), texts["lengths"].tolist(), texts["marks"].tolist(), strict=True
            )
        ]
        media = [*_items(first, texts["first"]), *_items(second, texts["second"])]
        means, log_deviations = self.model.outputs(media, [*words, *words])[:, 0].unbind(-1)
        return {"rewards": halves(means), "log_deviations": halves(log_deviations)}

    def thaw(self, image_groups: int | None, text_groups: int | None) -> None:
        """See `Trainable`; head and added tokens are always trained, the other embeddings never."""
        body = self.model.scorer.model
        thaw([(f"visual.{name}", weight) for name, weight in body.visual.named_parameters()], image_groups)
        thaw(body.language_model.named_parameters(), text_groups)
        body.get_input_embeddings().requires_grad_(False)
        self.model.scorer.rm_head.requires_grad_(True)
        self.new_rows.requires_grad_(True)

    def save(self, folder: Path) -> None:
        """HPSv3.safetensors with the published names, without the language-model head that no score needs."""
        folder.mkdir(parents=True, exist_ok=True)
        state = self._state("model.scorer.")
        name = "model.language_model.embed_tokens.weight"
        new = self._state("")["new_rows"]
        state[name] = torch.cat([state[name][: self.first_new], new.to(state[name])])
        save_file({_published(n): v for n, v in state.items()}, folder / self.model.info.weights[0].filename)
        self.model.tokenizer.save_pretrained(folder)


def _published(name: str) -> str:
    """The published name of a tensor: the decoder is `model.*` there and the vision tower `visual.*`."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    return name.replace("model.language_model.", "model.", 1)


def _items(patches: Tensor, grids: Tensor) -> list[VisionTokens]:
    shapes: list[tuple[int, int, int]] = [(t, h, w) for t, h, w in grids.tolist()]
    parts = torch.split(patches, [t * h * w for t, h, w in shapes])
    return [VisionTokens(part, shape) for part, shape in zip(parts, shapes, strict=True)]
