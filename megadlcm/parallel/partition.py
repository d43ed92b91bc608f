"""The page: which parameter is cut how by tensor parallelism, and what a process builds of a model.

The order of a build is fixed here: the whole model on the meta device, take away what other stages
hold, cut what the tensor parallel group shares, allocate, draw the initial values. Every value is
drawn as a whole tensor by (seed, name) and cut afterwards, so that it is the same on any layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadlcm.config import RunConfig
from megadlcm.model import LanguageModel, build_model
from megadlcm.model.boundary_detector import BoundaryDetector
from megadlcm.model.chunking import ConceptReader
from megadlcm.model.language_model import Embedding
from megadlcm.model.scaling import initial_value, parameter_table
from megadlcm.model.seams import Seams
from megadlcm.model.transformer import Block, Stack
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.tensor import SequenceSeams, TensorSeams, sum_gradient
from megadlcm.plan.stages import Chunk, cut_chunks

# (parameter name, dimension that is cut or None); the first match decides, no match is an error.
# Rows of wq, wk, wv are heads and rows of w_gate, w_up the inner width: each process has its own.
_TABLE: tuple[tuple[str, int | None], ...] = (
    (r"token_embedding\.weight", 0),
    (r"lm_head\.weight", 0),
    (r".*\.attention\.w[qkv]\.weight", 0),
    (r".*\.attention\.wo\.weight", 1),
    (r".*\.feed_forward\.w_(gate|up)\.weight", 0),
    (r".*\.feed_forward\.w_down\.weight", 1),
    (r"concept_reader\.w[qkv]\.weight", 0),
    (r"concept_reader\.wo\.weight", 1),
    (r"boundary_detector\..*", None),  # every process takes every decision
    (r"concept_pool\..*", None),
    (r".*norm\.gain", None),
)
# whole parameters of which each process sees only its own heads, or with cut rows its own rows:
# their gradients are summands
_GAINS_OF_HEADS = r".*\.(query|key)_norm\.gain"
_GAINS_OF_ROWS = (
    r"(encoder|backbone|decoder)\.(norm|blocks\.\d+\.(attention|feed_forward)_norm)\.gain"
)


def cut_dimension(name: str) -> int | None:
    """Finds the dimension along which tensor parallelism cuts a parameter.

    Args:
        name: dotted name of the parameter.

    Returns:
        The dimension; None for a parameter that every process holds whole.

    Raises:
        ValueError: the table does not know the parameter.
    """
    for pattern, dimension in _TABLE:
        if re.fullmatch(pattern, name):
            return dimension
    raise ValueError(f"parameter {name} is not on the page: add it to parallel/partition.py")


@dataclass(frozen=True)
class Part:
    """Where a parameter lives and which piece of it this process would hold."""

    name: str
    """Dotted name."""
    shape: torch.Size
    """Shape of the whole parameter."""
    stage: int
    """Pipeline stage that holds it."""
    dimension: int | None
    """Dimension that is cut; None if every process of the group holds all of it."""
    is_parameter: bool = True
    """Whether it is trained, or else a saved buffer."""


def piece(whole: Tensor, dimension: int | None, rank: int, size: int) -> Tensor:
    """This process's piece of a whole tensor."""
    return whole if dimension is None or size == 1 else whole.chunk(size, dimension)[rank]


@dataclass(frozen=True)
class Partition:
    """How a model is spread over stages and tensor parallel processes."""

    chunks: list[Chunk]
    """All chunks, in the order of the computation."""
    parts: dict[str, Part]
    """Every parameter and saved buffer of the whole model, in a fixed order."""

    def own_chunks(self, stage: int) -> list[Chunk]:
        """Chunks of a stage, in the order of the computation."""
        return [chunk for chunk in self.chunks if chunk.stage == stage]

    def stage_of(self, unit: str) -> int:
        """Stage that holds a unit."""
        return self.chunks[self.chunk_of(unit)].stage

    def chunk_of(self, unit: str) -> int:
        """Index of the chunk that holds a unit."""
        return next(
            chunk.index for chunk in self.chunks if unit in {member.name for member in chunk.units}
        )


def make_partition(config: RunConfig) -> Partition:
    """Spreads the model of a run; a pure function of its config.

    Args:
        config: the run.

    Returns:
        Chunks and the place of every parameter.
    """
    parallel = config.parallel
    chunks = cut_chunks(
        config.model,
        config.data.seq_len,
        parallel.pipeline_parallel_size,
        parallel.pipeline_placement,
    )
    owners = {
        prefix: chunk.stage for chunk in chunks for unit in chunk.units for prefix in unit.modules
    }
    model = build_model(config.model, config.mup, device="meta")
    parts = {}
    for name, parameter in model.named_parameters():
        dimension = cut_dimension(name) if parallel.tensor_parallel_size > 1 else None
        parts[name] = Part(name, parameter.shape, _owner(name, owners), dimension)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            parts[name] = Part(name, buffer.shape, _owner(name, owners), None, False)
    return Partition(chunks, parts)


