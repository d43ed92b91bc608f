"""What a quickstart has come to, in a few lines."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.tables import render_table
from megadlcm.run_folder import files
from megadlcm.run_folder.rows import Row, evaluation_rows, read_rows, training_rows


def print_report(run_folder: Path, seconds: float) -> None:
    """Prints what a finished run has come to.

    Args:
        run_folder: the run folder.
        seconds: time since the quickstart began.
    """
    rows = read_rows(run_folder)
    steps = training_rows(rows)
    # without held-out data, or without concepts, there is less to tell
    evaluation = [{}, *evaluation_rows(rows)][-1]
    last = steps[-1]
    # the last third: the ratio has settled by then, and the speed is that of warm caches
    recent = steps[-max(len(steps) // 3, 1) :]
    print(
        f"\n== quickstart: {last['step']} steps, {seconds / 60:.1f} minutes in all; "
        "ratios and speed over the last third =="
    )
    print(render_table((), _figures(steps, recent, evaluation), left=(0, 1)))
    samples = sorted((run_folder / files.SAMPLES).glob("*.txt"))
    if samples:
        print(f"\nsample text, '{files.BOUNDARY_MARK}' marks concept boundaries ({samples[-1]}):")
        print("\n".join(samples[-1].read_text(encoding="utf-8").splitlines()[:14]))
    print(f"\ncurves: tensorboard --logdir {run_folder / files.TENSORBOARD}")


def _figures(steps: list[Row], recent: list[Row], evaluation: Row) -> list[tuple[str, str]]:
    """What there is to tell, by name."""
    first, last = steps[0], steps[-1]
    # the loss of the steps themselves, noise and all; what it is worth is the held-out one below
    rows = [("training loss", f"{first['loss']:.3f} -> {last['loss']:.3f} nats per token")]
    if evaluation:
        rows += [
            ("held-out loss", f"{evaluation['eval_loss']:.3f} nats per token"),
            ("held-out bits per byte", f"{evaluation['bits_per_byte']:.3f}"),
        ]
    if "tokens_per_concept" in last:
        sampled, thresholded = (
            _tokens_over_concepts([row[key] for row in recent])
            for key in ("tokens_per_concept", "tokens_per_concept_threshold")
        )
        rows += [
            ("tokens per concept", f"{sampled:.2f} in training, as drawn"),
            ("", f"{thresholded:.2f} at inference, thresholded"),
        ]
    if "tokens_per_concept" in evaluation:
        by_domain = evaluation["tokens_per_concept"].items()
        listed = ", ".join(f"{name} {value:.2f}" for name, value in by_domain)
        rows.append(("  held-out, by domain", listed))
    speed = sorted(row["tokens_per_second"] for row in recent)[len(recent) // 2]
    return [*rows, ("tokens per second", f"{speed:,.0f}")]


def _tokens_over_concepts(ratios: list[float]) -> float:
    """The ratio over steps of equally many tokens together."""
    return len(ratios) / sum(1.0 / ratio for ratio in ratios)
