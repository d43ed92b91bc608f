"""The gradient of a whole step is that of the specification's loss over the plain model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megadlcm.config import RunConfig, config_from_dict, config_to_dict
from megadlcm.engine.objective import Objective, StepTotals
from megadlcm.model import DLCM
from megadlcm.ops.boundary import BoundarySampling
from megadlcm.parallel.mesh import ParallelMesh
from tests.support.plain_model import PlainModel
from tests.support.plain_step import plain_loss
from tests.support.tiny_models import pack, random_documents, tiny_model

LENGTHS = (11, 1, 16, 8)
# which documents make a micro-batch
CUTS: list[list[list[int]]] = [[[0, 1, 2, 3]], [[0], [1, 2], [3]], [[3], [0, 1, 2]]]
WEIGHT = 0.7
"""Of the ratio loss; large, so that its gradient is no small part of the whole."""


def run_of(model: DLCM) -> RunConfig:
    """A run of which only model and ratio loss are read."""
    training = {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    return config_from_dict(
        {
            "name": "plain",
            "output_dir": "plain",
            "model": config_to_dict(model.config),
            "training": training | {"ratio_loss_weight": WEIGHT},
        }
    )


def step_gradients(
    model: DLCM, documents: list[Tensor], cut: Sequence[Sequence[int]]
) -> tuple[dict[str, Tensor], list[list[bool]]]:
    """Gradients of a step in these micro-batches, and what was drawn in each document."""
    objective = Objective(run_of(model), ParallelMesh(0, 1, 0, torch.device("cpu")))
    starts = torch.tensor((0, *LENGTHS)).cumsum(0)
    outputs = []
    drawn: dict[int, list[bool]] = {}
    for indices in cut:
        tokens_T, cu_seqlens = pack([documents[index] for index in indices])
        # a token draws by its place in the step, wherever it is computed
        places_T = torch.cat([starts[i] + torch.arange(LENGTHS[i]) for i in indices])
        output = model(tokens_T, cu_seqlens, BoundarySampling(3, 5, places_T))
        outputs.append((output, tokens_T.roll(-1)))
        masks = output.boundary_mask_T.split([LENGTHS[index] for index in indices])
        drawn |= {index: mask_T.tolist() for index, mask_T in zip(indices, masks, strict=True)}
    boundaries = sum(sum(mask) for mask in drawn.values())
    fraction = torch.tensor(boundaries / sum(LENGTHS), dtype=torch.float64)
    totals = StepTotals(sum(LENGTHS), fraction if objective.needs_boundary_fraction else None)
    model.zero_grad()
    for output, labels_T in outputs:
        loss = objective(output, labels_T, totals).loss
        ratio = objective.ratio_loss(output.boundary, output.packing, totals)
        (loss if ratio is None else loss + ratio).backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    return gradients, [drawn[index] for index in range(len(documents))]


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "three", "two"])
@pytest.mark.parametrize("mode", ["learned_global", "learned_local", "ema_ste", "rule"])
def test_the_gradient_of_a_step_is_that_of_the_plain_loss(mode: str, cut: list[list[int]]) -> None:
    """Cross-entropy and the ratio loss together, in fp64, however the step is cut."""
    model = tiny_model(seed=4, training=True, boundary_mode=mode)
    documents = random_documents(LENGTHS, seed=61)
    gradients, drawn = step_gradients(model, documents, cut)
    # labels follow their micro-batch: the last token of a pack is given the first one's
    labels = [torch.cat([documents[i] for i in part]).roll(-1) for part in cut]
    ordered = torch.cat(labels).split([LENGTHS[i] for part in cut for i in part])
    by_document = dict(zip([i for part in cut for i in part], ordered, strict=True))
    names, weights = zip(*model.named_parameters(), strict=True)
    shares = {}
    for share, weight in (("both", WEIGHT), ("cross entropy", 0.0)):
        loss = plain_loss(
            PlainModel(model),
            documents,
            [by_document[index] for index in range(len(documents))],
            drawn,
            ratio_loss_weight=weight,
        )
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        shares[share] = {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for name, parameter, gradient in zip(names, weights, found, strict=True)
        }
    for name, expected in shares["both"].items():
        error = (gradients[name] - expected).abs().max() / expected.abs().max()
        assert error < 1e-10, name
    # the ratio loss is a visible part of it: it trains the detector and the encoder below
    for name in ("boundary_detector.w_q.weight", "encoder.blocks.0.attention.wq.weight"):
        if name in gradients:
            moved = (shares["both"][name] - shares["cross entropy"][name]).abs().max()
            assert (float(moved / shares["both"][name].abs().max()) > 1e-3) == (mode != "rule")
