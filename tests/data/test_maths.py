import re

from moetrain.data.maths import maths_problems


def test_problems_are_a_function_of_seed_and_index() -> None:
    some, more = (list(maths_problems(seed=1, num_documents=number)) for number in (20, 40))
    assert more[:20] == some
    assert list(maths_problems(seed=2, num_documents=20)) != some


def test_every_equation_in_the_steps_is_true() -> None:
    num_checked = 0
    for text in maths_problems(seed=7, num_documents=400):
        for left, right in re.findall(r"(?<![-+*/] )(?<![-\d])(\d+(?: [-+*/] \d+)+) = (-?\d+)", text):
            assert eval(left) == int(right), text
            num_checked += 1
        assert re.search(r"\nAnswer: .+\n\Z", text)
    assert num_checked > 500


def test_answers_are_right_where_the_question_can_be_evaluated() -> None:
    num_checked = 0
    for text in maths_problems(seed=8, num_documents=400):
        if question := re.match(r"Question: What is ([-+*\d ]+)\?", text):
            assert text.endswith(f"Answer: {eval(question[1])}\n")
            num_checked += 1
    assert num_checked > 50
