"""Every setting, as typed dataclasses: default, bounds, choices and meaning of each stand in its field.

`python -m cucafera.run --help` prints them, and a wrong value is refused by them. Rules between values are in rules.py.
Nothing here imports torch: a wrong configuration is refused before anything heavy is loaded.

    T  sequence_length, the tokens that one window trains on (it holds T + 1)
    W  windows of one step over all devices: batch_tokens / T
"""

import re
from dataclasses import dataclass
from typing import Any

from cucafera.config.fields import setting
from cucafera.config.tokens import MAX_VOCABULARY, SMALLEST_VOCABULARY

ADAPTED_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of a block, which may have adapters."""

SMALLEST_TEMPERATURE = 1e-3
"""Logits divided by less may overflow."""

MAX_TOKENS = 10**15
"""More than any run trains on; larger numbers are typing errors."""

MAX_WIDTH = 1 << 16
"""Larger widths, like a thousand layers or a million positions, are errors: of typing, or in a foreign file."""

DURATION = re.compile(r"(\d+:)?\d+:\d\d:\d\d")

MAX_NAME_BYTES = 150


def _is_folder_name(name: str) -> bool:
    """True if a name is that of one folder on every file system, and looks like what it is."""
    return (
        name not in ("", ".", "..")
        and not {"/", "$"} & set(name)  # $: an interpolation, where the path is part of Hydra's own settings
        and name.isprintable()
        and name == name.strip()
        and not name.endswith(".")
        and len(name.encode()) <= MAX_NAME_BYTES
    )


FOLDER_NAME = (
    f"a plain folder name: at most {MAX_NAME_BYTES} bytes, without /, $ and control characters, and without spaces "
    "around it or a dot at its end",
    _is_folder_name,
)
TEMPERATURE = (f"0 or at least {SMALLEST_TEMPERATURE}", lambda value: value == 0 or value >= SMALLEST_TEMPERATURE)
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu")
LANGUAGE = ("an ISO 639-1 code in lower case, such as ca", lambda code: bool(re.fullmatch("[a-z]{2}", code)))
STOP_TEXTS = ("a list of texts that are not empty", lambda texts: "" not in texts)
MAX_TIME = ("HH:MM:SS or DD:HH:MM:SS (in a YAML file, in quotes)", lambda time: bool(DURATION.fullmatch(time)))


@dataclass
class ModelConfig:
    """The transformer. Names and meanings are those of Hugging Face's LlamaConfig."""

    vocab_size: int = setting(
        1024,
        "Rows of the embedding, tied with the head; at least the control tokens and the 256 bytes.",
        at_least=SMALLEST_VOCABULARY,
        at_most=MAX_VOCABULARY,
    )
    hidden_size: int = setting(192, "Width of the residual stream.", at_least=1, at_most=MAX_WIDTH)
    intermediate_size: int = setting(512, "Width of the gated MLP.", at_least=1, at_most=4 * MAX_WIDTH)
    num_hidden_layers: int = setting(4, "Number of blocks.", at_least=1, at_most=1000)
    num_attention_heads: int = setting(6, "Query heads; they must divide hidden_size.", at_least=1, at_most=MAX_WIDTH)
    num_key_value_heads: int = setting(
        2, "Key/value heads; they must divide the query heads.", at_least=1, at_most=MAX_WIDTH
    )
    max_position_embeddings: int = setting(256, "The context, in tokens.", at_least=2, at_most=1 << 20)
    rope_theta: float = setting(10_000.0, "Base of the rotary frequencies.", above=0, at_most=1e12)
    rms_norm_eps: float = setting(1e-5, "Added to the mean square before its root.", above=0, at_most=1)
    hidden_act: str = setting("gelu_pytorch_tanh", "Activation of the gate.", choices=ACTIVATIONS)
    initializer_range: float = setting(0.02, "Standard deviation of the initial weights.", at_least=0, at_most=1000)
    base_hidden_size: int | None = setting(
        None,
        "Width at which lr and initializer_range hold (muP scales from it, heads keep their width); null: no scaling.",
        at_least=1,
    )


