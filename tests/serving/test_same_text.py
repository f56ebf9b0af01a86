"""The text over HTTP is that of the terminal chat and of Hugging Face's generate, alone and among others."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cucafera.config.schema import SamplingConfig
from cucafera.generation.request import TextDelta
from cucafera.generation.session import ChatSession
from cucafera.interop.hugging_face import write_folder
from cucafera.interop.loaded import load_model
from cucafera.interop.trained import load_trained
from cucafera.runs.locate import locate_model
from tests.serving.conftest import RunningServer, loaded, serving

QUESTIONS = ["Hola", "Bon dia! Qui ets?", "la mar i el bosc", "¿?", "El <im_end> és text"]
GREEDY = SamplingConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=12)


def answer_over_http(server: RunningServer, question: str, **settings) -> str:
    asked = {"model": "chat", "messages": [{"role": "user", "content": question}], "max_tokens": 12, **settings}
    response = server.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def test_greedy_answers_are_those_of_the_chat_and_of_hugging_face(chat, runs: Path, tmp_path: Path):
    trained = load_trained(str(runs / "outputs" / "chat"))
    write_folder(trained.model, trained.tokenizer, trained.chats, GREEDY, "fp32", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    engine = loaded(runs, "chat").engine
    for question in QUESTIONS:
        session = ChatSession(engine, trained.tokenizer, GREEDY)
        typed = "".join(event.text for event in session.answer(question) if isinstance(event, TextDelta))
        served = answer_over_http(chat, question, temperature=0)
        assert served == typed
        if "<im_end>" in question:  # transformers makes a control token of it
            continue
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = theirs.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert served == tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("stream", [False, True])
def test_seeded_answers_among_sixteen_are_those_of_each_alone(runs: Path, stream: bool):
    settings = [
        {"seed": number, "temperature": 0.5 + number % 3 / 2, "top_p": 1 - number % 2 / 10, "top_k": number // 8 * 20}
        for number in range(16)
    ]
    source = str(runs / "outputs" / "chat")
    with serving(load_model(source, locate_model(source), "cpu", 16), "chat") as server:
        alone = [answered(server, number, stream, setting) for number, setting in enumerate(settings)]
        with ThreadPoolExecutor(16) as pool:
            together = list(pool.map(lambda number: answered(server, number, stream, settings[number]), range(16)))
    assert together == alone and len(set(alone)) > 8


def answered(server: RunningServer, number: int, stream: bool, settings: dict) -> str:
    """Ask by the client of OpenAI."""
    more = {name: settings[name] for name in ("top_k",)}
    known = {name: value for name, value in settings.items() if name not in more}
    response = server.openai.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": QUESTIONS[number % 3]}], max_tokens=12, stream=stream,
        extra_body=more, **known,
    )  # fmt: skip
    if not stream:
        return response.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in response)
