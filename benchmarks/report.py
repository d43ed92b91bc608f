"""From run folders to summaries, and from summaries to the tables that are kept."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import yaml

_WINDOW = 50


def summarize(run_folder: Path, suite: str, model: str, seed: int) -> dict[str, Any]:
    """Reduces the metrics of a finished run.

    Ratios are harmonic means over steps (tokens over concepts); `moving` is the range of the
    means over 50 consecutive steps inside the last third.

    Args:
        run_folder: a finished run.
        suite: suite it belongs to.
        model: name of the model in the tables.
        seed: its seed.

    Returns:
        Plain numbers.
    """
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    evaluation = [row for row in rows if "eval_loss" in row][-1]
    last_third = steps[-(len(steps) // 3) :]
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    summary = {
        "suite": suite,
        "model": model,
        "seed": seed,
        "steps": len(steps),
        "tokens": steps[-1]["consumed_tokens"],
        "train_loss": statistics.fmean(row["loss"] for row in last_third),
        "eval_loss": evaluation["eval_loss"],
        "bits_per_byte": evaluation["bits_per_byte"],
        "bits_per_byte_by_domain": evaluation["bits_per_byte_by_domain"],
    }
    if config["model"]["architecture"] == "dlcm":
        sampled = [row["tokens_per_concept"] for row in last_third]
        threshold = [row["tokens_per_concept_threshold"] for row in last_third]
        width = min(_WINDOW, len(sampled))
        moving = [
            statistics.harmonic_mean(sampled[start : start + width])
            for start in range(len(sampled) - width + 1)
        ]
        summary |= {
            "target": config["model"]["target_tokens_per_concept"],
            "sampled": statistics.harmonic_mean(sampled),
            "threshold": statistics.harmonic_mean(threshold),
            "moving": [min(moving), max(moving)],
            "single_step": [min(sampled), max(sampled)],
            "held_out_tokens_per_concept": evaluation["tokens_per_concept"],
        }
    return summary


def write_tables(folder: Path, results: Path) -> None:
    """Writes the summaries of all finished runs as JSON and as Markdown tables.

    Args:
        folder: parent of the run folders.
        results: where `experiments.json` and `experiments.md` go.
    """
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]
    results.mkdir(parents=True, exist_ok=True)
    (results / "experiments.json").write_text(json.dumps(summaries, indent=1) + "\n")
    lines = ["# Realised compression", "", *_ratio_table(summaries)]
    lines += ["", "# Held-out bits per byte", "", *_quality_table(summaries)]
    (results / "experiments.md").write_text("\n".join(lines) + "\n")


def _ratio_table(summaries: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Last third of each run; `50-step means` is their lowest and highest value.",
        "",
        "| run | seed | target | sampled | error | 50-step means | thresholded | held out: "
        "en, zh, code, math |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in summaries:
        if "sampled" not in entry:
            continue
        error = entry["sampled"] / entry["target"] - 1
        domains = ", ".join(
            f"{entry['held_out_tokens_per_concept'].get(name, float('nan')):.2f}"
            for name in ("en", "zh", "code", "math")
        )
        low, high = entry["moving"]
        lines.append(
            f"| {entry['model']} | {entry['seed']} | {entry['target']:g} | {entry['sampled']:.3f} "
            f"| {error:+.1%} | {low:.2f} to {high:.2f} | {entry['threshold']:.3f} | {domains} |"
        )
    return lines


def _quality_table(summaries: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Equal tokens; dense has equal forward FLOPs per token at R = 4.",
        "",
        "| model | seeds | tokens | bits per byte (mean) | each seed | en | zh | code | math |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(entry["model"] for entry in summaries):
        group = [entry for entry in summaries if entry["model"] == model]
        values = [entry["bits_per_byte"] for entry in group]
        domains = " | ".join(
            f"{statistics.fmean(entry['bits_per_byte_by_domain'][name] for entry in group):.4f}"
            for name in ("en", "zh", "code", "math")
        )
        each = ", ".join(f"{value:.4f}" for value in values)
        lines.append(
            f"| {model} | {len(group)} | {group[0]['tokens']:,} | {statistics.fmean(values):.4f} "
            f"| {each} | {domains} |"
        )
    return lines
