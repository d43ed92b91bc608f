"""`megadlcm plan CONFIG`: what a run costs, without a GPU."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from data_pipeline.commands.arguments import add_command, integer, positive, share
from megadlcm.commands.arguments import add_config_arguments

if TYPE_CHECKING:
    from megadlcm.config import RunConfig
    from megadlcm.plan.layout import Hardware

_EXAMPLE = """\
examples:
  megadlcm plan configs/quickstart.yaml
  megadlcm plan configs/dlcm_2.3b.yaml --nodes 16 --gpus-per-node 8 --peak-tflops 989
  megadlcm plan configs/dlcm_87m.yaml parallel.zero_stage=2 --device-memory 24 --json
  megadlcm plan configs/dlcm_2.3b.yaml --nodes 64 --gpus-per-node 8 --device-memory 80 --layouts"""


def add_parser(commands: Any) -> None:
    """Adds the command; see `add_command`."""
    summary = "what a run costs: parameters, compute, memory, time; exit 2 if it cannot work"
    parser = add_command(commands, "plan", summary, _EXAMPLE)
    parser.set_defaults(run=_run)
    add_config_arguments(parser)
    _add_hardware(parser)
    parser.add_argument(
        "--layouts",
        type=integer(1),
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


def _add_hardware(parser: argparse.ArgumentParser) -> None:
    # everything the plan cannot know from the config: machines, and how fast they are
    parser.add_argument("--nodes", type=integer(1), default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--gpus-per-node", type=integer(1), default=1, metavar="G", help="default: 1"
    )
    parser.add_argument(
        "--peak-tflops", type=positive, metavar="X", help="of one device; for the time"
    )
    parser.add_argument(
        "--mfu",
        type=share,
        metavar="X",
        help="share of the peak while a device computes (default: 0.4)",
    )
    parser.add_argument(
        "--intra-bandwidth",
        type=positive,
        metavar="GB/s",
        help="what a device sends inside its node (default: 300)",
    )
    parser.add_argument(
        "--inter-bandwidth",
        type=positive,
        metavar="GB/s",
        help="what a device sends to other nodes (default: 50)",
    )
    parser.add_argument(
        "--write-bandwidth",
        type=positive,
        metavar="GB/s",
        help="what a node writes to the storage of checkpoints (default: 1)",
    )
    parser.add_argument(
        "--failure-hours",
        type=positive,
        metavar="H",
        help="mean time between failures of the whole run; for the interval of checkpoints",
    )
    parser.add_argument(
        "--device-memory", type=positive, metavar="GIB", help="refuse a run that needs more"
    )


def _run(arguments: argparse.Namespace) -> int:
    """Prints the plan of a run; 0."""
    from megadlcm.commands.plan_table import render_plan
    from megadlcm.config import load_config
    from megadlcm.plan.report import make_plan, plan_to_dict

    config, hardware = load_config(arguments.config, arguments.overrides), _hardware(arguments)
    if arguments.layouts is not None:
        return _run_layouts(arguments, config, hardware)
    plan = make_plan(config, hardware)
    values, lines = plan_to_dict(plan), list[str]()
    if arguments.verify:
        from megadlcm.parallel.verify import verify_layout  # needs torch; the plan itself does not

        verified = verify_layout(config, hardware.world_size)
        values["verified"] = verified.to_dict()
        lines = ["", verified.render()]
    if arguments.json:
        print(json.dumps(values, indent=2))
    else:  # only here: tables load rich, which is a third of the time that JSON takes
        print("\n".join([render_plan(plan), *lines]))
    return 0


def _run_layouts(arguments: argparse.Namespace, config: RunConfig, hardware: Hardware) -> int:
    from data_pipeline.errors import InputError
    from megadlcm.commands.plan_table import render_ranking
    from megadlcm.plan.report import ranking_to_dict
    from megadlcm.plan.search import rank_layouts

    if arguments.verify:
        raise InputError("--verify is for one layout; leave --layouts out", key="--layouts")
    ranking = rank_layouts(config, hardware)
    # no answer is wrong input: the machines, the memory or the model must change
    if not ranking.layouts:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in ranking.refused.items())
        raise InputError(f"no layout of {hardware.world_size} processes works: {reasons}")
    if arguments.json:
        print(json.dumps(ranking_to_dict(ranking, arguments.layouts), indent=2))
    else:
        print(render_ranking(ranking, arguments.layouts))
    return 0


def _hardware(arguments: argparse.Namespace) -> Hardware:
    from megadlcm.plan.layout import Hardware

    given = {
        "peak_tflops": arguments.peak_tflops,
        "model_flops_utilization": arguments.mfu,
        "device_memory_gib": arguments.device_memory,
        "intra_node_gb": arguments.intra_bandwidth,
        "inter_node_gb": arguments.inter_bandwidth,
        "write_gb": arguments.write_bandwidth,
        "failure_hours": arguments.failure_hours,
    }
    # what is not given keeps the default that `Hardware` has
    known = {name: value for name, value in given.items() if value is not None}
    return Hardware(arguments.nodes, arguments.gpus_per_node, **known)