@dataclass
class RolesConfig:
    """Names of speakers, by role, in addition to the usual ones."""

    system: list[str] = setting([], "Names that stand for system; system and developer do.")
    user: list[str] = setting([], "Names that stand for user; user, human and prompter do.")
    assistant: list[str] = setting([], "Names that stand for assistant; assistant, gpt, model, bot and others do.")


@dataclass
class ColumnsConfig:
    """Columns of the rows of a source: text of documents, the others of conversations and pairs of answers."""

    text: str = setting("text", "The document; a row of a .txt file has no other column.")
    messages: str | None = setting(None, "List of messages; null: messages, conversations or conversation.")
    system: str | None = setting(None, "System message; null: system or system_prompt, if there is one.")
    prompt: str | None = setting(None, "The user's message; null: prompt, instruction or question.")
    input: str | None = setting(
        None, "Text that is appended to the prompt, if any; null: input, context or passage, if there is one."
    )
    history: str | None = setting(
        None, "Turns before the prompt: pairs of question and answer, or messages; null: history, if any."
    )
    answer: str | None = setting(None, "The answer; null: completion, output, answer, response or summary.")
    chosen: str | None = setting(None, "The better answer of a pair; null: chosen, or another usual name.")
    rejected: str | None = setting(None, "The worse answer of a pair; null: rejected, or another usual name.")
    roles: RolesConfig = setting(RolesConfig, "Names of speakers in messages, in addition to the usual ones.")
    ignore: list[str] = setting(
        [], "Columns and keys of messages that are left out, although they may change what a conversation means."
    )


@dataclass
class SourceConfig:
    """One source of text: what every kind has. Each kind adds settings of its own; see cucafera/data/sources."""

    weight: float = setting(1.0, "Passes over the source per epoch of the mixture; 0.5: every other epoch.", above=0)
    columns: ColumnsConfig = setting(ColumnsConfig, "Columns of documents (text), conversations or pairs of answers.")


@dataclass
class DataConfig:
    """From documents, conversations or pairs of answers to windows."""

    sources: dict[str, SourceConfig] = setting({}, "Named sources, mixed by their weights.")
    validation_fraction: float = setting(
        0.01, "Share held out for validation, by the hash of the text.", above=0, below=1
    )
    validation_windows: int | None = setting(256, "Held-out windows to evaluate; null: all of them.", at_least=1)
    document_masking: bool = setting(True, "Tokens attend only to their own document or conversation of the window.")
    skip_broken_lines: bool = setting(False, "Leave out and count lines that cannot be used, instead of stopping.")
    max_5gram_repeats: int | None = setting(
        None,
        "Conversations: leave out those in which an answer repeats five consecutive words this often; null: none. Of a "
        "pair, the better answer.",
        at_least=2,
    )
    language: str | None = setting(
        None,
        "Conversations: leave out those whose answers are recognized as another language, an ISO 639-1 code such as "
        "ca; null: none. Of a pair, the better answer. Needs pip install '.[language]'.",
        must_be=LANGUAGE,
    )
    shard_tokens: int = setting(100_000_000, "Tokens per shard file (2 bytes each).", at_least=1024, at_most=10**9)
    prepared_dir: str = setting("outputs/prepared", "Folder of tokenizers and shards, shared by runs.")
    processes: int | None = setting(None, "Processes that tokenize; null: one per core.", at_least=1)
    overfit_steps: int | None = setting(
        None, "Train only on the windows of this many first steps; null: on all.", at_least=1
    )


@dataclass
class AdapterConfig:
    """Low-rank adapters (LoRA): train small matrices added to the weights, which stay unchanged."""

    rank: int = setting(0, "Rank of the matrices; 0: no adapters, all weights are trained.", at_least=0)
    alpha: float = setting(32.0, "What the adapters add is multiplied by alpha / rank.", above=0)
    modules: list[str] = setting(list(ADAPTED_MODULES), "Linear layers that get adapters.", choices=ADAPTED_MODULES)


