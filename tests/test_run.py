"""`cucafera.run`: runs from their first step to their report, in one process."""

import itertools
import json
import math
import random
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cucafera.config.errors import UserError
from cucafera.config.registry import OPTIMIZERS
from cucafera.config.tokens import DOCUMENT_START_ID, SPECIAL_TOKENS
from cucafera.data.chatml import STOP_IDS
from cucafera.data.packed import open_documents
from cucafera.interop.trained import load_trained
from cucafera.model.transformer import Decoder
from cucafera.objectives._metrics import NextTokenMetrics
from cucafera.run import train
from cucafera.runs.folder import RunFolder
from cucafera.training.callbacks import samples
from cucafera.training.module import LanguageModel
from tests.support import assert_close, assert_equal, assert_same_curve, history_of, scalars, weights, write_corpus


def test_a_run_writes_a_complete_folder(small_run, caplog):
    caplog.set_level("INFO")
    config = small_run("name=whole")
    bpb = train(config, ["name=whole"])
    folder = RunFolder(Path(config.run_dir))
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["steps"] == 12
    assert metrics["tokens"] == 3072
    assert metrics["validation"][0]["step"] == 0
    assert metrics["validation"][-1]["bpb"] == bpb < metrics["validation"][0]["bpb"]
    assert [sample["prompt"] for sample in metrics["samples"]] == config.callbacks.prompts
    assert folder.config.exists() and folder.overrides.exists() and folder.tokenizer.exists()
    assert [path.name for path in folder.checkpoints.marked()] == ["step-00000008.ckpt", "step-00000012.ckpt"]
    assert (best := folder.checkpoints.best()) and best.step == min(metrics["validation"], key=lambda r: r["loss"])[
        "step"
    ]
    for text in ("Parameters", "Validation bpb", "tokens/s", "Hi havia una vegada", "tensorboard --logdir"):
        assert text in caplog.text
        assert text in folder.report.read_text()


