"""Rules between values of the configuration. Bounds of single values stand in their fields, see schema.py."""

import os
from collections.abc import Iterator

from cucafera.config.fields import format_value
from cucafera.config.registry import OBJECTIVES, OPTIMIZERS, SOURCES, Judge
from cucafera.config.schema import Config
from cucafera.quantities import number_of


def rule_problems(config: Config, unusable: set[str]) -> Iterator[str]:
    """Yield a sentence for each combination of values that cannot be used.

    Args:
        config: The configuration.
        unusable: Dotted keys whose values are known to be wrong; rules that read them are left out.
    """

    def usable(*keys: str) -> bool:
        """True if a rule that reads these keys can be judged."""
        return not any(f"{key}.".startswith(f"{bad}.") or bad.startswith(f"{key}.") for key in keys for bad in unusable)

    for rules in (
        _folder_problems, _shape_problems, _budget_problems, _source_problems, _training_problems, _cooldown_problems,
    ):  # fmt: skip
        yield from rules(config, usable)
    for registry, name in ((OBJECTIVES, config.objective.name), (OPTIMIZERS, config.optimizer.name)):
        if name in registry.names():
            yield from registry.get(name).problems(config, usable)


def _folder_problems(config: Config, usable: Judge) -> Iterator[str]:
    run, prepared = map(os.path.abspath, (config.run_dir, config.data.prepared_dir))
    if usable("name", "run_dir", "data.prepared_dir") and f"{run}/".startswith(f"{prepared}/"):
        yield (
            f"run_dir is {config.run_dir}, within data.prepared_dir = {config.data.prepared_dir}, which all runs "
            "share: choose another name=..."
        )


