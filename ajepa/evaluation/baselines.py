"""Scores of features that do not train, kept between runs on the same evaluation clips."""

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from ajepa.data.index import cache_root
from ajepa.evaluation.features import Evaluation
from ajepa.utils.json_files import DamagedError, read_json, write_json

Scores = dict[str, float | None]


def kept_scores(evaluation: Evaluation, settings: Any, compute: Callable[[], Scores]) -> Scores:
    """`compute()`, or its result of an earlier run with the same clips and the same `settings`.

    The text of `settings` must state all else that decides the scores: weights, front end, pooling and device.
    """
    digest = hashlib.sha256(f"{torch.__version__} {settings}".encode())
    for tensor in (evaluation.pcm, evaluation.lengths, evaluation.labels, evaluation.is_test):
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    path = cache_root() / "baselines" / f"{digest.hexdigest()[:32]}.json"
    try:
        return read_json(path)
    except FileNotFoundError:
        pass
    except (OSError, DamagedError) as error:
        print(f"warning: {error}; the baselines are computed again", file=sys.stderr)
    scores = compute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, scores)
    except OSError:
        pass  # the next run computes them again
    return scores