def test_a_run_on_one_text_says_in_every_run_what_is_left_out_and_what_is_held_out(small_run, tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/scan.pdf").touch()
    rows = [json.loads(line) for line in (tmp_path / "corpus.jsonl").read_text().splitlines()]
    (tmp_path / "texts/input.txt").write_text("\n".join(row["text"] for row in rows))
    for name in ("first", "again"):  # the second one finds its data prepared
        caplog.clear()
        train(small_run(f"name={name}", "data.sources.files.path=[texts]", "budget_tokens=512"), [])
        assert "data.sources.files: 1 file left out: 1 .pdf" in caplog.messages
        assert "characters of its only document are held out" in caplog.text


def test_what_was_left_out_of_the_data_is_in_log_report_and_metrics(small_run, corpus, caplog):
    with corpus.open("a") as file:
        file.write('{"body": "la mar"}\n' * 20)
    caplog.set_level("WARNING")
    config = small_run("name=rows", "data.skip_broken_lines=true")
    train(config, [])
    folder = RunFolder(Path(config.run_dir))
    left_out = "files: 20 of 100 (20.0%) rows could not be read: left out; the first: "
    assert f"WARNING {left_out}" in caplog.text
    for _ in range(2):
        assert f"| Left out | {left_out}" in folder.report.read_text()
        assert json.loads(folder.metrics.read_text())["left_out"][0]["count"] == 20
        folder.metrics.unlink()  # as if the run had been killed between its last checkpoint and its report
        folder.report.unlink()
        train(config, [])


def test_curves_texts_and_configuration_can_be_read_back_from_tensorboard(small_run):
    config = small_run("name=curves")
    train(config, [])
    events = EventAccumulator(config.run_dir)
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss/train", "train/gradient_norm", "train/tokens", "train/epoch",
        *(f"train/lr/{group}" for group in ("embedding", "block_matrices", "gains", "final_gain")),
        "speed/tokens_per_second", "speed/data_wait", "memory/peak_gib", "loss/val", "val/perplexity", "val/accuracy",
        "bpb/val", "loss/val_by_tokens", "bpb/val_by_tokens",
        *(f"per_layer/gradient_norm/{name}" for name in ("embedding", "00", "01")),
        *(f"per_layer/activation_rms/{name}" for name in ("embedding", "00", "01")),
    }  # fmt: skip
    groups = sorted({name.partition("/")[0] for name in events.Tags()["scalars"]})  # as TensorBoard sorts them
    assert groups[:2] == ["bpb", "loss"]
    texts = sorted(name for name in events.Tags()["tensors"] if name.endswith("/text_summary"))
    assert [name.removesuffix("/text_summary") for name in texts] == [
        "samples/1", "samples/2", "samples/3", "settings/changed", "settings/full", "system",
    ]  # fmt: skip
    for name in events.Tags()["scalars"]:
        assert any(event.value for event in events.Scalars(name)), f"{name} is a flat zero"
    assert [step for step, _ in scalars(config.run_dir, "loss/train")] == list(range(1, 13))
    assert [step for step, _ in scalars(config.run_dir, "bpb/val")] == [0, 4, 8, 12]
    assert scalars(config.run_dir, "train/tokens")[-1] == (12, 3072)
    assert scalars(config.run_dir, "train/lr/embedding")[1][1] == pytest.approx(config.optimizer.lr * 2 / 3)
    config_text = events.Tensors("settings/full/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "hidden_size: 48" in config_text


@pytest.mark.parametrize("other", ["micro_batch_windows=4", "micro_batch_windows=1", "num_workers=1", "num_workers=2"])
def test_micro_batches_and_workers_do_not_change_the_trajectory(small_run, other):
    first = small_run("name=first", "trainer.micro_batch_windows=8")
    second = small_run("name=second", f"trainer.{other}")
    train(first, [])
    train(second, [])
    assert_same_curve("outputs/first", "outputs/second", "loss/train")
    assert_close(weights("outputs/first"), weights("outputs/second"))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_a_longer_budget_resumes_and_ends_bit_equal_to_one_run(small_run, monkeypatch, optimizer):
    drawn = []
    training_step = LanguageModel.training_step

    def step_that_draws(module, batch, batch_idx):
        training_step(module, batch, batch_idx)
        drawn.append((torch.rand(()).item(), random.random()))

    monkeypatch.setattr(LanguageModel, "training_step", step_that_draws)
    settings = ("schedule.horizon_steps=12", f"optimizer={optimizer}")
    train(small_run("name=whole", *settings), [])
    of_whole = drawn.copy()
    drawn.clear()
    train(small_run("name=parts", *settings, "budget_tokens=1536"), [])
    train(small_run("name=parts", *settings), [])
    assert drawn == of_whole and len(set(drawn)) == 12
    assert_equal(weights("outputs/whole"), weights("outputs/parts"))
    assert scalars("outputs/whole", "loss/train") == scalars("outputs/parts", "loss/train")


def test_validation_is_what_a_computation_by_hand_gives(small_run):
    config = small_run("name=run", "data.validation_windows=7")
    train(config, [])
    data = open_documents(config)
    state = {name.removeprefix("model."): value for name, value in weights("outputs/run").items()}
    model = Decoder.from_weights(config.model, state)
    nats, correct, tokens, text = 0.0, 0, 0, b""
    for _, number in data.validation_positions():
        ids = data.validation[0].stream.read(32 * number, 33).tolist()
        starts = [0, *(place for place in range(1, 32) if ids[place] == DOCUMENT_START_ID), 32]
        for start, end in itertools.pairwise(starts):  # each document alone
            targets = ids[start + 1 : end + 1]
            logits = model.logits(model(torch.tensor([ids[start:end]])))[0].double()
            nats -= logits.log_softmax(-1)[range(len(targets)), targets].sum().item()
            correct += (logits.argmax(-1) == torch.tensor(targets)).sum().item()
            tokens += len(targets)
            text += b"".join(data.tokenizer.bytes_of(token) for token in targets if token >= len(SPECIAL_TOKENS))
    assert tokens == 7 * 32 and len(text) > 200
    last = json.loads(Path("outputs/run/metrics.json").read_text())["validation"][-1]
    expected = {
        "loss": nats / tokens, "perplexity": math.exp(nats / tokens), "accuracy": correct / tokens,
        "bpb": nats / math.log(2) / len(text),
    }  # fmt: skip
    assert {name: last[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_last_and_the_best_validation_are_distinguished(small_run, monkeypatch, capsys):
    values = iter([3.0, 2.0, 2.5, 2.75])  # after 0, 4, 8 and 12 steps; the loss is best at the end
    compute = NextTokenMetrics.compute
    monkeypatch.setattr(NextTokenMetrics, "compute", lambda own: compute(own) | {"bpb": torch.tensor(next(values))})
    assert train(small_run("name=run", "callbacks.prompts=[la mar,la mar]", "callbacks.keep_last=1"), []) == 2.75
    folder = RunFolder(Path("outputs/run"))
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["best_bpb"] == 2.0 and metrics["validation"][-1]["bpb"] == 2.75
    assert metrics["validation"][-1]["loss"] == min(record["loss"] for record in metrics["validation"])
    assert history_of("run")[-1]["bpb"] == 2.75
    assert "3.000 -> 2.750 bits per byte (best 2.000)" in folder.report.read_text()
    assert [checkpoint.step for checkpoint in folder.checkpoints.complete()] == [4, 12]
    assert folder.checkpoints.best().step == load_trained("outputs/run").step == 4
    assert len({sample["continuation"] for sample in metrics["samples"]}) == 1  # the same random numbers for each
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "step     12/12" in line]
    assert line.endswith("tokens") and "left" not in line


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(small_run, caplog):
    config = small_run("name=broken")
    train(config, [])
    undisturbed = weights(config.run_dir)
    folder = RunFolder(Path(config.run_dir))
    newest = folder.checkpoints.marked()[-1]
    newest.write_bytes(newest.read_bytes()[:-1000])
    train(config, [])
    assert "step-00000012.ckpt is damaged: it has" in caplog.text
    assert_equal(undisturbed, weights(config.run_dir))


def test_a_run_whose_checkpoints_are_all_damaged_is_not_restarted_silently(small_run):
    config = small_run("name=broken")
    train(config, [])
    for path in RunFolder(Path(config.run_dir)).checkpoints.marked():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="none of them can be used; resume=overwrite"):
        train(config, [])


def test_a_complete_run_reports_again_and_changes_nothing(small_run, caplog):
    config = small_run("name=complete")
    bpb = train(config, [])
    files = {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    assert train(small_run("name=complete", "budget_tokens=1024"), []) == bpb
    assert "This run is complete" in caplog.text
    assert "Hi havia una vegada" in caplog.text
    assert files == {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}


@pytest.mark.parametrize("left", ["of a shorter budget", "half of"])
def test_an_outdated_or_damaged_report_is_written_again(small_run, left):
    horizon = "schedule.horizon_steps=12"
    train(small_run("name=run", horizon, "budget_tokens=2048"), [])
    metrics = RunFolder(Path("outputs/run")).metrics
    before = metrics.read_bytes()
    train(small_run("name=run", horizon), [])
    after = json.loads(metrics.read_bytes())
    metrics.write_bytes(before if left == "of a shorter budget" else before[:100])
    train(small_run("name=run", horizon), [])
    assert json.loads(metrics.read_bytes()) == after


def test_a_run_does_not_resume_with_changed_text(small_run, corpus):
    config = small_run("name=changed", "budget_tokens=1024", "schedule.horizon_steps=12")
    train(config, [])
    tokenizer = Path("outputs/changed/tokenizer.json").read_bytes()
    with corpus.open("a") as file:
        file.write('{"text": "Un document nou, que abans no hi era."}\n')
    longer = small_run("name=changed", "schedule.horizon_steps=12")
    with pytest.raises(UserError, match=r"tokenizer and data\.sources\.files are not what these weights were trained"):
        train(longer, [])
    assert Path("outputs/changed/tokenizer.json").read_bytes() == tokenizer


def test_text_that_changes_during_a_run_does_not_disturb_it(small_run, corpus, monkeypatch):
    config = small_run("name=meanwhile")
    save = pl.Trainer.save_checkpoint

    def remove_the_text_and_save(trainer, *arguments, **settings):
        corpus.unlink(missing_ok=True)
        save(trainer, *arguments, **settings)

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", remove_the_text_and_save)
    train(config, [])
    assert json.loads(Path("outputs/meanwhile/metrics.json").read_text())["steps"] == 12


def test_a_new_run_takes_the_tokenizer_of_its_initial_weights(small_run, corpus, tmp_path):
    train(small_run("name=base"), [])
    write_corpus(tmp_path / "other.jsonl", documents=80, seed=1)
    other = f"data.sources.files.path={tmp_path / 'other.jsonl'}"
    train(small_run("name=next", "init_from=outputs/base", other), [])
    assert Path("outputs/next/tokenizer.json").read_bytes() == Path("outputs/base/tokenizer.json").read_bytes()
    train(small_run("name=stranger", other), [])
    with pytest.raises(UserError, match="tokenizer is not what these weights were trained with"):
        train(small_run("name=wrong", "init_from=outputs/base", "tokenizer.path=outputs/stranger/tokenizer.json"), [])


def test_files_of_another_program_in_the_folder_are_not_erased(small_run):
    folder = Path("outputs/theirs")
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "mine.pt").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"no checkpoint to resume from, but outputs/theirs/checkpoints/mine\.pt"):
        train(small_run("name=theirs"), [])
    train(small_run("name=theirs", "resume=overwrite"), [])
    assert (folder / "checkpoints" / "mine.pt").read_bytes() == b"mine"


