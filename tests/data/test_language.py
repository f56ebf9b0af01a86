"""Recognized languages of short texts, and of texts that are too short."""

import json
import subprocess
import sys

import pytest

from cucafera.config.errors import UserError
from cucafera.data import language
from cucafera.data.language import FEWEST_LETTERS, language_of
from cucafera.data.sources.embedded import embedded_path

SENTENCES = {
    "es": """
        No lo sé.|La capital de Francia es París.|Soy un modelo de lenguaje.|Buenas tardes. ¿En qué puedo ayudarte?|
        El gato duerme sobre la silla.|Claro que sí, dime qué necesitas.|Me gusta mucho el pan con tomate.|
        Un año tiene doce meses.|Lo siento, pero no puedo ayudarte con eso.|Hola, ¿cómo estás?|
        Las hojas caen y la calle se vuelve amarilla.|Mañana iremos a la playa.|Gracias por preguntar.|
        El sol calienta la pared.|La frase correcta es esta.|Ponte un jersey y bebe algo caliente.|
        Desemboca en el mar, cerca de Barcelona.|Sí, claro.|Me llamo Ana y vivo en Madrid.|Es una ciudad muy bonita.|
        Tienes que hacerlo con calma.|Pon el huevo en agua y hiérvelo diez minutos.|
        Los pájaros cantan para marcar su territorio.|
        La fotosíntesis es el proceso por el cual las plantas transforman la luz en energía.""",
    "en": """
        I don't know.|The capital of France is Paris.|I am a language model.|Good afternoon. How can I help you?|
        The cat sleeps on the chair.|Sure, tell me what you need.|I really like bread with tomato.|
        A year has twelve months.|I'm sorry, but I can't help you with that.|Hello, how are you?|
        The leaves fall and the street turns yellow.|Tomorrow we will go to the beach.|Thanks for asking.|
        The sun warms the wall.|The correct sentence is this one.|Put on a sweater.|
        It reaches the sea near Barcelona.|Yes, of course.|My name is Ana and I live in London.|It is a very nice city.|
        You should do it slowly.|Boil the egg for ten minutes.|Birds sing to mark their territory.|
        Photosynthesis is the process by which plants turn light into energy.""",
    "fr": """
        Je ne sais pas.|La capitale de la France est Paris.|Je suis un modèle de langue.|
        Bonsoir. Comment puis-je vous aider ?|Le chat dort sur la chaise.|Bien sûr, dites-moi.|J'aime beaucoup le pain.|
        Une année a douze mois.|Je suis désolé, je ne peux pas vous aider.|Comment ça va ?|
        Les feuilles tombent et la rue devient jaune.|Demain, nous irons à la plage.|Merci de votre question.|
        Le soleil chauffe le mur.|La phrase correcte est celle-ci.|Mets un pull.|
        Il arrive à la mer près de Barcelone.|Oui, bien sûr.|Je m'appelle Anne et j'habite à Lyon.|
        C'est une très belle ville.|Il faut le faire lentement.|Faites cuire l'œuf dix minutes.|
        Les oiseaux chantent le matin.|
        La photosynthèse est le processus par lequel les plantes transforment la lumière en énergie.""",
    "it": """
        Non lo so.|La capitale della Francia è Parigi.|Sono un modello linguistico.|Buonasera. Come posso aiutarti?|
        Il gatto dorme sulla sedia.|Certo, dimmi di cosa hai bisogno.|Mi piace molto il pane.|Un anno ha dodici mesi.|
        Mi dispiace, ma non posso aiutarti.|Le foglie cadono e la strada diventa gialla.""",
    "pt": """
        Não sei.|A capital da França é Paris.|Sou um modelo de linguagem.|Boa tarde. Em que posso ajudar?|
        O gato dorme na cadeira.|Claro, diga-me do que precisa.|Gosto muito de pão com tomate.|Um ano tem doze meses.|
        Desculpe, mas não posso ajudar com isso.|As folhas caem e a rua fica amarela.""",
    "gl": """
        Non o sei.|A capital de Francia é París.|Son un modelo de linguaxe.|Boas tardes. En que che podo axudar?|
        O gato dorme na cadeira.|Claro, dime que necesitas.|Gústame moito o pan con tomate.|Un ano ten doce meses.|
        Síntoo, pero non che podo axudar con iso.|As follas caen e a rúa vólvese amarela.""",
    "oc": """
        O sabi pas.|La capitala de França es París.|Soi un modèl de lenga.|Bon ser. Cossí te pòdi ajudar ?|
        Lo cat dormís sus la cadièra.|M'agrada fòrça lo pan amb tomata.|Un an a dotze meses.|
        Me sap grèu, mas te pòdi pas ajudar.|Las fuèlhas tomban e la carrièra ven jauna.|Deman anarem a la plaja.""",
    "de": """
        Das weiß ich nicht.|Die Hauptstadt von Frankreich ist Paris.|Ich bin ein Sprachmodell.|
        Guten Abend. Wie kann ich helfen?|Die Katze schläft auf dem Stuhl.|Natürlich, sag mir, was du brauchst.|
        Ich mag Brot mit Tomaten.|Ein Jahr hat zwölf Monate.|Tut mir leid, das kann ich nicht.|Die Blätter fallen.""",
}


