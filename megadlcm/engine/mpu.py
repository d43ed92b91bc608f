"""The mesh in the words of DeepSpeed."""

from __future__ import annotations

import torch.distributed as dist

from megadlcm.parallel.mesh import ParallelMesh


class ModelParallelUnit:
    """The mesh in the words that DeepSpeed asks for (its `mpu`).

    Args:
        mesh: ranks and groups of this process.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self.mesh = mesh

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Processes over which gradients are averaged and ZeRO shares its state."""
        return self.mesh.data_parallel_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.mesh.data_parallel_group)

    def get_data_parallel_rank(self) -> int:
        return self.mesh.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.data_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Processes over which the squares of a gradient norm are added."""
        return self.mesh.model_parallel_group

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor_parallel_size * self.mesh.pipeline_parallel_size

    def get_model_parallel_rank(self) -> int:
        """0 where parameters that are not sharded are counted."""
        # not the rank in the model parallel group: what later stages hold would never be counted
        return self.mesh.tensor_parallel_rank

    get_tensor_model_parallel_rank = get_model_parallel_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.mesh.tensor_parallel_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.mesh.tensor_parallel_group
