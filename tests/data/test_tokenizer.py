import json
import pickle
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers

from cucafera.config.errors import UserError
from cucafera.config.tokens import DOCUMENT_START_ID, IM_END_ID, IM_START_ID, PAD_ID, SPECIAL_TOKENS
from cucafera.data import tokenizer as tokenizer_module
from cucafera.data.tokenizer import (
    BYTE_OF_CHARACTER,
    CACHED_CHARACTERS,
    ENCODED_CHARACTERS,
    LIBRARY_CHARACTERS,
    LONGEST_TRAINED_WORD,
    LONGEST_WORD,
    PART,
    PROBE,
    TRAINING_CHARACTERS,
    WORD,
    Tokenizer,
    TokenizerError,
    excerpts,
)

AWKWARD = [
    "",
    " ",
    "\n",
    "\t\r\n  \u00a0\u2003x",
    "l'àvia  canta.\r\n\r\n¡Olé! 1.234,50 €",
    "\x00\x1c\x7f\ufeff\u200b",
    "🐌👩‍👩‍👧 e\u0301 \U0010ffff",
    PROBE,
]


def test_control_tokens_and_bytes_have_their_fixed_ids(tokenizer):
    assert (PAD_ID, DOCUMENT_START_ID, IM_START_ID, IM_END_ID) == (3, 1, 4, 5)
    for token, name in enumerate(SPECIAL_TOKENS):
        assert tokenizer.decode([token]) == name
    assert [tokenizer.decode([token]) for token in (10, 11, 42)] == ["!", '"', "A"]  # GPT-2's order of bytes
    assert tokenizer.token_bytes()[10:266].tolist() == [1] * 256
    assert tokenizer.vocab_size == 300


@pytest.mark.parametrize("text", AWKWARD)
def test_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_control=True) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_text_that_spells_a_control_token_is_ordinary_text(tokenizer, name):
    for text in (name, f"a {name}b", name * 3):
        ids = tokenizer.encode(text)
        assert min(ids) >= len(SPECIAL_TOKENS)
        assert tokenizer.encode_batch([text])[0].tolist() == ids
        assert tokenizer.decode(ids, skip_control=True) == text


def test_training_on_text_that_spells_control_tokens_gives_no_way_to_them():
    tokenizer = Tokenizer.train([" ".join(SPECIAL_TOKENS)] * 100, vocab_size=400)
    assert min(tokenizer.encode("".join(SPECIAL_TOKENS))) >= len(SPECIAL_TOKENS)


def test_control_tokens_stay_ordinary_text_after_saving_and_pickling(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for copy in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.encode("<im_end> la mar") == tokenizer.encode("<im_end> la mar")
        assert copy.fingerprint == tokenizer.fingerprint
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_batch_gives_what_single_texts_give(tokenizer, make_documents):
    texts = [*AWKWARD, *make_documents(20)]
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts]
    assert {ids.dtype for ids in batch} == {np.dtype("uint16")}


def test_encoding_by_words_equals_the_library_on_complete_texts(tokenizer, make_documents):
    generator = random.Random(3)
    signs = [*" \n\t\r", *"la'ts..,1\u00a0\u2003\x1c\x1d\x85\u200bç€🐌"]
    texts = ["".join(generator.choices(signs, k=length)) for length in range(400)] + make_documents(20) + AWKWARD
    library = tokenizer._inner.encode_batch(texts, add_special_tokens=False)
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [encoding.ids for encoding in library]
    assert all("".join(WORD.findall(text)) == text for text in texts)


def test_forgetting_words_changes_nothing(make_documents, tokenizer, monkeypatch):
    expected = [tokenizer.encode(text) for text in make_documents(20)]
    forgetful = pickle.loads(pickle.dumps(tokenizer))
    monkeypatch.setattr("cucafera.data.tokenizer.CACHED_CHARACTERS", 10)
    assert [forgetful.encode(text) for text in make_documents(20)] == expected
    assert len(forgetful._word_cache) < 20 and 10 < forgetful._cached_characters < 200


