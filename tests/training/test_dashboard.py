"""TensorBoard events of a run, read through TensorBoard's own readers."""

import dataclasses
import json
import math
import re
import socket
import subprocess
import time
from html import unescape
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from tensorboard import plugin_util
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from tensorboard.context import RequestContext
from tensorboard.data import server_ingester
from tensorboard.data.provider import RunTagFilter
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.api_pb2 import ListSessionGroupsRequest, Status
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.list_session_groups import Handler
from tensorboard.util import grpc_util

from cucafera.config.command_line import composed_config, default_config
from cucafera.config.compose import config_directory
from cucafera.config.errors import UserError
from cucafera.config.schema import AdapterConfig
from cucafera.model.layer_statistics import activation_rms, gradient_norms
from cucafera.model.lora import add_adapters
from cucafera.model.transformer import Decoder
from cucafera.run import train
from cucafera.runs.compatibility import changed_keys
from cucafera.runs.folder import EVENTS, RunFolder
from cucafera.training.callbacks import layers
from cucafera.training.callbacks.hyperparameters import overridden_values
from cucafera.training.callbacks.reference import PUBLISHED, PublishedLoss
from cucafera.training.callbacks.system import changes_page, source_revision, system_page
from cucafera.training.hardware import decide_hardware
from cucafera.training.module import LanguageModel
from cucafera.training.schedules import lr_ratio
from tests.support import assert_equal, scalars, weights

HORIZON = "schedule.horizon_steps=12"
REQUEST = RequestContext()


class DataServer:
    """TensorBoard's own data server on the runs below a folder, which it reads once.

    Args:
        folder: The folder.
        runs: How many runs to wait for.
    """

    def __init__(self, folder: str, runs: int) -> None:
        try:
            binary = server_ingester.get_server_binary()
        except server_ingester.NoDataServerError:
            pytest.skip("TensorBoard has no data server for this machine")
        self.ingester = server_ingester.SubprocessServerDataIngester(
            binary,
            folder,
            reload_interval=0,
            channel_creds_type=grpc_util.ChannelCredsType.LOCAL,
            samples_per_plugin={"scalars": 0},
        )
        self.ingester.start()
        self.provider = self.ingester.data_provider
        deadline = time.monotonic() + 20
        while len(self.provider.list_runs(REQUEST, experiment_id="")) < runs and time.monotonic() < deadline:
            time.sleep(0.05)

    def curves(self, run: str) -> dict[str, list[tuple[int, float]]]:
        """Steps and values of every curve of a run."""
        found = self.provider.read_scalars(
            REQUEST, experiment_id="", plugin_name="scalars", downsample=10**6, run_tag_filter=RunTagFilter(runs=[run])
        )
        return {tag: [(point.step, point.value) for point in points] for tag, points in found[run].items()}

    def table(self) -> dict[str, dict]:
        """The rows of the tab HParams, by their runs: hyperparameters, metrics and status."""
        request = ListSessionGroupsRequest(allowed_statuses=list(Status.values()), slice_size=100)
        groups = Handler(REQUEST, Context(TBContext(data_provider=self.provider)), "", request).run().session_groups
        return {
            group.name: {
                **{key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()},
                **{metric.name.tag: metric.value for metric in group.metric_values},
                "status": Status.Name(group.sessions[0].status),
            }
            for group in groups
        }


def all_curves(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every curve of a run, as the EventAccumulator reads them."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def kill_before_its_last_checkpoint(run_dir: str) -> None:
    """Leave the state of a run killed between its last step and its checkpoint."""
    folder = RunFolder(Path(run_dir))
    newest = folder.checkpoints.marked()[-1]
    newest.with_suffix(".json").unlink()
    newest.unlink()
    folder.metrics.unlink()
    folder.report.unlink()


def test_each_point_is_unique_after_a_kill_in_every_reader(small_run, monkeypatch):
    reference = PublishedLoss(batch_tokens=256, losses=((0, 6.0), (3, 5.0), (9, 4.0), (10, 3.9), (99, 2.0)))
    monkeypatch.setitem(PUBLISHED, "original", reference)
    settings = ("callbacks.reference_curve=original", HORIZON)
    train(small_run("name=whole", *settings), [])
    train(small_run("name=killed", *settings), [])
    kill_before_its_last_checkpoint("outputs/killed")
    train(small_run("name=killed", *settings), [])
    whole, killed = all_curves("outputs/whole"), all_curves("outputs/killed")
    served = DataServer("outputs", runs=2).curves("killed")
    slowly = PluginEventAccumulator("outputs/killed", size_guidance={"tensors": 0})  # where there is no data server
    slowly.Reload()
    assert whole.keys() == killed.keys() == served.keys()
    for tag, points in whole.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)) == [step for step, _ in killed[tag]] == [step for step, _ in served[tag]]
        assert steps == [event.step for event in slowly.Tensors(tag)]
        if not tag.startswith(("speed/", "memory/")):
            assert points == killed[tag] == served[tag]
    tokens = [0, 1024, 2048, 3072]
    assert (
        [step for step, _ in whole["bpb/val_by_tokens"]] == [step for step, _ in whole["loss/val_by_tokens"]] == tokens
    )
    assert [value for _, value in whole["loss/val_by_tokens"]] == [value for _, value in whole["loss/val"]]
    assert whole["loss/original"] == [(3, 5.0), (9, 4.0), (10, pytest.approx(3.9))]


