"""PAL's preference model: items and people as points of one space, people as mixtures of a few prototypes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffalign.reward_models.base import RewardInfo, WeightsError
from diffalign.reward_models.checkpoints import load_complete, read_tensors
from diffalign.reward_models.weights import one_line

__all__ = ["PALConfig", "PALHead", "fit_user"]


@dataclass(frozen=True)
class PALConfig:
    """Shape of the preference model.

    Attributes:
        form: "A": a person is a point; "B": a point that depends on the prompt.
        prototypes: How many a person is a mixture of, K >= 1; the released configurations have 1 or 2.
        users: Names of the people it was trained with.
        in_dim: Width of image and text embeddings.
        out_dim: Width of the space of points; that of embeddings where `ideal` is "mix".
        hidden: Hidden layers of each projector; 2 in the released configurations.
        activation: Of the hidden layers.
        batch_norm: Whether hidden layers are normalised over the batch; by stored statistics once trained.
        dropout: Rate in the hidden layers while training.
        residual: Whether projectors add what they read; needs `out_dim` equal to `in_dim`.
        ideal: Form A only: the person's point of weights w and prototypes P is "project_then_mix" w f(P),
            "mix_then_project" f(w P), or "mix" w P.
        preference: Score of an item: minus its "distance" to the person's point, or exp(s) times the cosine ("angle").
    """

    form: Literal["A", "B"] = "B"
    prototypes: int = 2
    users: tuple[str, ...] = ()
    in_dim: int = 1024
    out_dim: int = 1024
    hidden: int = 2
    activation: Literal["gelu", "relu"] = "gelu"
    batch_norm: bool = False
    dropout: float = 0.0
    residual: bool = False
    ideal: Literal["project_then_mix", "mix_then_project", "mix"] = "project_then_mix"
    preference: Literal["distance", "angle"] = "angle"

    def __post_init__(self) -> None:
        choices = {"form": ("A", "B"), "activation": ("gelu", "relu"), "preference": ("distance", "angle"),
                   "ideal": ("project_then_mix", "mix_then_project", "mix")}  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.prototypes < 1 or self.hidden < 0:
            raise ValueError(f"prototypes must be at least 1 and hidden 0, got {self.prototypes} and {self.hidden}")
        if self.residual and self.in_dim != self.out_dim:
            raise ValueError(f"residual needs equal widths, got in_dim {self.in_dim} and out_dim {self.out_dim}")


class PALHead(nn.Module):
    """Scores of items for people, from frozen embeddings.

    Source: Chen et al. 2024, "PAL: Pluralistic Alignment Framework for Learning from Heterogeneous Preferences"
    (arXiv:2406.08469): the ideal-point model with K prototypes and a person's weights on the simplex. The difference of
    two scores is the logit of the first being preferred.

    Training: cross entropy or hinge on that difference over all parameters; a new person needs `fit_user` only.
    """

    def __init__(self, config: PALConfig):
        super().__init__()
        self.config = config
        self.items = _projector(config)
        if config.form == "B":
            self.texts = nn.ModuleList(_projector(config) for _ in range(config.prototypes))
        else:
            width = config.out_dim if config.ideal == "mix" else config.in_dim
            self.prototypes = nn.Parameter(torch.randn(config.prototypes, width) * width**-0.5)
        self.user_logits = nn.Parameter(torch.zeros(len(config.users), config.prototypes))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())  # CLIP's own start, as in the released code

    def weights(self, user: str | int) -> Tensor:
        """A known person's weights [K], on the simplex.

        Raises:
            ValueError: If there is no such person.
        """
        users = self.config.users
        if user in users:
            return self.user_logits[users.index(str(user))].softmax(-1)
        if isinstance(user, int) and 0 <= user < len(users):
            return self.user_logits[user].softmax(-1)
        known = ", ".join(map(repr, users[:10])) or "none"
        raise ValueError(f"unknown user {user!r} (there are {len(users)}: {known}{', ...' if len(users) > 10 else ''})")

    def ideal(self, texts: Tensor, weights: Tensor) -> Tensor:
        """Points [B, E] of people with weights [K] or [B, K], for prompts with embeddings [B, D]."""
        if self.config.form == "B":
            points = torch.stack([project(texts) for project in self.texts], dim=-2)
            return (weights[..., None] * points).sum(-2)
        if self.config.ideal == "mix":
            point = weights @ self.prototypes
        elif self.config.ideal == "mix_then_project":
            # Batch normalisation takes no bare vectors.
            point = self.items((weights @ self.prototypes).view(-1, self.config.in_dim))
        else:
            point = weights @ self.items(self.prototypes)
        ideal: Tensor = point.expand(len(texts), -1)
        return ideal

    def prefer(self, points: Tensor, ideal: Tensor) -> Tensor:
        """Scores [B] of items at `points` [B, E] for people at `ideal` [B, E]."""
        if self.config.preference == "distance":
            scores: Tensor = -torch.linalg.vector_norm(points - ideal, dim=-1)
        else:
            scores = self.logit_scale.exp().clamp(max=100.0) * F.cosine_similarity(points, ideal, dim=-1)
        return scores

    def forward(self, images: Tensor, texts: Tensor, weights: Tensor) -> Tensor:
        """Scores [B] of images with embeddings [B, D], for prompts [B, D] and people's weights [K] or [B, K]."""
        return self.prefer(self.items(images), self.ideal(texts, weights))

    def add_user(self, name: str, logits: Tensor) -> None:
        """Makes one more person known, with these logits [K] of their weights.

        Raises:
            ValueError: If the name is taken.
        """
        if name in self.config.users:
            raise ValueError(f"user {name!r} is known already; take another name")
        rows = torch.cat([self.user_logits.detach(), logits.to(self.user_logits)[None]])
        self.user_logits = nn.Parameter(rows, requires_grad=self.user_logits.requires_grad)
        self.config = replace(self.config, users=(*self.config.users, name))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with the configuration in its header."""
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, path, metadata={"pal": json.dumps(asdict(self.config))})

    @classmethod
    def load(cls, info: RewardInfo, path: Path) -> Self:
        """What `save` wrote, in float32, completely or not at all.

        Raises:
            WeightsError: If the file is damaged or not such a file.
        """
        state = read_tensors(info, path)
        try:
            with safe_open(path, "pt") as file:
                config = _config(json.loads((file.metadata() or {})["pal"]))
        except KeyError as error:
            raise WeightsError(
                f"{str(path)!r} has no configuration of PAL in its header; write it with save"
            ) from error
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise WeightsError(f"cannot read the configuration of PAL in {str(path)!r}: {one_line(error)}") from error
        head = cls(config)
        load_complete(info, head, state, path)
        return head


def fit_user(head: PALHead, chosen: Tensor, rejected: Tensor, texts: Tensor, ridge: float = 0.01) -> Tensor:
    """Logits [K] of a new person's weights, from k pairs; everything else stays as it is.

    Minimises the mean of -log sigmoid(chosen - rejected) plus ridge / 2 |logits|^2 by L-BFGS in float64, from equal
    weights; no chance is involved. The ridge keeps few and unanimous pairs from making a person all one prototype;
    it is this project's, as is L-BFGS in place of the paper's steps of Adam.

    Args:
        head: The trained model, in evaluation mode.
        chosen: Image embeddings [k, D] that the person preferred.
        rejected: Image embeddings [k, D] of the other halves.
        texts: Embeddings [k, D] of the prompts.
        ridge: Strength of the pull to equal weights, > 0.

    Raises:
        ValueError: If there are no pairs, or not as many of each, or `ridge` is not positive.
    """
    if not len(chosen) == len(rejected) == len(texts) or not len(chosen):
        raise ValueError(f"expected k >= 1 of each, got {len(chosen)}, {len(rejected)} and {len(texts)}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    wide = PALHead(head.config).to(chosen.device, torch.float64).requires_grad_(False).eval()
    wide.load_state_dict(head.state_dict())
    with torch.no_grad():
        points = [wide.items(part.double()) for part in (chosen, rejected)]
    logits = torch.zeros(head.config.prototypes, dtype=torch.float64, device=chosen.device, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        search.zero_grad()
        ideal = wide.ideal(texts.double(), logits.softmax(-1))
        difference = wide.prefer(points[0], ideal) - wide.prefer(points[1], ideal)
        loss = F.softplus(-difference).mean() + ridge / 2 * logits.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        search.step(closure)  # type: ignore[no-untyped-call]
    return logits.detach().float()


class _Projector(nn.Module):
    def __init__(self, layers: nn.Sequential, residual: bool):
        super().__init__()
        self.layers, self.residual = layers, residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y + x if self.residual else y


def _projector(c: PALConfig) -> _Projector:
    """Hidden layers of the output's width, each linear, (batch norm), dropout, activation; then a linear one."""
    layers: list[nn.Module] = []
    width = c.in_dim
    for _ in range(c.hidden):
        layers.append(nn.Linear(width, c.out_dim))
        if c.batch_norm:
            layers.append(nn.BatchNorm1d(c.out_dim))
        layers += [nn.Dropout(c.dropout), nn.GELU() if c.activation == "gelu" else nn.ReLU()]
        width = c.out_dim
    return _Projector(nn.Sequential(*layers, nn.Linear(width, c.out_dim)), c.residual)


def _config(values: Mapping[str, Any]) -> PALConfig:
    return PALConfig(**{**values, "users": tuple(values["users"])})
