"""Win rates of two runs under several rewards, as papers on preference alignment report them.

Pictures are paired by prompt and seed and must have been sampled with equal guidance and steps: `compare` refuses
anything else. A higher score wins, a tie counts one half. To win rate, sign test and mean difference of `compare` this
adds the medians of both sides (the InPO family reports them), tests over prompts where a prompt has several pictures,
which reward was held out, and an unweighted average over the rewards. That average is a secondary number: rewards
agree with one another for bad reasons, too, and one that was trained on is no evidence of anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffalign.eval import statistics
from diffalign.eval.base import Row, Score
from diffalign.eval.compare import Comparison, Pair, Run, pair_rows
from diffalign.eval.tables import interval, number, percent
from diffalign.reward_models.score_files import read_rows

__all__ = ["MACRO", "read_scores", "render", "win_rates"]

MACRO = "macro_win_rate"
"""Name of the average over the rewards."""


def win_rates(
    run: Run,
    *,
    held_out: Collection[str] = (),
    benchmark: str = "win_rates",
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """The comparison of two runs from their stored rows; no picture and no model is looked at.

    - "win_rate/R" as in `Comparison`; `details` has, beside what is there, `held_out`, `mean_of_prompts` (the mean over
      prompts of the mean over their seeds), and `prompt_sign_test_p` with its Holm correction over all rewards,
      `prompt_sign_test_p_holm`: a prompt is won if more than half of it is. With one picture of each prompt these are
      the ordinary ones.
    - "difference/R" as in `Comparison`, with `base_median` and `aligned_median` in `details`.
    - "macro_win_rate", where there are several rewards: the mean of their win rates over the pairs that have all of
      them, prompts resampled; `details["secondary"]` is True.

    Args:
        run: Rows and settings of the base and of the aligned side.
        held_out: Rewards that had no part in making the training data or in training; the others are marked as used.
            Leave it empty if that is not known.
        benchmark: Name of the prompts.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Raises:
        ValueError: If a held-out reward has no scores, or the runs cannot be compared; see `compare`.
    """
    comparison = run.compare(benchmark=benchmark, resamples=resamples, seed=seed)
    names = comparison.scorers
    unknown = sorted(set(held_out) - set(names))
    if unknown:
        raise ValueError(f"no scores of the held-out {', '.join(unknown)} (available: {', '.join(names) or 'none'})")
    pairs, missing = pair_rows(run.base, run.aligned, run.n_expected)
    scores = dict(comparison.scores)
    tests: dict[str, float] = {}
    for name in names:
        both = _with(pairs, [name])
        if not both:
            continue
        by_prompt = _by_prompt(both, name)
        won = sum(share > 0.5 for share in by_prompt.values())
        lost = sum(share < 0.5 for share in by_prompt.values())
        tests[name] = statistics.sign_test(won, lost)
        medians = {side: _median(both, name, side) for side in ("base", "aligned")}
        win, gain = scores[f"win_rate/{name}"], scores[f"difference/{name}"]
        more = {
            "mean_of_prompts": float(np.mean(list(by_prompt.values()))),
            "prompt_sign_test_p": tests[name],
            **({"held_out": name in held_out} if held_out else {}),
        }
        scores[f"win_rate/{name}"] = replace(win, details={**win.details, **more})
        middle = {f"{side}_median": value for side, value in medians.items()}
        scores[f"difference/{name}"] = replace(gain, details={**gain.details, **middle})
    for name, p in zip(tests, statistics.holm(list(tests.values())), strict=True):
        win = scores[f"win_rate/{name}"]
        scores[f"win_rate/{name}"] = replace(win, details={**win.details, "prompt_sign_test_p_holm": p})
    if len(names) > 1:
        scores[MACRO] = _macro(pairs, missing, names, resamples, seed)
    warnings = list(comparison.warnings)
    if held_out and set(held_out) >= set(names):
        warnings.append("every reward is marked as held out; name those that training has seen by leaving them out")
    protocol = {
        **comparison.protocol,
        "held_out": sorted(held_out),
        "test": "sign test over prompts, Holm's correction",
    }
    return replace(comparison, scores=scores, warnings=tuple(warnings), protocol=protocol)


def read_scores(path: str | Path) -> list[Row]:
    """Rows of what `diffalign score` wrote, .jsonl or .parquet, to be paired by prompt with those of another model.

    The seed of a row is the number of rows of its prompt before it: equal prompts are paired in their order. More
    a folder of pictures cannot tell; say in the settings of the run how both were sampled.

    Raises:
        ValueError: If there are no rows, or one has no prompt.
    """
    drawn: dict[str, int] = defaultdict(int)
    rows = []
    for row in read_rows(Path(path)):
        prompt = row.get("prompt")
        if not isinstance(prompt, str):
            raise ValueError(f"{path}: row {row.get('id')!r} has no prompt to pair it by")
        image = row.get("image") or None
        rows.append(Row(str(row["id"]), prompt, drawn[prompt], image=image, scores=row["scores"]))
        drawn[prompt] += 1
    if not rows:
        raise ValueError(f"{path} holds no rows; expected what `diffalign score` writes")
    return rows


def render(comparison: Comparison) -> str:
    """The win rates for a terminal, with guidance and steps, warnings, and the average at the end."""
    sampling = ", ".join(f"{name} {value}" for name, value in comparison.sampling.items() if _is_short(value))
    pairs = comparison.n_expected - comparison.n_missing
    lines = [f"{comparison.benchmark}: {pairs} pairs ({sampling})" + " PARTIAL" * comparison.partial]
    head = (
        f"{'reward':<26}{'win rate':>9} {'95 %':<15}{'p (Holm)':>9}{'wins/ties/losses':>18}{'mean':>18}{'median':>18}"
    )
    lines += [head, "-" * len(head)]
    for name in comparison.scorers:
        win, gain = comparison.win_rate(name), comparison.difference(name)
        mark = {True: " (held out)", False: " (used)", None: ""}[win.details.get("held_out")]
        counts = "/".join(str(win.details.get(kind, 0)) for kind in ("wins", "ties", "losses"))
        p = win.details.get("prompt_sign_test_p_holm")
        means, medians = (
            f"{number(gain.details.get(f'base{end}'))} > {number(gain.details.get(f'aligned{end}'))}"
            for end in ("", "_median")
        )
        lines.append(
            f"{name + mark:<26}{percent(win.value):>9} {interval(win, shares=True):<15}{number(p):>9}{counts:>18}"
            f"{means:>18}{medians:>18}"
        )
    macro = comparison.scores.get(MACRO)
    if macro is not None:
        lines.append(f"{'average, secondary':<26}{percent(macro.value):>9} {interval(macro, shares=True)}".rstrip())
    return "\n".join([*lines, *(f"warning: {text}" for text in comparison.warnings)])


def _macro(pairs: Sequence[Pair], missing: int, names: Sequence[str], resamples: int, seed: int) -> Score:
    """The mean of the rewards' win rates; a prompt's results under all rewards stay together."""
    both = _with(pairs, names)
    absent = len(pairs) + missing - len(both)
    if not both:
        return Score(None, None, 0, absent, details={"secondary": True, "rewards": list(names)})
    shares = np.mean([_outcomes(both, name) for name in names], axis=0)
    prompts = [pair.base.prompt for pair in both]
    span = statistics.bootstrap_mean(shares, prompts, resamples=resamples, seed=seed)
    details: Mapping[str, Any] = {"secondary": True, "rewards": list(names)}
    return Score(float(shares.mean()), span, len(both), absent, details=details)


def _with(pairs: Sequence[Pair], names: Sequence[str]) -> list[Pair]:
    """The pairs that have these scores on both sides."""
    return [p for p in pairs if all(side.scores.get(n) is not None for side in (p.base, p.aligned) for n in names)]


def _values(pairs: Sequence[Pair], name: str, side: str) -> list[float]:
    return [getattr(pair, side).scores[name] for pair in pairs]


def _median(pairs: Sequence[Pair], name: str, side: str) -> float:
    return float(np.median(_values(pairs, name, side)))


def _outcomes(pairs: Sequence[Pair], name: str) -> Any:
    """1, 0 or 1/2 of each pair, [N]."""
    return statistics.outcomes(np.subtract(_values(pairs, name, "aligned"), _values(pairs, name, "base")))


def _by_prompt(pairs: Sequence[Pair], name: str) -> dict[str, float]:
    """Each prompt's mean outcome over its seeds."""
    shares: dict[str, list[float]] = defaultdict(list)
    for pair, outcome in zip(pairs, _outcomes(pairs, name), strict=True):
        shares[pair.base.prompt].append(float(outcome))
    return {prompt: float(np.mean(values)) for prompt, values in shares.items()}


def _is_short(value: object) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) <= 24