def test_a_run_is_not_erased_for_one_that_cannot_start(small_run):
    train(small_run("name=kept"), [])
    with pytest.raises(UserError, match=r"nowhere\.json"):
        train(small_run("name=kept", "resume=overwrite", "tokenizer.path=nowhere.json"), [])
    assert RunFolder(Path("outputs/kept")).report.exists()
    assert len(RunFolder(Path("outputs/kept")).checkpoints.marked()) == 2


def test_a_longer_budget_warns_about_its_effect_on_the_learning_rate(small_run, caplog):
    train(small_run("name=longer", "budget_tokens=1536"), [])
    train(small_run("name=longer"), [])
    assert "The budget was 6 steps and is 12 now" in caplog.text


def test_an_edited_config_file_is_reported_and_not_used(small_run, caplog):
    config = small_run("name=run", "budget_tokens=512")
    train(config, [])
    path = Path("outputs/run/config.yaml")
    path.write_text(path.read_text().replace("seed: 1337", "seed: 7").replace("  lr: ", "  lr: 1"))
    train(small_run("name=run", "budget_tokens=1024"), [])
    (line,) = [record.getMessage() for record in caplog.records if "was edited" in record.getMessage()]
    assert line.endswith("settings are given on the command line. Not used: seed=7, optimizer.lr=10.003")
    caplog.clear()
    train(small_run("name=run", "budget_tokens=1536"), [])
    assert "was edited" not in caplog.text