@dataclass
class TokenizerConfig:
    """Byte-level BPE."""

    path: str | None = setting(None, "A tokenizer.json to use; null: train one on the corpus.")
    vocab_size: int = setting(
        "${model.vocab_size}",
        "Entries of a tokenizer trained by the run, control tokens and bytes included.",
        at_least=SMALLEST_VOCABULARY,
        at_most=MAX_VOCABULARY,
    )
    train_bytes: int = setting(50_000_000, "Bytes of text that it is trained on, a sample of all sources.", at_least=1)


@dataclass
class OptimizerConfig:
    """Settings that every optimizer has. Each choice may add its own; see cucafera/optimizers."""

    name: str = setting("adamw", "The optimizer: chosen by optimizer=NAME.")
    lr: float = setting(2e-3, "Peak learning rate.", above=0)
    weight_decay: float = setting(0.1, "Decoupled decay of matrices per step, times the learning rate.", at_least=0)
    clip_norm: float | None = setting(1.0, "Largest global norm of the gradient; null: no clipping.", above=0)


@dataclass
class ObjectiveConfig:
    """Settings that every objective has. Each choice may add its own; see cucafera/objectives."""

    name: str = setting("pretraining", "The objective: chosen by objective=NAME.")


@dataclass
class ScheduleConfig:
    """The learning rate as a function of the step."""

    name: str = setting(
        "cosine",
        "Shape after the warm-up; linear decays all the way, wsd (warm-up, stable, decay) over the last part.",
        choices=("cosine", "linear", "wsd", "constant"),
    )
    warmup_steps: int = setting(20, "Steps of linear warm-up.", at_least=0)
    horizon_steps: int | None = setting(None, "Step at which the schedule ends; null: the last step.", at_least=1)
    final_lr_ratio: float = setting(
        0.1, "Learning rate at the horizon, as a fraction of the peak.", at_least=0, at_most=1
    )
    decay_fraction: float = setting(0.2, "Share of the horizon that wsd spends decaying.", at_least=0, at_most=1)
    cooldown_steps: int | str | None = setting(
        None,
        "Continue the run of init_from, with its settings and its complete state, for these steps, in which the "
        "learning rate goes in a line from what it was to zero; auto: a fifth of the steps done before.",
        at_least=1,
        choices=("auto",),
    )
    cooldown_start_step: int | None = setting(
        None, "Step of the checkpoint that a cooldown begins with; null: the newest, or that of the file.", at_least=1
    )


@dataclass
class TrainerConfig:
    """Hardware: changes how fast a run trains, not what it learns."""

    accelerator: str = setting("auto", "Kind of device.", choices=("auto", "cpu", "cuda"))
    devices: int | str = setting(1, "Devices per node; auto: all of them.", at_least=1, choices=("auto",))
    strategy: str = setting(
        "ddp",
        "ddp: each device holds the model; fsdp: each holds a share of weights, gradients and optimizer state.",
        choices=("ddp", "fsdp"),
    )
    num_nodes: int = setting(1, "Machines of the job.", at_least=1)
    precision: str = setting(
        "auto",
        "Precision of the computation; auto: bf16 on CUDA devices that have it, else fp32.",
        choices=("auto", "fp32", "bf16"),
    )
    compile: bool | str = setting("auto", "Use torch.compile; auto: on CUDA only.", choices=("auto", True, False))
    check_gradients: bool = setting(True, "Refuse to train if the gradients of a compiled run differ from eager ones.")
    document_attention: str = setting(
        "auto",
        "Kernel of attention within documents; auto: flash if it is available.",
        choices=("auto", "flash", "flash3", "flash4", "flex", "dense"),
    )
    residual_precision: str = setting(
        "auto",
        "Precision of the residual stream; auto: bf16 where the precision is bf16 on CUDA, else fp32.",
        choices=("auto", "fp32", "bf16"),
    )
    micro_batch_windows: int | str = setting(
        "auto",
        "Maximum of windows per forward pass and device; auto: as many as fit into its memory.",
        at_least=1,
        choices=("auto",),
    )
    activation_checkpointing: bool | str = setting(
        "auto",
        "Recompute activations in the backward pass: less memory, more work; auto: if no window fits otherwise.",
        choices=("auto", True, False),
    )
    num_workers: int | None = setting(None, "Processes that read windows; null: 2 on CUDA, else 0.", at_least=0)
    profile: bool = setting(False, "Profile the time of a step, and write a trace of some steps into the run folder.")


