"""The configuration: composed once, and everything that is wrong with it reported together."""

import dataclasses
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from cucafera.config.check import documented_fields
from cucafera.config.command_line import (
    command_line_problems,
    composed_config,
    default_config,
    differences_from_defaults,
    with_search_path,
)
from cucafera.config.compose import PLUGINS, config_directory, hydra_session
from cucafera.config.errors import UserError
from cucafera.config.fields import setting
from cucafera.config.help import help_text
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.schema import Config, OptimizerConfig, value_of
from cucafera.optimizers import OptimizerSpec
from cucafera.optimizers.adamw import AdamWConfig
from cucafera.run import main
from tests.support import write_run_folder

EXPERIMENTS = sorted(
    path.relative_to(config_directory() / "experiment").with_suffix("").as_posix()
    for path in (config_directory() / "experiment").rglob("*.yaml")
)

SWEEPS = ("lr_sweep", "lr_sweep_pretrain", "prefer_sweep", "search")

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
    (["budget_tokens=many"], "budget_tokens is many; it must be a whole number"),
    # Values
    (["seed=-1"], "seed is -1; it must be at least 0"),
    (["optimizer.lr=-1e-3"], "optimizer.lr is -0.001; it must be above 0"),
    (["optimizer.lr=inf"], "optimizer.lr is inf; it must be a number"),
    (["optimizer.lr=0"], "optimizer.lr is 0; it must be above 0"),
    (["optimizer.betas=[0.9,1.0]"], "it must be two numbers in [0, 1)"),
    (["optimizer.clip_norm=0"], "optimizer.clip_norm is 0; it must be above 0"),
    (["optimizer.weight_decay=-1"], "optimizer.weight_decay is -1; it must be at least 0"),
    (["model.vocab_size=70_000"], "model.vocab_size is 70_000; it must be at least 266 and at most 65_536"),
    (["model.vocab_size=100"], "model.vocab_size is 100; it must be at least 266"),
    (["model.hidden_act=relu"], "model.hidden_act is relu; it must be one of gelu_pytorch_tanh, gelu, silu"),
    (["model.base_hidden_size=0"], "model.base_hidden_size is 0; it must be at least 1"),
    (["model.num_hidden_layers=0"], "model.num_hidden_layers is 0; it must be at least 1"),
    (["schedule.name=step"], "schedule.name is step; it must be one of cosine, linear, wsd, constant"),
    (["schedule.final_lr_ratio=1.5"], "schedule.final_lr_ratio is 1.5; it must be at least 0 and at most 1"),
    (["data.validation_fraction=0"], "data.validation_fraction is 0; it must be above 0 and below 1"),
    (["trainer.accelerator=tpu"], "trainer.accelerator is tpu; it must be one of auto, cpu, cuda"),
    (["trainer.precision=fp8"], "trainer.precision is fp8; it must be one of auto, fp32, bf16"),
    (["trainer.strategy=zero"], "trainer.strategy is zero; it must be one of ddp, fsdp"),
    (["trainer.devices=none"], "trainer.devices is none; it must be a number of at least 1, or auto"),
    (["trainer.micro_batch_windows=0"], "trainer.micro_batch_windows is 0; it must be a number of at least 1, or auto"),
    (["callbacks.keep_last=0"], "callbacks.keep_last is 0; it must be at least 1"),
    (
        ["callbacks.validate_every_steps=-1"],
        "callbacks.validate_every_steps is -1; it must be a number of at least 0, or auto",
    ),
    (["callbacks.reference_curve=mine"], "callbacks.reference_curve is mine; it must be null or one of original"),
    (["callbacks.sampling.top_p=1.2"], "callbacks.sampling.top_p is 1.2; it must be above 0 and at most 1"),
    (["budget_tokens=1e30"], "it must be at least 1 and at most 1_000_000_000_000_000"),
    (["budget_tokens=1e6", "batch_tokens=1024.5"], "batch_tokens is 1024.5; it must be a whole number"),
    (["name=a/b"], "name is a/b; it must be a plain folder name"),
    (["resume=maybe"], "resume is maybe; it must be one of auto, required, overwrite"),
    # Values that do not go together
    (["model.hidden_size=190"], "model.hidden_size is 190; it must be a multiple of model.num_attention_heads (6)"),
    (["model.hidden_size=18"], "each head is 3 wide"),
    (["model.num_key_value_heads=4"], "model.num_key_value_heads is 4; it must divide model.num_attention_heads (6)"),
    (["batch_tokens=1000"], "it must be a multiple of the window, sequence_length = 256"),
    (["sequence_length=512"], "sequence_length is 512; the model's context is 256"),
    (["budget_tokens=100"], "budget_tokens is 100; it must pay for at least one step, batch_tokens = 512"),
    (["schedule.warmup_steps=5000"], "schedule.warmup_steps is 5000; it must not be longer than the horizon"),
    (["trainer.devices=3"], "a step has 2 windows (batch_tokens / sequence_length); they cannot be shared evenly"),
    (["tokenizer.vocab_size=2048"], "tokenizer.vocab_size is 2048; the model has only 1,024 rows"),
    (["data=files"], "data.sources.files.path must be given: data.sources.files.path=..."),
    (["data.sources.mine.path=x"], "there is no source 'mine'; add one with a plus: +data.sources.mine.path=x"),
    (["data.sources.embedded.path=x"], "data.sources.embedded gives embedded and path; it must give exactly one"),
    (["data.sources.embedded.embedded=null"], "data.sources.embedded gives no source; it must give exactly one of"),
    (["data.sources.embedded.weight=0"], "data.sources.embedded.weight is 0; it must be above 0"),
    (["data=conversations"], "conversations need a pretrained model, or at least a tokenizer: init_from=RUN"),
    (["adapter=lora"], "adapter.rank is 16; adapters are added to trained weights: init_from=RUN"),
    (
        ["adapter.modules=[head]"],
        "it must be a list of at least one item, each one of q_proj, k_proj",
    ),
    (["adapter.rank=-1"], "adapter.rank is -1; it must be at least 0"),
    (["objective=chats"], "there is no objective 'chats'. There are: finetuning, preference, pretraining"),
    (["objective.name=chats"], "objective.name is chats; it must be one of finetuning, preference, pretraining"),
    (["optimizer.name=sgd"], "optimizer.name is sgd; it must be one of adamw"),
    (["data.max_5gram_repeats=1"], "data.max_5gram_repeats is 1; it must be at least 2"),
    (["epochs=0"], "epochs is 0; it must be above 0"),
    (["callbacks.sampling.min_p=2"], "callbacks.sampling.min_p is 2; it must be at least 0 and at most 1"),
    (["callbacks.sampling.stop=['']"], "it must be a list of texts that are not empty"),
    (
        [
            "data=chat_files",
            "data.sources.files.path=x",
            "data.sources.files.columns.messages=a",
            "data.sources.files.columns.prompt=b",
        ],
        "data.sources.files.columns gives messages and also prompt or answer; it must give one or the others",
    ),
    (
        ["data=chat_files", "data.sources.files.path=x", "data.sources.files.columns.roles={user: [a], system: [a]}"],
        "data.sources.files.columns.roles gives 'a' twice; a speaker has one role",
    ),
    (
        ["callbacks.sampling.temperature=1e-9"],
        "callbacks.sampling.temperature is 1e-09; it must be 0 or at least 0.001",
    ),
    (["data=chat_files"], "data.sources.files.path must be given: data.sources.files.path=..."),
    (["model.hidden_size=${width}"], "model.hidden_size is ${width}, which refers to a key that does not exist"),
]


