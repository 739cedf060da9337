"""Accuracy of frozen features: nearest class mean, ridge regression and a logistic probe.

The penalties of the last two are chosen on a fifth of the training features. The numbers on the card of the shipped
weights come from these probes, so they are not replaced by other implementations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from scripts.pretraining.images import normalise

Split = tuple[torch.Tensor, torch.Tensor]
"""Images uint8 [N, 3, H, W] or features [N, F], and labels [N]."""
Scores = Callable[[torch.Tensor], torch.Tensor]
"""Features [N, F] → scores [N, C]."""
Fit = Callable[[torch.Tensor, torch.Tensor, float], Scores]
"""Features, labels and a penalty → a function that scores features."""


def evaluate(backbone: VisionTransformer, data: dict[str, Split], probe_logistic: bool = True) -> dict[str, float]:
    """Test accuracies in % on those packed sets that exist and were not trained on."""
    found = {}
    for name, train, test in (("stream100", "str_train", "str_val"), ("cifar10_500per", "c10_train", "c10_test")):
        if train not in data:
            continue
        known, new = ((features(backbone, data[key][0]), data[key][1]) for key in (train, test))
        found[f"{name}_ncm_cosine"] = round(_accuracy(_class_means(*known), new), 2)
        found[f"{name}_ridge"] = round(_tuned(ridge, (1e-4, 1e-3, 1e-2, 1e-1, 1.0), known, new), 2)
        if probe_logistic:
            found[f"{name}_logistic"] = round(_tuned(logistic, (1e-5, 1e-4, 1e-3), known, new), 2)
    return found


@torch.no_grad()
def features(backbone: VisionTransformer, x: torch.Tensor, batch: int = 250) -> torch.Tensor:
    """Pooled features [N, F] (timm's ``model(x)`` with ``num_classes=0``) of uint8 images, in float32."""
    backbone.eval()
    return torch.cat([backbone(normalise(x[i : i + batch])) for i in range(0, len(x), batch)]).float()


def _tuned(fit: Fit, penalties: tuple[float, ...], train: Split, test: Split) -> float:
    x, y = train
    held = torch.arange(len(x)) % 5 == 0
    best = max(penalties, key=lambda penalty: _accuracy(fit(x[~held], y[~held], penalty), (x[held], y[held])))
    return _accuracy(fit(x, y, best), test)


def _accuracy(scores: Scores, split: Split) -> float:
    x, y = split
    return 100 * (scores(x).argmax(1) == y).float().mean().item()


def _class_means(x: torch.Tensor, y: torch.Tensor) -> Scores:
    """Scores are cosines to the mean of the normalised features of each class."""
    x = F.normalize(x, dim=1)
    means = torch.stack([x[y == c].mean(0) for c in range(int(y.max()) + 1)])
    return lambda other: F.normalize(other, dim=1) @ F.normalize(means, dim=1).T


def ridge(x: torch.Tensor, y: torch.Tensor, penalty: float) -> Scores:
    """One-hot ridge regression on standardised features and an intercept, which is penalised like the rest."""
    mean, std = x.mean(0), x.std(0) + 1e-6

    def design(f: torch.Tensor) -> torch.Tensor:
        return torch.cat([(f - mean) / std, torch.ones(len(f), 1)], 1).double()

    z, t = design(x), F.one_hot(y, int(y.max()) + 1).double()
    weights = torch.linalg.solve(z.T @ z + penalty * len(z) * torch.eye(z.shape[1], dtype=torch.double), z.T @ t)
    return lambda other: design(other) @ weights


def logistic(x: torch.Tensor, y: torch.Tensor, penalty: float, steps: int = 150) -> Scores:
    """Multinomial logistic regression on standardised features, by L-BFGS."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / std
    head = torch.nn.Linear(x.shape[1], int(y.max()) + 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(head(z), y) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return lambda other: head((other - mean) / std)
