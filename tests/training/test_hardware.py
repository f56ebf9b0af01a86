"""What the machine at hand has."""

from pathlib import Path

import pytest

from cucafera.composition import composed_config
from cucafera.model.flops import parameter_count
from cucafera.training.hardware import MEMORY_GROUPS, _left_in_groups, free_memory_bytes, tokens_in_memory


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


def test_more_tokens_fit_where_devices_share_weights_gradients_and_moments():
    ddp, fsdp = (composed_config(["+experiment=pretrain", f"trainer={strategy}"]) for strategy in ("ddp", "fsdp"))
    memory = 30 * parameter_count(ddp.model)
    assert tokens_in_memory(ddp, memory, 8) == tokens_in_memory(ddp, memory, 1) == tokens_in_memory(fsdp, memory, 1)
    # 24 bytes a parameter are to be filled: 8 are left beside 16, and 18.5 beside 12 / 8 + 4
    assert tokens_in_memory(fsdp, memory, 8) == pytest.approx(18.5 / 8 * tokens_in_memory(ddp, memory, 8), abs=1)


def test_a_system_without_groups_limits_nothing():
    assert list(_left_in_groups(Path("nowhere"), MEMORY_GROUPS)) == []
