"""Probes on frozen features, trained on the training rows of a fold to classify its test rows.

Shapes: n recordings, D features per recording, T tokens of all recordings (packed by `cu`), C features per token.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ajepa.evaluation.features import knn_predict, knn_xares_predict, standardised
from ajepa.utils.errors import ConfigError

EPOCHS, BATCH, LR, LR_END = 10, 32, 1e-3, 1e-4  # X-ARES's schedule
VALIDATION = 0.1  # share of each class's training rows held out to choose the best epoch
# Values of the tokens of a batch. Of a recording with more than its share, evenly spaced tokens are read.
BATCH_VALUES = 1 << 27
VOTES = 1 << 26  # similarities and votes that a kNN computes at once


@dataclass(frozen=True)
class Embedded:
    """Frozen features of n recordings."""

    clips: torch.Tensor  # float32 [n, D]
    tokens: torch.Tensor | None = None  # float16 [T, C]
    cu: torch.Tensor | None = None  # int64 [n + 1]

    def padded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of the recordings `rows`, float32 `[b, L, C]`, and which of them are padding, bool `[b, L]`."""
        parts = [self.tokens_of(i).float() for i in rows.tolist()]
        lengths = torch.tensor([len(p) for p in parts])
        return nn.utils.rnn.pad_sequence(parts, batch_first=True), torch.arange(int(lengths.max())) >= lengths[:, None]

    def tokens_of(self, row: int) -> torch.Tensor:
        """Tokens of a recording, at most `BATCH_VALUES / (BATCH C)` of them, evenly spaced."""
        assert self.tokens is not None and self.cu is not None
        start, stop = self.cu[row : row + 2].tolist()
        most = BATCH_VALUES // (BATCH * self.tokens.shape[1])
        if stop - start <= most:
            return self.tokens[start:stop]
        return self.tokens[torch.linspace(start, stop - 1, most, dtype=torch.float64).long()]


class LinearProbe(nn.Module):
    """X-ARES's linear probe: layer norm of the pooled features, then one linear layer."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x_bD: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x_bD))


class AttentiveProbe(nn.Module):
    """One learnt query per head attends to all tokens of a recording; a linear probe classifies the result.

    Head h sums the values W_h x_t of the layer-normalised tokens x_t with weights softmax(q_h . x_t). A key projection
    would add nothing to a learnt query. W_h is applied after the sum, which avoids a product over all tokens.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        heads = width // 64 if width % 64 == 0 else 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(heads, width) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, width // heads, width) * width**-0.5)
        self.linear = LinearProbe(width, classes)

    def forward(self, x_bLC: torch.Tensor, padding_bL: torch.Tensor) -> torch.Tensor:
        x = self.norm(x_bLC)
        scores = (x @ self.query.T).masked_fill(padding_bL[..., None], -torch.inf)
        pooled = scores.softmax(1).transpose(1, 2) @ x  # [b, heads, C]
        return self.linear(torch.einsum("bhc,hdc->bhd", pooled, self.value).flatten(1))


def predict(
    head: str, x: Embedded, labels: torch.Tensor, train: torch.Tensor, test: torch.Tensor, seed: int, device="cpu"
) -> torch.Tensor:
    """Train `head` on the rows `train` and return the classes of the rows `test`, int64 `[len(test)]`.

    `head` is a name in HEADS. All randomness follows from `seed`. Raises ConfigError if outputs of a head are not
    finite.
    """
    return HEADS[head](x, labels, train, test, seed, torch.device(device))


