"""Every knob, as typed dataclasses: the schema of conf/, and the rules that values must keep.

The string under a field says what it means and in which unit; `python -m cucafera.run --help` prints it.
Nothing here imports torch: a wrong config is answered before anything heavy is loaded.

    T  sequence_length, the tokens that one window trains on (it holds T + 1)
    W  windows of one step over all devices: batch_tokens / T
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import II

MAX_VOCABULARY = 65_536
"""Ids 0..65,535 fill a uint16 shard exactly; nothing is ever added behind them."""

SPECIAL_TOKENS = (
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<im_start>",
    "<im_end>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<mask>",
)
"""The control tokens, at ids 0..9."""

SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256
"""The control tokens and the 256 bytes: the least with which every text can be written."""


ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block, which may have adapters."""


SMALLEST_TEMPERATURE = 1e-3
"""Logits divided by less may overflow."""


EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3
EXIT_OUT_OF_TIME = 124
"""As the command `timeout` has it."""


class UserError(Exception):
    """What the user can mend: the doors print its text, without a stack trace, and exit with its code."""

    exit_code = EXIT_USER_ERROR


@dataclass
class ModelConfig:
    """The transformer. Names and meanings are those of Hugging Face's LlamaConfig."""

    vocab_size: int = 1024
    """Rows of the embedding, tied with the head; at most 65,536."""
    hidden_size: int = 192
    """Width of the residual stream."""
    intermediate_size: int = 512
    """Width of the gated MLP."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    num_attention_heads: int = 6
    """Query heads; they must divide hidden_size."""
    num_key_value_heads: int = 2
    """Key/value heads; they must divide the query heads."""
    max_position_embeddings: int = 256
    """The context, in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square before its root."""
    hidden_act: str = "gelu_pytorch_tanh"
    """Activation of the gate: gelu_pytorch_tanh, gelu or silu."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    base_hidden_size: int | None = None
    """Width at which lr and initializer_range hold; muP scales from there, heads keep their width; null: no scaling."""


@dataclass
class SourceConfig:
    """Where one kind of text comes from: exactly one of path, dataset and embedded is given."""

    path: str | None = None
    """A file, folder or glob of .jsonl, .parquet or .txt, also packed as .gz or .zst."""
    dataset: str | None = None
    """Name of a Hugging Face dataset."""
    embedded: bool = False
    """The Catalan texts, or conversations, that come with the package."""
    subset: str | None = None
    """Configuration of the Hugging Face dataset."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    revision: str | None = None
    """Commit or tag of the Hugging Face dataset."""
    streaming: bool = False
    """Read the Hugging Face dataset over the network instead of downloading it first."""
    column: str = "text"
    """Column of jsonl, parquet and Hugging Face rows that holds the document."""
    document_separator: str | None = None
    """Text between documents of a .txt file; null: a file is one document."""
    messages_column: str | None = None
    """Conversations: column with a list of messages; null: messages, conversations or conversation."""
    system_column: str | None = None
    """Conversations: column with the system message; null: system or system_prompt, if there is one."""
    prompt_column: str | None = None
    """Conversations: column with what the user says; null: prompt, instruction or question."""
    input_column: str | None = None
    """Conversations: column whose text, if any, is put behind the prompt; null: input, if there is one."""
    answer_column: str | None = None
    """Conversations: column with the answer; null: completion, output, answer, response or summary."""
    weight: float = 1.0
    """How often its text is seen in one epoch of the mixture: 2 twice, 0.5 every second epoch."""


@dataclass
class DataConfig:
    """From documents or conversations to windows."""

    kind: str = "documents"
    """What the sources hold: documents, for pretraining, or conversations, for finetuning."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Named sources, mixed by their weights."""
    validation_fraction: float = 0.01
    """Share held out for validation, chosen by the hash of a document or of a conversation's first question."""
    validation_windows: int | None = 256
    """Held-out windows to evaluate, spread evenly; null: all of them."""
    document_masking: bool = True
    """Tokens attend only to their own document or conversation of the window."""
    skip_broken_lines: bool = False
    """Leave out and count lines that cannot be read or used, instead of stopping at the first."""
    repeated_5grams: int | None = None
    """Conversations: leave out those in which an answer has one run of five words so often; null: none."""
    shard_tokens: int = 100_000_000
    """Tokens of one shard file (2 bytes each)."""
    prepared_dir: str = "outputs/prepared"
    """Where tokenizers and shards are kept, for every run that needs the same ones."""
    processes: int | None = None
    """Processes that tokenize; null: one a core."""
    overfit_steps: int | None = None
    """Train on the windows of the first so many steps again and again; null: on everything."""


