"""Results in the run folder."""

import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cucafera.config.errors import UserError
from cucafera.evaluation import results
from cucafera.evaluation.results import Metric, Result, ResultFile, as_table
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from tests.support import compose_small_run


def result(value: float, task: str = "copa_ca", **settings) -> Result:
    return Result("choices", task, {"acc": Metric(value, 0.01)}, {"limit": None, **settings})


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_repeated_measurement_replaces_the_earlier_result(tmp_path):
    for value in (0.25, 0.5):
        ResultFile(RunFolder(tmp_path)).add(result(value), "step-00000004.ckpt", 4)
    file = ResultFile(RunFolder(tmp_path))
    file.add(result(0.75, limit=10), "step-00000004.ckpt", 4)
    file.add(result(0.125), "step-00000002.ckpt", 2)
    entries = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert [entry["metrics"]["acc"]["value"] for entry in entries] == [0.5, 0.75, 0.125]
    assert entries[0] | {"time": ""} == {
        "kind": "choices", "task": "copa_ca", "metrics": {"acc": {"value": 0.5, "stderr": 0.01}},
        "settings": {"limit": None}, "checkpoint": "step-00000004.ckpt", "step": 4, "time": "",
    }  # fmt: skip
    assert scalars(tmp_path) == {"evaluation/copa_ca/acc": [(2, 0.125), (4, 0.75)]}
    assert len(list(tmp_path.glob("events*"))) == 1


def test_nan_is_null_in_json_and_left_out_of_tensorboard(tmp_path):
    ResultFile(RunFolder(tmp_path)).add(result(float("nan")), "a.ckpt", 4)
    assert json.loads((tmp_path / "evaluation.json").read_text())["results"][0]["metrics"]["acc"]["value"] is None
    assert scalars(tmp_path) == {}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"results": [{"kind": 1}]}', '{"results": 3}'])
def test_a_damaged_file_is_an_error_and_stays_unchanged(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match="is damaged, or was edited"):
        ResultFile(RunFolder(tmp_path))
    assert path.read_text() == content


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(results, "write_evaluation", refuse)
    with pytest.raises(UserError, match=r"cannot be written to .*evaluation\.json: Permission denied"):
        ResultFile(RunFolder(tmp_path)).add(result(0.5), "a.ckpt", 4)


def test_curves_have_each_point_once_after_resuming_and_evaluating_again(runs, tmp_path, monkeypatch):
    for name in ("outputs", "prepared"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "base"
    curve = scalars(folder)["loss/train"]
    ResultFile(RunFolder(folder)).add(result(0.5), "step-00000012.ckpt", 12)
    assert scalars(folder)["evaluation/copa_ca/acc"] == [(12, 0.5)]
    longer = (
        "name=base",
        "model.max_position_embeddings=128",
        "callbacks.prompts=[la mar,el sol]",
        "budget_tokens=4096",
    )
    train(compose_small_run(runs / "corpus.jsonl", *longer), [])
    ResultFile(RunFolder(folder)).add(result(0.625), "step-00000016.ckpt", 16)
    found = scalars(folder)
    assert found["evaluation/copa_ca/acc"] == [(12, 0.5), (16, 0.625)]
    assert found["loss/train"][: len(curve)] == curve and [step for step, _ in found["loss/train"]][-1] == 16
    assert len(list(folder.glob("events*.evaluation"))) == 1


def test_the_table_shows_the_published_scores_of_the_original():
    table = as_table([result(0.55), result(0.25, task="mine")])
    assert "0.5500 ± 0.0100  0.6140 ± 0.0218" in table.splitlines()[1]
    assert table.splitlines()[2].split() == ["mine", "acc", "0.2500", "±", "0.0100"]
    assert "original" not in as_table([result(0.25, task="mine")])
