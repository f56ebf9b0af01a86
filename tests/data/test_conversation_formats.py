"""Conversations from the columns that others use."""

import pytest

from cucafera.config.schema import ColumnsConfig
from cucafera.data.chatml import ConversationError, Message
from cucafera.data.conversation_formats import conversation_of_row, is_repetitive

HELLO = [Message("user", "Hola"), Message("assistant", "Bon dia")]
SYSTEM = Message("system", "Sigues breu.")
TURNS = [{"role": "user", "content": "Hola"}, {"role": "assistant", "content": "Bon dia"}]

FORMATS = {
    "OpenAI": ({"messages": TURNS}, HELLO),
    "OpenAI, with other columns": ({"id": 3, "prompt": "no", "messages": TURNS}, HELLO),
    "OpenAI, in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "la"}]},
                      TURNS[1]]},
        HELLO,
    ),
    "OpenAI, as columns of a dataset": (
        {"messages": {"role": ["user", "assistant"], "content": ["Hola", "Bon dia"]}}, HELLO,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hola"}, {"from": "gpt", "value": "Bon dia"}]}, HELLO,
    ),
    "ShareGPT, system": (
        {"conversations": [{"from": "system", "value": "Sigues breu."}, {"from": "human", "value": "Hola"},
                           {"from": "gpt", "value": "Bon dia"}]},
        [SYSTEM, *HELLO],
    ),
    "ShareGPT, system in a column": (
        {"system": "Sigues breu.",
         "conversations": [{"from": "human", "value": "Hola"}, {"from": "gpt", "value": "Bon dia"}]},
        [SYSTEM, *HELLO],
    ),
    "ShareGPT's names as roles": (
        {"messages": [{"role": "human", "content": "Hola"}, {"role": "gpt", "content": "Bon dia"}]}, HELLO,
    ),
    "both forms in one column, as parquet unites them": (
        {"messages": [{"role": None, "content": None, "from": "human", "value": "Hola"},
                      {"role": "assistant", "content": "Bon dia", "from": None, "value": None}]},
        HELLO,
    ),
    "a system message without text": ({"system": " ", "messages": TURNS}, HELLO),
    "a system message without text among the messages": (
        {"messages": [{"role": "system", "content": ""}, *TURNS]}, HELLO,
    ),
    "a column of messages that is not filled": ({"messages": None, "prompt": "Hola", "completion": "Bon dia"}, HELLO),
    "conversation": ({"conversation": TURNS}, HELLO),
    "prompt and completion": ({"prompt": "Hola", "completion": "Bon dia"}, HELLO),
    "prompt and completion, messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, HELLO),
    "prompt and response": ({"prompt": "Hola", "response": "Bon dia", "system_prompt": ""}, HELLO),
    "patufet-escrits": ({"prompt": "Hola", "completion": "Bon dia"}, HELLO),
    "patufet-human-interactions": ({"prompt": "Hola", "output": "Bon dia"}, HELLO),
    "patufet-summaries": ({"prompt": "Hola", "summary": "Bon dia"}, HELLO),
    "patufet-IT": ({"instruction": "Hola", "input": None, "output": "Bon dia"}, HELLO),
    "patufet-QA": ({"question": "Hola", "answer": "Bon dia", "topic": "salutacions"}, HELLO),
    "patufet-conversa": ({"messages": TURNS}, HELLO),
    "Alpaca": ({"instruction": "Hola", "input": "", "output": "Bon dia"}, HELLO),
    "Alpaca with input": (
        {"instruction": "Resumeix.", "input": "Hola i adeu", "output": "Bon dia"},
        [Message("user", "Resumeix.\n\nHola i adeu"), Message("assistant", "Bon dia")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_by_its_columns(name):
    row, conversation = FORMATS[name]
    assert conversation_of_row(row, ColumnsConfig()) == conversation


def test_columns_with_other_names_are_named_in_the_configuration():
    columns = ColumnsConfig(prompt="pregunta", answer="resposta", system="rol", input="text")
    row = {"pregunta": "Hola", "resposta": "Bon dia", "rol": "Sigues breu.", "text": "", "messages": []}
    assert conversation_of_row(row, columns) == [SYSTEM, *HELLO]
    answered = {"messages": TURNS, "prompt": "Hola", "resposta": "Bon dia"}
    assert conversation_of_row(answered, ColumnsConfig(answer="resposta")) == HELLO
    assert conversation_of_row({"xat": TURNS, "messages": None}, ColumnsConfig(messages="xat")) == HELLO


BROKEN = [
    ({}, r"no conversation is recognized in the columns \(none\)"),
    ({"text": "Hola"}, "no conversation is recognized in the columns text: name them with columns.messages, or with"),
    ({"prompt": "Hola"}, "no conversation is recognized in the columns prompt"),
    ({"answer": "Hola"}, "no conversation is recognized in the columns answer"),
    ({"prompt": None, "completion": "x"}, "prompt is null, not a text"),
    ({"prompt": "x", "completion": None}, "completion is null, not a text"),
    ({"prompt": "x", "completion": 3}, "completion is a number, not a text"),
    ({"prompt": " ", "completion": "x"}, "message 1, of the user, is empty"),
    ({"question": "x", "answer": "\n"}, "message 2, of the assistant, is empty"),
    ({"prompt": [], "input": "x", "completion": "y"}, "input belongs to a last message of the user in prompt, and"),
    ({"prompt": TURNS, "input": "x", "completion": "y"}, "input belongs to a last message of the user in prompt"),
    ({"messages": {"role": ["user", "assistant"], "content": ["x"]}}, "messages has lists of different lengths: role"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "the role of message 1 of conversations is a list, not a"),
    (
        {"system": "x", "messages": [{"role": "system", "content": "y"}, *TURNS]},
        "a system message in the column system",
    ),
    ({"instruction": "x", "input": 5, "output": "y"}, "input is a number, not a text"),
    ({"messages": None}, "messages is null, not a list of messages"),
    ({"messages": []}, "the conversation has no messages"),
    ({"messages": "[{'role': 'user', 'content': 'Hola'}]"}, "messages is a text, not a list of messages"),
    ({"messages": ["Hola", "Bon dia"]}, "message 1 of messages is a text, not an object with role and content"),
    ({"messages": [{"role": "user", "text": "Hola"}]}, "message 1 of messages has role, text, not role and content"),
    ({"messages": [{}]}, "message 1 of messages has nothing, not role and content"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1 of messages is null, not a text"),
    ({"messages": [{"role": None, "content": "Hola"}]}, "the role of message 1 of messages is null, not a text"),
    ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "message 1 of messages is an object, not a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "message 1 of messages has parts that are"),
    ({"messages": [*TURNS, {"role": "tool", "content": "x"}]}, "message 3 has the role 'tool'"),
    ({"messages": TURNS[:1]}, "it has no message of the assistant"),
    ({"messages": [{"role": "user", "content": "\ud800"}, TURNS[1]]}, "half of a surrogate pair"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "message 1 has the role 'function_call'"),
    ({"conversations": 7}, "conversations is a number, not a list of messages"),
    ({"system": 3, "prompt": "x", "completion": "y"}, "system is a number, not a text"),
]


@pytest.mark.parametrize(("row", "message"), BROKEN, ids=lambda value: str(value).encode("ascii", "replace")[:50])
def test_a_row_that_is_no_conversation_is_refused_in_words(row, message):
    with pytest.raises(ConversationError, match=message):
        conversation_of_row(row, ColumnsConfig())


@pytest.mark.parametrize("key", ["messages", "prompt", "answer", "system", "input"])
def test_a_named_column_that_is_not_there_is_refused(key):
    with pytest.raises(ConversationError, match="no column 'nope'; it has prompt, completion"):
        conversation_of_row({"prompt": "x", "completion": "y"}, ColumnsConfig(**{key: "nope"}))


def test_an_answer_that_repeats_five_words_often_is_repetitive():
    run = "un dos tres quatre cinc "
    assert is_repetitive([Message("user", "x"), Message("assistant", run * 15)], 15)
    assert not is_repetitive([Message("user", "x"), Message("assistant", run * 14)], 15)
    assert not is_repetitive([Message("user", run * 20), Message("assistant", "x")], 15)
    assert not is_repetitive([Message("assistant", "un dos tres quatre")], 2)