def test_another_configuration_in_the_same_folder_is_refused_by_name(small_run):
    train(small_run("name=same"), [])
    with pytest.raises(UserError) as error:
        train(small_run("name=same", "optimizer.lr=1e-4", "model.hidden_size=64"), [])
    assert "optimizer.lr: 0.0001 (requested) != 0.003 (checkpoint)" in str(error.value)
    assert "model.hidden_size: 64 (requested) != 48 (checkpoint)" in str(error.value)
    assert "resume=overwrite" in str(error.value)
    train(small_run("name=same", "optimizer.lr=1e-4", "resume=overwrite"), [])
    assert json.loads(Path("outputs/same/metrics.json").read_text())["steps"] == 12


def test_resume_required_refuses_to_start_a_new_run(small_run):
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        train(small_run("resume=required"), [])


def test_a_new_run_starts_from_the_weights_of_another(small_run):
    train(small_run("name=base"), [])
    train(small_run("name=next", "init_from=outputs/base"), [])
    base = json.loads(Path("outputs/base/metrics.json").read_text())
    following = json.loads(Path("outputs/next/metrics.json").read_text())
    assert following["validation"][0]["loss"] == pytest.approx(base["validation"][-1]["loss"])
    assert following["validation"][-1]["loss"] < base["validation"][-1]["loss"]


