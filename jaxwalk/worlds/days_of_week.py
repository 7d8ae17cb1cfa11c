"""Days of the week: a walk over seven days in which tokens name the day, or where it is relative to the last."""

import numpy as np

from jaxwalk.worlds._hidden_markov import HiddenMarkov

_DAYS = ("M", "Tu", "W", "Th", "F", "Sa", "Su")


def days_of_week() -> HiddenMarkov:
    """The state is the current day; a token names the day moved to, or says tomorrow, yesterday, weekend, weekday.

    From any day, with weights that sum to 15: the name of the next day 5, the name of each other day 1, Tmrw 1,
    Yest 1, Wknd 1 (Sa or Su), Wkdy 1 (M to F). Tokens are features of one hidden concept, so related tokens
    should have related vectors. The process is the one of that name in Astera-org/simplexity.
    """
    today = np.eye(7)
    tomorrow, yesterday = np.roll(today, 1, axis=1), np.roll(today, -1, axis=1)
    weekday = np.arange(7) < 5
    named = [np.where(tomorrow[:, day] > 0, 5.0, 1.0)[:, None] * today[day] for day in range(7)]
    t = np.stack([*named, tomorrow, yesterday, np.tile(~weekday / 2, (7, 1)), np.tile(weekday / 5, (7, 1))])
    return HiddenMarkov(t / 15, symbols=(*_DAYS, "Tmrw", "Yest", "Wknd", "Wkdy"), name="days_of_week")
