"""OpenAI's API: request bodies are checked and become requests to the engine, events become its response objects.

Shapes and names are those of the API reference of OpenAI and of its Python client; nothing here knows HTTP beyond a
status code. `PARAMETERS` lists every parameter that is supported, ignored or refused.
"""

import codecs
import json
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, NoReturn

from cucafera.config.check import build
from cucafera.config.schema import SamplingConfig
from cucafera.config.tokens import DOCUMENT_START_ID
from cucafera.data.chatml import STOP_IDS, Message, render_prompt
from cucafera.data.tokenizer import Tokenizer
from cucafera.generation.request import (
    Finished,
    GenerationEvent,
    PromptScores,
    Request,
    TextDelta,
    TokenScore,
    Usage,
)
from cucafera.quantities import number_of

Json = dict[str, Any]

MAX_TEMPERATURE = 2.0
PENALTIES = (0.01, 100)
"""Bounds of repetition_penalty: others could make logits infinite."""
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1000
MAX_CHOICES = 128
SEEDS = 2**63
"""Seeds are 64-bit integers with sign."""
LOWEST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot express; the value of OpenAI's API."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character, which JSON's escapes can spell and UTF-8 cannot encode."""


class ApiError(Exception):
    """An error in OpenAI's format.

    Args:
        status: HTTP status.
        message: One sentence for the developer of the client.
        code: One of OpenAI's codes, or None.
        param: The parameter that is wrong, or None.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = headers or {}

    @property
    def type(self) -> str:
        """OpenAI's class of errors."""
        if self.status >= 500:
            return "server_error"
        return "rate_limit_error" if self.status == 429 else "invalid_request_error"

    def content(self) -> Json:
        """Return the object that is sent."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def refuse(param: str | None, message: str, code: str | None = None) -> NoReturn:
    """Raise the error of a request that is wrong."""
    raise ApiError(400, message, code, param)


# Parameters


class Parameter(NamedTuple):
    """A parameter of a request.

    Attributes:
        endpoints: `chat`, `completions` or `both`.
        handling: `supported`, `ignored` (accepted, without effect) or `refused`.
        note: Its bounds; of a refused one, why.
        allows: Of a refused one: True for values that ask for nothing.
    """

    endpoints: Literal["chat", "completions", "both"]
    handling: Literal["supported", "ignored", "refused"]
    note: str = ""
    allows: Callable[[Any], bool] = lambda value: value is None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_zero(value: Any) -> bool:
    return _is_number(value) and value == 0


NO_TOOLS = "the model was not trained to call functions"
NO_PENALTY = "only 0; repetition_penalty does what it is for"
TEXT_ONLY = "the model reads and writes text only"

PARAMETERS = {
    "model": Parameter("both", "supported", "the name that /v1/models lists"),
    "messages": Parameter("chat", "supported", "system, developer, user, assistant; a text, or parts of type text"),
    "prompt": Parameter(
        "completions", "supported", "a text, token ids, or a list of either; null or an empty text: a new document"
    ),
    "max_completion_tokens": Parameter("chat", "supported", "at least 1"),
    "max_tokens": Parameter("both", "supported", "at least 1; in completions 0 only scores the prompt"),
    "temperature": Parameter("both", "supported", "0 (greedy), or 0.001 to 2"),
    "top_p": Parameter("both", "supported", "above 0, at most 1"),
    "top_k": Parameter("both", "supported", "0: all tokens; not of OpenAI"),
    "min_p": Parameter("both", "supported", "0 to 1; not of OpenAI"),
    "repetition_penalty": Parameter("both", "supported", "0.01 to 100; 1: none; not of OpenAI"),
    "ignore_eos": Parameter("both", "supported", "write max_tokens tokens, to measure speed; not of OpenAI"),
    "seed": Parameter("both", "supported", "the same seed, the same text; choice i of n has seed + i"),
    "stop": Parameter("both", "supported", f"up to {MAX_STOPS} texts"),
    "n": Parameter("both", "supported", f"n times the number of prompts is at most {MAX_CHOICES}"),
    "stream": Parameter("both", "supported"),
    "stream_options": Parameter("both", "supported", "include_usage"),
    "logprobs": Parameter("both", "supported", f"chat: true or false; completions: 0 to {MAX_TOP_LOGPROBS}"),
    "top_logprobs": Parameter("chat", "supported", f"0 to {MAX_TOP_LOGPROBS}"),
    "echo": Parameter("completions", "supported", "with logprobs, those of the prompt too"),
    "best_of": Parameter("completions", "supported", "only as many as n"),
    "user": Parameter("both", "ignored"),
    "metadata": Parameter("chat", "ignored"),
    "store": Parameter("chat", "ignored"),
    "service_tier": Parameter("chat", "ignored"),
    "safety_identifier": Parameter("chat", "ignored"),
    "prompt_cache_key": Parameter("chat", "ignored"),
    "prompt_cache_options": Parameter("chat", "ignored"),
    "prompt_cache_retention": Parameter("chat", "ignored"),
    "prediction": Parameter("chat", "ignored"),
    "parallel_tool_calls": Parameter("chat", "ignored"),
    "reasoning_effort": Parameter("chat", "ignored"),
    "verbosity": Parameter("chat", "ignored"),
    "tools": Parameter("chat", "refused", NO_TOOLS, lambda value: value is None or value == []),
    "tool_choice": Parameter("chat", "refused", NO_TOOLS, lambda value: value in (None, "none", "auto")),
    "functions": Parameter("chat", "refused", NO_TOOLS, lambda value: value is None or value == []),
    "function_call": Parameter("chat", "refused", NO_TOOLS, lambda value: value in (None, "none", "auto")),
    "response_format": Parameter(
        "chat", "refused", "only {type: text}", lambda value: value is None or value == {"type": "text"}
    ),
    "modalities": Parameter("chat", "refused", TEXT_ONLY, lambda value: value is None or value == ["text"]),
    "audio": Parameter("chat", "refused", TEXT_ONLY),
    "web_search_options": Parameter("chat", "refused", "there is no web search"),
    "moderation": Parameter("chat", "refused", "there is no moderation"),
    "suffix": Parameter("completions", "refused", "the model only continues", lambda value: value in (None, "")),
    "logit_bias": Parameter("both", "refused", "only {}", lambda value: value is None or value == {}),
    "presence_penalty": Parameter("both", "refused", NO_PENALTY, lambda value: value is None or _is_zero(value)),
    "frequency_penalty": Parameter("both", "refused", NO_PENALTY, lambda value: value is None or _is_zero(value)),
}
"""By name. A parameter that is not listed is ignored."""


def parameter_table() -> str:
    """Return the table of PARAMETERS in Markdown."""
    lines = ["| parameter | chat | completions | note |", "|---|---|---|---|"]
    for name, parameter in PARAMETERS.items():
        cells = [
            "" if parameter.endpoints not in ("both", end) else parameter.handling for end in ("chat", "completions")
        ]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} | {parameter.note} |")
    return "\n".join(lines)


# Reading a body


def parse_body(body: bytes) -> Json:
    """Return the object of a JSON text.

    Raises:
        ApiError: it is not UTF-8 or no JSON (NaN and Infinity are none), is nested too deeply, repeats a key, spells
            half a character, or is no object.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8: byte {error.start} cannot be decoded") from error
    try:
        content = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        has_half_characters = "\\u" in text and SURROGATE.search(json.dumps(content, ensure_ascii=False))
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits has a message of Python, not of JSON
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "a number has too many digits"
        raise ApiError(400, f"The body is not JSON: {reason}") from error
    if not isinstance(content, dict):
        raise ApiError(400, "The body must be a JSON object")
    if has_half_characters:
        raise ApiError(400, "The body has an escape of half a character (a lone surrogate)")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ApiError(400, f"The body is not JSON: {name} is no number of it")


