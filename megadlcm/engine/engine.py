"""RunConfig -> DeepSpeed dictionary with every key explicit -> engine.

The only file that imports deepspeed. It gets the axes of the run as an `mpu` and does what it is
good at: ZeRO, fp32 accumulation and master weights, averages over replicas. The order of forward
and backward passes is `parallel.pipeline`'s: DeepSpeed's own pipeline engine sends to neighbours
only, runs a backward pass for every tensor that crosses, and has one chunk for each stage. The
gradient norm and clipping are ours as well, so that they are the same on every layout.

Traps it stands against, all seen in 0.19.8: gradient clipping is on by default; unknown top-level
keys are ignored; bf16 gradients accumulate in bf16 unless told;
a step with a non-finite norm is skipped without a word; the CPU backend compiles an operator on the
first start and hangs for ever on the lock of a compilation that was killed; stage 3 leaves empty
tensors in the place of the parameters between its own forward passes.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data_pipeline.errors import InputError
from megadlcm.config import RunConfig
from megadlcm.config.constants import BUCKET_ELEMENTS
from megadlcm.engine.mpu import ModelParallelUnit
from megadlcm.engine.objective import Objective, TrainingForward
from megadlcm.engine.optimizer import build_optimizer
from megadlcm.model import LanguageModel
from megadlcm.model.scaling import GROUPS
from megadlcm.parallel.mesh import ParallelMesh
from megadlcm.parallel.partition import Partition, make_partition
from megadlcm.parallel.pipeline import Pipeline
from megadlcm.parallel.watch.activity import doing
from megadlcm.plan.accounting import count_parameters

logger = logging.getLogger(__name__)

OLDEST_DEEPSPEED = (0, 19, 8)
FIRST_UNKNOWN_DEEPSPEED = (0, 20)
_NORM_CHUNK = 1 << 14


def deepspeed_dictionary(config: RunConfig, data_parallel_size: int) -> dict[str, Any]:
    """Computes DeepSpeed's configuration from the run's; nobody writes it by hand.

    Every key whose default could change what is computed or measured is written out.

    Args:
        config: the run.
        data_parallel_size: replicas.

    Returns:
        The dictionary for deepspeed.initialize.

    Raises:
        InputError: the global batch does not divide into micro-batches.
    """
    training, bf16 = config.training, config.training.precision == "bf16"
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps(data_parallel_size),
        # TrainingEngine.backward announces the last micro-batch; else `step` would be the end
        "managed_gradient_accumulation": True,
        "gradient_clipping": 0.0,  # TrainingEngine.clip_gradients does it
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # else bf16 gradients are added up in bf16, and more replicas would mean less precision
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {
            "enabled": bf16,
            # adds each gradient to the fp32 sum as soon as it exists, and frees it
            "immediate_grad_update": True,
            "check_grad_overflow": True,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        "torch_autocast": {"enabled": False},
        "zero_optimization": _zero_dictionary(config.parallel.zero_stage, bf16),
        "zero_allow_untested_optimizer": True,  # it knows Adam only; runs take SGD too
        "zero_force_ds_cpu_optimizer": False,
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False},
        # the trainer measures and logs; each of these would do so again, and wait for the device
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "flops_profiler": {"enabled": False},
        "comms_logger": {"enabled": False},
        "tensorboard": {"enabled": False},
        "wandb": {"enabled": False},
        "csv_monitor": {"enabled": False},
    }


def _zero_dictionary(stage: int, bf16: bool) -> dict[str, Any]:
    return {
        "stage": stage,
        "contiguous_gradients": stage >= 2,
        "overlap_comm": False,
        "reduce_scatter": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_partitions": True,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        # ours is taken instead; these cannot do without their own
        "compute_grad_norm": stage in (0, 3) or (stage == 1 and bf16),
        "elastic_checkpoint": False,  # checkpoints are ours
    }


def check_deepspeed_version(installed: str | None = None) -> None:
    """Refuses versions of DeepSpeed whose arithmetic was not checked.

    Before 0.19.3 gradients are scaled wrongly under a pipeline and lost in bf16; what 0.20 does is
    not known.

    Args:
        installed: version string; None means the installed package.

    Raises:
        InputError: too old or too new.
    """
    installed = installed or version("deepspeed")
    numbers = tuple(int(part) for part in installed.split("+")[0].split(".")[:3] if part.isdigit())
    if not OLDEST_DEEPSPEED <= numbers < FIRST_UNKNOWN_DEEPSPEED:
        bounds = (OLDEST_DEEPSPEED, FIRST_UNKNOWN_DEEPSPEED)
        oldest, unknown = (".".join(map(str, bound)) for bound in bounds)
        raise InputError(
            f"deepspeed = {installed}, must be >= {oldest} and < {unknown}; "
            "install the version that constraints.txt names"
        )


@dataclass(frozen=True)
class TrainingEngine:
    """DeepSpeed's engine with what the trainer needs of its inside."""

    deepspeed: Any
    """The DeepSpeedEngine."""
    model: LanguageModel
    """The model that it trains."""
    optimizer: Optimizer
    """The torch optimizer that it steps."""
    mesh: ParallelMesh
    """Ranks of the run."""
    zero_stage: int
    """How much of the training state is partitioned."""
    partition: Partition
    """How the model is spread over stages and tensor parallel processes."""
    pipeline: Pipeline
    """Runs the chunks of this stage."""
    fences: list[Callable[[], None]] = field(default_factory=list)
    """Called before the parameters are changed: who reads them meanwhile has to have them."""

    @property
    def zero_optimizer(self) -> Any | None:
        """DeepSpeed's partitioned optimizer around the torch one, if there is one."""
        # at stage 0 in fp32 DeepSpeed hands back what it was given
        wrapper = self.deepspeed.optimizer
        return None if wrapper is self.optimizer else wrapper

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters of the whole model."""
        return count_parameters(self.model.config)["total"]

    def forward_pass(self) -> contextlib.AbstractContextManager[None]:
        """What DeepSpeed's own forward passes run in: stage 3 gathers parameters there."""
        if self.zero_stage < 3:
            return contextlib.nullcontext()
        return doing("forward pass", computes=True)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Runs one backward pass; gradients are added up until the last one of the step.

        Args:
            loss: scalar.
            is_last: whether the gradients are to be averaged over the replicas afterwards.
        """
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        what = "data parallel reduction of gradients" if is_last else "backward pass"
        with doing(what, computes=True):
            # a tensor of its own: at stage 0 DeepSpeed divides the gradient of what the module
            # returned by the number of micro-batches unless the backward pass began above it
            self.deepspeed.backward(loss.clone(), scale_wrt_gas=False)

    def step(self) -> bool:
        """Updates the parameters; whether DeepSpeed did."""
        for fence in self.fences:
            fence()
        with doing("optimizer step", computes=True):
            self.deepspeed.step()
        return bool(self.deepspeed.was_step_applied())

    @torch.no_grad()
    def clip_gradients(self, grad_norm: float, max_grad_norm: float) -> None:
        """Scales all gradients so that their norm is at most `max_grad_norm`; 0 means no limit.

        Args:
            grad_norm: norm of the whole gradient, the same number on every process.
            max_grad_norm: the limit.
        """
        factor = max_grad_norm / (grad_norm + 1e-6)  # as torch's own clipping
        if max_grad_norm > 0.0 and factor < 1.0:
            for gradients in self._gradients():
                if gradients:
                    torch._foreach_mul_(gradients, factor)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[LanguageModel]:
        """Lends the model for forward passes other than DeepSpeed's own; collective.

        Stage 3 gathers all parameters meanwhile, so that replicas may run different numbers of
        passes: without that each layer of each pass would be a collective operation.
        """
        if self.zero_stage < 3:
            yield self.model
            return
        from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

        with contextlib.ExitStack() as stack:
            with doing("data parallel all-gather of parameters"):
                stack.enter_context(unwrap_model_for_generation(self.deepspeed))
            yield self.model

    def gradient_square_sums(self) -> Tensor:
        """Squared gradient norm of each muP group, before clipping.

        To be called between the last backward pass of a step and `step`. All processes must add
        their results: each element is counted on one process only.

        Returns:
            fp64 (len(GROUPS),), on the device.
        """
        mesh = self.mesh
        squares = torch.zeros(len(GROUPS), dtype=torch.float64, device=mesh.device)
        if self.zero_optimizer is None and mesh.data_parallel_rank > 0:
            return squares  # replicated: replica 0 speaks for all
        # under ZeRO each replica holds a partition of its own, and each element is counted once
        for group, gradients in zip(self.optimizer.param_groups, self._gradients(), strict=True):
            if group["is_sharded"] or mesh.tensor_parallel_rank == 0:
                squares[GROUPS.index(group["mup_group"])] += square_sum(gradients, mesh.device)
        return squares

    def _gradients(self) -> list[list[Tensor]]:
        """Gradients of each parameter group, or this replica's partition of them.

        Where DeepSpeed keeps them between the last backward pass and the step is no interface of
        it: each kind of its optimizers has a place and a form of its own.
        """
        zero = self.zero_optimizer
        if zero is None:
            return [
                [p.grad for p in group["params"] if p.grad is not None]
                for group in self.optimizer.param_groups
            ]
        if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # BF16_Optimizer
            return [[partition] for partition in zero.fp32_groups_gradient_flat_partition]
        if hasattr(zero, "sub_group_to_group_id"):  # stage 3, which splits groups that are large
            groups: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
            for sub_group, gradients in zero.averaged_gradients.items():
                groups[zero.sub_group_to_group_id[sub_group]].extend(gradients)
            return groups
        # stages 1 and 2, as flat partitions
        return [
            list(zero.averaged_gradients[index])
            for index in range(len(self.optimizer.param_groups))
        ]


def square_sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements.

    A CPU adds millions of fp32 squares one after the other and loses four digits of ten, which
    would make the norm depend on how parameters are partitioned: there, chunks are added in fp64.

    Args:
        tensors: fp32 or wider, of any shapes; may be empty.
        device: where they are.

    Returns:
        fp64 scalar.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if device.type == "cpu":
        tensors = [chunk for whole in tensors for chunk in whole.flatten().split(_NORM_CHUNK)]
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()


def build_engine(
    model: LanguageModel,
    config: RunConfig,
    mesh: ParallelMesh,
    partition: Partition | None = None,
) -> TrainingEngine:
    """Hands model, optimizer and objective to DeepSpeed.

    Args:
        model: what this process holds of the model, in fp32; DeepSpeed moves it to the device,
            and to bf16 if the run asks.
        config: the run.
        mesh: ranks of the run; the process group must exist.
        partition: how the model is spread; None computes it.

    Returns:
        The engine.

    Raises:
        InputError: an unknown DeepSpeed, or a global batch that does not divide.
    """
    check_deepspeed_version()
    partition = partition or make_partition(config)
    model.set_recompute(config.parallel.recompute)
    model.to(mesh.device)
    optimizer = build_optimizer(model, config)
    module: nn.Module = TrainingForward(model, Objective(config, mesh))
    # for the whole run: DeepSpeed calls collectives by names that torch 2.13 deprecates
    warnings.filterwarnings("ignore", r"`torch\.distributed\.", FutureWarning)
    with _quietly() as printed:
        deepspeed = import_deepspeed()
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_dictionary(config, mesh.data_parallel_size),
            dist_init_required=False,  # `process_group` has done it, with a rendezvous that names
            mpu=ModelParallelUnit(mesh),
        )
    logger.debug("deepspeed.initialize said:\n%s", printed.getvalue())
    pipeline = Pipeline(model, config, mesh, partition)
    return TrainingEngine(
        engine, model, optimizer, mesh, config.parallel.zero_stage, partition, pipeline
    )


@contextlib.contextmanager
def _quietly() -> Iterator[io.StringIO]:
    """Catches memory figures that no log level turns off, and deprecations in DeepSpeed's own code.

    Each figure comes after a collection of garbage, a dozen of them in bf16, which together took
    seconds; objects that are frozen meanwhile are not visited.
    """
    printed = io.StringIO()
    gc.freeze()
    try:
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield printed
    finally:
        gc.unfreeze()


def import_deepspeed() -> Any:
    """DeepSpeed without what its import and first use would compile."""
    import deepspeed

    # the operator only serves inference; compiling it needs a compiler and a lock that a killed
    # process leaves behind (not `import deepspeed.comm.torch`: that name is torch itself)
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    # ZeRO imports Muon to ask whether the optimizer is one, and Muon decorates its kernels: that
    # would import the whole of torch's compiler, at every start and for nothing
    compiler: Any = import_module("deepspeed.runtime.compiler")
    compiler.compile = lambda: compiler.dummy_decorator
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