WRONG_COMMAND_LINES += [
    # Values that cannot be resolved
    (["seed=${seed}"], "seed is ${seed}, which refers to a key that does not exist, has no value or refers back to"),
    (["name=${run_dir}"], "run_dir is outputs/${name}, which refers to a key that does not exist"),
    (['callbacks.prompts=["El preu es 5${x}"]'], "callbacks.prompts is El preu es 5${x}, which refers to a key"),
    (["init_from=${x}"], "for the text itself, write 'init_from=\\${x}'"),
    (["callbacks.prompts=[${]"], "callbacks.prompts is ${, which cannot be read; for the text itself, write \\${"),
    (["budget_tokens=5M"], "budget_tokens is 5M; it must be a whole number, budget_tokens=5e6"),
    (["optimizer.lr=0,001"], "the decimal sign is a dot, optimizer.lr=0.001"),
    (["+experiment=finetune", "init_from=${x}"], "init_from is ${x}, which refers to a key that does not exist"),
    (["seed=${oc.env:NO_SUCH_VARIABLE}"], "seed is ${oc.env:NO_SUCH_VARIABLE}, which refers to"),
    # Numbers out of every range
    (["budget_tokens=1e400"], "budget_tokens is inf; it must be a whole number"),
    (["budget_tokens=nan"], "budget_tokens is nan; it must be a whole number"),
    (["budget_tokens=-1e6"], "budget_tokens is -1_000_000; it must be at least 1"),
    (["budget_tokens=1e30"], "budget_tokens is 1e+30; it must be"),
    (["seed=" + "1" * 5000], "it must be a whole number"),
    # Several values for one run
    (["model=glob(*)"], "model=glob(*): several values are a sweep, add --multirun"),
    (["optimizer.lr=range(1,5)"], "several values are a sweep, add --multirun"),
    (["optimizer.lr=choice(1,2)"], "several values are a sweep, add --multirun"),
    (["optimizer.lr=interval(1e-4,1e-2)"], "an interval is for a search: --multirun +experiment=search optimizer.lr="),
    (["init_from=a.ckpt,b.ckpt"], "one text is 'init_from=\"a.ckpt,b.ckpt\"'"),
    (["model=[tiny,small]"], "model=[tiny,small]: one model is chosen, model=tiny"),
    (["optimizer={lr: 1}"], "a choice has a name, optimizer=adamw; a setting of it is optimizer.KEY=VALUE"),
    # What is no override
    (["="], "'=' cannot be read; write key=value"),
    (["=5"], "'=5' cannot be read; write key=value"),
    ([""], "'' cannot be read; write key=value"),
    (["pretrain"], "to run this experiment: +experiment=pretrain"),
    (["+data.sources.català.path=x"], "a key has only letters without accents, digits, _, - and dots"),
    (["name='a"], "as one text it is 'name="),
    (["model@x=tiny"], "cannot be read; write key=value, or group=choice"),
    (["~optimizer.lr"], "~optimizer.lr: a setting cannot be removed, but set: optimizer.lr=VALUE"),
    (["~optimizer"], "a setting cannot be removed"),
    (["+seed=4"], "there is seed already; replace it, without the plus: seed=..."),
    (["hydra.job.name=x"], "hydra.job.name=x is not supported: nothing here reads it"),
    (["hydra/job_logging=nosuch"], "there is no hydra/job_logging 'nosuch'. There are: cucafera"),
    (["hydra.sweeep.dir=x"], "hydra.sweeep.dir=x is not supported"),
    # Folders
    (["name=a "], "name is 'a '; it must be a plain folder name"),
    (["name=a."], "name is a.; it must be a plain folder name"),
    (["name=.."], "name is ..; it must be a plain folder name"),
    (["name=/tmp"], "name is /tmp; it must be a plain folder name"),
    (["name=a\x1b[31m"], "name is 'a\\x1b[31m'; it must be a plain folder name"),
    (["name=" + "a" * 151], "it must be a plain folder name: at most 150 bytes"),
    (
        ["name=prepared"],
        "run_dir is outputs/prepared, within data.prepared_dir = outputs/prepared, which all runs share",
    ),
    (["run_dir=p/x", "data.prepared_dir=p/../p"], "run_dir is p/x, within data.prepared_dir"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG_COMMAND_LINES, ids=lambda value: str(value)[:60])
def test_a_wrong_command_line_is_refused_in_words(overrides, message):
    problems = command_line_problems(overrides)
    assert any(message in problem for problem in problems), problems


def test_all_problems_are_reported_together():
    overrides = ["model.num_attention_heads=7", "optimizer.lr=-1", "batch_tokens=1000", "optimiser=adamw", "seed=x"]
    problems = command_line_problems(overrides)
    assert len(problems) == 6  # seven heads fit neither the width nor the two key/value heads
    with pytest.raises(UserError, match="has 6 problems"):
        composed_config(overrides)


def test_one_mistake_is_reported_once():
    assert len(command_line_problems(["model.vocab_size=70_000"])) == 1


def test_a_typo_in_an_experiment_file_is_reported_with_the_nearest_key(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "mine.yaml").write_text("# @package _global_\noptimizer:\n  ls: 1\nbudget_tokns: 5\n")
    problems = command_line_problems(with_search_path(["+experiment=mine"], [str(tmp_path)]))
    assert problems == [
        f"{folder / 'mine.yaml'}: there is no key 'budget_tokns'; did you mean budget_tokens?",
        f"{folder / 'mine.yaml'}: there is no key 'optimizer.ls'; did you mean optimizer.lr?",
    ]


WRONG_FILES = [
    (
        "experiment",
        "# @package _global_\ndefaults:\n  - override /model: smal\n",
        "no model 'smal'; did you mean small?",
    ),
    (
        "experiment",
        "# @package _global_\ndefaults:\n  - override /modell: tiny\n",
        "no group 'modell'; did you mean model?",
    ),
    ("experiment", "# @package _global_\ndefaults:\n  - model: tiny\n", "is written - override /model: tiny"),
    ("experiment", "# @package _global_\ndefaults:\n  - mine\n", "its defaults name experiment/mine, the file itself"),
    ("experiment", "# @package _global_\ndefaults: tiny\n", "defaults is a list of choices, one a line"),
    ("experiment", "seed: 3\n", "the file of an experiment begins with the line # @package _global_"),
    ("experiment", "# @package _global_\nname: 2026_11\n", "name is 202_611; it must be text, in quotes"),
    ("experiment", "# @package _global_\nseed: ${seed}\n", "seed is ${seed}, which refers to a key"),
    ("experiment", "# @package _global_\nmodel: tiny\n", "model is tiny; it must be a group of keys"),
    ("experiment", "# @package _global_\nhydra:\n  nosuch: 1\n", "its form is not that of the settings: Key 'nosuch'"),
    ("experiment", "# @package _global_\nhydra:\n  searchpath: [x]\n", "--config-dir DIR adds a folder"),
    ("model", "- a\n- b\n", "holds no settings, but a list: write lines such as key: value"),
    ("model", "hiden_size: 96\n", "there is no key 'model.hiden_size'; did you mean model.hidden_size?"),
    ("model", "hidden_size: dos\n", "model.hidden_size is dos; it must be a whole number"),
    ("model", "hidden_size: 1\nhidden_size: 2\n", "found duplicate key hidden_size"),
]


@pytest.mark.parametrize(("group", "content", "message"), WRONG_FILES, ids=lambda value: str(value)[-40:])
def test_a_wrong_file_is_reported_with_its_path_and_in_words(tmp_path, group, content, message):
    (tmp_path / group).mkdir()
    (tmp_path / group / "mine.yaml").write_text(content)
    plus = "+" if group == "experiment" else ""
    (problem,) = command_line_problems(with_search_path([f"{plus}{group}=mine"], [str(tmp_path)]))
    assert str(tmp_path / group / "mine.yaml") in problem and message in problem


def test_an_experiment_cannot_change_where_the_run_is(tmp_path):
    (tmp_path / "experiment").mkdir()
    settings = {"job.chdir": True, "run.dir": "x", "output_subdir": "x", "mode": "MULTIRUN"}
    for key, value in settings.items():
        content = OmegaConf.create({})
        OmegaConf.update(content, f"hydra.{key}", value)
        (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{OmegaConf.to_yaml(content)}")
        (problem,) = command_line_problems(with_search_path(["+experiment=mine"], [str(tmp_path)]))
        assert f"hydra.{key} is set in an experiment, which is not supported" in problem


def test_a_file_that_is_not_utf_8_is_reported(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_bytes(b"hidden_size: \xe9\n")
    (problem,) = command_line_problems(with_search_path(["model=mine"], [str(tmp_path)]))
    assert "mine.yaml cannot be read: 'utf-8'" in problem


def test_an_experiment_file_that_is_not_yaml_is_reported_with_its_path(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\na: [1\n")
    (problem,) = command_line_problems(with_search_path(["+experiment=mine"], [str(tmp_path)]))
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
    write_run_folder(folder, composed_config(["model=cucafera", "batch_tokens=4096", "budget_tokens=8_192_000"]))
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_without_problems(experiment, base_run):
    overrides = [f"+experiment={experiment}", *needed(experiment, base_run)]
    assert command_line_problems(overrides, multirun=experiment in SWEEPS) == []


def needed(experiment: str, base_run: Path) -> list[str]:
    """Return the overrides that an experiment asks for."""
    overrides = ["data.sources.files.path=x"] if experiment == "own_text" else []
    return overrides + ([f"init_from={base_run}"] if experiment.startswith(("finetune", "prefer", "cooldown")) else [])


@pytest.mark.parametrize(
    ("arguments", "multirun", "problem"),
    [
        (["+experiment=lr_sweep"], False, "this is a sweep over optimizer.lr: add --multirun, or for a single run of"),
        (["optimizer.lr=1e-3"], True, "--multirun runs several values of a key, and no key has several"),
        (["hydra/launcher=cluster", "seed=1,2"], True, "hands the jobs to SLURM, and there is no srun on this machine"),
        (["hydra/launcher=joblibb", "seed=1,2"], True, "there is no hydra/launcher 'joblibb'; did you mean joblib?"),
        (["+experiment=[pretrain,nosuch]"], False, "there is no experiment 'nosuch'"),
    ],
)
def test_a_command_that_is_no_sweep_is_refused(arguments, multirun, problem):
    (found,) = command_line_problems(arguments, multirun)
    assert problem in found


@pytest.mark.parametrize(("plugin", "extra"), PLUGINS.items())
def test_a_missing_plugin_of_hydra_is_named_with_the_extra_that_installs_it(plugin, extra, monkeypatch):
    def load_configuration(*arguments, **settings):
        raise MissingConfigException(f"In 'hydra/config': Could not find '{plugin}'", plugin)

    with hydra_session():
        loader = GlobalHydra.instance().config_loader()
        monkeypatch.setattr(loader, "load_configuration", load_configuration)
        (problem,) = command_line_problems(["seed=1"])
    assert problem == f"{plugin} needs a plugin of Hydra: pip install '.[{extra}]'"


def test_one_job_of_a_sweep_runs_alone_with_its_value():
    assert composed_config(["+experiment=lr_sweep", "optimizer.lr=2e-3"]).optimizer.lr == 2e-3


def test_finetuning_inherits_the_model_of_its_initial_weights(base_run):
    config = composed_config(["+experiment=finetune", f"init_from={base_run}"])
    assert config.model == composed_config(["model=cucafera", "batch_tokens=2048"]).model
    assert config.sequence_length == 2048
    assert config.objective.name == "finetuning"
    assert len(config.data.sources) == 6
    checkpoint = base_run / "checkpoints" / "step-00000012.ckpt"
    checkpoint.touch()
    assert composed_config(["+experiment=finetune", f"init_from={checkpoint}"]).model == config.model


def test_finetuning_inherits_a_base_width_or_none_from_older_runs(base_run):
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


def test_the_configuration_of_another_run_cannot_read_the_environment(base_run, monkeypatch):
    monkeypatch.setenv("SECRET", "12")
    config = base_run / "config.yaml"
    config.write_text(config.read_text().replace("num_hidden_layers: 30", "num_hidden_layers: ${oc.env:SECRET}"))
    (problem,) = command_line_problems(["+experiment=finetune", f"init_from={base_run}"])
    assert "there is no run there whose model could be inherited" in problem


def test_an_unusable_init_from_is_reported_with_the_other_problems(tmp_path):
    problems = command_line_problems(["+experiment=finetune", f"init_from={tmp_path}", "optimizer.lr=-1"])
    assert len(problems) == 2
    assert "there is no run there whose model could be inherited" in problems[0]
    assert command_line_problems(["+experiment=finetune"]) == [
        "init_from must be given: init_from=RUN, the folder or a checkpoint of a pretrained model, or a Hugging Face "
        "folder or name (model=inherited takes its model)"
    ]


@pytest.mark.parametrize("trainer", ["auto", "cpu", "a100", "small_gpu", "ddp", "fsdp"])
def test_a_trainer_preset_changes_no_batch(trainer):
    config = composed_config(["+experiment=pretrain", f"trainer={trainer}"])
    assert (config.batch_tokens, config.windows_per_step) == (524_288, 256)


def test_the_original_recipe_stops_long_before_its_schedule_ends():
    config = composed_config(["+experiment=pretrain_original"])
    assert config.total_steps == 11_007
    assert config.horizon_steps == 20_000
    assert composed_config(["+experiment=pretrain_original"]).total_steps == 11_007
    assert composed_config(["+experiment=pretrain"]).horizon_steps == 5_503


@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - {"cooldown", *SWEEPS}))
def test_the_weight_decay_of_the_quickstart_reaches_no_longer_run(experiment, base_run):
    """Its weights forget within 500 steps, which is right for a run of 2,000."""
    config = composed_config([f"+experiment={experiment}", *needed(experiment, base_run)])
    is_short = config.budget_tokens is not None and config.total_steps <= 2000
    assert is_short or config.optimizer.weight_decay <= 0.1


def test_budgets_may_be_written_as_floats():
    config = composed_config(["budget_tokens=5.5e6", "batch_tokens=8192.0"])
    assert (config.budget_tokens, config.batch_tokens) == (5_500_000, 8192)
    assert isinstance(config.budget_tokens, int) and isinstance(config.batch_tokens, int)


def test_sources_can_be_added_and_changed_on_the_command_line():
    config = composed_config(
        ["data=files", "data.sources.files.path=a.txt", "data.sources.files.columns.text=body",
         "+data.sources.books.path=b.jsonl", "+data.sources.books.weight=2"]
    )  # fmt: skip
    files, books = config.data.sources["files"], config.data.sources["books"]
    assert (files.path, files.columns.text, files.weight) == ("a.txt", "body", 1.0)
    assert (books.path, books.columns.text, books.weight) == ("b.jsonl", "text", 2.0)


def test_every_setting_has_a_meaning_and_a_default_that_help_shows():
    with hydra_session():
        text = help_text()
    in_one_line = " ".join(text.split())
    config = composed_config([])
    for key, field in documented_fields().items():
        if not key.startswith(("data.sources.NAME.", "optimizer.", "objective.")):  # which depend on a choice
            value_of(config, key)
        assert key.endswith(".name") or field.metadata["meaning"]
        assert key in text
    for experiment in EXPERIMENTS:
        assert f"+experiment={experiment}" in text
    assert "optimizer.lr=0.002 Peak learning rate. Must be above 0." in in_one_line
    assert "Must be one of cosine, linear, wsd, constant." in in_one_line
    assert "optimizer=muon: 0.004 Peak learning rate of AdamW" in in_one_line  # which another choice has otherwise
    assert "optimizer=adamw: 1 Decoupled decay" in in_one_line
    assert max(map(len, text.splitlines())) <= 120


def test_no_choice_but_a_model_repeats_a_default_of_the_schema():
    defaults = dataclasses.asdict(Config())
    repeated = []
    for group in ("adapter", "data", "schedule", "trainer", "callbacks", "logger"):
        for path in (config_directory() / group).glob("*.yaml"):
            for key, value in (OmegaConf.to_container(OmegaConf.load(path)) or {}).items():
                if key not in ("defaults", "sources") and defaults[group][key] == value:
                    repeated.append(f"{path.name}: {key}")
    assert repeated == []


def test_the_differences_from_the_defaults_are_listed():
    assert differences_from_defaults(default_config()) == {}
    config = composed_config(["optimizer.lr=1e-3", "data=files", "data.sources.files.path=x"])
    differences = differences_from_defaults(config)
    assert differences["optimizer.lr"] == (2e-3, 1e-3)
    assert differences["data.sources.files.path"] == (None, "x")
    assert differences["data.validation_fraction"] == (0.1, 0.01)
    assert "seed" not in differences


@dataclass
class ToyConfig(OptimizerConfig):
    """A toy."""

    lr: float = setting(1.0, "Learning rate.", above=0)
    beta: float = setting(0.9, "Momentum.", at_least=0, below=1)


@pytest.fixture
def toy():
    """An optimizer that another distribution would register, without any file in conf/."""
    OPTIMIZERS.names()
    OPTIMIZERS._entries["toy"] = type("Toy", (OptimizerSpec,), {"name": "toy", "config": ToyConfig, "build": None})()
    yield
    del OPTIMIZERS._entries["toy"]
    ConfigStore.instance().repo["optimizer"].pop("toy.yaml")


def test_a_registered_optimizer_is_a_choice_with_its_own_settings(toy):
    optimizer = composed_config(["optimizer=toy", "optimizer.beta=0.5"]).optimizer
    assert optimizer == ToyConfig(name="toy", beta=0.5)
    assert optimizer.lr == 1.0 and not hasattr(optimizer, "betas")
    assert isinstance(composed_config([]).optimizer, AdamWConfig)
    assert command_line_problems(["optimizer=toy", "optimizer.beta=1"]) == [
        "optimizer.beta is 1; it must be at least 0 and below 1"
    ]
    assert command_line_problems(["optimizer=toy", "optimizer.betas=[0.1,0.2]"]) == [
        "optimizer.betas is not a setting of optimizer=toy; it is one of optimizer=adamw and optimizer=muon"
    ]
    assert command_line_problems(["optimizer.beta=0.5"]) == [
        "optimizer.beta is not a setting of the chosen optimizer; it is one of optimizer=toy"
    ]
    assert command_line_problems(["optimizer.name=toy"]) == [
        "optimizer.embedding_lr is not a setting of toy; it is one of optimizer=adamw",
        "optimizer.betas is not a setting of toy; it is one of optimizer=adamw and optimizer=muon",
        "optimizer.eps is not a setting of toy; it is one of optimizer=adamw and optimizer=muon",
    ]
    assert command_line_problems(["optimizer=adamw,toy"], multirun=True) == []


def test_a_command_is_composed_once(monkeypatch):
    with hydra_session():
        loader = GlobalHydra.instance().config_loader()
        loads, load = [], loader.load_configuration
        monkeypatch.setattr(
            loader, "load_configuration", lambda *given, **more: loads.append(given) or load(*given, **more)
        )
        composed_config(["data=files", "data.sources.files.path=a.txt", "data.sources.files.columns.text=body"])
        assert len(loads) == 1
        command_line_problems(["+experiment=lr_sweep"])
        assert len(loads) == 2


def run_command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cucafera.run", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_a_wrong_command_line_exits_with_code_2_within_two_cpu_seconds(tmp_path):
    def cpu_seconds() -> float:  # of ended child processes; the time of the clock depends on what else runs
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu_seconds()
    result = run_command("optimizer.lrr=1", "model.hidden_size=7", cwd=tmp_path)
    assert cpu_seconds() - before < 2
    assert result.returncode == 2
    assert "did you mean optimizer.lr?" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["+nope=1"]])
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
    result = run_command("model=cucafera", "batch_tokens=2048", "--cfg", "job", cwd=tmp_path)
    assert result.returncode == 0
    assert "vocab_size: 65536" in result.stdout
    result = run_command("--cfg", "job", "--resolve", cwd=tmp_path)
    assert "tokenizer:\n  path: null\n  vocab_size: 1024\n" in result.stdout
    result = run_command("+experiment=own_text", "data.sources.files.path=x", "--cfg", "hydra", cwd=tmp_path)
    assert "      experiment: own_text\n" in result.stdout and "run_dir" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--config-name", "mine"], "--config-name is not supported: a run starts from conf/config.yaml"),
        (["-cn", "mine"], "--config-name is not supported"),
        (["--config-path=conf"], "--config-path is not supported"),
        (["--experimental-rerun", "x"], "--experimental-rerun is not supported: the same command resumes a run"),
        (["--shell-completion", "install=bash"], "--shell-completion is not supported"),
        (["--hydra-help"], "--hydra-help is not supported"),
        (["--multirun", "--cfg", "job", "seed=1,2"], "are for one run: leave --multirun out"),
        (["--info", "defaults"], "--info is not supported: --cfg hydra shows the choices"),
        (["--resolve"], "--resolve needs --cfg"),
        (["--config-dir", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["--nosuch"], "there is no flag --nosuch, see --help"),
        (["--multirn", "seed=1,2"], "there is no flag --multirn; did you mean --multirun?"),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true is not supported"),
        (["hydra.mode=MULTIRUN"], "hydra.mode=MULTIRUN is not supported: --multirun starts a sweep"),
        (["hydra.callbacks.mine._target_=x"], "hydra.callbacks.mine._target_=x is about sweeps: add --multirun"),
        (["hydra.sweep.dir=x"], "hydra.sweep.dir=x is about sweeps: add --multirun"),
        (["hydra.run.dir=x"], "hydra.run.dir=x is not supported: run_dir=... names the run folder"),
        (["hydra.output_subdir=x"], "hydra.output_subdir=x is not supported"),
        (["hydra.searchpath=nowhere"], "it is a list, [file:///DIR,pkg://PACKAGE]; --config-dir DIR does the same"),
        (["hydra.searchpath=[file:///nowhere]"], "hydra.searchpath: there is no file:///nowhere"),
        (["hydra.searchpath=[pkg://nowhere]"], "hydra.searchpath: there is no pkg://nowhere"),
        (["~hydra.searchpath"], "it is a list, [file:///DIR,pkg://PACKAGE]"),
        (["name=\udcff"], "is not UTF-8"),
        (["--multirun", "model=glob(z*)"], "matches none of cucafera"),
        (["--multirun", "name=glob(*)"], "glob(...) matches the choices of a group, and name is none"),
        (["--multirun", "seed=1,1"], "seed=1,1 gives 1 twice; both would be the same job"),
        (["--multirun", "seed=5", "seed=1,2"], "seed is swept and given more than once, seed=5 and seed=1,2: keep one"),
        (["--multirun", "seed=1,2", "++seed=3,4"], "seed is swept and given more than once, seed=1,2 and ++seed=3,4"),
        (["--multirun", "optimizer.lr=1e-3,0.001"], "gives 0.001 twice"),
        (["--multirun", "seed=range(0,10000000000)"], "this sweep has more than 10,000 jobs"),
        (["--multirun", "seed=range(5,1)"], "seed=range(5,1) has no values"),
        (["--multirun", "seed=range(1,5,0)"], "seed=range(1,5,0): range() arg 3 must not be zero"),
        (["--multirun", "optimizer.lr=interval(1e-4,1e-2)"], "an interval is for a search, +experiment=search"),
        (["--multirun", "seed=1,2", "hydra.launcher.n_jobs=2"], "n_jobs is not a setting of hydra/launcher=basic"),
        (["--multirun", "seed=1,2", "hydra/launcher=paralel"], "there is no hydra/launcher 'paralel'; did you mean"),
        (["--multirun", "seed=1,2", "hydra/launcher=basic,parallel"], "settings of Hydra are those of the whole sweep"),
        (["--multirun", "seed=1,2", "hydra.sweep.dir=${x}"], "hydra.sweep.dir: Interpolation key 'x' not found"),
        (["--multirun", "seed=1,2", "hydra.sweep.subdir=x"], "which may be one folder for several jobs"),
        (["--multirun", "seed=1,2", "hydra.sweep.subdir=../${hydra.job.num}"], "must be a folder within that of the"),
        (["--multirun", "seed=1,2", "hydra.job.chdir=true"], "hydra.job.chdir=true is not supported"),
    ],
)
def test_a_flag_of_hydra_is_used_or_refused_in_one_line(arguments, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cucafera", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_folders_of_configurations_are_searched_for_choices_too(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / f"{name}.yaml").write_text("num_hidden_layers: 7\n")
    both = with_search_path(["model=two", f"hydra.searchpath=[file://{tmp_path / 'two'}]"], [str(tmp_path / "one")])
    assert composed_config(both).model.num_hidden_layers == 7
    (problem,) = command_line_problems(["model=three", *both[1:]])
    assert problem.endswith("There are: cucafera, cucafera_proxy, inherited, large, one, small, tiny, two")


@pytest.mark.parametrize(("typed", "value"), [("train[:1%]", "train[:1%]"), ("null", None), ("[ab]", "[ab]")])
def test_a_plain_text_needs_no_quotes(typed, value):  # all others: test_quoting.py
    assert composed_config([f"init_from={typed}"]).init_from == value


def test_texts_in_a_list_need_no_quotes_either():
    typed = "[L'avi, 'a, b',1e3,El preu és 5\\${x}]"
    prompts = composed_config([f"callbacks.prompts={typed}"]).callbacks.prompts
    assert prompts == ["L'avi", "a, b", "1e3", "El preu és 5${x}"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "quickstart"),
        (["data=files", "data.sources.files.path=x"], "files"),
        (["+data.sources.books.path=x"], "embedded-and-books"),
        (["data=instruct_chat", "init_from=a/b", "model=inherited", "model=tiny"], "patufet_it-and-5-more"),
        (["data=files", "data.sources.files.path=x", "name=mine"], "mine"),
        (["+experiment=own_text", "data.sources.files.path=x"], "own-text"),
    ],
)
def test_a_run_without_a_name_has_that_of_its_data(overrides, name):
    config = composed_config(overrides)
    assert (config.name, config.run_dir) == (name, f"outputs/{name}")