@dataclass
class SamplingConfig:
    """Sampling of text from the model."""

    max_new_tokens: int = setting(64, "Maximum length of the text, in tokens.", at_least=1)
    temperature: float = setting(0.6, "Divides the logits; 0: greedy decoding.", must_be=TEMPERATURE)
    top_k: int = setting(50, "Draw from this many most probable tokens; 0: from all.", at_least=0)
    top_p: float = setting(
        0.9, "Draw from the most probable tokens that together have this probability.", above=0, at_most=1
    )
    min_p: float = setting(
        0.0,
        "Draw from tokens with at least this fraction of the probability of the most probable one; 0: from all.",
        at_least=0,
        at_most=1,
    )
    repetition_penalty: float = setting(1.2, "Divides positive, multiplies negative logits of tokens seen.", above=0)
    stop: list[str] = setting([], "Texts at which generation stops, not part of the output.", must_be=STOP_TEXTS)


@dataclass
class GuardsConfig:
    """Reactions to failing training. An update with a loss or gradient that is not finite is never applied."""

    non_finite: str = setting(
        "skip",
        "skip: continue without that update; rollback: return to the last checkpoint and leave that batch out; stop.",
        choices=("skip", "rollback", "stop"),
    )
    max_consecutive: int = setting(
        3, "Consecutive skipped updates, or rollbacks to one checkpoint, before training stops.", at_least=1
    )
    loss_spike: str = setting(
        "warn",
        "warn; rollback: return to the last checkpoint and leave the batch out; ignore.",
        choices=("warn", "rollback", "ignore"),
    )
    spike_deviations: float = setting(
        6.0, "A loss this many standard deviations above its running mean is a spike.", above=0
    )
    spike_window_steps: int = setting(100, "Steps of the running mean; no spike is reported before them.", at_least=2)
    answers: str = setting(
        "warn",
        "Answers that are worse than before training, by the limits below (preference tuning): warn; stop, with a "
        "checkpoint; ignore.",
        choices=("warn", "stop", "ignore"),
    )
    max_logprob_fall: float = setting(
        1.0, "Nats per token by which the log-probability of the better held-out answers may fall.", above=0
    )
    max_stopped_fall: float = setting(
        0.25, "Share of the sample answers that may no longer end by themselves.", above=0, at_most=1
    )
    max_repeated_growth: float = setting(
        0.25, "Share of the sample answers that may newly repeat five consecutive words.", above=0, at_most=1
    )
    max_length_growth: float = setting(2.0, "Factor by which the sample answers may become longer.", above=1)


@dataclass
class CallbacksConfig:
    """Logging, validation, checkpoints and samples, and how often."""

    log_every_steps: int = setting(10, "Steps between two points of the training curves.", at_least=1)
    validate_every_steps: int | str = setting(
        50, "Steps between validations; auto: a tenth of the run; 0: only at the end.", at_least=0, choices=("auto",)
    )
    checkpoint_every_steps: int = setting(50, "Steps between checkpoints; 0: only at the end.", at_least=0)
    keep_last: int = setting(2, "Newest checkpoints to keep, in addition to the best.", at_least=1)
    keep_every_steps: int = setting(0, "Steps between checkpoints that are never deleted; 0: none.", at_least=0)
    reference_curve: str | None = setting(
        None,
        "A published training loss to draw in the same chart; original: that of the original cucafera; null: none.",
        choices=("original",),
    )
    prompts: list[str] = setting([], "Texts to continue, or questions to answer, at each validation.")
    sampling: SamplingConfig = setting(SamplingConfig, "Sampling of these texts.")
    guards: GuardsConfig = setting(GuardsConfig, "Reactions to failing training.")