def _object(pairs: list[tuple[str, Any]]) -> Json:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ApiError(400, f"The body repeats the key {quoted(repeated)}")
    return content


def quoted(value: Any, length: int = 60) -> str:
    """Return a value as JSON, shortened for a message."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:  # it has been read with fewer frames on the stack
        text = "..."
    return text if len(text) <= length else f"{text[:length]}..."


class Fields:
    """The fields of a body, each with a type; null and a missing field are the default."""

    def __init__(self, content: Json) -> None:
        self.content = content

    def flag(self, name: str) -> bool:
        """Return true or false; default false."""
        value = self.content.get(name)
        if value is not None and not isinstance(value, bool):
            refuse(name, f"{name} is {quoted(value)}; it must be true or false")
        return bool(value)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number within bounds."""
        value = self.content.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            refuse(name, f"{name} is {quoted(value)}; it must be a whole number from {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number within bounds."""
        value = self.content.get(name)
        if value is None:
            return None
        if not _is_number(value) or not low <= value <= high:
            refuse(name, f"{name} is {quoted(value)}; it must be a number from {low:g} to {high:g}")
        return float(value)


# Requests


class Prompt(NamedTuple):
    """A prompt.

    Attributes:
        ids: Token ids, at least one.
        text: What `echo` repeats.
        hidden: Number of ids at the start that are no part of the text: the document start.
    """

    ids: list[int]
    text: str
    hidden: int


@dataclass(frozen=True)
class ApiRequest:
    """A checked request of either endpoint.

    Attributes:
        is_chat: True for chat completions.
        model: Name of the model.
        prompts: At least one.
        sampling: Sampling settings; max_new_tokens fits the context of each prompt, and may be 0.
        n: Choices per prompt.
        seed: Seed of the first choice of each prompt; None: random.
        stream: Answer by server-sent events.
        include_usage: End the stream by a chunk with the usage.
        echo: Begin each text with its prompt.
        top_logprobs: Log-probabilities of this many most probable tokens; None: no log-probabilities.
        ignore_eos: Do not end at a stop token.
    """

    is_chat: bool
    model: str
    prompts: list[Prompt]
    sampling: SamplingConfig
    n: int
    seed: int | None
    stream: bool
    include_usage: bool
    echo: bool
    top_logprobs: int | None
    ignore_eos: bool

    def engine_requests(self, context: int) -> list[Request]:
        """Return a request per choice; the n choices of a prompt follow each other."""
        return [
            Request(
                prompt=prompt.ids,
                sampling=replace(
                    self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, context - len(prompt.ids))
                ),
                stop_ids=frozenset() if self.ignore_eos else frozenset(STOP_IDS),
                seed=None if self.seed is None else (self.seed + number) % SEEDS,
                top_logprobs=self.top_logprobs,
                prompt_logprobs=self.echo and self.top_logprobs is not None,
            )
            for prompt in self.prompts
            for number in range(self.n)
        ]