def test_missing_inputs_are_reported_with_the_configuration_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    missing = ["data=files", "data.sources.files.path=nowhere", "tokenizer.path=t.json", "init_from=./r"]
    for flags, others in (([], ["seed=-1"]), (["--multirun"], ["seed=1,2"])):
        assert start(*flags, *missing, *others) == 2
        printed = capsys.readouterr().err
        for problem in (
            "data.sources.files: there is no file nowhere", "tokenizer.path: there is no file t.json",
            "init_from: ./r: there is no such run folder or checkpoint",
        ):  # fmt: skip
            assert printed.count(problem) == 1
        assert not list(tmp_path.iterdir())
    assert "seed is -1" not in printed


@pytest.mark.parametrize("value", [[], ["data.sources.files.path=${nothing}"]])
def test_a_source_without_a_usable_path_is_reported_once_and_not_looked_for(value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert start("data=files", *value, "seed=-1") == 2
    problems = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert [line.split()[1].rstrip(":") for line in problems] == ["seed", "data.sources.files.path"]


def test_a_run_that_has_started_is_not_asked_for_its_inputs_again(tmp_path, monkeypatch):
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cucafera.run.train", lambda config, overrides: started.append(config.name) or exit(0))
    (tmp_path / "outputs" / "files").mkdir(parents=True)
    (tmp_path / "outputs" / "files" / "history.jsonl").touch()
    assert start("data=files", "data.sources.files.path=nowhere") == 0
    assert start("data=files", "data.sources.files.path=nowhere", "resume=overwrite") == 2
    assert started == ["files"]


def test_folders_in_the_home_folder_may_be_written_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = composed_config(["run_dir=~/mine", "data.prepared_dir=~/prepared"])
    assert (config.run_dir, config.data.prepared_dir) == (f"{tmp_path}/mine", f"{tmp_path}/prepared")


def test_a_run_whose_prompt_has_a_dollar_and_a_brace_can_be_inherited_from(base_run):
    path = base_run / "config.yaml"
    path.write_text(path.read_text().replace("prompts: []", "prompts: ['5${x}']"))
    assert composed_config(["+experiment=finetune", f"init_from={base_run}"]).model.hidden_size == 768


def test_a_folder_of_configurations_may_have_any_name(tmp_path):
    folder = tmp_path / "configuració d'aquí [1]"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "català.yaml").write_text("num_hidden_layers: 7\n")
    assert composed_config(with_search_path(["model=català"], [str(folder)])).model.num_hidden_layers == 7


