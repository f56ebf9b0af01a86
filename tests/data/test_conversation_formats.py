"""Conversations from the columns that others use."""

import pytest

from cucafera.config.schema import ColumnsConfig, RolesConfig
from cucafera.data.chatml import ConversationError, Message
from cucafera.data.conversation_formats import conversation_of_row

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
    "the keys of both forms, mixed": (
        {"messages": [{"from": "user", "content": "Hola"}, {"role": "assistant", "value": "Bon dia"}]}, HELLO,
    ),
    "the same system message in a column and among the messages": (
        {"system": "Sigues breu.", "messages": [{"role": "system", "content": "Sigues breu. "}, *TURNS]},
        [SYSTEM._replace(content="Sigues breu. "), *HELLO],
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
    "Dolly with context": (
        {"instruction": "Qui va guanyar?", "context": "El Barça.", "response": "Bon dia", "category": "qa"},
        [Message("user", "Qui va guanyar?\n\nEl Barça."), Message("assistant", "Bon dia")],
    ),
    "Dolly without context": ({"instruction": "Hola", "input": "", "context": None, "response": "Bon dia"}, HELLO),
    "question and passage": (
        {"question": "Qui?", "passage": "El Barça.", "answer": "Bon dia"},
        [Message("user", "Qui?\n\nEl Barça."), Message("assistant", "Bon dia")],
    ),
    "Alpaca with history": (
        {"instruction": "I tu?", "output": "També.", "history": [["Hola", "Bon dia"]]},
        [*HELLO, Message("user", "I tu?"), Message("assistant", "També.")],
    ),
    "Alpaca with history as messages": (
        {"instruction": "I tu?", "output": "També.", "history": TURNS},
        [*HELLO, Message("user", "I tu?"), Message("assistant", "També.")],
    ),
    "Alpaca with empty history": ({"instruction": "Hola", "output": "Bon dia", "history": []}, HELLO),
    "Alpaca with its rendering": (
        {"instruction": "Resumeix.", "input": "Hola i adeu", "output": "Bon dia",
         "text": "### Instruction:\nResumeix.\n\n### Input:\nHola i adeu\n\n### Response:\nBon dia"},
        [Message("user", "Resumeix.\n\nHola i adeu"), Message("assistant", "Bon dia")],
    ),
    "two columns of the same answer": ({"question": "Hola", "answer": "Bon dia", "response": "Bon dia "}, HELLO),
    "a context that stands in the messages": ({"messages": TURNS, "context": "Hola"}, HELLO),
    "OpenAI, developer, in capitals": (
        {"messages": [{"role": "developer", "content": "Sigues breu."}, {"role": "User", "content": "Hola"},
                      {"role": "ASSISTANT", "content": "Bon dia"}]},
        [SYSTEM, *HELLO],
    ),
    "OpenAI, with null and empty keys": (
        {"tools": None, "functions": "[]", "images": [], "label": None, "weight": 1.0, "chosen": "", "text": "",
         "messages": [TURNS[0] | {"name": None, "weight": float("nan")},
                      TURNS[1] | {"tool_calls": [], "function_call": None, "images": [None], "reasoning_content": ""}]},
        HELLO,
    ),
    "OpenAI, in parts of the Responses API, as columns of a dataset": (
        {"messages": [{"role": "user", "content": {"type": ["input_text"] * 2, "text": ["Ho", "la"]}}, TURNS[1]]},
        HELLO,
    ),
    **{
        f"ShareGPT, {speaker}": (
            {"conversations": [{"from": "prompter", "value": "Hola"}, {"from": speaker, "value": "Bon dia"}]}, HELLO,
        )
        for speaker in ("chatgpt", "bing", "bard", "model", "bot")
    },
    **{
        f"an answer with {key} {value}": (
            {"messages": [*TURNS, TURNS[0], TURNS[1] | {key: value}]},
            [*HELLO, HELLO[0], HELLO[1]._replace(trained=trained)],
        )
        for key, value, trained in (
            ("weight", 0, False), ("weight", 0.0, False), ("weight", 1, True), ("weight", 1.0, True),
            ("weight", None, True), ("train", False, False), ("training", False, False), ("training", True, True),
            ("loss", False, False), ("is_trained", False, False),
        )
    },
    "weights as columns of a dataset": (
        {"messages": {"role": ["user", "assistant"] * 2, "content": ["Hola", "Bon dia"] * 2,
                      "weight": [None, 0, None, 1], "tool_calls": [[], [], [], None]}},
        [HELLO[0], HELLO[1]._replace(trained=False), *HELLO],
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
    columns = ColumnsConfig(prompt="input", answer="output")  # each is used once
    assert conversation_of_row({"input": "Hola", "output": "Bon dia"}, columns) == HELLO
    columns = ColumnsConfig(prompt="instruction", input="question")
    asked = conversation_of_row({"instruction": "Respon.", "question": "Hola", "answer": "Bon dia"}, columns)
    assert asked == [Message("user", "Respon.\n\nHola"), HELLO[1]]
    with pytest.raises(ConversationError, match="context is a column next to a prompt and an answer, and the row has"):
        conversation_of_row({"messages": TURNS, "context": "Hola"}, ColumnsConfig(input="context"))


def test_a_named_column_of_chosen_answers_is_trained_on():
    row = {"prompt": "Hola", "chosen": "Bon dia", "rejected": "Què vols?", "score_chosen": 4.5}
    unused: set[str] = set()
    assert conversation_of_row(row, ColumnsConfig(answer="chosen"), unused) == HELLO
    assert unused == {"rejected", "score_chosen"}
    row = {"conversations": TURNS[:1], "chosen": {"from": "gpt", "value": "Bon dia"}, "rejected": {"from": "gpt"}}
    assert conversation_of_row(row, ColumnsConfig(prompt="conversations", answer="chosen")) == HELLO


def test_names_of_speakers_are_mapped_by_the_configuration():
    row = {"messages": [{"role": "PAGÈS", "content": "Hola"}, {"role": "tool", "content": "Bon dia"}]}
    columns = ColumnsConfig(roles=RolesConfig(user=["PAGÈS"], assistant=["tool"]))
    assert conversation_of_row(row, columns) == HELLO


def test_what_is_not_used_is_named_and_what_is_empty_is_not():
    unused: set[str] = set()
    rows = [
        {"id": 3, "topic": None, "prompt": "no", "messages": [TURNS[0], TURNS[1] | {"name": "Pep", "model": None}]},
        {"source": "x", "tags": [], "label": "positiu", "messages": [TURNS[0] | {"train": True}, TURNS[1]]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hola", "cached": 1}]}, TURNS[1]]},
        {"prompt": "Hola", "completion": "Bon dia", "label": 3, "text": "abc-123", "loss": 0.5, "num_images": 0},
        {"messages": [TURNS[0], TURNS[1] | {"channel": "final", "recipient": "all", "masked": False}]},
    ]
    for row in rows:
        assert conversation_of_row(row, ColumnsConfig(), unused) == HELLO
    assert sorted(unused) == sorted([
        "id", "prompt", "messages[].name", "source", "label", "messages[].train of the user",
        "messages[].content[].cached", "text", "loss", "num_images", "messages[].channel", "messages[].recipient",
        "messages[].masked",
    ])  # fmt: skip


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
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "message 1 of messages has parts that are not text: part 1 has the type 'image_url', not 'text'",
    ),
    ({"messages": [{"role": "user", "content": [{"type": "text", "value": "a"}]}]}, "part 1 has type, value, not type"),
    ({"messages": [{"role": "user", "content": ["Hola"]}]}, "part 1 is a text, not an object with type and text"),
    ({"messages": [{"role": "robot", "content": "x"}, TURNS[1]]}, r"columns\.roles\.user=\[robot\]"),
    ({"messages": [TURNS[0], TURNS[1] | {"weight": 0}]}, "no message of the assistant whose weight is not 0, so there"),
    ({"messages": [TURNS[0], TURNS[1] | {"weight": 0.5}]}, "message 2 of messages has weight 0.5; it must be 0 or 1"),
    ({"messages": [TURNS[0], TURNS[1] | {"train": "no"}]}, "message 2 of messages has train 'no'; it must be 0 or 1"),
    ({"messages": [TURNS[0], TURNS[1] | {"train": False, "weight": 1}]}, "weight and train, which contradict each"),
    ({"messages": [TURNS[0] | {"name": "Pep"}, TURNS[0] | {"name": "Anna"}, TURNS[1]]}, r"several names \(Anna, Pep\)"),
    ({"instruction": "x", "input": "a b", "context": "c d", "output": "y"}, "columns input and context hold different"),
    ({"question": "x", "answer": "y", "response": "z"}, "answer and response hold different values: name the one to"),
    ({"instruction": "x", "question": "y", "answer": "z"}, "one to use with columns.prompt, and one to append to it"),
    ({"messages": TURNS, "conversations": TURNS[:1]}, "messages and conversations hold different values"),
    ({"messages": TURNS, "context": "El Barça."}, "the column context is not used, and the question may be about it"),
    ({"messages": TURNS, "history": [["a", "b"]]}, "the column history is not used, and the question may be about it"),
    ({"instruction": "Resumeix.", "text": "Un text.", "output": "x"}, "columns.input=text appends it"),
    ({"question": "Qui?", "story": "El Barça va guanyar.", "answer": "x"}, "columns.input=story appends it"),
    ({"question": "Qui?", "flores_passage": "El Barça va guanyar.", "answer": "x"}, "=flores_passage appends it"),
    ({"question": "Quina?", "choices": ["a", "z"], "answer": "a"}, "the column choices is not used, and the question"),
    ({"messages": [*TURNS, TURNS[0]], "response": "z"}, "messages ends without an answer, and the column response"),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, "pair 1 of history is a list of 1, not a list of two"),
    ({"instruction": "x", "output": "y", "history": "a"}, "history is a text, not a list of messages"),
    (
        {"prompt": TURNS, "completion": "y", "history": [["a", "b"]]},
        "history holds turns before prompt, which is a list",
    ),
    *[
        ({"prompt": "x", "completion": "y", **columns}, f"the row has {next(iter(columns))}: preference data is not")
        for columns in (
            {"label": False},
            {"label": True},
            {"label": 0},
            {"label": "false"},
            {"kto_tag": True},
            {"labels": [True]},
            {"chosen": "a", "rejected": "b"},
            {"rejected_response": "b"},
            {"score_rejected": 3},
            {"winner": "a"},
        )
    ],
    ({"conversations": TURNS, "chosen": {"from": "gpt", "value": "d"}}, "the row has chosen: preference data is not"),
    (
        {"messages": TURNS, "rating": "down"},
        "the row has rating: an answer that was rated bad .*skip_broken_lines",
    ),
    ({"messages": TURNS, "rating": "Thumbs_Down"}, "the row has rating: an answer that was rated bad is not for fine"),
    *[
        ({"messages": TURNS, key: value}, f"the row has {key}: .*columns.ignore=.{key}. trains without it")
        for key, value in (
            ("tools", [{"type": "function"}]),
            ("tools", '[{"name": "temps"}]'),
            ("functions", [{"name": "temps"}]),
            ("image", "a.jpg"),
            ("images", [{"bytes": b"x"}]),
            ("audio", {"path": "a.wav"}),
            ("image_id", 0),
            ("speech_path", "a.wav"),
            ("thinking", "penso"),
            ("cot", "penso"),
            ("weight", 0),
            ("weight", 0.5),
            ("train", False),
            ("chat_template_kwargs", {"enable_thinking": False}),
        )
    ],
    *[
        ({"messages": [TURNS[0], TURNS[1] | {key: value}]}, f"message 2 of messages has {key}: ")
        for key, value in (
            ("tool_calls", [{"type": "function"}]),
            ("function_call", {"name": "temps"}),
            ("images", ["a.jpg"]),
            ("reasoning_content", "penso"),
            ("thinking", "penso"),
            ("audio", {"id": "x"}),
            ("label", False),
            ("masked", True),
            ("attachments", ["a.pdf"]),
            ("channel", "analysis"),
            ("recipient", "functions.temps"),
            ("train_detail", [{"begin_offset": 0, "train": False}]),
        )
    ],
    ({"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [1]}]}, "has tool_calls: tools and"),
    *[
        ({"messages": [*TURNS, {"role": role, "content": "x"}]}, f"message 3 has the role '{role}': tools and their")
        for role in ("tool", "function", "observation", "ipython")
    ],
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


def test_a_column_or_key_to_ignore_is_no_reason_to_refuse():
    thought = {"id": 1, "label": True, "messages": [TURNS[0], TURNS[1] | {"reasoning_content": "penso"}]}
    unused: set[str] = set()
    columns = ColumnsConfig(ignore=["label", "reasoning_content", "context", "weight", "name"])
    assert conversation_of_row(thought, columns, unused) == HELLO
    assert unused == {"id", "label", "messages[].reasoning_content"}
    assert conversation_of_row({"prompt": "Hola", "context": "x y", "completion": "Bon dia"}, columns) == HELLO
    named = [TURNS[0] | {"name": "Pep"}, TURNS[0] | {"name": "Anna"}, TURNS[1] | {"weight": 0}]
    assert conversation_of_row({"messages": named}, columns) == [HELLO[0], *HELLO]


@pytest.mark.parametrize("key", ["messages", "prompt", "answer", "system", "input", "history"])
def test_a_named_column_that_is_not_there_is_refused(key):
    with pytest.raises(ConversationError, match="no column 'nope'; it has prompt, completion"):
        conversation_of_row({"prompt": "x", "completion": "y"}, ColumnsConfig(**{key: "nope"}))