@dataclass
class AdapterConfig:
    """Low-rank adapters (LoRA): train small matrices beside the weights, which stay as they are."""

    rank: int = 0
    """Rank of the matrices; 0: no adapters, all weights are trained."""
    alpha: float = 32.0
    """What the adapters add is multiplied by alpha / rank."""
    modules: list[str] = field(default_factory=lambda: list(ADAPTED_MODULES))
    """Linear layers that get them."""


@dataclass
class TokenizerConfig:
    """Byte-level BPE."""

    path: str | None = None
    """A tokenizer.json to use; null: train one on the corpus."""
    vocab_size: int = II("model.vocab_size")
    """Entries of a tokenizer trained here, control tokens and bytes included."""
    train_bytes: int | float = 50_000_000
    """Bytes of text that it is trained on."""


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = 3e-3
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the running mean and of the running square of the gradient."""
    eps: float = 1e-8
    """Added to the root of the running square."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices a step, times the learning rate; vectors are not decayed."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; null: no clipping."""


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = "cosine"
    """cosine, wsd (warm-up, stable, linear decay) or constant."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    horizon_steps: int | None = None
    """Step at which the schedule ends; null: the last step of the budget."""
    final_lr_ratio: float = 0.1
    """Learning rate at the horizon as a fraction of the peak."""
    decay_fraction: float = 0.2
    """Share of the horizon that wsd spends decaying."""


@dataclass
class TrainerConfig:
    """Hardware: nothing here changes what is learned, only how fast."""

    accelerator: str = "auto"
    """auto, cpu or cuda."""
    devices: int | str = 1
    """Devices of one node, or auto: all of them."""
    strategy: str = "ddp"
    """What each of several devices holds: ddp, the whole model; fsdp, a share of its weights, gradients and moments."""
    num_nodes: int = 1
    """Machines of the job."""
    precision: str = "auto"
    """auto (bf16 on CUDA devices that have it, fp32 elsewhere), fp32 or bf16."""
    compile: bool | str = "auto"
    """true, false or auto (torch.compile on CUDA only)."""
    check_gradients: bool = True
    """When a compiled run starts, compare its gradients with uncompiled ones, once, and refuse to train with others."""
    document_attention: str = "auto"
    """Attention within documents: flash, flash3 or flash4 (if installed), flex, dense; auto: flash if it can be had."""
    residual_precision: str = "auto"
    """Of the residual stream, fp32 or bf16; auto: bf16 where the precision is bf16 on CUDA, else fp32."""
    micro_batch_windows: int | str = "auto"
    """Most windows of one forward pass on one device; auto: as many as its memory holds, fewer if that was too many."""
    activation_checkpointing: bool | str = "auto"
    """Compute activations again in the backward pass: less memory, more work; auto: if no window fits a GPU without."""
    num_workers: int | None = None
    """Processes that read windows; null: 2 on CUDA, 0 (the training process itself) elsewhere."""
    profile: bool = False
    """Show where the time of a step goes, and write a trace of some steps into the run folder."""


@dataclass
class SamplingConfig:
    """How the model writes."""

    max_new_tokens: int = 64
    """Longest text, in tokens."""
    temperature: float = 0.6
    """Divides the logits; 0: always the likeliest token."""
    top_k: int = 50
    """Draw from so many of the likeliest tokens; 0: from all."""
    top_p: float = 0.9
    """Draw from the likeliest tokens that hold this share of the probability."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as probable as the likeliest; 0: from all."""
    repetition_penalty: float = 1.2
    """Divides the positive and multiplies the negative logits of tokens already seen; control tokens apart."""
    stop: list[str] = field(default_factory=list)
    """Texts that end what is written; they are not part of it."""


@dataclass
class GuardsConfig:
    """What happens when training goes wrong. An update with a loss or gradient that is not finite is never applied."""

    non_finite: str = "skip"
    """skip: go on without that update; rollback: go back to the last checkpoint and leave that batch out; stop."""
    most_in_a_row: int = 3
    """Updates skipped one after another, or rollbacks to the same checkpoint, before training stops."""
    loss_spike: str = "warn"
    """warn, or rollback: go back to the last checkpoint and leave the batch out; ignore."""
    spike_deviations: float = 6.0
    """A loss so many standard deviations above its running mean is a spike."""
    spike_window_steps: int = 100
    """Steps that the running mean and deviation look back; none is a spike before so many."""


