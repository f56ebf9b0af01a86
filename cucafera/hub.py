"""A question to the Hugging Face hub, whether it answers: asked once per process, before a library waits for it.

Libraries of the hub retry each request for up to minutes, and a name takes many requests. Whoever needs the hub calls
`hub_problem` first. If the hub does not answer, they are switched to what was downloaded before, as HF_HUB_OFFLINE=1
does. A hub that answers is waited for as long as bytes arrive.
"""

import functools
import sys
import threading
from contextlib import suppress

WAIT_SECONDS = 8
"""For an answer of the hub, name resolution included. With the imports, below ten seconds."""
COPIES_OF_OFFLINE = (("datasets.config", "HF_HUB_OFFLINE"), ("evaluate.config", "HF_EVALUATE_OFFLINE"))
"""Of other libraries, which read the variable when they are imported."""


@functools.cache
def hub_problem() -> str | None:
    """Return why the hub cannot be asked and what to do, as the end of a sentence; None if it answers.

    From a problem on, all libraries of the hub use only what was downloaded before.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        _use_downloads()
        return "the Hugging Face hub was not asked, because HF_HUB_OFFLINE is set: unset it, or give a local folder"
    problem = _problem_of(constants.ENDPOINT)
    return None if problem is None else unreachable(problem)


def unreachable(problem: object) -> str:
    """Return what `hub_problem` does about a problem, an error or a text. From now on, only downloads are used."""
    from huggingface_hub import constants

    _use_downloads()
    problem = _described(problem) if isinstance(problem, Exception) else problem
    return (
        f"the Hugging Face hub was not reached ({constants.ENDPOINT}: {problem}): check the network, the proxy "
        "(HTTPS_PROXY) and the mirror (HF_ENDPOINT), or give a local folder; HF_HUB_OFFLINE=1 uses what was downloaded "
        "before, without asking"
    )


def _problem_of(endpoint: str) -> str | None:
    """Return why an endpoint does not answer within WAIT_SECONDS; any answer but a server's error counts."""
    from huggingface_hub import get_session

    answers: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(endpoint, timeout=WAIT_SECONDS).status_code
            answers.append(f"it answers with status {status}" if status >= 500 else None)
        except Exception as error:  # the library for HTTP depends on the version, and proxies raise many classes
            answers.append(_described(error))

    # A thread, because a name server that does not answer, or many addresses, exceed any timeout of a request.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(WAIT_SECONDS)
    return answers[0] if answers else f"no answer within {WAIT_SECONDS} seconds"


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"


def _use_downloads() -> None:
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    for module, name in COPIES_OF_OFFLINE:
        with suppress(KeyError):
            setattr(sys.modules[module], name, True)
