"""What the machine at hand has."""

from pathlib import Path

import pytest

from cucafera.training.hardware import MEMORY_GROUPS, _left_in_groups, free_memory_bytes


def test_free_memory_is_a_number_of_bytes():
    assert 1 << 20 < free_memory_bytes() < 1 << 50


@pytest.mark.parametrize(("controllers", "kind"), [("", ""), ("cpu,memory", "memory")])
def test_memory_is_limited_by_every_group_around_the_process(tmp_path, controllers, kind):
    _, limit, used, cached = MEMORY_GROUPS[kind]
    for folder, content in (("", "max"), ("slurm/job_7", "1000"), ("slurm/job_7/step_0", "900")):
        group = tmp_path / "groups" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(content + "\n")
        (group / used).write_text("850\n")
        (group / "memory.stat").write_text(f"anon 800\n{cached}30\n")
    (tmp_path / limit).write_text("1")  # not one of the groups
    (tmp_path / "cgroup").write_text(f"3:pids:/\n2:{controllers}:/slurm/job_7/step_0/task_1\n")
    kinds = {kind: (str(tmp_path / "groups"), limit, used, cached)}
    assert list(_left_in_groups(tmp_path / "cgroup", kinds)) == [900 - 850 + 30, 1000 - 850 + 30]


def test_a_system_without_groups_limits_nothing():
    assert list(_left_in_groups(Path("nowhere"), MEMORY_GROUPS)) == []
