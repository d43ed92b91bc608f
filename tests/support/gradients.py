"""The gradient of a step written down once more, and the runs of plain SGD that show it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from megadlcm.config import RunConfig
from megadlcm.engine.step import to_device
from megadlcm.model import DLCM, build_model
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.ops.compression import ratio_loss
from megadlcm.ops.cross_entropy import token_cross_entropy
from tests.support.tiny_runs import step_loader

RATIO_WEIGHT = 3.0  # far above the usual 0.03, so that a wrong ratio gradient is not lost in noise


def sgd_run(make_run: Callable[..., RunConfig], corpus: Path, micro: int, **keys: str) -> RunConfig:
    """One step of plain SGD on the four windows of `short`, one of which is not full."""
    zero_stage = int(keys.pop("zero_stage", "1"))
    return make_run(
        model={"boundary_mode": keys.pop("boundary_mode", "learned_global")},
        data={"train": [{"path": str(corpus / "short"), "name": "short"}]},
        parallel={"zero_stage": zero_stage},
        training={
            "global_batch_size": 4,
            "micro_batch_size": micro,
            "max_grad_norm": 0.0,
            "ratio_loss_weight": RATIO_WEIGHT,
            **keys,
        },
        # a rate so large that the difference of the parameters does not lose the gradient's digits
        optimizer={
            "name": "sgd",
            "learning_rate": 1e3,
            "boundary_learning_rate": 1e3,
            "weight_decay": 0.0,
        },
    )


def reference_gradients(config: RunConfig) -> tuple[dict[str, Tensor], float, float]:
    """Gradient of the mean loss over the whole batch, written down once more, in fp64."""
    model = build_model(config.model, config.mup, seed=config.seed).double()
    assert isinstance(model, DLCM)
    loader = step_loader(config)
    batch = next(loader)
    loader.close()
    parts = [to_device(packed, config, 0, torch.device("cpu")) for packed in batch.micro_batches]
    tokens_T = torch.cat([part.tokens_T for part in parts])
    index_T = torch.cat([part.sampling.token_index_T for part in parts])
    lengths = torch.cat([part.cu_seqlens.diff() for part in parts])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    output = model(tokens_T, cu_seqlens, BoundarySampling(config.seed, 0, index_T))
    labels_T = torch.cat([part.labels_T for part in parts])
    loss = token_cross_entropy(output.logits_TV, labels_T).mean()
    assert output.boundary is not None
    prob_T, mask_T = output.boundary.prob_T, output.boundary.mask_T.double()
    target = config.model.target_tokens_per_concept
    if config.model.boundary.ratio_over == "step":
        ratio = ratio_loss(mask_T.mean(), prob_T.mean(), target)
    else:  # one ratio loss for each document, weighted by its tokens
        bounds = cu_seqlens.tolist()
        ratio = sum(
            ratio_loss(mask_T[a:b].mean(), prob_T[a:b].mean(), target) * (b - a)
            for a, b in itertools.pairwise(bounds)
        ) / len(tokens_T)
    (loss + RATIO_WEIGHT * ratio).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients, float(loss.detach()), float(mask_T.mean())


def worst_error(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of any parameter's gradient."""
    return max(
        float((gradients[name] - value).norm() / value.norm().clamp(min=1e-5))
        for name, value in expected.items()
    )