def test_threads_share_a_tokenizer_whose_cache_is_full(tokenizer, monkeypatch):
    """A word that one thread has looked up must still be there when another forgets the cache."""
    monkeypatch.setattr("cucafera.data.tokenizer.CACHED_CHARACTERS", 200)
    shared = pickle.loads(pickle.dumps(tokenizer))
    numbers = random.Random(0)
    texts = [" ".join(f"p{numbers.randrange(10**6)}" for _ in range(100)) for _ in range(100)]
    expected = [tokenizer.encode(text) for text in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads:
            results = [threads.submit(lambda: [shared.encode(text) for text in texts]) for _ in range(4)]
            assert all(result.result() == expected for result in results)
    finally:
        sys.setswitchinterval(interval)


def test_the_library_never_gets_a_long_document_at_once(tokenizer, monkeypatch):
    given = []
    fresh = pickle.loads(pickle.dumps(tokenizer))
    original = fresh._add_to_cache
    monkeypatch.setattr(fresh, "_add_to_cache", lambda words, cache: (given.extend(words), original(words, cache)))
    assert len(fresh.encode("la mar i el bosc són lluny\n" * 10_000)) > 100_000
    assert sum(map(len, given)) < 100


LONG = {
    "letter": "a" * 600_000,
    "letters": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=600_000)),
    "digits": "0123456789" * 60_000,
    "ideographs": "漢字" * 300_000,
    "combining characters": "e" + "\u0301" * 600_000,
    "spaces": " " * 600_000 + "x",
    "line ends": "\n" * 600_000,
    "no-break spaces": "\u00a0" * 600_000,
    "emoji": "🐌" * 600_000,
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_the_library_gets_little_text_at_a_time_even_if_it_has_no_spaces(tokenizer, text, monkeypatch):
    fresh = pickle.loads(pickle.dumps(tokenizer))
    library, calls = fresh._inner, []

    class Recorder:
        def encode_batch_fast(self, words, add_special_tokens):
            calls.append(words)
            return library.encode_batch_fast(words, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(fresh, "_inner", Recorder())
    ids, other = fresh.encode_batch([text, "la mar"])
    assert tokenizer.token_bytes()[ids.astype(int)].sum() == len(text.encode())
    assert fresh.decode(ids.tolist()) == text and fresh.decode(other.tolist()) == "la mar"
    assert max(len(word) for words in calls for word in words) <= LONGEST_WORD
    assert max(sum(map(len, words)) for words in calls) <= LIBRARY_CHARACTERS + LONGEST_WORD
    assert fresh._cached_characters <= CACHED_CHARACTERS + 2 * ENCODED_CHARACTERS
    assert fresh.texts_cut == 1


@pytest.mark.parametrize("size", [LONGEST_WORD, LONGEST_WORD + 1])
def test_a_word_is_cut_only_beyond_the_limit(tokenizer, size):
    fresh = pickle.loads(pickle.dumps(tokenizer))
    text = "la " + "m" * (size - 1)  # a word begins with its space
    assert fresh.decode(fresh.encode(text)) == text
    assert fresh.texts_cut == (size > LONGEST_WORD)


def test_text_without_spaces_but_with_signs_has_the_ids_of_the_library(tokenizer):
    fresh = pickle.loads(pickle.dumps(tokenizer))
    text = "".join(random.Random(0).choices("abclmr0123+/,", k=100_000))
    assert fresh.encode(text) == fresh._inner.encode(text, add_special_tokens=False).ids
    assert fresh.texts_cut == 0


def test_where_a_word_is_cut_depends_on_the_text_alone(tokenizer, monkeypatch):
    fresh = pickle.loads(pickle.dumps(tokenizer))
    generator = random.Random(3)
    signs = [*" \n\t", *"la'ts..,1234__²½\u0301\u00a0\u2003\x1c\x85\u200bç€🐌漢。"]
    texts = ["".join(generator.choices(signs, k=generator.randrange(200))) for _ in range(200)]
    monkeypatch.setattr(tokenizer_module, "LONGEST_WORD", 12)
    monkeypatch.setattr(tokenizer_module, "PART", re.compile(PART.pattern.replace(str(LONGEST_WORD), "12"), re.DOTALL))
    found = []
    for characters in (24, 96, 10_000):
        monkeypatch.setattr(tokenizer_module, "ENCODED_CHARACTERS", characters)
        together = [ids.tolist() for ids in fresh.encode_batch(texts)]
        before, uncut = fresh.texts_cut, []
        for text in texts:
            ids = fresh.encode(text)
            assert fresh.decode(ids) == text
            found.append(ids)
            uncut.append(fresh.texts_cut == before)
            before = fresh.texts_cut
            if uncut[-1]:
                assert ids == fresh._inner.encode(text, add_special_tokens=False).ids
        assert together == found[-len(texts) :]
        assert 20 < sum(uncut) < 180
    assert found[:200] == found[200:400] == found[400:]


def test_excerpts_to_train_on_are_all_of_the_text_but_for_what_is_long_without_a_space(make_documents):
    text = "\n".join(make_documents(200))
    parts = list(excerpts(text))
    assert "".join(parts) == text and len(parts) > 3
    assert all(WORD.findall(text)[0] and part[0] in " \n" for part in parts[1:])
    long = list(excerpts(text + "x" * 1_000_000 + text))
    assert max(map(len, long)) <= TRAINING_CHARACTERS + LONGEST_TRAINED_WORD
    assert sum(map(len, long)) < 2 * len(text) + TRAINING_CHARACTERS + LONGEST_TRAINED_WORD


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_tokenizer_learns_from_the_beginning_of_a_long_word(text):
    tokenizer = Tokenizer.train(["la mar la mar", text], vocab_size=400)
    assert max(tokenizer.token_bytes()) <= 4 * LONGEST_TRAINED_WORD
    assert len(tokenizer.encode(" la mar")) <= 4


def test_ids_beyond_the_vocabulary_and_half_characters_decode_to_a_replacement(tokenizer):
    assert tokenizer.decode([65_000, *tokenizer.encode("la")]) == "\ufffdla"
    assert tokenizer.decode([265]) == "\ufffd"  # byte 0xAD


def test_control_tokens_can_be_shown_or_left_out(tokenizer):
    ids = [IM_START_ID, *tokenizer.encode("la mar"), IM_END_ID]
    assert tokenizer.decode(ids) == "<im_start>la mar<im_end>"
    assert tokenizer.decode(ids, skip_control=True) == "la mar"
    assert tokenizer.token_bytes()[ids].sum() == len("la mar")


def test_training_twice_gives_the_same_tokenizer(tokenizer):
    program = (
        "import sys, json; from cucafera.data.tokenizer import Tokenizer; "
        "print(Tokenizer.train(json.load(sys.stdin), 300).fingerprint)"
    )
    texts = json.dumps([f"{word} {word}s" for word in ("mar", "bosc", "avi", "poble", "gat", "lluna")] * 3)
    prints = {
        subprocess.run([sys.executable, "-c", program], input=texts, text=True, capture_output=True, check=True).stdout
        for _ in range(2)  # each process has its own hash seed
    }
    assert len(prints) == 1


def test_another_training_gives_another_fingerprint(tokenizer, make_documents):
    assert Tokenizer.train(make_documents(50), 299).fingerprint != tokenizer.fingerprint


def test_the_fingerprint_is_of_entries_and_merges_in_their_order(tokenizer, tmp_path):
    tokens, merges = tokenizer.tokens, tokenizer.merges
    same = Tokenizer.from_merges(tokens, merges)
    assert same.fingerprint == tokenizer.fingerprint
    assert same.encode("la mar i el bosc cançons") == tokenizer.encode("la mar i el bosc cançons")
    other = Tokenizer.from_merges(tokens, [merges[1], merges[0], *merges[2:]])
    assert other.tokens == tokens and other.fingerprint != tokenizer.fingerprint
    content = described(tokenizer, tmp_path)
    content["model"]["ignore_merges"] = True
    (tmp_path / "ignoring.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "ignoring.json").fingerprint != tokenizer.fingerprint


def test_a_small_corpus_gives_a_small_vocabulary():
    assert Tokenizer.train(["la la"], vocab_size=5000).vocab_size < 280


def described(tokenizer: Tokenizer, tmp_path) -> dict:
    tokenizer.save(tmp_path / "good.json")
    return json.loads((tmp_path / "good.json").read_text())


def refusal(tmp_path, content: str) -> str:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    assert isinstance(caught.value, UserError)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_tokenizer_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"missing\.json: No such file.*tokenizer\.path"):
        Tokenizer.load(tmp_path / "missing.json")


@pytest.mark.parametrize("content", ["", "no json", "[]", '{"text": "a"}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    assert "is not a tokenizer.json" in refusal(tmp_path, content)


def test_control_tokens_at_other_ids_are_named(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    vocabulary = content["model"]["vocab"]
    vocabulary["<pad>"], vocabulary["<im_end>"] = 5, 3
    content["added_tokens"] = [{**t, "id": vocabulary[t["content"]]} for t in content["added_tokens"]]
    content["added_tokens"].sort(key=lambda token: token["id"])
    message = refusal(tmp_path, json.dumps(content))
    assert "<pad> has id 5 instead of 3" in message and "<im_end> has id 3 instead of 5" in message


def test_a_tokenizer_without_control_tokens_is_refused(tmp_path):
    other = tokenizers.Tokenizer(tokenizers.models.BPE())
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert "<s> has no id" in refusal(tmp_path, other.to_str())


def test_further_added_tokens_are_refused(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    content["added_tokens"].append({**content["added_tokens"][0], "id": 300, "content": "<|im_end|>"})
    assert "<|im_end|>" in refusal(tmp_path, json.dumps(content))


def test_more_entries_than_sixteen_bits_are_refused(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    content["model"]["vocab"] |= {f"{'a' * 17}{token:06d}": token for token in range(300, 65_537)}
    assert "65,537 entries" in refusal(tmp_path, json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizer NFC"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "GPT-2 pattern"),
        ({"pre_tokenizer": None}, "GPT-2 pattern"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
            "add_prefix_space",
        ),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                }
            },
            "use_regex",
        ),
    ],
)
def test_a_tokenizer_that_does_not_keep_text_is_refused(tokenizer, tmp_path, change, words):
    assert words in refusal(tmp_path, json.dumps(described(tokenizer, tmp_path) | change))


def test_a_tokenizer_that_is_not_byte_level_is_refused(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    vocabulary = content["model"]["vocab"]
    vocabulary["▁mar"] = vocabulary.pop(next(token for token, number in vocabulary.items() if number == 299))
    content["model"]["merges"] = content["model"]["merges"][:-1]
    assert "'▁mar' is not made of bytes" in refusal(tmp_path, json.dumps(content))


def test_a_tokenizer_that_lacks_a_byte_is_refused(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    vocabulary = content["model"]["vocab"]
    vocabulary["lalala"] = vocabulary.pop(next(sign for sign, byte in BYTE_OF_CHARACTER.items() if byte == 0xFF))
    assert "256 bytes" in refusal(tmp_path, json.dumps(content))


def test_truncation_and_padding_of_the_file_do_not_touch_text(tokenizer, tmp_path):
    content = described(tokenizer, tmp_path)
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("la mar i el bosc") == tokenizer.encode(
        "la mar i el bosc"
    )