def test_learning_rates_scaled_by_the_width_have_curves_of_their_own(small_run):
    config = small_run("name=scaled", "model.base_hidden_size=12")
    train(config, [])
    unscaled = [value for _, value in scalars(config.run_dir, "train/lr/embedding")]
    for group in ("block_matrices", "final_gain"):
        scaled = [value for _, value in scalars(config.run_dir, f"train/lr/{group}")]
        assert scaled == pytest.approx([value / 4 for value in unscaled])
    train(small_run("name=next", "init_from=outputs/scaled"), [])
    assert scalars("outputs/next", "loss/val")[0][1] == pytest.approx(scalars(config.run_dir, "loss/val")[-1][1])


def test_init_from_refuses_what_does_not_fit(small_run):
    train(small_run("name=base"), [])
    with pytest.raises(UserError, match="there is no such run folder or checkpoint"):
        train(small_run("name=a", "init_from=outputs/nowhere"), [])
    Path("empty").mkdir()
    with pytest.raises(UserError, match="the folder holds no checkpoint"):
        train(small_run("name=b", "init_from=empty"), [])
    with pytest.raises(UserError, match=r"model\.hidden_size: 64 \(requested\) != 48 \(init_from\)"):
        train(small_run("name=c", "init_from=outputs/base", "model.hidden_size=64"), [])
    Path("broken.ckpt").write_bytes(b"PK broken")
    with pytest.raises(UserError, match=r"broken.ckpt cannot be used: its marker broken.json is missing"):
        train(small_run("name=d", "init_from=broken.ckpt"), [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_training_without_a_gpu_is_refused_with_the_same_command_for_the_cpu(small_run):
    with pytest.raises(UserError, match=r"this machine has none.*\n.*\n  python -m cucafera.run seed=3 trainer=cpu$"):
        train(small_run("trainer=a100", "seed=3"), ["trainer=a100", "seed=3"])


def test_too_little_text_is_refused_with_the_key_to_change(small_run, corpus):
    lines = corpus.read_text().splitlines()
    corpus.write_text(lines[0][:60] + '"}\n')
    with pytest.raises(UserError, match="one window needs 33"):
        train(small_run("name=little"), [])


def test_a_tokenizer_that_is_too_large_for_the_model_is_refused(small_run):
    train(small_run("name=base"), [])
    with pytest.raises(UserError, match=r"has 320 entries and the model only 300 rows: set model\.vocab_size=320"):
        train(small_run("name=small", "model.vocab_size=300", "tokenizer.path=outputs/base/tokenizer.json"), [])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["debug/one_batch", "debug/overfit_batch", "debug/profiler"])
def test_debug_experiments_run(small_run, experiment):
    config = small_run(f"+experiment={experiment}", "budget_tokens=2048", "schedule.warmup_steps=0")
    train(config, [])
    assert RunFolder(Path(config.run_dir)).report.exists()
    if experiment == "debug/profiler":
        assert list(Path(config.run_dir).glob("*profile*"))


@pytest.mark.slow
def test_a_batch_can_be_overfitted(small_run):
    config = small_run(
        "+experiment=debug/overfit_batch", "budget_tokens=40_000", "callbacks.log_every_steps=10", "seed=1"
    )
    train(config, [])
    losses = [value for _, value in scalars(config.run_dir, "loss/train")]
    assert losses[-1] < 0.5 < losses[0]


def test_samples_stop_at_the_tokens_that_end_an_answer_of_the_chat(small_run, monkeypatch):
    stop_ids = set()
    write = samples.generate

    def generate(model, tokenizer, prompts, sampling, stops, generator):
        stop_ids.add(stops)
        return write(model, tokenizer, prompts, sampling, stops, generator)

    monkeypatch.setattr(samples, "generate", generate)
    train(small_run("name=run", "callbacks.prompts=[La mar]"), [])
    assert stop_ids == {frozenset(STOP_IDS)}