def test_the_layout_names_existing_curves(small_run):
    config = small_run("name=run")
    train(config, [])
    events = EventAccumulator(config.run_dir)
    events.Reload()
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(tensor.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Learning", "Speed", "Layers"]
    charts = [chart for category in layout.category for chart in category.chart]
    tags = all_curves(config.run_dir).keys()
    assert len({chart.title for chart in charts}) == len(charts) == 10
    for chart in charts:
        empty = {wanted for wanted in chart.multiline.tag if not any(re.match(wanted, tag) for tag in tags)}
        assert empty <= {"loss/original$"}
        assert len(empty) < len(chart.multiline.tag)


def test_the_learning_rate_curve_is_that_of_the_schedule(small_run):
    config = small_run("name=run", "schedule=wsd", "schedule.warmup_steps=3", "callbacks.log_every_steps=2")
    train(config, [])
    points = all_curves(config.run_dir)["train/lr/embedding"]
    assert [step for step, _ in points] == [2, 4, 6, 8, 10, 12]
    for step, rate in points:  # the first step is taken at the ratio of step 0
        ratio = lr_ratio(step - 1, config.schedule, config.horizon_steps)
        assert rate == pytest.approx(config.optimizer.lr * ratio)


def test_runs_are_rows_of_one_table_also_after_a_resume(small_run, monkeypatch):
    overrides = ["optimizer.lr=1e-3", "data.document_masking=false", "optimizer=adamw", "logger=tensorboard"]
    train(small_run("name=whole", "run_dir=outputs/sweep/lr-0.001", *overrides), overrides)
    stopped = ("name=stopped", "run_dir=outputs/sweep/stopped", HORIZON)
    with pytest.raises(SystemExit):
        train(small_run(*stopped, "max_time=00:00:00", "budget_tokens=2048"), [])
    clip = LanguageModel._clip_gradients
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "_clip_gradients", lambda module: clip(module) * math.nan)
        with pytest.raises(UserError):
            train(small_run("run_dir=outputs/sweep/failed", "callbacks.guards.non_finite=stop"), [])
    before = DataServer("outputs/sweep", runs=3).table()
    assert before.keys() == {"lr-0.001", "stopped", "failed"}
    assert before["failed"]["status"] == "STATUS_FAILURE"
    assert not before["failed"].keys() & {"loss/train", "speed/mfu"}  # no placeholder for a missing metric
    assert before["stopped"]["status"] not in ("STATUS_FAILURE", "STATUS_SUCCESS")
    assert before["stopped"]["budget_tokens"] == 2048

    row = before["lr-0.001"]
    assert row["status"] == "STATUS_SUCCESS"
    assert (row["optimizer.lr"], row["batch_tokens"], row["budget_tokens"], row["seed"]) == (0.001, 256, 3072, 1337)
    assert (row["schedule.name"], row["data.document_masking"], row["optimizer"]) == ("linear", "false", "adamw")
    assert (row["model.hidden_size"], row["model.num_hidden_layers"], row["schedule.warmup_steps"]) == (48, 2, 2)
    assert not {"logger", "name", "run_dir"} & row.keys()
    metrics = json.loads(Path("outputs/sweep/lr-0.001/metrics.json").read_text())
    assert row["parameters"] == metrics["parameters"]
    assert row["bpb/val"] == pytest.approx(metrics["validation"][-1]["bpb"])
    assert row["loss/train"] == pytest.approx(metrics["train_loss"])

    train(small_run(*stopped), [])
    after = DataServer("outputs/sweep", runs=3).table()
    assert after.keys() == before.keys()
    assert (after["stopped"]["budget_tokens"], after["stopped"]["status"]) == (3072, "STATUS_SUCCESS")
    assert after["stopped"]["loss/val"] == pytest.approx(scalars("outputs/sweep/stopped", "loss/val")[-1][1])


def test_hyperparameters_are_numbers_and_strings_fixed_for_a_run():
    overrides = [
        "+experiment=pretrain", "model=tiny", "optimizer.clip_norm=null", "optimizer.betas=[0.9,0.99]", "name=x",
        "trainer=cpu", "trainer.devices=2", "callbacks.keep_last=3", "hydra.job.num=1", "+data.sources.more.path=a.txt",
        "budget_tokens=2e9", "adapter.alpha=16", "init_from=outputs/x", "data=embedded",
    ]  # fmt: skip
    assert overridden_values(composed_config([*overrides[:8], *overrides[9:]]), overrides) == {
        "model": "tiny",
        "data.sources.more.path": "a.txt",
        "adapter.alpha": 16.0,
        "init_from": "outputs/x",
        "data": "embedded",
    }


