"""A few of an evaluation's cases, to be read: what was asked, what each model said, what the data says."""

from collections.abc import Sequence

from tinysft_jax.evaluation.answers import Answered


def examples(answered: Sequence[Answered], count: int) -> list[Answered]:
    """The first `count` cases round by round: one of each task, then a second of each."""
    rounds: dict[str, int] = {}
    places = []
    for each in answered:
        rounds[each.case.task] = rounds.get(each.case.task, -1) + 1
        places.append(rounds[each.case.task])
    order = sorted(range(len(answered)), key=places.__getitem__)  # stable: tasks stay in their order
    return [answered[i] for i in order[:count]]


def transcript(each: Answered) -> str:
    """A case as text."""
    lines = [f"--- {each.case.task}", f"Question: {each.case.question}"]
    lines += [f"{speaker.capitalize()}: {answer.text}" for speaker, answer in each.answers.items()]
    return "\n".join([*lines, f"Data: {each.case.gold}"])
