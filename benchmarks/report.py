"""From run folders to summaries, and from summaries to the tables that are kept."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from megadlcm.config import load_config
from megadlcm.plan.accounting import flops_per_token
from megadlcm.run_folder.rows import evaluation_rows, read_rows, training_rows

_WINDOW = 50
_DOMAINS = ("en", "zh", "code", "math")


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
    rows = read_rows(run_folder)
    steps, evaluation = training_rows(rows), evaluation_rows(rows)[-1]
    last_third = steps[-(len(steps) // 3) :]
    config = load_config(run_folder / "config.yaml")
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
        "eval_tokens": evaluation["eval_tokens"],
    }
    realised = None
    if config.model.architecture == "dlcm":
        sampled = [row["tokens_per_concept"] for row in last_third]
        threshold = [row["tokens_per_concept_threshold"] for row in last_third]
        width = min(_WINDOW, len(sampled))
        moving = [
            statistics.harmonic_mean(sampled[start : start + width])
            for start in range(len(sampled) - width + 1)
        ]
        summary |= {
            "target": config.model.target_tokens_per_concept,
            "sampled": statistics.harmonic_mean(sampled),
            "threshold": statistics.harmonic_mean(threshold),
            "moving": [min(moving), max(moving)],
            "single_step": [min(sampled), max(sampled)],
            "held_out_tokens_per_concept": evaluation["tokens_per_concept"],
            "held_out_ratio": evaluation["tokens_per_concept_overall"],
        }
        realised = summary["sampled"]
    flops = flops_per_token(config.model, config.data.seq_len, realised)
    return summary | {"mflops_per_token": flops["total"] / 1e6}


def write_tables(folder: Path, results: Path) -> None:
    """Writes the summaries of all finished runs as JSON and as Markdown tables.

    Args:
        folder: parent of the run folders.
        results: where `experiments.json` and `experiments.md` go.
    """
    summaries = [json.loads(path.read_text()) for path in sorted(folder.glob("*/summary.json"))]
    results.mkdir(parents=True, exist_ok=True)
    (results / "experiments.json").write_text(json.dumps(summaries, indent=1) + "\n")
    ratio, quality = (
        [entry for entry in summaries if entry["suite"] == suite] for suite in ("ratio", "quality")
    )
    lines = ["# Realised compression", "", *_ratio_table(ratio)]
    lines += ["", "# Two thresholds", "", *_threshold_table(ratio)]
    lines += ["", "# Held-out bits per byte", "", *_quality_table(quality)]
    (results / "experiments.md").write_text("\n".join(lines) + "\n")


def _ratio_table(summaries: list[dict[str, Any]]) -> list[str]:
    lines = [
        "On training text, over the last third of each run: `sampled` as training draws,",
        "`thresholded` as evaluation decides, both with their error; `50-step means` of the",
        "sampled one: the lowest and the highest. Then held-out text by domain, thresholded.",
        "",
        "| run | seed | target | sampled | error | 50-step means | thresholded | error "
        "| held out: en, zh, code, math |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for entry in summaries:
        target, (low, high) = entry["target"], entry["moving"]
        domains = ", ".join(
            f"{entry['held_out_tokens_per_concept'].get(name, float('nan')):.2f}"
            for name in _DOMAINS
        )
        lines.append(
            f"| {entry['model']} | {entry['seed']} | {target:g} "
            f"| {entry['sampled']:.3f} | {entry['sampled'] / target - 1:+.1%} "
            f"| {low:.2f} to {high:.2f} "
            f"| {entry['threshold']:.3f} | {entry['threshold'] / target - 1:+.1%} | {domains} |"
        )
    return lines


def _threshold_table(summaries: list[dict[str, Any]]) -> list[str]:
    """The same weights, evaluated at the tracked threshold and at 0.5."""
    lines = [
        "Held-out text, the same weights: as the run evaluates, and at 0.5 in learned modes.",
        "",
        "| run | seed | MFLOP/token | tokens per concept: tracked, 0.5 "
        "| bits per byte: tracked | 0.5 | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in summaries:
        half = entry["at_half"]
        lines.append(
            f"| {entry['model']} | {entry['seed']} | {entry['mflops_per_token']:.2f} "
            f"| {entry['held_out_ratio']:.2f}, {half['tokens_per_concept_overall']:.2f} "
            f"| {entry['bits_per_byte']:.4f} | {half['bits_per_byte']:.4f} "
            f"| {entry['bits_per_byte'] - half['bits_per_byte']:+.4f} |"
        )
    return lines


def _quality_table(compared: list[dict[str, Any]]) -> list[str]:
    """The comparison at equal tokens and equal forward FLOPs per token."""
    tokens = {entry["tokens"] for entry in compared}
    if len(tokens) > 1:
        raise ValueError(f"runs of {sorted(tokens)} tokens in one table; remove the stale ones")
    lines = [
        "Equal tokens; the dense control has the forward FLOPs per token of the DLCM at R = 4.",
        "Held-out documents: all of en, zh and code, the first 64 of math.",
        "",
        "| model | seeds | tokens | MFLOP/token | bits per byte (mean) | each seed "
        "| en | zh | code | math |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(entry["model"] for entry in compared):
        group = [entry for entry in compared if entry["model"] == model]
        values = [entry["bits_per_byte"] for entry in group]
        flops = statistics.fmean(entry["mflops_per_token"] for entry in group)
        domains = " | ".join(
            f"{statistics.fmean(entry['bits_per_byte_by_domain'][name] for entry in group):.4f}"
            for name in _DOMAINS
        )
        each = ", ".join(f"{value:.4f}" for value in values)
        lines.append(
            f"| {model} | {len(group)} | {group[0]['tokens']:,} | {flops:.2f} "
            f"| {statistics.fmean(values):.4f} | {each} | {domains} |"
        )
    return lines