@dataclass
class CallbacksConfig:
    """What happens beside training, and how often."""

    log_every_steps: int = 10
    """Steps between two points of the training curves."""
    validate_every_steps: int = 50
    """Steps between validations; 0: only at the end."""
    checkpoint_every_steps: int = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = 2
    """Checkpoints to keep, beside the best."""
    keep_every_steps: int = 0
    """Steps between checkpoints that are kept for good, a multiple of checkpoint_every_steps; 0: none."""
    histogram_every_steps: int = 0
    """Steps between histograms of all weights and gradients in TensorBoard; 0: none."""
    reference_curve: str | None = None
    """A published training loss to draw beside this run's: original, that of the original cucafera; null: none."""
    prompts: list[str] = field(default_factory=list)
    """Beginnings that the model continues, or questions that it answers, at each validation."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How it writes them."""
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    """What happens when training goes wrong."""


@dataclass
class LoggerConfig:
    """Where the curves go."""

    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""


@dataclass
class Config:
    """One run."""

    name: str = "quickstart"
    """Name of the run."""
    run_dir: str = "outputs/${name}"
    """The run folder."""
    seed: int = 1337
    """Decides the initial weights, the order of windows and the samples."""
    budget_tokens: int | float = 700_000
    """Tokens to train on, over the whole run; 5.5e9 is understood."""
    epochs: float | None = None
    """Passes over the training data, instead of budget_tokens; null: budget_tokens decides."""
    batch_tokens: int | float = 2048
    """Tokens of one optimizer step over all devices: a multiple of sequence_length."""
    sequence_length: int = II("model.max_position_embeddings")
    """Tokens that one window trains on."""
    init_from: str | None = None
    """What a new run begins with: a run folder, a checkpoint, or a Hugging Face folder or name, as OWNER/NAME."""
    resume: str = "auto"
    """auto: go on where the run folder stopped; required: refuse to begin anew; overwrite: erase and begin anew."""
    resume_despite: list[str] = field(default_factory=list)
    """Keys whose values may be others than the run was begun with, such as optimizer.lr, schedule or data."""
    max_time: str | None = None
    """Save and stop after this time, HH:MM:SS or DD:HH:MM:SS, of one start; the same command goes on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    """What is trained of it."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """The tokenizer."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over time."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The hardware."""
    callbacks: CallbacksConfig = field(default_factory=CallbacksConfig)
    """Logging, validation, checkpoints, samples."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    """Where the curves go."""

    @property
    def windows_per_step(self) -> int:
        """W: windows of one optimizer step over all devices."""
        return int(self.batch_tokens) // self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps that the budget pays for; what is left of it below one batch is not spent."""
        return int(self.budget_tokens) // int(self.batch_tokens)

    @property
    def horizon_steps(self) -> int:
        """Step at which the learning rate schedule ends."""
        return self.schedule.horizon_steps or self.total_steps

    @property
    def max_seconds(self) -> float | None:
        """max_time in seconds."""
        if self.max_time is None:
            return None
        days, hours, minutes, seconds = [0, 0, 0, *map(int, self.max_time.split(":"))][-4:]
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    def is_log_step(self, step: int) -> bool:
        """Whether something is written after this step: curves, a validation, a checkpoint, or the last step."""
        every = (
            self.callbacks.log_every_steps,
            self.callbacks.validate_every_steps,
            self.callbacks.checkpoint_every_steps,
        )
        return step == self.total_steps or any(interval and step % interval == 0 for interval in every)


CHOICES: dict[str, tuple[Any, ...]] = {
    "resume": ("auto", "required", "overwrite"),
    "model.hidden_act": ("gelu_pytorch_tanh", "gelu", "silu"),
    "data.kind": ("documents", "conversations"),
    "schedule.name": ("cosine", "wsd", "constant"),
    "trainer.accelerator": ("auto", "cpu", "cuda"),
    "trainer.strategy": ("ddp", "fsdp"),
    "trainer.precision": ("auto", "fp32", "bf16"),
    "trainer.compile": ("auto", True, False),
    "trainer.document_attention": ("auto", "flash", "flash3", "flash4", "flex", "dense"),
    "trainer.residual_precision": ("auto", "fp32", "bf16"),
    "trainer.activation_checkpointing": ("auto", True, False),
    "callbacks.reference_curve": (None, "original"),
    "callbacks.guards.non_finite": ("skip", "rollback", "stop"),
    "callbacks.guards.loss_spike": ("warn", "rollback", "ignore"),
}