def _owner(name: str, owners: dict[str, int]) -> int:
    (stage,) = {stage for prefix, stage in owners.items() if name.startswith(prefix + ".")}
    return stage


def build_stage_model(
    config: RunConfig,
    mesh: ParallelMesh,
    partition: Partition | None = None,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Builds what this process holds of the model, initialised, in fp32.

    Args:
        config: the run.
        mesh: ranks of this process.
        partition: how the model is spread; None computes it.
        device: where to build; on `meta` nothing is allocated or initialised.

    Returns:
        The model without the parts of other stages, with its own pieces of the rest.
    """
    partition = partition or make_partition(config)
    model = build_model(config.model, config.mup, device="meta")
    own = {name for name, part in partition.parts.items() if part.stage == mesh.pipeline_rank}
    _take_away(model, own)
    for name, parameter in list(model.named_parameters()):
        part = partition.parts[name]
        cut = piece(parameter, part.dimension, mesh.tensor_parallel_rank, mesh.tensor_parallel_size)
        _set_parameter(model, name, nn.Parameter(torch.empty_like(cut)))
    if mesh.tensor_parallel_size > 1:
        _set_seams(model, config, mesh)
    device = torch.device(device)
    if device.type != "meta":
        model.to_empty(device=device)
        _initialize(model, config, mesh, partition)
    _mark_parameters(model, config, mesh, partition)
    return model


def _take_away(model: LanguageModel, own: set[str]) -> None:
    """Removes every module that holds nothing of this stage; blocks keep their names."""
    gone: list[str] = []
    for name, module in list(model.named_modules()):
        held = {f"{name}.{key}" for key in module.state_dict()}
        if not name or not held or held & own or isinstance(module, nn.ModuleDict):
            continue
        if any(name.startswith(f"{prefix}.") for prefix in gone):
            continue
        path, _, key = name.rpartition(".")
        parent = model.get_submodule(path)
        if isinstance(parent, nn.ModuleDict):
            del parent[key]
        else:
            setattr(parent, key, None)
        gone.append(name)


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, key = name.rpartition(".")
    setattr(model.get_submodule(path), key, parameter)


def _set_seams(model: LanguageModel, config: RunConfig, mesh: ParallelMesh) -> None:
    group = mesh.tensor_parallel_group
    assert group is not None
    kind = SequenceSeams if config.parallel.sequence_parallel else TensorSeams
    seams: Seams = kind(group, config.parallel.check_agreement)
    for module in model.modules():
        if isinstance(
            module, LanguageModel | Stack | Block | Embedding | BoundaryDetector | ConceptReader
        ):
            module.seams = seams


@torch.no_grad()
def _initialize(
    model: LanguageModel, config: RunConfig, mesh: ParallelMesh, partition: Partition
) -> None:
    rules = parameter_table(model, config.model, config.mup)
    for name, parameter in model.named_parameters():
        part = partition.parts[name]
        whole = initial_value(name, part.shape, rules[name], config.seed)
        rank, size = mesh.tensor_parallel_rank, mesh.tensor_parallel_size
        parameter.copy_(piece(whole, part.dimension, rank, size))
    for module in model.modules():
        if isinstance(module, BoundaryDetector):
            module.reset_buffers()


def _mark_parameters(
    model: LanguageModel, config: RunConfig, mesh: ParallelMesh, partition: Partition
) -> None:
    """Tells DeepSpeed which parameters are cut, and completes the gradients of whole ones."""
    group, sequence = mesh.tensor_parallel_group, config.parallel.sequence_parallel
    for name, parameter in model.named_parameters():
        # the norm that DeepSpeed takes counts all others on the first process of a group only
        parameter.tensor_model_parallel = (  # type: ignore[attr-defined]
            partition.parts[name].dimension is not None
        )
        if group is not None and is_summand(name, sequence):
            parameter.register_hook(sum_gradient(group, sequence))


def is_summand(name: str, sequence_parallel: bool) -> bool:
    """Whether each process of a tensor parallel group has only a summand of the gradient."""
    patterns = [_GAINS_OF_HEADS, _GAINS_OF_ROWS] if sequence_parallel else [_GAINS_OF_HEADS]
    return any(re.fullmatch(pattern, name) for pattern in patterns)