def sentences(code: str) -> list[str]:
    return [sentence.strip() for sentence in SENTENCES[code].split("|")]


def letters(text: str) -> int:
    return sum(map(str.isalpha, text))


@pytest.fixture(scope="module")
def catalan():
    """The answers of the embedded corpora, short as they are."""
    pytest.importorskip("py3langid")
    rows = [
        json.loads(line)
        for name in ("conversations", "preferences")
        for line in embedded_path(name).read_text(encoding="utf-8").splitlines()
    ]
    messages = [message for row in rows for message in row.get("messages") or row["chosen"]]
    return [message["content"] for message in messages if message["role"] == "assistant"]


def test_short_catalan_answers_are_recognized_or_left_open_but_never_taken_for_another_language(catalan):
    found = {answer: language_of(answer) for answer in catalan}
    assert {*found.values()} == {"ca", None}
    for fewest, share in ((FEWEST_LETTERS, 0.9), (25, 0.96), (50, 1.0)):
        long_enough = [code for answer, code in found.items() if letters(answer) >= fewest]
        assert len(long_enough) > 150
        assert long_enough.count("ca") >= share * len(long_enough), (fewest, long_enough.count("ca"), len(long_enough))


@pytest.mark.parametrize("code", SENTENCES)
def test_short_sentences_of_other_languages_are_recognized_or_left_open(code):
    pytest.importorskip("py3langid")
    found = [language_of(sentence) for sentence in sentences(code) if letters(sentence) >= FEWEST_LETTERS]
    assert {*found} <= {code, None}
    assert found.count(code) >= 0.65 * len(found)


def test_languages_of_other_scripts_are_recognized():
    pytest.importorskip("py3langid")
    assert language_of("Столица Франции — Париж, большой город.") == "ru"
    assert language_of("フランスの首都はパリで、とても大きな都市です。") == "ja"
    assert language_of("عاصمة فرنسا هي باريس وهي مدينة كبيرة.") == "ar"


def test_a_text_of_few_letters_has_no_language_and_needs_no_library(monkeypatch):
    monkeypatch.setattr(language, "_identifier", lambda: pytest.fail("the library was asked"))
    for text in ("", "Sí.", "1.234.567.890 + 12 = ?", "🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂", "abcdefghijk"):
        assert language_of(text) is None


def test_without_the_library_the_extra_is_named(monkeypatch):
    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid", None)
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r"recognizing languages needs py3langid: pip install '\.\[language\]'"):
        language_of("La capital de França és París.")


def test_importing_the_module_loads_no_library():
    program = "import sys, cucafera.data.language; sys.exit('py3langid' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
