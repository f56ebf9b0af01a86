"""ChatML: conversations to token ids and a loss mask. Only this module frames messages with control tokens.

    <im_start>role
    content<im_end>
    <im_start>assistant
    ...

The framing tokens are added as ids, and contents are encoded as ordinary text: one that spells `<im_end>` stays text.
Contents are stripped (`stripped`): no merge of the tokenizer can then reach from the line end before a content into it,
whether it is encoded separately, as by this module, or together with its frame, as by transformers. A tokenizer may
have merged a line end with the spaces after it, and a prompt ends with that line end: an answer that began with spaces
would be trained on other tokens than it is generated with.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID, PAD_ID, SPECIAL_TOKENS
from cucafera.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


def _chat_template(answer: str) -> str:
    """Return the rendering below as a Jinja template, with the given template of the assistant's messages."""
    return (
        "{% if tools or documents %}"
        "{{ raise_exception('the model was not trained with tools or documents') }}"
        "{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
        "{{ raise_exception('the role ' ~ message['role'] ~ ' is not system, user or assistant') }}"
        "{% endif %}"
        "{% if message['tool_calls'] %}{{ raise_exception('the model was not trained with tool_calls') }}{% endif %}"
        "{% set content = message['content'] %}"
        "{% if content is not string %}"
        "{% if content is undefined or content is none or content is mapping or content is not iterable %}"
        "{{ raise_exception('the content of a message must be a text, or a list of parts of type text') }}"
        "{% endif %}"
        "{% set parts = namespace(text='') %}"
        "{% for part in content %}"
        "{% if part is not mapping or part['type'] != 'text' or part['text'] is not string %}"
        "{{ raise_exception('a part of a content must be of type text, and hold a text') }}"
        "{% endif %}"
        "{% set parts.text = parts.text ~ part['text'] %}"
        "{% endfor %}"
        "{% set content = parts.text %}"
        "{% endif %}"
        "{% set indent = content[:(content | length) - (content.lstrip() | length)].split('\\n')[-1] %}"
        "{% set content = content.split('\\n' ~ indent) | join('\\n') | trim %}"
        "{{ '<im_start>' ~ message['role'] ~ '\\n' }}" + answer + "{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<im_start>assistant\\n' }}{% endif %}"
    )


CONTENT = "{{ content ~ '<im_end>' }}"

CHAT_TEMPLATE = _chat_template(
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}" + CONTENT + "{% endgeneration %}"
    "{% else %}" + CONTENT + "{% endif %}"
)
"""The same rendering as a Jinja template for transformers, with its `{% generation %}` around trained tokens.

transformers tokenizes the rendered text, so with it a content that spells a control token becomes one. What the model
was not trained with is an error: tools, other roles, and contents that are neither a text nor a list of texts.
"""

PLAIN_CHAT_TEMPLATE = _chat_template(CONTENT)
"""The same for programs without `{% generation %}`, such as llama.cpp."""

STOP_IDS = (IM_END_ID, IM_START_ID, DOCUMENT_START_ID)
"""Tokens that end an answer: after little training a model may start a new turn or document without <im_end>."""


def tokenizer_description(end_id: int, context: int | None = None) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, which transformers needs in addition to tokenizer.json.

    Args:
        end_id: The model's end-of-sequence token.
        context: Tokens of the longest text; None: left out.
    """
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[DOCUMENT_START_ID],
        "eos_token": SPECIAL_TOKENS[end_id],
        "unk_token": "<unk>",
        "pad_token": SPECIAL_TOKENS[PAD_ID],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        "padding_side": "left",  # texts of a batch are continued at their ends
        "chat_template": CHAT_TEMPLATE,
    }
    return described | ({} if context is None else {"model_max_length": context})


class ConversationError(UserError):
    """Messages that cannot be trained on."""


class Message(NamedTuple):
    """One message.

    Attributes:
        role: system, user or assistant.
        content: Its text.
        trained: False for an answer that is only context.
    """

    role: str
    content: str
    trained: bool = True


Conversation = Sequence[Message]


class Rendered(NamedTuple):
    """A conversation as token ids.

    Attributes:
        ids: Token ids [n].
        trained: The loss mask [n], true for the assistant's contents that are trained and the <im_end> after each.
    """

    ids: NDArray[np.uint16]
    trained: NDArray[np.bool_]


def check_conversation(conversation: Conversation) -> None:
    """Raise ConversationError if a conversation cannot be trained on."""
    if not conversation:
        raise ConversationError("the conversation has no messages")
    for number, message in enumerate(conversation, 1):
        if message.role not in ROLES:
            raise ConversationError(f"message {number} has the role {message.role!r}; roles are {', '.join(ROLES)}")
        if not message.content.strip():
            raise ConversationError(f"message {number}, of the {message.role}, is empty")
    answers = [message for message in conversation if message.role == "assistant"]
    if not any(message.trained for message in answers):
        excluded = " whose weight is not 0" if answers else ""
        raise ConversationError(f"it has no message of the assistant{excluded}, so there is nothing to train on")


def stripped(content: str) -> str:
    """Return a content without whitespace at both ends.

    The indentation of its first line is removed from the lines below it too, so that code keeps its shape.
    """
    start = content[: len(content) - len(content.lstrip())]
    indentation = start.rpartition("\n")[2]
    return content.replace(f"\n{indentation}", "\n").strip()


def render(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> list[Rendered]:
    """Return ids and loss mask of each conversation; encoding all contents in one call is faster."""
    contents = [stripped(message.content) for conversation in conversations for message in conversation]
    encoded = iter(tokenizer.encode_batch(contents))
    framing = _Framing(tokenizer)
    return [framing.rendered([(message, next(encoded)) for message in messages]) for messages in conversations]


def up_to_last_answer(rendered: Rendered) -> Rendered:
    """Return a conversation up to the <im_end> of its last answer that is trained: there must be one."""
    end = int(np.flatnonzero(rendered.trained)[-1]) + 1
    return Rendered(rendered.ids[:end], rendered.trained[:end])


def render_prompt(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a conversation, followed by the opening of the assistant's next answer."""
    rendered = render([conversation], tokenizer)[0].ids
    prompt: list[int] = np.concatenate([rendered, _Framing(tokenizer).opening("assistant")]).tolist()
    return prompt


class _Framing:
    """The tokens around a content, encoded separately, so that no merge reaches into the content."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._line_end = np.array(tokenizer.encode("\n"), dtype=np.uint16)
        self._openings = {
            role: np.array([IM_START_ID, *tokenizer.encode(role), *self._line_end], dtype=np.uint16) for role in ROLES
        }
        self._closing = np.array([IM_END_ID], dtype=np.uint16)

    def opening(self, role: str) -> NDArray[np.uint16]:
        return self._openings[role]

    def rendered(self, messages: list[tuple[Message, NDArray[np.uint16]]]) -> Rendered:
        parts: list[NDArray[np.uint16]] = []
        trained: list[NDArray[np.bool_]] = []
        for message, content in messages:
            opening = self.opening(message.role)
            parts += [opening, content, self._closing, self._line_end]
            trained.append(np.zeros(len(opening), dtype=np.bool_))
            trained.append(np.full(len(content) + 1, message.role == "assistant" and message.trained))
            trained.append(np.zeros(len(self._line_end), dtype=np.bool_))
        if not parts:
            return Rendered(np.empty(0, np.uint16), np.empty(0, np.bool_))
        return Rendered(np.concatenate(parts), np.concatenate(trained))
