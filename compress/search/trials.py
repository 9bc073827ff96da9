"""Values drawn from ranges by Optuna. The same seed and the same results give the same values: a study needs no file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.common.errors import UserError
from compress.search.sweep_file import Range


class Trials:
    """Draws values with a tree-structured Parzen estimator (Bergstra et al. 2011, as Optuna has it).

    A sweep that is started again draws the same values as long as it is told the same results, which kept runs give at once.
    """

    def __init__(self, lists: Mapping[str, tuple[Any, ...]], ranges: Mapping[str, Range], seed: int) -> None:
        """Begin a study.

        Args:
            lists: values of keys, one of which is taken.
            ranges: ranges of keys.
            seed: seed of what is drawn.

        Raises:
            UserError: Optuna is not installed.
        """
        try:
            import optuna
        except ImportError as error:
            raise UserError(
                "a range of values: Optuna is not installed",
                "pip install 'compress-embedders[sweep]', or give lists of values",
            ) from error
        self._optuna, self._lists = optuna, lists
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Values of a list have no order and may be of any kind: one is drawn by its number.
        chosen = {key: optuna.distributions.CategoricalDistribution(range(len(values))) for key, values in lists.items()}
        self._space = chosen | {key: _distribution(optuna, one) for key, one in ranges.items()}
        self._study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))

    def draw(self, count: int) -> list[tuple[Any, dict[str, Any]]]:
        """Draw trials; return each with its values by key, in the order of the keys in the file's lists and ranges."""
        drawn = []
        for _ in range(count):
            trial = self._study.ask(self._space)
            values = {key: listed[trial.params[key]] for key, listed in self._lists.items()}
            drawn.append((trial, values | {key: value for key, value in trial.params.items() if key not in self._lists}))
        return drawn

    def tell(self, trial: Any, figure: float | None, missed: float) -> None:
        """Say what became of a trial.

        Args:
            trial: as `draw` returned it.
            figure: what is to be large; None: the run failed, or has no such figure.
            missed: by how much the run misses gates; 0: it misses none.
        """
        if figure is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return
        trial.set_constraint("gates", missed)
        self._study.tell(trial, figure)


def _distribution(optuna: Any, given: Range) -> Any:
    """Return a range as Optuna takes it."""
    if given.whole:
        return optuna.distributions.IntDistribution(given.low, given.high, log=given.log, step=given.step or 1)
    return optuna.distributions.FloatDistribution(given.low, given.high, log=given.log, step=given.step)
