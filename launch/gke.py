# SPDX-License-Identifier: Apache-2.0
"""Kubernetes: fills in the $names of the manifest `jobset.yaml` and applies it.

A slice of TPUs has one pod per host, and GKE tells JAX which these are; a GPU job has
one pod per node, and the pods find the first one by its name.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import string
import sys

from launch.tasks import ROOT, Task, run_tool, shown

_TEMPLATE = ROOT / "launch" / "jobset.yaml"
# The controller appends to the name, and a host's name has at most 63 characters.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_TOPOLOGY = re.compile(r"\d+(x\d+){1,2}")
_PORT = 8476
_RESOURCE = "jobsets.jobset.x-k8s.io"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this target."""
    parser.add_argument("--name", required=True, help="name of the JobSet")
    parser.add_argument(
        "--image", required=True, help="container image, built with launch/Dockerfile"
    )
    parser.add_argument(
        "--namespace", default="default", help="Kubernetes namespace; default: default"
    )
    parser.add_argument(
        "--service-account",
        default="default",
        metavar="A",
        help="Kubernetes service account; default: default",
    )
    parser.add_argument(
        "--tpu", metavar="TYPE", help="TPU type, such as tpu-v4-podslice"
    )
    parser.add_argument(
        "--topology", metavar="T", help="topology of the TPUs, such as 2x2x4"
    )
    parser.add_argument(
        "--chips-per-host",
        metavar="N",
        type=int,
        default=4,
        help="TPU chips per host; default 4",
    )
    parser.add_argument(
        "--gpu", metavar="TYPE", help="GPU type, such as nvidia-h100-80gb"
    )
    parser.add_argument(
        "--nodes",
        metavar="N",
        type=int,
        default=1,
        help="number of nodes with GPUs; default 1",
    )
    parser.add_argument(
        "--gpus-per-node",
        metavar="N",
        type=int,
        default=8,
        help="GPUs per node; default 8",
    )
    parser.add_argument(
        "--spot",
        action="store_true",
        help="use spot machines: cheaper, but they can be preempted",
    )
    parser.add_argument(
        "--restarts",
        metavar="N",
        type=int,
        default=10,
        help="restarts before the JobSet fails; default 10",
    )


def start(options: argparse.Namespace, task: Task) -> int:
    """Apply the manifest, in place of a set of this name that has ended.

    Raises:
        ValueError: an argument is wrong, another set of this name is running, or
            kubectl is missing, not permitted or fails.
    """
    task.check_paths_shared("a JobSet")
    manifest = _manifest(options, task.shipped_config())
    place = ["-n", options.namespace]
    named = [_RESOURCE, options.name, *place]
    # Empty without such a set, and while it runs.
    state = ["kubectl", "get", *named, "--ignore-not-found"]
    state += ["-o", "jsonpath={.status.terminalState}"]
    # With its jobs, which a new set would take for its own.
    delete = ["kubectl", "delete", *named, "--cascade=foreground"]
    if options.dry_run:
        print(f"# whether a set of this name has ended\n{shown(state)}")
        print(f"# if so\n{shown(delete)}")
        print(f"# in any case\nkubectl apply -f - <<'EOF'\n{manifest}EOF")
        return 0
    if shutil.which("kubectl") is None:
        raise ValueError(
            "kubectl was not found: install it and get the credentials of the cluster"
        )
    run_tool(["kubectl", "auth", "can-i", "create", _RESOURCE, *place])
    # The controller leaves a set that has ended as it is, whatever is applied.
    if ended := run_tool(state):
        text = f"launch: the JobSet {options.name} is {ended}: deleting it"
        print(text, file=sys.stderr, flush=True)
        run_tool(delete)
    try:
        print(run_tool(["kubectl", "apply", "-f", "-"], stdin=manifest))
    except ValueError as error:
        # Nothing of what the manifest says can be changed in a set.
        if "immutable" not in str(error):
            raise
        raise ValueError(
            f"another JobSet {options.name} is running in the namespace "
            f"{options.namespace}: wait for its end, delete it "
            f"({shown(delete)}) or give another --name"
        ) from error
    label = f"jobset.sigs.k8s.io/jobset-name={options.name}"
    print(f"kubectl logs -n {options.namespace} -f -l {label} --prefix")
    return 0


def _manifest(options: argparse.Namespace, task: Task) -> str:
    if not _NAME.fullmatch(options.name):
        raise ValueError(
            "--name must be a letter and up to 39 letters, digits and dashes, all "
            f"lower case, found {options.name!r}"
        )
    if bool(options.tpu) == bool(options.gpu):
        raise ValueError(
            "expected either --tpu with --topology or --gpu, found "
            f"{'both' if options.tpu else 'neither'}"
        )
    if options.tpu:
        hosts, selector, limits = _tpus(options)
        distributed = ["--distributed=auto"] if hosts > 1 else []
    else:
        hosts, selector, limits = _gpus(options)
        distributed = [
            "--distributed=explicit",
            f"--coordinator={options.name}-workers-0-0.{options.name}:{_PORT}",
            f"--processes={hosts}",
            # Kubernetes fills this in.
            "--process=$(JOB_COMPLETION_INDEX)",
        ]
    if task.name == "eval" and hosts > 1:
        raise ValueError(f"eval runs on one host, found {hosts} hosts")
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    command = task.command(
        "python",
        "/semlic_jax",
        distributed=distributed if hosts > 1 else (),
        auto=hosts > 1,
    )
    return string.Template(_TEMPLATE.read_text()).safe_substitute(
        name=options.name,
        namespace=options.namespace,
        service_account=options.service_account,
        image=options.image,
        hosts=hosts,
        restarts=options.restarts,
        node_selector=json.dumps(selector),
        limits=json.dumps(limits),
        command=json.dumps(command),
    )


def _tpus(options: argparse.Namespace) -> tuple[int, dict[str, str], dict[str, str]]:
    if not options.topology or not _TOPOLOGY.fullmatch(options.topology):
        raise ValueError(
            f"expected --topology such as 2x2x4, found {options.topology!r}"
        )
    chips = math.prod(map(int, options.topology.split("x")))
    if options.chips_per_host < 1 or chips % options.chips_per_host:
        raise ValueError(
            f"--chips-per-host must divide the {chips} chips of {options.topology}, "
            f"found {options.chips_per_host}"
        )
    selector = {
        "cloud.google.com/gke-tpu-accelerator": options.tpu,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    limits = {"google.com/tpu": str(options.chips_per_host)}
    return chips // options.chips_per_host, selector, limits


def _gpus(options: argparse.Namespace) -> tuple[int, dict[str, str], dict[str, str]]:
    if options.nodes < 1 or options.gpus_per_node < 1:
        raise ValueError(
            "expected --nodes and --gpus-per-node of at least 1, found "
            f"{options.nodes} and {options.gpus_per_node}"
        )
    selector = {"cloud.google.com/gke-accelerator": options.gpu}
    return options.nodes, selector, {"nvidia.com/gpu": str(options.gpus_per_node)}
