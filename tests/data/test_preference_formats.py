"""Pairs of answers from the columns that others use, and what refuses a row."""

import pytest

from cucafera.config.schema import ColumnsConfig, RolesConfig
from cucafera.data.chatml import ConversationError, Message
from cucafera.data.preference_formats import Preference, preference_of_row


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str | list, **keys) -> dict:
    return {"role": "assistant", "content": text, **keys}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def context(*messages: dict) -> list[Message]:
    return [Message(message["role"], message["content"], False) for message in messages]


GREETING = Preference(context(user("Hola")), [Message("assistant", "Bon dia")], [Message("assistant", "Adeu")])
BRIEF = GREETING._replace(prompt=context(system("Sigues breu."), user("Hola")))
TURNS = [user("Hola"), assistant("Bon dia"), user("Què tal?")]
LAST = Preference(context(*TURNS), [Message("assistant", "Bé")], [Message("assistant", "No")])
GOOD, BAD = [assistant("Bon dia")], [assistant("Adeu")]

FORMATS = {
    "texts": ({"prompt": "Hola", "chosen": "Bon dia", "rejected": "Adeu"}, GREETING),
    "messages": ({"prompt": [user("Hola")], "chosen": GOOD, "rejected": BAD}, GREETING),
    "one message": ({"prompt": user("Hola"), "chosen": GOOD[0], "rejected": BAD[0]}, GREETING),
    "a text and messages": ({"prompt": "Hola", "chosen": GOOD, "rejected": "Adeu"}, GREETING),
    "objects of lists, as datasets gives them": (
        {"prompt": {"role": ["user"], "content": ["Hola"]}, "chosen": {"role": ["assistant"], "content": ["Bon dia"]},
         "rejected": {"role": ["assistant"], "content": ["Adeu"]}},
        GREETING,
    ),
    "contents in parts": (
        {"prompt": "Hola", "rejected": "Adeu",
         "chosen": assistant([{"type": "text", "text": "Bon "}, {"type": "text", "text": "dia"}])},
        GREETING,
    ),
    "ShareGPT": (
        {"conversations": [], "prompt": [{"from": "human", "value": "Hola"}],
         "chosen": {"from": "gpt", "value": "Bon dia"}, "rejected": {"from": "gpt", "value": "Adeu"}},
        GREETING,
    ),
    "nulls of parquet": (
        {"prompt": [user("Hola") | {"from": None, "value": None, "tool_calls": None}], "system": None, "tools": [],
         "chosen": [assistant("Bon dia", weight=None)], "rejected": [assistant("Adeu", weight=None)], "label": None},
        GREETING,
    ),
    "UltraFeedback, binarized": (
        {"prompt": "Hola", "prompt_id": "a1", "chosen": [user("Hola"), *GOOD], "rejected": [user("Hola"), *BAD],
         "messages": [user("Hola"), *GOOD], "score_chosen": 8.5, "score_rejected": 3.0},
        GREETING,
    ),
    "TRL's implicit prompt": ({"chosen": [user("Hola"), *GOOD], "rejected": [user("Hola"), *BAD]}, GREETING),
    "an implicit prompt, and a column of prompts that is not filled": (
        {"prompt": None, "chosen": [user("Hola"), *GOOD], "rejected": [user("Hola"), *BAD]}, GREETING,
    ),
    "several turns": ({"prompt": TURNS, "chosen": [assistant("Bé")], "rejected": "No"}, LAST),
    "several turns that are repeated": (
        {"prompt": TURNS, "chosen": [*TURNS, assistant("Bé")], "rejected": [*TURNS, assistant("No")]}, LAST,
    ),
    "several turns, and the prompt is the first message": (
        {"prompt": "Hola", "chosen": [*TURNS, assistant("Bé")], "rejected": [*TURNS, assistant("No")]}, LAST,
    ),
    "several turns, and the prompt is the last message": (
        {"prompt": "Què tal?", "chosen": [*TURNS, assistant("Bé")], "rejected": [*TURNS, assistant("No")]}, LAST,
    ),
    "several turns, implicit": ({"chosen": [*TURNS, assistant("Bé")], "rejected": [*TURNS, assistant("No")]}, LAST),
    "history": (
        {"history": [["Hola", "Bon dia"]], "prompt": "Què tal?", "chosen": "Bé", "rejected": "No"}, LAST,
    ),
    "an answer of the prompt has weight 0": (
        {"prompt": [user("Hola"), assistant("Bon dia", weight=0), user("Què tal?")], "chosen": "Bé", "rejected": "No"},
        LAST,
    ),
    "several answers that differ": (
        {"prompt": "Hola", "chosen": [*GOOD, user("I?"), assistant("Res")], "rejected": [*BAD, user("I?"), *BAD]},
        Preference(
            context(user("Hola")),
            [Message("assistant", "Bon dia"), Message("user", "I?"), Message("assistant", "Res")],
            [Message("assistant", "Adeu"), Message("user", "I?"), Message("assistant", "Adeu")],
        ),
    ),
    "a system message in the prompt": (
        {"prompt": [system("Sigues breu."), user("Hola")], "chosen": "Bon dia", "rejected": "Adeu"}, BRIEF,
    ),
    "a system message in a column": (
        {"system": "Sigues breu.", "question": "Hola", "chosen": "Bon dia", "rejected": "Adeu"}, BRIEF,
    ),
    "a system message in both answers": (
        {"prompt": "Hola", "chosen": [system("Sigues breu."), user("Hola"), *GOOD],
         "rejected": [system("Sigues breu."), user("Hola"), *BAD]},
        BRIEF,
    ),
    "a system message that the answers do not repeat": (
        {"prompt": [system("Sigues breu."), user("Hola")], "chosen": [user("Hola"), *GOOD], "rejected": BAD}, BRIEF,
    ),
    "a system message, implicit": (
        {"chosen": [system("Sigues breu."), user("Hola"), *GOOD],
         "rejected": [system("Sigues breu."), user("Hola"), *BAD]},
        BRIEF,
    ),
    "a system message without text on one side": (
        {"chosen": [system(" "), user("Hola"), *GOOD], "rejected": [user("Hola"), *BAD]}, GREETING,
    ),
    "Alpaca": (
        {"instruction": "Resumeix.", "input": "Hola", "chosen": "Bon dia", "rejected": "Adeu"},
        GREETING._replace(prompt=context(user("Resumeix.\n\nHola"))),
    ),
    "other names": (
        {"prompt": "Hola", "preferred_output": "Bon dia", "non_preferred_output": "Adeu"}, GREETING,
    ),
    "OpenAI": (
        {"input": {"messages": [user("Hola")], "tools": [], "parallel_tool_calls": True}, "preferred_output": GOOD,
         "non_preferred_output": BAD},
        GREETING,
    ),
    "ShareGPT, with the turns before the answers": (
        {"conversations": [{"from": "human", "value": "Hola"}], "chosen": {"from": "gpt", "value": "Bon dia"},
         "rejected": {"from": "gpt", "value": "Adeu"}},
        GREETING,
    ),
    "messages before the answers": ({"messages": TURNS, "chosen": "Bé", "rejected": "No", "prompt": None}, LAST),
    "the prompt in a column input": (
        {"system": "Sigues breu.", "input": "Hola", "chosen": "Bon dia", "rejected": "Adeu",
         "generations": ["Bon dia", "Adeu"]},
        BRIEF,
    ),
    "preferred and dispreferred": ({"prompt": "Hola", "preferred": "Bon dia", "dispreferred": "Adeu"}, GREETING),
    "a verdict, and the answers": (
        {"prompt": "Hola", "chosen": "Bon dia", "rejected": "Adeu", "winner": "a"}, GREETING,
    ),
    "a row of the server's page": (
        {"prompt": [user("Hola")], "chosen": GOOD, "rejected": BAD, "model": "chat, step 3",
         "time": "2025-01-01T00:00:00+00:00"},
        GREETING,
    ),
    "a row of cucafera.prefer": (
        {"prompt": [user("Hola")], "chosen": GOOD, "rejected": BAD, "model": "chat, step 3", "by": "rules",
         "time": "2025-01-01T00:00:00+00:00", "reasons": ["it repeats itself"], "finish_reasons": ["stop", "length"]},
        GREETING._replace(ended=(True, False)),
    ),
    "spaces": ({"prompt": "Hola ", "chosen": [user(" Hola"), *GOOD], "rejected": BAD},
               GREETING._replace(prompt=context(user("Hola ")))),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_the_same_pair(name):
    row, pair = FORMATS[name]
    read = preference_of_row(row, ColumnsConfig())
    stripped = [[message._replace(content=message.content.strip()) for message in part] for part in read[:3]]
    assert stripped == [[message._replace(content=message.content.strip()) for message in part] for part in pair[:3]]
    assert read.ended == pair.ended


def test_columns_are_found_by_the_names_of_the_configuration():
    row = {"chosen": "x", "rejected": "y", "input": "Hola", "a": "Bon dia", "b": "Adeu"}
    columns = ColumnsConfig(prompt="input", chosen="a", rejected="b", ignore=["chosen", "rejected"])
    assert preference_of_row(row, columns) == GREETING
    swapped = preference_of_row({"p": "Hola", "chosen": "Adeu", "rejected": "Bon dia"},
                                ColumnsConfig(prompt="p", chosen="rejected", rejected="chosen"))  # fmt: skip
    assert swapped == GREETING


def test_roles_have_the_names_of_the_configuration():
    row = {"prompt": [{"role": "client", "content": "Hola"}], "chosen": "Bon dia", "rejected": "Adeu"}
    assert preference_of_row(row, ColumnsConfig(roles=RolesConfig(user=["client"]))) == GREETING


def test_what_is_not_used_is_noted():
    row = {"prompt": "Hola", "chosen": [assistant("Bon dia", id=3)], "rejected": "Adeu", "score_chosen": 9,
           "score_rejected": 2, "models": ["a", "b"], "source": "x", "license": "CC0-1.0", "id": 7, "empty": None,
           "text": "Hola"}  # fmt: skip
    unused: set[str] = set()
    assert preference_of_row(row, ColumnsConfig(), unused) == GREETING
    assert unused == {
        *("chosen[].id", "score_chosen", "score_rejected", "models", "source", "license", "id", "text"),
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [("label", True), ("tools", [{"name": "f"}]), ("reasoning", "perquè"), ("image", "a.png"), ("weight", 0.5),
     ("context", "una cosa que no és cap pregunta"), ("article", "un text llarg")],
)  # fmt: skip
def test_what_would_change_the_meaning_refuses_a_row_unless_it_is_ignored(key, value):
    row = {"prompt": [user("Hola")], "chosen": GOOD, "rejected": BAD, key: value}
    if key != "context":  # appended to the prompt
        with pytest.raises(ConversationError, match=rf"columns\.ignore=\[{key}\]"):
            preference_of_row(row, ColumnsConfig())
    assert preference_of_row(row, ColumnsConfig(ignore=[key])) == GREETING


PAIR = {"prompt": "Hola", "chosen": "Bon dia", "rejected": "Adeu"}

BROKEN = {
    "equal texts": (PAIR | {"rejected": "Bon dia"}, "the better and the worse answer are the same"),
    "equal but for spaces": (PAIR | {"rejected": [assistant(" Bon dia\n")]}, "the better and the worse answer are the"),
    "equal conversations": (
        {"chosen": [user("Hola"), *GOOD], "rejected": [user("Hola"), *GOOD]},
        "the better and the worse answer are the same",
    ),
    "an empty answer": (PAIR | {"chosen": " "}, "chosen is empty"),
    "both answers empty": (PAIR | {"chosen": "", "rejected": ""}, "chosen is empty"),
    "an empty message": (
        PAIR | {"rejected": [*BAD, user("I?"), assistant("")]}, "message 3 of rejected, of the assistant, is empty",
    ),
    "an answer that is null": (PAIR | {"rejected": None}, "rejected is null, not a text"),
    "no messages": (PAIR | {"rejected": []}, "rejected must end with a message of the assistant; its last one is none"),
    "an empty prompt": (PAIR | {"prompt": ""}, "it has no prompt, and chosen is a text: name the prompt's column"),
    "no prompt": (
        {"chosen": "Human: Hola\n\nAssistant: Bon dia", "rejected": "Human: Hola\n\nAssistant: Adeu"},
        "it has no prompt, and chosen is a text: name the prompt's column with columns.prompt (of data.sources.NAME); "
        "a text that begins with its prompt must become a list of messages",
    ),
    "no prompt, messages": (
        {"chosen": GOOD, "rejected": BAD},
        "it has no prompt: name its column with columns.prompt (of data.sources.NAME)",
    ),
    "only a system message before the answers": (
        {"chosen": [system("x"), *GOOD], "rejected": [system("x"), *BAD]}, "it has no prompt: name its column",
    ),
    "different prompts": (
        {"chosen": [user("Hola"), *GOOD], "rejected": [user("Ei"), *BAD]},
        "the better and the worse answer are to different prompts",
    ),
    "different last prompts": (
        {"chosen": [*TURNS, assistant("Bé")], "rejected": [*TURNS[:2], user("I?"), assistant("No")]},
        "the better and the worse answer are to different prompts",
    ),
    "a further prompt": (
        {"chosen": [user("Hola"), *GOOD], "rejected": [user("Hola"), user("Ei"), *BAD]},
        "the better and the worse answer are to different prompts",
    ),
    "another prompt than that of the column": (
        PAIR | {"chosen": [user("Ei"), *GOOD]}, "chosen begins with another prompt than the column of the prompt holds",
    ),
    "less than the prompt of the column": (
        PAIR | {"prompt": TURNS, "rejected": [user("Hola"), *BAD]}, "rejected begins with another prompt",
    ),
    "different system messages": (
        {"chosen": [system("x"), user("Hola"), *GOOD], "rejected": [system("y"), user("Hola"), *BAD]},
        "the better and the worse answer have different system messages",
    ),
    "a system message on one side": (
        PAIR | {"chosen": [system("x"), user("Hola"), *GOOD]},
        "the better and the worse answer have different system messages",
    ),
    "a system message in a column and another in the prompt": (
        PAIR | {"prompt": [system("x"), user("Hola")], "system": "y"},
        "it has a system message in the column system and another among its messages",
    ),
    "a prompt that ends with an answer": (
        PAIR | {"prompt": TURNS[:2]},
        "a prompt ends with a message of the user, and the last one of prompt is one of the assistant",
    ),
    "a prompt that is only a system message": (
        PAIR | {"prompt": [system("x")]},
        "a prompt ends with a message of the user, and the last one of prompt is one of the system",
    ),
    "an answer that ends with the user": (
        PAIR | {"rejected": [*BAD, user("I?")]},
        "rejected must end with a message of the assistant; its last one is one of the user",
    ),
    "an answer that continues the other": (
        PAIR | {"rejected": [*GOOD, user("I?"), assistant("Res")]},
        "rejected begins with all of chosen, which leaves nothing to compare",
    ),
    "an answer that the other continues": (
        PAIR | {"chosen": [*BAD, assistant("Res")]},
        "chosen begins with all of rejected, which leaves nothing to compare",
    ),
    "only the better answer": (
        {"prompt": "Hola", "chosen": "Bon dia"},
        "it has chosen, and no other answer to compare with: name both with columns.chosen and columns.rejected (of "
        "data.sources.NAME)",
    ),
    "only the worse answer": ({"prompt": "Hola", "rejected": "Adeu"}, "it has rejected, and no other answer"),
    "a conversation": (
        {"messages": [user("Hola"), *GOOD]},
        "no pair is recognized in the columns messages: name the better and the worse answer with columns.chosen and "
        "columns.rejected (of data.sources.NAME); conversations are for objective=finetuning",
    ),
    "a document": ({"text": "Hola"}, "no pair is recognized in the columns text"),
    "KTO": (
        {"prompt": "Hola", "completion": "Bon dia", "label": False},
        "(of data.sources.NAME); answers that are labelled one by one (KTO) are no pairs",
    ),
    "a label of the pair": (PAIR | {"label": 1}, "the row has label: it may say which of the two answers is better"),
    "a verdict": (
        {"prompt": "Hola", "response_a": "Bon dia", "response_b": "Adeu", "winner": "a"},
        "; a verdict is not read, so the better answer must have a column of its own",
    ),
    "an unknown role": (
        PAIR | {"prompt": [{"role": "client", "content": "Hola"}]},
        "message 1 of prompt has the role 'client'; roles are",
    ),
    "a tool": (
        PAIR | {"chosen": [{"role": "tool", "content": "3"}, *GOOD]},
        "message 1 of chosen has the role 'tool': tools and their calls cannot be trained on",
    ),
    "a call of a tool": (
        PAIR | {"rejected": [assistant("Adeu", tool_calls=[{"name": "f"}])]}, "message 1 of rejected has tool_calls",
    ),
    "reasoning": (PAIR | {"chosen": [assistant("Bon dia", reasoning_content="Saluda.")]}, "has reasoning_content"),
    "an image": (PAIR | {"images": ["a.png"]}, "the row has images: the model reads text only"),
    "a part that is an image": (
        PAIR | {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "message 1 of prompt has parts that are not text: part 1 has the type 'image_url'",
    ),
    "a message with weight 0": (
        PAIR | {"rejected": [assistant("Adeu", weight=0)]},
        "rejected has a message with weight 0; an answer is compared as a whole",
    ),
    "a weight that is neither 0 nor 1": (PAIR | {"rejected": [assistant("Adeu", weight=0.5)]}, "weight 0.5; it must"),
    "a number": (PAIR | {"chosen": 3}, "chosen is a number, not a text"),
    "a list of texts": (
        PAIR | {"chosen": ["Bon dia"]}, "message 1 of chosen is a text, not an object with role and content",
    ),
    "lists of different lengths": (
        PAIR | {"chosen": {"role": ["assistant"], "content": ["a", "b"]}}, "chosen has lists of different lengths",
    ),
    "half a surrogate pair": (PAIR | {"chosen": "Bon \ud83d"}, "chosen holds half of a surrogate pair"),
    "a text of JSON": (
        PAIR | {"rejected": '[{"role": "assistant", "content": "Adeu"}]'}, "rejected is a text of JSON messages; they",
    ),
    "a complete conversation in place of the prompt": (
        {"messages": [user("Hola"), *GOOD], "chosen": "Bon dia", "rejected": "Adeu"},
        "a prompt ends with a message of the user, and the last one of messages is one of the assistant",
    ),
    "the last message of another prompt": (
        PAIR | {"prompt": "Ei", "chosen": [*TURNS, assistant("Bé")]}, "chosen begins with another prompt",
    ),
    "the last message of the prompt, and one answer alone": (
        {"prompt": "Què tal?", "chosen": [*TURNS, assistant("Bé")], "rejected": "No"}, "are to different prompts",
    ),
    "tools of OpenAI": (
        {"input": {"messages": [user("Hola")], "tools": [{"name": "f"}]}, "preferred_output": GOOD,
         "non_preferred_output": BAD},
        "the row has tools: tools and their calls cannot be trained on",
    ),
    "a verdict next to one answer": (
        {"prompt": "Hola", "chosen": "Bon dia", "preferred": "a"}, "it has chosen, and no other answer",
    ),
    "two prompts": (PAIR | {"question": "Ei"}, "the columns prompt and question hold different values"),
    "two better answers": (PAIR | {"chosen_response": "Ei"}, "the columns chosen and chosen_response hold different"),
    "several users": (
        PAIR | {"prompt": [user("Hola") | {"name": "Pere"}, user("Ei") | {"name": "Anna"}]},
        "messages of the user have several names (Anna, Pere)",
    ),
    "a text that the question may be about": (PAIR | {"document": "Un text llarg."}, "the column document is not used"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_each_broken_row_is_refused_with_its_reason(name):
    row, message = BROKEN[name]
    with pytest.raises(ConversationError) as error:
        preference_of_row(row, ColumnsConfig())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (ColumnsConfig(chosen="good"), "no column 'good'; it has prompt, chosen, rejected"),
        (
            ColumnsConfig(chosen="rejected", rejected="rejected"),
            "columns.chosen and columns.rejected are the same column, rejected",
        ),
        (
            ColumnsConfig(answer="chosen"),
            "columns.answer is for conversations; the columns of pairs are columns.prompt",
        ),
        (ColumnsConfig(messages="chosen"), "columns.messages is for conversations"),
    ],
)
def test_columns_that_cannot_be_used_are_refused(columns, message):
    with pytest.raises(ConversationError) as error:
        preference_of_row(PAIR, columns)
    assert message in str(error.value)
