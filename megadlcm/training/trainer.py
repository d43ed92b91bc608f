"""The loop: step, log, evaluate, save."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.reading.batch import StepBatch
from data_pipeline.tokenizer import Tokenizer
from megadlcm.checkpoint.save import Saver
from megadlcm.config import RunConfig
from megadlcm.engine.engine import TrainingEngine
from megadlcm.engine.learning_rate import apply_learning_rates, learning_rate_factor, learning_rates
from megadlcm.engine.state import TrainState
from megadlcm.engine.step import StepResult, TrainStep, calibrate_boundaries, global_batch_digest
from megadlcm.inference.evaluation import Evaluator
from megadlcm.inference.marked_text import choose_documents, marked_text, text_batch
from megadlcm.model import LanguageModel
from megadlcm.model.output import ModelOutput
from megadlcm.model.self_check import check_causality
from megadlcm.parallel.watch.activity import arrive
from megadlcm.run_folder import files
from megadlcm.training.metrics import MetricsWriter, step_row
from megadlcm.training.progress import ProgressReport
from megadlcm.training.replica_loader import ReplicaLoader
from megadlcm.training.skipped import SkippedRecord
from megadlcm.training.throughput import (
    peak_flops,
    peak_memory_bytes,
    training_flops_per_token,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What the trainer reads and what it knows of it."""

    loader: ReplicaLoader
    """This process's part of each step."""
    tokenizer: Tokenizer
    """For sample texts."""
    skipped: SkippedRecord
    """Keeps what is left out of the samples."""


