"""The configuration: what is wrong is told at once, all of it, in words."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from cucafera.composition import (
    PLUGINS,
    command_line_problems,
    composed_config,
    config_directory,
    field_documentation,
    help_text,
)
from cucafera.config import UserError, value_of

EXPERIMENTS = sorted(
    path.relative_to(config_directory() / "experiment").with_suffix("").as_posix()
    for path in (config_directory() / "experiment").rglob("*.yaml")
)

WRONG_COMMAND_LINES = [
    # Typos, on the command line
    (["optimizer.lrr=1e-3"], "there is no key 'optimizer.lrr'; did you mean optimizer.lr?"),
    (["lr=1e-3"], "there is no key 'lr'; did you mean optimizer.lr?"),
    (["+budget=1e6"], "there is no key 'budget'; did you mean budget_tokens?"),
    (["model=tinny"], "there is no model 'tinny'; did you mean tiny?"),
    (["+experiment=pretrian"], "there is no experiment 'pretrian'; did you mean pretrain?"),
    (["experiment=pretrain"], "an experiment is added with a plus: +experiment=pretrain"),
    (["+model=tiny"], "one model is chosen already; replace it, without the plus: model=tiny"),
    (["+experimnt=pretrain"], "there is no group 'experimnt'; did you mean +experiment=...?"),
    (["callbacks.sampling.topk=5"], "did you mean callbacks.sampling.top_k?"),
    (["+data.sources.mine.pth=x"], "there is no key 'data.sources.mine.pth'; did you mean data.sources.mine.path?"),
    (["quickstart now"], "'quickstart now' cannot be read; write key=value"),
    (["optimizer.lr=1e-3,2e-3"], "several values are a sweep, add --multirun"),
    # Types
    (["optimizer.lr=fast"], "optimizer.lr is fast; it must be a number"),
    (["seed=1.5"], "seed is 1.5; it must be a whole number"),
    (["data.document_masking=3"], "data.document_masking is 3; it must be true or false"),
    (["optimizer.betas=0.9"], "optimizer.betas is 0.9; it must be a list, each item a number"),
    (["data.sources=3"], "data.sources is 3; it must be a group of keys"),
    (["model.hidden_size=null"], "model.hidden_size is null; it must be a whole number"),
    (["budget_tokens=many"], "budget_tokens is many; it must be a number"),
    # Values
    (["seed=-1"], "seed is -1; it must be at least 0"),
    (["optimizer.lr=-1e-3"], "optimizer.lr is -0.001; it must be above zero"),
    (["optimizer.lr=inf"], "optimizer.lr is inf; it must be a number"),
    (["optimizer.lr=0"], "optimizer.lr is 0; it must be above zero"),
    (["optimizer.betas=[0.9,1.0]"], "it must be two numbers in [0, 1)"),
    (["optimizer.clip_norm=0"], "optimizer.clip_norm is 0; it must be above zero"),
    (["optimizer.weight_decay=-1"], "optimizer.weight_decay is -1; it must be at least 0"),
    (["model.vocab_size=70_000"], "model.vocab_size is 70_000; it must be at most 65_536"),
    (["model.vocab_size=100"], "model.vocab_size is 100; it must be at least 266"),
    (["model.hidden_act=relu"], "model.hidden_act is relu; it must be one of gelu_pytorch_tanh, gelu, silu"),
    (["model.base_hidden_size=0"], "model.base_hidden_size is 0; it must be at least 1"),
    (["model.num_hidden_layers=0"], "model.num_hidden_layers is 0; it must be at least 1"),
    (["schedule.name=linear"], "schedule.name is linear; it must be one of cosine, wsd, constant"),
    (["schedule.final_lr_ratio=1.5"], "schedule.final_lr_ratio is 1.5; it must be at most 1"),
    (["data.validation_fraction=0"], "data.validation_fraction is 0; it must be a fraction from 0 to 1"),
    (["trainer.accelerator=tpu"], "trainer.accelerator is tpu; it must be one of auto, cpu, cuda"),
    (["trainer.precision=fp8"], "trainer.precision is fp8; it must be one of auto, fp32, bf16"),
    (["trainer.strategy=zero"], "trainer.strategy is zero; it must be one of ddp, fsdp"),
    (["trainer.devices=none"], "trainer.devices is none; it must be a number of at least 1, or auto"),
    (["trainer.micro_batch_windows=0"], "trainer.micro_batch_windows is 0; it must be a number of at least 1, or auto"),
    (["callbacks.keep_last=0"], "callbacks.keep_last is 0; it must be at least 1"),
    (["callbacks.histogram_every_steps=-1"], "callbacks.histogram_every_steps is -1; it must be at least 0"),
    (["callbacks.reference_curve=mine"], "callbacks.reference_curve is mine; it must be one of null, original"),
    (["callbacks.sampling.top_p=1.2"], "callbacks.sampling.top_p is 1.2; it must be at most 1"),
    (["budget_tokens=1e6", "batch_tokens=1024.5"], "batch_tokens is 1024.5; it must be a whole number"),
    (["name=a/b"], "name is a/b; it must be a plain folder name"),
    (["resume=maybe"], "resume is maybe; it must be one of auto, required, overwrite"),
    # Values that do not go together
    (["model.hidden_size=190"], "model.hidden_size is 190; it must be a multiple of model.num_attention_heads (6)"),
    (["model.hidden_size=18"], "each head is 3 wide"),
    (["model.num_key_value_heads=4"], "model.num_key_value_heads is 4; it must divide model.num_attention_heads (6)"),
    (["batch_tokens=1000"], "it must be a multiple of the window, sequence_length = 256"),
    (["sequence_length=512"], "sequence_length is 512; the model's context is 256"),
    (["budget_tokens=100"], "budget_tokens is 100; it must pay for at least one step, batch_tokens = 2048"),
    (["schedule.warmup_steps=5000"], "schedule.warmup_steps is 5000; it must not be longer than the horizon"),
    (["trainer.devices=3"], "a step has 8 windows (batch_tokens / sequence_length); they cannot be shared evenly"),
    (["tokenizer.vocab_size=2048"], "tokenizer.vocab_size is 2048; the model has only 1024 rows"),
    (["data=files"], "data.sources.files.path must be given: data.sources.files.path=..."),
    (["data.sources.mine.path=x"], "there is no source 'mine'; add one with a plus: +data.sources.mine.path=x"),
    (["data.sources.embedded.path=x"], "data.sources.embedded gives path and embedded; it must give exactly one"),
    (["data.sources.embedded.embedded=false"], "data.sources.embedded gives no place to read from"),
    (["data.sources.embedded.weight=0"], "data.sources.embedded.weight is 0; it must be above zero"),
    (["data=conversations"], "conversations need a model or at least a tokenizer to begin with: init_from=RUN"),
    (["adapter=lora"], "adapter.rank is 16; adapters need trained weights beside them: init_from=RUN"),
    (["adapter.modules=[head]"], "adapter.modules is ['head']; it must be a list of some of q_proj, k_proj"),
    (["adapter.rank=-1"], "adapter.rank is -1; it must be at least 0"),
    (["data.kind=chats"], "data.kind is chats; it must be one of documents, conversations"),
    (["data.repeated_5grams=1"], "data.repeated_5grams is 1; it must be at least 2"),
    (["epochs=0"], "epochs is 0; it must be above zero"),
    (["callbacks.sampling.min_p=2"], "callbacks.sampling.min_p is 2; it must be at most 1"),
    (["callbacks.sampling.stop=['']"], "it must be a list of texts that are not empty"),
    (
        [
            "data=chat_files",
            "data.sources.files.path=x",
            "data.sources.files.messages_column=a",
            "data.sources.files.prompt_column=b",
        ],
        "data.sources.files names messages_column beside prompt_column or answer_column; it must name one or the",
    ),
    (
        ["callbacks.sampling.temperature=1e-9"],
        "callbacks.sampling.temperature is 1e-09; it must be 0 or at least 0.001",
    ),
    (["data=chat_files"], "data.sources.files.path must be given: data.sources.files.path=..."),
    (["model.hidden_size=${width}"], "model.hidden_size is '${width}', which refers to a key that does not exist"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_COMMAND_LINES, ids=lambda value: str(value)[:60])
def test_a_wrong_command_line_is_told_in_words(overrides, message):
    problems = command_line_problems(overrides)
    assert any(message in problem for problem in problems), problems


def test_all_problems_are_told_together():
    overrides = ["model.num_attention_heads=7", "optimizer.lr=-1", "batch_tokens=1000", "optimiser=adamw", "seed=x"]
    problems = command_line_problems(overrides)
    assert len(problems) == 6  # seven heads fit neither the width nor the two key/value heads
    with pytest.raises(UserError, match="has 6 problems"):
        composed_config(overrides)


def test_one_mistake_is_told_once():
    assert len(command_line_problems(["model.vocab_size=70_000"])) == 1


def test_a_typo_in_an_experiment_file_is_told_with_the_nearest_key(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\noptimizer:\n  ls: 1\nbudget_tokns: 5\n")
    problems = command_line_problems(["+experiment=mine"], user_directory=str(tmp_path))
    assert problems == [
        "there is no key 'budget_tokns'; did you mean budget_tokens?",
        "there is no key 'optimizer.ls'; did you mean optimizer.lr?",
    ]


def test_an_experiment_file_that_is_not_yaml_is_told_with_its_place(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\na: [1\n")
    (problem,) = command_line_problems(["+experiment=mine"], user_directory=str(tmp_path))
    assert "cannot be read" in problem
    assert "mine.yaml" in problem


def test_every_value_of_a_sweep_is_checked_before_the_first_job():
    assert command_line_problems(["optimizer.lr=1e-3,2e-3", "seed=1,2,3"], multirun=True) == []
    problems = command_line_problems(["optimizer.lr=1e-3,2e-3,-1", "model=tiny,smal"], multirun=True)
    assert any("'smal'" in problem for problem in problems)
    assert any("optimizer.lr is -1" in problem for problem in problems)


@pytest.fixture
def base_run(tmp_path):
    """A folder that looks like a run of the 245M model."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = composed_config(["model=cucafera", "batch_tokens=4096"])
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_without_problems(experiment, base_run):
    needed = ["data.sources.files.path=x"] if experiment == "own_text" else []
    needed += [f"init_from={base_run}"] if experiment.startswith("finetune") else []
    sweeps = ("lr_sweep", "lr_sweep_pretrain", "search")
    problems = command_line_problems([f"+experiment={experiment}", *needed], multirun=experiment in sweeps)
    assert problems == []