def validation_split(labels: torch.Tensor, rows: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `rows` into (training, validation): a tenth of each class validates, but never a class's only row."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(rows), dtype=torch.bool)
    for c in labels[rows].unique():
        own = (labels[rows] == c).nonzero()[:, 0]
        count = max(int(len(own) > 1), round(VALIDATION * len(own)))
        held[own[torch.randperm(len(own), generator=generator)[:count]]] = True
    return rows[~held], rows[held]


def fit(module: nn.Module, inputs: Callable, labels: torch.Tensor, rows: torch.Tensor, seed: int, device) -> nn.Module:
    """Train with Adam and a cosine schedule, and keep the weights of the epoch with the best validation accuracy.

    `inputs(rows)` returns the module's arguments.
    """
    train_rows, held = validation_split(labels, rows, seed)
    optimizer = torch.optim.Adam(module.parameters(), LR)
    steps = EPOCHS * -(-len(train_rows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, LR_END)
    generator = torch.Generator().manual_seed(seed)
    best, weights = -1.0, module.state_dict()
    for _ in range(EPOCHS):
        module.train()
        for batch in train_rows[torch.randperm(len(train_rows), generator=generator)].split(BATCH):
            loss = F.cross_entropy(module(*(t.to(device) for t in inputs(batch))), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = (classify(module, inputs, held, device) == labels[held]).float().mean().item() if len(held) else 0.0
        if score > best or not len(held):
            best, weights = score, copy.deepcopy(module.state_dict())
    module.load_state_dict(weights)
    return module


@torch.no_grad()
def classify(module: nn.Module, inputs: Callable, rows: torch.Tensor, device) -> torch.Tensor:
    module.eval()
    outputs = (module(*(t.to(device) for t in inputs(batch))) for batch in rows.split(BATCH))
    return torch.cat([finite(x).argmax(-1).cpu() for x in outputs])


def finite(x: torch.Tensor) -> torch.Tensor:
    """`x` as it is. Raises ConfigError for NaN or infinity, of which no class could be told."""
    if not x.isfinite().all():
        raise ConfigError("the outputs of a head are not finite, its features are too large: choose other --heads")
    return x


def _trained(probe: type[nn.Module], width: int, inputs, labels, train, test, seed, device) -> torch.Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = probe(width, int(labels.max()) + 1).to(device)
        fit(module, inputs, labels, train, seed, device)
    return classify(module, inputs, test, device)


def _vote(predict: Callable, train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor) -> torch.Tensor:
    """`predict` on as many rows at a time as memory allows."""
    rows = max(1, VOTES // (len(train_x) + 10 * int(train_y.max() + 1)))
    finite(train_x)
    return torch.cat([predict(train_x, train_y, finite(part)) for part in test_x.split(rows)])


def _knn(x: Embedded, labels, train, test, seed, device) -> torch.Tensor:
    train_x, test_x = standardised(x.clips[train], x.clips[test])
    return _vote(knn_predict, train_x, labels[train], test_x)


def _knn_xares(x: Embedded, labels, train, test, seed, device) -> torch.Tensor:
    return _vote(knn_xares_predict, x.clips[train], labels[train], x.clips[test])


def _linear(x: Embedded, labels, train, test, seed, device) -> torch.Tensor:
    width = x.clips.shape[1]
    return _trained(LinearProbe, width, lambda rows: (x.clips[rows],), labels, train, test, seed, device)


def _attentive(x: Embedded, labels, train, test, seed, device) -> torch.Tensor:
    assert x.tokens is not None
    return _trained(AttentiveProbe, x.tokens.shape[1], x.padded, labels, train, test, seed, device)


def _logistic(x: Embedded, labels, train, test, seed, device) -> torch.Tensor:
    from sklearn.linear_model import LogisticRegression

    train_x, test_x = standardised(x.clips[train], x.clips[test])
    model = LogisticRegression(max_iter=10_000).fit(finite(train_x).numpy(), labels[train].numpy())
    return torch.from_numpy(model.predict(finite(test_x).numpy()))


HEADS: dict[str, Callable[..., torch.Tensor]] = {
    "knn": _knn,
    "linear": _linear,
    "attentive": _attentive,
    "logistic": _logistic,
    "knn-xares": _knn_xares,
}