def test_layer_statistics_do_not_change_the_run(small_run, monkeypatch):
    by_hand: list[dict[str, float]] = []
    clip = LanguageModel._clip_gradients

    def norms_and_clip(module):
        parts = {"embedding": module.model.embed_tokens, **{f"{n:02}": x for n, x in enumerate(module.model.layers)}}
        norms = {
            name: math.sqrt(sum(float(p.grad.double().square().sum()) for p in part.parameters()))
            for name, part in parts.items()
        }
        by_hand.append(norms)
        return clip(module)

    settings = ("optimizer.clip_norm=0.5", "callbacks.log_every_steps=3")
    train(small_run("name=plain", "logger=none", *settings), [])
    monkeypatch.setattr(LanguageModel, "_clip_gradients", norms_and_clip)
    asked = []
    monkeypatch.setattr(layers, "gradient_norms", lambda model: asked.append(1) or gradient_norms(model))
    train(small_run("name=watched", *settings), [])
    assert_equal(weights("outputs/plain"), weights("outputs/watched"))
    states = [torch.load(RunFolder(Path(f"outputs/{name}")).checkpoints.marked()[-1]) for name in ("plain", "watched")]
    assert torch.equal(states[0]["random_state"]["torch"], states[1]["random_state"]["torch"])
    assert states[0]["random_state"]["python"] == states[1]["random_state"]["python"]
    assert not list(Path("outputs/plain").glob(EVENTS + "*"))

    curves = all_curves("outputs/watched")
    log_steps = [3, 4, 6, 8, 9, 12]
    assert len(asked) == len(log_steps)
    for name in ("embedding", "00", "01"):
        norms = curves[f"per_layer/gradient_norm/{name}"]
        assert [step for step, _ in norms] == log_steps
        assert all(value == pytest.approx(by_hand[step - 1][name], rel=1e-4) for step, value in norms)
        assert [step for step, _ in curves[f"per_layer/activation_rms/{name}"]] == [0, 4, 8, 12]


def test_frozen_weights_have_no_gradient_norm():
    model = Decoder(composed_config(["model.num_hidden_layers=1"]).model)
    add_adapters(model, AdapterConfig(rank=2))
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()
    assert gradient_norms(model).keys() == {"00"}


def test_activation_rms_equals_the_forward_pass_compiled_or_not():
    torch.manual_seed(0)
    model = Decoder(composed_config(["model.num_hidden_layers=2"]).model).eval()
    ids = torch.randint(300, (1, 32))
    documents = (torch.arange(32) >= 20).int()[None]
    seen = []
    hooks = [
        part.register_forward_hook(lambda *call: seen.append(call[2])) for part in (model.embed_tokens, *model.layers)
    ]
    model(ids, documents=documents)
    for hook in hooks:
        hook.remove()
    sizes = [x.detach().square().mean().sqrt().item() for x in seen]
    wanted = dict(zip(("embedding", "00", "01"), sizes, strict=True))
    model.compile(backend="eager")
    model(ids, documents=documents)
    before = torch.get_rng_state()
    scales = activation_rms(model, ids, documents)
    assert torch.equal(before, torch.get_rng_state())
    assert {name: float(value) for name, value in scales.items()} == pytest.approx(wanted)
    assert activation_rms(model, ids, None)["01"] != scales["01"]


def test_the_pages_describe_the_run(small_run):
    overrides = ["name=run", "seed=7", "model.hidden_act=silu"]
    config = small_run(*overrides)
    changes = changed_keys(config, dataclasses.asdict(default_config()))
    pages = (changes_page(overrides, changes), system_page(decide_hardware(config)))
    html = "".join(unescape(plugin_util.markdown_to_safe_html(page)) for page in pages)
    for row in (("torch", torch.__version__), ("seed", "1337", "7"), ("model.hidden_act", "gelu_pytorch_tanh", "silu")):
        assert "<tr>\n" + "\n".join(f"<td>{cell}</td>" for cell in row) + "\n</tr>" in html
    assert "python -m cucafera.run name=run seed=7 model.hidden_act=silu" in html
    assert socket.gethostname() not in html


def test_the_revision_of_a_checkout_reports_uncommitted_changes(tmp_path):
    assert source_revision(tmp_path) is None
    (tmp_path / ".git").mkdir()
    assert source_revision(tmp_path) is None  # what git does not know is no checkout either
    (tmp_path / ".git").rmdir()

    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True
        ).stdout

    git("init", "-q")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-qm", "a")
    commit = git("rev-parse", "HEAD").strip()
    assert source_revision(tmp_path) == commit
    (tmp_path / "new").write_text("not part of it")
    assert source_revision(tmp_path) == commit
    (tmp_path / "file").write_text("b")
    assert source_revision(tmp_path) == f"{commit}, with uncommitted changes"


def test_the_defaults_can_be_composed_within_a_job_too():
    outside = default_config()
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        inside = default_config()
    assert inside == outside == composed_config([])


def test_the_original_loss_is_at_the_steps_with_as_many_tokens():
    losses = PUBLISHED["original"].against_steps(262_144)
    assert losses[50] == 9.673 and losses[22_008] == 2.636
    for experiment in ("pretrain", "pretrain_original"):
        assert composed_config([f"+experiment={experiment}"]).callbacks.reference_curve == "original"
