"""The inputs of a new run: checks that they exist, before anything heavy is imported and before it has a folder."""

from collections.abc import Iterator
from pathlib import Path

from cucafera.config.errors import UserError
from cucafera.config.schema import Config
from cucafera.data.sources import open_source
from cucafera.runs.compatibility import check_branch_compatible
from cucafera.runs.folder import RunFolder, checkpoint_to_branch
from cucafera.runs.locate import locate_model


def input_problems(config: Config) -> Iterator[str]:
    """Yield a sentence for each input that does not exist: text, initial weights, tokenizer. Nothing is downloaded.

    Args:
        config: May have problems of its own: a source that cannot be used is None, and left out.
    """
    for name, source in config.data.sources.items():
        if source is not None:
            try:
                open_source(name, source).check()
            except UserError as problem:
                yield str(problem)
    if config.init_from is not None:
        try:
            if config.schedule.cooldown_start_step is None:
                locate_model(config.init_from)
            else:
                parent = RunFolder(checkpoint_to_branch(config).parent.parent)
                check_branch_compatible(config, parent.read_config(), parent.path, ["optimizer"])
        except UserError as problem:
            yield f"init_from: {str(problem).removeprefix('init_from: ')}"
    if config.tokenizer.path is not None and not Path(config.tokenizer.path).expanduser().is_file():
        yield f"tokenizer.path: there is no file {config.tokenizer.path}"
