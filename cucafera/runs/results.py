"""Results of a run: metrics.json and evaluation.json, with a checksum and a known shape.

Tables, model cards and later starts trust these figures, so a file that was edited is refused.
"""

from pathlib import Path
from typing import Any

from cucafera.config.errors import UserError
from cucafera.config.registry import OBJECTIVES
from cucafera.objectives import Objective
from cucafera.runs.shape import NULLABLE_NUMBER, NUMBER, shape_problem
from cucafera.storage import ChecksumError, read_json_with_checksum, write_json_with_checksum

METRICS: dict[str, Any] = {
    "name": str,
    "objective": str,
    "parameters": int,
    "adapter_parameters": int,
    "steps": int,
    "tokens": int,
    "training_seconds": NUMBER,
    "tokens_per_second": NULLABLE_NUMBER,
    "data_wait": NULLABLE_NUMBER,
    "mfu": NULLABLE_NUMBER,
    "device": str,
    "devices": int,
    "precision": str,
    "skipped_updates": int,
    "skipped_batches": [int],
    "train_loss": NULLABLE_NUMBER,
    "validation": [{"step": int, "tokens": int}],
    "samples": [{"prompt": str, "continuation": str, "finish_reason": str}],
}
"""Shape of metrics.json; its validations also have the metrics of the objective."""
ANSWERS: dict[str, Any] = {
    "answers": [{"step": int, "count": int, "stopped": NUMBER, "tokens": NUMBER, "repeated_5gram": NUMBER}],
    "answer_warnings": [str],
}
"""Further shape of metrics.json, of runs since their answers are counted."""
EVALUATION: dict[str, Any] = {
    "results": [
        {
            "kind": str,
            "task": str,
            "metrics": {str: {"value": NULLABLE_NUMBER, "stderr": NULLABLE_NUMBER}},
            "settings": {},
            "checkpoint": str,
            "step": int,
        }
    ]
}
"""Shape of evaluation.json."""


def read_metrics(path: Path) -> dict[str, Any] | None:
    """Return the content of metrics.json; None if there is no such file.

    Raises:
        UserError: it cannot be read, or was edited or damaged since the run wrote it, or is of another version.
    """
    advice = "run the command of this run again to restore it"
    metrics = _read(path, METRICS, advice)
    if metrics is None:
        return None
    objective: Objective = OBJECTIVES.get(metrics["objective"])
    names = {metric.name: NUMBER for metric in objective.metrics}
    answers = {key: of_key for key, of_key in ANSWERS.items() if key in metrics}
    shape = {"validation": [names], f"best_{objective.primary}": NUMBER, **answers}
    problem = shape_problem(metrics, shape) or (None if metrics["validation"] else "it has no validation")
    if problem:
        raise UserError(f"{path} cannot be used: {problem}; {advice}")
    return metrics


def write_metrics(path: Path, metrics: dict[str, Any]) -> None:
    """Write metrics.json. Raises OSError."""
    write_json_with_checksum(path, metrics)


def read_evaluation(path: Path) -> list[dict[str, Any]]:
    """Return the results in evaluation.json; none if there is no such file. Raises UserError as `read_metrics` does."""
    evaluation = _read(path, EVALUATION, "restore it, or move it elsewhere and evaluate again")
    results: list[dict[str, Any]] = evaluation["results"] if evaluation else []
    return results


def write_evaluation(path: Path, results: list[dict[str, Any]]) -> None:
    """Write evaluation.json. Raises OSError."""
    write_json_with_checksum(path, {"results": results})


def _read(path: Path, shape: dict[str, Any], advice: str) -> dict[str, Any] | None:
    try:
        content = read_json_with_checksum(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ChecksumError as error:
        raise UserError(f"{path} is damaged, or was edited ({error}): {advice}") from error
    if problem := shape_problem(content, shape):
        raise UserError(f"{path} cannot be used: {problem}; {advice}")
    return content