def start(*arguments: str) -> int:
    """The exit code of the run command, in this process."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exited:
        patch.setattr(sys, "argv", ["cucafera", *arguments])
        for name in ("stdout", "stderr"):  # which main replaces
            patch.setattr(sys, name, getattr(sys, name))
        main()
    return exited.value.code


def test_a_run_that_is_refused_when_it_starts_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def refuse(config, overrides):
        (tmp_path / config.run_dir / ".lock").touch()
        raise UserError("there is no text")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cucafera.run.train", refuse)
    assert start("name=new") == 2
    assert "there is no text" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    earlier = tmp_path / "outputs" / "earlier"
    earlier.mkdir(parents=True)
    assert start("name=earlier") == 2 and earlier.is_dir()


def test_an_error_while_training_is_not_announced_by_hydra(tmp_path, monkeypatch, capsys):
    def fail(config, overrides):
        raise PermissionError(13, "Permission denied", "outputs/quickstart/x")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cucafera.run.train", fail)
    assert start("seed=1") == 2
    assert capsys.readouterr().err == "outputs/quickstart/x cannot be written: Permission denied\n"


def test_a_run_within_another_one_is_refused_before_it_touches_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    (tmp_path / "outputs" / "a" / "history.jsonl").touch()
    for arguments in (["run_dir=outputs/a/checkpoints"], ["run_dir=outputs"]):
        assert start(*arguments) == 2
        assert "choose another name=..." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "history.jsonl", "outputs"]