AT_LEAST: dict[str, float] = {
    "seed": 0,
    "budget_tokens": 1,
    "batch_tokens": 1,
    "sequence_length": 2,
    "model.hidden_size": 1,
    "model.intermediate_size": 1,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 1,
    "model.num_key_value_heads": 1,
    "model.max_position_embeddings": 2,
    "model.initializer_range": 0,
    "model.base_hidden_size": 1,
    "data.validation_windows": 1,
    "data.repeated_5grams": 2,
    "adapter.rank": 0,
    "data.shard_tokens": 1024,
    "data.processes": 1,
    "data.overfit_steps": 1,
    "tokenizer.train_bytes": 1,
    "optimizer.weight_decay": 0,
    "schedule.warmup_steps": 0,
    "schedule.horizon_steps": 1,
    "trainer.num_nodes": 1,
    "trainer.num_workers": 0,
    "callbacks.log_every_steps": 1,
    "callbacks.validate_every_steps": 0,
    "callbacks.checkpoint_every_steps": 0,
    "callbacks.keep_last": 1,
    "callbacks.keep_every_steps": 0,
    "callbacks.histogram_every_steps": 0,
    "callbacks.guards.most_in_a_row": 1,
    "callbacks.guards.spike_window_steps": 2,
    "callbacks.sampling.max_new_tokens": 1,
    "callbacks.sampling.temperature": 0,
    "callbacks.sampling.top_k": 0,
    "callbacks.sampling.min_p": 0,
}

ABOVE_ZERO = (
    "model.rope_theta",
    "model.rms_norm_eps",
    "optimizer.lr",
    "optimizer.eps",
    "optimizer.clip_norm",
    "adapter.alpha",
    "epochs",
    "callbacks.sampling.top_p",
    "callbacks.sampling.repetition_penalty",
    "callbacks.guards.spike_deviations",
)

AT_MOST: dict[str, float] = {
    "model.vocab_size": MAX_VOCABULARY,
    "tokenizer.vocab_size": MAX_VOCABULARY,
    "data.shard_tokens": 1_000_000_000,
    "schedule.final_lr_ratio": 1,
    "schedule.decay_fraction": 1,
    "callbacks.sampling.top_p": 1,
    "callbacks.sampling.min_p": 1,
    "seed": 2**32 - 1,
}

DURATION = re.compile(r"(\d+:)?\d+:\d\d:\d\d")

WHOLE_TOKENS = ("budget_tokens", "batch_tokens", "tokenizer.train_bytes")


