"""Saves and loads of a sharded checkpoint against raw writes and reads of the same bytes.

    python -m benchmarks.checkpoints --gigabytes 2 --folder runs/checkpoints

Four processes, one folder. In each round every candidate stands between two raw ones, in random
order: `save` (synchronous, with checksums, fingerprints, index, manifest, publish), torch's
distributed checkpoint (DCP) and DeepSpeed's own save; then, with the files dropped from the page
cache, loads on the same and on another layout, masters only, and a raw read. Ratios are paired
within a round. `async` is by how much a save beside steps makes these longer, over a save.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import machine, spread

_RANKS = 4
_RAW_BLOCK = 8 << 20
Act = Callable[[], object]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the state of the run")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=Path("runs/checkpoints"))
    parser.add_argument("--name", default="checkpoints", help="of the results")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.warm"])
    out = arguments.folder / "results.json"
    words = (arguments.folder.resolve(), arguments.gigabytes, arguments.rounds, out.resolve())
    processes = [context.Process(target=_rank, args=(rank, *words)) for rank in range(_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if [process.exitcode for process in processes] != [0] * _RANKS:
        raise SystemExit("a process failed")
    results = {"machine": machine("torch", "deepspeed"), "load average": os.getloadavg()}
    results |= json.loads(out.read_text())
    (arguments.results / f"{arguments.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    shutil.rmtree(arguments.folder)


def _rank(rank: int, folder: Path, gigabytes: float, rounds: int, out: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(28_700 + os.getppid() % 200),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    import torch

    torch.set_num_threads(1)
    bench = _Bench(folder, gigabytes)
    found = bench.run(rounds)
    if rank == 0:
        out.write_text(json.dumps(found))
    bench.mesh.barrier()
    os._exit(0)


class _Bench:
    """One process of the benchmark."""

    def __init__(self, folder: Path, gigabytes: float) -> None:
        from megadlcm.checkpoint.save import Saver
        from megadlcm.checkpoint.slices import own_slices
        from megadlcm.checkpoint.storage import LocalStorage

        self.folder = folder
        config = _config(folder / "same", gigabytes, 1)
        self.engine = _engine(config)
        self.other = _engine(_config(folder / "other", gigabytes, 2))
        self.mesh = self.engine.mesh
        self.storage = LocalStorage(folder / "same" / "checkpoints")
        attempt = self.mesh.broadcast_object(os.urandom(16).hex())
        self.saver = Saver(self.engine, config, self.storage, attempt)
        self.slices = own_slices(self.engine, share=True)
        self.num_bytes = 4 * sum(
            view.numel() for each in self.slices for view in each.views.values()
        )
        self.total = sum(self.mesh.gather_over_run(self.num_bytes))
        self.raw = np.random.default_rng(self.mesh.rank).bytes(_RAW_BLOCK)
        self.step = 0

    # -- candidates -------------------------------------------------------------------------------

    def raw_write(self) -> None:
        path = self.folder / f"raw_{self.mesh.rank}"
        with path.open("wb", buffering=0) as file:
            left = self.num_bytes
            while left > 0:
                left -= file.write(self.raw[: min(left, _RAW_BLOCK)])
            os.fsync(file.fileno())

    def save(self) -> None:
        from megadlcm.engine.state import TrainState

        self.step += 1
        self.saver.save(TrainState(self.step, self.step))

    def dcp(self) -> None:
        import torch.distributed.checkpoint as dcp

        state = {
            f"{each.part.tensor}/{self.mesh.rank}/{each.part.start}/{key}": view
            for each in self.slices
            for key, view in each.views.items()
        }
        save: Any = dcp.save  # type: ignore[attr-defined]
        save(state, checkpoint_id=self.folder / "dcp")

    def deepspeed(self) -> None:
        self.engine.deepspeed.save_checkpoint(str(self.folder / "deepspeed"), tag="x")

    def raw_read(self) -> None:
        path = self.storage.root / self._newest() / f"rank_{self.mesh.rank:05d}.safetensors"
        buffer = bytearray(_RAW_BLOCK)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def load(self, engine: Any) -> None:
        from megadlcm.checkpoint.folder import open_checkpoint
        from megadlcm.checkpoint.load import load

        load(engine, open_checkpoint(self.storage, self._newest()))

    def masters_only(self) -> None:
        """As a single process would load the model."""
        if self.mesh.rank == 0:
            from megadlcm.checkpoint.load_model import load_model

            load_model(self.storage.root / self._newest())

    def _newest(self) -> str:
        return self.storage.names()[0]

    # -- rounds -----------------------------------------------------------------------------------

    def run(self, rounds: int) -> dict[str, Any]:
        draw = random.Random(0)
        writes: dict[str, Act] = {
            "save": self.save, "DCP": self.dcp, "DeepSpeed": self.deepspeed,
        }  # fmt: skip
        reads: dict[str, Act] = {
            "load, same layout": lambda: self.load(self.engine),
            "load, other layout": lambda: self.load(self.other),
        }
        timings: dict[str, list[dict[str, float]]] = {}
        for number in range(-1, rounds):
            for ways, raw in ((writes, self.raw_write), (reads, self.raw_read)):
                for name in draw.sample(sorted(ways), len(ways)):
                    before = self._timed(raw, raw == self.raw_read)
                    found = self._timed(ways[name], raw == self.raw_read)
                    after = self._timed(raw, raw == self.raw_read)
                    both = (before["seconds"] + after["seconds"]) / 2
                    found |= {"raw over it": both / found["seconds"]}
                    found |= {"raw_cpu": (before["cpu"] + after["cpu"]) / 2}
                    if number >= 0:
                        timings.setdefault(name, []).append(found)
            self._tidy()
        alone = self._timed(self.masters_only, True)
        stall = self._stall()
        peaks = self.mesh.gather_over_run(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        save = statistics.median(each["seconds"] for each in timings["save"])
        return {
            "bytes": self.total,
            "bytes of the largest process": max(self.mesh.gather_over_run(self.num_bytes)),
            "rounds": rounds,
            "candidates": {name: _summary(found, self.total) for name, found in timings.items()},
            "masters by one process": alone,
            "asynchronous": stall | {"extra over a save": stall["extra seconds"] / save},
            "peak resident kB by process": peaks,
        }

    def _timed(self, act: Act, is_cold: bool) -> dict[str, float]:
        if is_cold:
            self._drop_caches()
        self.mesh.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        act()
        own = time.process_time() - cpu
        self.mesh.barrier()
        seconds = time.perf_counter() - wall
        return {"seconds": seconds, "cpu": sum(self.mesh.gather_over_run(own))}

    def _drop_caches(self) -> None:
        if self.mesh.rank == 0:
            for path in (self.storage.root / self._newest()).iterdir():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def _tidy(self) -> None:
        self.mesh.barrier()
        if self.mesh.rank == 0:
            for name in ("dcp", "deepspeed"):
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _stall(self, steps: int = 24) -> dict[str, float]:
        """Steps of computing alone, with and without a save beside them."""
        from megadlcm.engine.state import TrainState

        totals: dict[bool, list[float]] = {True: [], False: []}
        waits = []
        for number in range(6):
            saves = number % 2 == 1
            self.mesh.barrier()
            started = time.perf_counter()
            for step in range(steps):
                if step == 1 and saves:
                    self.step += 1
                    self.saver.request(TrainState(self.step, self.step))
                _compute()
                for fence in self.engine.fences:
                    fence()
                self.saver.tick()
                self.mesh.barrier()
            totals[saves].append(time.perf_counter() - started)
            waits.append(self.saver.take_waited_seconds())
            self.saver.wait()
            self.saver.take_waited_seconds()
        extra = statistics.median(totals[True]) - statistics.median(totals[False])
        return {
            "steps": steps,
            "seconds without": statistics.median(totals[False]),
            "extra seconds": extra,
            "waited at the fence": max(waits),
        }


def _compute(size: int = 700) -> None:
    """What a step computes: about half a second of a core."""
    values = np.ones((size, size))
    for _ in range(12):
        values = np.clip(values @ values, 0.0, 1.0)


def _summary(found: list[dict[str, float]], total: int) -> dict[str, Any]:
    return {
        "raw over it": spread([each["raw over it"] for each in found]),
        "seconds": spread([each["seconds"] for each in found]),
        "CPU seconds per GB": statistics.median(each["cpu"] for each in found) / (total / 1e9),
        "of raw": statistics.median(each["raw_cpu"] for each in found) / (total / 1e9),
    }


def _config(folder: Path, gigabytes: float, tensor: int) -> Any:
    from megadlcm.config import config_from_dict

    width = 1280
    # 12 bytes of state for each of about 12 x width^2 parameters of a layer
    layers = max(1, round(gigabytes * 1e9 / (12 * 12 * width * width)))
    return config_from_dict(
        {
            "name": "bench",
            "output_dir": str(folder),
            "model": {
                "architecture": "dlcm", "vocab_size": 4096, "d_token": 256, "d_concept": width,
                "encoder_layers": 1, "backbone_layers": layers, "decoder_layers": 1,
                "token_heads": 4, "token_kv_heads": 4, "concept_heads": 20, "concept_kv_heads": 20,
                "token_ffn_size": 512, "concept_ffn_size": 8 * width // 3 // 64 * 64,
            },
            "data": {"train": [{"path": "nowhere", "name": "none"}], "seq_len": 64},
            "parallel": {"zero_stage": 1, "tensor_parallel_size": tensor},
            "training": {"train_steps": 10, "global_batch_size": 4, "micro_batch_size": 1},
            "checkpoint": {"async": True, "keep": 1, "interval_steps": 0},
        }
    )  # fmt: skip


def _engine(config: Any) -> Any:
    import torch

    from megadlcm.engine.engine import build_engine
    from megadlcm.engine.masters import make_states
    from megadlcm.parallel.partition import build_stage_model
    from megadlcm.parallel.process_group import join_process_group

    mesh = join_process_group(config.parallel)
    engine = build_engine(build_stage_model(config, mesh), config, mesh)
    make_states(engine, ["exp_avg", "exp_avg_sq"], 1)
    for state in engine.optimizer.state.values():
        for value in state.values():
            if torch.is_tensor(value) and value.numel() > 1:
                value.normal_()
    return engine


if __name__ == "__main__":
    main()
