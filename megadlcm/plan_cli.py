"""`megadlcm plan CONFIG`, and the arguments of every command that reads a config."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megadlcm.config import RunConfig
    from megadlcm.plan import Hardware

_EXAMPLE = """\
examples:
  megadlcm plan configs/quickstart.yaml
  megadlcm plan configs/dlcm_2.3b.yaml --nodes 16 --gpus-per-node 8 --peak-tflops 989
  megadlcm plan configs/dlcm_87m.yaml parallel.zero_stage=2 --device-memory 24 --json
  megadlcm plan configs/dlcm_2.3b.yaml --nodes 64 --gpus-per-node 8 --device-memory 80 --layouts"""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds CONFIG and its overrides.

    Args:
        parser: parser of a command.
    """
    parser.add_argument("config", metavar="CONFIG", help="YAML file, such as configs/dlcm_87m.yaml")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="dotted key and value in YAML; has precedence over the file",
    )


def add_plan_parser(subparsers: Any) -> None:
    """Adds the command `plan`.

    Args:
        subparsers: what argparse's add_subparsers returned (its type has no public name).
    """
    parser = subparsers.add_parser(
        "plan",
        help="what a run costs: parameters, compute, memory, time",
        description="Show what a run costs, without a GPU; exit 2 if it cannot work.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="default: 1")
    parser.add_argument("--gpus-per-node", type=_count, default=1, metavar="G", help="default: 1")
    parser.add_argument(
        "--peak-tflops", type=_positive, metavar="X", help="of one device; for the time"
    )
    parser.add_argument(
        "--mfu",
        type=_share,
        default=0.4,
        metavar="X",
        help="share of the peak while a device computes (default: 0.4)",
    )
    parser.add_argument(
        "--intra-bandwidth",
        type=_positive,
        default=300.0,
        metavar="GB/s",
        help="what a device sends inside its node (default: 300)",
    )
    parser.add_argument(
        "--inter-bandwidth",
        type=_positive,
        default=50.0,
        metavar="GB/s",
        help="what a device sends to other nodes (default: 50)",
    )
    parser.add_argument(
        "--device-memory", type=_positive, metavar="GIB", help="refuse a run that needs more"
    )
    parser.add_argument(
        "--layouts",
        type=_count,
        nargs="?",
        const=20,
        metavar="N",
        help="rank the layouts that fit, whatever the config's own is; print N (default: 20)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="build every process's part with torch, without memory, and compare; slower",
    )
    parser.add_argument("--json", action="store_true", help="print JSON with bytes and seconds")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Prints the plan of a run; 0."""
    from megadlcm.config import load_config
    from megadlcm.plan import make_plan, plan_to_dict, render_plan

    config, hardware = load_config(arguments.config, arguments.overrides), _hardware(arguments)
    if arguments.layouts is not None:
        return _run_layouts(arguments, config, hardware)
    plan = make_plan(config, hardware)
    values, text = plan_to_dict(plan), render_plan(plan)
    if arguments.verify:
        from megadlcm.parallel.verify import verify_layout

        verified = verify_layout(config, hardware.world_size)
        values["verified"] = verified.to_dict()
        text += f"\n\n{verified.render()}"
    print(json.dumps(values, indent=2) if arguments.json else text)
    return 0


def _run_layouts(arguments: argparse.Namespace, config: RunConfig, hardware: Hardware) -> int:
    from data_pipeline.errors import InputError
    from megadlcm.plan import ranking_to_dict
    from megadlcm.plan_search import rank_layouts, render_ranking

    if arguments.verify:
        raise InputError("--verify is for one layout; leave --layouts out")
    ranking = rank_layouts(config, hardware)
    if not ranking.layouts:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in ranking.refused.items())
        raise InputError(f"no layout of {hardware.world_size} processes works: {reasons}")
    if arguments.json:
        print(json.dumps(ranking_to_dict(ranking, arguments.layouts), indent=2))
    else:
        print(render_ranking(ranking, arguments.layouts))
    return 0


def _hardware(arguments: argparse.Namespace) -> Hardware:
    from megadlcm.plan import Hardware

    return Hardware(
        num_nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        peak_tflops=arguments.peak_tflops,
        model_flops_utilization=arguments.mfu,
        device_memory_gib=arguments.device_memory,
        intra_node_gb=arguments.intra_bandwidth,
        inter_node_gb=arguments.inter_bandwidth,
    )


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be an integer >= 1")
    return int(text)


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number > 0")
    return number


def _share(text: str) -> float:
    number = _positive(text)
    if number > 1.0:
        raise argparse.ArgumentTypeError(f"{text} must be at most 1; it is a share")
    return number
