"""The causality check that opens every training run, on the model that is about to be trained.

A model that sees the future trains to a wonderful loss and is worth nothing. Gradients alone do
not show it: the leaked information can be the discrete fact that the next token is a boundary. So
tokens are replaced and documents cut, with the boundaries decided anew each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from megadlcm.config.kernels import backend_candidates
from megadlcm.model.language_model import LanguageModel
from megadlcm.model.output import ModelOutput

_NUM_REPLACED = 6
_NUM_CUTS = 4
_SEED = 20_251_224
# largest root mean square change of a row of logits, relative to all logits, that rounding explains
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-2,
    torch.bfloat16: 1e-1,
}
Forward = Callable[[Tensor, Tensor], ModelOutput | None]
"""Tokens and offsets of documents -> output; None on a stage that does not hold the head."""
Share = Callable[[Any], Any]
"""Hands a value of the stage that holds the head to the others; collective."""


def _alone(value: Any) -> Any:
    return value


@torch.no_grad()
def check_causality(
    model: LanguageModel,
    tokens: int = 64,
    forward: Forward | None = None,
    share: Share = _alone,
) -> None:
    """Makes sure that no logit and no boundary depends on a later token.

    In evaluation and in training mode, a document of random tokens is run once as it is, a few
    times with one token replaced, and a few times cut in two documents; everything before the
    replaced token or the cut must stay as it was. Two dozen forward passes over `tokens` tokens;
    the modes of the modules, their buffers and torch's random state are left as they were.

    A fresh model reads its concepts so weakly that a leak drowns in the rounding of half
    precision. Such a model is therefore checked twice: as it is, coarsely, for its attention
    kernels, and sharply with its weights widened to fp32 (copies that live during the check;
    left out when `attention_backend` names a kernel that knows no fp32). With
    `cross_output_zero_init` a fresh model does not read concepts at all and passes in any case.

    Args:
        model: the model, in the precision and on the device that it trains with.
        tokens: length of the document, at least 2.
        forward: runs the model where it is cut into stages; None calls it.
        share: hands on what the stage with the head found.

    Raises:
        RuntimeError: something before the changed token moved by more than rounding explains;
            the message names both positions.
    """
    # a generator of its own: the run's random state stays as it was
    generator = torch.Generator().manual_seed(_SEED)
    vocab_size = model.config.vocab_size
    tokens_T = torch.randint(vocab_size, (tokens,), generator=generator)
    shift_T = torch.randint(1, max(vocab_size, 2), (tokens,), generator=generator)
    device = next(model.parameters()).device
    tokens_T, other_T = tokens_T.to(device), ((tokens_T + shift_T) % vocab_size).to(device)
    for wide in _widenings(model):
        for mode in ("eval", "train"):
            with _mode(model, training=mode == "train"), wide:
                problem = _probe(forward or model, share, tokens_T, other_T, f"{mode} mode")
            if problem:
                raise RuntimeError(problem)


def _widenings(model: LanguageModel) -> list[AbstractContextManager[None]]:
    """Makes the contexts in which the model is checked: as it is, and in fp32 if it has less."""
    weights = list(model.parameters())
    if all(weight.dtype.itemsize > 2 for weight in weights):
        return [nullcontext()]
    backends = backend_candidates(model.config.attention_backend).values()
    if not any("float32" in backend.dtypes or not backend.dtypes for backend in backends):
        return [nullcontext()]
    return [nullcontext(), _Wide(weights)]


class _Wide:
    """Weights in fp32 while it is entered, once for each mode."""

    def __init__(self, weights: list[nn.Parameter]) -> None:
        self.weights = weights
        self.halves: list[Tensor] = []

    def __enter__(self) -> None:
        self.halves = [weight.data for weight in self.weights]
        for weight in self.weights:
            weight.data = weight.data.float()

    def __exit__(self, *_: object) -> None:
        for weight, half in zip(self.weights, self.halves, strict=True):
            weight.data = half


def _probe(
    forward: Forward, share: Share, tokens_T: Tensor, other_T: Tensor, mode: str
) -> str | None:
    """Runs the changed documents; what moved, the same on every stage."""
    tokens = tokens_T.numel()
    whole = torch.tensor([0, tokens], dtype=torch.int32, device=tokens_T.device)
    before = forward(tokens_T, whole)
    found = before and [_positions(before, tokens, count) for count in (_NUM_REPLACED, _NUM_CUTS)]
    # every stage runs the same passes, so that none waits for another
    replaced, cuts = share(found)
    problems: list[str] = []
    for position in replaced:
        changed_T = tokens_T.clone()
        changed_T[position] = other_T[position]
        problems += _compare(before, forward(changed_T, whole), position, f"{mode}, token replaced")
    for position in cuts:
        # a cut keeps the shapes of the token stacks, so less rounding differs than in a prefix
        halves = torch.tensor([0, position, tokens], dtype=torch.int32, device=tokens_T.device)
        problems += _compare(before, forward(tokens_T, halves), position, f"{mode}, document cut")
    problem: str | None = share(problems[0] if problems else None)
    return problem


@contextmanager
def _mode(model: LanguageModel, training: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, was_training in modes:
            module.training = was_training


def _positions(output: ModelOutput, tokens: int, count: int) -> list[int]:
    """Tokens inside segments and tokens that are boundaries: they leak in different ways."""
    mask = output.boundary_mask_T
    decisions = [False] * tokens if mask is None else mask.tolist()
    boundaries = [position for position in range(1, tokens) if decisions[position]]
    others = [position for position in range(1, tokens) if not decisions[position]]
    return _spread(boundaries, count // 2) + _spread(others, count - count // 2)


def _spread(positions: list[int], count: int) -> list[int]:
    """Picks `count` of the positions, evenly."""
    if len(positions) <= count:
        return positions
    return [positions[(2 * index + 1) * len(positions) // (2 * count)] for index in range(count)]


def _compare(
    before: ModelOutput | None, after: ModelOutput | None, position: int, how: str
) -> list[str]:
    """Compares everything that precedes `position` in two runs; what moved."""
    if before is None or after is None:
        return []
    tolerance = _TOLERANCE[before.logits_TV.dtype]
    stop, problems = position, []
    if before.boundary is not None and after.boundary is not None:
        moved_T = (before.boundary.prob_T - after.boundary.prob_T)[:position].abs()
        problems += _moved(moved_T, tolerance, position, f"{how}: boundary probability")
        flipped_T = (before.boundary.mask_T != after.boundary.mask_T)[:position]
        if bool(flipped_T.any()):
            stop = int(flipped_T.nonzero()[0])
            # where rounding moved a probability across the threshold, all that follows may differ
            if float(moved_T[stop]) == 0.0:
                problems.append(_message(stop, position, f"{how}: boundary decision"))
    # relative to all logits: those of a fresh model are tiny
    scale = before.logits_TV.double().square().mean().sqrt().clamp(min=1e-30)
    change_TV = (before.logits_TV[:stop] - after.logits_TV[:stop]).double()
    change_T = change_TV.square().mean(1).sqrt() / scale
    return problems + _moved(change_T, tolerance, position, f"{how}: logits")


def _moved(change_T: Tensor, tolerance: float, position: int, what: str) -> list[str]:
    # a comparison with NaN is false, so NaN counts as a change
    bad = (~(change_T <= tolerance)).nonzero().flatten()
    if not bad.numel():
        return []
    first = int(bad[0])
    size = f" by {float(change_T[first]):.3g} (tolerance {tolerance:g})"
    return [_message(first, position, what) + size]


def _message(where: int, position: int, what: str) -> str:
    return (
        f"causality check failed ({what}): position {where} moved when the document changed "
        f"from position {position} on"
    )