def _shape_problems(config: Config, usable: Judge) -> Iterator[str]:
    model = config.model
    if usable("model.hidden_size", "model.num_attention_heads"):
        if model.hidden_size % model.num_attention_heads:
            yield (
                f"model.hidden_size is {format_value(model.hidden_size)}; it must be a multiple of "
                f"model.num_attention_heads ({model.num_attention_heads})"
            )
        elif (model.hidden_size // model.num_attention_heads) % 2:
            yield (
                f"each head is {model.hidden_size // model.num_attention_heads} wide (model.hidden_size / "
                "model.num_attention_heads); rotary embedding needs an even width"
            )
    if (
        usable("model.num_attention_heads", "model.num_key_value_heads")
        and model.num_attention_heads % model.num_key_value_heads
    ):
        yield (
            f"model.num_key_value_heads is {model.num_key_value_heads}; it must divide "
            f"model.num_attention_heads ({model.num_attention_heads})"
        )
    if (
        usable("model.vocab_size", "tokenizer.vocab_size")
        and config.tokenizer.path is None
        and config.tokenizer.vocab_size > model.vocab_size
    ):
        yield (
            f"tokenizer.vocab_size is {format_value(config.tokenizer.vocab_size)}; the model has only "
            f"{number_of(model.vocab_size, 'row')} (model.vocab_size)"
        )
    if (
        usable("sequence_length", "model.max_position_embeddings")
        and config.sequence_length > model.max_position_embeddings
    ):
        yield (
            f"sequence_length is {format_value(config.sequence_length)}; the model's context is "
            f"{format_value(model.max_position_embeddings)} (model.max_position_embeddings)"
        )


def _budget_problems(config: Config, usable: Judge) -> Iterator[str]:
    if not usable("batch_tokens"):
        return
    batch = config.batch_tokens
    fits_windows = True
    if usable("sequence_length") and batch % config.sequence_length:
        fits_windows = False
        nearest = max(1, round(batch / config.sequence_length)) * config.sequence_length
        yield (
            f"batch_tokens is {format_value(batch)}; it must be a multiple of the window, sequence_length = "
            f"{format_value(config.sequence_length)}: the nearest is batch_tokens={nearest}"
        )
    devices = config.trainer.devices
    if (
        fits_windows
        and isinstance(devices, int)
        and usable("sequence_length", "trainer.devices", "trainer.num_nodes")
        and config.windows_per_step % (devices * config.trainer.num_nodes)
    ):
        yield (
            f"a step has {number_of(config.windows_per_step, 'window')} (batch_tokens / sequence_length); "
            "they cannot be "
            f"shared evenly among {number_of(devices * config.trainer.num_nodes, 'device')} (trainer.devices "
            "x trainer.num_nodes)"
        )
    if config.epochs is not None or not usable("budget_tokens", "epochs"):
        return  # with epochs, the budget is known when the data is
    if config.budget_tokens < batch:
        yield (
            f"budget_tokens is {format_value(config.budget_tokens)}; it must pay for at least one step, "
            f"batch_tokens = {format_value(batch)}"
        )
    elif (
        usable("schedule.warmup_steps", "schedule.horizon_steps")
        and config.schedule.warmup_steps > config.horizon_steps
    ):
        yield (
            f"schedule.warmup_steps is {format_value(config.schedule.warmup_steps)}; it must not be longer than "
            f"the horizon, {number_of(config.horizon_steps, 'step')} (schedule.horizon_steps, "
            "or else budget_tokens / "
            "batch_tokens)"
        )


def _source_problems(config: Config, usable: Judge) -> Iterator[str]:
    if not config.data.sources and usable("data.sources"):
        yield "data.sources is empty; name at least one source of text, for example data=embedded"
    for name, source in config.data.sources.items():
        key = f"data.sources.{name}"
        if not usable(key):
            continue
        if source.columns.messages and (source.columns.prompt or source.columns.answer):
            yield f"{key}.columns gives messages and also prompt or answer; it must give one or the others"
        speakers = [name for names in vars(source.columns.roles).values() for name in names]
        for name in sorted({name for name in speakers if speakers.count(name) > 1}):
            yield f"{key}.columns.roles gives {name!r} twice; a speaker has one role"
        for kind in map(SOURCES.get, SOURCES.names()):
            if kind.config is type(source):
                yield from kind.problems(key, source, usable)


def _training_problems(config: Config, usable: Judge) -> Iterator[str]:
    kept, every = config.callbacks.keep_every_steps, config.callbacks.checkpoint_every_steps
    if (
        usable("callbacks.keep_every_steps", "callbacks.checkpoint_every_steps")
        and kept
        and (not every or kept % every)
    ):
        yield (
            f"callbacks.keep_every_steps is {format_value(kept)}; it must be a multiple of "
            f"callbacks.checkpoint_every_steps ({every})"
        )
    if usable("adapter.rank", "init_from") and config.adapter.rank and config.init_from is None:
        yield (
            f"adapter.rank is {config.adapter.rank}; adapters are added to trained weights: init_from=RUN, the "
            "folder or a checkpoint of a pretrained model"
        )


def _cooldown_problems(config: Config, usable: Judge) -> Iterator[str]:
    if usable("schedule", "budget_tokens", "batch_tokens") and (problem := cooldown_problem(config)):
        yield problem


def cooldown_problem(config: Config) -> str | None:
    """Say why a run cannot be cooled down from where it is; None if it can, or is not to be."""
    schedule, start = config.schedule, config.schedule.cooldown_start_step
    if start is None:
        return None
    if schedule.cooldown_steps is None:
        return "schedule.cooldown_start_step is of a cooldown, and schedule.cooldown_steps gives it no length"
    if start < schedule.warmup_steps:
        return (
            f"init_from: at step {start:,}, the run is still in its warm-up of "
            f"{number_of(schedule.warmup_steps, 'step')}: train it further, and cool it down then"
        )
    if schedule.name != "constant" and schedule.final_lr_ratio == 0 and start >= config.horizon_steps:
        return (
            f"init_from: at step {start:,}, the learning rate of the run is already 0: there is nothing to cool down. "
            "An earlier checkpoint can be"
        )
    return None