@dataclass
class LoggerConfig:
    """Destination of the curves."""

    tensorboard: bool = setting(True, "Write TensorBoard events into the run folder.")


@dataclass
class Config:
    """One run."""

    name: str = setting(
        "${run_name:}",
        "Name of the run; quickstart with the embedded corpus, else that of its data.",
        must_be=FOLDER_NAME,
    )
    run_dir: str = setting("outputs/${name}", "The run folder.")
    seed: int = setting(
        1337, "Random seed of initial weights, window order and samples.", at_least=0, at_most=2**32 - 1
    )
    budget_tokens: int = setting(700_000, "Tokens to train on; 5.5e9 is understood.", at_least=1, at_most=MAX_TOKENS)
    epochs: float | None = setting(None, "Passes over the training data, in place of budget_tokens.", above=0)
    batch_tokens: int = setting(2048, "Tokens per optimizer step, over all devices.", at_least=1, at_most=MAX_TOKENS)
    sequence_length: int = setting("${model.max_position_embeddings}", "Tokens of a window (T).", at_least=2)
    init_from: str | None = setting(None, "Initial weights: a run, checkpoint, or Hugging Face folder or OWNER/NAME.")
    resume: str = setting(
        "auto",
        "auto: from the newest checkpoint, if any; required: never start a new run; overwrite: erase and start again.",
        choices=("auto", "required", "overwrite"),
    )
    resume_allow_changed: list[str] = setting(
        [], "Keys that may differ from the start of the run, such as optimizer.lr."
    )
    max_time: str | None = setting(None, "Save and stop after this time; the same command resumes.", must_be=MAX_TIME)
    model: ModelConfig = setting(ModelConfig, "The transformer.")
    adapter: AdapterConfig = setting(AdapterConfig, "Low-rank adapters (LoRA).")
    data: DataConfig = setting(DataConfig, "Text, from documents or conversations to windows.")
    tokenizer: TokenizerConfig = setting(TokenizerConfig, "The tokenizer.")
    objective: ObjectiveConfig = setting(ObjectiveConfig, "What is learned from the data.")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "The optimizer.")
    schedule: ScheduleConfig = setting(ScheduleConfig, "The learning rate over time.")
    trainer: TrainerConfig = setting(TrainerConfig, "The hardware.")
    callbacks: CallbacksConfig = setting(CallbacksConfig, "Logging, validation, checkpoints, samples.")
    logger: LoggerConfig = setting(LoggerConfig, "Destination of the curves.")

    @property
    def windows_per_step(self) -> int:
        """W: windows of one optimizer step over all devices."""
        return self.batch_tokens // self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the budget; a remainder below one batch is not spent."""
        return self.budget_tokens // self.batch_tokens

    @property
    def horizon_steps(self) -> int:
        """Step at which the learning rate schedule ends."""
        return self.schedule.horizon_steps or self.total_steps

    @property
    def validation_steps(self) -> int:
        """Steps between validations; 0: only at the end."""
        every = self.callbacks.validate_every_steps
        return max(1, self.total_steps // 10) if isinstance(every, str) else every

    @property
    def max_seconds(self) -> float | None:
        """max_time in seconds."""
        if self.max_time is None:
            return None
        days, hours, minutes, seconds = [0, 0, 0, *map(int, self.max_time.split(":"))][-4:]
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    def is_log_step(self, step: int) -> bool:
        """True if something is written after this step: curves, a validation, a checkpoint, or the last step."""
        every = (
            self.callbacks.log_every_steps,
            self.validation_steps,
            self.callbacks.checkpoint_every_steps,
        )
        return step == self.total_steps or any(interval and step % interval == 0 for interval in every)


def value_of(config: Any, key: str) -> Any:
    """The value at a dotted key of nested dataclasses."""
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config