class Trainer:
    """Trains from the state it is given to the last step.

    Args:
        engine: the engine, resumed or fresh.
        config: the resolved run.
        state: counters; changed in place.
        data: loader and tokenizer.
        metrics: where rows go; None on ranks that do not write.
        saver: commits checkpoints.
    """

    def __init__(
        self,
        engine: TrainingEngine,
        config: RunConfig,
        state: TrainState,
        data: TrainingData,
        metrics: MetricsWriter | None,
        saver: Saver,
    ) -> None:
        self.engine, self.config, self.state = engine, config, state
        self.data, self.metrics, self.saver = data, metrics, saver
        self.train_steps = config.total_steps
        self.step = TrainStep(engine, config)
        self.progress = ProgressReport(state.step, self.train_steps, enabled=engine.mesh.is_writer)
        self.evaluator: Evaluator | None = None
        if config.data.valid:
            self.evaluator = Evaluator(config, engine.mesh, data.tokenizer.eos_id)
        self.peak_flops = peak_flops(config, engine.mesh.device) if metrics is not None else None
        self._saved_step = state.step

    def fit(self) -> TrainState:
        """Runs the remaining steps; the last one is evaluated and saved whatever the intervals.

        Returns:
            The final counters.

        Raises:
            NonFiniteError: a loss or a gradient was not finite.
        """
        pipeline = self.engine.pipeline
        # at every start, since a leak trains to a good loss unnoticed
        with self.engine.whole_model() as model:
            check_causality(model, forward=pipeline.output, share=pipeline.share_from_head)
        try:
            while self.state.step < self.train_steps:
                self.train_one()
                last = self.state.step == self.train_steps
                if last or _due(self.state.step, self.config.evaluation.interval_steps):
                    self._evaluate()
                # after the evaluation: a checkpoint claims that its step's rows are written
                if last or _due(self.state.step, self.config.checkpoint.interval_steps):
                    self._save(last)
                else:
                    self.saver.tick()
        finally:
            self.progress.close()
        return self.state

    def train_one(self) -> None:
        """Runs the next step and logs it."""
        arrive(f"step {self.state.step + 1}")
        started = time.perf_counter()
        batch = next(self.data.loader)
        data_seconds = time.perf_counter() - started
        state, config = self.state, self.config
        assert batch.first_sample == state.consumed_samples
        self.data.skipped.add(batch, state)
        # before the first forward pass; a resumed run has the offset in its checkpoint
        if state.step == 0:
            self._calibrate(batch)
        factor = learning_rate_factor(config.schedule, state.step, self.train_steps)
        apply_learning_rates(self.engine.optimizer, factor)
        result = self.step.run(batch, state)  # draws by the number of steps completed
        state.step += 1
        state.consumed_samples += config.training.global_batch_size
        state.consumed_tokens += int(result.summary.num_tokens)
        state.previous_boundary_fraction = result.summary.boundary_fraction
        if _due(state.step, config.logging.interval_steps) or state.step == self.train_steps:
            step_seconds = time.perf_counter() - started
            self._log(batch, result, step_seconds, data_seconds)

    def _calibrate(self, batch: StepBatch) -> None:
        if self.config.model.calibrates:
            offset = calibrate_boundaries(self.engine, self.config, batch)
            said = (
                f"boundary offset stays 0: in the first batch no piece has a second token; the "
                f"ratio starts wherever plain scores put it (data.seq_len = "
                f"{self.config.data.seq_len})"
                if offset is None
                else f"boundary offset set to {offset:.4f} from the first batch"
            )
            self.progress.say(said)

    def _log(
        self, batch: StepBatch, result: StepResult, step_seconds: float, data_seconds: float
    ) -> None:
        # collective, so before the processes that write nothing leave
        digest = global_batch_digest(self.engine, batch)
        rates: dict[str, float] = {}
        for own in self.engine.mesh.gather_over_pipeline(learning_rates(self.engine.optimizer)):
            rates |= own
        if self.metrics is None:
            return
        summary = result.summary
        rate = summary.num_tokens / step_seconds
        timing = {
            "tokens_per_second": rate,
            "step_seconds": step_seconds,
            "data_seconds": data_seconds,
            "checkpoint_wait_seconds": self.saver.take_waited_seconds(),
            "memory_bytes": peak_memory_bytes(self.engine.mesh.device),
        }
        if self.peak_flops is not None:
            ratio = summary.num_tokens / summary.num_boundaries if summary.num_boundaries else None
            # at the ratio that was drawn: FLOPs of the backbone follow the concepts there were
            achieved = training_flops_per_token(self.config, ratio) * rate
            world_peak = self.peak_flops * self.engine.mesh.world_size
            timing["model_flops_utilization"] = achieved / world_peak
        row = step_row(
            result,
            self.state,
            self.config,
            learning_rates=rates,
            timing=timing,
            digest=digest,
            world_size=self.engine.mesh.world_size,
        )
        self.metrics.write(row)
        if self.metrics.events is not None:
            self.metrics.events.write_lengths(summary.concept_lengths, self.state.step)
        self.progress.show(row)

    def _evaluate(self) -> None:
        # no held-out data is a choice: `data.valid=[]`
        if self.evaluator is None:
            return
        arrive(f"evaluation after step {self.state.step}")
        with self.engine.whole_model() as model:
            passes = self.engine.pipeline.outputs
            row = {"step": self.state.step} | self.evaluator.run(model, passes)
            text = self._sample_texts(model)
        if self.metrics is None:
            return
        # an evaluation that a restart repeats keeps the row that was written first
        row["restart_count"] = self.state.restart_count
        self.metrics.write(row)
        if text:
            self._write_sample_texts(text)
        self.progress.say(
            f"step {self.state.step}: held-out loss {row['eval_loss']:.4f}, "
            f"{row['bits_per_byte']:.4f} bits per byte"
        )

    def _sample_texts(self, model: LanguageModel) -> str:
        assert self.evaluator is not None
        count = self.config.evaluation.num_sample_texts
        if self.config.model.architecture != "dlcm":
            return ""
        documents = choose_documents(self.evaluator.documents, count)
        tokenizer, device = self.data.tokenizer, self.engine.mesh.device
        batches = [text_batch(document, tokenizer.eos_id, device) for document in documents]
        masks: list[list[bool]] = []

        def keep(_: int, output: ModelOutput) -> None:
            assert output.boundary_mask_T is not None
            masks.append(output.boundary_mask_T.tolist())

        was_training = model.training
        model.eval()  # thresholds, as decoding would
        self.engine.pipeline.outputs(batches, keep)
        model.train(was_training)
        shared = self.engine.pipeline.share_from_head(masks)
        return "\n".join(
            marked_text(document, mask, tokenizer)
            for document, mask in zip(documents, shared, strict=True)
        )

    def _write_sample_texts(self, text: str) -> None:
        path = Path(self.config.output_dir) / files.SAMPLES
        path /= f"{files.step_name(self.state.step)}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            # something to look at: neither the run nor the checkpoint of this step waits for it
            logger.warning("no sample text: %s cannot be written (%s)", path, error.strerror)
        if self.metrics is not None and self.metrics.events is not None:
            self.metrics.events.write_text("samples", text, self.state.step)

    def _save(self, is_last: bool) -> None:
        if self._saved_step == self.state.step:
            return
        arrive(f"checkpoint of step {self.state.step}")
        if self.metrics is not None:
            self.metrics.flush()  # a checkpoint claims that the rows of its steps are on the disk
        if is_last:
            self.saver.save(self.state)
        else:
            self.saver.request(self.state)
        self._saved_step = self.state.step


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
