"""The same losses, gradients and steps as TRL's trainers, with the same model, tokens and settings.

TRL counts the tokens after the prompt, its end token included, as we do. Its trainers of SimPO and ORPO are
experimental, and ORPO's cross-entropy is over prompt and answer, so of ORPO only the odds ratio is compared.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, LlamaForCausalLM

from cucafera.config.schema import SamplingConfig
from cucafera.data.chatml import Message, render, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.data.windows import IGNORED, Batch, Window, batch_of_windows
from cucafera.interop.hugging_face import write_folder
from cucafera.interop.trained import load_trained
from cucafera.model.transformer import Decoder
from cucafera.objectives._preference_config import PreferenceConfig
from cucafera.objectives._preference_losses import AnswerLogprobs, preference_losses
from cucafera.objectives.preference import PreferenceTuning
from tests.support import WORDS, hugging_face

trl = pytest.importorskip("trl", reason="TRL is not installed")

PAIRS_PER_STEP, STEPS = 4, 10
PREFERENCE = PreferenceTuning()
SETTINGS = {
    "sigmoid": PreferenceConfig(beta=0.3),
    "robust": PreferenceConfig(loss="robust", beta=0.3, label_smoothing=0.2),
    "ipo": PreferenceConfig(loss="ipo", beta=0.4),
    "apo_zero": PreferenceConfig(loss="apo_zero", beta=0.3),
    "sigmoid_norm": PreferenceConfig(loss="sigmoid_norm", beta=2.0),
}
STEP_0 = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": 1 / (4 * 0.4**2), "apo_zero": 1.0}


class InOrder(trl.DPOTrainer):
    """TRL's trainer with its batches in the order of the data set; it keeps the loss of each, which it logs rounded."""

    def compute_loss(self, *arguments: Any, **others: Any) -> Any:
        loss = super().compute_loss(*arguments, **others)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss

    def _get_train_sampler(self, *arguments: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def random_rows(count: int) -> list[dict[str, str]]:
    generator = torch.Generator().manual_seed(0)

    def words(least: int, most: int) -> str:
        number = int(torch.randint(least, most + 1, (), generator=generator))
        return " ".join(WORDS[int(index)] for index in torch.randint(len(WORDS), (number,), generator=generator))

    return [{"prompt": words(1, 4), "chosen": words(1, 5), "rejected": words(1, 5)} for _ in range(count)]


class Case:
    """The session's chat model in both forms, and the same pairs for both."""

    def __init__(self, run: Path, folder: Path) -> None:
        trained = load_trained(str(run))
        self.weights = {name: value.clone() for name, value in trained.model.state_dict().items()}
        self.model_config, self.tokenizer, self.folder = trained.model.config, trained.tokenizer, folder
        (folder / "hf").mkdir()
        write_folder(trained.model, trained.tokenizer, True, SamplingConfig(), "fp32", folder / "hf")
        self.rows = random_rows(PAIRS_PER_STEP * STEPS)

    def decoder(self) -> Decoder:
        model = Decoder(self.model_config)
        model.load_state_dict(self.weights)
        return model

    def theirs(self) -> LlamaForCausalLM:
        model = hugging_face(self.model_config)
        names = {f"model.{name}": value for name, value in self.weights.items()}
        assert model.load_state_dict(names, strict=False).unexpected_keys == []
        model.tie_weights()
        return model

    def trainer(self, settings: PreferenceConfig, **changes: Any) -> "InOrder":
        prompts = [render_prompt([Message("user", row["prompt"])], self.tokenizer) for row in self.rows]
        texts = [
            {
                "prompt": self.tokenizer.decode(prompt),
                "chosen": row["chosen"] + "<im_end>",
                "rejected": row["rejected"] + "<im_end>",
            }
            for prompt, row in zip(prompts, self.rows, strict=True)
        ]
        arguments: dict[str, Any] = {
            "output_dir": str(self.folder / "trl"), "loss_type": [settings.loss], "beta": settings.beta,
            "label_smoothing": settings.label_smoothing, "per_device_train_batch_size": PAIRS_PER_STEP,
            "max_steps": STEPS, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "optim": "sgd",
            "max_grad_norm": 0.0, "weight_decay": 0.0, "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
            "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_length": None, "disable_tqdm": True,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return InOrder(
                model=self.theirs(),
                ref_model=self.theirs(),
                args=trl.DPOConfig(**arguments | changes),
                processing_class=AutoTokenizer.from_pretrained(self.folder / "hf"),
                train_dataset=Dataset.from_list(texts),
            )

    def batches(self, reference: Decoder | None) -> list[Batch]:
        """The pairs of each step, each in a window of its own, as far as the model's context goes."""
        rendered = [pair_of(row, self.tokenizer) for row in self.rows]
        batches = []
        for first in range(0, len(rendered), PAIRS_PER_STEP):
            step = rendered[first : first + PAIRS_PER_STEP]
            batch = batch_of_windows([window_of(pair) for pair in step], True)
            if reference is not None:
                with torch.no_grad():
                    batch = batch._replace(reference_logprobs=PREFERENCE.reference_logprobs(reference, batch, None))
            batches.append(batch)
        return batches


def pair_of(row: dict[str, str], tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of the chosen and the rejected text, as token ids."""
    prompt = render_prompt([Message("user", row["prompt"])], tokenizer)
    texts = render(
        [[Message("user", row["prompt"]), Message("assistant", row[key])] for key in ("chosen", "rejected")], tokenizer
    )
    return [(prompt, text.ids[text.trained].tolist()) for text in texts]


def window_of(pair: list[tuple[list[int], list[int]]], length: int = 128) -> Window:
    """Both answers of a pair, then padding."""
    arrays = torch.full((3, length), IGNORED, dtype=torch.int32)
    arrays[0], arrays[2] = 2, 2
    start = 0
    for number, (prompt, answer) in enumerate(pair):
        text = prompt + answer
        span = slice(start, start + len(text) - 1)
        arrays[0, span] = torch.tensor(text[:-1])
        arrays[1, span] = torch.tensor([IGNORED] * (len(prompt) - 1) + answer)
        arrays[2, span] = number
        start = span.stop
    return Window(*(row.numpy() for row in arrays))


@pytest.fixture(scope="module")
def case(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(runs / "outputs" / "chat", tmp_path_factory.mktemp("parity"))


def test_both_see_the_same_tokens(case):
    rows = case.trainer(SETTINGS["sigmoid"]).train_dataset
    for row, (chosen, rejected) in zip(rows, (pair_of(row, case.tokenizer) for row in case.rows), strict=True):
        assert row["prompt_ids"] == chosen[0] == rejected[0]
        assert (row["chosen_ids"], row["rejected_ids"]) == (chosen[1], rejected[1])


@pytest.mark.parametrize("loss", SETTINGS)
def test_losses_gradients_and_ten_steps_are_those_of_trl(case, loss):
    settings = SETTINGS[loss]
    trainer = case.trainer(settings)
    ours, batches = case.decoder(), case.batches(case.decoder())

    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.model.train()
    their_loss = trainer.compute_loss(theirs, inputs)
    their_loss.backward()
    our_loss = PREFERENCE.loss(settings, ours, batches[0], None) / PAIRS_PER_STEP
    our_loss.backward()
    if loss in STEP_0:
        assert our_loss.item() == pytest.approx(STEP_0[loss], rel=1e-9)
    assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
    their_gradients = {name.removeprefix("model."): value.grad for name, value in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, their_gradients[name], atol=1e-5, rtol=1e-5)
    assert max(gradient.abs().max() for gradient in their_gradients.values()) > 1e-3  # the comparison says something
    theirs.zero_grad()
    ours.zero_grad()

    trainer.losses.clear()
    trainer.train()
    optimizer = torch.optim.SGD(ours.parameters(), lr=1e-2)
    for batch, expected in zip(batches, trainer.losses, strict=True):
        optimizer.zero_grad()
        value = PREFERENCE.loss(settings, ours, batch, None) / PAIRS_PER_STEP
        value.backward()
        optimizer.step()
        assert value.item() == pytest.approx(expected, abs=1e-5)
    their_weights = {name.removeprefix("model."): value for name, value in trainer.model.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), their_weights[name].detach(), atol=1e-5, rtol=1e-5)
    assert max((parameter - case.weights[name]).abs().max() for name, parameter in ours.named_parameters()) > 1e-3


def test_ten_steps_of_adamw_are_those_of_trl(case):
    settings = SETTINGS["sigmoid"]
    # Where a gradient is nearly 0, AdamW divides rounding by rounding: a larger epsilon leaves that out.
    adamw = {"optim": "adamw_torch", "adam_epsilon": 1e-4, "learning_rate": 1e-3}
    trainer = case.trainer(settings, **adamw)
    trainer.train()
    ours = case.decoder()
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0)
    for batch in case.batches(case.decoder()):
        optimizer.zero_grad()
        (PREFERENCE.loss(settings, ours, batch, None) / PAIRS_PER_STEP).backward()
        optimizer.step()
    their_weights = {name.removeprefix("model."): value for name, value in trainer.model.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), their_weights[name].detach(), atol=1e-5, rtol=1e-5)


def test_the_cross_entropy_of_better_answers_is_that_of_trl_for_answers_of_one_length(case):
    """TRL's `sft` is a mean over all tokens of the batch; ours is a mean over pairs, whatever the split."""
    chosen, rejected = (
        AnswerLogprobs(torch.tensor(logprobs).double(), torch.zeros(2), torch.tensor([5, 5]))
        for logprobs in ([-9.0, -11.0], [-7.0, -8.0])
    )
    with_nll = preference_losses(PreferenceConfig(nll_weight=0.5), chosen, rejected).mean()
    without = preference_losses(PreferenceConfig(), chosen, rejected).mean()
    assert (with_nll - without).item() == pytest.approx(0.5 * 20 / 10)


def answers_of(generator: torch.Generator) -> tuple[AnswerLogprobs, AnswerLogprobs]:
    tokens = torch.randint(2, 30, (2, 6), generator=generator)
    means = -0.1 - 3 * torch.rand(2, 6, generator=generator, dtype=torch.float64)
    chosen, rejected = (
        AnswerLogprobs(mean * count, torch.zeros(6), count) for mean, count in zip(means, tokens, strict=True)
    )
    return chosen, rejected


def test_simpo_is_that_of_trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo import CPOTrainer
    theirs = CPOTrainer.__new__(CPOTrainer)
    theirs.loss_type, theirs.beta, theirs.simpo_gamma, theirs.label_smoothing, theirs.alpha = "simpo", 2.0, 0.7, 0, 0.0
    theirs.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    chosen, rejected = answers_of(torch.Generator().manual_seed(0))
    expected, *_ = theirs.cpo_loss(chosen.mean, rejected.mean)
    settings = PreferenceConfig(loss="simpo", beta=2.0, gamma=0.7)
    torch.testing.assert_close(preference_losses(settings, chosen, rejected), expected)


def test_the_odds_ratio_of_orpo_is_that_of_trl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOTrainer
    theirs = ORPOTrainer.__new__(ORPOTrainer)
    theirs.beta = 0.4
    theirs.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    chosen, rejected = answers_of(torch.Generator().manual_seed(1))
    ratio, *_ = theirs.odds_ratio_loss(chosen.mean, rejected.mean)
    settings = PreferenceConfig(loss="orpo", beta=0.4)
    expected = (-chosen.mean - ratio.double()).float()
    torch.testing.assert_close(preference_losses(settings, chosen, rejected).float(), expected, atol=1e-5, rtol=1e-5)