@pytest.mark.parametrize(
    ("arguments", "multirun", "problem"),
    [
        (["+experiment=lr_sweep"], False, "this is a sweep over optimizer.lr: add --multirun, or for a single run of"),
        (["optimizer.lr=1e-3"], True, "--multirun runs several values of a key, and there is none with several"),
        (["hydra/launcher=cluster", "seed=1,2"], True, "hands the jobs to SLURM, and there is no srun on this machine"),
        (["hydra/launcher=joblibb", "seed=1,2"], True, "Could not find 'hydra/launcher/joblibb'"),
        (["+experiment=[pretrain,nosuch]"], False, "there is no experiment 'nosuch'"),
    ],
)
def test_what_is_no_sweep_is_told(arguments, multirun, problem):
    (told,) = command_line_problems(arguments, multirun)
    assert problem in told


@pytest.mark.parametrize(("plugin", "extra"), PLUGINS.items())
def test_a_plugin_of_hydra_that_is_missing_is_named_with_what_brings_it(plugin, extra, monkeypatch):
    def compose(*arguments, **settings):
        raise MissingConfigException(f"In 'hydra/config': Could not find '{plugin}'", plugin)

    monkeypatch.setattr("cucafera.composition.compose", compose)
    (told,) = command_line_problems(["seed=1"])
    assert told == f"{plugin} needs a plugin of Hydra: pip install '.[{extra}]'"