def value_of(config: Any, key: str) -> Any:
    """The value at a dotted key of nested dataclasses."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def value_problems(config: Config, unusable: set[str]) -> Iterator[str]:
    """Yields a sentence for each value that cannot be, alone or beside another.

    `unusable` holds the dotted keys whose values are known to be wrong already: rules that read them are left out.
    """
    failed = set(unusable)
    if config.tokenizer.vocab_size == config.model.vocab_size:
        failed.add("tokenizer.vocab_size")  # it follows the model's: one mistake, one sentence

    def rule(*keys: str) -> bool:
        """Whether a rule that reads these keys can be judged."""
        return not any(key == bad or bad.startswith(key + ".") for key in keys for bad in failed)

    def broken(key: str, wanted: str) -> str:
        failed.add(key)
        return f"{key} is {shown(value_of(config, key))}; it must be {wanted}"

    for key, choices in CHOICES.items():
        if rule(key) and value_of(config, key) not in choices:
            yield broken(key, "one of " + ", ".join(shown(choice) for choice in choices))
    for keys, wanted, holds in _limits():
        for key in keys:
            if rule(key) and (value := value_of(config, key)) is not None and not holds(key, value):
                yield broken(key, wanted(key))
    for key in ("trainer.devices", "trainer.micro_batch_windows"):
        if rule(key) and (value := value_of(config, key)) != "auto" and not (isinstance(value, int) and value >= 1):
            yield broken(key, "a number of at least 1, or auto")
    if rule("optimizer.betas") and (
        len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas)
    ):
        yield broken("optimizer.betas", "two numbers in [0, 1)")
    for key in ("model.vocab_size", "tokenizer.vocab_size"):
        if rule(key) and value_of(config, key) < SMALLEST_VOCABULARY:
            yield broken(key, f"at least {SMALLEST_VOCABULARY}: the control tokens and the 256 bytes")
    if rule("name") and (not config.name or "/" in config.name or config.name in (".", "..")):
        yield broken("name", "a plain folder name")

    if rule("max_time") and config.max_time is not None and not DURATION.fullmatch(config.max_time):
        yield broken("max_time", "HH:MM:SS or DD:HH:MM:SS (in a YAML file, in quotes)")
    if (
        rule("callbacks.keep_every_steps", "callbacks.checkpoint_every_steps")
        and (kept := config.callbacks.keep_every_steps)
        and not (config.callbacks.checkpoint_every_steps and kept % config.callbacks.checkpoint_every_steps == 0)
    ):
        yield (
            f"callbacks.keep_every_steps is {shown(kept)}; it must be a multiple of callbacks.checkpoint_every_steps "
            f"({config.callbacks.checkpoint_every_steps})"
        )
    if rule("adapter.modules") and (
        not config.adapter.modules or not set(config.adapter.modules) <= set(ADAPTED_MODULES)
    ):
        yield broken("adapter.modules", f"a list of some of {', '.join(ADAPTED_MODULES)}")
    if rule("callbacks.sampling.stop") and "" in config.callbacks.sampling.stop:
        yield broken("callbacks.sampling.stop", "a list of texts that are not empty")

    key = "callbacks.sampling.temperature"
    if rule(key) and 0 < config.callbacks.sampling.temperature < SMALLEST_TEMPERATURE:
        yield broken(key, f"0 or at least {SMALLEST_TEMPERATURE}")

    yield from _shape_problems(config, rule)
    yield from _budget_problems(config, rule)
    yield from _source_problems(config, rule)
    yield from _finetuning_problems(config, rule)


def sampling_problems(sampling: SamplingConfig) -> list[str]:
    """A sentence for each value of a SamplingConfig that cannot be, by the same rules."""
    config = Config(callbacks=CallbacksConfig(sampling=sampling))
    prefix = "callbacks.sampling."
    infinite = [name for name, value in vars(sampling).items() if isinstance(value, float) and not math.isfinite(value)]
    known = {"sequence_length", "tokenizer.vocab_size", *(prefix + name for name in infinite)}
    problems = [f"{name} is {getattr(sampling, name)}; it must be a number" for name in infinite]
    for problem in value_problems(config, known):  # the known ones have no value here
        if problem.startswith(prefix):
            problems.append(problem.removeprefix(prefix))
    return problems


def _limits() -> list[tuple[Any, Callable[[str], str], Callable[[str, Any], bool]]]:
    """Keys, the limit in words, and its test, for the limits that stand in the tables above."""
    return [
        (WHOLE_TOKENS, lambda key: "a whole number", lambda key, value: float(value).is_integer()),
        (AT_LEAST, lambda key: f"at least {shown(AT_LEAST[key])}", lambda key, value: value >= AT_LEAST[key]),
        (ABOVE_ZERO, lambda key: "above zero", lambda key, value: value > 0),
        (AT_MOST, lambda key: f"at most {shown(AT_MOST[key])}", lambda key, value: value <= AT_MOST[key]),
        (
            ("schedule.final_lr_ratio", "schedule.decay_fraction"),
            lambda key: "a fraction from 0 to 1",
            lambda key, value: value >= 0,
        ),
        (
            ("data.validation_fraction",),
            lambda key: "a fraction from 0 to 1, both excluded",
            lambda key, value: 0 < value < 1,
        ),
    ]


def _shape_problems(config: Config, rule: Callable[..., bool]) -> Iterator[str]:
    model = config.model
    if rule("model.hidden_size", "model.num_attention_heads"):
        if model.hidden_size % model.num_attention_heads:
            yield (
                f"model.hidden_size is {shown(model.hidden_size)}; it must be a multiple of "
                f"model.num_attention_heads ({model.num_attention_heads})"
            )
        elif (model.hidden_size // model.num_attention_heads) % 2:
            yield (
                f"each head is {model.hidden_size // model.num_attention_heads} wide (model.hidden_size / "
                "model.num_attention_heads); rotary embedding needs an even width"
            )
    if (
        rule("model.num_attention_heads", "model.num_key_value_heads")
        and model.num_attention_heads % model.num_key_value_heads
    ):
        yield (
            f"model.num_key_value_heads is {model.num_key_value_heads}; it must divide "
            f"model.num_attention_heads ({model.num_attention_heads})"
        )
    if (
        rule("model.vocab_size", "tokenizer.vocab_size")
        and config.tokenizer.path is None
        and config.tokenizer.vocab_size > model.vocab_size
    ):
        yield (
            f"tokenizer.vocab_size is {shown(config.tokenizer.vocab_size)}; the model has only "
            f"{shown(model.vocab_size)} rows (model.vocab_size)"
        )
    if (
        rule("sequence_length", "model.max_position_embeddings")
        and config.sequence_length > model.max_position_embeddings
    ):
        yield (
            f"sequence_length is {shown(config.sequence_length)}; the model's context is "
            f"{shown(model.max_position_embeddings)} (model.max_position_embeddings)"
        )


def _budget_problems(config: Config, rule: Callable[..., bool]) -> Iterator[str]:
    if not rule("batch_tokens"):
        return
    batch = int(config.batch_tokens)
    fits_windows = True
    if rule("sequence_length") and batch % config.sequence_length:
        fits_windows = False
        nearest = max(1, round(batch / config.sequence_length)) * config.sequence_length
        yield (
            f"batch_tokens is {shown(batch)}; it must be a multiple of the window, sequence_length = "
            f"{shown(config.sequence_length)}: the nearest is batch_tokens={nearest}"
        )
    devices = config.trainer.devices
    if (
        fits_windows
        and isinstance(devices, int)
        and rule("sequence_length", "trainer.devices", "trainer.num_nodes")
        and config.windows_per_step % (devices * config.trainer.num_nodes)
    ):
        yield (
            f"a step has {config.windows_per_step} windows (batch_tokens / sequence_length); they cannot be "
            f"shared evenly among {devices * config.trainer.num_nodes} devices (trainer.devices x trainer.num_nodes)"
        )
    if config.epochs is not None or not rule("budget_tokens", "epochs"):
        return  # with epochs, the budget is known when the data is
    if config.budget_tokens < batch:
        yield (
            f"budget_tokens is {shown(config.budget_tokens)}; it must pay for at least one step, "
            f"batch_tokens = {shown(batch)}"
        )
    elif (
        rule("schedule.warmup_steps", "schedule.horizon_steps") and config.schedule.warmup_steps > config.horizon_steps
    ):
        yield (
            f"schedule.warmup_steps is {shown(config.schedule.warmup_steps)}; it must not be longer than the horizon, "
            f"{shown(config.horizon_steps)} steps (schedule.horizon_steps, or else budget_tokens / batch_tokens)"
        )


def _source_problems(config: Config, rule: Callable[..., bool]) -> Iterator[str]:
    if not config.data.sources and rule("data.sources"):
        yield "data.sources is empty; name at least one source of text, for example data=embedded"
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        if not rule(key):
            continue
        given = [kind for kind in ("path", "dataset", "embedded") if getattr(source, kind)]
        if len(given) != 1:
            yield (
                f"{key} gives {' and '.join(given) or 'no place to read from'}; it must give exactly one of "
                "path, dataset and embedded"
            )
        if source.messages_column and (source.prompt_column or source.answer_column):
            yield f"{key} names messages_column beside prompt_column or answer_column; it must name one or the others"
        if not source.weight > 0:
            yield f"{key}.weight is {shown(source.weight)}; it must be above zero"


def _finetuning_problems(config: Config, rule: Callable[..., bool]) -> Iterator[str]:
    begins_with_nothing = rule("init_from") and config.init_from is None
    if (
        rule("data.kind", "tokenizer.path")
        and config.data.kind == "conversations"
        and begins_with_nothing
        and config.tokenizer.path is None
    ):
        yield (
            "conversations need a model or at least a tokenizer to begin with: init_from=RUN, the folder or a "
            "checkpoint of a pretrained model (or tokenizer.path=TOKENIZER.json, to train a new model on them alone)"
        )
    if rule("adapter.rank") and config.adapter.rank and begins_with_nothing:
        yield (
            f"adapter.rank is {config.adapter.rank}; adapters need trained weights beside them: init_from=RUN, the "
            "folder or a checkpoint of a pretrained model"
        )


def shown(value: Any) -> str:
    """A value as the user would type it; long whole numbers with separators."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):_}" if abs(value) >= 10_000 else str(int(value))
    return str(value) if isinstance(value, float | str) else repr(value)