@dataclass(frozen=True)
class ServedModel:
    """The model that requests are checked against.

    Attributes:
        name: Its name in the API.
        tokenizer: Its tokenizer.
        context: Maximum number of tokens of a sequence.
        chats: True if it was trained on conversations.
        sampling: Sampling of a request that sets nothing.
        system: System message of a conversation that has none; empty: none.
        max_choices: Most choices of a request, n times the number of prompts.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    chats: bool
    sampling: SamplingConfig
    system: str = ""
    max_choices: int = MAX_CHOICES
    created: int = field(default_factory=lambda: int(time.time()))

    def content(self) -> Json:
        """Return its object of /v1/models."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "cucafera"}

    def check_name(self, name: str) -> None:
        """Raise ApiError if a name is not that of the model."""
        if name != self.name:
            raise ApiError(
                404, f"There is no model {quoted(name)}; this server has {self.name}", "model_not_found", "model"
            )

    def parse_chat(self, content: Json) -> ApiRequest:
        """Check the body of a chat completion. Raises ApiError."""
        fields = self._fields(content, "chat")
        if not self.chats:
            refuse(
                None,
                f"{self.name} is a base model, which was not trained on conversations: use /v1/completions",
                "not_a_chat_model",
            )
        messages = parse_messages(content.get("messages"), "messages")
        if messages[0].role == "system" and not messages[0].content.strip() and len(messages) > 1:
            messages = messages[1:]  # asks for none, not even the server's
        elif self.system and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        self._check_choices(fields, 1)
        prompt = Prompt(render_prompt(messages, self.tokenizer), "", hidden=0)
        top_logprobs = fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
        has_logprobs = fields.flag("logprobs")
        if top_logprobs is not None and not has_logprobs:
            refuse("top_logprobs", "top_logprobs needs logprobs: true")
        limit = fields.whole("max_completion_tokens", 1, SEEDS)
        old_limit = fields.whole("max_tokens", 1, SEEDS)
        if None not in (limit, old_limit) and limit != old_limit:
            refuse("max_tokens", "max_tokens and max_completion_tokens are one setting: give one of them")
        return self._request(
            fields, [prompt], limit or old_limit, is_chat=True, echo=False,
            top_logprobs=(top_logprobs or 0) if has_logprobs else None,
        )  # fmt: skip

    def parse_completion(self, content: Json) -> ApiRequest:
        """Check the body of a completion. Raises ApiError."""
        fields = self._fields(content, "completions")
        if "prompt" not in content:
            refuse("prompt", "prompt is missing", "missing_required_parameter")
        prompts = self._prompts(content["prompt"], fields)
        if fields.whole("best_of", 1, MAX_CHOICES) not in (None, _choices_per_prompt(fields)):
            refuse("best_of", "best_of other than n is not supported: every choice is returned")
        return self._request(
            fields, prompts, fields.whole("max_tokens", 0, SEEDS), is_chat=False, echo=fields.flag("echo"),
            top_logprobs=fields.whole("logprobs", 0, MAX_TOP_LOGPROBS),
        )  # fmt: skip

    def _fields(self, content: Json, endpoint: str) -> Fields:
        """Check the model, and that nothing is asked for that is refused."""
        name = content.get("model")
        if name is None:
            refuse("model", f"model is missing: this server has {self.name}", "missing_required_parameter")
        if not isinstance(name, str):
            refuse("model", f"model is {quoted(name)}; it must be a text")
        self.check_name(name)
        for name, parameter in PARAMETERS.items():
            is_meant = parameter.handling == "refused" and parameter.endpoints in ("both", endpoint)
            if is_meant and not parameter.allows(content.get(name)):
                refuse(name, f"{name} is not supported: {parameter.note}", "unsupported_parameter")
        return Fields(content)

    def _request(
        self,
        fields: Fields,
        prompts: list[Prompt],
        limit: int | None,
        is_chat: bool,
        echo: bool,
        top_logprobs: int | None,
    ) -> ApiRequest:
        longest = max(len(prompt.ids) for prompt in prompts)
        if longest + (limit != 0) > self.context:
            raise context_error(longest, self.context, "messages" if is_chat else "prompt")
        stream = fields.flag("stream")
        return ApiRequest(
            is_chat=is_chat,
            model=self.name,
            prompts=prompts,
            sampling=self._sampling(fields, limit),
            n=_choices_per_prompt(fields),
            seed=fields.whole("seed", -SEEDS, SEEDS - 1),
            stream=stream,
            include_usage=_include_usage(fields.content.get("stream_options"), stream),
            echo=echo,
            top_logprobs=top_logprobs,
            ignore_eos=fields.flag("ignore_eos"),
        )

    def _sampling(self, fields: Fields, limit: int | None) -> SamplingConfig:
        """Return the sampling of a request, which is never above the bounds of the command line's options."""
        given = {
            "temperature": fields.number("temperature", 0, MAX_TEMPERATURE),
            "top_p": fields.number("top_p", 0, 1),
            "min_p": fields.number("min_p", 0, 1),
            "top_k": fields.whole("top_k", 0, SEEDS),
            "repetition_penalty": fields.number("repetition_penalty", *PENALTIES),
            "stop": _stops(fields.content.get("stop")),
        }
        problems: dict[str, str] = {}
        values = vars(self.sampling) | {name: value for name, value in given.items() if value is not None}
        values["top_k"] = min(values["top_k"], self.tokenizer.vocab_size)
        sampling: SamplingConfig = build(SamplingConfig, values, "", problems)
        for name, problem in problems.items():
            refuse(name, problem)
        return sampling if limit is None else replace(sampling, max_new_tokens=min(limit, self.context))

    def _check_choices(self, fields: Fields, prompts: int) -> None:
        n = _choices_per_prompt(fields)
        if n * prompts > self.max_choices:
            choices = f"{number_of(prompts, 'prompt')} with n = {n} are {number_of(n * prompts, 'choice')}"
            refuse("n", f"{choices}; a request to this server has at most {self.max_choices}")

    def _prompts(self, value: Any, fields: Fields) -> list[Prompt]:
        """Return the prompts of a completion: a text, token ids, or a list of either."""
        if value is None or isinstance(value, str):
            value = [value or ""]
        if not isinstance(value, list) or not value:
            refuse("prompt", "prompt must be a text, a list of token ids, or a list of at least one of either")
        self._check_choices(fields, len(value) if isinstance(value[0], str | list) else 1)
        if all(isinstance(item, str) for item in value):
            return self._texts(value)
        if isinstance(value[0], list):
            return [self._tokens(ids, f"prompt[{number}]") for number, ids in enumerate(value)]
        return [self._tokens(value, "prompt")]

    def _texts(self, texts: list[str]) -> list[Prompt]:
        encoded = self.tokenizer.encode_batch(texts)
        return [
            Prompt([DOCUMENT_START_ID, *ids.tolist()], text, hidden=1) for text, ids in zip(texts, encoded, strict=True)
        ]

    def _tokens(self, ids: Any, place: str) -> Prompt:
        """Return a prompt of token ids, which are used as they are: without a document start."""
        if not isinstance(ids, list) or not ids:
            refuse("prompt", f"{place} is {quoted(ids)}; it must be a list of at least one token id")
        last = self.tokenizer.vocab_size - 1
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token <= last:
                refuse("prompt", f"{place} has {quoted(token)}; a token id is a whole number from 0 to {last:,}")
        return Prompt(ids, self.tokenizer.decode(ids), hidden=0)