def test_one_job_of_a_sweep_runs_alone_with_its_value():
    assert composed_config(["+experiment=lr_sweep", "optimizer.lr=2e-3"]).optimizer.lr == 2e-3


def test_finetuning_takes_the_model_of_the_run_that_it_begins_with(base_run):
    config = composed_config(["+experiment=finetune", f"init_from={base_run}"])
    assert config.model == composed_config(["model=cucafera"]).model
    assert config.sequence_length == 2048
    assert config.data.kind == "conversations"
    assert len(config.data.sources) == 6
    checkpoint = base_run / "checkpoints" / "step-00000012.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    assert composed_config(["+experiment=finetune", f"init_from={checkpoint}"]).model == config.model


def test_finetuning_inherits_a_base_width_and_has_none_where_the_run_is_older_than_the_key(base_run):
    path = base_run / "config.yaml"
    written = path.read_text()
    path.write_text(written.replace("base_hidden_size: null", "base_hidden_size: 192"))
    overrides = ["+experiment=finetune", f"init_from={base_run}"]
    assert composed_config(overrides).model.base_hidden_size == 192
    assert composed_config([*overrides, "model.base_hidden_size=null"]).model.base_hidden_size is None
    path.write_text(written.replace("  base_hidden_size: null\n", ""))
    assert composed_config(overrides).model.base_hidden_size is None


