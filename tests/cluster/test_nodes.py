"""Training on two nodes: links that are slow or cut, and nodes that are lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from broken_runs import check_same_bits
from network import Network
from scripts import ROOT, finish, start, wait_for, workers_of

from syncbn.train import load_config, train
from syncbn.train.parity import TOLERANCE, Trained, compare_runs

pytestmark = pytest.mark.timeout(600)  # a busy machine takes minutes to start four launchers and four ranks


def train_on(network: Network, config: Path, out: Path, *arguments: str, **environment: str) -> list[subprocess.Popen]:
    """Start the project's script on each node; node0 serves the store where the nodes meet."""
    settings = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": "node0:29500", "TMPDIR": str(out.parent), **environment}
    script = "torchrun_multinode.sh"
    return [start(script, config, out, *arguments, place=node.enter, **settings) for node in network.nodes]


def wait_for_step(out: Path, step: int) -> None:
    path = out / "metrics.jsonl"
    assert wait_for(lambda: path.exists() and f'"step": {step},' in path.read_text(), 200)


def errors(output: str) -> list[str]:
    return re.findall(r"^syncbn: error: (.*)", output, re.MULTILINE)


def check_answer(config: Path, out: Path, processes: int) -> None:
    """The run has the losses, the weights and the buffers of one process."""
    assert json.loads((out / "result.json").read_text())["processes"] == processes
    values = load_config(config)
    values.task.options["seconds"] = 0.0
    train(values, out.parent / "alone")
    assert compare_runs(Trained.read(out.parent / "alone"), Trained.read(out)).largest <= TOLERANCE


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs but a slow link: a message of an MTU waits for 60 ms, and a step for some of them.

    The watchdog's seconds are less than the run's, and many times those of a step.
    """
    folder = tmp_path_factory.mktemp("whole")
    with Network(2, folder) as network:
        network.slow_down(1, kilobits=200)
        for code, output in map(finish, train_on(network, config, folder / "out", SYNCBN_TIMEOUT="20"), [300, 300]):
            assert code == 0, output
            assert not errors(output)
    return folder / "out"


def test_two_nodes_and_a_slow_link_give_the_answer_of_one_process(config: Path, whole: Path) -> None:
    check_answer(config, whole, processes=2)


def test_the_command_for_kubernetes(network: Network, config: Path, tmp_path: Path) -> None:
    """Kubeflow's variables say where the nodes meet. --resume is there for a restart, and starts a new run as well."""
    (job,) = [
        document
        for document in yaml.safe_load_all((ROOT / "launch/k8s/trainjob.yaml").read_text())
        if document["kind"] == "TrainJob"
    ]
    out = tmp_path / "out"
    trainer = job["spec"]["trainer"]
    here = {"python": sys.executable, "/config/run.yaml": str(config), "/workspace/runs/syncbn-run": str(out)}
    words = [here.get(word, word) for word in [*trainer["command"], *trainer["args"]]]
    assert set(here.values()) < set(words)
    given = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "node0", "PET_MASTER_PORT": "29500"}
    nodes = [
        subprocess.Popen(
            [*node.enter, *words],
            env={**os.environ, **given, "PET_NODE_RANK": str(rank), "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank, node in enumerate(network.nodes)
    ]
    for code, output in map(finish, nodes, [300, 300]):
        assert code == 0, output
    check_answer(config, out, processes=2)


@pytest.mark.slow  # silence is noticed after 50 seconds
def test_a_link_that_is_cut_ends_all_ranks_within_a_minute(network: Network, config: Path, tmp_path: Path) -> None:
    """Each side says whom it hears no more, and the launchers end too."""
    out = tmp_path / "out"
    more = ["--gpus", "4", "--per_gpu_batch_size", "4", "--task.options.samples", "100000"]
    nodes = train_on(network, config, out, *more, NPROC="2")
    wait_for_step(out, 5)
    network.cut(1)
    cut = time.monotonic()
    assert len(workers_of(out)) == 4
    assert wait_for(lambda: not workers_of(out), 90)
    assert time.monotonic() - cut < 60
    first, second = [finish(node) for node in nodes]
    assert [first[0], second[0]] == [1, 1]
    gone = "its process or its node is gone, or cannot be reached"
    (said,) = errors(first[1])
    assert re.match(rf"rank 2 gives no sign of life for 50 s: {gone}; .* on node1$", said)
    silent = "rank {} has heard nothing of the other ranks for 50 s: rank 0 or its node, node0, which serves the store"
    *ranks, launcher = errors(second[1])
    assert ranks
    assert all(any(said.startswith(silent.format(rank)) for rank in (2, 3)) for said in ranks)
    assert launcher.startswith("torchrun on node1 needs the store where the nodes meet (node0:29500), and waits")


@pytest.mark.slow  # two runs of two nodes
def test_a_node_that_is_killed_is_named_and_the_run_can_be_resumed(
    network: Network, config: Path, tmp_path: Path, whole: Path
) -> None:
    out = tmp_path / "out"
    nodes = train_on(network, config, out)
    wait_for_step(out, 15)
    network.nodes[1].kill()
    (code, output), _ = [finish(node) for node in nodes]
    assert code == 1
    gone = "the process or its node is gone, or cannot be reached"
    lost = "rank 0 has lost its connection to another rank"
    assert errors(output) == [f"{lost}: rank 1 on node1 gives no sign of life; {gone}"]
    assert re.search(r"exitcode\s*: 86\b", output)
    assert not (out / "result.json").exists()

    network.restart(1)
    for code, output in map(finish, train_on(network, config, out, "--resume"), [200, 200]):
        assert code == 0, output
    check_same_bits(whole, out)


def test_the_node_of_the_store_is_killed(network: Network, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nodes = train_on(network, config, out)
    wait_for_step(out, 5)
    network.nodes[0].kill()
    _, (code, output) = [finish(node) for node in nodes]
    assert code in (1, 86)
    assert any("node0" in said and "is gone, or cannot be reached" in said for said in errors(output)), output
    assert not workers_of(out)


@pytest.mark.slow  # torchrun waits for the lost node
def test_an_elastic_run_survives_the_loss_of_a_node(network: Network, config: Path, tmp_path: Path) -> None:
    """It goes on with the other node from the checkpoint, and ends with the same answer: one process has both GPUs."""
    out = tmp_path / "out"
    patience = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    nodes = train_on(network, config, out, NNODES="1:2", MAX_RESTARTS="1", PET_RDZV_CONF=patience)
    assert wait_for(lambda: len(workers_of(out)) == 2, 100)
    wait_for_step(out, 15)
    network.nodes[1].kill()
    code, output = finish(nodes[0], 200)
    finish(nodes[1])
    assert code == 0, output
    check_answer(config, out, processes=1)