def _choices_per_prompt(fields: Fields) -> int:
    return fields.whole("n", 1, MAX_CHOICES) or 1


def context_error(tokens: int, context: int, param: str | None = None) -> ApiError:
    """Return the error of a prompt that fills the context."""
    return ApiError(
        400,
        f"This model's maximum context length is {number_of(context, 'token')}, and the prompt has {tokens:,}, which "
        "leaves no space for new tokens. Shorten it",
        "context_length_exceeded",
        param,
    )


def parse_messages(value: Any, place: str) -> list[Message]:
    """Return the messages of a conversation.

    Args:
        value: What the body has.
        place: Its name in messages.

    Raises:
        ApiError: it is no list of at least one message, or has a role or content that the model was not trained with.
    """
    if not isinstance(value, list) or not value:
        refuse(place, f"{place} must be a list of at least one message", "missing_required_parameter")
    return [_message(item, f"{place}[{number}]") for number, item in enumerate(value)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        refuse(place, f"{place} is {quoted(value)}; it must be an object with role and content")
    role = value.get("role")
    if role in ("tool", "function") or any(value.get(name) for name in ("tool_calls", "function_call", "audio")):
        refuse(place, f"{place} is not supported: {NO_TOOLS}")
    if not isinstance(role, str) or role not in ("system", "developer", "user", "assistant"):
        refuse(place, f"{place} has the role {quoted(role)}; roles are system, developer, user and assistant")
    content = _content(value.get("content"), f"{place}.content")
    return Message("system" if role == "developer" else role, content)


def _content(value: Any, place: str) -> str:
    """Return the text of a content, which is a text or a list of parts of type text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        refuse(place, f"{place} is {quoted(value)}; it must be a text, or a list of parts of type text")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            refuse(f"{place}[{number}]", f"{place}[{number}] must be of type text, and hold a text: {TEXT_ONLY}")
        texts.append(part["text"])
    return "".join(texts)


def _stops(value: Any) -> list[str] | None:
    """Return the stop texts; empty ones, which some clients send, are left out."""
    if value is None:
        return None
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        refuse("stop", "stop must be a text or a list of texts")
    if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP_CHARACTERS for text in texts):
        refuse("stop", f"stop may have up to {MAX_STOPS} texts of up to {MAX_STOP_CHARACTERS:,} characters")
    return [text for text in dict.fromkeys(texts) if text]


def _include_usage(value: Any, stream: bool) -> bool:
    if value is None:
        return False
    if not isinstance(value, dict):
        refuse("stream_options", f"stream_options is {quoted(value)}; it must be an object")
    if not stream:
        refuse("stream_options", "stream_options is only allowed with stream: true")
    return Fields(value).flag("include_usage")


# Responses


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token as text; one that is a part of a character as `bytes:\xe2\x80`, as in OpenAI's API."""
    content = tokenizer.bytes_of(token)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB) if not math.isnan(logprob) else LOWEST_LOGPROB