def test_the_proxy_of_the_245m_model_differs_from_it_in_width_alone():
    proxy = composed_config(["+experiment=pretrain", "model=cucafera_proxy"]).model
    target = composed_config(["+experiment=pretrain"]).model
    assert proxy.base_hidden_size == proxy.hidden_size
    in_proportion = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    four_times = {key: 4 * getattr(proxy, key) for key in in_proportion}
    assert dataclasses.replace(proxy, base_hidden_size=None, **four_times) == target


def test_the_configuration_of_another_run_cannot_ask_for_what_this_machine_knows(base_run, monkeypatch):
    monkeypatch.setenv("SECRET", "12")
    config = base_run / "config.yaml"
    config.write_text(config.read_text().replace("num_hidden_layers: 30", "num_hidden_layers: ${oc.env:SECRET}"))
    (problem,) = command_line_problems(["+experiment=finetune", f"init_from={base_run}"])
    assert "there is no run there whose model could be taken" in problem


def test_a_run_that_cannot_be_begun_with_is_told_beside_the_other_problems(tmp_path):
    problems = command_line_problems(["+experiment=finetune", f"init_from={tmp_path}", "optimizer.lr=-1"])
    assert len(problems) == 2
    assert "there is no run there whose model could be taken" in problems[0]
    assert command_line_problems(["+experiment=finetune"]) == [
        "init_from must be given: init_from=RUN, the folder or a checkpoint of the run that training begins with, "
        "or a Hugging Face folder or name (model=inherited takes its model)"
    ]


@pytest.mark.parametrize("trainer", ["auto", "cpu", "a100", "small_gpu", "ddp", "fsdp"])
def test_a_trainer_preset_changes_no_batch(trainer):
    config = composed_config(["+experiment=pretrain", f"trainer={trainer}"])
    assert (config.batch_tokens, config.windows_per_step) == (524_288, 256)


def test_no_argument_is_the_quickstart():
    assert composed_config([]) == composed_config(["+experiment=quickstart"])


def test_the_original_recipe_stops_long_before_its_schedule_ends():
    config = composed_config(["+experiment=pretrain_original"])
    assert config.total_steps == 11_007
    assert config.horizon_steps == 20_000
    assert composed_config(["+experiment=pretrain"]).horizon_steps == 11_007


def test_budgets_may_be_written_as_floats():
    config = composed_config(["budget_tokens=5.5e6", "batch_tokens=8192.0"])
    assert (config.budget_tokens, config.batch_tokens) == (5_500_000, 8192)
    assert isinstance(config.batch_tokens, int)


def test_sources_can_be_added_and_changed_on_the_command_line():
    config = composed_config(
        ["data=files", "data.sources.files.path=a.txt", "data.sources.files.column=body",
         "+data.sources.books.path=b.jsonl", "+data.sources.books.weight=2"]
    )  # fmt: skip
    files, books = config.data.sources["files"], config.data.sources["books"]
    assert (files.path, files.column, files.weight) == ("a.txt", "body", 1.0)
    assert (books.path, books.column, books.weight) == ("b.jsonl", "text", 2.0)


def test_every_knob_is_documented_and_shown_by_help():
    documentation = field_documentation()
    text = help_text()
    config = composed_config([])
    for key, sentence in documentation.items():
        value_of(config, key.replace(".NAME", ".embedded"))
        assert sentence
        assert key in text
    for experiment in EXPERIMENTS:
        assert f"+experiment={experiment}" in text


def run_door(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.run", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_a_wrong_command_line_ends_with_code_2_and_no_stack_trace_in_two_seconds(tmp_path):
    started = time.perf_counter()
    result = run_door("optimizer.lrr=1", "model.hidden_size=7", cwd=tmp_path)
    assert time.perf_counter() - started < 2
    assert result.returncode == 2
    assert "did you mean optimizer.lr?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults"], ["+nope=1"]])
def test_help_and_configuration_need_no_heavy_imports(arguments, tmp_path):
    script = (
        "import sys, runpy\n"
        "try:\n    runpy.run_module('cucafera.run', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "print('heavy:', {'torch', 'lightning', 'datasets', 'tokenizers', 'numpy'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "heavy: set()" in result.stdout, result.stdout[-500:] + result.stderr[-500:]


def test_the_composed_configuration_can_be_shown(tmp_path):
    result = run_door("model=cucafera", "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 0
    assert "vocab_size: 65536" in result.stdout
