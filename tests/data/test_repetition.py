from cucafera.data.chatml import Message
from cucafera.data.repetition import is_repetitive, repeats_words


def test_the_same_five_words_in_a_row_are_a_repetition_whatever_their_case():
    assert repeats_words("El gat dorm al sol. el gat dorm AL SOL. Fi")
    assert not repeats_words("El gat dorm al sol. El gat dorm al llit.")
    assert not repeats_words("El gat dorm al sol.")
    assert repeats_words("ja ja ja ja ja ja")  # occurrences may overlap


def test_the_number_of_words_and_of_occurrences_can_be_given():
    assert repeats_words("bon dia i bon dia", n=2)
    assert not repeats_words("bon dia i bon dia", n=2, times=3)
    assert not repeats_words("", n=1)


def test_an_answer_that_repeats_five_words_often_is_repetitive():
    run = "un dos tres quatre cinc "
    assert is_repetitive([Message("user", "x"), Message("assistant", run * 15)], 15)
    assert not is_repetitive([Message("user", "x"), Message("assistant", run * 14)], 15)
    assert not is_repetitive([Message("user", run * 20), Message("assistant", "x")], 15)
    assert not is_repetitive([Message("assistant", "un dos tres quatre")], 2)
    assert not is_repetitive([Message("assistant", run * 15, trained=False)], 15)