class TokenOffsets:
    """Positions of tokens in a text, in characters; a token within a character has the position of its start."""

    def __init__(self, start: int) -> None:
        self._position = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, content: bytes) -> int:
        """Return the position of the next token, which has these bytes."""
        position = self._position
        self._position += len(self._decoder.decode(content))
        return position


class Choice:
    """One choice of a response while it is generated.

    Args:
        request: The request.
        number: The number of the choice.
        tokenizer: Of the model.

    Attributes:
        finish_reason: None while it is unfinished.
        usage: Number of tokens; None while it is unfinished.
        text: The text so far.
    """

    def __init__(self, request: ApiRequest, number: int, tokenizer: Tokenizer) -> None:
        self.number = number
        self.prompt = request.prompts[number // request.n]
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.text = ""
        self._request = request
        self._tokenizer = tokenizer
        self._is_echoed = not request.echo
        self._offsets = TokenOffsets(0 if request.echo else len(self.prompt.text))

    def receive(self, events: Sequence[GenerationEvent]) -> tuple[str, Json | None]:
        """Take events; return the text that they add, and its log-probabilities if the request asks for them."""
        text = ""
        scores: list[TokenScore | int] = []
        if not self._is_echoed and events:
            self._is_echoed = True
            text = self.prompt.text
            # The first token has nothing before it, and so no score; a document start is no part of the text.
            scores += [] if self.prompt.hidden else [self.prompt.ids[0]]
        for event in events:
            if isinstance(event, PromptScores):
                scores += event.scores
            elif isinstance(event, TextDelta):
                text += event.text
                scores += event.scores
            elif isinstance(event, Finished):
                self.finish_reason, self.usage = event.finish_reason, event.usage
        self.text += text
        return text, self._logprobs(scores)

    def _logprobs(self, scores: list[TokenScore | int]) -> Json | None:
        if self._request.top_logprobs is None:
            return None
        return self._chat_logprobs(scores) if self._request.is_chat else self._completion_logprobs(scores)

    def _chat_logprobs(self, scores: list[TokenScore | int]) -> Json:
        content = []
        for score in scores:
            assert isinstance(score, TokenScore)
            top = [self._scored(token, logprob) for token, logprob in score.top]
            content.append(self._scored(score.id, score.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> Json:
        content = self._tokenizer.bytes_of(token)
        text = content.decode(errors="replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(content)}

    def _completion_logprobs(self, scores: list[TokenScore | int]) -> Json:
        """Return the log-probabilities of completions; the token itself is always among the most probable ones."""
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for score in scores:
            token = score if isinstance(score, int) else score.id
            text = token_text(self._tokenizer, token)
            tokens.append(text)
            offsets.append(self._offsets.next(self._tokenizer.bytes_of(token)))
            if isinstance(score, int):
                logprobs.append(None)
                tops.append(None)
                continue
            top: dict[str, float] = {}
            for other, logprob in score.top:
                top.setdefault(token_text(self._tokenizer, other), _finite(logprob))
            logprobs.append(_finite(score.logprob))
            tops.append(top | {text: _finite(score.logprob)})
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


class Answer:
    """The response to a request, complete or in chunks.

    Args:
        request: The request.
        tokenizer: Of the model.

    Attributes:
        choices: Its choices, those of the first prompt first.
    """

    def __init__(self, request: ApiRequest, tokenizer: Tokenizer) -> None:
        prefix = "chatcmpl" if request.is_chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.request = request
        self.choices = [Choice(request, number, tokenizer) for number in range(len(request.prompts) * request.n)]

    def complete(self, events: Sequence[Sequence[GenerationEvent]]) -> Json:
        """Return the complete response, given all events of each choice."""
        choices = [self._choice(choice, events[choice.number]) for choice in self.choices]
        return self._head("") | {"choices": choices, "usage": self.usage()}

    def usage(self) -> Json:
        """Return the number of tokens; a prompt counts once, however many choices it has."""
        used = [choice.usage for choice in self.choices if choice.usage is not None]
        prompts = [choice.usage for choice in self.choices[:: self.request.n] if choice.usage is not None]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in used)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        }

    def opening(self) -> Iterator[Json]:
        """Yield the first chunks of a stream: the role of each choice of a chat."""
        if self.request.is_chat:
            for choice in self.choices:
                yield self._chunk(choice.number, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, number: int, events: Sequence[GenerationEvent]) -> Iterator[Json]:
        """Yield the chunks of events of a choice: one with all their text, and one with the finish reason."""
        choice = self.choices[number]
        text, logprobs = choice.receive(events)
        if text or _has_tokens(logprobs):
            yield self._chunk(number, {"content": text}, logprobs, None)
        if choice.finish_reason is not None:
            yield self._chunk(number, {}, None, choice.finish_reason)

    def closing(self) -> Iterator[Json]:
        """Yield the last chunk, with the usage, if the request asks for it."""
        if self.request.include_usage:
            yield self._head(".chunk") | {"choices": [], "usage": self.usage()}

    def _head(self, suffix: str) -> Json:
        kind = f"chat.completion{suffix}" if self.request.is_chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.request.model}

    def _choice(self, choice: Choice, events: Sequence[GenerationEvent]) -> Json:
        _, logprobs = choice.receive(events)
        if self.request.is_chat:
            content: Json = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            content = {"text": choice.text}
        return {"index": choice.number, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _chunk(self, number: int, delta: Json, logprobs: Json | None, finish_reason: str | None) -> Json:
        content = {"delta": delta} if self.request.is_chat else {"text": delta.get("content", "")}
        choice = {"index": number, **content, "logprobs": logprobs, "finish_reason": finish_reason}
        usage: Json = {"usage": None} if self.request.include_usage else {}
        return self._head(".chunk") | {"choices": [choice]} | usage


def _has_tokens(logprobs: Json | None) -> bool:
    return logprobs is not None and bool(logprobs.get("content") or logprobs.get("tokens"))
