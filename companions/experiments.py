"""Change one thing in a3c_cartpole.py, and see whether it still learns: a table in Markdown.

    python companions/experiments.py                            # five runs of each change
    python companions/experiments.py --runs 1 --only T_MAX V1   # of rows with one of these words

To try something of your own, add a row to CHANGES. Each run changes a copy of the main file in a
temporary folder.
"""
import argparse
import collections
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

PROGRAM = Path(__file__).resolve().parent.parent / "a3c_cartpole.py"
MAX_EPISODES = 3000

# A row: its name, the options of its runs, and texts of the main file with what takes their place.
# Each text must stand there exactly once. ("\n" before a text: it is at the beginning of a line.)
Change = collections.namedtuple("Change", "name options replacements")

CHANGES = [
    Change("nothing", [], {}),
    Change("`N_STEP_RETURN = 1`", [], {"\nN_STEP_RETURN = 5": "\nN_STEP_RETURN = 1"}),
    Change("`N_STEP_RETURN = 20`", [], {"\nN_STEP_RETURN = 5": "\nN_STEP_RETURN = 20"}),
    Change("`LOSS_V = 0.`", [], {"\nLOSS_V = .5": "\nLOSS_V = 0."}),
    Change("`advantage` for `tf.stop_gradient(advantage)`", [],
           {"tf.stop_gradient(advantage)": "advantage"}),
    Change("`LOSS_ENTROPY = 0.`", [], {"\nLOSS_ENTROPY = .01": "\nLOSS_ENTROPY = 0."}),
    Change("`EPS_START = 0.`", [], {"\nEPS_START = .5": "\nEPS_START = 0."}),
    Change("`T_MAX = 50`", [], {"\nT_MAX = 10": "\nT_MAX = 50"}),
    Change("`--workers 1`", ["--workers", "1"], {}),
    Change("tanh for relu, in `_build_model` and `predict`", [],
           {'activation="relu"': 'activation="tanh"',
            "np.maximum(s @ kernel + bias, 0)": "np.tanh(s @ kernel + bias)"}),
    Change("`--env CartPole-v1`, `LEARNING_RATE_V1 = 5e-3`", ["--env", "CartPole-v1"],
           {"\nLEARNING_RATE_V1 = 2e-3": "\nLEARNING_RATE_V1 = 5e-3"}),
]


def main(argv=None):
    """Run the experiments and print the table. Return the exit status: 1 if a run has failed."""
    parser = argparse.ArgumentParser(description="Try changes of a3c_cartpole.py.")
    parser.add_argument("--runs", default=5, type=common.positive_number,
                        help="runs of each change (default: 5)")
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[""],
                        help="rows that contain one of these words (default: all)")
    args = parser.parse_args(argv)
    changes = [c for c in CHANGES if any(word in c.name for word in args.only)]
    if not changes:
        parser.error(f"argument --only: no row contains {' or '.join(args.only)}")
    try:
        sources = [change_source(PROGRAM.read_text(encoding="utf-8"), c) for c in changes]
    except ValueError as error:
        parser.error(str(error))

    results = {change.name: [] for change in changes}
    try:
        for change, source in zip(changes, sources):
            for _ in range(args.runs):
                results[change.name].append(run(source, change.options))
            print(row(change.name, results[change.name]), file=sys.stderr)
    finally:                # after Ctrl-C, too
        common.say(table(results))
    return int(any(failed(outcomes) for outcomes in results.values()))


def change_source(source, change):
    """Return the text of a program after a change. Raise ValueError if it does not fit the text."""
    for old, new in change.replacements.items():
        times = source.count(old)
        if times != 1:
            raise ValueError(f"{change.name}: {old.strip()} stands in the main file {times} times,"
                             " not once")
        source = source.replace(old, new)
    return source


def run(source, options):
    """Run a program of this text. Return ("learned", "not learned" or "failed", its episodes)."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, PROGRAM.name)
        program.write_text(source, encoding="utf-8")
        process = subprocess.run(
            [sys.executable, program, "--max-episodes", str(MAX_EPISODES), "--no-render",
             "--test-episodes", "0", "--out", folder, *options],
            capture_output=True, text=True, encoding="utf-8", errors="replace")
    summary = re.search(r"^(learned|not learned) in .*, (\d+) episodes", process.stdout, re.M)
    if summary:
        outcome = summary[1]
        episodes = int(summary[2])
        # After an error in a thread, too, it says "not learned", but has fewer episodes.
        if outcome == "learned" or episodes == MAX_EPISODES:
            return outcome, episodes
    print(f"a run has failed:\n{process.stderr}", file=sys.stderr)
    return "failed", 0


def table(results):
    """Return the table of those changes that have been run."""
    lines = ["| change | learned | episodes (median of these) |", "|---|---|---|"]
    lines += [row(name, outcomes) for name, outcomes in results.items() if outcomes]
    return "\n".join(lines)


def row(name, outcomes):
    """Return a row of the table."""
    episodes = [n for outcome, n in outcomes if outcome == "learned"]
    learned = f"{len(episodes)} of {len(outcomes)}"
    if failed(outcomes):
        learned += f" ({failed(outcomes)} failed)"
    median = f"{statistics.median(episodes):.0f}" if episodes else "–"
    return f"| {name} | {learned} | {median} |"


def failed(outcomes):
    """Return how many of the runs have failed."""
    return sum(outcome == "failed" for outcome, _ in outcomes)


if __name__ == "__main__":
    common.run_program(main)
