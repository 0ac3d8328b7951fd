"""Rates with which yes and no come about equally often, also where most stories have the same answer."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping

from tinysft_jax.data.records import StoryRecord, parse_record
from tinysft_jax.data.sources import EmbeddedSource, Source
from tinysft_jax.data.tasks import RATES, Rates, answer_key, find_answer

RECORDS_TO_COUNT = 4096


def balanced_rates(records: Iterable[StoryRecord], rates: Rates = RATES) -> Rates:
    """Rates for records like these: an answer that is more frequent than the others is asked for less often.

    The question as a whole is asked as often as before, as far as there are enough of the rarest answer. Where the
    answer is the same for all of the records, it's not asked at all.

    Args:
      records: a sample, some thousands; read to its end.
      rates: what to start from.
    """
    balanced = {name: rate for name, rate in rates.items() if isinstance(rate, Mapping)}
    counts = {name: Counter(dict.fromkeys(rate, 0)) for name, rate in balanced.items()}
    for record in records:
        for name, count in counts.items():
            if (answer := find_answer(name, record)) is not None:
                count[answer_key(answer)] += 1
    for name, count in counts.items():
        rate = sum(balanced[name].values()) / len(count)
        each = min(rate * count.total() / len(count), min(count.values()))  # records to ask, of each answer
        balanced[name] = {answer: each / n if n else 0.0 for answer, n in count.items()}
    return {**rates, **balanced}


def rates_for(source: Source) -> Rates:
    """The rates for what a source holds, judged by its first records; those of `RATES` for the embedded stories.

    Raises:
      UserError: if the source can't be read.
    """
    if source.format != "tinystories-instruct" or isinstance(source, EmbeddedSource):
        return RATES
    items = itertools.islice(source, RECORDS_TO_COUNT)
    rates = balanced_rates(record for item in items if (record := parse_record(item.text)) is not None)
    source.position = 0  # nothing of it has been prepared yet
    return rates
