from tinysft_jax.evaluation.cases import Answer, Answered, Case
from tinysft_jax.evaluation.run import examples, transcript


def answered(task: str, question: str) -> Answered:
    return Answered(Case(task, question, "gold", 2), {"model": Answer("said", True, 1.0)})


def test_a_round_has_one_of_each_task():
    cases = [answered("moral", "1"), answered("moral", "2"), answered("moral", "3"), answered("words", "4")]
    assert [each.case.question for each in examples(cases, 3)] == ["1", "4", "2"]
    assert examples(cases, 0) == []
    assert len(examples(cases, 9)) == 4


def test_a_transcript_has_all_that_was_said():
    each = answered("words", "Use cat.")
    each.answers["baseline"] = Answer("before", True, 1.0)
    assert transcript(each) == "--- words\nQuestion: Use cat.\nModel: said\nBaseline: before\nData: gold"
