"""The page: how tensor parallelism shards each parameter, and what a process builds of a model.

The order of a build is fixed here: the whole model on the meta device, take away what other stages
hold, shard what the tensor parallel group shares, allocate, draw the initial values. Every value is
drawn as a whole tensor by (seed, name) and sharded afterwards: it is the same on any layout.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megadlcm.config import RunConfig
from megadlcm.config.anatomy import UnitKind
from megadlcm.model import LanguageModel, build_model
from megadlcm.model.boundary_detector import BoundaryDetector
from megadlcm.model.chunking import ConceptReader
from megadlcm.model.language_model import Embedding
from megadlcm.model.scaling import initial_value, parameter_table
from megadlcm.model.seams import Seams
from megadlcm.model.transformer import Block, Stack
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.tensor import SequenceSeams, TensorSeams, sum_gradient
from megadlcm.plan.stages import Chunk, chunk_of, cut_chunks

# (parameter name, dimension of the shards or None); the first match decides, no match is an error.
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
# whole parameters of which each process sees only its own heads, or with sequence parallelism its
# own rows: their gradients are summands
_GAINS_OF_HEADS = r".*\.(query|key)_norm\.gain"
_GAINS_OF_ROWS = (
    r"(encoder|backbone|decoder)\.(norm|blocks\.\d+\.(attention|feed_forward)_norm)\.gain"
)


def shard_dimension(name: str) -> int | None:
    """Finds the dimension along which tensor parallelism shards a parameter.

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
class ShardSpec:
    """Where a parameter lives, and how it is sharded there."""

    name: str
    """Dotted name."""
    shape: torch.Size
    """Shape of the whole parameter."""
    stage: int
    """Pipeline stage that holds it."""
    dimension: int | None
    """Dimension of the shards; None if every process of the group holds all of it."""
    is_parameter: bool = True
    """Whether it is trained, or else a saved buffer."""


def shard(whole: Tensor, dimension: int | None, rank: int, size: int) -> Tensor:
    """This process's shard of a whole tensor."""
    return whole if dimension is None or size == 1 else whole.chunk(size, dimension)[rank]


@dataclass(frozen=True)
class Partition:
    """How a model is spread over stages and tensor parallel processes."""

    chunks: list[Chunk]
    """All chunks, in the order of the computation."""
    specs: dict[str, ShardSpec]
    """Every parameter and saved buffer of the whole model, in a fixed order."""

    def own_chunks(self, stage: int) -> list[Chunk]:
        """Chunks of a stage, in the order of the computation."""
        return [chunk for chunk in self.chunks if chunk.stage == stage]

    def stage_of(self, kind: UnitKind) -> int:
        """Stage that holds a unit of which there is one."""
        return self.chunks[self.chunk_of(kind)].stage

    def chunk_of(self, kind: UnitKind) -> int:
        """Index of the chunk that holds it."""
        index = chunk_of(self.chunks, kind)
        assert index is not None, f"the model has no {kind.label}"
        return index


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
    specs = {}
    for name, parameter in model.named_parameters():
        dimension = shard_dimension(name) if parallel.tensor_parallel_size > 1 else None
        specs[name] = ShardSpec(name, parameter.shape, _owner(name, owners), dimension)
    for name, buffer in model.named_buffers():
        if name in model.state_dict():  # others are made anew by every process
            specs[name] = ShardSpec(name, buffer.shape, _owner(name, owners), None, False)
    return Partition(chunks, specs)


def _owner(name: str, owners: dict[str, int]) -> int:
    # unpacking demands one: a parameter that no unit names, or two do, is a mistake of the plan
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
        The model without the modules of other stages, with its own shards of the rest.
    """
    partition = partition or make_partition(config)
    # on meta: the whole model would not fit where only a stage of it does
    model = build_model(config.model, config.mup, device="meta")
    own = {name for name, spec in partition.specs.items() if spec.stage == mesh.pipeline_rank}
    _take_away(model, own)
    for name, parameter in list(model.named_parameters()):
        own_shard = shard(
            parameter,
            partition.specs[name].dimension,
            mesh.tensor_parallel_rank,
            mesh.tensor_parallel_size,
        )
        _set_parameter(model, name, nn.Parameter(torch.empty_like(own_shard)))
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
    # outer modules come first, and what lies below one that is gone went with it
    for name, module in list(model.named_modules()):
        held = {f"{name}.{key}" for key in module.state_dict()}
        # an empty ModuleDict stays: blocks are looked up in it by their index in the whole model
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
        spec = partition.specs[name]
        # as a whole, one after the other: its draw must not depend on the layout
        whole = initial_value(name, spec.shape, rules[name], config.seed)
        rank, size = mesh.tensor_parallel_rank, mesh.tensor_parallel_size
        parameter.copy_(shard(whole, spec.dimension, rank, size))
    for module in model.modules():
        if isinstance(module, BoundaryDetector):
            module.reset_buffers()


def _mark_parameters(
    model: LanguageModel, config: RunConfig, mesh: ParallelMesh, partition: Partition
) -> None:
    """Tells DeepSpeed which parameters are shards, and completes the gradients of whole ones."""
    group, sequence = mesh.tensor_parallel_group, config.parallel.sequence_parallel
    for name, parameter in model.named_parameters():
        # the norm that DeepSpeed takes counts all others on the first process of a group only
        parameter.tensor_model_parallel = (  # type: ignore[attr-defined]
            partition.specs[name].dimension is not None
        )
        if group is not None and is_summand(name, sequence):
            parameter.register_hook(sum_gradient(group, sequence))


def is_summand(name: str, sequence_parallel: bool) -> bool:
    """Whether each process of a tensor parallel group has only a summand of the gradient."""
    patterns = [_GAINS_OF_HEADS, _GAINS_OF_ROWS] if sequence_parallel else [_GAINS_OF_HEADS]
    return any(re.fullmatch(pattern, name) for pattern in patterns)
