# SPDX-License-Identifier: Apache-2.0
"""What a program can still get: of the machine, and within its control groups."""

from __future__ import annotations

import jax
import pytest

from semlic_jax import memory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Function (lines of /proc/self/cgroup, files of groups) on 8 GiB that are left."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n"
    )

    def put(lines, files):
        (tmp_path / "proc" / "self" / "cgroup").write_text("".join(lines))
        for name, value in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    return put


def group(most, used, spare=0):
    """Files of a group of version 2."""
    stat = f"anon 1\ninactive_file {spare - spare // 2}\nactive_file {spare // 2}"
    return {"memory.max": most, "memory.current": used, "memory.stat": stat}


def under(folder, files):
    return {f"{folder}/{name}": value for name, value in files.items()}


def old_group(most, used, spare=0):
    """Files of a group of version 1, where inactive_file leaves out those below."""
    stat = f"inactive_file 3\ntotal_inactive_file {spare}\nactive_file 5"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return dict(zip(names, (most, used, stat), strict=True))


V2 = ["0::/job/step\n"]
V1 = ["5:cpu,cpuacct:/\n", "4:memory:/job/step\n", "0::/\n"]


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        ([], {}, 8),
        (V2, {}, 8),  # a kernel without the controller
        (V2, under("job/step", group("max", 9 * GIB)), 8),
        (V2, under("job/step", group(4 * GIB, GIB)), 3),
        (V2, under("job/step", group(32 * GIB, GIB)), 8),  # more than there is
        # Pages of files are there for whoever needs memory.
        (V2, under("job/step", group(4 * GIB, 3 * GIB, 2 * GIB)), 3),
        (V2, under("job/step", group(GIB, 2 * GIB)), 0),
        # The limits above count too; a container sees its own group as the top.
        (
            V2,
            under("job/step", group("max", GIB)) | under("job", group(4 * GIB, GIB)),
            3,
        ),
        (V2, group(2 * GIB, GIB), 1),
        (V1, under("memory/job/step", old_group(4 * GIB, 3 * GIB, GIB)), 2),
        (V1, under("memory/job/step", old_group(2**63 - 4096, GIB)), 8),
        (V1, under("memory", old_group(2 * GIB, GIB)), 1),
    ],
)
def test_the_least_that_any_limit_leaves(machine, lines, files, left):
    machine(lines, files)
    assert memory.available_bytes() == left * GIB


def test_without_control_groups_it_is_what_the_machine_has(machine, tmp_path):
    assert memory.available_bytes() == 8 * GIB
    (tmp_path / "proc" / "meminfo").unlink()  # not Linux
    assert memory.available_bytes() is None


@pytest.mark.parametrize(
    ("lines", "files", "left"),
    [
        (["0::/pods:cri:job\n"], under("pods:cri:job", group(4 * GIB, GIB)), 3),
        (
            ["4:memory,hugetlb:/job\n"],
            under("memory/job", old_group(4 * GIB, 3 * GIB, GIB)),
            2,
        ),
    ],
)
def test_groups_with_colons_and_shared_controllers(machine, lines, files, left):
    machine(lines, files)
    assert memory.available_bytes() == left * GIB


def test_memory_of_the_machine_says_nothing_of_an_accelerator(machine, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert memory.available_bytes() is None


@pytest.mark.parametrize("text", ["MemTotal: 9 kB\n", "MemAvailable: much kB\n", "?\n"])
def test_other_words_of_the_system_are_no_error(machine, tmp_path, text):
    (tmp_path / "proc" / "meminfo").write_text(text)
    assert memory.available_bytes() is None
